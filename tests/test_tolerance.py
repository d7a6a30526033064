"""The tolerance rule itself: what it must let through and what it must refuse."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from transformer_fast.testing import judge
from transformer_fast.testing.tolerance import FACTOR, ULPS

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def problem(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """An oracle and what plain PyTorch makes of it in a dtype: it is off by the last rounding."""
    oracle = torch.randn(40, 30, dtype=torch.float64)
    return oracle, oracle.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_accepts_what_pytorch_gives(dtype: torch.dtype) -> None:
    oracle, baseline = problem(dtype)
    verdict = judge(baseline, oracle, baseline)
    assert verdict.passed
    assert verdict.our_error == verdict.torch_error > 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_refuses_a_few_times_the_error_of_pytorch(dtype: torch.dtype) -> None:
    oracle, baseline = problem(dtype)
    worse = oracle + (baseline.double() - oracle) * (FACTOR + 8 * ULPS)
    verdict = judge(worse, oracle, baseline, unit=oracle.abs() * torch.finfo(dtype).eps)
    assert not verdict.passed
    assert "rms" in verdict.reason


@pytest.mark.parametrize("dtype", DTYPES)
def test_refuses_one_wrong_element(dtype: torch.dtype) -> None:
    oracle, baseline = problem(dtype)
    ours = baseline.clone()
    ours[3, 4] += oracle.abs().max().to(dtype) / 8
    verdict = judge(ours, oracle, baseline)
    assert not verdict.passed
    assert "max" in verdict.reason


def test_refuses_a_small_error_everywhere() -> None:
    """By maximum alone this would pass: each element is off by less than the largest rounding."""
    oracle = torch.rand(40, 30, dtype=torch.float64)
    oracle[0, 0] = 1000.0
    baseline = oracle.float()
    verdict = judge(baseline + 1e-4, oracle, baseline)
    assert not verdict.passed
    assert verdict.reason == "error too large by rms"


def test_float32_is_demanding() -> None:
    """With a baseline without error, what is left is a relative error below 1e-6."""
    oracle = torch.rand(1000, dtype=torch.float64) + 1.0
    exact = oracle.clone()
    unit = oracle * torch.finfo(torch.float32).eps
    assert judge(oracle * (1 + 1e-7), oracle, exact, unit=unit).passed
    assert not judge(oracle * (1 + 1e-6), oracle, exact, unit=unit).passed


@pytest.mark.parametrize(
    ("ours", "oracle"),
    [
        (float("nan"), 1.0),
        (float("inf"), 1.0),
        (0.0, float("-inf")),
        (float("inf"), float("-inf")),
        (float("nan"), float("-inf")),
        (float("-inf"), float("nan")),
    ],
)
def test_refuses_a_wrong_pattern(ours: float, oracle: float) -> None:
    """lse = -inf means "sees nothing": no finite number and no NaN may stand there, nor it elsewhere."""
    exact = torch.tensor([1.0, oracle], dtype=torch.float64)
    verdict = judge(torch.tensor([1.0, ours]), exact, exact)
    assert not verdict.passed
    assert verdict.used == float("inf")
    assert "(1,)" in verdict.reason


def test_accepts_infinity_where_it_is_due() -> None:
    oracle = torch.tensor([float("-inf"), 2.0], dtype=torch.float64)
    assert judge(oracle.float(), oracle, oracle.float()).passed


@pytest.mark.parametrize("shape", [(3,), (4, 1), (1, 4)])
def test_refuses_other_shapes(shape: tuple[int, ...]) -> None:
    """Also those that would broadcast."""
    oracle = torch.ones(4, dtype=torch.float64)
    verdict = judge(torch.ones(shape), oracle, oracle)
    assert not verdict.passed
    assert "shape" in verdict.reason


def test_a_baseline_that_overflows_allows_nothing_more() -> None:
    oracle, baseline = problem(torch.float16)
    overflowed = baseline.clone()
    overflowed[0, 0] = float("inf")
    assert judge(baseline, oracle, overflowed).passed
    assert not judge(baseline * 1.1, oracle, overflowed).passed


def test_where_terms_cancel_the_unit_is_theirs() -> None:
    """The gradient through a softmax over one key is exactly zero, as a difference of equal numbers."""
    oracle = torch.zeros(8, dtype=torch.float64)
    rounding = torch.full((8,), torch.finfo(torch.float32).eps)
    assert not judge(rounding, oracle, oracle).passed
    assert judge(rounding, oracle, oracle, unit=rounding).passed
    assert not judge(100 * rounding, oracle, oracle, unit=rounding).passed


def test_empty_tensors_pass() -> None:
    empty = torch.zeros(0, 3, dtype=torch.float64)
    assert judge(empty.float(), empty, empty).passed
