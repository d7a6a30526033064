"""The benchmark of whole models runs, and has no speed for a wrong result."""

from __future__ import annotations

import pytest
import torch
from transformer_fast.benchmarks import model_speed

from transformer_fast.models.heads import LanguageHead


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    small = dict(hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=3)
    monkeypatch.setattr(model_speed, "MINILM", small)
    changes = small | dict(vocab_size=49000, num_key_value_heads=1)
    monkeypatch.setattr(model_speed, "SMOLLM2", model_speed.SMOLLM2 | changes)
    monkeypatch.setattr(model_speed, "DTYPES", (torch.float32,))


def test_every_case_has_a_ratio_and_shares() -> None:
    lines = list(model_speed.run(repeats=1))
    assert len(lines) == 5 and len({line.name for line in lines}) == 5
    assert all(line.ratio > 0 and line.packed > 0 and 0 < line.products < 1 for line in lines)
    assert all(0 < line.attention < 1 for line in lines[:3])
    assert lines[3].attention is None, "behind a cache it is not seen"


def test_a_wrong_result_has_no_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = LanguageHead.logits
    monkeypatch.setattr(LanguageHead, "logits", lambda self, rows: 1.01 * right(self, rows))
    with pytest.raises(AssertionError, match="prompt of 512"):
        list(model_speed.run(repeats=1))
