"""Copies between global and shared memory: cp.async, TMA, bulk reductions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from transformer_fast.testing.instructions.bench import Bench, Comparison, Geometry, check
from transformer_fast.testing.instructions.layouts import box_places

GUARD_BYTES = 1024
PAINT = 0xA5  # each byte of shared memory before a tile arrives


@check("cp_async", "cp_async_empty_groups")
def _cp_async(bench: Bench, name: str) -> Iterator[Comparison]:
    groups, threads, source_bytes = 4, 128, 16384
    for turn in range(2):
        source = bench.integers(0, 255, (source_bytes,), torch.uint8)
        chunk = bench.permutation(groups * threads)  # each chunk of shared memory is some copy's target
        copies = torch.empty(groups * threads, 3, dtype=torch.int32)
        own = torch.zeros(groups * threads, 16, dtype=torch.uint8)
        for i in range(groups * threads):
            count = int(bench.integers(0, 16, ())) if turn == 0 else i % 17
            begin = 16 * int(bench.integers(0, source_bytes // 16 - 1, ()))
            copies[i] = torch.tensor([16 * chunk[i], begin, count])
            own[i, :count] = source[begin : begin + count]  # "the rest of cp-size is filled with zeros"
        out = bench.empty(groups * threads, 16, dtype=torch.uint8)
        everything = bench.empty(groups * threads, 16, dtype=torch.uint8)
        bench.run(name, [source, copies], [out, everything])
        yield Comparison(f"turn {turn}: each thread's own, group by group", out, own)
        image = torch.empty_like(own)
        for i in range(groups * threads):
            image[chunk[i]] = own[i]
        yield Comparison(f"turn {turn}: shared memory, by others", everything, image)


# --- Tensors for TMA ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """A tensor for TMA and a box of it: sizes from the fastest dimension on, strides in 16 bytes."""

    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]
    box: tuple[int, ...]
    swizzled: bool


# As attention lays out its operands, with gaps between rows and heads; rows of (batch, seqlen, heads, head_dim), whose
# head stride is less than their row stride; row sizes that end within 16 bytes; boxes of many shapes.
_FOUR = (
    Shape(torch.bfloat16, (64, 50, 3, 2), (8, 400, 1200), (64, 32, 1, 1), True),
    Shape(torch.float16, (64, 50, 3, 2), (25, 8, 1251), (64, 16, 2, 1), True),
    Shape(torch.bfloat16, (100, 37, 4, 2), (13, 485, 2000), (64, 24, 1, 2), True),
    Shape(torch.float32, (33, 20, 3, 3), (9, 181, 560), (32, 8, 3, 2), True),
    Shape(torch.float16, (70, 21, 2, 3), (9, 200, 401), (16, 8, 2, 3), False),
    Shape(torch.bfloat16, (200, 9, 2, 2), (25, 225, 450), (128, 9, 1, 2), False),
    Shape(torch.float32, (40, 11, 2, 2), (11, 130, 270), (8, 4, 2, 2), False),
)
_FIVE = (
    Shape(torch.bfloat16, (64, 4, 20, 3, 2), (8, 33, 661, 2000), (64, 4, 8, 1, 1), True),
    Shape(torch.float16, (72, 3, 17, 2, 2), (9, 28, 480, 970), (64, 3, 8, 2, 1), True),
    Shape(torch.bfloat16, (24, 3, 9, 2, 2), (3, 10, 91, 190), (16, 2, 4, 2, 2), False),
)


def _tensor(bench: Bench, shape: Shape) -> Geometry:
    """A tensor of random numbers over all of its memory, gaps too."""
    item = torch.empty((), dtype=shape.dtype).element_size()
    strides = tuple(16 * s for s in shape.stride)
    last = sum((n - 1) * s for n, s in zip(shape.size[1:], strides, strict=True)) + shape.size[0] * item
    count = (last + 64) // item
    data = bench.integers(-100, 100, (count,), torch.float32).to(shape.dtype).to(bench.device)
    return Geometry(data, shape.size, strides, shape.box, shape.swizzled)


def _starts(bench: Bench, shape: Shape) -> Iterator[tuple[int, ...]]:
    """Coordinates of boxes: inside, across the begin and the end of each dimension, wholly outside."""
    rank = len(shape.size)
    yield (0,) * rank
    yield tuple(max(0, n - b) for n, b in zip(shape.size, shape.box, strict=True))
    for d in range(rank):
        inside = [int(bench.integers(0, max(0, n - b), ())) for n, b in zip(shape.size, shape.box, strict=True)]
        for start in (-1 - shape.box[d] // 3, shape.size[d] - 1 - shape.box[d] // 4, shape.size[d] + 3):
            inside[d] = start
            yield tuple(inside)
    yield tuple(-b for b in shape.box)
    yield tuple(n + 100_000 for n in shape.size)


def _bytes(x: torch.Tensor) -> torch.Tensor:
    return x.cpu().contiguous().view(torch.uint8)


def expected_tile(geometry: Geometry, start: tuple[int, ...]) -> torch.Tensor:
    """The bytes of shared memory that a load of this box gives."""
    item = geometry.data.element_size()
    source, tile = _bytes(geometry.data), torch.zeros(geometry.box_bytes(), dtype=torch.uint8)
    places = box_places(item, geometry.size, geometry.stride, geometry.box, start, geometry.swizzled)
    for target, offset in places:
        if offset is not None:
            tile[target : target + item] = source[offset : offset + item]
    return tile


def store_tile(geometry: Geometry, memory: torch.Tensor, tile: torch.Tensor, start: tuple[int, ...]) -> None:
    """Write the bytes of a tile where a store of this box puts them; `memory`: the bytes of the tensor."""
    item = geometry.data.element_size()
    places = box_places(item, geometry.size, geometry.stride, geometry.box, start, geometry.swizzled)
    for source, offset in places:
        if offset is not None:
            memory[offset : offset + item] = tile[source : source + item]


def _five(start: tuple[int, ...]) -> list[int]:
    return [*start, *[0] * (5 - len(start))]


@check("tma_load_4d", "tma_load_5d")
def _tma_load(bench: Bench, name: str) -> Iterator[Comparison]:
    for shape in _FOUR if name.endswith("4d") else _FIVE:
        geometry = _tensor(bench, shape)
        size = geometry.box_bytes()
        for start in _starts(bench, shape):
            out = bench.empty(size + GUARD_BYTES, dtype=torch.uint8)
            bench.run(name, [], [out], [*_five(start), size], geometry)
            guard = torch.full((GUARD_BYTES,), PAINT, dtype=torch.uint8)
            yield Comparison(f"{shape} at {start}", out, torch.cat([expected_tile(geometry, start), guard]))


@check("tma_store_4d", "tma_store_5d")
def _tma_store(bench: Bench, name: str) -> Iterator[Comparison]:
    for shape in _FOUR if name.endswith("4d") else _FIVE:
        geometry = _tensor(bench, shape)
        size = geometry.box_bytes()
        for start in _starts(bench, shape):
            tile = bench.integers(0, 255, (size,), torch.uint8)
            expected = _bytes(geometry.data).clone()
            store_tile(geometry, expected, tile, start)
            bench.run(name, [tile], [], [*_five(start), size], geometry)
            yield Comparison(f"{shape} at {start}", _bytes(geometry.data), expected)


@check("tma_pipeline")
def _tma_pipeline(bench: Bench, name: str) -> Iterator[Comparison]:
    rounds = 5
    for producers, late in ((1, 0), (1, 1), (2, 0), (4, 1)):
        for shape in (_FOUR[0], _FOUR[4]):
            geometry = _tensor(bench, shape)
            size = geometry.box_bytes()
            starts = [[int(bench.integers(-9, n, ())) for n in shape.size] for _ in range(rounds * producers)]
            out = bench.empty(rounds * producers, size, dtype=torch.uint8)
            numbers = [rounds, producers, size, late]
            bench.run(name, [torch.tensor(starts, dtype=torch.int32)], [out], numbers, geometry)
            expected = torch.stack([expected_tile(geometry, tuple(start)) for start in starts])
            variant = f"{producers} tiles a stage, announced {'after' if late else 'before'} their load"
            yield Comparison(variant, out, expected)


@check("tma_store_buffers")
def _tma_store_buffers(bench: Bench, name: str) -> Iterator[Comparison]:
    shape, rounds = _FOUR[0], 5
    geometry = _tensor(bench, shape)
    size = geometry.box_bytes()
    tiles = bench.integers(0, 255, (rounds, size), torch.uint8)
    heads = [(x % 3, x // 3) for x in bench.permutation(6)]  # no two boxes on the same elements: stores have no order
    starts = [(0, int(bench.integers(-20, 40, ())), *heads[i]) for i in range(rounds)]
    expected = _bytes(geometry.data).clone()
    for tile, start in zip(tiles, starts, strict=True):
        store_tile(geometry, expected, tile, start)
    bench.run(name, [tiles, torch.tensor(starts, dtype=torch.int32)], [], [rounds, size], geometry)
    yield Comparison("two buffers in turn", _bytes(geometry.data), expected)


@check("tma_through")
def _tma_through(bench: Bench, name: str) -> Iterator[Comparison]:
    for shape in (_FOUR[0], _FOUR[5]):
        geometry = _tensor(bench, shape)
        size = geometry.box_bytes()
        start, target = (0, 3, 0, 0), (0, 5, 1, 0)
        expected = _bytes(geometry.data).clone()
        store_tile(geometry, expected, ~expected_tile(geometry, start), target)
        bench.run(name, [], [], [*_five(start), size, *target], geometry)
        yield Comparison(f"{shape}", _bytes(geometry.data), expected)


@check("bulk_reduce")
def _bulk_reduce(bench: Bench, name: str) -> Iterator[Comparison]:
    for size, pieces in ((16, 1), (16384, 1), (4096, 4), (12288, 3)):
        parts = bench.integers(-1000, 1000, (4, size // 4), torch.float32)
        begin = bench.integers(-1000, 1000, (size // 4 + 64,), torch.float32)
        out = begin.to(bench.device, copy=True)
        bench.run(name, [parts], [out], [size, pieces])
        expected = begin.clone()
        for i in range(size // 4):
            expected[i] += sum(parts[:, i].tolist())
        yield Comparison(f"{size} bytes in {pieces}", out, expected)
