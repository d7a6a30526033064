"""The second half of split-KV decoding: merges the partial results of a row's splits (Flash-Decoding, 2023)."""

import triton
import triton.language as tl

from .blocks import addresses
from .forward import finish, store_row_numbers
from .scores import base2_factor


@triton.jit
def attention_combine_kernel(
    out, lse, stats, stats_plane, partials, problem, num_heads, rows_a_head, splits,
    HEAD_DIM_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_DV: tl.constexpr, MODIFIED: tl.constexpr,
):  # fmt: skip
    """Rows as lse lays them out, BLOCK_M a program. Grid: (programs,)."""
    at = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    in_tile = at < partials.rows
    heads = at // rows_a_head % num_heads
    columns = tl.arange(0, BLOCK_DV)
    inside = in_tile[:, None] & (columns < HEAD_DIM_V)[None, :]
    factor = base2_factor(problem, MODIFIED)

    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    for split in range(splits):
        here = at + tl.cast(split, tl.int64) * partials.rows
        top_here = tl.load(partials.top + here, mask=in_tile, other=float("-inf"))
        fresh = tl.maximum(top, top_here)
        limit = tl.where(fresh == float("-inf"), 0.0, fresh)
        shrink, weight = tl.exp2((top - limit) * factor), tl.exp2((top_here - limit) * factor)
        total = total * shrink + tl.load(partials.total + here, mask=in_tile, other=0.0) * weight
        values = tl.load(partials.sums + here[:, None] * HEAD_DIM_V + columns[None, :], mask=inside, other=0.0)
        acc = acc * shrink[:, None] + values * weight[:, None]
        top = fresh
    o, top, inverse, lse_value = finish(top, total, acc, problem, heads, in_tile, factor)

    batch, row = at // (rows_a_head * num_heads), at % rows_a_head
    tl.store(addresses(out, batch, heads, row, columns), o.to(out.data.dtype.element_ty), mask=inside)
    store_row_numbers(lse, stats, stats_plane, at.to(tl.int64), lse_value, top, inverse, in_tile)
