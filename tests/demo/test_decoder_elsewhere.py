"""What the demo trains opens in transformers, with the same logits."""

from __future__ import annotations

import pytest
import torch
import transformers

from transformer_fast import models
from transformer_fast.demo import training
from transformer_fast.demo.text import load_corpus
from transformer_fast.testing import judge


@pytest.fixture(scope="module")
def trained() -> models.DecoderModel:
    """A few steps on the demo's text: far from fresh, if not good."""
    torch.manual_seed(0)
    model = models.from_config(training.DECODER)
    learned = training.to_bytes(load_corpus().training)
    training.train(model, learned, learned[:1025], training.TrainingPlan(seconds=1e9, steps=12, evaluations=1))
    return model.eval()


@torch.no_grad()
def test_the_trained_decoder_in_transformers(trained: models.DecoderModel, tmp_path) -> None:
    """Longer than the window."""
    trained.save_pretrained(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    assert isinstance(theirs, transformers.MistralForCausalLM)
    ids = training.to_bytes(load_corpus().validation)[:300].long()[None]
    baseline = theirs(ids).logits
    verdict = judge(trained(ids).logits, theirs.double()(ids).logits, baseline, name="logits")
    assert verdict.passed, str(verdict)
