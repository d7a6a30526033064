"""A small attention kernel with switches for faults. Run as a program, it compiles every variant and pickles the facts.

It is a program because the tests of this folder live in Triton's interpreter, where nothing can be compiled.
"""

from __future__ import annotations

import pickle
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from transformer_fast.testing.ahead_of_time import unit
from transformer_fast.testing.machine_code import MachineCode, inspect


class Rows(NamedTuple):
    data: Any
    head: Any
    row: Any
    heads: Any
    rows: Any


@triton.jit
def _load(rows, source, head, first, BLOCK: tl.constexpr, D: tl.constexpr, TMA: tl.constexpr):
    if TMA:
        block = source.load([head, first, 0]).reshape([BLOCK, D])
    else:
        at = (first + tl.arange(0, BLOCK)).to(tl.int64) * rows.row + head * rows.head
        block = tl.load(source + at[:, None] + tl.arange(0, D)[None, :])
    return block


@triton.jit
def _describe(rows, BLOCK: tl.constexpr, D: tl.constexpr, TMA: tl.constexpr):
    if TMA:
        source = tl.make_tensor_descriptor(
            rows.data, shape=[rows.heads, rows.rows, D], strides=[rows.head, rows.row, 1], block_shape=[1, BLOCK, D]
        )
    else:
        source = rows.data
    return source


@triton.jit
def toy_attention_kernel(
    query, key, value, out, full_begin, full_end, end, scale,
    D: tl.constexpr, M: tl.constexpr, N: tl.constexpr, TMA: tl.constexpr, EXTRA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Three loops over keys, of which the one in the middle has no mask."""
    first, head = tl.program_id(0) * M, tl.program_id(1)
    q = _load(query, query.data, head, first, M, D, False)
    keys, values = _describe(key, N, D, TMA), _describe(value, N, D, TMA)
    rows = first + tl.arange(0, M)
    top, total = tl.full([M], -1e30, tl.float32), tl.zeros([M], tl.float32)
    acc = tl.zeros([M, D], tl.float32)
    for part in tl.static_range(3):
        begin = 0 if part == 0 else (full_begin if part == 1 else full_end)
        stop = full_begin if part == 0 else (full_end if part == 1 else end)
        for n in range(begin, stop, N):
            k = _load(key, keys, head, n, N, D, TMA)
            s = tl.dot(q, k.T, input_precision=PRECISION) * scale
            for _ in tl.static_range(EXTRA):
                s = tl.maximum(s * 1.25, tl.abs(s) - 0.5)
            if part != 1:
                s = tl.where(rows[:, None] >= (n + tl.arange(0, N))[None, :], s, float("-inf"))
            fresh = tl.maximum(top, tl.max(s, 1))
            p, shrink = tl.exp2(s - fresh[:, None]), tl.exp2(top - fresh)
            total, top = total * shrink + tl.sum(p, 1), fresh
            v = _load(value, values, head, n, N, D, TMA)
            acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
    acc /= total[:, None]
    at = rows.to(tl.int64) * out.row + head * out.head
    tl.store(out.data + at[:, None] + tl.arange(0, D)[None, :], acc.to(out.data.dtype.element_ty))


def compile_variant(
    capability: int = 90,
    dtype: torch.dtype = torch.bfloat16,
    *,
    head_dim: int = 64,
    rows: int = 128,
    keys: int = 64,
    num_warps: int = 8,
    num_stages: int = 2,
    tma: bool = True,
    extra: int = 0,
) -> MachineCode:
    """The facts about one variant."""
    tensor = torch.empty(8, 4096, head_dim, dtype=dtype, device="meta")
    operand = Rows(tensor, tensor.stride(0), tensor.stride(1), 8, 4096)
    arguments = dict(query=operand, key=operand, value=operand, out=operand)
    arguments |= dict(full_begin=1024, full_end=2048, end=4096, scale=0.5)
    constants = dict(D=head_dim, M=rows, N=keys, TMA=tma, EXTRA=extra, PRECISION="ieee")
    compilation = unit(
        toy_attention_kernel, arguments, constants, capability, num_warps=num_warps, num_stages=num_stages
    )
    return inspect(compilation.compile(), capability)


VARIANTS: dict[str, dict[str, Any]] = {
    "good": {},
    "good on sm_80": dict(capability=80, tma=False),
    "good on sm_100": dict(capability=100),
    "small tile": dict(rows=16, num_warps=4),
    "float32": dict(dtype=torch.float32, rows=32, keys=16, num_warps=4),
    "too few warps": dict(keys=128, num_warps=4),
    "wide tile": dict(head_dim=256, rows=64, keys=128, num_warps=4),
    "pointers": dict(tma=False),
    "longer loop": dict(extra=1),
    "many stages": dict(num_stages=8),
}


if __name__ == "__main__":
    Path(sys.argv[1]).write_bytes(pickle.dumps({name: compile_variant(**v) for name, v in VARIANTS.items()}))
