"""Padding that is skipped: every family with the same outputs and gradients at tokens, and really fewer rows."""

from __future__ import annotations

import copy
import inspect
import pickle
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import transformers
from dropin.promised import PROMISED
from torch import Tensor, nn

from transformer_fast import UnsupportedError, register_with_transformers
from transformer_fast.dropin import huggingface_padding, restore_padding, skip_padding
from transformer_fast.testing.tolerance import ULPS

BATCH, SEQLEN, VOCAB, PAD = 3, 14, 120, 0
#: Small sizes under every name that a configuration may have for them; a window that is shorter than the texts.
SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embedding_size", "word_embed_proj_dim"), 48),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("intermediate_size", "hidden_dim", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim"), 64),
    **dict(num_key_value_heads=2, head_dim=12, sliding_window=4, query_pre_attn_scalar=12, vocab_size=VOCAB),
    **dict(max_position_embeddings=64, pad_token_id=PAD, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1),
    **dict(cls_token_id=1, sep_token_id=2),
}
DROPOUTS = [
    *("attention_dropout", "dropout", "activation_dropout", "attn_pdrop", "embd_pdrop", "resid_pdrop"),
    *("hidden_dropout_prob", "attention_probs_dropout_prob", "hidden_dropout", "layerdrop", "mlp_dropout"),
]
#: Where a family's configuration is registered under another name.
TYPES = {
    "bert_generation": "bert-generation",
    "gemma3": "gemma3_text",
    "roberta_prelayernorm": "roberta-prelayernorm",
    "xlm_roberta": "xlm-roberta",
    "xlm_roberta_xl": "xlm-roberta-xl",
}
#: Without a bounded window; only then may padding stand between tokens.
WINDOWED = ("exaone4", "gemma2", "gemma3", "mistral", "modernbert", "phi3", "starcoder2")


def config_of(family: str) -> Any:
    kind = transformers.CONFIG_MAPPING[TYPES.get(family, family)]
    known = vars(kind())
    settings = {name: size for name, size in SIZES.items() if name in known}
    return kind(**settings, **{name: 0.0 for name in DROPOUTS if name in known})


def randomized(model: nn.Module) -> Any:
    generator = torch.Generator().manual_seed(7)
    for parameter in model.parameters():
        is_matrix = parameter.dim() > 1
        draw = torch.randn(parameter.shape, generator=generator)
        parameter.data = draw * 0.2 if is_matrix else 1.0 + draw * 0.1
    return model


def build(family: str, auto: Any = transformers.AutoModel, **settings: Any) -> Any:
    config = config_of(family)
    for name, value in settings.items():
        setattr(config, name, value)
    return randomized(auto.from_config(config, attn_implementation="eager")).eval()


def padding(side: str) -> Tensor:
    """Bool (batch, seqlen), True = token."""
    keep = torch.arange(SEQLEN) < torch.tensor([SEQLEN, 5, 9])[:, None]
    if side == "left":
        return keep.flip(1)
    if side == "between":
        keep[1, [1, 3]] = False
        keep[2, 0] = False
    return keep


def inputs(keep: Tensor) -> dict[str, Any]:
    ids = torch.randint(3, VOCAB, keep.shape, generator=torch.Generator().manual_seed(3))
    return {"input_ids": ids.masked_fill(~keep, PAD), "attention_mask": keep.long()}


@contextmanager
def rows_computed() -> Iterator[list[int]]:
    """The tokens that each layer was given, while this is open."""
    seen: list[int] = []
    original = huggingface_padding.Packing.padded

    def counted(self: Any, rows: Tensor) -> Tensor:
        seen.append(rows.shape[0] * rows.shape[1])
        return original(self, rows)

    huggingface_padding.Packing.padded = counted  # type: ignore[method-assign]
    try:
        yield seen
    finally:
        huggingface_padding.Packing.padded = original  # type: ignore[method-assign]


def outputs(model: Any, keep: Tensor) -> tuple[Tensor, ...]:
    """What the model says at tokens, and the gradients of a random sum of it."""
    model.zero_grad()
    given = inputs(keep)
    if model.config.is_encoder_decoder:
        given["decoder_input_ids"] = given["input_ids"][:, :6].clamp_min(3)
        found = model(**given, use_cache=False)
        hidden = [found.encoder_last_hidden_state[keep], found.last_hidden_state.flatten(0, 1)]
    else:
        found = model(**given, **no_cache(model))
        hidden = [found.last_hidden_state[keep]]
    weights = [torch.randn(h.shape, generator=torch.Generator().manual_seed(5)) for h in hidden]
    sum((h * w).sum() for h, w in zip(hidden, weights, strict=True)).backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    return *(h.detach() for h in hidden), *grads


def no_cache(model: Any) -> dict[str, bool]:
    return {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}


def assert_same(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    """What is all cancellation, as the gradient of a key's bias, has the rounding of the largest."""
    assert len(found) == len(expected)
    rounding = ULPS * torch.finfo(torch.float32).eps * max(float(theirs.abs().max()) for theirs in expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours - theirs).abs().max() <= PROMISED * theirs.abs().max() + rounding


# ------------------------------------------------------------------------------------------------------ families


@pytest.mark.parametrize("family", huggingface_padding.FAMILIES)
def test_families(family: str) -> None:
    eager = build(family)
    ours = skip_padding(build(family))
    for side in ("right", "left", "between"):
        keep = padding(side)
        with rows_computed() as rows:
            found = outputs(ours, keep)
        assert_same(found, outputs(eager, keep))
        # A layer with a window cannot leave out what stands between tokens; others can, in the same model.
        tokens, may_pack = int(keep.sum()), side != "between" or family not in WINDOWED
        assert rows == [tokens] * len(rows)
        assert len(rows) == 2 if may_pack else len(rows) < 2


def test_a_family_is_that_of_the_layers() -> None:
    """Not of the model around them."""

    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = build("bert")

        def forward(self, keep: Tensor) -> Tensor:
            return self.encoder(**inputs(keep)).last_hidden_state

    keep = padding("right")
    with rows_computed() as rows, torch.no_grad():
        skip_padding(Around())(keep)
    assert rows == [int(keep.sum())] * 2


# --------------------------------------------------------------------------------------------------------- cases


def test_heads_and_losses() -> None:
    """A classifier's loss, of which the pooled first token is taken, and a language model's."""
    keep = padding("right")
    labels = inputs(keep)["input_ids"].masked_fill(~keep, -100)
    for family, auto, given in (
        ("bert", transformers.AutoModelForSequenceClassification, {"labels": torch.tensor([0, 1, 1])}),
        ("bert", transformers.AutoModelForTokenClassification, {"labels": labels.clamp_max(1)}),
        ("bert", transformers.AutoModelForMaskedLM, {"labels": labels}),
        ("llama", transformers.AutoModelForCausalLM, {"labels": labels, "use_cache": False}),
        ("llama", transformers.AutoModelForSequenceClassification, {"labels": torch.tensor([1, 0, 1])}),
        ("gpt2", transformers.AutoModelForCausalLM, {"labels": labels, "use_cache": False}),
    ):
        eager, ours = build(family, auto), skip_padding(build(family, auto))
        found, expected = (model(**inputs(keep), **given).loss.detach() for model in (ours, eager))
        assert_same((found,), (expected,))


def test_padding_is_zero_and_hidden_states_are_whole() -> None:
    keep = padding("left")
    eager, ours = build("llama"), skip_padding(build("llama"))
    with torch.no_grad():
        found, expected = (m(**inputs(keep), use_cache=False, output_hidden_states=True) for m in (ours, eager))
    assert len(found.hidden_states) == len(expected.hidden_states) == 3
    assert_same(tuple(h[keep] for h in found.hidden_states), tuple(h[keep] for h in expected.hidden_states))
    assert bool((found.hidden_states[1][~keep] == 0).all())


def test_a_row_without_tokens() -> None:
    keep = padding("right")
    keep[1] = False
    ours, eager = skip_padding(build("bert")), build("bert")
    assert_same(outputs(ours, keep), outputs(eager, keep))
    keep[:] = False
    with torch.no_grad():
        assert bool(ours(**inputs(keep)).last_hidden_state.isfinite().all())


def test_no_padding_is_no_packing() -> None:
    ours = skip_padding(build("bert"))
    keep = torch.ones(BATCH, SEQLEN, dtype=torch.bool)
    with rows_computed() as rows, torch.no_grad():
        ours(**inputs(keep))
        ours(inputs(keep)["input_ids"])
    assert rows == []


def test_position_ids_of_each_row() -> None:
    keep = padding("left")
    positions = (keep.long().cumsum(1) - 1).clamp_min(0)
    eager, ours = build("llama"), skip_padding(build("llama"))
    with torch.no_grad(), rows_computed() as rows:
        found, expected = (
            m(**inputs(keep), position_ids=positions, use_cache=False).last_hidden_state[keep] for m in (ours, eager)
        )
    assert len(rows) == 2
    assert_same((found,), (expected,))


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant: bool) -> None:
    keep, ours, eager = padding("right"), skip_padding(build("bert")).train(), build("bert").train()
    ours.gradient_checkpointing_enable({"use_reentrant": reentrant})
    with rows_computed() as rows:
        found = outputs(ours, keep)
    assert len(rows) == 4
    assert_same(found, outputs(eager, keep))


def test_compiled() -> None:
    keep, eager = padding("right"), build("bert")
    ours = torch.compile(skip_padding(build("bert")), backend="aot_eager")
    with torch.no_grad():
        found, expected = (m(**inputs(keep)).last_hidden_state[keep] for m in (ours, eager))
    assert_same((found,), (expected,))


# ------------------------------------------------------------------------------------------- what is not packed


def test_cache() -> None:
    """With a cache it is the model as it was, which says so."""
    keep, eager, ours = padding("left"), build("llama"), skip_padding(build("llama"))
    with pytest.warns(UserWarning, match="computes padding, because of past_key_values; pass use_cache=False"):
        found = ours(**inputs(keep))
    assert_same((found.last_hidden_state[keep].detach(),), outputs(eager, keep)[:1])


def test_generate() -> None:
    keep = padding("left")
    auto = transformers.AutoModelForCausalLM
    eager, ours = build("llama", auto), skip_padding(build("llama", auto))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found, expected = (m.generate(**inputs(keep), max_new_tokens=6, do_sample=False) for m in (ours, eager))
    assert torch.equal(found, expected)


def test_attention_weights() -> None:
    keep, eager, ours = padding("right"), build("bert"), skip_padding(build("bert"))
    with pytest.warns(UserWarning, match="computes padding, because of attention weights"), torch.no_grad():
        found = ours(**inputs(keep), output_attentions=True)
    expected = eager(**inputs(keep), output_attentions=True)
    rows = keep[:, None, :, None].expand_as(expected.attentions[0])
    for ours_, theirs in zip(found.attentions, expected.attentions, strict=True):
        assert_same((ours_[rows],), (theirs[rows].detach(),))


def test_chunks_of_rows() -> None:
    """Of which the number of tokens is no multiple."""
    keep, eager = padding("right"), build("bert", chunk_size_feed_forward=7)
    ours = skip_padding(build("bert", chunk_size_feed_forward=7))
    with pytest.warns(UserWarning, match="computes padding, because of chunk_size_feed_forward"):
        assert_same(outputs(ours, keep), outputs(eager, keep))


def test_vmap_and_meta() -> None:
    keep, ours = padding("right"), skip_padding(build("bert"))
    ids = inputs(keep)["input_ids"]

    def hidden(parameters: dict[str, Tensor]) -> Tensor:
        given = {"input_ids": ids, "attention_mask": keep.long()}
        return torch.func.functional_call(ours, parameters, kwargs=given).last_hidden_state

    twice = {name: torch.stack((p, p * 0.5)).detach() for name, p in ours.named_parameters()}
    found = torch.func.vmap(hidden)(twice)
    assert_same((found[0][keep],), (build("bert")(**inputs(keep)).last_hidden_state[keep].detach(),))
    on_meta = {name: t.to("meta") for name, t in inputs(keep).items()}
    assert ours.to("meta")(**on_meta).last_hidden_state.shape == (BATCH, SEQLEN, 48)


def test_what_trainers_hand_on() -> None:
    """A number of labels, which goes through the model to each layer."""
    keep, auto = padding("right"), transformers.AutoModelForCausalLM
    labels = inputs(keep)["input_ids"].masked_fill(~keep, -100)
    given = inputs(keep) | {"labels": labels, "use_cache": False, "num_items_in_batch": (labels != -100).sum()}
    with rows_computed() as rows:
        found = skip_padding(build("llama", auto))(**given).loss.detach()
    assert_same((found,), (build("llama", auto)(**given).loss.detach(),))
    assert len(rows) == 2


def test_cross_attention() -> None:
    """Encoders are packed, decoders compute what they did."""
    keep, eager, ours = padding("right"), build("bart"), skip_padding(build("bart"))
    given = inputs(keep) | {"decoder_input_ids": inputs(keep)["input_ids"], "use_cache": False}
    given["decoder_attention_mask"] = keep.long()
    with torch.no_grad(), rows_computed() as rows:
        found = ours(**given).last_hidden_state[keep]
    assert len(rows) == 2
    with torch.no_grad():
        assert_same((found,), (eager(**given).last_hidden_state[keep],))


# ------------------------------------------------------------------------------------------------------ the model


def test_restored_copied_pickled() -> None:
    keep, eager = padding("right"), build("bert")
    expected = eager(**inputs(keep)).last_hidden_state[keep].detach()
    names = list(eager.state_dict())
    ours = skip_padding(skip_padding(build("bert")))
    for model in (ours, copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        with rows_computed() as rows, torch.no_grad():
            assert_same((model(**inputs(keep)).last_hidden_state[keep],), (expected,))
        assert len(rows) == 2
        assert list(model.state_dict()) == names
        restore_padding(model)
        assert type(model.encoder.layer[0]) is type(eager.encoder.layer[0])
        with rows_computed() as rows, torch.no_grad():
            assert_same((model(**inputs(keep)).last_hidden_state[keep],), (expected,))
        assert rows == []


def test_another_name() -> None:
    register_with_transformers("fast_by_reference", backend="reference")
    ours = skip_padding(build("bert"), "fast_by_reference")
    assert ours.config._attn_implementation == "fast_by_reference"
    keep = padding("right")
    assert_same(outputs(ours, keep), outputs(build("bert"), keep))


def test_refused() -> None:
    with pytest.raises(ValueError, match="attn_implementation='sdpa'; allowed: a name that register"):
        skip_padding(build("bert"), "sdpa")
    with pytest.raises(ValueError, match="attn_implementation='nobody'"):
        skip_padding(build("bert"), "nobody")
    with pytest.raises(UnsupportedError, match="T5Model has no layer of transformers' bert, "):
        skip_padding(build("t5", d_kv=12))
    with pytest.raises(UnsupportedError, match="Linear has no layer of"):
        skip_padding(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="model is of type BertEncoder; allowed: one of transformers, or what holds"):
        skip_padding(build("bert").encoder)
    with pytest.raises(UnsupportedError, match="BertForQuestionAnswering, whose probabilities are over padding too"):
        skip_padding(build("bert", transformers.AutoModelForQuestionAnswering))
    hooked = build("bert")
    hooked.encoder.layer[1].forward = hooked.encoder.layer[1].forward
    with pytest.raises(UnsupportedError, match="a BertLayer whose forward something else has replaced"):
        skip_padding(hooked)
    assert not any(isinstance(module, huggingface_padding._SkipsPadding) for module in hooked.modules())


def test_classes_that_others_derive() -> None:
    """As FSDP and parametrizations do with each module's class."""
    keep, ours, eager = padding("right"), skip_padding(build("bert")), build("bert")
    for layer in ours.encoder.layer:
        layer.__class__ = type("Derived", (type(layer),), {})
    with rows_computed() as rows:
        assert_same(outputs(ours, keep), outputs(eager, keep))
    assert len(rows) == 2
    with pytest.raises(UnsupportedError, match="a layer that has become a Derived since skip_padding"):
        restore_padding(ours)
    assert_same(outputs(ours, keep), outputs(eager, keep))
