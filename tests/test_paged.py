"""attention_paged: arguments, PyTorch's roads, and memory. Its numbers are judged in the conformance matrix."""

from __future__ import annotations

import ctypes
import math
import mmap
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from test_arguments import Row, assert_helpful, ints, on_meta, option_rows, per_head_rows, table, tensor_rows, with_dim
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from transformer_fast import UnsupportedError, attention, attention_paged, explain, ops
from transformer_fast.spec import Operands, parse_options
from transformer_fast.testing import Case, Problem, Target, available_targets, make_problem
from transformer_fast.testing.runner import expected, judge_all

BATCH, HEADS, KV_HEADS, ROWS, DIM, DIM_V = 2, 4, 2, 5, 8, 6
PAGES, PAGE_SIZE = 6, 3

TARGETS = available_targets()
each_target = pytest.mark.parametrize("target", TARGETS, ids=lambda t: t.name)
each_backend = pytest.mark.parametrize("backend", ["cpu", "reference"])

SIZES: dict[str, Any] = dict(batch=3, num_heads=4, num_kv_heads=2, seqlen_k=33, seqlens_k=(33, 0, 20), head_dim=8)
VARIANTS = {
    name: Case("paged", f"paged_ops_{name}", **SIZES | dict(seqlen_q=5, page_size=4, causal=True) | options)
    for name, options in {
        "plain": dict(),
        "decode": dict(seqlen_q=1),
        "heads_last": dict(layout="heads_last", head_dim_v=5, window_size=(9, None)),
        "options": dict(layout="gaps", alibi="batch_heads", softcap=3.0, sinks="finite", softmax_scale=0.5),
        "shared": dict(shared_pages=2, causal=False),
    }.items()
}
each_variant = pytest.mark.parametrize("case", VARIANTS.values(), ids=VARIANTS)


def paged_call() -> dict[str, Any]:
    return {
        "query": torch.randn(BATCH, HEADS, ROWS, DIM),
        "k_pages": torch.randn(PAGES, KV_HEADS, PAGE_SIZE, DIM),
        "v_pages": torch.randn(PAGES, KV_HEADS, PAGE_SIZE, DIM_V),
        "block_table": ints(4, 0, 5, 2, 1, 10**9).view(2, 3),
        "seqlens_k": ints(7, 4),
    }


def as_explained(call: dict[str, Any]) -> dict[str, Any]:
    """The same call as explain() takes it."""
    names = {"k_pages": "key", "v_pages": "value"}
    return {names.get(name, name): value for name, value in call.items()}


def op_arguments(problem: Problem, backend: str) -> tuple[Any, ...]:
    given = dict(zip(("query", "key", "value"), list(problem.inputs.values())[:3], strict=True))
    options = dict(problem.options)
    operands = {name: options.pop(name) for name in Operands._fields if name in options}
    operands |= {"sinks": problem.inputs.get("sinks"), "block_table": problem.block_table}
    return (*Operands(**given, **operands), *parse_options(**options, backend=backend))


def assert_right(out: Tensor, lse: Tensor, case: Case, seed: int) -> None:
    verdicts = judge_all({"out": out, "lse": lse}, expected(case, torch.float32, seed))
    assert all(v.passed for v in verdicts), "\n".join(map(str, verdicts))


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    """No graph of one test is found by the next."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# ------------------------------------------------------------------------------------------------------- arguments


def paged_rows() -> list[Row]:
    """What only attention_paged() takes, and how its tensors go together."""
    return [
        Row("k_pages", lambda t: with_dim(t, 0, PAGES + 1), ValueError, f"({PAGES + 1}, ", "pages"),
        Row("k_pages", lambda t: with_dim(t, 1, 3), ValueError, "3", "heads-do-not-divide"),
        Row("k_pages", lambda t: with_dim(t, 1, 0), ValueError, "0", "no-heads"),
        Row("k_pages", lambda t: with_dim(t, 2, PAGE_SIZE + 1), ValueError, "4", "page_size"),
        Row("v_pages", lambda t: with_dim(t, 0, 1), ValueError, f"(1, {KV_HEADS}, {PAGE_SIZE}, {DIM_V})", "pages"),
        Row("v_pages", lambda t: with_dim(t, 1, 1), ValueError, f"({PAGES}, 1, {PAGE_SIZE}, {DIM_V})", "heads"),
        Row("v_pages", lambda t: with_dim(t, 2, 1), ValueError, f"({PAGES}, {KV_HEADS}, 1, {DIM_V})", "page_size"),
        Row("query", lambda t: with_dim(t, 1, 0), ValueError, "(2, 0, 5, 8)", "no-heads"),
        Row("block_table", None, TypeError, "NoneType"),
        Row("block_table", lambda t: t.tolist(), TypeError, "list", "list"),
        Row("block_table", lambda t: t.long(), TypeError, "int64", "int64"),
        Row("block_table", lambda t: t.float(), TypeError, "float32", "float32"),
        Row("block_table", lambda t: t[0], ValueError, "(3,)", "one-row"),
        Row("block_table", lambda t: t[None], ValueError, "(1, 2, 3)", "three-dimensions"),
        Row("block_table", lambda t: t[:1], ValueError, "(1, 3)", "another-batch"),
        Row("block_table", on_meta, ValueError, "meta"),
        Row("seqlens_k", None, TypeError, "NoneType"),
        Row("seqlens_k", [7, 4], TypeError, "list"),
        Row("seqlens_k", ints(7, 4, dtype=torch.int64), TypeError, "int64"),
        Row("seqlens_k", ints(7, 4, 1), ValueError, "(3,)"),
        Row("seqlens_k", ints(7, 4)[:, None], ValueError, "(2, 1)", "matrix"),
        Row("seqlens_k", on_meta, ValueError, "meta"),
        *(
            Row(name, lambda t: t.requires_grad_(), ValueError, "requires grad", "requires-grad")
            for name in ("query", "k_pages", "v_pages")
        ),
        Row("sinks", torch.ones(HEADS, requires_grad=True), ValueError, "requires grad", "requires-grad"),
    ]  # fmt: skip


def all_rows() -> list[Row]:
    called = {"key": "k_pages", "value": "v_pages"}
    rows = [row._replace(argument=called.get(row.argument, row.argument)) for row in tensor_rows()]
    options = [row for row in option_rows() if row.argument not in ("dropout_p", "deterministic")]
    return rows + paged_rows() + per_head_rows() + options


def wrong_call(row: Row) -> dict[str, Any]:
    call = paged_call()
    return call | {row.argument: row.value(call[row.argument]) if callable(row.value) else row.value}


ROWS_OF_TABLE = table(all_rows())


@pytest.mark.parametrize("row", ROWS_OF_TABLE)
def test_attention_paged_rejects(row: Row) -> None:
    wrong = wrong_call(row)
    for _ in range(2):  # what was wrong once must not be remembered as right
        with pytest.raises(Exception) as error:
            attention_paged(**wrong)
        assert_helpful(error, row)


@pytest.mark.parametrize("row", [p for p in ROWS_OF_TABLE if p.id != "block_table-NoneType"])  # then it is no cache
def test_explain_rejects_what_attention_paged_rejects(row: Row) -> None:
    with pytest.raises(Exception) as error:
        explain(**as_explained(wrong_call(row)))
    assert_helpful(error, row)


@pytest.mark.parametrize("row", [p for p in ROWS_OF_TABLE if "sparse" not in p.id])  # there are no fake sparse tensors
def test_fake_tensors_are_checked_too(row: Row) -> None:
    mode = FakeTensorMode()
    fake = {k: mode.from_tensor(v) if isinstance(v, Tensor) else v for k, v in wrong_call(row).items()}
    with mode, pytest.raises(Exception) as error:
        attention_paged(**fake)
    assert_helpful(error, row)


def test_the_call_that_the_rows_change_is_right() -> None:
    assert attention_paged(**paged_call()).shape == (BATCH, HEADS, ROWS, DIM_V)
    found = explain(**as_explained(paged_call()), causal=True)
    assert found.backend == "cpu"
    assert found.path.startswith("tiled forward through a block table")
    assert "decode" in explain(**as_explained(paged_call() | {"query": torch.randn(BATCH, HEADS, 1, DIM)})).path


@pytest.mark.parametrize("name", ["cu_seqlens_q", "key_padding_mask", "bias"])
def test_explain_knows_what_does_not_go_with_pages(name: str) -> None:
    values = {
        "cu_seqlens_q": dict(cu_seqlens_q=ints(0, 5, 10), cu_seqlens_k=ints(0, 5, 10), max_seqlen_q=5, max_seqlen_k=5),
        "key_padding_mask": dict(key_padding_mask=torch.ones(BATCH, 9, dtype=torch.bool)),
        "bias": dict(bias=torch.zeros(ROWS, 9)),
    }
    with pytest.raises(ValueError, match=f"{name} is given with a paged cache; allowed: None"):
        explain(**as_explained(paged_call()), **values[name])


@each_backend
@pytest.mark.parametrize(
    ("argument", "value", "named"),
    [
        pytest.param("seqlens_k", ints(10, 1), "seqlens_k[0] is 10; allowed: 0 to 9", id="beyond-the-table"),
        pytest.param("seqlens_k", ints(7, -1), "seqlens_k[1] is -1; allowed: 0 to 9", id="negative-length"),
        pytest.param(
            "seqlens_k", ints(7, 7), "block_table[1, 2] is 1000000000; allowed: 0 to 5", id="length-and-table"
        ),
        pytest.param("block_table", ints(4, 0, -1, 2, 1, 0).view(2, 3), "block_table[0, 2] is -1", id="negative-page"),
        pytest.param(
            "block_table", ints(4, 0, 5, 2, 6, 0).view(2, 3), "block_table[1, 1] is 6", id="first-page-beyond"
        ),
    ],
)
def test_data_out_of_range(argument: str, value: Tensor, named: str, backend: str) -> None:
    """In eager mode, and in the op that a compiler calls; the right call goes first, so that its checks are known."""
    attention_paged(**paged_call(), backend=backend)
    wrong = paged_call() | {argument: value}
    with pytest.raises(ValueError) as error:
        attention_paged(**wrong, backend=backend)
    assert named in str(error.value)
    compiled = torch.compile(attention_paged, fullgraph=True, backend="aot_eager")
    with pytest.raises(ValueError) as error:
        compiled(**wrong, backend=backend)
    assert named in str(error.value)


# ------------------------------------------------------------------------------------------------ inference only


def test_gradients_are_refused_only_where_somebody_wants_them() -> None:
    """The checks are remembered by shape; whether a tensor requires grad is not a matter of shape."""
    call = paged_call()
    wanted = attention_paged(**call)
    call["k_pages"].requires_grad_()
    with pytest.raises(ValueError, match=r"k_pages requires grad.*no_grad"):
        attention_paged(**call)
    with torch.no_grad():
        assert torch.equal(attention_paged(**call), wanted)
    with torch.inference_mode():
        assert torch.equal(attention_paged(**call), wanted)
    assert not attention_paged(**call | {"k_pages": call["k_pages"].detach()}).requires_grad


def test_gradients_are_refused_on_every_road(seed: int) -> None:
    call = paged_call()
    with pytest.raises(ValueError, match="query requires grad"):
        torch.func.grad(lambda q: attention_paged(**call | {"query": q}).sum())(call["query"])
    compiled = torch.compile(attention_paged, fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match="query requires grad"):
        compiled(**call | {"query": call["query"].clone().requires_grad_()})
    arguments = op_arguments(make_problem(VARIANTS["plain"], torch.float32, seed), "cpu")
    with pytest.raises(ValueError, match="query requires grad"):
        ops.attention_op(arguments[0].clone().requires_grad_(), *arguments[1:])
    out, lse, stats = ops.attention_op(*arguments)
    for backward in (ops.attention_backward_op, torch.compile(ops.attention_backward_op, backend="aot_eager")):
        with pytest.raises(Exception, match="gradients through a paged cache"):
            backward(*arguments, out, lse, stats, out, None, False, False)


def test_vmap_is_refused() -> None:
    call = paged_call()
    with pytest.raises(UnsupportedError, match=r"vmap over attention_paged is not supported; put the sequences"):
        torch.func.vmap(lambda q: attention_paged(**call | {"query": q}))(call["query"][None])


# ------------------------------------------------------------------------------------------------- PyTorch's roads


@each_backend
@each_variant
def test_opcheck(case: Case, backend: str, seed: int) -> None:
    torch.library.opcheck(ops.attention_op, op_arguments(make_problem(case, torch.float32, seed), backend))


@each_backend
@each_variant
def test_fake_tensors_promise_what_comes(case: Case, backend: str, seed: int) -> None:
    arguments = op_arguments(make_problem(case, torch.float32, seed), backend)
    mode = FakeTensorMode()
    with mode:
        promised = ops.attention_op(*[mode.from_tensor(a) if isinstance(a, Tensor) else a for a in arguments])
    for promise, result in zip(promised, ops.attention_op(*arguments), strict=True):
        assert (promise.shape, promise.dtype, promise.stride()) == (result.shape, result.dtype, result.stride())


def test_meta_tensors() -> None:
    out, lse = attention_paged(**{name: t.to("meta") for name, t in paged_call().items()}, return_lse=True)
    assert out.is_meta and out.shape == (BATCH, HEADS, ROWS, DIM_V)
    assert lse.shape == (BATCH, HEADS, ROWS)


@each_variant
def test_compiled_in_one_graph(case: Case, seed: int) -> None:
    problem = make_problem(case, torch.float32, seed)
    compiled = torch.compile(attention_paged, fullgraph=True, backend="aot_eager")
    given = problem.inputs | problem.options | {"block_table": problem.block_table}
    out, lse = compiled(**given, return_lse=True)
    assert_right(out, lse, case, seed)
    assert all(map(torch.equal, (out, lse), attention_paged(**given, return_lse=True)))


def test_compiled_for_any_size(seed: int) -> None:
    """One graph for all batches, tables and caches: what serves requests that come and go."""
    from torch._dynamo.testing import CompileCounterWithBackend

    counter, graphs = CompileCounterWithBackend("aot_eager"), []
    compiled = torch.compile(attention_paged, fullgraph=True, backend=counter, dynamic=True)
    for lengths, rows in (((19, 100, 6), 5), ((40, 2), 9), ((5, 7, 130, 61), 2)):  # the first: no two sizes alike
        sizes = dict(batch=len(lengths), seqlen_q=rows, seqlen_k=max(lengths), seqlens_k=lengths, page_size=16)
        case = Case(
            "paged", f"paged_sizes_{len(lengths)}", num_heads=4, num_kv_heads=2, head_dim=8, causal=True, **sizes
        )
        problem = make_problem(case, torch.float32, seed)
        given = problem.inputs | problem.options | {"block_table": problem.block_table}
        assert_right(*compiled(**given, return_lse=True), case, seed)
        graphs.append(counter.frame_count)
    assert len(set(graphs)) == 1, f"compiled again for another size: {graphs}"


class Decoder(torch.nn.Module):
    """A module to export."""

    def forward(self, query: Tensor, k_pages: Tensor, v_pages: Tensor, block_table: Tensor, lengths: Tensor) -> Tensor:
        return attention_paged(
            query, k_pages.transpose(1, 2), v_pages.transpose(1, 2), block_table, lengths, causal=True
        )


def test_exported_with_a_growing_table(tmp_path: Any) -> None:
    """The cache as vLLM and flash-attn keep it, (num_pages, page_size, num_kv_heads, head_dim)."""

    def inputs(batch: int, pages: int) -> tuple[Tensor, ...]:
        cache = torch.randn(2, batch * pages, 16, 2, 8)
        block_table = torch.randperm(batch * pages, dtype=torch.int32).view(batch, pages)
        return torch.randn(batch, 4, 1, 8), *cache, block_table, ints(*[16 * pages - b for b in range(batch)])

    program = torch.export.export(
        Decoder(),
        inputs(3, 5),
        dynamic_shapes={
            "query": {0: torch.export.Dim.AUTO},
            "k_pages": {0: torch.export.Dim.AUTO},
            "v_pages": {0: torch.export.Dim.AUTO},
            "block_table": {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO},
            "lengths": {0: torch.export.Dim.AUTO},
        },
    )
    torch.export.save(program, tmp_path / "decoder.pt2")
    loaded = torch.export.load(tmp_path / "decoder.pt2").module()
    for size in ((3, 5), (2, 9), (5, 3)):
        given = inputs(*size)
        assert torch.equal(loaded(*given), Decoder()(*given))


@pytest.mark.parametrize("cache", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("road", ["eager", "compiled", "op"])
def test_under_autocast_the_query_takes_the_dtype_of_the_cache(cache: torch.dtype, road: str) -> None:
    """Autocast's own would ask for a copy of the cache at every step."""
    call = paged_call()
    narrow = {name: call[name].to(cache) for name in ("query", "k_pages", "v_pages")}
    wanted = attention_paged(**call | narrow)
    mixed = call | narrow | {"query": narrow["query"].to(torch.float32 if cache != torch.float32 else torch.bfloat16)}
    if cache == torch.float32:
        wanted = attention_paged(**call | narrow | {"query": mixed["query"].float()})
    compiled = torch.compile(attention_paged, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        if road == "op":
            tensors = as_explained(mixed)
            found = ops.attention_op(*Operands(**tensors), *parse_options())[0]
        else:
            found = (compiled if road == "compiled" else attention_paged)(**mixed)
    assert found.dtype == cache
    assert torch.equal(found, wanted)


# ---------------------------------------------------------------------------------------------------- the cache


@each_target
def test_decoding_step_by_step_is_attention(target: Target, seed: int) -> None:
    """A prompt and then token after token, each written into its page first; pages are taken as they are needed."""
    page_size, total, prompt = 4, 23, 9
    case = Case("paged", "paged_steps", batch=2, num_heads=4, num_kv_heads=2, seqlen_q=total, head_dim=16, causal=True)
    problem = make_problem(case, torch.float32, seed)
    query, key, value = (problem.inputs[name] for name in ("query", "key", "value"))
    free = iter(torch.randperm(40).tolist())
    k_pages, v_pages = torch.full((2, 40, page_size, 2, 16), math.nan).transpose(2, 3)
    block_table = torch.full((2, 8), -1, dtype=torch.int32)
    outs, lses = [], []
    for begin, end in ((0, prompt), *((i, i + 1) for i in range(prompt, total))):
        for b in range(2):
            for j in range(begin, end):
                if j % page_size == 0:
                    block_table[b, j // page_size] = next(free)
                page = block_table[b, j // page_size]
                k_pages[page, :, j % page_size], v_pages[page, :, j % page_size] = key[b, :, j], value[b, :, j]
        with target.forced():
            out, lse = attention_paged(
                query[:, :, begin:end], k_pages, v_pages, block_table, ints(end, end), causal=True, return_lse=True,
                backend=target.backend,
            )  # fmt: skip
        outs.append(out)
        lses.append(lse)
    assert_right(torch.cat(outs, dim=2), torch.cat(lses, dim=2), case, seed)


@pytest.mark.parametrize("rows", [1, 50], ids=["decode", "tiles"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_pages_give_the_bits_of_a_contiguous_cache(rows: int, dtype: torch.dtype) -> None:
    """Where a key lies changes no arithmetic, whatever the size of a page."""
    key, value = torch.randn(2, 1, 2, 240, 24).to(dtype)
    query = torch.randn(1, 4, rows, 24).to(dtype)
    wanted = attention(query, key, value, causal=True, backend="cpu")
    for page_size in (1, 5, 16, 60, 240):
        pages = 240 // page_size
        order = torch.randperm(pages)
        # (1, heads, seqlen, d) -> (pages, heads, page_size, d), page i at place order[i]
        k_pages, v_pages = (
            t[0].unflatten(1, (pages, page_size)).transpose(0, 1)[order.argsort()] for t in (key, value)
        )
        out = attention_paged(query, k_pages, v_pages, order.int()[None], ints(240), causal=True, backend="cpu")
        assert torch.equal(out, wanted), page_size


@pytest.mark.sanitize
@each_target
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [1, 40], ids=["decode", "tiles"])
def test_dirty_values_go_where_they_are_seen(rows: int, dtype: torch.dtype, target: Target) -> None:
    """NaN and infinity in values, in the blocks that some rows do not see: each row gets those it sees, no other."""
    key, value = torch.randn(2, 1, 2, 64, 16).to(dtype)
    value[0, 0, 61, 3], value[0, 1, 40, 5] = math.nan, math.inf
    query, order = torch.randn(1, 4, rows, 16).to(dtype), torch.randperm(16)
    options: dict[str, Any] = dict(causal=True, window_size=(20, None), backend=target.backend)
    pages = [t[0].unflatten(1, (16, 4)).transpose(0, 1)[order.argsort()] for t in (key, value)]
    with target.forced():
        out = attention_paged(query, *pages, order.int()[None], ints(63), **options)
        wanted = attention(query, key, value, seqlens_k=ints(63), **options)
    assert torch.equal(out.isnan(), wanted.isnan())
    assert torch.equal(out.nan_to_num(), wanted.nan_to_num())
    assert out.isnan().any()
    assert out[:, 2:].isinf().any() == (rows > 1)
    assert out[..., [0, 1, 2, 4]].isfinite().all()


@each_backend
@pytest.mark.parametrize("rows", [1, 70], ids=["decode", "tiles"])
def test_the_cache_is_not_copied(backend: str, rows: int) -> None:
    """A cache that no memory would hold twice, nor once: a million pages that are all one."""
    page = torch.randn(2, 1, 2, 64, 32)
    k_pages, v_pages = page[0].expand(10**6, -1, -1, -1), page[1].expand(10**6, -1, -1, -1)
    block_table, query = ints(999_999, 0, 123_456)[None], torch.randn(1, 4, rows, 32)
    out = attention_paged(query, k_pages, v_pages, block_table, ints(192), causal=True, backend=backend)
    key, value = (t.repeat(1, 1, 3, 1) for t in page)
    assert torch.equal(out, attention(query, key, value, causal=True, backend=backend))


@pytest.mark.sanitize
@pytest.mark.parametrize("rows", [1, 70], ids=["decode", "tiles"])
def test_pages_beyond_32_bits(rows: int) -> None:
    """The last page begins more than 2**31 elements after the first (address space, not memory)."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    shape, strides = (4, 2, 16, 8), (2**30 + 64, 128, 8, 1)
    size = 2 * (1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True)))
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # MAP_NORESERVE
    near, far, starts = torch.randn(2, *shape).bfloat16(), [], []
    for t in near:
        start = libc.mmap(None, size, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0)
        if start in (None, ctypes.c_void_p(-1).value):
            pytest.skip("the system lends no such address space")
        starts.append(start)
        memory = torch.frombuffer((ctypes.c_char * size).from_address(start), dtype=torch.bfloat16)
        far.append(memory.as_strided(shape, strides).copy_(t))
    block_table, lengths, query = ints(3, 0, 2).view(1, 3), ints(47), torch.randn(1, 4, rows, 8).bfloat16()
    results = [
        attention_paged(query, *pages, block_table, lengths, causal=True, backend="cpu") for pages in (far, near)
    ]
    assert torch.equal(*results)
    for start in starts:
        libc.munmap(start, size)
