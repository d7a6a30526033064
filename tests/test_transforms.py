"""torch.func on the ops: maps and gradients of each sample, and which orders of gradient there are."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from op_problems import (
    DROPOUT,
    PACKED,
    VARIANTS,
    assert_right,
    assert_same,
    each_backend,
)
from torch import Tensor
from torch.autograd import forward_ad

from transformer_fast import UnsupportedError, attention, attention_varlen, ops
from transformer_fast.spec import Operands, Options
from transformer_fast.testing import Case, judge, make_problem
from transformer_fast.testing.runner import GRADIENT_NAMES


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    """No graph of one test is found by the next."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# ---------------------------------------------------------------------------------------------------- vmap, func

SIZE = 3  # of the mapped dimension


def mapped_inputs(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    query = torch.randn(SIZE, 2, 4, 9, 8, dtype=dtype)
    key, value = torch.randn(2, SIZE, 2, 2, 12, 8, dtype=dtype)
    return {"query": query, "key": key, "value": value}


def judged_against_a_loop(mapped: Tensor, loop: Callable[[int, torch.dtype, str], Tensor]) -> None:
    """The rule, with the loop in float64 as the oracle and the loop over the same kernels as the plain computation."""
    oracle = torch.stack([loop(i, torch.float64, "reference") for i in range(SIZE)])
    plain = torch.stack([loop(i, torch.float32, "cpu") for i in range(SIZE)])
    verdict = judge(mapped, oracle, plain)
    assert verdict.passed, str(verdict)


MAPPED_OPERANDS = {
    "bias_of_a_row": (torch.randn(SIZE, 12), 0),
    "bias_of_a_head": (torch.randn(SIZE, 4, 9, 12), 0),
    "bias_whole": (torch.randn(2, SIZE, 4, 9, 12), 1),
    "bias_shared": (torch.randn(1, 4, 9, 12), None),
    "bias_shared_batch": (torch.randn(2, 1, 9, 12), None),
    "bias_bool": (torch.rand(SIZE, 2, 1, 9, 12) < 0.5, 0),
    "alibi_slopes": (torch.rand(SIZE, 4), 0),
    "alibi_slopes_batch": (torch.rand(2, 4, SIZE), 2),
    "alibi_slopes_shared": (torch.rand(4), None),
    "alibi_slopes_shared_batch": (torch.rand(2, 4), None),
    "seqlens_k": (torch.tensor([[12, 3], [0, 7], [1, 12]], dtype=torch.int32), 0),
    "seqlens_k_shared": (torch.tensor([12, 3], dtype=torch.int32), None),
    "key_padding_mask": (torch.rand(2, SIZE, 12) < 0.6, 1),
    "sinks_shared": (torch.randn(4), None),
}


def operand_name(label: str) -> str:
    return max((name for name in Operands._fields if label.startswith(name)), key=len)


@pytest.mark.parametrize("label", MAPPED_OPERANDS)
def test_vmap_is_a_loop(label: str) -> None:
    """Every operand with a batch may be mapped, over any of its dimensions, or shared."""
    name, (operand, dim) = operand_name(label), MAPPED_OPERANDS[label]
    inputs = mapped_inputs()

    def call(query: Tensor, key: Tensor, value: Tensor, operand: Tensor) -> Tensor:
        return attention(query, key, value, causal=True, **{name: operand})

    mapped = torch.func.vmap(call, in_dims=(0, 0, 0, dim))(*inputs.values(), operand)

    def loop(i: int, dtype: torch.dtype, backend: str) -> Tensor:
        one = operand if dim is None else operand.select(dim, i)
        one = one.to(dtype) if name in ("bias", "sinks") and one.is_floating_point() else one
        given = {n: t[i].to(dtype) for n, t in inputs.items()}
        return attention(**given, causal=True, backend=backend, **{name: one})

    judged_against_a_loop(mapped, loop)


@pytest.mark.parametrize("in_dims", [(0, 0, 0), (3, None, None), (None, 2, 2), (None, None, 1), (1, 0, None)], ids=str)
def test_vmap_over_query_key_and_value(in_dims: tuple[int | None, ...]) -> None:
    inputs = list(mapped_inputs().values())
    moved = [t[0] if dim is None else t.movedim(0, dim) for t, dim in zip(inputs, in_dims, strict=True)]

    def loop(i: int, dtype: torch.dtype, backend: str) -> Tensor:
        given = [t if d is None else t.select(d, i) for t, d in zip(moved, in_dims, strict=True)]
        return attention(*[t.to(dtype) for t in given], backend=backend)

    judged_against_a_loop(torch.func.vmap(attention, in_dims=in_dims)(*moved), loop)


def test_vmap_of_lse_and_in_two_dimensions() -> None:
    inputs = mapped_inputs()
    _, lse = torch.func.vmap(lambda q, k, v: attention(q, k, v, return_lse=True))(*inputs.values())

    def loop(i: int, dtype: torch.dtype, backend: str) -> Tensor:
        return attention(*[t[i].to(dtype) for t in inputs.values()], backend=backend, return_lse=True)[1]

    judged_against_a_loop(lse, loop)
    twice = torch.func.vmap(torch.func.vmap(attention))(*[torch.stack([t, t]) for t in inputs.values()])
    assert_same(
        {"first": twice[0], "second": twice[1]},
        dict.fromkeys(("first", "second"), torch.func.vmap(attention)(*inputs.values())),
    )


def test_vmap_over_nothing() -> None:
    out = torch.func.vmap(attention)(*[t[:0] for t in mapped_inputs().values()])
    assert out.shape == (0, 2, 4, 9, 8)


def map_sinks(query: Tensor, key: Tensor, value: Tensor) -> None:
    torch.func.vmap(lambda sinks: attention(query, key, value, sinks=sinks))(torch.randn(SIZE, 4))


def map_with_dropout(query: Tensor, key: Tensor, value: Tensor, *, randomness: str) -> None:
    mapped = torch.func.vmap(lambda q: attention(q, key, value, dropout_p=0.5), randomness=randomness)
    mapped(torch.stack([query] * SIZE))


def map_packed(query: Tensor, key: Tensor, value: Tensor) -> None:
    cu = torch.tensor([0, 12], dtype=torch.int32)
    key, value = key[0].transpose(0, 1), value[0].transpose(0, 1)
    torch.func.vmap(lambda q: attention_varlen(q, key, value, cu, cu, 12, 12))(torch.randn(SIZE, 12, 4, 8))


@pytest.mark.parametrize(
    ("call", "says"),
    [
        pytest.param(map_sinks, "vmap over sinks", id="sinks"),
        pytest.param(partial(map_with_dropout, randomness="same"), "dropout_p", id="dropout-same"),
        pytest.param(partial(map_with_dropout, randomness="different"), "dropout_p", id="dropout-different"),
        pytest.param(map_packed, "vmap over attention_varlen", id="packed"),
    ],
)
def test_vmap_says_what_it_cannot(call: Callable[..., Any], says: str) -> None:
    query, (key, value) = torch.randn(2, 4, 9, 8), torch.randn(2, 2, 2, 12, 8)
    with pytest.raises(UnsupportedError, match=says):
        call(query, key, value)


@each_backend
def test_many_gradients_at_once(backend: str) -> None:
    """``is_grads_batched=True``, as ``jacobian(vectorize=True)`` asks."""
    leaves = [torch.randn(1, 2, 5, 8, requires_grad=True) for _ in range(3)]
    out, lse = attention(*leaves, causal=True, return_lse=True, backend=backend)
    dout, dlse = torch.randn(SIZE, *out.shape), torch.randn(SIZE, *lse.shape)
    for results, grads in (([out], [dout]), ([lse], [dlse]), ([out, lse], [dout, dlse])):
        inputs = leaves[:2] if results[0] is lse else leaves  # lse does not know the value
        found = torch.autograd.grad(results, inputs, grads, is_grads_batched=True, retain_graph=True)
        for i in range(SIZE):
            each = torch.autograd.grad(results, inputs, [g[i] for g in grads], retain_graph=True)
            for many, one in zip(found, each, strict=True):
                torch.testing.assert_close(many[i], one)


def test_a_gradient_of_zeros_without_memory() -> None:
    query = torch.randn(1, 2, 5, 8, requires_grad=True)
    attention(query, query, query).backward(torch._efficientzerotensor((1, 2, 5, 8)))
    assert query.grad is not None and torch.equal(query.grad, torch.zeros_like(query))


@each_backend
def test_func_grad(backend: str, seed: int) -> None:
    """torch.func.grad is autograd."""
    case = VARIANTS["sinks"]
    problem = make_problem(case, torch.float32, seed)
    names = list(problem.inputs)

    def loss(*values: Tensor) -> Tensor:
        out = attention(**dict(zip(names, values, strict=True)), causal=True, backend=backend)
        return (out * problem.dout).sum()

    grads = torch.func.grad(loss, argnums=tuple(range(len(names))))(*problem.inputs.values())
    assert_right({GRADIENT_NAMES[n]: g for n, g in zip(names, grads, strict=True)}, case, seed)


def test_func_gradients_of_each_sample() -> None:
    """vmap of grad: the gradients of every sample by itself."""
    inputs, dout = mapped_inputs(), torch.randn(2, 4, 9, 8)

    def loss(query: Tensor, key: Tensor, value: Tensor, backend: str = "auto") -> Tensor:
        return (attention(query, key, value, causal=True, backend=backend) * dout.to(query.dtype)).sum()

    for argument in range(3):
        mapped = torch.func.vmap(torch.func.grad(loss, argnums=argument))(*inputs.values())

        def loop(i: int, dtype: torch.dtype, backend: str, argument: int = argument) -> Tensor:
            leaves = [t[i].to(dtype).requires_grad_() for t in inputs.values()]
            return torch.autograd.grad(loss(*leaves, backend=backend), leaves)[argument]

        judged_against_a_loop(mapped, loop)


@pytest.mark.parametrize("operand", ["bias", "sinks"])
def test_func_gradients_of_each_sample_say_what_they_cannot(operand: str) -> None:
    inputs = mapped_inputs()
    given = torch.randn(4, 1, 1) if operand == "bias" else torch.randn(4)

    def loss(extra: Tensor, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return attention(query, key, value, **{operand: extra}).sum()

    with pytest.raises(UnsupportedError, match="vmap of the gradient of bias or sinks"):
        torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0, 0))(given, *inputs.values())


# ----------------------------------------------------------------------------------------------- orders of gradient

SECOND_ORDER = {
    name: replace(case, num_heads=2, num_kv_heads=1, head_dim=3, head_dim_v=2, batch=case.batch, **sizes)
    for name, case, sizes in (
        ("causal", VARIANTS["causal"], dict(seqlen_q=3, seqlen_k=4)),
        ("window_softcap", VARIANTS["window"], dict(seqlen_q=3, seqlen_k=4, window_size=(1, 0), softcap=2.0)),
        ("bias_sinks", VARIANTS["bias"], dict(seqlen_q=2, seqlen_k=3, sinks="finite")),
        ("lengths_alibi", VARIANTS["lengths"], dict(seqlen_q=2, seqlen_k=3, seqlens_k=(3, 0), alibi="heads")),
        ("dropout", DROPOUT, dict(seqlen_q=2, seqlen_k=3)),
        ("packed", PACKED, dict(seqlens_q=(2, 0, 1), seqlens_k=(1, 2, 2))),
    )
}  # fmt: skip


@pytest.mark.parametrize("case", SECOND_ORDER.values(), ids=SECOND_ORDER)
def test_both_orders_of_the_reference_by_finite_differences(case: Case) -> None:
    problem = make_problem(case, torch.float64)
    names = list(problem.inputs)
    leaves = [t.double().detach().requires_grad_() for t in problem.inputs.values()]

    def function(*values: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = problem.call(dict(zip(names, values, strict=True)), "reference")
        return out, lse.masked_fill(lse.isinf(), 0.0)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # gradcheck asks for float64 of tensors that are
        assert torch.autograd.gradcheck(function, leaves, fast_mode=True)
        assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


@pytest.mark.parametrize("loss", [torch.sum, lambda out: out.square().sum()], ids=["linear", "square"])
@pytest.mark.parametrize("road", ["eager", "op"])
def test_the_second_derivative_of_a_kernel_is_refused(road: str, loss: Callable[[Tensor], Tensor]) -> None:
    """A gradient penalty must not silently be a constant, not even where the incoming gradient is one."""
    query, (key, value) = torch.randn(2, 4, 9, 8, requires_grad=True), torch.randn(2, 2, 2, 12, 8)

    def call() -> Tensor:
        if road == "eager":
            return attention(query, key, value, backend="cpu")
        return ops.attention_op(*Operands(query, key, value), *Options(backend="cpu"))[0]

    def penalty() -> None:
        (grad,) = torch.autograd.grad(loss(call()), query, create_graph=True)
        (call().square().sum() + grad.square().sum()).backward()

    with pytest.raises(RuntimeError, match=r"twice|no autograd formula"):
        penalty()
    attention(query, key, value, backend="cpu").sum().backward()  # once is no problem


def test_forward_mode_is_refused_or_right() -> None:
    """A tangent must not vanish: a kernel without a forward-mode rule says so."""
    query, tangent = torch.randn(2, 2, 4, 9, 8)
    key, value = torch.randn(2, 2, 2, 12, 8)

    def by_dual_numbers(backend: str) -> Tensor | None:
        with forward_ad.dual_level():
            out = attention(forward_ad.make_dual(query, tangent), key, value, backend=backend)
            return forward_ad.unpack_dual(out).tangent

    assert by_dual_numbers("reference") is not None
    with pytest.raises((NotImplementedError, RuntimeError), match="forward"):
        by_dual_numbers("cpu")


def test_func_jvp_is_refused_or_right() -> None:
    query, tangent = torch.randn(2, 2, 4, 9, 8)
    key, value = torch.randn(2, 2, 2, 12, 8)
    with pytest.raises((NotImplementedError, RuntimeError, UnsupportedError), match=r"forward|jvp"):
        torch.func.jvp(lambda q: attention(q, key, value, backend="cpu"), (query,), (tangent,))


@each_backend
def test_gradients_only_where_they_are_asked_for(backend: str) -> None:
    inputs = {n: t[0] for n, t in mapped_inputs().items()} | {"bias": torch.randn(4, 9, 12), "sinks": torch.randn(4)}
    for wanted in inputs:
        leaves = {n: t.clone().requires_grad_(n == wanted) for n, t in inputs.items()}
        attention(**leaves, backend=backend).sum().backward()
        assert {n for n, t in leaves.items() if t.grad is not None} == {wanted}
    leaves = {n: t.clone().requires_grad_() for n, t in inputs.items()}
    with torch.no_grad():
        assert not attention(**leaves, backend=backend).requires_grad
    with torch.inference_mode():
        assert not attention(**leaves, backend=backend).requires_grad


@each_backend
def test_a_gradient_through_lse_alone(backend: str, seed: int) -> None:
    """No gradient comes in through out: autograd hands None, which stands for zeros."""
    case = replace(VARIANTS["lse_gradient"], name="ops_lse_alone")
    problem = make_problem(case, torch.float32, seed)
    results = []
    for inputs, used in ((problem.inputs, backend), ({n: t.double() for n, t in problem.inputs.items()}, "reference")):
        leaves = {n: t.detach().requires_grad_() for n, t in inputs.items()}
        _, lse = problem.call(leaves, used)
        grads = torch.autograd.grad(lse, list(leaves.values()), problem.dlse.to(lse.dtype), allow_unused=True)
        results.append(dict(zip(leaves, grads, strict=True)))
    ours, oracle = results
    assert ours["value"] is None or not ours["value"].any()
    leaves = {n: t.detach().requires_grad_() for n, t in problem.inputs.items()}
    zeros = torch.zeros_like(problem.dout)
    both = torch.autograd.grad(problem.call(leaves, backend), list(leaves.values()), (zeros, problem.dlse))
    for name, grad in zip(leaves, both, strict=True):
        if name == "value":
            assert not grad.any()
            continue
        verdict = judge(ours[name], oracle[name], grad, name=name)
        assert torch.equal(ours[name], grad), str(verdict)
