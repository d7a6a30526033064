"""The benchmark of the drop-ins runs, and has no speed for a wrong result."""

from __future__ import annotations

import pytest
import torch
from transformer_fast.benchmarks import dropin_speed

pytest.importorskip("transformers", reason="transformers is not installed")


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = dict(hidden_size=48, intermediate_size=32, num_hidden_layers=2, num_attention_heads=3)
    monkeypatch.setattr(dropin_speed, "BERT", sizes)
    monkeypatch.setattr(dropin_speed, "LLAMA", dropin_speed.LLAMA | sizes | dict(num_key_value_heads=1))
    small = dict(n_embd=48, n_layer=2, n_head=3)
    monkeypatch.setattr(dropin_speed, "GPT2", dropin_speed.GPT2 | small)


def test_every_case_has_a_ratio() -> None:
    lines = list(dropin_speed.run(repeats=1))
    assert len(lines) == 9 and len({line.name for line in lines}) == 5
    assert all(line.ratio > 0 and line.whole > 0 for line in lines)


def test_a_wrong_result_has_no_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = dropin_speed._encoded
    for wrong in (1, 3):  # float64 is asked first, then each of ours before SDPA's
        numbers = iter([1.01 if place == wrong else 1.0 for place in range(5)])
        monkeypatch.setattr(dropin_speed, "_encoded", lambda model, numbers=numbers: right(model) * next(numbers))
        with pytest.raises(AssertionError, match="BERT"):
            list(dropin_speed.run(repeats=1, only="BERT"))


def test_overheads_are_measured() -> None:
    found = dropin_speed.overheads(repeats=1)
    assert set(found) == {
        "attention() beyond the kernel",
        "attention() beyond the kernel, with gradients",
        "scaled_dot_product_attention",
        "flash_attn_func",
        "transformers' attention function",
        "SDPA by name under accelerate()",
        "PyTorch's SDPA",
    }
    assert all(torch.isfinite(torch.tensor(us)) for us in found.values())
