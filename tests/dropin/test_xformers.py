"""xformers' memory_efficient_attention and its mask classes, against masks written from what the names mean.

Where xformers is installed, its own classes are held against the same definitions.
"""

from __future__ import annotations

import importlib
import itertools
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import transformer_fast.dropin.xformers as xops
from transformer_fast.testing import judge
from transformer_fast.testing.baseline import plain_attention

HEADS, DIM, VALUE_DIM = 4, 16, 24
Visible = Callable[[Tensor, Tensor, int, int], Tensor]


def everything(i: Tensor, j: Tensor, n: int, m: int) -> Tensor:
    return (i >= 0) & (j >= 0)


def causal(i: Tensor, j: Tensor, n: int, m: int) -> Tensor:
    """From the top left; of n queries the i-th, of m keys the j-th."""
    return j <= i


def causal_end(i: Tensor, j: Tensor, n: int, m: int) -> Tensor:
    """From the bottom right: no nearer to the last key than the query is to the last query."""
    return m - j >= n - i


def window(size: int) -> Visible:
    return lambda i, j, n, m: (j <= i) & (j > i - size)


def window_end(size: int) -> Visible:
    return lambda i, j, n, m: (m - j >= n - i) & (m - j < n - i + size)


def local_end(left: int, right: int) -> Visible:
    return lambda i, j, n, m: (m - j <= n - i + left) & (m - j >= n - i - right)


@dataclass
class Case:
    """A mask's constructor, and for each sequence its number of queries and where its keys are."""

    make: Callable[[Any], Any]  # given the module with the classes
    rows: list[int]
    keys: list[list[int]]
    visible: Visible
    cached: bool = False  # has no gradient

    @property
    def num_keys(self) -> int:
        return self.room or max(max(k, default=-1) for k in self.keys) + 1

    room: int = 0


def spans(*spans: tuple[int, int]) -> list[list[int]]:
    return [list(range(begin, end)) for begin, end in spans]


Q, K = [3, 1, 9, 0, 5], [5, 1, 9, 2, 6]  # numbers of queries and of keys, never fewer
ENDS = [0, 5, 6, 15, 17, 23]
PACKED = spans(*itertools.pairwise(ENDS))
SAME = spans((0, 3), (3, 4), (4, 13), (13, 13), (13, 18))
FEWER = spans((0, 2), (2, 3), (3, 7), (7, 7), (7, 15))
LACKING = spans((0, 1), (1, 1), (1, 4), (4, 5), (5, 9))  # some queries are past the last key's window
PADDED = spans((0, 5), (10, 11), (20, 29), (30, 32), (40, 46))
GAPPY = spans((1, 6), (8, 9), (9, 18), (20, 22), (22, 28))
PAGE, TABLE = 4, torch.randperm(15, generator=torch.Generator().manual_seed(1)).view(5, 3).int()
PAGED = [[int(TABLE[b, j // PAGE]) * PAGE + j % PAGE for j in range(n)] for b, n in enumerate(K)]
FIRST = [2, 0, 1, 5, 3]  # keys of a sequence's pages that are passed over
PAGED_GAPPY = [
    [int(TABLE[b, j // PAGE]) * PAGE + j % PAGE for j in range(first, first + n)]
    for b, (first, n) in enumerate(zip(FIRST, K, strict=True))
]


def packed(make: Callable[[Any], Any], visible: Visible, keys: list[list[int]] = PACKED) -> Case:
    def of_lengths(m: Any) -> Any:
        return make(m.BlockDiagonalMask.from_seqlens(Q, [len(k) for k in keys], device=torch.device("cpu")))

    return Case(of_lengths, Q, keys, visible)


def padded(make: Callable[[Any], Any], visible: Visible) -> Case:
    return Case(make, Q, PADDED, visible, cached=True, room=50)


def gappy(make: Callable[[Any], Any], visible: Visible) -> Case:
    return Case(make, Q, GAPPY, visible, cached=True, room=30)


def paged(make: Callable[[Any], Any], visible: Visible, keys: list[list[int]] = PAGED) -> Case:
    return Case(make, Q, keys, visible, cached=True, room=15 * PAGE)


def gappy_pages(name: str) -> Callable[[Any], Any]:
    """xformers' own ``from_seqlens`` of these refuses what it asks for (0.0.35), so they come from others."""

    def make(m: Any) -> Any:
        starts = [3 * PAGE * b + first for b, first in enumerate(FIRST)]
        mask = m.BlockDiagonalGappyKeysMask.from_seqlens(Q, [*starts, 15 * PAGE], K)
        return mask.make_paged(TABLE, PAGE, 3 * PAGE, getattr(m, name))

    return make


CASES: dict[str, Case] = {
    "BlockDiagonalMask": packed(lambda mask: mask, everything),
    "BlockDiagonalCausalMask": packed(lambda mask: mask.make_causal(), causal, SAME),
    "BlockDiagonalCausalMask_more_keys": packed(lambda mask: mask.make_causal(), causal),
    "BlockDiagonalCausalMask_fewer_keys": packed(lambda mask: mask.make_causal(), causal, FEWER),
    "BlockDiagonalCausalFromBottomRightMask": packed(lambda mask: mask.make_causal_from_bottomright(), causal_end),
    "BlockDiagonalCausalLocalAttentionMask": packed(lambda mask: mask.make_local_attention(3), window(3), SAME),
    "BlockDiagonalCausalLocalAttentionMask_more_keys": packed(lambda mask: mask.make_local_attention(3), window(3)),
    "BlockDiagonalCausalLocalAttentionMask_fewer_keys": packed(
        lambda mask: mask.make_local_attention(6), window(6), FEWER
    ),
    "BlockDiagonalCausalLocalAttentionMask_rows_without_keys": packed(
        lambda mask: mask.make_local_attention(2), window(2), LACKING
    ),
    "BlockDiagonalCausalLocalAttentionFromBottomRightMask": packed(
        lambda mask: mask.make_local_attention_from_bottomright(3), window_end(3)
    ),
    "BlockDiagonalPaddedKeysMask": padded(lambda m: m.BlockDiagonalPaddedKeysMask.from_seqlens(Q, 10, K), everything),
    "BlockDiagonalCausalWithOffsetPaddedKeysMask": padded(
        lambda m: m.BlockDiagonalCausalWithOffsetPaddedKeysMask.from_seqlens(Q, 10, K), causal_end
    ),
    "BlockDiagonalLocalAttentionPaddedKeysMask": padded(
        lambda m: m.BlockDiagonalLocalAttentionPaddedKeysMask.from_seqlens_local(Q, 10, K, 2, 1), local_end(2, 1)
    ),
    "make_local_attention": padded(
        lambda m: m.BlockDiagonalPaddedKeysMask.from_seqlens(Q, 10, K).make_local_attention(2, 1), local_end(2, 1)
    ),
    "BlockDiagonalCausalLocalAttentionPaddedKeysMask": padded(
        lambda m: m.BlockDiagonalCausalLocalAttentionPaddedKeysMask.from_seqlens_local(Q, 10, K, 3), window_end(3)
    ),
    "BlockDiagonalGappyKeysMask": gappy(
        lambda m: m.BlockDiagonalGappyKeysMask.from_seqlens(Q, [1, 8, 9, 20, 22, 30], K), everything
    ),
    "BlockDiagonalCausalWithOffsetGappyKeysMask": gappy(
        lambda m: m.BlockDiagonalCausalWithOffsetGappyKeysMask.from_seqlens(Q, [1, 8, 9, 20, 22, 30], K), causal_end
    ),
    "PagedBlockDiagonalPaddedKeysMask": paged(
        lambda m: m.PagedBlockDiagonalPaddedKeysMask.from_seqlens(Q, K, TABLE, PAGE), everything
    ),
    "PagedBlockDiagonalCausalWithOffsetPaddedKeysMask": paged(
        lambda m: m.PagedBlockDiagonalCausalWithOffsetPaddedKeysMask.from_seqlens(Q, K, TABLE, PAGE), causal_end
    ),
    "make_paged": paged(
        lambda m: m.BlockDiagonalPaddedKeysMask.from_seqlens(Q, 12, K).make_paged(
            TABLE, PAGE, m.PagedBlockDiagonalCausalWithOffsetPaddedKeysMask
        ),
        causal_end,
    ),
    "PagedBlockDiagonalGappyKeysMask": paged(gappy_pages("PagedBlockDiagonalGappyKeysMask"), everything, PAGED_GAPPY),
    "PagedBlockDiagonalCausalWithOffsetGappyKeysMask": paged(
        gappy_pages("PagedBlockDiagonalCausalWithOffsetGappyKeysMask"), causal_end, PAGED_GAPPY
    ),
}
DENSE: dict[str, tuple[Callable[[Any], Any], Visible]] = {
    "none": (lambda m: None, everything),
    "LowerTriangularMask": (lambda m: m.LowerTriangularMask(), causal),
    "LowerTriangularFromBottomRightMask": (lambda m: m.LowerTriangularFromBottomRightMask(), causal_end),
    "LowerTriangularFromBottomRightLocalAttentionMask": (
        lambda m: m.LowerTriangularFromBottomRightMask().make_local_attention(4),
        window_end(4),
    ),
    "LocalAttentionFromBottomRightMask": (
        lambda m: m.LocalAttentionFromBottomRightMask(window_left=2, window_right=3),
        local_end(2, 3),
    ),
}


def block(visible: Visible, n: int, m: int) -> Tensor:
    return visible(torch.arange(n)[:, None], torch.arange(m)[None], n, m)


def dense_mask(case: Case) -> Tensor:
    """(total_q, total_k), True where visible."""
    mask = torch.zeros(sum(case.rows), case.num_keys, dtype=torch.bool)
    begin = 0
    for rows, keys in zip(case.rows, case.keys, strict=True):
        mask[begin : begin + rows, keys] = block(case.visible, rows, len(keys))
        begin += rows
    return mask


def plain(query: Tensor, key: Tensor, value: Tensor, *, visible: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """(batch, seqlen, num_heads, head_dim) tensors; lse (batch, num_heads, seqlen_q)."""
    scale = options.pop("scale", query.shape[-1] ** -0.5)
    q, k, v = (t.transpose(1, 2) for t in (query, key, value))
    out, lse, _, _ = plain_attention(q, k, v, visible=visible, softmax_scale=scale, **options)
    return out.transpose(1, 2), lse


def results_of(
    function: Callable[..., Tensor], tensors: list[Tensor], dtype: torch.dtype, gradient: bool
) -> list[Tensor]:
    leaves = [t.to(dtype, copy=True).requires_grad_(gradient) for t in tensors]
    out = function(*leaves)
    if not gradient:
        return [out]
    (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(7)).to(dtype)).sum().backward()
    grads = [t.grad for t in leaves]
    assert all(g is not None for g in grads)
    return [out.detach(), *grads]  # type: ignore[list-item]


def assert_same(
    ours: Callable[..., Tensor], definition: Callable[..., Tensor], tensors: list[Tensor], dtype: torch.dtype,
    gradient: bool = True,
) -> None:  # fmt: skip
    """Results and all gradients, by the one tolerance rule."""
    result = results_of(ours, tensors, dtype, gradient)
    oracle, peer = (results_of(definition, tensors, d, gradient) for d in (torch.float64, dtype))
    for place, three in enumerate(zip(result, oracle, peer, strict=True)):
        assert three[0].dtype == dtype
        verdict = judge(*three, name=f"result {place}")
        assert verdict.passed, str(verdict)


def drawn(batch: int, rows: int, keys: int) -> list[Tensor]:
    return [torch.randn(batch, n, HEADS, d) for n, d in ((rows, DIM), (keys, DIM), (keys, VALUE_DIM))]


FUSED = {name: getattr(xops, name) for name in ("attention", "attention_varlen")}
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])


@each_dtype
@pytest.mark.parametrize("name", CASES)
def test_sequences_in_one_row(name: str, dtype: torch.dtype) -> None:
    case = CASES[name]
    bias, visible = case.make(xops), dense_mask(case)
    tensors = drawn(1, sum(case.rows), case.num_keys)
    assert_same(
        lambda q, k, v: xops.memory_efficient_attention(q, k, v, attn_bias=bias),
        lambda q, k, v: plain(q, k, v, visible=visible)[0],
        tensors,
        dtype,
        gradient=not case.cached,
    )


def test_keys_that_begin_in_a_page() -> None:
    """The other constructor."""
    name = "PagedBlockDiagonalCausalWithOffsetGappyKeysMask"
    bias = getattr(xops, name).from_seqlens(Q, FIRST, K, TABLE, PAGE)
    tensors = drawn(1, sum(Q), CASES[name].num_keys)
    results = [xops.memory_efficient_attention(*tensors, b) for b in (bias, CASES[name].make(xops))]
    assert torch.equal(*results)


@each_dtype
@pytest.mark.parametrize("sizes", [(9, 9), (5, 12), (12, 5)], ids=str)
@pytest.mark.parametrize("name", DENSE)
def test_dense(name: str, sizes: tuple[int, int], dtype: torch.dtype) -> None:
    make, visible = DENSE[name]
    assert_same(
        lambda q, k, v: xops.memory_efficient_attention(q, k, v, make(xops), scale=0.3),
        lambda q, k, v: plain(q, k, v, visible=block(visible, *sizes), scale=0.3)[0],
        drawn(2, *sizes),
        dtype,
    )


@pytest.mark.parametrize("sizes", [(9, 9), (5, 12), (12, 5)], ids=str)
@pytest.mark.parametrize("triangle", [False, True], ids=["tensor", "triangle"])
def test_tensor_bias(triangle: bool, sizes: tuple[int, int]) -> None:
    visible = block(causal if triangle else everything, *sizes)
    assert_same(
        lambda q, k, v, b: xops.memory_efficient_attention(
            q, k, v, xops.LowerTriangularMask().add_bias(b) if triangle else b
        ),
        lambda q, k, v, b: plain(q, k, v, visible=visible, bias=b)[0],
        [*drawn(2, *sizes), torch.randn(2, HEADS, *sizes)],
        torch.float32,
    )


@pytest.mark.parametrize("masked", [False, True])
def test_three_dimensions(masked: bool) -> None:
    q, k, v = (t[:, :, 0] for t in drawn(3, 7, 7))
    bias = torch.randn(3, 7, 7) if masked else None
    out = xops.memory_efficient_attention(q, k, v, bias)
    four = xops.memory_efficient_attention(
        q[:, :, None], k[:, :, None], v[:, :, None], None if bias is None else bias[:, None]
    )
    assert out.shape == (3, 7, VALUE_DIM) and torch.equal(out, four[:, :, 0])


@pytest.mark.parametrize("form", ["expanded", "one", "repeated"])
@pytest.mark.parametrize("masked", ["none", "bias", "packed"])
def test_groups_of_heads(masked: str, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    groups, heads, batch, n = 2, 3, 1 if masked == "packed" else 2, 9
    q = torch.randn(batch, n, groups, heads, DIM)
    k, v = (torch.randn(batch, n, groups, 1, d) for d in (DIM, VALUE_DIM))
    bias = torch.randn(batch, groups, heads, n, n) if masked == "bias" else None
    given = xops.BlockDiagonalCausalMask.from_seqlens([4, 5]) if masked == "packed" else bias
    mask = torch.block_diag(torch.ones(4, 4).tril(), torch.ones(5, 5).tril()).bool()
    seen: list[int] = []
    for name in FUSED:

        def counted(q: Tensor, k: Tensor, *rest: Any, _function: Any = FUSED[name], **options: Any) -> Any:
            seen.append(k.shape[1])
            return _function(q, k, *rest, **options)

        monkeypatch.setattr(xops, name, counted)

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if form == "expanded":
            k, v = (t.expand(-1, -1, -1, heads, -1) for t in (k, v))
        elif form == "repeated":
            k, v = (t.repeat(1, 1, 1, heads, 1) for t in (k, v))
        out = xops.memory_efficient_attention(q, k, v, given)
        assert out.shape == (batch, n, groups, heads, VALUE_DIM)
        return out

    def definition(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = q.flatten(2, 3), k[:, :, :, 0], v[:, :, :, 0]
        visible = mask if masked == "packed" else torch.ones(n, n, dtype=torch.bool)
        out, _ = plain(q, k, v, visible=visible, bias=None if bias is None else bias.flatten(1, 2))
        return out.unflatten(2, (groups, heads))

    assert_same(ours, definition, [q, k, v], torch.float32)
    assert seen == [groups * heads if form == "repeated" else groups]


def test_one_head_for_all_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, ...]] = []
    fused = xops.attention

    def attention(q: Tensor, k: Tensor, *rest: Any, **options: Any) -> Any:
        seen.append(tuple(k.shape))
        return fused(q, k, *rest, **options)

    monkeypatch.setattr(xops, "attention", attention)
    q, k, v = drawn(2, 6, 6)
    k, v = (t[:, :, :1] for t in (k, v))
    out = xops.memory_efficient_attention(q, k.expand(-1, -1, HEADS, -1), v.expand(-1, -1, HEADS, -1))
    assert seen == [(2, 1, 6, DIM)]
    copied = (t.repeat(1, 1, HEADS, 1) for t in (k, v))
    torch.testing.assert_close(out, xops.memory_efficient_attention(q, *copied))


@pytest.mark.parametrize("name", ["none", "LowerTriangularMask"])
def test_lse(name: str) -> None:
    make, visible = DENSE[name]
    tensors = drawn(2, 5, 9)
    results = xops.memory_efficient_attention_forward_requires_grad(*tensors, make(xops))
    oracle, peer = (
        plain(*[t.to(d) for t in tensors], visible=block(visible, 5, 9)) for d in (torch.float64, torch.float32)
    )
    for three in zip(results, oracle, peer, strict=True):
        assert judge(*three).passed


@pytest.mark.parametrize("name", [
    "BlockDiagonalMask", "BlockDiagonalCausalMask_fewer_keys", "make_paged",
    "BlockDiagonalCausalLocalAttentionMask_rows_without_keys",
])  # fmt: skip
def test_lse_of_sequences_in_one_row(name: str) -> None:
    case = CASES[name]
    tensors = drawn(1, sum(case.rows), case.num_keys)
    results = xops.memory_efficient_attention_forward_requires_grad(*tensors, case.make(xops))
    oracle, peer = (
        plain(*[t.to(d) for t in tensors], visible=dense_mask(case)) for d in (torch.float64, torch.float32)
    )
    for three in zip(results, oracle, peer, strict=True):
        assert judge(*three).passed


def test_lse_of_groups() -> None:
    q = torch.randn(2, 5, 2, 3, DIM)
    _, lse = xops.memory_efficient_attention_forward_requires_grad(q, q, q)
    assert lse.shape == (2, 2, 3, 5)


def test_forward_only() -> None:
    q, k, v = (t.requires_grad_() for t in drawn(2, 5, 9))
    out = xops.memory_efficient_attention_forward(q, k, v, output_dtype=torch.float64)
    assert out.dtype == torch.float64 and not out.requires_grad
    torch.testing.assert_close(out.float(), xops.memory_efficient_attention(q, k, v))


def test_a_window_of_a_query_s_own_key() -> None:
    q, k, v = drawn(1, 7, 4)
    bias = xops.BlockDiagonalMask.from_seqlens([7], [4]).make_local_attention(1)
    out, lse = xops.memory_efficient_attention_forward_requires_grad(q, k, v, bias)
    torch.testing.assert_close(out[:, :4], v)
    assert not out[:, 4:].any() and (lse[:, :, 4:] == float("-inf")).all() and lse[:, :, :4].isfinite().all()


def test_what_a_cache_holds_beside_its_keys_reaches_nothing() -> None:
    for case in CASES.values():
        if not case.cached:
            continue
        q, k, v = drawn(1, sum(case.rows), case.num_keys)
        out = xops.memory_efficient_attention(q, k, v, case.make(xops))
        unused = sorted(set(range(case.num_keys)) - {j for keys in case.keys for j in keys})
        k[:, unused], v[:, unused] = float("nan"), float("inf")
        assert torch.equal(xops.memory_efficient_attention(q, k, v, case.make(xops)), out)


def test_dropout() -> None:
    q, k = torch.randn(1, 300, 1, 64), torch.randn(1, 64, 1, 64)
    value = torch.eye(64)[None, :, None]
    whole = xops.memory_efficient_attention(q, k, value)
    dropped = xops.memory_efficient_attention(q, k, value, p=0.25)
    kept = dropped != 0
    torch.testing.assert_close(dropped[kept], (whole / 0.75)[kept])
    assert abs(1 - kept.float().mean() - 0.25) < 0.02  # 19,200 draws: over six standard deviations


def test_tensor_lists() -> None:
    tensors = [torch.randn(2, 3, HEADS, DIM), torch.randn(1, 6, HEADS, DIM)]
    bias, row = xops.fmha.BlockDiagonalMask.from_tensor_list(tensors)
    assert row.shape == (1, 12, HEADS, DIM) and bias.q_seqinfo.seqstart_py == [0, 3, 6, 12]
    for result, x in zip(bias.split(xops.memory_efficient_attention(row, row, row, bias)), tensors, strict=True):
        torch.testing.assert_close(result, xops.memory_efficient_attention(x, x, x))
    bias, q, k, v = xops.BlockDiagonalMask.from_tensor_lists_qkv(tensors, [t[:, 1:] for t in tensors], None)
    assert v is None and [tuple(t.shape[:2]) for t in bias.split_kv(k)] == [(2, 2), (1, 5)]
    assert [tuple(t.shape) for t in bias.split_queries(q)] == [tuple(t.shape) for t in tensors]
    with pytest.raises(ValueError, match="split_queries or split_kv"):
        bias.split(q)


@pytest.mark.parametrize("name", CASES)
def test_masks_move_to_devices(name: str) -> None:
    bias = CASES[name].make(xops).to("meta")
    tensors = [bias.q_seqinfo.seqstart, bias.k_seqinfo.seqstart]
    tensors += [getattr(bias.k_seqinfo, "seqlen", tensors[0]), getattr(bias, "block_tables", tensors[0])]
    assert {t.device.type for t in tensors} == {"meta"} and type(bias) is type(CASES[name].make(xops))


@pytest.mark.parametrize("name", ["LowerTriangularMask", "BlockDiagonalCausalMask", "make_paged"])
def test_compiles_in_one_graph(name: str) -> None:
    case = CASES.get(name)
    bias = case.make(xops) if case else DENSE[name][0](xops)
    tensors = drawn(1, 18, case.num_keys if case else 9)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return xops.memory_efficient_attention(q, k, v, bias)

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*tensors), call(*tensors))


# ------------------------------------------------------------------------------------------- the classes of xformers


@pytest.fixture(scope="module")
def theirs() -> types.ModuleType:
    pytest.importorskip("xformers")
    return importlib.import_module("xformers.ops.fmha.attn_bias")


def test_xformers_own_classes(theirs: types.ModuleType) -> None:
    for name, case in CASES.items():
        bias, visible = case.make(theirs), dense_mask(case)
        if not name.startswith("PagedBlockDiagonal") or "Gappy" not in name:  # those are not told their total length
            theirs_visible = bias.materialize((visible.shape[0], case.room or visible.shape[1])).exp().bool()
            assert torch.equal(theirs_visible[..., : visible.shape[1]], visible), name
        tensors = drawn(1, sum(case.rows), case.num_keys)
        ours = xops.memory_efficient_attention(*tensors, case.make(xops))
        assert torch.equal(xops.memory_efficient_attention(*tensors, bias), ours), name


def test_xformers_own_dense_classes(theirs: types.ModuleType) -> None:
    for name, (make, visible) in DENSE.items():
        for sizes in ((9, 9), (5, 12), (12, 5)):
            bias, tensors = make(theirs), drawn(2, *sizes)
            assert bias is None or torch.equal(bias.materialize(sizes).exp().bool(), block(visible, *sizes)), name
            ours = xops.memory_efficient_attention(*tensors, make(xops))
            assert torch.equal(xops.memory_efficient_attention(*tensors, bias), ours), name


# ---------------------------------------------------------------------------------------------------------- errors


class Renamed(xops.BlockDiagonalMask):
    """A subclass that means what its base means."""


class Other(xops.BlockDiagonalMask):
    """A subclass with a meaning of its own."""

    def materialize(self, shape: tuple[int, ...], *args: Any) -> Tensor:
        return torch.zeros(shape)


def test_a_subclass_without_a_meaning_of_its_own() -> None:
    tensors = drawn(1, 9, 9)
    bias = xops.BlockDiagonalMask.from_seqlens([4, 5])
    renamed = Renamed.from_seqlens([4, 5])
    assert type(renamed) is Renamed
    results = [xops.memory_efficient_attention(*tensors, b) for b in (bias, renamed)]
    assert torch.equal(*results)


X = torch.zeros(1, 9, HEADS, DIM)
PADDED_MASK = xops.BlockDiagonalPaddedKeysMask.from_seqlens([4, 5], 5, [3, 4])
WRONG: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "op": (
        lambda: xops.memory_efficient_attention(X, X, X, op="cutlass"),
        ValueError,
        "op is 'cutlass'; allowed: None",
    ),
    "class": (
        lambda: xops.memory_efficient_attention(X, X, X, object()),
        TypeError,
        r"attn_bias is of type builtins.object; allowed: None, a torch.Tensor, or LowerTriangularMask,",
    ),
    "subclass": (
        lambda: xops.memory_efficient_attention(X, X, X, Other.from_seqlens([4, 5])),
        TypeError,
        r"attn_bias is of type .*Other; allowed",
    ),
    "dims": (lambda: xops.memory_efficient_attention(X, X, X[0]), ValueError, "query, key and value have shapes"),
    "batch": (
        lambda: xops.memory_efficient_attention(
            *[X.expand(2, -1, -1, -1)] * 3, xops.BlockDiagonalMask.from_seqlens([4, 5])
        ),
        ValueError,
        "batch 2, 2 and 2 with BlockDiagonalMask; allowed: 1",
    ),
    "bias_bool": (
        lambda: xops.memory_efficient_attention(X, X, X, torch.ones(1, HEADS, 9, 9).bool()),
        TypeError,
        "attn_bias has dtype bool; allowed: a floating one",
    ),
    "bias_dims": (
        lambda: xops.memory_efficient_attention(X, X, X, torch.ones(9, 9)),
        ValueError,
        "attn_bias has 2 dimensions",
    ),
    "bias_shape": (
        lambda: xops.memory_efficient_attention(X, X, X, torch.ones(1, HEADS, 9, 8)),
        ValueError,
        "bias has shape",
    ),
    "groups": (
        lambda: xops.memory_efficient_attention(*[X.unflatten(2, (2, 2))] + [X.unflatten(2, (4, 1))] * 2),
        ValueError,
        r"key has \(4, 1\) groups and heads; allowed: \(2, 2\)",
    ),
    "total": (
        lambda: xops.memory_efficient_attention(X, X, X, xops.BlockDiagonalMask.from_seqlens([4, 4])),
        ValueError,
        "attn_bias is for 8 queries and 8 keys in all, query and key have 9 and 9; allowed",
    ),
    "total_keys_top_left": (
        lambda: xops.memory_efficient_attention(X, X, X, xops.BlockDiagonalCausalMask.from_seqlens([4, 5], [4, 9])),
        ValueError,
        "attn_bias is for 9 queries and 13 keys in all, query and key have 9 and 9; allowed",
    ),
    "total_queries_top_left": (
        lambda: xops.memory_efficient_attention(X, X, X, xops.BlockDiagonalCausalMask.from_seqlens([3, 3], [4, 5])),
        ValueError,
        "attn_bias is for 6 queries and 9 keys in all, query and key have 9 and 9; allowed",
    ),
    "total_queries_of_a_cache": (
        lambda: xops.memory_efficient_attention(
            X[:, :6], X, X, xops.BlockDiagonalPaddedKeysMask.from_seqlens([1, 3], 5, [3, 4])
        ),
        ValueError,
        "attn_bias is for 4 queries and 10 keys in all, query and key have 6 and 9; allowed",
    ),
    "values": (
        lambda: xops.memory_efficient_attention(X[:, :4], X[:, :5], X, xops.LowerTriangularMask()),
        ValueError,
        "value has seqlen 9; allowed: 5, as the key",
    ),
    "bias_keys_top_left": (
        lambda: xops.memory_efficient_attention(
            X[:, :4], X, X, xops.LowerTriangularMask().add_bias(torch.zeros(1, HEADS, 4, 7))
        ),
        ValueError,
        r"attn_bias has shape \(1, 4, 4, 7\); allowed: 9 keys, or 1",
    ),
    "expanded_heads": (
        lambda: xops.memory_efficient_attention(X, *[X[:, :, :1].expand(-1, -1, 3, -1)] * 2),
        ValueError,
        "key has 3 heads for a query of 4 heads",
    ),
    "query_list": (
        lambda: xops.memory_efficient_attention([1], X, X),  # type: ignore[arg-type]
        TypeError,
        "query is of type list; allowed: a torch.Tensor",
    ),
    "value_none": (
        lambda: xops.memory_efficient_attention(X, X, None),  # type: ignore[arg-type]
        TypeError,
        "value is of type NoneType; allowed: a torch.Tensor",
    ),
    "output_dtype": (
        lambda: xops.memory_efficient_attention(X, X, X, output_dtype="cpu"),  # type: ignore[arg-type]
        TypeError,
        "output_dtype is 'cpu'; allowed: None or a torch.dtype",
    ),
    "negative": (
        lambda: xops.BlockDiagonalMask.from_seqlens([-1, 4]),
        ValueError,
        r"seqlens is \[-1, 4\]; allowed: >= 0 each",
    ),
    "dropout": (
        lambda: xops.memory_efficient_attention(X, X, X, PADDED_MASK, p=0.1),
        ValueError,
        "p is 0.1 with BlockDiagonalPaddedKeysMask",
    ),
    "dropout_lse": (
        lambda: xops.memory_efficient_attention_forward_requires_grad(X, X, X, p=0.1),
        ValueError,
        "p is 0.1; allowed: 0.0",
    ),
    "gradient": (
        lambda: xops.memory_efficient_attention(
            X.clone().requires_grad_(), X.repeat(1, 2, 1, 1)[:, :10], X.repeat(1, 2, 1, 1)[:, :10], PADDED_MASK
        ),
        ValueError,
        "query requires grad",
    ),
    "room": (
        lambda: xops.memory_efficient_attention(X, X, X, PADDED_MASK),
        ValueError,
        "key has 9 rows; allowed: a multiple of 5",
    ),
    "seqlens": (
        lambda: xops.BlockDiagonalPaddedKeysMask.from_seqlens([1], 3, [4]),
        ValueError,
        r"seqlens is \[4\]; allowed: 0 to 3",
    ),
    "lengths": (
        lambda: xops.BlockDiagonalMask.from_seqlens([1], [2, 3]),
        ValueError,
        "kv_seqlen has 2 entries; allowed: 1",
    ),
    "starts": (
        lambda: xops.BlockDiagonalGappyKeysMask.from_seqlens([1], [0], [1]),
        ValueError,
        "seqstarts has 1 entries; allowed: 2",
    ),
    "padding": (
        lambda: CASES["BlockDiagonalGappyKeysMask"].make(xops).make_paged(TABLE, 4, 6, object),
        ValueError,
        r"notional_padding is 6; allowed: a multiple of 4",
    ),
    "begin": (
        lambda: CASES["BlockDiagonalGappyKeysMask"].make(xops).make_paged(TABLE, 4, 12, object),
        ValueError,
        r"sequences begin at \[1, -4, .* in their pages; allowed: 0 to 11",
    ),
    "window_size": (
        lambda: xops.LowerTriangularFromBottomRightLocalAttentionMask(0),
        ValueError,
        "window_size is 0; allowed: >= 1",
    ),
    "local": (lambda: xops.LocalAttentionFromBottomRightMask(1, -1), ValueError, "window_right is -1; allowed: >= 0"),
    "lists": (
        lambda: xops.BlockDiagonalMask.from_tensor_lists_qkv([X], [X], [X[:, :2]]),
        ValueError,
        "as many values as keys",
    ),
    "split": (lambda: xops.BlockDiagonalMask.from_seqlens([4]).split(X), ValueError, r"allowed: \(1, 4, ...\)"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments(name: str) -> None:
    call, error, message = WRONG[name]
    with pytest.raises(error, match=message):
        call()


def test_names_of_xformers() -> None:
    assert xops.fmha.attn_bias.BlockDiagonalMask is xops.BlockDiagonalMask
    assert xops.AttentionMask is xops.AttentionBias
    assert issubclass(xops.PagedBlockDiagonalGappyKeysMask, xops.AttentionBias)
    for name in xops.__all__:
        assert hasattr(xops, name)
