"""Where elements lie, from the PTX ISA 9.0: registers of a warp, swizzled shared memory, boxes of a tensor."""

from __future__ import annotations

from functools import cache, lru_cache
from itertools import product

import torch

Places = tuple[tuple[int, int], ...]


def swizzle_128(offset: int) -> int:
    """128-byte swizzle: the 16-byte chunk within 128 bytes (address bits 4 to 6) is xored with bits 7 to 9.

    "Swizzling modes" in the chapter on tensors; shared memory is aligned to the pattern's 1024 bytes here.
    """
    return offset ^ ((offset >> 7) & 7) << 4


# --- Registers ------------------------------------------------------------------------------------


def mma_a(lane: int, i: int) -> tuple[int, int]:
    """(row, k) of element i of A of mma.m16n8k16 with 16-bit types ("Matrix fragments for mma.m16n8k16")."""
    group, thread = lane >> 2, lane % 4
    row = group if 0 <= i < 2 or 4 <= i < 6 else group + 8
    column = thread * 2 + (i & 1) + (8 if i >= 4 else 0)
    return row, column


def mma_b(lane: int, i: int) -> tuple[int, int]:
    """(k, column) of element i of B of mma.m16n8k16."""
    group, thread = lane >> 2, lane % 4
    return thread * 2 + (i & 1) + (8 if i >= 2 else 0), group


def mma_d(lane: int, i: int) -> tuple[int, int]:
    """(row, column) of element i of the accumulators of mma.m16n8k16."""
    group, thread = lane >> 2, lane % 4
    return group if i < 2 else group + 8, thread * 2 + (i & 1)


def wgmma_d(thread: int, i: int) -> tuple[int, int]:
    """(row, column) of register i of the accumulators of wgmma.m64nNk16 ("Register Fragments", D)."""
    warp, lane = thread // 32, thread % 32
    row = warp * 16 + lane // 4 + 8 * (i // 2 % 2)
    return row, 8 * (i // 4) + lane % 4 * 2 + i % 2


def wgmma_a(thread: int, i: int) -> tuple[int, int]:
    """(row, k) of element i of A of wgmma.m64nNk16 in registers: as of mma, 16 rows a warp."""
    row, k = mma_a(thread % 32, i)
    return thread // 32 * 16 + row, k


def gather(matrix: torch.Tensor, places: Places) -> torch.Tensor:
    """The elements of a matrix at these places, in order."""
    index = torch.tensor(places)
    return matrix[index[:, 0], index[:, 1]]


@cache
def places_of(kind: str, threads: int, count: int) -> Places:
    """All threads' elements of one of the layouts above, thread by thread."""
    function = {"mma_a": mma_a, "mma_b": mma_b, "mma_d": mma_d, "wgmma_a": wgmma_a, "wgmma_d": wgmma_d}[kind]
    return tuple(function(thread, i) for thread in range(threads) for i in range(count))


# --- Operands of wgmma in shared memory -----------------------------------------------------------


@lru_cache(maxsize=32)
def rows_along_k(rows: int, depth: int, stride: int, jump: int) -> torch.Tensor:
    """Byte offsets (rows, depth) of a K-major operand with 128-byte swizzle.

    64 elements of K are a row of 128 bytes; 8 such rows (of M or N) repeat the pattern, and the next 8 lie `stride`
    bytes further ("Strides": the stride dimension byte offset). A descriptor covers 16 of K; the next 64 of K are a
    tile of their own, `jump` bytes further, which the kernel's descriptors step to.
    """
    offsets = [
        swizzle_128(k // 64 * jump + row // 8 * stride + row % 8 * 128 + k % 64 * 2)
        for row in range(rows)
        for k in range(depth)
    ]
    return torch.tensor(offsets).reshape(rows, depth)


@lru_cache(maxsize=32)
def rows_along_mn(rows: int, depth: int, leading: int, stride: int) -> torch.Tensor:
    """Byte offsets (rows, depth) of an MN-major operand with 128-byte swizzle.

    64 elements of M or N are a row of 128 bytes; the next 64 of M or N lie `leading` bytes further; 8 such rows (of K)
    repeat the pattern, and the next 8 of K lie `stride` bytes further ("Leading / stride dimension byte offset").
    """
    offsets = [
        swizzle_128(row // 64 * leading + k // 8 * stride + k % 8 * 128 + row % 64 * 2)
        for row in range(rows)
        for k in range(depth)
    ]
    return torch.tensor(offsets).reshape(rows, depth)


# --- Boxes of a tensor ----------------------------------------------------------------------------


def box_places(
    element_size: int,
    size: tuple[int, ...],
    stride: tuple[int, ...],
    box: tuple[int, ...],
    start: tuple[int, ...],
    swizzled: bool,
) -> list[tuple[int, int | None]]:
    """For each element of a box: its byte offset in shared memory, and in the tensor (None where it is outside).

    Dimension 0 is the fastest in the box; an element outside of any dimension's size is outside ("Tiled mode").
    """
    places = []
    ranges = [range(n) for n in reversed(box)]
    for number, slow_first in enumerate(product(*ranges)):
        coordinates = [c + i for c, i in zip(start, reversed(slow_first), strict=True)]
        inside = all(0 <= c < n for c, n in zip(coordinates, size, strict=True))
        offset = coordinates[0] * element_size + sum(c * s for c, s in zip(coordinates[1:], stride, strict=True))
        target = number * element_size
        places.append((swizzle_128(target) if swizzled else target, offset if inside else None))
    return places
