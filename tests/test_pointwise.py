"""Norms, gates and rotary positions: the kernels against float64, and PyTorch's operators wherever they must be."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from cpu_targets import each_dtype, each_isa
from torch import Tensor

from transformer_fast import pointwise
from transformer_fast.backends.cpu import force_isa
from transformer_fast.testing import judge


def eager_norm(x: Tensor, weight: Tensor, plus_one: bool) -> Tensor:
    """As models write it: in float32, rounded before the gain."""
    wide = x if x.dtype == torch.float64 else x.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5)
    return wide.to(x.dtype) * (weight + 1 if plus_one else weight)


def eager_rotation(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


GATES = {
    "silu": (pointwise.gated_silu, F.silu),
    "gelu_tanh": (pointwise.gated_gelu_tanh, lambda x: F.gelu(x, approximate="tanh")),
}


def draw(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(shape[-1])) * scale).to(dtype)


def assert_right(found: Tensor, function: Callable[..., Tensor], *inputs: Tensor) -> None:
    baseline = function(*inputs)
    assert found.dtype == baseline.dtype
    assert found.shape == baseline.shape
    verdict = judge(found, function(*(x.double() for x in inputs)), baseline)
    assert verdict.passed, verdict


@pytest.fixture(autouse=True)
def without_gradients_and_thresholds(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pointwise, "_FEW", 0)
    with torch.no_grad():
        yield


@each_isa
@each_dtype
@pytest.mark.parametrize("size", [1, 5, 16, 37, 576])
@pytest.mark.parametrize("plus_one", [False, True])
def test_norms(isa: str, dtype: torch.dtype, size: int, plus_one: bool) -> None:
    x, weight = draw(3, 7, size, dtype=dtype, scale=4.0), draw(size, dtype=dtype)
    assert pointwise.is_native(x, weight)
    with force_isa(isa):
        found = pointwise.rms_norm(x, weight, 1e-5, plus_one=plus_one)
    assert_right(found, lambda x, weight: eager_norm(x, weight, plus_one), x, weight)


@each_isa
@each_dtype
@pytest.mark.parametrize("size", [1, 5, 16, 37, 300])
@pytest.mark.parametrize("name", GATES)
def test_gates(isa: str, dtype: torch.dtype, size: int, name: str) -> None:
    """Halves of one tensor, as a fused projection gives them, and tensors of their own; over the whole range."""
    function, activation = GATES[name]
    gate, value = draw(9, 2 * size, dtype=dtype, scale=40.0).chunk(2, -1)
    with force_isa(isa):
        halves, own = function(gate, value), function(gate.contiguous()[None], value.contiguous()[None])
    assert_right(halves, lambda gate, value: activation(gate) * value, gate, value)
    assert torch.equal(own[0], halves)


@each_isa
@each_dtype
@pytest.mark.parametrize("head_dim", [2, 10, 32, 74, 128])
def test_rotation(isa: str, dtype: torch.dtype, head_dim: int) -> None:
    """Heads inside of rows that hold others too, as a fused projection gives them."""
    x = draw(11, 5, head_dim, dtype=dtype)[:, 1:4]
    angles = draw(11, 1, head_dim // 2, dtype=torch.float32, scale=9.0)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    assert pointwise.is_native(x, cos, sin)
    with force_isa(isa):
        found = pointwise.rotate(x, cos, sin)
    assert_right(found, eager_rotation, x, cos, sin)
    assert found.is_contiguous()


@each_isa
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e30, -1e30, -3e38, -95.0])
def test_numbers_that_are_none(isa: str, bad: float) -> None:
    """As PyTorch has them, in their place and nowhere else."""
    gate, value = draw(4, 40, dtype=torch.float32), draw(4, 40, dtype=torch.float32)
    gate[1, 7] = bad
    with force_isa(isa):
        torch.testing.assert_close(pointwise.gated_silu(gate, value), F.silu(gate) * value, equal_nan=True)
        expected = F.gelu(gate, approximate="tanh") * value
        torch.testing.assert_close(pointwise.gated_gelu_tanh(gate, value), expected, equal_nan=True)
        normed = pointwise.rms_norm(gate, torch.ones(40), 1e-5)
    torch.testing.assert_close(normed, eager_norm(gate, torch.ones(40), False), equal_nan=True)


def test_threads_share_rows() -> None:
    x, weight = draw(501, 300, dtype=torch.float32), draw(300, dtype=torch.float32)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(pointwise.rms_norm(x, weight, 1e-6))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)


def test_what_the_kernels_do_not_take_is_pytorchs() -> None:
    """Gradients, other types and strides, transforms, autocast, subclasses and the meta device."""
    x, weight = draw(6, 8, dtype=torch.float32), draw(8, dtype=torch.float32)
    expected = F.rms_norm(x, (8,), weight, 1e-5)
    with torch.enable_grad():
        leaf = x.clone().requires_grad_()
        assert not pointwise.is_native(leaf, weight)
        pointwise.rms_norm(leaf, weight, 1e-5).sum().backward()
        assert leaf.grad is not None
    for other in (x.double(), x.to("meta")):
        assert not pointwise.is_native(other, weight.to(other))
        assert pointwise.rms_norm(other, weight.to(other), 1e-5).dtype == other.dtype
    assert torch.equal(pointwise.rms_norm(x.t().contiguous().t(), weight, 1e-5), expected)
    torch.testing.assert_close(torch.vmap(lambda row: pointwise.rms_norm(row, weight, 1e-5))(x), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not pointwise.is_native(x, weight)
    assert pointwise.rms_norm(x[:0], weight, 1e-5).shape == (0, 8)
    assert not pointwise.is_native(x, weight.double())
