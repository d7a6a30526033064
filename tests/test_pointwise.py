"""Norms, gates and rotary positions: the kernels against float64, and PyTorch's operators wherever they must be."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from cpu_targets import each_dtype, each_isa
from torch import Tensor

from transformer_fast import pointwise
from transformer_fast.backends import cpu_pointwise
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
    monkeypatch.setattr(pointwise, "_NARROW", 0)
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
@pytest.mark.parametrize("size", [1, 5, 16, 37, 300])
def test_gelu_and_its_gradient(isa: str, dtype: torch.dtype, size: int) -> None:
    """Over the whole range, and close to 0."""

    def gelu(x: Tensor) -> Tensor:
        return F.gelu(x, approximate="tanh")

    x, dy = draw(7, 2, size, dtype=dtype, scale=5.0), draw(7, 2, size, dtype=dtype)
    x[0] *= 0.01
    with force_isa(isa), torch.enable_grad():
        leaf = x.clone().requires_grad_()
        found = pointwise.gelu_tanh(leaf)
        assert "GeluTanh" in str(found.grad_fn)
        (gradient,) = torch.autograd.grad(found, leaf, dy)
        assert torch.equal(pointwise.gelu_tanh(x), found)
    assert_right(found.detach(), gelu, x)
    assert_right(gradient, lambda x, dy: torch.ops.aten.gelu_backward(dy, x, approximate="tanh"), x, dy)


@each_isa
def test_gelu_of_numbers_that_are_none(isa: str) -> None:
    x = torch.tensor([float("nan"), float("inf"), -float("inf"), 1e30, -1e30, 3.0]).requires_grad_()
    with force_isa(isa), torch.enable_grad():
        found = pointwise.gelu_tanh(x)
        (slope,) = torch.autograd.grad(found.sum(), x)
    torch.testing.assert_close(found[[0, 1, 3, 4, 5]], F.gelu(x, approximate="tanh")[[0, 1, 3, 4, 5]], equal_nan=True)
    assert slope[0].isnan()
    torch.testing.assert_close(slope[1:5], torch.tensor([1.0, 0.0, 1.0, 0.0]))


def test_gelu_is_differentiated_again_by_pytorch() -> None:
    x = draw(3, 5, dtype=torch.float32).requires_grad_()
    with torch.enable_grad():
        found = [
            torch.autograd.grad(torch.autograd.grad(f(x).square().sum(), x, create_graph=True)[0].sum(), x)[0]
            for f in (pointwise.gelu_tanh, lambda x: F.gelu(x, approximate="tanh"))
        ]
    torch.testing.assert_close(*found)


@each_isa
@each_dtype
@pytest.mark.parametrize("size", [2, 5, 16, 37, 5000])
@pytest.mark.parametrize("far", [0.0, 3000.0])
def test_cross_entropy(isa: str, dtype: torch.dtype, size: int, far: float) -> None:
    """Rows of a wider matrix, whose logits may all be far from 0; a row that does not count."""
    wide = draw(6, size + 3, dtype=dtype, scale=4.0) + far
    logits, labels = wide[:, :size], torch.randint(size, (6,), generator=torch.Generator().manual_seed(0))
    labels[2] = -100

    def losses(x: Tensor) -> Tensor:
        return F.cross_entropy(x if x.dtype == torch.float64 else x.float(), labels, reduction="none")

    def gradient(x: Tensor) -> Tensor:
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            return torch.autograd.grad(losses(leaf).sum() * 0.3, leaf)[0]

    with force_isa(isa):
        found = cpu_pointwise.cross_entropy(logits, logits.stride(0), labels, -100)
        slopes = cpu_pointwise.cross_entropy_gradient(logits, logits.stride(0), labels, -100, found, 0.3)
    assert_right(found[0], losses, logits)
    assert_right(slopes, gradient, logits)
    assert not slopes[2].any()


@each_isa
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_cross_entropy_of_numbers_that_are_none(isa: str, bad: float) -> None:
    """As PyTorch has them, in their row and no other."""
    logits, labels = draw(4, 40, dtype=torch.float32), torch.tensor([0, 7, 3, 39])
    logits[1, 7], logits[3] = bad, -float("inf")
    with torch.enable_grad():
        leaf = logits.clone().requires_grad_()
        losses = F.cross_entropy(leaf, labels, reduction="none")
        (gradient,) = torch.autograd.grad(losses.sum(), leaf)
    with force_isa(isa):
        found = cpu_pointwise.cross_entropy(logits, 40, labels, -100)
        slopes = cpu_pointwise.cross_entropy_gradient(logits, 40, labels, -100, found, 1.0)
    torch.testing.assert_close(found[0], losses, equal_nan=True)
    torch.testing.assert_close(slopes, gradient, equal_nan=True)


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
