"""Models under torch.compile without a graph break, exported, and under autocast with a cache."""

from __future__ import annotations

import pytest
import torch

from transformer_fast import models
from transformer_fast.models import Architecture, EncoderModel, presets
from transformer_fast.testing import judge


@pytest.fixture(params=["decoder", "encoder", "encoder-decoder"])
def model_and_inputs(request, decoder, encoder_config, randomized):
    ids = torch.randint(20, (2, 9))
    if request.param == "decoder":
        return decoder.eval(), {"input_ids": ids}
    if request.param == "encoder":
        return randomized(EncoderModel(Architecture(encoder=encoder_config))).eval(), {"input_ids": ids}
    model = models.from_config(presets.transformer_2017(vocab_size=23)).eval()
    return model, {"input_ids": ids, "decoder_input_ids": ids.flip(1)}


@torch.no_grad()
def test_compiled_in_one_graph(model_and_inputs) -> None:
    model, inputs = model_and_inputs
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    ours, expected = compiled(**inputs), model(**inputs)
    assert list(ours) == list(expected)
    torch.testing.assert_close(dict(ours), dict(expected))  # norms and gates are PyTorch's there, and ours in eager


@torch.no_grad()
def test_exported(model_and_inputs) -> None:
    model, inputs = model_and_inputs
    exported = torch.export.export(model, (), inputs).module()
    ours, expected = exported(**inputs), model(**inputs)
    torch.testing.assert_close(dict(ours), dict(expected))


@torch.no_grad()
def test_a_cache_under_autocast(decoder) -> None:
    """Its keys are bfloat16 there, in a float32 model."""
    ids = torch.randint(50, (2, 12))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        first = decoder(ids[:, :7], use_cache=True)
        second = decoder(ids[:, 7:], past_key_values=first.past_key_values)
        whole = decoder(ids)
    cached = torch.cat((first.logits, second.logits), 1)
    verdict = judge(cached, decoder.double()(ids).logits, whole.logits, name="logits")
    assert verdict.passed, str(verdict)
