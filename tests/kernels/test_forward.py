"""The Triton forward pass on CPU tensors, in Triton's interpreter: the conformance suite, by the one rule."""

from __future__ import annotations

import pytest
import torch

from transformer_fast import UnsupportedError, attention, attention_varlen, backends, explain
from transformer_fast.testing import Case, Target, check, standard_cases
from transformer_fast.testing.verify import DTYPES

TRITON = Target("triton")


def _matrix() -> list[object]:
    """Every case in float32, the core cases in the half types too."""
    return [
        pytest.param(case, dtype, id=f"{case.name}-{name}")
        for name, dtype in DTYPES.items()
        for case in standard_cases()
        if case.core or dtype == torch.float32
    ]


@pytest.mark.parametrize(("case", "dtype"), _matrix())
def test_matches_the_oracle(case: Case, dtype: torch.dtype, seed: int) -> None:
    outcome = check(case, dtype, TRITON, seed)
    assert outcome.passed, f"\n{outcome}"


def test_dropout_is_that_of_every_back_end() -> None:
    """The same seed keeps the same elements, in packed sequences too."""
    query, (key, value) = torch.randn(2, 4, 70, 16), torch.randn(2, 2, 2, 90, 16)
    packed, lengths = torch.randn(100, 2, 16), torch.tensor([0, 30, 100], dtype=torch.int32)
    for function, arguments in (
        (attention, (query, key, value)),
        (attention_varlen, (packed, packed, packed, lengths, lengths, 70, 70)),
    ):
        kept = []
        for backend in ("triton", "reference"):
            torch.manual_seed(11)
            # Values of one: what comes out is the sum of the kept probabilities.
            q, k, v, *rest = arguments
            kept.append(function(q, k, torch.ones_like(v), *rest, dropout_p=0.6, backend=backend))
        assert torch.equal(kept[0] == 0, kept[1] == 0)
        torch.testing.assert_close(kept[0], kept[1])


def test_it_has_to_be_asked_for_by_name() -> None:
    """It has never run on a GPU: "auto" must not choose it, not even where nothing else is fast."""
    x = torch.randn(1, 2, 9, 8)
    assert backends()["triton"].available
    assert explain(x, x, x).backend == "cpu"
    assert explain(x.double(), x.double(), x.double()).backend == "reference"
    assert explain(x, x, x, backend="triton").backend == "triton"


def test_what_it_cannot_do_is_said() -> None:
    x = torch.randn(1, 1, 4, 513)
    with pytest.raises(UnsupportedError, match="head_dim 513; it computes up to 512"):
        attention(x, x, x, backend="triton")
    with pytest.raises(UnsupportedError, match="dtype float64"):
        attention(x.double(), x.double(), x.double(), backend="triton")


def test_without_a_device_it_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    x = torch.randn(1, 2, 9, 8)
    with pytest.raises(UnsupportedError, match="no CUDA device"):
        attention(x, x, x, backend="triton")
