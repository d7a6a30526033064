"""The Triton text of the mask says what transformer_fast/masks.py says, for every small mask there is."""

from __future__ import annotations

import itertools

import pytest
import torch

from transformer_fast import masks

SIZES = range(4)


def _all_small() -> list[tuple[int, ...]]:
    """(start, end, offset, left, right, first_row, last_row)."""
    sides = (0, 1, 3, 2**30)
    return [
        (start, end, offset, left, right, first, first + more)
        for start, length in itertools.product(SIZES, (0, 1, 2, 5))
        for end in (start + length,)
        for offset, left, right in itertools.product((-3, -1, 0, 2), sides, sides)
        for first, more in itertools.product(SIZES, (0, 1, 4))
    ]


# The interpreter finds the names of a kernel among its module's, and a kernel is the interpreter's if it was made while
# the variable was set.
with pytest.MonkeyPatch.context() as patch:
    patch.setenv("TRITON_INTERPRET", "1")

    import triton
    import triton.language as tl
    from transformer_fast.kernels.masks import row_interval, tile_range

    @triton.jit
    def ask(numbers, ranges, seen, COUNT: tl.constexpr, KEYS: tl.constexpr):
        at = tl.arange(0, COUNT)
        start, end, offset = tl.load(numbers + at), tl.load(numbers + COUNT + at), tl.load(numbers + 2 * COUNT + at)
        left, right = tl.load(numbers + 3 * COUNT + at), tl.load(numbers + 4 * COUNT + at)
        first, last = tl.load(numbers + 5 * COUNT + at), tl.load(numbers + 6 * COUNT + at)
        begin, full_begin, full_end, stop = tile_range(start, end, offset, left, right, first, last)
        tl.store(ranges + at, begin)
        tl.store(ranges + COUNT + at, full_begin)
        tl.store(ranges + 2 * COUNT + at, full_end)
        tl.store(ranges + 3 * COUNT + at, stop)
        keys = tl.arange(0, KEYS)[None, :]
        lo, hi = row_interval(start, end, offset, left, right, first)
        bits = (keys >= lo[:, None]) & (keys < hi[:, None])
        tl.store(seen + at[:, None] * KEYS + keys, bits.to(tl.int8))


def test_the_two_texts_are_equal() -> None:
    cases = _all_small()
    count, keys = 1 << (len(cases) - 1).bit_length(), 16
    numbers = torch.tensor(cases + cases[:1] * (count - len(cases)), dtype=torch.int32).T.contiguous()
    ranges, seen = torch.empty(4, count, dtype=torch.int32), torch.empty(count, keys, dtype=torch.int8)
    ask[(1,)](numbers, ranges, seen, COUNT=count, KEYS=keys)
    for i, (*mask, first, last) in enumerate(cases):
        wanted = masks.SequenceMask(*mask)
        assert tuple(ranges[:, i].tolist()) == masks.tile_range(wanted, first, last), cases[i]
        lo, hi = masks.row_interval(wanted, first)
        assert [j for j in range(keys) if seen[i, j]] == list(range(lo, hi)), cases[i]
