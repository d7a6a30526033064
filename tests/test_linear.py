"""Linear kernels: products, activations, gates and residuals against float64, by every instruction set and type."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cpu_targets import each_isa
from torch import Tensor

from transformer_fast.backends import cpu_linear
from transformer_fast.backends.cpu import TYPES, force_isa
from transformer_fast.linear import ACTIVATIONS, GATES, linear
from transformer_fast.testing import judge

each_type = pytest.mark.parametrize("dtype", sorted(TYPES, key=str), ids=lambda d: str(d).removeprefix("torch."))
NAMES = [name for name in cpu_linear.ACTIVATIONS if name is not None]
#: Rows, inputs and outputs: one of each, ends of vectors, of panels, of tiles and of blocks of rows and of depth.
SHAPES = [
    (1, 1, 1),
    (3, 37, 5),
    (1, 576, 192),
    (16, 64, 32),
    (33, 64, 100),
    (129, 577, 33),
    (300, 100, 70),
    (5, 2100, 40),
]


def draw(*shape: int, dtype: torch.dtype, scale: float = 1.0, seed: int = 0) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))) * scale).to(dtype)


def call(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """As ``transformer_fast.linear.linear``, by the kernel."""
    given = {"weight": weight, "bias": bias, "activation": activation}
    layer = cpu_linear.Layer(*laid_out(given), activation)
    return cpu_linear.multiply(rows_of(x), layer, None if residual is None else rows_of(residual))


def laid_out(given: dict[str, Any]) -> tuple[Tensor, int, Tensor | None, Tensor | None]:
    """The weight laid out, its outputs, and the biases."""
    weight, bias = given["weight"], given["bias"]
    if given["activation"] not in GATES:
        return cpu_linear.lay_out(weight, None), len(weight), bias, None
    half = len(weight) // 2
    biases = (None, None) if bias is None else (bias[:half], bias[half:])
    return cpu_linear.lay_out(weight[:half], weight[half:]), half, *biases


def rows_of(x: Tensor) -> cpu_linear.Rows:
    return cpu_linear.Rows(x, len(x), x.stride(0))


def inputs(
    rows: int, in_features: int, out_features: int, dtype: torch.dtype, activation: str | None
) -> dict[str, Any]:
    parts = 2 if activation in GATES else 1
    return {
        "x": draw(rows, in_features, dtype=dtype),
        "weight": draw(parts * out_features, in_features, dtype=dtype, scale=3.0 / in_features**0.5),
        "bias": draw(parts * out_features, dtype=dtype),
        "activation": activation,
        "residual": draw(rows, out_features, dtype=dtype, seed=1),
    }


def exact(given: dict[str, Any]) -> Tensor:
    return linear(**{name: v.double() if isinstance(v, Tensor) else v for name, v in given.items()})


def assert_right(found: Tensor, given: dict[str, Any]) -> None:
    baseline = linear(**given)
    assert found.dtype == baseline.dtype
    assert found.shape == baseline.shape
    verdict = judge(found, exact(given), baseline)
    assert verdict.passed, verdict


#: Rows, depth and columns: as above, more depth than is laid out at a time (of few rows and of many), and more columns.
MATRICES = [(1, 1, 1), (3, 37, 5), (16, 64, 32), (100, 70, 130), (129, 40, 33)]
MATRICES += [(5, 2100, 1500), (40, 2100, 70), (70, 1024, 1100)]


@each_isa
@pytest.mark.parametrize("shape", MATRICES, ids=str)
@pytest.mark.sanitize
def test_matrices_as_they_lie(isa: str, shape: tuple[int, int, int]) -> None:
    """By rows or by columns, the second also with any strides, and in parts of larger ones."""
    rows, depth, columns = shape
    wide, tall = draw(rows, depth + 3, dtype=torch.float32), draw(depth, rows + 2, dtype=torch.float32)
    factors = [draw(*size, dtype=torch.float32, seed=2) for size in ((depth, columns + 1), (columns, depth + 5))]
    every_other = draw(depth, 2 * columns, dtype=torch.float32)[:, ::2]
    bias = draw(columns, dtype=torch.float32)
    for a in (wide[:, :depth], tall.t()[:rows]):
        for b in (factors[0][:, :columns], factors[1].t()[:depth], every_other):
            for added in (bias, None):
                with force_isa(isa):
                    found = cpu_linear.matrix_product(a, b, added)
                exact, baseline = a.double() @ b.double(), a @ b
                if added is not None:
                    exact, baseline = exact + added, baseline + added
                verdict = judge(found, exact, baseline)
                assert verdict.passed, verdict


def test_every_activation_but_one_has_a_kernel() -> None:
    assert set(NAMES) == set(ACTIVATIONS) - {"tanh"} | set(GATES)


@each_isa
@each_type
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.sanitize
def test_products(isa: str, dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    given = inputs(*shape, dtype, None)
    for left_out in ({}, {"bias": None}, {"residual": None}, {"bias": None, "residual": None}):
        with force_isa(isa):
            assert_right(call(**given | left_out), given | left_out)


@each_isa
@each_type
@pytest.mark.parametrize("activation", NAMES)
@pytest.mark.sanitize
def test_activations_and_gates(isa: str, dtype: torch.dtype, activation: str) -> None:
    for shape in ((3, 37, 5), (70, 64, 300)):
        given = inputs(*shape, dtype, activation)
        with force_isa(isa):
            assert_right(call(**given), given)
            assert_right(call(**given | {"bias": None}), given | {"bias": None})


#: Each judged by its own magnitude.
HARD = {
    "tiny": [0.0, -0.0, 1e-7, -1e-7, 1e-3, -1e-3],
    "middle": [0.5, -0.5, 1.7, -1.7, 3.0, -3.0],
    "tail": [-4.0, -5.0, -6.0, -9.5, -13.0, -14.0, -100.0, -6e4],
    "far": [6.0, 9.5, 14.0, 100.0, 6e4],
}


@each_isa
@each_type
@pytest.mark.parametrize("where", HARD)
@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh", "silu"])
def test_activations_where_they_are_hard(isa: str, dtype: torch.dtype, activation: str, where: str) -> None:
    """A product with one number, 1, is that number."""
    x = torch.tensor(HARD[where], dtype=dtype)[:, None]
    with force_isa(isa):
        assert_right(call(x, torch.ones(1, 1, dtype=dtype), activation=activation), inputs_of(x, activation))


def inputs_of(x: Tensor, activation: str) -> dict[str, Any]:
    return {"x": x, "weight": torch.ones(1, 1, dtype=x.dtype), "activation": activation}


@each_isa
@each_type
@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh", "silu"])
def test_activations_of_what_is_no_number(isa: str, dtype: torch.dtype, activation: str) -> None:
    x = torch.tensor([float("inf"), float("nan"), 1.0], dtype=dtype)[:, None]
    with force_isa(isa):
        found = call(x, torch.ones(1, 1, dtype=dtype), activation=activation)[:2, 0]
    assert found[0] == float("inf")
    assert found[1].isnan()


@each_isa
@each_type
def test_rows_of_any_stride(isa: str, dtype: torch.dtype) -> None:
    given = inputs(40, 64, 50, dtype, None)
    wide, weights = draw(40, 200, dtype=dtype), draw(64, 120, dtype=dtype, scale=0.3)
    given |= {"x": wide[:, 7:71], "residual": wide[:, 100:150], "weight": weights[:, 3:53].t()}
    with force_isa(isa):
        assert_right(call(**given), given)


@each_isa
@each_type
def test_bits_depend_on_the_row_alone(isa: str, dtype: torch.dtype) -> None:
    """Not on the number of threads, nor on the rows beside it."""
    given = inputs(530, 577, 300, dtype, "swiglu")
    with force_isa(isa):
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(call(**given))
        for first, last in ((0, 1), (17, 50), (256, 530)):
            part = {name: given[name][first:last] for name in ("x", "residual")}
            results[0][first:last] -= call(**given | part)
    assert torch.equal(results[1], results[2])
    assert (results[0][:1] == 0).all()
    assert (results[0][17:50] == 0).all()
    assert (results[0][256:] == 0).all()


@each_isa
@each_type
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.sanitize
def test_two_layers_in_one_call(isa: str, dtype: torch.dtype, activation: str) -> None:
    """Give the bits of one after the other, whatever the number of rows and threads."""
    for rows in (1, 33, 300, 530):
        up, down = inputs(rows, 70, 96, dtype, activation), inputs(rows, 96, 50, dtype, None)
        with force_isa(isa):
            first = cpu_linear.Layer(*laid_out(up), activation)
            second = cpu_linear.Layer(*laid_out(down), None)
            for residual in (None, rows_of(draw(rows, 80, dtype=dtype)[:, 5:55])):
                expected = cpu_linear.multiply(
                    rows_of(cpu_linear.multiply(rows_of(up["x"]), first, None)), second, residual
                )
                for threads in (1, 2, 5):
                    torch.set_num_threads(threads)
                    found = cpu_linear.multiply_twice(rows_of(up["x"]), first, second, residual)
                    assert torch.equal(found, expected)


@each_isa
@each_type
@pytest.mark.sanitize
def test_nothing_beside_a_row_is_read(isa: str, dtype: torch.dtype) -> None:
    """NaN around the rows, of x and of the weight, in what is padded to whole pairs, panels and tiles."""
    for in_features in (33, 63, 64):
        given = inputs(35, in_features, 20, dtype, None)
        among = {}
        for name in ("x", "weight"):
            around = torch.full((len(given[name]) + 2, 100), float("nan"), dtype=dtype)
            among[name] = around[1:-1, 10 : 10 + in_features]
            among[name].copy_(given[name])
        with force_isa(isa):
            assert_right(call(**given | among), given)


def test_the_function_is_pytorchs(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, bias = draw(3, 8, dtype=torch.float64), draw(10, 8, dtype=torch.float64), draw(10, dtype=torch.float64)
    y = F.linear(x, weight, bias)
    assert torch.equal(linear(x, weight, bias), y)
    assert torch.equal(linear(x, weight, bias, "tanh", y), y + torch.tanh(y))
    assert torch.equal(linear(x, weight, bias, "swiglu"), F.silu(y[:, :5]) * y[:, 5:])
    assert torch.equal(linear(x, weight, bias, "geglu"), F.gelu(y[:, :5]) * y[:, 5:])
