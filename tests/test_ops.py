"""What PyTorch may do with the ops: compile, export, cast, checkpoint, map, transform, fake; and the dropout mask.

Numbers are judged like everywhere by the tolerance rule; where a call only takes another road to the same kernel, the
bits must be the same.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from transformer_fast import UnsupportedError, attention, attention_varlen, ops
from transformer_fast.spec import Operands, Options, parse_options
from transformer_fast.testing import Case, Problem, available_targets, judge, make_problem
from transformer_fast.testing.runner import GRADIENT_NAMES, compute, expected, judge_all

SMALL: dict[str, Any] = dict(batch=2, num_heads=4, num_kv_heads=2, seqlen_q=19, seqlen_k=33, head_dim=8)
#: Each operand and option that an op has, at least once.
VARIANTS = {
    name: Case("ops", f"ops_{name}", **SMALL | options)
    for name, options in {
        "full": dict(),
        "causal": dict(causal=True),
        "window": dict(window_size=(7, 2), layout="heads_last", dout="heads_last"),
        "bias": dict(bias="float", bias_form="1hqk"),
        "bias_of_keys": dict(bias="float", bias_form="b11k", dout="ones_expanded"),
        "mask": dict(bias="bool", bias_form="bhqk", layout="gaps", dout="gaps"),
        "sinks": dict(sinks="finite", causal=True, head_dim_v=5),
        "lengths": dict(seqlens_k=(33, 7), causal=True),
        "padding": dict(padding="holes"),
        "alibi_softcap": dict(alibi="batch_heads", softcap=3.0, softmax_scale=0.5),
        "lse_gradient": dict(lse_gradient=True, sinks="finite", layout="heads_last"),
        "decode": dict(seqlen_q=1, seqlen_k=600, causal=True),
        "packed": dict(seqlens_q=(3, 0, 16), seqlens_k=(5, 2, 20), causal=True),
    }.items()
}
PACKED = VARIANTS["packed"]
DROPOUT = Case("ops", "ops_dropout", **SMALL, dropout_p=0.3)

each_variant = pytest.mark.parametrize("case", VARIANTS.values(), ids=VARIANTS)
each_backend = pytest.mark.parametrize("backend", ["cpu", "reference"])


def op_arguments(problem: Problem, backend: str = "cpu", *, gradients: bool = False) -> tuple[Any, ...]:
    """The arguments of the forward op for a problem."""
    given = {n: t.detach().clone().requires_grad_(gradients) for n, t in problem.inputs.items()}
    given = {n: t.as_strided(t.shape, problem.inputs[n].stride()) if t.numel() == 0 else t for n, t in given.items()}
    given |= problem.options
    operands = {name: given.pop(name, None) for name in Operands._fields}
    if problem.case.dropout_p:
        operands["rng_seed"] = torch.tensor([1234567890123])
    return (*Operands(**operands), *parse_options(**given, backend=backend))


def backward_arguments(problem: Problem, backend: str = "cpu", dlse: Tensor | None = None) -> tuple[Any, ...]:
    arguments = op_arguments(problem, backend)
    results = ops.attention_op(*arguments)
    wants = ("bias" in problem.inputs, "sinks" in problem.inputs)
    return (*arguments, *results, problem.dout, problem.dlse if dlse is None else dlse, *wants)


def results_of(function: Callable[..., Any], problem: Problem, **options: Any) -> dict[str, Tensor]:
    """out, lse and all gradients of a function that is called like the public ones."""

    def forward(leaves: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        torch.manual_seed(problem.seed)
        return function(**leaves, **problem.options, **options, return_lse=True)

    return compute(forward, problem.inputs, problem.dout, problem.dlse)


def public(case: Case) -> Callable[..., Any]:
    return attention_varlen if case.packed else attention


def assert_right(results: dict[str, Tensor], case: Case, seed: int) -> None:
    verdicts = judge_all(results, expected(case, torch.float32, seed))
    assert all(v.passed for v in verdicts), "\n".join(map(str, verdicts))


def assert_same(results: dict[str, Tensor], others: dict[str, Tensor]) -> None:
    assert results.keys() == others.keys()
    for name, result in results.items():
        assert torch.equal(result, others[name]), name


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


def test_an_output_is_nobody_elses_memory() -> None:
    query, (key, value) = torch.randn(2, 4, 9, 8), torch.randn(2, 2, 2, 12, 8)
    first = attention(query, key, value)
    kept = first.clone()
    attention(query + 1, key, value)
    assert torch.equal(first, kept)
    storages = {t.untyped_storage().data_ptr() for t in (query, key, value)}
    assert first.untyped_storage().data_ptr() not in storages


# -------------------------------------------------------------------------------------------------------- dropout

TARGETS = available_targets()
each_target = pytest.mark.parametrize("target", TARGETS, ids=lambda t: t.name)


def keep_mask(
    backend: str, batch: int, heads: int, seqlen_q: int, seqlen_k: int, *, kv_heads: int | None = None, p: float = 0.4
) -> Tensor:
    """Which probabilities dropout keeps. All are equal, and the values are unit vectors: the output is the mask."""
    query = torch.zeros(batch, heads, seqlen_q, 8)
    key = torch.zeros(batch, kv_heads or heads, seqlen_k, 8)
    unit = torch.eye(seqlen_k).expand(*key.shape[:3], seqlen_k)
    torch.manual_seed(99)
    return attention(query, key, unit, dropout_p=p, backend=backend) > 0


@each_target
@pytest.mark.parametrize("seqlen_q", [1, 70])
def test_one_dropout_mask_on_every_back_end(target: Any, seqlen_q: int) -> None:
    wanted = keep_mask("reference", 2, 4, seqlen_q, 203)
    with target.forced():
        assert torch.equal(keep_mask(target.backend, 2, 4, seqlen_q, 203), wanted)
    assert wanted.any()
    assert not wanted.all()


@each_target
def test_the_dropout_mask_depends_on_the_place_alone(target: Any) -> None:
    """Not on how a problem is tiled, chunked or grouped: a smaller one has the corner of the larger one's mask."""
    with target.forced():
        whole = keep_mask(target.backend, 3, 4, 150, 210)
        for batch, heads, seqlen_q, seqlen_k, kv_heads in (
            (3, 4, 150, 97, 4),
            (2, 4, 150, 210, 1),
            (1, 2, 65, 210, 2),
            (3, 4, 1, 210, 2),
            (2, 3, 5, 1, 3),
            (1, 4, 64, 96, 2),
        ):
            part = keep_mask(target.backend, batch, heads, seqlen_q, seqlen_k, kv_heads=kv_heads)
            assert torch.equal(part, whole[:batch, :heads, :seqlen_q, :seqlen_k]), (batch, heads, seqlen_q, seqlen_k)


@each_target
def test_the_dropout_mask_of_a_packed_sequence(target: Any) -> None:
    """Sequence b of a packed batch drops what entry b of the padded batch drops."""
    lengths_q, lengths_k = (5, 0, 70), (11, 3, 101)
    cu_q, cu_k = (torch.tensor([0, *n]).cumsum(0).to(torch.int32) for n in (lengths_q, lengths_k))
    key = torch.zeros(sum(lengths_k), 2, 8)
    unit = torch.cat([torch.eye(n, max(lengths_k)) for n in lengths_k])[:, None].expand(-1, 2, -1)
    with target.forced():
        torch.manual_seed(99)
        out = attention_varlen(
            torch.zeros(sum(lengths_q), 4, 8), key, unit, cu_q, cu_k, 70, 101, dropout_p=0.4, backend=target.backend
        )
    padded = keep_mask("reference", 3, 4, 70, 101)
    for b, (rows, keys) in enumerate(zip(lengths_q, lengths_k, strict=True)):
        here = out[cu_q[b] : cu_q[b + 1], :, :keys].transpose(0, 1) > 0
        assert torch.equal(here, padded[b, :, :rows, :keys]), b


@each_target
def test_backward_drops_what_forward_dropped(target: Any) -> None:
    """With unit vectors coming in, the gradient of the values is the transposed matrix of dropped probabilities."""
    query, key = torch.zeros(2, 2, 70, 8), torch.zeros(2, 2, 110, 8)
    value = torch.zeros(2, 2, 110, 70, requires_grad=True)
    with target.forced():
        torch.manual_seed(99)
        attention(query, key, value, dropout_p=0.4, backend=target.backend).backward(torch.eye(70).expand(2, 2, 70, 70))
        assert torch.equal(value.grad.transpose(-1, -2) > 0, keep_mask(target.backend, 2, 2, 70, 110))


@each_target
def test_dropout_keeps_the_expected_value(target: Any) -> None:
    """What is kept is divided by 1 - p, exactly: all kept entries of a uniform row are equal to 1 / (n (1 - p))."""
    n, p = 128, 0.25
    query = torch.zeros(1, 2, 33, 8)
    unit = torch.eye(n).expand(1, 2, n, n)
    with target.forced():
        out = attention(query, torch.zeros(1, 2, n, 8), unit, dropout_p=p, backend=target.backend)
    kept = out[out > 0]
    plain = torch.full_like(kept, 1 / n) / (1 - p)
    verdict = judge(kept, plain.double(), plain)
    assert verdict.passed, str(verdict)


def test_each_call_draws_another_seed() -> None:
    query = torch.zeros(1, 1, 64, 8)
    unit = torch.eye(64)[None, None]
    first, second = (attention(query, query, unit, dropout_p=0.5) for _ in range(2))
    assert not torch.equal(first, second)
