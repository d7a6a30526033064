"""Fragments and products of matrices: ldmatrix, mma, wgmma.

Elements are small integers (or such times a power of 2), whose products and sums are exact in any order.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from transformer_fast.testing.instructions.bench import Bench, Comparison, check
from transformer_fast.testing.instructions.layouts import gather, places_of, rows_along_k, rows_along_mn

DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16}


@check("ldmatrix", "ldmatrix_transposed")
def _ldmatrix(bench: Bench, name: str) -> Iterator[Comparison]:
    image = bench.integers(-(2**15), 2**15 - 1, (2048,), torch.int16)  # of shared memory: 4096 bytes
    for turn in range(3):
        rows = bench.integers(0, 255, (64,)) * 16  # lane 8i + r of a warp: where row r of its matrix i lies
        out = bench.empty(64, 4, 2, dtype=torch.int16)
        bench.run(name, [image, rows], [out])
        expected = torch.empty(64, 4, 2, dtype=torch.int16)
        for thread in range(64):
            lane, first_of_warp = thread % 32, thread // 32 * 32
            for i in range(4):
                for half in range(2):
                    row, column = lane // 4, 2 * (lane % 4) + half
                    if name.endswith("transposed"):
                        row, column = column, row
                    expected[thread, i, half] = image[rows[first_of_warp + 8 * i + row] // 2 + column]
        yield Comparison(f"turn {turn}", out, expected)


def _mma(bench: Bench, name: str, a: torch.Tensor, b: torch.Tensor, d: torch.Tensor) -> torch.Tensor:
    """Two warps' d of matrices (warp, rows, columns)."""
    lanes = [
        torch.stack([gather(x[w], places_of(kind, 32, n)).reshape(32, n) for w in range(2)])
        for x, kind, n in ((a, "mma_a", 8), (b, "mma_b", 4), (d, "mma_d", 4))
    ]
    out = bench.empty(2, 32, 4, dtype=torch.float32)
    bench.run(name, lanes, [out])
    return out


@check("mma_bf16", "mma_f16")
def _mma_check(bench: Bench, name: str) -> Iterator[Comparison]:
    dtype = DTYPES[name.split("_")[1]]
    tiny, huge = (2.0**-133, 2.0**100) if dtype == torch.bfloat16 else (2.0**-24, 2.0**10)
    for variant, scale_a, scale_b in (("integers", 1.0, 1.0), ("subnormal a", tiny, huge), ("subnormal b", huge, tiny)):
        a = bench.integers(-9, 9, (2, 16, 16), torch.float64) * scale_a
        b = bench.integers(-9, 9, (2, 16, 8), torch.float64) * scale_b
        d = bench.integers(-(2**16), 2**16, (2, 16, 8), torch.float64) * scale_a * scale_b
        out = _mma(bench, name, a.to(dtype), b.to(dtype), d.float())
        sums = (d + a @ b).float()
        expected = torch.stack([gather(sums[w], places_of("mma_d", 32, 4)).reshape(32, 4) for w in range(2)])
        yield Comparison(variant, out, expected)
    a = torch.zeros(2, 16, 16, dtype=dtype)
    a[0, 3, 5], a[1, 9, 15] = float("inf"), float("nan")
    b = torch.ones(2, 16, 8, dtype=dtype)
    b[0, 5, 2] = 0.0
    sums = torch.zeros(2, 16, 8)
    sums[0, 3], sums[0, 3, 2], sums[1, 9] = float("inf"), float("nan"), float("nan")
    out = _mma(bench, name, a, b, torch.zeros(2, 16, 8))
    expected = torch.stack([gather(sums[w], places_of("mma_d", 32, 4)).reshape(32, 4) for w in range(2)])
    yield Comparison("Inf, NaN, Inf * 0", out, expected)


# --- wgmma ----------------------------------------------------------------------------------------


@dataclass
class Placed:
    """Where a matrix (rows of M or N, depth of K) lies in shared memory.

    `offsets` of its elements, and the five numbers of the kernel (csrc/cuda/checks_wgmma.cu).
    """

    offsets: torch.Tensor
    offset: int
    leading: int
    stride: int
    step: int
    jump: int

    def numbers(self) -> list[int]:
        """As the kernel takes them."""
        return [self.offset, self.leading, self.stride, self.step, self.jump]

    def end(self) -> int:
        """The first multiple of 1024 behind it."""
        return (self.offset + int(self.offsets.max()) + 1024) // 1024 * 1024


def _place(rows: int, depth: int, transposed: bool, offset: int, gap: int) -> Placed:
    """Dense with gap 0; otherwise that many groups of 8 rows (1024 bytes) lie between any two of its parts."""
    stride = 1024 * (1 + gap)
    if transposed:  # rows along K: all of them for 64 elements of M or N, then for the next 64
        leading = depth // 8 * stride + 1024 * gap
        return Placed(rows_along_mn(rows, depth, leading, stride), offset, leading, stride, 2 * stride, 8 * stride)
    jump = (rows + 7) // 8 * stride + 1024 * gap
    return Placed(rows_along_k(rows, depth, stride, jump), offset, 16, stride, 32, jump)


def _image(dtype: torch.dtype, size: int, operands: list[tuple[Placed, torch.Tensor]]) -> torch.Tensor:
    """Shared memory with these operands, and NaN wherever none of them is."""
    image = torch.full((size // 2,), float("nan"), dtype=dtype)
    for placed, matrix in operands:
        image[(placed.offset + placed.offsets) // 2] = matrix.to(dtype)
    return image


def _wgmma(bench: Bench, name: str) -> Iterator[Comparison]:
    kind, width, layouts = name.split("_")[1:]
    dtype, n = DTYPES[kind], int(width)
    for depth, gap, accumulate in ((64, 0, False), (192, 1 if n <= 128 else 0, True)):
        a = bench.integers(-4, 4, (64, depth), torch.float64)
        b = bench.integers(-4, 4, (n, depth), torch.float64)
        d = bench.integers(-1000, 1000, (64, n), torch.float64)
        left = _place(64, depth, layouts[0] == "t", 0, gap)
        right = _place(n, depth, layouts[1] == "t", 0 if layouts[0] == "r" else left.end(), gap)
        operands = [(right, b)] if layouts[0] == "r" else [(left, a), (right, b)]
        image = _image(dtype, right.end(), operands)
        steps = [gather(a[:, k : k + 16], places_of("wgmma_a", 128, 8)) for k in range(0, depth, 16)]
        fragments = torch.stack(steps).to(dtype)
        accumulators = places_of("wgmma_d", 128, n // 2)
        start = gather(d, accumulators).float()
        out = bench.empty(128 * n // 2, dtype=torch.float32)
        numbers = [image.numel() * 2, depth, int(accumulate), *left.numbers(), *right.numbers()]
        bench.run(name, [image, start, fragments], [out], numbers)
        sums = a @ b.T + (d if accumulate else 0.0)
        variant = f"{depth} of K, {'apart' if gap else 'dense'}, {'adding' if accumulate else 'new'}"
        yield Comparison(variant, out, gather(sums, accumulators).float())


def _wgmma_in_flight(bench: Bench, name: str) -> Iterator[Comparison]:
    dtype = DTYPES[name.split("_")[-1]]
    a = bench.integers(-4, 4, (128, 64), torch.float64)
    b = bench.integers(-4, 4, (128, 64), torch.float64)
    left, right = _place(128, 64, False, 0, 0), _place(128, 64, False, 16384, 0)
    image = _image(dtype, right.end(), [(left, a), (right, b)])
    out = bench.empty(2, 2, 128 * 32, dtype=torch.float32)  # columns, warpgroup, thread and register
    numbers = [image.numel() * 2, 64, 0, *left.numbers(), *right.numbers(), 8192, 8192]
    bench.run(name, [image], [out], numbers)
    sums = (a @ b.T).float()
    parts = [
        [gather(sums[64 * group :, 64 * half :], places_of("wgmma_d", 128, 32)) for group in range(2)]
        for half in range(2)
    ]
    yield Comparison("two warpgroups, two groups in flight", out, torch.stack([torch.stack(p) for p in parts]))


_LAYOUTS = ("rk", "rt", "kk", "kt", "tk", "tt")  # of A and B; r: in registers, k: rows along K, t: rows along M or N
_WIDTHS = (32, 64, 80, 96, 128, 160, 176, 192, 256)
check(*(f"wgmma_{kind}_{n}_{layout}" for kind in DTYPES for n in _WIDTHS for layout in _LAYOUTS))(_wgmma)
check("wgmma_in_flight_bf16", "wgmma_in_flight_f16")(_wgmma_in_flight)
