"""What PyTorch may do with the ops: fake, compile, export, cast, checkpoint; and the memory order of results.

Numbers are judged like everywhere by the tolerance rule; where a call only takes another road to the same kernel, the
bits must be the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from op_problems import (
    DROPOUT,
    PACKED,
    VARIANTS,
    assert_right,
    assert_same,
    backward_arguments,
    each_backend,
    each_variant,
    op_arguments,
    public,
    results_of,
)
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from transformer_fast import attention, attention_varlen, ops
from transformer_fast.backends import Gradients
from transformer_fast.layout import Order
from transformer_fast.spec import Operands, Options, UnsupportedError, parse_options
from transformer_fast.testing import Case, make_problem


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    """No graph of one test is found by the next."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# -------------------------------------------------------------------------------------------------------- opcheck


@each_backend
@each_variant
def test_opcheck_forward(case: Case, backend: str, seed: int) -> None:
    """Schema, fake rule, autograd rule and ahead-of-time autograd with dynamic shapes, by PyTorch's own checks."""
    problem = make_problem(case, torch.float32, seed)
    torch.library.opcheck(ops.attention_op, op_arguments(problem, backend, gradients=True))


@each_backend
@each_variant
def test_opcheck_backward(case: Case, backend: str, seed: int) -> None:
    problem = make_problem(case, torch.float32, seed)
    torch.library.opcheck(ops.attention_backward_op, backward_arguments(problem, backend))


@each_backend
def test_opcheck_with_dropout(backend: str, seed: int) -> None:
    problem = make_problem(DROPOUT, torch.float32, seed)
    torch.library.opcheck(ops.attention_op, op_arguments(problem, backend, gradients=True))
    torch.library.opcheck(ops.attention_backward_op, backward_arguments(problem, backend))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_opcheck_in_half_precision(dtype: torch.dtype, seed: int) -> None:
    """The fake rule's dtypes: out in the query's, lse and statistics in float32."""
    problem = make_problem(VARIANTS["lse_gradient"], dtype, seed)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(ops.attention_op, op_arguments(problem, gradients=True), test_utils=checks)
    torch.library.opcheck(ops.attention_backward_op, backward_arguments(problem), test_utils=checks)


@each_backend
@each_variant
def test_the_op_is_the_public_function(case: Case, backend: str, seed: int) -> None:
    """The road of tracers gives what the eager road gives, gradients included. Zeros would look right to opcheck."""
    problem = make_problem(case, torch.float32, seed)

    def by_op(**given: Any) -> tuple[Tensor, Tensor]:
        del given["return_lse"]
        operands = Operands(**{name: given.pop(name, None) for name in Operands._fields})
        return ops.attention_op(*operands, *parse_options(**given))[:2]

    assert_right(results_of(by_op, problem, backend=backend), case, seed)


@each_backend
@each_variant
def test_fake_tensors_promise_what_comes(case: Case, backend: str, seed: int) -> None:
    """Shape, dtype and strides of every output, and of every gradient, without running anything."""
    problem = make_problem(case, torch.float32, seed)
    mode = FakeTensorMode()

    def fake(value: Any) -> Any:
        return mode.from_tensor(value) if isinstance(value, Tensor) else value

    for op, arguments in (
        (ops.attention_op, op_arguments(problem, backend)),
        (ops.attention_backward_op, backward_arguments(problem, backend)),
    ):
        real = op(*arguments)
        with mode:
            promised = op(*map(fake, arguments))
        for promise, result in zip(promised, real, strict=True):
            assert (promise.shape, promise.dtype, promise.stride()) == (result.shape, result.dtype, result.stride())


def test_fake_mode_takes_the_public_functions() -> None:
    with FakeTensorMode():
        query, key = torch.empty(2, 9, 4, 8).transpose(1, 2), torch.empty(2, 2, 12, 8)
        out, lse = attention(query, key, torch.empty(2, 2, 12, 5), causal=True, dropout_p=0.1, return_lse=True)
        assert out.shape == (2, 4, 9, 5)
        assert out.transpose(1, 2).is_contiguous()
        assert (lse.shape, lse.dtype) == ((2, 4, 9), torch.float32)


# --------------------------------------------------------------------------------------------- compile and export


@each_variant
def test_compiled_in_one_graph(case: Case, seed: int) -> None:
    """Forward and backward, without a break, to the bits of the eager call."""
    problem = make_problem(case, torch.float32, seed)
    compiled = torch.compile(public(case), fullgraph=True, backend="aot_eager")
    results = results_of(compiled, problem)
    assert_same(results, results_of(public(case), problem))
    assert_right(results, case, seed)


def test_compiled_with_dropout(seed: int) -> None:
    """The seed is drawn in the graph, so that each call of it drops others."""
    problem = make_problem(DROPOUT, torch.float32, seed)
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    assert_same(results_of(compiled, problem), results_of(attention, problem))
    first, second = (compiled(**problem.inputs, **problem.options) for _ in range(2))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_compiled_reference(dtype: torch.dtype, seed: int) -> None:
    """Gradients of the reference are those of autograd, which sees nothing inside an op: they must be found again."""
    problem = make_problem(VARIANTS["bias"], torch.float32, seed)
    wide = replace(problem, inputs={n: t.to(dtype) for n, t in problem.inputs.items()})
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    results = results_of(compiled, wide, backend="reference" if dtype == torch.float32 else "auto")
    assert_right(results, problem.case, seed)


def test_compiled_with_options_that_change(seed: int) -> None:
    """Numbers that differ from call to call become symbols to the compiler; the checks have to let them."""
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    for i, softmax_scale in enumerate((0.1, 0.2, 0.3)):
        changing = dict(softmax_scale=softmax_scale, softcap=2.0 + i, window_size=(5 + i, 3 + i))
        case = replace(VARIANTS["full"], **changing)
        assert_right(results_of(compiled, make_problem(case, torch.float32, seed)), case, seed)


def test_compiled_for_any_size(seed: int) -> None:
    """One graph for all batches and lengths: sizes stay symbols all the way through."""
    from torch._dynamo.testing import CompileCounterWithBackend

    counter, graphs = CompileCounterWithBackend("aot_eager"), []
    compiled = torch.compile(attention, fullgraph=True, backend=counter, dynamic=True)
    for batch, seqlen in ((3, 19), (2, 40), (5, 7), (4, 130)):  # the first: no two alike, or the compiler links them
        case = replace(VARIANTS["causal"], batch=batch, seqlen_q=seqlen, seqlen_k=seqlen + 3, window_size=(9, None))
        assert_right(results_of(compiled, make_problem(case, torch.float32, seed)), case, seed)
        graphs.append(counter.frame_count)
    assert len(set(graphs)) == 1, f"compiled again for another size: {graphs}"


def test_compiled_packed_for_any_lengths(seed: int) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    counter, graphs = CompileCounterWithBackend("aot_eager"), []
    compiled = torch.compile(attention_varlen, fullgraph=True, backend=counter, dynamic=True)
    for lengths in ((3, 9, 16, 7), (40, 2), (7, 0, 30, 5, 11)):  # the first: no two sizes alike, as above
        case = replace(PACKED, name=f"ops_{lengths}", seqlens_q=lengths, seqlens_k=tuple(n + 2 for n in lengths))
        assert_right(results_of(compiled, make_problem(case, torch.float32, seed)), case, seed)
        graphs.append(counter.frame_count)
    assert len(set(graphs)) == 1, f"compiled again for another size: {graphs}"


def test_compiled_by_inductor(seed: int) -> None:
    """The default compiler, with code around the op that it fuses, and views as they come out of a projection."""
    case = VARIANTS["window"]
    problem = make_problem(case, torch.float32, seed)

    def block(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        query = query.transpose(1, 2).contiguous().view(2, 19, 32)  # (batch, seqlen_q, num_heads * head_dim)
        query = (query * 2).unflatten(-1, (4, 8)).transpose(1, 2) / 2
        out, lse = attention(query, key + 0, value, **options)
        return out.transpose(1, 2).flatten(2).unflatten(2, (4, 8)).transpose(1, 2), lse

    assert_right(results_of(torch.compile(block, fullgraph=True), problem), case, seed)


class Layer(torch.nn.Module):
    """A module to export."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, keep: Tensor) -> Tensor:
        return attention(query, key, value, causal=True, key_padding_mask=keep, window_size=(30, None))


def test_exported_with_dynamic_sizes(tmp_path: Any) -> None:
    def inputs(batch: int, seqlen: int) -> tuple[Tensor, ...]:
        key, value = torch.randn(2, batch, 2, seqlen, 8)
        return torch.randn(batch, 4, seqlen, 8), key, value, torch.rand(batch, seqlen) < 0.8

    batch, seqlen = torch.export.Dim("batch", min=1), torch.export.Dim("seqlen", min=2)
    sizes = {0: batch, 2: seqlen}
    program = torch.export.export(
        Layer(),
        inputs(2, 19),
        dynamic_shapes={"query": sizes, "key": sizes, "value": sizes, "keep": {0: batch, 1: seqlen}},
    )
    assert any("transformer_fast.attention" in str(node.target) for node in program.graph.nodes)
    torch.export.save(program, tmp_path / "layer.pt2")
    loaded = torch.export.load(tmp_path / "layer.pt2")
    for size in ((2, 19), (3, 50), (1, 130)):
        given = inputs(*size)
        assert torch.equal(program.module()(*given), Layer()(*given))
        assert torch.equal(loaded.module()(*given), Layer()(*given))


# -------------------------------------------------------------------------------------------------------- autocast


def autocast_roads() -> dict[str, Callable[..., Any]]:
    def by_op(**given: Any) -> tuple[Tensor, Tensor]:
        del given["return_lse"]
        operands = Operands(**{name: given.pop(name, None) for name in Operands._fields})
        return ops.attention_op(*operands, *parse_options(**given))[:2]

    return {
        "eager": attention,
        "op": by_op,
        "compiled": torch.compile(attention, fullgraph=True, backend="aot_eager"),
    }


@pytest.mark.parametrize("road", ["eager", "op", "compiled"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(road: str, dtype: torch.dtype, seed: int) -> None:
    """float32 inputs are computed in the autocast dtype; bias and sinks stay float32; gradients come back float32."""
    case = replace(VARIANTS["bias"], sinks="finite", lse_gradient=True)
    problem = make_problem(case, torch.float32, seed)
    function = autocast_roads()[road]
    with torch.autocast("cpu", dtype=dtype):
        results = results_of(function, problem)
    assert results["out"].dtype == dtype
    assert all(t.dtype == torch.float32 for name, t in results.items() if name != "out")
    narrow = {n: t.to(dtype) if n in ("query", "key", "value") else t for n, t in problem.inputs.items()}
    by_hand = results_of(attention, replace(problem, inputs=narrow))
    assert_same(results, {n: t if n == "out" else t.float() for n, t in by_hand.items()})


@pytest.mark.parametrize("road", ["eager", "op", "compiled"])
def test_autocast_mixes_and_exceptions(road: str) -> None:
    function = autocast_roads()[road]
    query, (key, value) = torch.randn(2, 4, 9, 8), torch.randn(2, 2, 2, 12, 8)
    bias = torch.randn(1, 1, 9, 12)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed, _ = function(query=query, key=key.bfloat16(), value=value.half(), return_lse=True)
        assert mixed.dtype == torch.bfloat16
        half_bias, _ = function(query=query, key=key, value=value, bias=bias.half(), return_lse=True)
        assert half_bias.dtype == torch.bfloat16
        wide, _ = function(query=query.double(), key=key.double(), value=value.double(), return_lse=True)
        assert wide.dtype == torch.float64
        with torch.autocast("cpu", enabled=False):
            plain, _ = function(query=query, key=key, value=value, return_lse=True)
        assert plain.dtype == torch.float32
    assert function(query=query, key=key, value=value, return_lse=True)[0].dtype == torch.float32


def test_autocast_packed() -> None:
    cu = torch.tensor([0, 4, 9], dtype=torch.int32)
    query, (key, value) = torch.randn(9, 4, 8), torch.randn(2, 9, 2, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert attention_varlen(query, key, value, cu, cu, 5, 5).dtype == torch.bfloat16


# --------------------------------------------------------------------------------------------------- checkpointing


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("case", [VARIANTS["sinks"], DROPOUT], ids=["sinks", "dropout"])
def test_activation_checkpointing(case: Case, use_reentrant: bool, seed: int) -> None:
    """The second forward pass draws the same dropout seed, since PyTorch restores the generator that it comes from."""
    problem = make_problem(case, torch.float32, seed)

    def checkpointed(query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None = None, **options: Any) -> Any:
        def run(query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None) -> Any:
            return attention(query, key, value, sinks=sinks, **options)

        return checkpoint(run, query, key, value, sinks, use_reentrant=use_reentrant)

    # A plain backward, since reentrant checkpoints know no autograd.grad.
    def gradients(function: Callable[..., Any]) -> dict[str, Tensor]:
        leaves = {n: t.detach().clone().requires_grad_() for n, t in problem.inputs.items()}
        torch.manual_seed(problem.seed)
        out, _ = function(**leaves, **problem.options, return_lse=True)
        torch.manual_seed(problem.seed + 1)  # the generator has moved on when backward comes
        out.backward(problem.dout)
        return {"out": out.detach()} | {n: t.grad for n, t in leaves.items()}

    assert_same(gradients(checkpointed), gradients(attention))


# --------------------------------------------------------------------------------------------------- memory order

ORDERS = {
    "bhsd": lambda b, h, s, d: torch.randn(b, h, s, d),
    "bshd": lambda b, h, s, d: torch.randn(b, s, h, d).transpose(1, 2),
}


@each_backend
@pytest.mark.parametrize("road", ["eager", "training", "op", "compiled"])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("sizes", [(2, 4, 9, 8), (1, 4, 9, 8), (2, 4, 1, 8), (2, 1, 9, 8)], ids=str)
def test_out_comes_in_the_order_of_the_query(sizes: tuple[int, ...], order: str, road: str, backend: str) -> None:
    """A (batch, seqlen, num_heads, head_dim) model merges the heads of what it gets back without a copy."""
    query = ORDERS[order](*sizes)
    key, value = torch.randn(2, sizes[0], 1, 12, 8)
    if road == "op":
        out = ops.attention_op(*Operands(query, key, value), *Options(backend=backend))[0]
    else:
        function = torch.compile(attention, fullgraph=True, backend="aot_eager") if road == "compiled" else attention
        out = function(query.requires_grad_(road == "training"), key, value, backend=backend)
    as_asked = out.transpose(1, 2) if order == "bshd" else out
    assert as_asked.is_contiguous()


def test_gradients_come_in_the_order_of_their_inputs() -> None:
    """Of a kernel, whose gradients have no other order to come in; the reference leaves it to autograd."""
    leaves = [ORDERS["bshd"](2, heads, seqlen, 8).requires_grad_() for heads, seqlen in ((4, 9), (2, 12), (2, 12))]
    out = attention(*leaves, backend="cpu")
    for leaf, grad in zip(leaves, torch.autograd.grad(out.sum(), leaves), strict=True):
        assert grad.stride() == leaf.stride()


def in_order(order: Order) -> Callable[..., tuple[Tensor, Tensor]]:
    """attention() over the road of another order, with views on both sides of it."""

    def function(query: Tensor, key: Tensor, value: Tensor, return_lse: bool = True, **given: Any) -> Any:
        optional = {name: given.pop(name) for name in Operands._fields if name in given}
        if order == "bshd":
            query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        out, lse = ops.run(Operands(query, key, value, **optional), parse_options(**given), return_lse, order)
        return out.transpose(1, 2), lse

    return function


other_orders = pytest.mark.parametrize("order", ["bshd", "bhsd->bshd"])
#: Everything that backward gives a gradient to.
ALL_GRADIENTS = replace(VARIANTS["bias"], sinks="finite", lse_gradient=True, head_dim_v=5)


@each_backend
@other_orders
@pytest.mark.parametrize("road", ["eager", "compiled"])
def test_another_order_is_the_same_problem(road: str, order: Order, backend: str, seed: int) -> None:
    problem = make_problem(ALL_GRADIENTS, torch.float32, seed)
    function = in_order(order)
    if road == "compiled":
        function = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert_same(results_of(function, problem, backend=backend), results_of(attention, problem, backend=backend))


@each_backend
@other_orders
def test_runners_of_another_order(order: Order, backend: str, seed: int) -> None:
    """What autograd calls, also of back ends that know one order and get views."""
    problem = make_problem(ALL_GRADIENTS, torch.float32, seed)
    operands, options = Operands(**problem.inputs), parse_options(backend=backend)

    def by(order: Order, operands: Operands, dout: Tensor) -> tuple[Tensor, Gradients]:
        runner = ops.runner_for(operands, options, order=order)
        results = runner.forward(operands, need_lse=True, need_stats=True)
        return results.out, runner.backward(operands, results, dout, problem.dlse, dbias=True, dsinks=True)

    assert problem.dout is not None
    wanted_out, wanted = by("bhsd", operands, problem.dout)
    out, grads = by(order, operands.to_bhsd(order), problem.dout.transpose(1, 2))  # there and back is the same
    assert torch.equal(out.transpose(1, 2), wanted_out)
    for grad, other in zip(grads, wanted.to_order(order), strict=True):
        assert grad is not None and other is not None and torch.equal(grad, other)


@other_orders
def test_another_order_can_be_differentiated_once(order: Order, seed: int) -> None:
    """With create_graph gradients take another road, on which no order may be lost; a second derivative is refused."""
    inputs = make_problem(VARIANTS["sinks"], torch.float32, seed).inputs
    leaves = {name: tensor.requires_grad_() for name, tensor in inputs.items()}

    def gradients(function: Callable[..., Any], create_graph: bool) -> tuple[Tensor, ...]:
        out = function(**leaves, return_lse=False, backend="cpu")
        out = out[0] if isinstance(out, tuple) else out
        return torch.autograd.grad(out.square().sum(), list(leaves.values()), create_graph=create_graph)

    first = gradients(in_order(order), create_graph=True)
    for grad, wanted in zip(first, gradients(attention, create_graph=False), strict=True):
        assert torch.equal(grad, wanted)
    with pytest.raises(UnsupportedError, match="cannot be differentiated twice"):
        torch.autograd.grad(first[0].sum(), leaves["query"])


@other_orders
@pytest.mark.parametrize("memory", ORDERS)
def test_an_output_of_rows_first_has_no_gaps(memory: str, order: Order) -> None:
    """Whoever merges heads copies nothing, whatever the query's memory is."""
    query, (key, value) = ORDERS[memory](2, 4, 9, 8), torch.randn(2, 2, 2, 12, 8)
    assert in_order(order)(query, key, value, backend="cpu")[0].transpose(1, 2).is_contiguous()


@each_backend
def test_gradients_are_the_same_without_lse(backend: str, seed: int) -> None:
    """lse that nobody asked for is kept in another place."""
    problem = make_problem(VARIANTS["sinks"], torch.float32, seed)
    found = []
    for return_lse in (True, False):
        leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in problem.inputs.items()}
        out = attention(**leaves, **problem.options, return_lse=return_lse, backend=backend)
        out = out[0] if isinstance(out, tuple) else out
        found.append((out, *torch.autograd.grad(out, list(leaves.values()), problem.dout)))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_an_output_is_nobody_elses_memory() -> None:
    query, (key, value) = torch.randn(2, 4, 9, 8), torch.randn(2, 2, 2, 12, 8)
    first = attention(query, key, value)
    kept = first.clone()
    attention(query + 1, key, value)
    assert torch.equal(first, kept)
    storages = {t.untyped_storage().data_ptr() for t in (query, key, value)}
    assert first.untyped_storage().data_ptr() not in storages
