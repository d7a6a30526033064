"""Masks of xformers with what each one says, written out, and the problems that they are tried on."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

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
