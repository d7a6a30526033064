"""Dropout stands where transformers has it: with fixed patterns for its draws, training gives the same numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from models.checkpoints_hf import CASES, Case, save
from models.inputs_hf import make_inputs
from models.oracle_hf import load_theirs
from torch import Tensor

from transformer_fast.models import from_pretrained, layers
from transformer_fast.testing import judge

#: Each of another size, so that none passes for another. By the name in config.json.
SHARES = {
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.2,
    "classifier_dropout": 0.3,
    "dropout": 0.1,
    "dropout_rate": 0.15,
    "attention_dropout": 0.2,
    "activation_dropout": 0.25,
    "seq_classif_dropout": 0.3,
    "qa_dropout": 0.35,
    "embd_pdrop": 0.4,
    "resid_pdrop": 0.1,
    "attn_pdrop": 0.2,
}
#: A class of each head that drops anything of its own, and one of each kind of stack.
CASE_IDS = [
    "bert Model",
    "bert MaskedLM",
    "bert PreTraining",
    "bert SequenceClassification classes",
    "bert TokenClassification",
    "bert QuestionAnswering",
    "roberta MaskedLM",
    "roberta SequenceClassification classes",
    "roberta TokenClassification",
    "distilbert MaskedLM",
    "distilbert SequenceClassification classes",
    "distilbert TokenClassification",
    "distilbert QuestionAnswering",
    "gpt LMHeadModel",
    "gpt SequenceClassification classes",
    "gpt2 LMHeadModel",
    "gpt2 SequenceClassification classes",
    "t5 ConditionalGeneration 1.0",
    "t5 ConditionalGeneration 1.1",
    "t5 EncoderModel",
    "bart ConditionalGeneration",
    "bart SequenceClassification classes",
    "marian MTModel",
    "llama CausalLM",
    "mistral CausalLM window",
    "gemma2 CausalLM",
    "whisper ConditionalGeneration",
    "vit Model",
    "vit ImageClassification",
]
BY_ID = {case.id: case for case in CASES}


def pattern(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """In place of dropout: a factor for each column, of weights of attention ``(batch, heads, q, k)`` one for all."""
    if not training or not p:
        return x
    if x.dim() == 4:
        return x * (1 + p)
    return x * (1 + p * torch.arange(x.shape[-1], dtype=x.dtype).cos())


def with_pattern(attend: Any) -> Any:
    """Our attention, with its weights dropped as above."""
    return lambda *tensors, dropout_p=0.0, **options: attend(*tensors, **options) * (1 + dropout_p)


@pytest.fixture(autouse=True)
def patterned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(F, "dropout", pattern)
    for name in ("attention", "attention_varlen"):
        monkeypatch.setattr(layers, name, with_pattern(getattr(layers, name)))


@pytest.mark.parametrize("case", [BY_ID[name] for name in CASE_IDS], ids=CASE_IDS)
def test_training_with_dropout(case: Case, tmp_path: Path, seed: int) -> None:
    known = getattr(transformers, case.config)().to_dict()
    shares = {name: share for name, share in SHARES.items() if name in known}
    assert shares
    dropping = Case(**vars(case) | {"options": case.options | shares})
    save(dropping, tmp_path, seed)
    theirs, ours = load_theirs(dropping, tmp_path).train(), from_pretrained(tmp_path, dtype=torch.float32).train()
    exact = load_theirs(dropping, tmp_path, torch.float64).train()
    arguments = make_inputs(case, "full", seed).arguments
    wide = {n: v.double() if v.is_floating_point() and n != "labels" else v for n, v in arguments.items()}
    with torch.no_grad():
        found, baseline, oracle = ours(**arguments), theirs(**arguments), exact(**wide)
        calm = ours.eval()(**arguments)
    compared = 0
    for name, expected in oracle.items():
        if isinstance(expected, Tensor) and expected.is_floating_point():
            compared += 1
            # The oracle computes some of its parts in float32.
            unit = torch.full_like(expected, float(expected.abs().max()) * 16 * torch.finfo(torch.float32).eps)
            verdict = judge(found[name], expected, baseline[name], name=name, unit=unit)
            assert verdict.passed, str(verdict)
    assert compared
    assert any(not torch.equal(found[name], calm[name]) for name in found if isinstance(found[name], Tensor))
