"""The attention and mask functions for transformers by themselves: every mask, and the traps of the interface."""

from __future__ import annotations

import copy
import dataclasses
import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from dropin.promised import PROMISED
from models.checkpoints_hf import BERT, GEMMA2, LLAMA, T5, VOCAB, Case, build
from models.inputs_hf import padding_mask
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import masking_utils as theirs

import transformer_fast
from transformer_fast.dropin import huggingface, huggingface_masks
from transformer_fast.dropin.huggingface import attention_forward, register_with_transformers
from transformer_fast.dropin.huggingface_masks import IntervalMask, interval_mask
from transformer_fast.testing import judge

NAME = register_with_transformers()
BATCH, HEADS, KV_HEADS, HEAD_DIM = 3, 6, 2, 24
DECODER = SimpleNamespace(is_causal=True)
ENCODER = SimpleNamespace(is_causal=False)


def qkv(seqlen_q: int, seqlen_k: int, seed: int, batch: int = BATCH) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sizes = ((HEADS, seqlen_q), (KV_HEADS, seqlen_k), (KV_HEADS, seqlen_k))
    return tuple(torch.randn(batch, h, n, HEAD_DIM, generator=generator) for h, n in sizes)  # type: ignore[return-value]


def plain(query: Tensor, key: Tensor, value: Tensor, visible: Tensor, bias: Tensor | None = None) -> Tensor:
    """Attention written out, (batch, seqlen, heads, head_dim); rows that see nothing are 0."""
    key, value = (t.repeat_interleave(HEADS // KV_HEADS, dim=1) for t in (key, value))
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    scores = scores if bias is None else scores + bias.to(scores.dtype)
    weights = scores.masked_fill(~visible, float("-inf")).softmax(-1).nan_to_num(0.0)
    return (weights @ value).transpose(1, 2)


def assert_right(ours: Tensor, tensors: tuple[Tensor, ...], visible: Tensor, bias: Tensor | None = None) -> None:
    oracle = plain(*(t.double() for t in tensors), visible, bias)  # type: ignore[misc]
    verdict = judge(ours, oracle, plain(*tensors, visible, bias))  # type: ignore[misc]
    assert verdict.passed, verdict


def run(tensors: tuple[Tensor, ...], mask: Any, module: Any = DECODER, **options: Any) -> Tensor:
    return attention_forward(module, *tensors, mask, **options)[0]  # type: ignore[misc]


# --------------------------------------------------------------------------------------------- the mask function

FUNCTIONS: dict[str, Callable] = {
    "causal": theirs.causal_mask_function,
    "bidirectional": theirs.bidirectional_mask_function,
    "window": theirs.sliding_window_causal_mask_function(4),
    "window on both sides": theirs.sliding_window_bidirectional_mask_function(3),
    "chunks": theirs.chunked_causal_mask_function(4, torch.tensor([0, 1, 2])),
    "prefix": theirs.or_masks(theirs.causal_mask_function, lambda b, h, q, k: k < 3),
    "causal and own": theirs.and_masks(theirs.causal_mask_function, lambda b, h, q, k: (k + b) % 3 != 1),
}
INTERVALS = ("causal", "bidirectional", "window", "window on both sides")
#: (q_length, kv_length, q_offset, kv_offset)
PLACES = {
    "no cache": (11, 11, 0, 0),
    "prompt on a cache": (5, 14, 9, 0),
    "one token": (1, 14, 13, 0),
    "empty static cache": (5, 14, 0, 0),
    "static cache": (5, 14, torch.tensor(4), 0),
    "one token, static cache": (1, 14, torch.tensor(4), 0),
    "sliding cache": (5, 8, 9, 6),
    "one token, sliding cache": (1, 4, 9, 6),
    "keys before the queries": (4, 9, 0, 0),
    "rows past the keys": (5, 8, 6, 0),
}


@pytest.mark.parametrize("function", list(FUNCTIONS))
@pytest.mark.parametrize("place", list(PLACES))
@pytest.mark.parametrize("side", ["none", "full", "left", "right"])
def test_each_mask(function: str, place: str, side: str, seed: int) -> None:
    """Each function, where caches put it, with padding: the same keys as transformers' own dense mask shows."""
    q_length, kv_length, q_offset, kv_offset = PLACES[place]
    total = int(q_offset) + q_length
    lengths = (total, max(total - 2, 1), max(total // 2, 1)) if side != "full" else (total, total, total)
    padding = None if side == "none" else padding_mask(lengths, side)  # static caches are longer than that
    arguments = dict(batch_size=BATCH, q_length=q_length, kv_length=kv_length, q_offset=q_offset, kv_offset=kv_offset)
    arguments |= dict(mask_function=FUNCTIONS[function], attention_mask=padding)
    visible = theirs.sdpa_mask(**arguments, allow_is_causal_skip=False)
    mask = interval_mask(**arguments)
    tensors = qkv(q_length, kv_length, seed)
    assert_right(run(tensors, mask), tensors, visible)
    if function in INTERVALS and place in ("no cache", "prompt on a cache", "one token", "sliding cache"):
        assert isinstance(mask, IntervalMask)
    if function in ("causal", "window") and place in ("static cache", "empty static cache"):
        assert isinstance(mask, IntervalMask)
    if isinstance(mask, IntervalMask):  # what a model sees that looks inside
        assert torch.equal(mask.dense(), visible) and mask.shape == visible.shape


def test_a_mask_to_compute_with_is_dense() -> None:
    arguments = dict(batch_size=2, q_length=5, kv_length=5, allow_is_causal_skip=False)
    assert torch.equal(interval_mask(**arguments), theirs.sdpa_mask(**arguments))  # type: ignore[arg-type]


def test_the_live_counter_of_a_static_cache_is_not_kept(seed: int) -> None:
    counter = torch.tensor(4)
    masks = [interval_mask(BATCH, rows, 14, q_offset=counter) for rows in (5, 1)]
    dense = [theirs.sdpa_mask(BATCH, rows, 14, q_offset=4, allow_is_causal_skip=False) for rows in (5, 1)]
    counter.add_(5)  # what the first layer does
    for rows, mask, visible in zip((5, 1), masks, dense, strict=True):
        tensors = qkv(rows, 14, seed)
        assert_right(run(tensors, mask), tensors, visible)
        if isinstance(mask, IntervalMask):
            assert torch.equal(mask.dense(), visible)


def test_a_window_counts_the_token_itself(seed: int) -> None:
    """A window of one token is the token."""
    tensors = qkv(6, 6, seed)
    mask = interval_mask(BATCH, 6, 6, mask_function=theirs.sliding_window_causal_mask_function(1))
    itself = tensors[2].repeat_interleave(HEADS // KV_HEADS, dim=1).transpose(1, 2)
    assert_close(run(tensors, mask), itself)
    assert_close(run(tensors, None, sliding_window=1), itself)


# ------------------------------------------------------------------------------------------------ without a mask


@pytest.mark.parametrize(("rows", "keys"), [(7, 7), (5, 9), (1, 9), (9, 5)])
@pytest.mark.parametrize("window", [None, 3])
def test_no_mask(rows: int, keys: int, window: int | None, seed: int) -> None:
    """Several rows stand at the first keys, a single one at the last: what sdpa makes of None."""
    tensors = qkv(rows, keys, seed)
    position = torch.arange(rows)[:, None] + (keys - 1 if rows == 1 else 0)
    distance = position - torch.arange(keys)
    causal = (distance >= 0) & (distance < (window or 99))
    assert_right(run(tensors, None, sliding_window=window), tensors, causal)
    if window is None:
        theirs_out = F.scaled_dot_product_attention(*tensors, is_causal=rows > 1, enable_gqa=True).transpose(1, 2)
        assert judge(run(tensors, None), plain(*(t.double() for t in tensors), causal), theirs_out).passed
        assert_right(run(tensors, None, ENCODER), tensors, torch.ones(rows, keys, dtype=torch.bool))


@pytest.mark.parametrize(("module", "argument"), [(DECODER, False), (ENCODER, True), (DECODER, None), (None, None)])
def test_is_causal_as_argument_wins(module: Any, argument: bool | None, seed: int) -> None:
    tensors = qkv(7, 7, seed)
    causal = argument if argument is not None else True
    visible = torch.ones(7, 7, dtype=torch.bool)
    assert_right(run(tensors, None, module, is_causal=argument), tensors, visible.tril() if causal else visible)


@pytest.mark.parametrize(("function", "left"), [("causal", 99), ("window", 3)])
def test_a_mask_alone_decides_whatever_is_causal_says(function: str, left: int, seed: int) -> None:
    """Moonshine's decoder passes False wherever there is a mask."""
    tensors, keep = qkv(11, 11, seed), padding_mask((11, 5, 8), "left")
    mask = interval_mask(BATCH, 11, 11, mask_function=FUNCTIONS[function], attention_mask=keep)
    distance = torch.arange(11)[:, None] - torch.arange(11)
    visible = (distance >= 0) & (distance <= left) & keep[:, None, None]
    assert_right(run(tensors, mask, is_causal=False), tensors, visible)


# ---------------------------------------------------------------------------------------------------- users' masks


@pytest.mark.parametrize("heads", [1, HEADS], ids=["all heads", "per head"])
@pytest.mark.parametrize("rows", [5, 1])
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.bfloat16, torch.float64])
def test_masks_of_four_dimensions(heads: int, rows: int, dtype: torch.dtype, seed: int) -> None:
    """As they are, and nothing beside them; a mask that is longer than the keys loses its end."""
    tensors = qkv(rows, 9, seed)
    visible = torch.rand(BATCH, heads, rows, 9, generator=torch.Generator().manual_seed(seed)) < 0.6
    mask, bias = visible, None
    if dtype != torch.bool:
        bias = torch.randn(visible.shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
        mask = bias.masked_fill(~visible, float("-inf"))
    assert_right(run(tensors, mask), tensors, visible, bias)
    assert_right(run(tensors, F.pad(mask, (0, 4), value=1)), tensors, visible, bias)
    assert_right(run(tensors, mask[:1]), tensors, visible[:1], None if bias is None else bias[:1])


def test_a_mask_of_two_dimensions_is_padding(seed: int) -> None:
    tensors, keep = qkv(9, 9, seed), padding_mask((9, 5, 1), "left")
    expected = keep[:, None, None] & torch.ones(9, 9, dtype=torch.bool).tril()
    assert_right(run(tensors, keep.long()), tensors, expected)


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        (torch.ones(BATCH, 1, 5, 5, dtype=torch.int64), TypeError, "attention_mask has dtype int64; allowed: bool"),
        (torch.ones(BATCH, 5), TypeError, "attention_mask .* has dtype torch.float32; allowed: bool or integer"),
        (torch.ones(BATCH, 5, 5, dtype=torch.bool), ValueError, r"attention_mask has shape \(3, 5, 5\); allowed"),
        (torch.ones(BATCH, 1, 5, 4, dtype=torch.bool), ValueError, r"bias has shape \(3, 1, 5, 4\); allowed"),
    ],
)
def test_wrong_masks(mask: Tensor, error: type[Exception], message: str, seed: int) -> None:
    with pytest.raises(error, match=message):
        run(qkv(5, 5, seed), mask)


def test_rows_that_see_nothing_are_zero(seed: int) -> None:
    tensors, keep = qkv(7, 7, seed), padding_mask((7, 3, 5), "left")
    out = run(tensors, interval_mask(BATCH, 7, 7, attention_mask=keep))
    dense = run(tensors, theirs.sdpa_mask(BATCH, 7, 7, attention_mask=keep))
    for result in (out, dense):
        assert not result[~keep].any() and result[keep].all()


# --------------------------------------------------------------------------------------------------- other options


def test_options_reach_attention(seed: int) -> None:
    """Scaling, softcap, sinks and a bias by position, with an interval and with a dense mask."""
    tensors, keep = qkv(7, 7, seed), padding_mask((7, 3, 5), "left")
    generator = torch.Generator().manual_seed(seed)
    bias, sinks = torch.randn(1, HEADS, 7, 7, generator=generator), torch.randn(HEADS, generator=generator)
    expected = transformer_fast.attention(
        *tensors, causal=True, key_padding_mask=keep, softmax_scale=0.7, softcap=1.3, sinks=sinks, bias=bias
    )
    visible = theirs.sdpa_mask(BATCH, 7, 7, attention_mask=keep)
    floating = torch.zeros(visible.shape).masked_fill(~visible, float("-inf"))
    for mask in (interval_mask(BATCH, 7, 7, attention_mask=keep), visible, floating):
        out = run(tensors, mask, scaling=0.7, softcap=1.3, s_aux=sinks.to(torch.float64), position_bias=bias)
        assert_close(out, expected.transpose(1, 2))  # type: ignore[union-attr]
    scaled = run(tensors, visible, scaling=torch.tensor(0.7), softcap=1.3, s_aux=sinks, position_bias=bias)
    assert_close(scaled, expected.transpose(1, 2))  # type: ignore[union-attr]


def assert_close(ours: Tensor, expected: Tensor) -> None:
    """Up to rounding, where both are computed by us."""
    verdict = judge(ours, expected.double(), expected)
    assert verdict.passed, verdict


@pytest.mark.parametrize("packed", [False, True])
def test_dropout(packed: bool, seed: int) -> None:
    """Weights are dropped at the rate asked for, the others are scaled up, and the output is theirs."""
    torch.manual_seed(seed)
    query, key, value = qkv(40, 40, seed, batch=1)
    if packed:
        mask = packed_mask(torch.arange(40)[None] % 20)
        value = torch.ones_like(value)
        out = run((query, key, value), mask, dropout=0.25)
        assert abs(out.mean() - 1) < 0.1 and out.std() > 0.05
        return
    mask = interval_mask(1, 40, 40, mask_function=theirs.bidirectional_mask_function)
    out, weights = attention_forward(ENCODER, query, key, value, mask, dropout=0.25, output_attentions=True)  # type: ignore[arg-type]
    whole = attention_forward(ENCODER, query, key, value, mask, output_attentions=True)[1]  # type: ignore[arg-type]
    assert weights is not None and whole is not None
    assert 0.2 < float((weights == 0).float().mean()) < 0.3
    assert_close(weights, whole.where(weights != 0, 0) / 0.75)
    assert_close(out, (weights @ value.repeat_interleave(HEADS // KV_HEADS, dim=1)).transpose(1, 2))
    assert not torch.equal(out, run((query, key, value), mask, ENCODER, dropout=0.25))


def test_indices_of_a_sparse_model(seed: int) -> None:
    tensors, keep = qkv(7, 7, seed), padding_mask((7, 3, 5), "left")
    indices = torch.rand(BATCH, 7, 7, generator=torch.Generator().manual_seed(seed)).argsort(-1)[..., :3]
    chosen = torch.zeros(BATCH, 1, 7, 7, dtype=torch.bool).scatter(-1, indices[:, None], True)
    visible = theirs.sdpa_mask(BATCH, 7, 7, attention_mask=keep)
    for mask in (visible, interval_mask(BATCH, 7, 7, attention_mask=keep)):
        assert_right(run(tensors, mask, indices=indices), tensors, visible & chosen)


@pytest.mark.parametrize("name", ["block_indices", "head_mask"])
def test_options_that_nobody_knows_are_refused(name: str, seed: int) -> None:
    with pytest.raises(transformer_fast.UnsupportedError, match=f"{name} is given"):
        run(qkv(5, 5, seed), None, **{name: torch.zeros(1)})


def test_strides_and_mixed_layouts(seed: int) -> None:
    """What models hand over as views; even a last dimension that is not contiguous."""
    query, key, value = qkv(7, 7, seed)
    key = key.transpose(1, 2).contiguous().transpose(1, 2)
    value = value.transpose(-1, -2).contiguous().transpose(-1, -2)
    visible = torch.ones(7, 7, dtype=torch.bool).tril()
    assert_right(run((query, key, value), interval_mask(BATCH, 7, 7)), (query, key, value), visible)


# --------------------------------------------------------------------------------------------------------- packed


def packed_mask(position_ids: Tensor, window: int | None = None) -> Any:
    """As create_causal_mask makes it of positions that begin again."""
    ids = theirs.find_packed_sequence_indices(position_ids)
    base = theirs.causal_mask_function if window is None else theirs.sliding_window_causal_mask_function(window)
    function = theirs.and_masks(base, theirs.packed_sequence_mask_function(ids))
    batch, seqlen = position_ids.shape
    return interval_mask(batch, seqlen, seqlen, mask_function=function, allow_is_causal_skip=False)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("batch", [1, 2])
def test_packed_sequences(window: int | None, batch: int, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run as packed sequences, and not as a dense mask, unless something needs one."""
    lengths = ((4, 1, 6), (2, 8, 1))[:batch]
    position_ids = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    tensors, mask = qkv(11, 11, seed, batch), packed_mask(position_ids, window)
    blocks = torch.stack([torch.block_diag(*(torch.ones(n, n) for n in row)) for row in lengths]).bool()[:, None]
    distance = torch.arange(11)[:, None] - torch.arange(11)
    visible = blocks & (distance >= 0) & (distance < (window or 99))
    bias = torch.randn(1, HEADS, 11, 11, generator=torch.Generator().manual_seed(seed))
    assert isinstance(mask, IntervalMask) and torch.equal(mask.dense(), visible)
    assert_right(run(tensors, mask, position_bias=bias), tensors, visible, bias)
    out, weights = attention_forward(DECODER, *tensors, mask, output_attentions=True)  # type: ignore[arg-type]
    assert weights is not None and not (weights.masked_fill(visible, 0)).any()
    monkeypatch.setattr(huggingface, "run", None)
    assert_right(run(tensors, mask), tensors, visible)
    assert_close(run(tensors, mask), out)


def test_boundaries_as_arguments(seed: int) -> None:
    """What the flattening collator hands to flash-attn."""
    tensors = qkv(11, 11, seed, batch=1)
    boundaries = torch.tensor([0, 4, 5, 11])
    visible = torch.block_diag(*(torch.ones(n, n) for n in (4, 1, 6))).bool().tril()
    arguments: dict[str, Any] = dict(cu_seq_lens_q=boundaries, cu_seq_lens_k=boundaries)
    for mask in (None, interval_mask(1, 11, 11)):
        assert_right(run(tensors, mask, **arguments), tensors, visible)
        assert_right(run(tensors, mask, **arguments, max_length_q=6, max_length_k=6), tensors, visible)
    with pytest.raises(ValueError, match="cu_seq_lens_q is given with batch=3; allowed"):
        run(qkv(11, 11, seed), None, **arguments)


# ------------------------------------------------------------------------------------------ the mask as an object


def test_code_that_looks_into_a_mask_gets_the_dense_one() -> None:
    keep = padding_mask((6, 3), "left")
    mask = interval_mask(2, 6, 6, attention_mask=keep)
    dense = theirs.sdpa_mask(2, 6, 6, attention_mask=keep)
    other = torch.rand(2, 1, 6, 6)
    assert isinstance(mask, IntervalMask) and dense is not None
    assert (mask.ndim, mask.dim(), mask.size(-1), tuple(mask.shape), mask.dtype) == (4, 4, 6, (2, 1, 6, 6), torch.bool)
    assert mask.to("cpu") is mask and mask.to(torch.bool) is mask and mask.device == dense.device
    for ours, theirs_ in {
        "slice": (mask[:, :, :, :4], dense[:, :, :, :4]),
        "dtype": (mask.to(torch.float32), dense.to(torch.float32)),
        "method": (mask.float(), dense.float()),
        "combined": (mask & (other > 0.5), dense & (other > 0.5)),
        "combined from the right": ((other > 0.5) & mask, dense & (other > 0.5)),
        "added": (other + mask, other + (~dense) * torch.finfo(torch.float32).min),
        "added from the right": (mask + other, other + (~dense) * torch.finfo(torch.float32).min),
        "added in place": (torch.zeros(2, 1, 6, 6).add_(mask), (~dense) * torch.finfo(torch.float32).min),
        "where": (torch.where(mask, other, -1), torch.where(dense, other, -1)),
        "listed": (torch.cat([mask, mask]), torch.cat([dense, dense])),
        "inverted": (~mask, ~dense),
        "copied": (copy.deepcopy(mask).dense(), dense),
        "moved": (mask.to("meta").shape, dense.shape),
    }.values():
        assert torch.equal(ours, theirs_) if isinstance(ours, Tensor) else ours == theirs_


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant: bool, seed: int) -> None:
    """A layer's backward runs it again, with the same mask."""
    keep = padding_mask((7, 3, 5), "left")
    mask = interval_mask(BATCH, 7, 7, attention_mask=keep)
    grads = []
    for again in (False, True):
        tensors = tuple(t.requires_grad_() for t in qkv(7, 7, seed))
        out = checkpoint(run, tensors, mask, use_reentrant=False) if again and not reentrant else None
        if again and reentrant:
            out = checkpoint(lambda *qkv: run(qkv, mask), *tensors, use_reentrant=True)
        out = run(tensors, mask) if out is None else out
        out.square().sum().backward()
        grads.append([t.grad for t in tensors])
    for plain_grad, other in zip(*grads, strict=True):
        assert torch.equal(plain_grad, other)


# ---------------------------------------------------------------------------------------------- through the models


def build_with(case: Case, seed: int, implementation: str, **config: Any) -> Any:
    built = build(case, seed)
    for name, value in config.items():
        setattr(built.config, name, value)
    model = type(built)._from_config(built.config, attn_implementation=implementation)
    model.load_state_dict(built.state_dict())
    return model.eval()


LLAMA_CASE = Case("llama", "LlamaForCausalLM", "LlamaConfig", LLAMA, "decoder", "")
MISTRAL_CASE = Case("mistral", "MistralForCausalLM", "MistralConfig", LLAMA | dict(sliding_window=4), "decoder", "")
GEMMA2_CASE = Case("gemma2", "Gemma2ForCausalLM", "Gemma2Config", GEMMA2, "decoder", "")
BERT_CASE = Case("bert", "BertModel", "BertConfig", BERT, "encoder", "")
T5_CASE = Case("t5", "T5ForConditionalGeneration", "T5Config", T5, "seq2seq", "")


def ids_of(*shape: int, seed: int) -> Tensor:
    return torch.randint(4, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def error_of(ours: Tensor, expected: Tensor) -> float:
    return float((ours - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("case", [BERT_CASE, LLAMA_CASE], ids=lambda case: case.id)
def test_padding_is_not_ignored(case: Case, seed: int) -> None:
    """Without a mask function of ours under the same name, transformers would build no mask at all."""
    assert transformers.AttentionMaskInterface._global_mapping[NAME] is interval_mask
    model, ids, keep = build_with(case, seed, NAME), ids_of(3, 9, seed=seed), padding_mask((9, 4, 6), "left")
    other = ids.where(keep, ids_of(3, 9, seed=seed + 1))
    with torch.no_grad():
        first, second, unpadded = (
            model(i, attention_mask=m)[0][keep] for i, m in ((ids, keep.long()), (other, keep.long()), (ids, None))
        )
    assert not torch.equal(ids, other) and torch.equal(first, second)
    assert error_of(first, unpadded) > 0.01


@pytest.mark.parametrize("case", [BERT_CASE, LLAMA_CASE, MISTRAL_CASE, GEMMA2_CASE], ids=lambda case: case.id)
def test_no_dense_mask_is_made(case: Case, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain, padded, windowed, cached: in none of them is there anything of the size seqlen_q x seqlen_k."""
    monkeypatch.setattr(huggingface_masks, "dense_mask", None)
    model, ids, keep = build_with(case, seed, NAME), ids_of(3, 12, seed=seed), padding_mask((12, 4, 6), "left").long()
    with torch.no_grad():
        model(ids), model(ids, attention_mask=keep)
        if case.inputs == "decoder":
            model.generate(ids[:, :6], attention_mask=keep[:, -6:], max_new_tokens=6, do_sample=False)
            model(torch.cat([ids, ids], dim=1), position_ids=torch.arange(24)[None] % 12, use_cache=False)


@pytest.mark.parametrize("case", [LLAMA_CASE, MISTRAL_CASE], ids=lambda case: case.id)
def test_packed_position_ids(case: Case, seed: int) -> None:
    model, ids = build_with(case, seed, NAME), ids_of(1, 15, seed=seed)
    lengths = (4, 1, 10)
    with torch.no_grad():
        positions = torch.cat([torch.arange(n) for n in lengths])[None]
        packed = model(ids, position_ids=positions, use_cache=False).logits  # with a cache there is no packing
        apart = torch.cat([model(part).logits for part in ids.split(lengths, dim=1)], dim=1)
    assert error_of(packed, apart) < PROMISED


def test_softcap_is_not_dropped(seed: int) -> None:
    """transformers' own sdpa drops it."""
    ids = ids_of(3, 9, seed=seed)
    with torch.no_grad():
        ours, eager, sdpa = (build_with(GEMMA2_CASE, seed, name)(ids).logits for name in (NAME, "eager", "sdpa"))
    assert error_of(ours, eager) < PROMISED < 0.001 < error_of(sdpa, eager)


def calls_of(model: Any, seed: int, monkeypatch: pytest.MonkeyPatch) -> int:
    calls = []

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return attention_forward(*args, **kwargs)

    monkeypatch.setitem(transformers.AttentionInterface._global_mapping, NAME, counted)
    model(input_ids=ids_of(2, 5, seed=seed), decoder_input_ids=ids_of(2, 3, seed=seed))
    return len(calls)


def test_t5_takes_it_when_it_is_built(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """``set_attn_implementation`` on a T5 that is built reaches none of its blocks: they keep copies of the config."""
    assert calls_of(build_with(T5_CASE, seed, NAME), seed, monkeypatch) == 2 + 2 * 3  # and both of a decoder's
    late = build_with(T5_CASE, seed, "eager")
    late.set_attn_implementation(NAME)
    assert calls_of(late, seed, monkeypatch) == 0, "transformers has mended it: say so in register_with_transformers"


@pytest.mark.parametrize("case", [BERT_CASE, LLAMA_CASE, GEMMA2_CASE, T5_CASE], ids=lambda case: case.id)
def test_attention_weights_are_given_when_asked_for(case: Case, seed: int) -> None:
    ids, keep = ids_of(3, 9, seed=seed), padding_mask((9, 4, 6), "right")
    arguments = dict(input_ids=ids, attention_mask=keep.long(), output_attentions=True)
    if case.inputs == "seq2seq":
        arguments["decoder_input_ids"] = ids[:, :5]
    with torch.no_grad():
        ours, eager = (build_with(case, seed, name)(**arguments) for name in (NAME, "eager"))
    names = [name for name in eager if name.endswith("attentions") and eager[name]]
    assert len(names) == (3 if case.inputs == "seq2seq" else 1)
    for name in names:
        assert len(ours[name]) == len(eager[name]) > 1
        for mine, other in zip(ours[name], eager[name], strict=True):
            assert mine.shape == other.shape
            mine, other = mine.transpose(1, 2), other.transpose(1, 2)  # (batch, seqlen_q, heads, seqlen_k)
            rows = keep if mine.shape[1] == keep.shape[1] else keep[:, :0].new_ones(mine.shape[:2])
            assert error_of(mine[rows], other[rows]) < PROMISED  # of padding that sees nothing, theirs are all equal
    assert error_of(ours[0][0], eager[0][0]) < PROMISED  # and the output is still right


@pytest.mark.parametrize("case", [BERT_CASE, LLAMA_CASE, GEMMA2_CASE, T5_CASE], ids=lambda case: case.id)
def test_attention_weights_have_gradients(case: Case, seed: int) -> None:
    """The output's, as methods that explain a prediction ask for them."""
    ids, gradients = ids_of(2, 7, seed=seed), []
    arguments = dict(input_ids=ids, output_attentions=True)
    if case.inputs == "seq2seq":
        arguments["decoder_input_ids"] = ids[:, :5]
    for name in (NAME, "eager"):
        out = build_with(case, seed, name)(**arguments)
        weights = [w for key in out if key.endswith("attentions") for w in out[key]]
        for w in weights:
            w.retain_grad()
        out[0].square().sum().backward()
        gradients.append([w.grad for w in weights])
    for mine, other in zip(*gradients, strict=True):
        assert error_of(mine, other) < PROMISED


def test_attention_weights_are_given_to_whoever_collects_them(seed: int) -> None:
    """A layer need not be told: transformers hooks its output."""
    from transformers.utils import output_capturing

    given = []
    for keys in (["attentions"], ["hidden_states", "cross_attentions"], ["hidden_states"], []):
        token = output_capturing._active_collector.set({key: [] for key in keys})
        given.append(attention_forward(DECODER, *qkv(5, 5, seed), None)[1] is not None)  # type: ignore[arg-type]
        output_capturing._active_collector.reset(token)
    assert given == [True, True, False, False]


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_a_mask_of_four_dimensions_through_a_model(dtype: torch.dtype, seed: int) -> None:
    """A tree of drafts, as speculative decoding has it; integers are refused."""
    ids = ids_of(2, 6, seed=seed)
    visible = torch.eye(6, dtype=torch.bool) | (
        torch.rand(2, 1, 6, 6, generator=torch.Generator().manual_seed(seed)) < 0.5
    )
    floating = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)
    model = build_with(LLAMA_CASE, seed, NAME)
    with torch.no_grad():
        ours = model(ids, attention_mask=visible if dtype == torch.bool else floating).logits
        assert error_of(ours, build_with(LLAMA_CASE, seed, "eager")(ids, attention_mask=floating).logits) < PROMISED
        with pytest.raises(TypeError, match="attention_mask has dtype int64; allowed: bool"):
            model(ids, attention_mask=visible.long())


@pytest.mark.parametrize(("case", "padded"), [(LLAMA_CASE, True), (MISTRAL_CASE, False)], ids=["padded", "window"])
def test_compiled_forward_and_backward(case: Case, padded: bool, seed: int) -> None:
    """As one graph. The dense mask of a window there is transformers' own way under the compiler."""
    torch._dynamo.reset()
    case = dataclasses.replace(case, options=case.options | dict(num_hidden_layers=1))
    model, ids = build_with(case, seed, NAME), ids_of(3, 9, seed=seed)
    keep = padding_mask((9, 4, 6), "right").long() if padded else None
    results = []
    for call in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        model.zero_grad()
        out = call(ids, attention_mask=keep)[0]
        out.square().sum().backward()
        grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        results.append({"out": out.detach()} | grads)
    for name, plain_result in results[0].items():
        assert (results[1][name] - plain_result).abs().max() <= PROMISED * results[0]["out"].abs().max(), name
    torch._dynamo.reset()


# ------------------------------------------------------------------------------------------------------ registering


def test_registering_again_changes_the_back_end(seed: int) -> None:
    mappings = [i._global_mapping for i in (transformers.AttentionInterface, transformers.AttentionMaskInterface)]
    assert register_with_transformers() == register_with_transformers() == NAME == "transformer_fast"
    try:
        assert register_with_transformers("tf_reference", backend="reference") == "tf_reference"
        function = mappings[0]["tf_reference"]
        tensors = tuple(t.double() for t in qkv(5, 5, seed))
        assert function(DECODER, *tensors, None)[0].dtype == torch.float64
        register_with_transformers("tf_reference", backend="cpu")
        with pytest.raises(transformer_fast.UnsupportedError, match="float64"):
            mappings[0]["tf_reference"](DECODER, *tensors, None)
    finally:
        for name in ("tf_reference", "paged|tf_reference"):
            for mapping in mappings:
                mapping.pop(name, None)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (dict(name="my_flash"), ValueError, "name='my_flash'; allowed: a name without 'flash'"),
        (dict(name="paged|x"), ValueError, "allowed"),
        (dict(name=""), ValueError, "name=''; allowed"),
        (dict(name=3), TypeError, "name is of type int; allowed: a string"),
        (dict(backend="gpu"), ValueError, "backend='gpu'; allowed: auto, reference"),
    ],
)
def test_wrong_registration(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        register_with_transformers(**arguments)


def test_paged_attention_needs_continuous_batching(seed: int) -> None:
    with pytest.raises(ValueError, match="cache is None; allowed"):
        huggingface.paged_attention_forward(torch.nn.Module(), *qkv(5, 5, seed), None)


def test_importing_costs_nothing() -> None:
    code = "import sys, transformer_fast.dropin.huggingface; print('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
