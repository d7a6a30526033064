"""Linear layers in training: the results and gradients of PyTorch's, whichever product is quicker."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from transformer_fast.backends import cpu_linear
from transformer_fast.dropin import pack_linears, training, trial
from transformer_fast.testing import judge

IN, OUT = 37, 70

pytestmark = pytest.mark.usefixtures("every_product_is_packed")


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The sizes of those that the kernel does."""
    seen: list[tuple[int, ...]] = []
    multiply = cpu_linear.matrix_product

    def counted(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
        seen.append((*a.shape, b.shape[1]))
        return multiply(a, b, bias)

    monkeypatch.setattr(cpu_linear, "matrix_product", counted)
    return seen


def layer(kind: type[nn.Module] = nn.Linear) -> Any:
    torch.manual_seed(0)
    module: Any = nn.Linear(IN, OUT) if kind is nn.Linear else Conv1D(OUT, IN)
    nn.init.normal_(module.bias)
    return module


def rows(*shape: int) -> Tensor:
    return torch.randn(*shape, IN, generator=torch.Generator().manual_seed(1)).requires_grad_()


def with_gradients(module: nn.Module, x: Tensor, dy: Tensor) -> list[Tensor]:
    """The result, and the gradients of whatever takes one."""
    y = module(x)
    wanted = [t for t in (x, *module.parameters()) if t.requires_grad]
    return [y.detach(), *torch.autograd.grad(y, wanted, dy)]


def assert_right(module: nn.Module, x: Tensor, dy: Tensor, reference: nn.Module) -> None:
    baseline, found = with_gradients(reference, x, dy), with_gradients(module, x, dy)
    exact = with_gradients(reference.double(), x.detach().double().requires_grad_(x.requires_grad), dy.double())
    reference.float()
    for ours, oracle, theirs in zip(found, exact, baseline, strict=True):
        assert ours.shape == theirs.shape
        assert ours.stride() == theirs.stride()
        verdict = judge(ours, oracle, theirs)
        assert verdict.passed, verdict


@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
@pytest.mark.parametrize("shape", [(1,), (33,), (2, 3, 5)])
def test_results_and_gradients(kind: type[nn.Module], shape: tuple[int, ...], products: list[Any]) -> None:
    x, module = rows(*shape), pack_linears(layer(kind))
    count = x.numel() // IN
    assert_right(module, x, torch.randn(*shape, OUT), layer(kind))
    by_weight = (OUT, count, IN) if kind is nn.Linear else (IN, count, OUT)
    assert products == [(count, IN, OUT), (count, OUT, IN), by_weight]


def test_rows_and_gradients_that_are_not_contiguous(products: list[Any]) -> None:
    """The sum's gradient has strides of 0."""
    whole = torch.randn(6, 2 * IN, 4)
    x = whole[:, ::2].transpose(1, 2).detach().requires_grad_()
    turned = torch.randn(OUT, 24).t().view(6, 4, OUT)
    for dy in (turned, torch.randn(6, 4, 1).expand(6, 4, OUT), torch.ones(()).expand(6, 4, OUT)):
        products.clear()
        assert_right(pack_linears(layer()), x, dy, layer())
        assert len(products) == 3


@pytest.mark.parametrize("frozen", ["x", "weight", "bias"])
def test_what_takes_no_gradient_costs_no_product(frozen: str, products: list[Any]) -> None:
    x, module, reference = rows(9), pack_linears(layer()), layer()
    for owner in (module, reference):
        (x if frozen == "x" else getattr(owner, frozen)).requires_grad_(False)
    assert_right(module, x, torch.randn(9, OUT), reference)
    assert len(products) == (3 if frozen == "bias" else 2)


def test_without_a_bias(products: list[Any]) -> None:
    torch.manual_seed(0)
    reference = nn.Linear(IN, OUT, bias=False)
    module = nn.Linear(IN, OUT, bias=False)
    module.load_state_dict(reference.state_dict())
    assert_right(pack_linears(module), rows(4, 5), torch.randn(4, 5, OUT), reference)
    assert len(products) == 3


def test_a_gradient_may_be_differentiated(products: list[Any]) -> None:
    """What is differentiated again is PyTorch's operators."""

    def penalty(module: nn.Module) -> list[Tensor]:
        x = rows(5).detach().to(module.weight.dtype).requires_grad_()
        (dx,) = torch.autograd.grad(module(x).square().sum(), x, create_graph=True)
        return list(torch.autograd.grad(dx.square().sum(), list(module.parameters())))

    found = penalty(pack_linears(layer()))
    assert len(products) == 3, "the result, and what goes back through it at the end"
    for ours, oracle, theirs in zip(found, penalty(layer().double()), penalty(layer()), strict=True):
        verdict = judge(ours, oracle, theirs)
        assert verdict.passed, verdict


def test_a_weight_changed_before_its_backward_is_noticed() -> None:
    module, x = pack_linears(layer()), rows(5)
    y = module(x)
    with torch.no_grad():
        module.weight.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_saved_tensors_pass_the_hooks() -> None:
    """As those of activation checkpoints do."""
    module, x, seen = pack_linears(layer()), rows(5), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(tuple(t.shape)) or t, lambda t: t):
        module(x)
    assert seen == [(5, IN), (OUT, IN)]


@pytest.mark.parametrize("frozen", ["x", "weight", None])
def test_nothing_is_kept_that_no_gradient_needs(frozen: str | None) -> None:
    module, x, seen = pack_linears(layer()), rows(5), []
    if frozen is not None:
        (x if frozen == "x" else module.weight).requires_grad_(False)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(tuple(t.shape)) or t, lambda t: t):
        module(x)
    kept = {"x": [(5, IN)], "weight": [(OUT, IN)], None: [(5, IN), (OUT, IN)]}
    assert seen == kept[frozen]


@pytest.mark.parametrize("change", [lambda t: t.bfloat16(), lambda t: t[:-1].clone()], ids=["type", "size"])
def test_hooks_that_give_back_something_else(change: Callable[[Tensor], Tensor]) -> None:
    """Are PyTorch's to complain about."""
    module, x = pack_linears(layer()), rows(5)
    with torch.autograd.graph.saved_tensors_hooks(change, lambda t: t):
        y = module(x)
    with pytest.raises(RuntimeError):
        y.sum().backward()


def test_many_gradients_at_once(products: list[Any]) -> None:
    module, x, dy = pack_linears(layer()), rows(5), torch.randn(3, 5, OUT)
    y = module(x)
    inputs = (x, module.weight, module.bias)
    found = torch.autograd.grad(y, inputs, dy, is_grads_batched=True, retain_graph=True)
    assert len(products) == 1
    for i in range(3):
        for many, one in zip(found, torch.autograd.grad(y, inputs, dy[i], retain_graph=True), strict=True):
            torch.testing.assert_close(many[i], one)
    jacobian = torch.autograd.functional.jacobian(module, rows(2), vectorize=True)
    torch.testing.assert_close(jacobian[1, :, 1], module.weight.detach())


def test_a_gradient_of_zeros_without_memory(products: list[Any]) -> None:
    module, x = pack_linears(layer()), rows(5)
    module(x).backward(torch._efficientzerotensor((5, OUT)))
    assert torch.equal(x.grad, torch.zeros(5, IN))
    assert len(products) == 1


def test_a_result_is_no_view() -> None:
    module = pack_linears(layer())
    for x in (rows(5), rows(2, 3)):
        y = module(x)
        assert not y._is_view()
        y.mul_(2.0)
        (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
        torch.testing.assert_close(dx, (2.0 * module.weight.detach().sum(0)).expand_as(x))


def test_bits_that_must_be_the_same_tomorrow_in_backward_alone(products: list[Any]) -> None:
    module, x = pack_linears(layer()), rows(5)
    y = module(x)
    torch.use_deterministic_algorithms(True)
    try:
        y.sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)
    assert len(products) == 1


@pytest.mark.parametrize("how", ["deterministic", "autocast", "transformed", "forward mode", "float64", "tracer"])
def test_where_it_is_pytorchs(how: str, products: list[Any]) -> None:
    module, x = pack_linears(layer()), rows(5)
    if how == "deterministic":
        torch.use_deterministic_algorithms(True)
        try:
            found = module(x)
        finally:
            torch.use_deterministic_algorithms(False)
        assert torch.equal(found, layer()(x))
    elif how == "autocast":
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert module(x).dtype is torch.bfloat16
    elif how == "transformed":
        found = torch.func.grad(lambda x: module(x).square().sum())(x.detach())
        expected = torch.func.grad(lambda x: layer()(x).square().sum())(x.detach())
        assert torch.equal(found, expected)
    elif how == "forward mode":
        found, tangent = torch.func.jvp(module, (x,), (torch.ones_like(x),))
        assert torch.equal(tangent, torch.ones_like(x) @ module.weight.t())
    elif how == "float64":
        assert module.double()(x.double()).dtype is torch.float64
    else:
        torch.jit.trace(module, (x,), check_trace=False)
    assert products == []


def test_the_compiler_sees_one_operator(products: list[Any]) -> None:
    module, x = pack_linears(layer()), rows(5)
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), layer()(x))
    assert products == []


def test_small_products_are_left_alone(products: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "_LEAST", 5 * IN * OUT + 1)
    module = pack_linears(layer())
    module(rows(5))
    assert products == []
    module(rows(6))
    assert len(products) == 1


@pytest.mark.parametrize("slow", ["ours", "theirs"])
def test_each_kind_of_product_is_tried_once(slow: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And then done by whichever was quicker."""
    monkeypatch.setattr(training, "is_quicker", trial.is_quicker)
    calls = {"ours": 0, "theirs": 0}

    def counted(name: str, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*args: Any) -> Tensor:
            calls[name] += 1
            time.sleep(0.005 if name == slow else 0.0)
            return function(*args)

        return call

    monkeypatch.setattr(training, "_by_us", counted("ours", training._by_us))
    monkeypatch.setattr(training, "_by_torch", counted("theirs", training._by_torch))
    module = pack_linears(layer())
    for count in (33, 40, 63):
        with_gradients(module, rows(count), torch.randn(count, OUT))
        if count == 33:
            assert len(training._quicker) == 3
            calls.update(ours=0, theirs=0)
    assert calls == ({"ours": 0, "theirs": 6} if slow == "ours" else {"ours": 6, "theirs": 0})


def test_without_gradients_it_is_the_function_itself(products: list[Any]) -> None:
    x, module = rows(5), layer()
    with torch.no_grad():
        assert torch.equal(training.linear(x, module.weight, module.bias), F.linear(x, module.weight, module.bias))
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        training.linear(x, torch.randn(OUT, IN + 1), None)
    assert products == []
