"""flex_attention against PyTorch's own, and what is recognized of block masks: exactly the mask, or nothing."""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from dropin.flex_cases import (
    BATCH,
    CASES,
    NUM_HEADS,
    SEQLEN,
    Mod,
    block_mask,
    causal,
    documents,
    each_case,
    gradients_of,
    inputs,
    padding,
    plain,
    seen_through,
)
from torch import Tensor
from torch.nn.attention import flex_attention as torch_flex
from torch.nn.attention.flex_attention import BlockMask, and_masks, create_block_mask, create_mask, or_masks

from transformer_fast import UnsupportedError
from transformer_fast.dropin import flex_masks
from transformer_fast.dropin.flex import flex_attention, recognize
from transformer_fast.testing.tolerance import judge


@each_case
def test_outputs_and_lse_are_those_of_torch(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Its eager computation without a compiler around it, which in the older versions always is.
    monkeypatch.setattr(torch_flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True, raising=False)
    mod, lengths, _, kind = CASES[name]
    query, key, value = inputs(lengths)
    mask = block_mask(name)
    recognized = recognize(mask, BATCH, NUM_HEADS)
    assert recognized.kind == kind, recognized
    theirs = torch_flex.flex_attention(query, key, value, block_mask=mask, enable_gqa=True)
    visible = create_mask(mod, BATCH, NUM_HEADS, *lengths, device="cpu")
    oracle = plain(query.double(), key.double(), value.double(), visible)
    for given in (mask, recognized):
        out, lse = flex_attention(query, key, value, block_mask=given, enable_gqa=True, return_lse=True)
        for ours, due, theirs_ in ((out, oracle[0], theirs), (lse, oracle[1], plain(query, key, value, visible)[1])):
            verdict = judge(ours, due, theirs_)
            assert verdict.passed, verdict


@each_case
def test_gradients(name: str) -> None:
    mod, lengths, _, _ = CASES[name]
    given = inputs(lengths, gradients=True)
    visible = create_mask(mod, BATCH, NUM_HEADS, *lengths, device="cpu")
    # A row of hidden keys alone has no softmax: its gradient is 0, not NaN.
    seen = visible.any(-1, keepdim=True)

    def expected(dtype: torch.dtype) -> tuple[Tensor, ...]:
        copies = [t.detach().to(dtype).requires_grad_() for t in given]
        return gradients_of(torch.where(seen, plain(*copies, visible | ~seen)[0], 0.0), copies)  # type: ignore[arg-type]

    ours = gradients_of(flex_attention(*given, block_mask=block_mask(name), enable_gqa=True), given)
    for name_, grad, oracle, baseline in zip(
        "qkv", ours, expected(torch.float64), expected(torch.float32), strict=True
    ):
        verdict = judge(grad, oracle, baseline, name=f"d{name_}")
        assert verdict.passed, verdict


@pytest.mark.parametrize(
    ("name", "text"),
    {
        "noop": "window: window_size=(None, None) over 9 keys",
        "causal": "window: window_size=(None, 0) over 17 keys",
        "causal_more_keys": "window: window_size=(None, 0) over 17 keys",
        "window": "window: window_size=(4, 0) over 17 keys",
        "padding_causal": "window: window_size=(None, 0) over 17 keys and a key_padding_mask",
        "cache_lengths": "lengths: window_size=(None, 0) that ends at seqlens_k",
        "documents_causal": "documents: 9 packed sequences, window_size=(None, 0) in each",
        "documents_of_two_lengths": "documents: 9 packed sequences, window_size=(None, None) in each",
        "prefix": "dense: a boolean mask of (3, 1, 17, 17)",
    }.items(),
)
def test_what_is_recognized_in_words(name: str, text: str) -> None:
    assert str(recognize(block_mask(name), BATCH, NUM_HEADS)) == text


def families(draw: random.Random, seqlen_q: int, seqlen_k: int) -> Iterator[Mod]:
    """A mask of each family, with sizes at random."""
    longest = max(seqlen_q, seqlen_k)
    shift, left, right = draw.randint(-4, 4), draw.randint(0, longest), draw.randint(0, 3)
    table = torch.tensor([sorted(draw.choices(range(4), k=longest)) for _ in range(2)])
    start, end = (torch.tensor(draw.choices(range(seqlen_k + 1), k=2)) for _ in range(2))

    def moved(b: Any, h: Any, q: Any, k: Any) -> Any:
        return (k <= q + shift + right) & (k >= q + shift - left)

    yield moved
    yield and_masks(moved, lambda b, h, q, k: (k >= start[b]) & (k < end[b]))
    yield lambda b, h, q, k: (k <= q + end[b] - seqlen_q) & (k >= q + end[b] - seqlen_q - left) & (k < end[b])
    yield and_masks(moved, lambda b, h, q, k: table[b, q] == table[b, k])
    yield lambda b, h, q, k: (table[0, q] == table[1, k]) & (table[0, q] != 2)


@pytest.mark.parametrize("seed", range(8))
def test_random_masks_and_masks_one_element_off_are_reproduced_exactly(seed: int) -> None:
    draw, kinds = random.Random(seed), set()
    for _ in range(2):
        lengths = draw.randint(1, 12), draw.randint(1, 12)
        for mod in families(draw, *lengths):
            exact = create_mask(mod, 2, 1, *lengths, device="cpu")
            wrong = exact.clone()
            place = tuple(draw.randrange(n) for n in wrong.shape)
            wrong[place] = ~wrong[place]
            for table in (exact, wrong):
                blocks = create_block_mask(
                    functools.partial(lambda t, b, h, q, k: t[b, 0, q, k], table),
                    2,
                    None,
                    *lengths,
                    device="cpu",
                    BLOCK_SIZE=4,
                )
                recognized = recognize(blocks, 2, 1)
                kinds.add(recognized.kind)
                assert torch.equal(seen_through(recognized, 2, 1, lengths), table), (recognized, table)
    assert kinds >= {"window", "documents", "dense"}


def test_blocks_count_as_well_as_the_mask_mod() -> None:
    """A block mask may be made of blocks alone; and where both are there, what no list names is hidden."""
    counts = torch.tensor([[[1, 2]]], dtype=torch.int32)
    indices = torch.tensor([[[[1, 0], [0, 1]]]], dtype=torch.int32)
    blocks = torch.tensor([[0, 1], [1, 1]], dtype=torch.bool)
    dense = blocks.repeat_interleave(4, 0).repeat_interleave(4, 1)
    for mod, due in ((None, dense), (causal, dense & torch.ones(8, 8).tril().bool())):
        mask = BlockMask.from_kv_blocks(counts, indices, BLOCK_SIZE=4, mask_mod=mod)
        assert torch.equal(seen_through(mask, 1, 1, (8, 8))[0, 0], due)
    full = BlockMask.from_kv_blocks(counts * 0, indices, counts, indices, BLOCK_SIZE=4, mask_mod=causal)
    assert torch.equal(seen_through(full, 1, 1, (8, 8))[0, 0], dense)


def test_a_slice_of_a_block_mask() -> None:
    whole = create_block_mask(causal, None, None, 16, 16, device="cpu", BLOCK_SIZE=4)
    part = whole[:, :, 2:3]
    with pytest.raises(RuntimeError, match="sliced"):
        recognize(part)
    part.mask_mod = lambda b, h, q, k: causal(b, h, q + 8, k)
    due = torch.ones(16, 16).tril().bool()[8:12]
    assert torch.equal(seen_through(part, 1, 1, tuple(part.seq_lengths))[0, 0, :4], due)


def test_a_mask_that_depends_on_the_batch_though_the_block_mask_does_not() -> None:
    lengths = torch.tensor([8, 3])
    mask = create_block_mask(lambda b, h, q, k: k < lengths[b], None, None, 8, 8, device="cpu")
    due = torch.arange(8) < lengths[:, None]
    assert torch.equal(seen_through(mask, 2, 1, (8, 8)), due[:, None, None].expand(-1, -1, 8, -1))


def test_other_batches_share_a_block_mask() -> None:
    mask = create_block_mask(and_masks(documents, causal), None, None, SEQLEN, SEQLEN, device="cpu")
    due = create_mask(mask.mask_mod, 1, 1, SEQLEN, SEQLEN, device="cpu")
    for batch, num_heads in itertools.product((1, 3), (1, 2)):
        seen = seen_through(mask, batch, num_heads, (SEQLEN, SEQLEN))
        assert torch.equal(seen, due.expand(batch, num_heads, -1, -1))


def test_read_in_inference_mode_and_used_in_training() -> None:
    mask = create_block_mask(and_masks(causal, padding), BATCH, None, SEQLEN, SEQLEN, device="cpu")
    given = inputs((SEQLEN, SEQLEN))
    with torch.inference_mode():
        flex_attention(*given, block_mask=mask, enable_gqa=True)
    given = inputs((SEQLEN, SEQLEN), gradients=True)
    flex_attention(*given, block_mask=mask, enable_gqa=True).sum().backward()
    assert all(t.grad is not None for t in given)


@pytest.mark.parametrize("name", ["documents_of_a_batch", "padding_causal", "prefix"])
def test_compiled(name: str) -> None:
    """With what recognize() made of it in one graph, forward and backward; with the block mask in two."""
    mask, lengths = block_mask(name), CASES[name][1]
    given = inputs(lengths, gradients=True)

    def model(query: Tensor, key: Tensor, value: Tensor, mask: Any) -> Tensor:
        return flex_attention(query, key, value, block_mask=mask, enable_gqa=True).sin()

    due = model(*given, mask)  # type: ignore[call-arg]
    recognized = recognize(mask, BATCH, NUM_HEADS)
    for how, mask_ in ((True, recognized), (False, mask)):
        torch._dynamo.reset()
        out = torch.compile(model, backend="aot_eager", fullgraph=how)(*given, mask_)
        assert torch.equal(out, due)
        for ours, theirs in zip(gradients_of(out, given), gradients_of(due, given), strict=True):
            assert torch.equal(ours, theirs)
        due = model(*given, mask)  # type: ignore[call-arg]
    torch._dynamo.reset()
    with pytest.raises(Exception, match=r"recognize|disable"):
        torch.compile(model, backend="aot_eager", fullgraph=True)(*given, mask)
    torch._dynamo.reset()


def test_aux_and_scale_and_shared_keys() -> None:
    auxiliary = getattr(torch_flex, "AuxRequest", None)
    if auxiliary is None:
        pytest.skip("this PyTorch has no AuxRequest")
    query, key, value = (torch.randn(n, 2, 6, 8) for n in (3, 1, 1))
    mask = create_block_mask(causal, 3, None, 6, 6, device="cpu")
    out, aux = flex_attention(
        query, key, value, None, mask, 0.3, return_aux=auxiliary(lse=True), kernel_options={"BLOCK_M": 16}
    )
    due = flex_attention(
        query, key.repeat(3, 1, 1, 1), value.repeat(3, 1, 1, 1), block_mask=mask, scale=0.3, return_lse=True
    )
    assert torch.equal(out, due[0]) and torch.equal(aux.lse, due[1]) and aux.max_scores is None
    assert flex_attention(query, key, value, return_aux=auxiliary())[1].lse is None
    scores = (query.double() @ key.double().mT * 0.3).masked_fill(torch.ones(6, 6).triu(1).bool(), float("-inf"))
    assert judge(out, scores.softmax(-1) @ value.double(), due[0]).passed


def _wrong_calls() -> dict[str, tuple[type[Exception], str, dict[str, Any]]]:
    mask = create_block_mask(causal, None, None, 8, 8, device="cpu")
    four = create_block_mask(lambda b, h, q, k: q - k <= b, 4, None, 8, 8, device="cpu")
    number = create_block_mask(causal, None, None, 8, 8, device="cpu")
    number.mask_mod = lambda b, h, q, k: q - k
    wanted = getattr(torch_flex, "AuxRequest", lambda **_: type("Aux", (), {"lse": True, "max_scores": True})())
    return {
        "score_mod": (UnsupportedError, "flex_attention.flex_attention", {"score_mod": lambda s, b, h, q, k: s + 1}),
        "backend": (UnsupportedError, "BACKEND", {"kernel_options": {"BACKEND": "FLASH"}}),
        "options": (TypeError, "kernel_options", {"kernel_options": 3}),
        "max_scores": (UnsupportedError, "max_scores", {"return_aux": wanted(lse=True, max_scores=True)}),
        "both": (ValueError, "return_aux", {"return_lse": True, "return_aux": wanted(lse=True)}),
        "lse": (TypeError, "return_lse", {"return_lse": 1}),
        "heads": (ValueError, "enable_gqa", {"key": torch.randn(2, 1, 8, 8)}),
        "query": (ValueError, r"query has shape \(2, 8\)", {"query": torch.randn(2, 8)}),
        "key": (TypeError, "key is of type list", {"key": [1]}),
        "value": (TypeError, "value is of type list", {"value": [1], "key": torch.randn(1, 2, 8, 8)}),
        "shorter": (
            ValueError,
            r"seqlen_k\) \(2, 2, 8, 8\); query and key have \(2, 2, 7, 8\)",
            {"query": torch.randn(2, 2, 7, 8), "block_mask": mask},
        ),
        "batch": (ValueError, "block_mask has batch 4; allowed: 1 or 2", {"block_mask": four}),
        "dense": (TypeError, "block_mask is of type Tensor", {"block_mask": torch.ones(8, 8)}),
        "numbers": (TypeError, "int64; allowed: torch.bool", {"block_mask": number}),
    }


@pytest.mark.parametrize("what", _wrong_calls())
def test_wrong_arguments(what: str) -> None:
    error, match, given = _wrong_calls()[what]
    tensors = {name: torch.randn(2, 2, 8, 8) for name in ("query", "key", "value")}
    with pytest.raises(error, match=match):
        flex_attention(**tensors | given)


def test_a_mask_that_is_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flex_masks, "DENSE_LIMIT", 100)
    query = torch.randn(1, 1, SEQLEN, 8)
    for mod in (causal, documents):
        flex_attention(query, query, query, block_mask=create_block_mask(mod, 1, 1, SEQLEN, SEQLEN, device="cpu"))
    mask = create_block_mask(or_masks(causal, lambda b, h, q, k: k < 3), 1, 1, SEQLEN, SEQLEN, device="cpu")
    with pytest.raises(UnsupportedError, match=r"289 elements; allowed: at most 100.*flex_attention"):
        flex_attention(query, query, query, block_mask=mask)


def test_read_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flex_masks, "_CHUNK", 40)
    for name in ("window_both_sides", "documents_of_a_batch", "padding_causal", "cache_lengths", "prefix", "by_head"):
        mod, lengths, _, kind = CASES[name]
        recognized = recognize(block_mask(name), BATCH, NUM_HEADS)
        assert recognized.kind == kind
        due = create_mask(mod, BATCH, NUM_HEADS, *lengths, device="cpu")
        assert torch.equal(seen_through(recognized, BATCH, NUM_HEADS, lengths), due)
