"""Whole models under accelerate(): the same outputs and gradients, and reports in which every call site is taken."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when transformers is imported

import pytest
import torch
from dropin.promised import PROMISED
from torch import Tensor, nn

from transformer_fast import accelerate

transformers = pytest.importorskip("transformers")

BATCH, LENGTH, TARGET = 2, 13, 7


def _tokens(*, decoder: bool = False, labels: bool = False) -> dict[str, Tensor]:
    """A padded batch: the first sequence ends early."""
    ids = torch.randint(3, 50, (BATCH, LENGTH))
    keep = torch.ones_like(ids)
    keep[0, 9:] = 0
    found = {"input_ids": ids, "attention_mask": keep}
    if decoder:
        found["labels"] = torch.randint(3, 50, (BATCH, TARGET))
    elif labels:
        found["labels"] = ids.masked_fill(keep == 0, -100)
    return found


@dataclass(frozen=True)
class Model:
    """A model of random weights, its inputs, and how many places in it call SDPA with arguments of their own kind."""

    build: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Tensor]]
    sites: int


def _huggingface(name: str, config: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        made = getattr(transformers, config)(**options, attn_implementation="sdpa")
        return getattr(transformers, name)(made)

    return build


class TorchTransformer(nn.Module):
    """``torch.nn.Transformer`` with the masks that one gives it."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Transformer(24, 3, 2, 2, 32, batch_first=True, dropout=0.0)

    def forward(self, source: Tensor, target: Tensor, hidden: Tensor) -> dict[str, Tensor]:
        mask = nn.Transformer.generate_square_subsequent_mask(target.shape[1])
        options = dict(src_key_padding_mask=hidden, memory_key_padding_mask=hidden, tgt_mask=mask, tgt_is_causal=True)
        return {"last_hidden_state": self.model(source, target, **options)}


def _source_and_target() -> dict[str, Tensor]:
    hidden = torch.zeros(BATCH, LENGTH)
    hidden[0, 9:] = float("-inf")
    return {"source": torch.randn(BATCH, LENGTH, 24), "target": torch.randn(BATCH, TARGET, 24), "hidden": hidden}


SMALL = dict(vocab_size=50, hidden_size=24, num_hidden_layers=2, intermediate_size=32)
LAYERS = dict(encoder_layers=2, decoder_layers=2, encoder_attention_heads=3, decoder_attention_heads=3)
MODELS = {
    "BERT": Model(_huggingface("BertForMaskedLM", "BertConfig", **SMALL, num_attention_heads=3), _tokens, 1),
    "GPT-2": Model(
        _huggingface("GPT2LMHeadModel", "GPT2Config", vocab_size=50, n_embd=24, n_layer=2, n_head=3, n_positions=32),
        lambda: _tokens(labels=True),
        1,
    ),
    "Llama": Model(
        _huggingface("LlamaForCausalLM", "LlamaConfig", **SMALL, num_attention_heads=6, num_key_value_heads=2),
        lambda: _tokens(labels=True),
        1,
    ),
    "ViT": Model(
        _huggingface(
            "ViTModel", "ViTConfig", hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=32,
            image_size=16, patch_size=4,
        ),
        lambda: {"pixel_values": torch.randn(BATCH, 3, 16, 16)},
        1,
    ),
    "T5": Model(
        _huggingface("T5ForConditionalGeneration", "T5Config", vocab_size=50, d_model=24, d_kv=8, d_ff=32,
                     num_layers=2, num_heads=3, decoder_start_token_id=0),
        lambda: _tokens(decoder=True),
        2,  # the encoder and the decoder call their own attention in one line
    ),
    "BART": Model(
        _huggingface("BartForConditionalGeneration", "BartConfig", vocab_size=50, d_model=24, encoder_ffn_dim=32,
                     decoder_ffn_dim=32, max_position_embeddings=32, **LAYERS),
        lambda: _tokens(decoder=True),
        3,
    ),
    "torch.nn.Transformer": Model(TorchTransformer, _source_and_target, 3),
}  # fmt: skip

each_model = pytest.mark.parametrize("name", MODELS)


def built(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """Random everywhere, biases and norms too; without dropout, whose numbers differ."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = MODELS[name].build().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model, MODELS[name].inputs()


def results(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Outputs at real tokens, and the gradient of each parameter of a sum of their squares."""
    model.zero_grad()
    outputs = model(**inputs)
    found = {n: t for n, t in outputs.items() if isinstance(t, Tensor) and t.is_floating_point()}
    keep = inputs.get("attention_mask")
    for key, tensor in found.items():
        if keep is not None and tensor.shape[:2] == keep.shape:
            found[key] = tensor[keep.bool()]
    loss = sum(t.square().mean() for t in found.values())
    assert isinstance(loss, Tensor)
    loss.backward()
    grads = {f"gradient of {n}": p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {name: tensor.detach().clone() for name, tensor in {**found, **grads}.items()}


@each_model
def test_model(name: str) -> None:
    model, inputs = built(name)
    due = results(model, inputs)
    with accelerate(explain=True) as handle:
        found = results(model, inputs)
    assert found.keys() == due.keys() and len(due) > 10
    for key, tensor in due.items():
        size = max(1.0, float(tensor.abs().max()))
        error = float((found[key] - tensor).abs().max()) / size
        assert error <= PROMISED, f"{key}: {error}"
    report = handle.report()
    assert all(site.taken for site in report), str(report)
    assert len(report) == MODELS[name].sites, str(report)
    assert sum(site.calls for site in report) == (6 if MODELS[name].sites > 1 else 2), str(report)


@pytest.mark.parametrize("name", ["BERT", "Llama", "torch.nn.Transformer"])
def test_compiled_model(name: str) -> None:
    model, inputs = built(name)
    due = results(model, inputs)
    torch._dynamo.reset()
    with accelerate(explain=True) as handle:
        found = results(torch.compile(model, backend="aot_eager"), inputs)
    torch._dynamo.reset()
    for key, tensor in due.items():
        ours = found[key.replace("gradient of ", "gradient of _orig_mod.")]
        assert float((ours - tensor).abs().max()) <= PROMISED * max(1.0, float(tensor.abs().max())), key
    report = handle.report()
    assert report and all(site.taken and site.compiled for site in report), str(report)


def test_inference_fast_path_is_off() -> None:
    """In eval mode and without gradients torch.nn's encoder would not call SDPA at all."""
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    x = torch.randn(2, 5, 16)
    with torch.no_grad():
        due = layer(x)
        with accelerate(explain=True) as handle:
            found = layer(x)
    assert [site.calls for site in handle.report()] == [1]
    assert float((found - due).abs().max()) <= PROMISED


def test_generation() -> None:
    """Greedy, with a cache: the same tokens, and one row of the report for all steps."""
    model, inputs = built("Llama")
    ids = inputs["input_ids"]
    options = dict(attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False, pad_token_id=0)
    due = model.generate(ids, **options)
    with accelerate(explain=True) as handle:
        found = model.generate(ids, **options)
    assert torch.equal(found, due)
    assert [site.taken for site in handle.report()] == [True, True], str(handle.report())
