"""Conversions between number formats, powers and logarithms."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator

import torch

from transformer_fast.testing.instructions.bench import Bench, Comparison, check

#: Of a format: bits of precision, the exponent of its smallest normal number, its greatest number.
FORMATS = {"bf16": (8, -126, (2.0 - 2.0**-7) * 2.0**127), "f16": (11, -14, 65504.0)}


def rounded(x: float, kind: str) -> float:
    """`x` to nearest even in the format, subnormals kept, infinity beyond half a place over the greatest number."""
    if x == 0.0 or math.isinf(x) or math.isnan(x):
        return x
    precision, smallest, greatest = FORMATS[kind]
    quantum = 2.0 ** (max(math.frexp(x)[1] - 1, smallest) - precision + 1)
    value = math.copysign(round(abs(x) / quantum) * quantum, x)  # Python rounds halves to even
    return value if abs(value) <= greatest else math.copysign(math.inf, x)


def bits16(x: float, kind: str) -> int:
    """The bit pattern of a number of the format."""
    if kind == "f16":
        return struct.unpack("<H", struct.pack("<e", x))[0]
    return struct.unpack("<I", struct.pack("<f", x))[0] >> 16


def value16(bits: int, kind: str) -> float:
    """The number that a bit pattern means: IEEE 754 with 5 and 10, or 8 and 7, bits of exponent and fraction."""
    width, fraction_bits, bias = (5, 10, 15) if kind == "f16" else (8, 7, 127)
    sign = -1.0 if bits >> 15 else 1.0
    exponent, fraction = bits >> fraction_bits & (1 << width) - 1, bits & (1 << fraction_bits) - 1
    if exponent == (1 << width) - 1:
        return math.nan if fraction else sign * math.inf
    if exponent == 0:
        return sign * fraction * 2.0 ** (1 - bias - fraction_bits)
    return sign * (fraction + (1 << fraction_bits)) * 2.0 ** (exponent - bias - fraction_bits)


def _interesting(bench: Bench, kind: str) -> torch.Tensor:
    """Floats around everything that matters to a rounding: ties, subnormals, overflow; and random bit patterns."""
    values = [0.0, -0.0, math.inf, -math.inf, math.nan, 1.0, -1.0, 65504.0, 65519.996, 65520.0, 65536.0, 3.4e38]
    patterns = [int(x) for x in bench.integers(0, 0x7FFF, (600,))]
    patterns += [*range(40), *range(0x3F0, 0x410), *range(0x7B, 0x85), *range(0x7BF0, 0x7C00), *range(0x7F70, 0x7F80)]
    for pattern in patterns:
        low, high = value16(pattern, kind), value16(pattern + 1, kind)
        if math.isnan(low) or math.isinf(low):
            continue
        greatest = FORMATS[kind][2]
        tie = greatest + (greatest - value16(pattern - 1, kind)) / 2 if math.isinf(high) else (low + high) / 2
        values += [low, -low, tie, -tie]
        if 0 < tie < 3.4e38:
            below, above = (torch.nextafter(torch.tensor(tie), torch.tensor(to)).item() for to in (0.0, math.inf))
            values += [below, above, -below, -above]
    random = bench.integers(-(2**31), 2**31 - 1, (2000,)).view(torch.float32)
    return torch.cat([torch.tensor(values, dtype=torch.float32), random])


@check("pack_bf16", "pack_f16")
def _pack(bench: Bench, name: str) -> Iterator[Comparison]:
    kind = name.split("_")[1]
    dtype = torch.bfloat16 if kind == "bf16" else torch.float16
    low = _interesting(bench, kind)
    high = low[bench.permutation(len(low))]
    pairs, single = bench.empty(len(low), 2, dtype=dtype), bench.empty(len(low), dtype=dtype)
    bench.run(name, [low, high], [pairs, single], [len(low)])
    expected = []
    for x in (low, high):
        words = [bits16(rounded(value, kind), kind) for value in x.tolist()]
        expected.append(torch.tensor([w - 65536 if w > 32767 else w for w in words], dtype=torch.int16).view(dtype))
    yield Comparison("pack: low, high", pairs, torch.stack(expected, dim=1))
    yield Comparison("from_float", single, expected[0])


@check("unpack_bf16", "unpack_f16")
def _unpack(bench: Bench, name: str) -> Iterator[Comparison]:
    kind = name.split("_")[1]
    patterns = torch.arange(65536, dtype=torch.int32)
    out = bench.empty(65536, dtype=torch.float32)
    bench.run(name, [patterns.to(torch.int16)], [out], [65536])
    expected = torch.tensor([value16(p, kind) for p in range(65536)], dtype=torch.float32)
    yield Comparison("all bit patterns", out, expected)


@check("exp2")
def _exp2(bench: Bench, name: str) -> Iterator[Comparison]:
    """Special values exactly, others to a relative 2^-22; subnormal results are flushed to 0 (ex2.approx.ftz.f32)."""
    special = {0.0: 1.0, math.inf: math.inf, -math.inf: 0.0, 128.0: math.inf, 1e30: math.inf, -1e30: 0.0}
    special |= {1e-40: 1.0, -1e-40: 1.0, -126.5: 0.0, -127.0: 0.0, -150.0: 0.0, 129.5: math.inf}
    x = torch.tensor([-0.0, math.nan, *special], dtype=torch.float32)
    out = bench.empty(len(x), dtype=torch.float32)
    bench.run(name, [x], [out], [len(x)])
    yield Comparison("special values", out, torch.tensor([1.0, math.nan, *special.values()]))

    uniform = torch.rand(4000, generator=bench.generator) * 253.9 - 125.9
    small = torch.randn(1000, generator=bench.generator) * 0.01
    x = torch.cat([uniform, small, torch.arange(-126, 128).float()])
    out = bench.empty(len(x), dtype=torch.float32)
    bench.run(name, [x], [out], [len(x)])
    exact = [2.0**value for value in x.tolist()]
    good = [abs(y - e) <= e * 2.0**-22 for y, e in zip(out.tolist(), exact, strict=True)]
    yield Comparison("relative error at most 2^-22", torch.tensor(good), torch.ones(len(good), dtype=torch.bool))


@check("log2")
def _log2(bench: Bench, name: str) -> Iterator[Comparison]:
    """An absolute 2^-22 between 0.5 and 2, a relative 2^-22 outside (lg2.approx.f32); subnormal arguments too."""
    special = {0.0: -math.inf, math.inf: math.inf, -1.0: math.nan, -math.inf: math.nan}
    x = torch.tensor([-0.0, math.nan, *special], dtype=torch.float32)
    out = bench.empty(len(x), dtype=torch.float32)
    bench.run(name, [x], [out], [len(x)])
    yield Comparison("special values", out, torch.tensor([-math.inf, math.nan, *special.values()]))

    near = torch.rand(3000, generator=bench.generator) * 1.5 + 0.5
    far = bench.integers(1, 0x7F7FFFFF, (3000,)).view(torch.float32)
    x = torch.cat([near, far, torch.tensor([2.0**k for k in range(-149, 128)], dtype=torch.float32)])
    out = bench.empty(len(x), dtype=torch.float32)
    bench.run(name, [x], [out], [len(x)])
    good = []
    for value, y in zip(x.tolist(), out.tolist(), strict=True):
        exact = math.log2(value)
        good.append(abs(y - exact) <= 2.0**-22 * (1.0 if 0.5 < value < 2.0 else abs(exact)))
    yield Comparison("errors", torch.tensor(good), torch.ones(len(good), dtype=torch.bool))


@check("reciprocal")
def _reciprocal(bench: Bench, name: str) -> Iterator[Comparison]:
    """A relative 2^-23 (of 1 to 2, and so of all powers of 2 times that); subnormal numbers are 0 (rcp.approx.ftz)."""
    tiny, huge = 2.0**-127, 2.0**127
    special = {math.inf: 0.0, -math.inf: -0.0, tiny: math.inf, -tiny: -math.inf, huge: 0.0, -huge: -0.0, 0.0: math.inf}
    x = torch.tensor([-0.0, math.nan, *special], dtype=torch.float32)
    out = bench.empty(len(x), dtype=torch.float32)
    bench.run(name, [x], [out], [len(x)])
    yield Comparison("special values", out, torch.tensor([-math.inf, math.nan, *special.values()]))

    near = torch.rand(3000, generator=bench.generator) + 1.0
    far = bench.integers(1 << 23, 0x7E7FFFFF, (3000,)).view(torch.float32)  # 2^-126 to 2^126: normal, as its reciprocal
    x = torch.cat([near, far, -near, torch.tensor([2.0**k for k in range(-126, 127)], dtype=torch.float32)])
    out = bench.empty(len(x), dtype=torch.float32)
    bench.run(name, [x], [out], [len(x)])
    good = [abs(y * value - 1.0) <= 2.0**-23 for value, y in zip(x.tolist(), out.tolist(), strict=True)]
    yield Comparison("relative error at most 2^-23", torch.tensor(good), torch.ones(len(good), dtype=torch.bool))


@check("multiply_high")
def _multiply_high(bench: Bench, name: str) -> Iterator[Comparison]:
    edges = torch.tensor([0, 1, -1, 2**31 - 1, -(2**31)], dtype=torch.int32)
    a = torch.cat([edges.repeat(5), bench.integers(-(2**31), 2**31 - 1, (500,))])
    b = torch.cat([edges.repeat_interleave(5), bench.integers(-(2**31), 2**31 - 1, (500,))])
    out = bench.empty(len(a))
    bench.run(name, [a, b], [out], [len(a)])
    products = [(x % 2**32) * (y % 2**32) >> 32 for x, y in zip(a.tolist(), b.tolist(), strict=True)]
    expected = [x - 2**32 if x >= 2**31 else x for x in products]
    yield Comparison("upper half of the product", out, torch.tensor(expected, dtype=torch.int32))
