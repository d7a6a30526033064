"""Forward pass: online softmax over blocks of keys (Milakov & Gimelshein 2018; Dao et al. 2022), one tile a job.

The query heads of a group are packed into the rows of a tile: packed row r is position r // GROUP of head
kv_head * GROUP + r % GROUP. The blocks of keys fall into three ranges, partial, full and partial, and only the
partial ones pay for mask arithmetic. For decoding, the blocks of a tile are divided among several programs, whose
partial results ``attention_combine_kernel`` merges (Flash-Decoding, Dao et al. 2023).
"""

import triton
import triton.language as tl

from .blocks import load_block, open_rows, packed_addresses, packed_rows, row_numbers_at, without_hidden
from .configs import MIN_SPLIT_BLOCKS
from .masks import tile_range
from .schedule import job, next_job, sequence, split_range
from .scores import LOG2E, base2_factor, dropout_factor, exponentials, scores_of

_MIN_SPLIT_BLOCKS = tl.constexpr(MIN_SPLIT_BLOCKS)


@triton.jit
def finish(top, total, acc, problem, heads, in_tile, factor):
    """The sink and the division: (out, top, 1 / total, natural lse); rows that see nothing give 0, 0, 0, -inf."""
    empty = (top == float("-inf")) & (total == 0.0)  # scores that are all NaN leave no maximum, but a sum
    if problem.sinks is not None:
        sink = tl.load(problem.sinks.data + heads * problem.sinks.stride, mask=in_tile, other=float("-inf"))
        fresh = tl.maximum(top, sink.to(tl.float32))
        limit = tl.where(fresh == float("-inf"), 0.0, fresh)
        shrink = tl.exp2((top - limit) * factor)
        total = total * shrink + tl.exp2((sink.to(tl.float32) - limit) * factor)
        acc *= shrink[:, None]
        top = fresh
    inverse = tl.where(empty, 0.0, 1.0 / tl.where(empty, 1.0, total))
    lse = tl.where(empty, float("-inf"), top * (factor / LOG2E) + tl.log(tl.where(empty, 1.0, total)))
    return tl.where(empty[:, None], 0.0, acc * inverse[:, None]), tl.where(empty, 0.0, top), inverse, lse


@triton.jit
def store_row_numbers(lse, stats, stats_plane, at, lse_value, top, inverse, mask):
    """The log-sum-exp, and what backward wants to know of each row."""
    if lse is not None:
        tl.store(lse + at, lse_value, mask=mask)
    if stats is not None:
        tl.store(stats + at, top, mask=mask)
        tl.store(stats + stats_plane + at, inverse, mask=mask)


@triton.jit
def _forward_tile(
    query, key, value, out, lse, stats, stats_plane, partials, problem, tile, kv_head, batch, split, splits,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    PAGE_SIZE: tl.constexpr, TMA: tl.constexpr, MODIFIED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    first_query, first_key, len_q, len_k = sequence(problem, batch)
    if tile * BLOCK_M < len_q * GROUP:
        offset = len_k - len_q
        packed, positions, heads = packed_rows(tile, kv_head, GROUP, BLOCK_M)
        in_tile = packed < len_q * GROUP
        columns = tl.arange(0, BLOCK_D)
        q = tl.load(
            packed_addresses(query, problem, batch, first_query, positions, heads, columns),
            mask=in_tile[:, None] & (columns < HEAD_DIM)[None, :], other=0.0,
        )  # fmt: skip
        EXACT: tl.constexpr = (q.dtype == tl.float32) or MODIFIED
        #: Keys that the tile does not see lie among those that it sees, or in the same blocks.
        HAS_HOLES: tl.constexpr = (problem.key_mask is not None) or (problem.bias is not None)

        factor = base2_factor(problem, MODIFIED)
        top = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)

        last_row = tl.minimum(tile * BLOCK_M + BLOCK_M, len_q * GROUP) - 1
        begin, full_begin, full_end, stop = tile_range(
            0, len_k, offset, problem.left, problem.right, tile * BLOCK_M // GROUP, last_row // GROUP
        )
        key_source = open_rows(key, first_key, stop, PAGE_SIZE, HEAD_DIM, BLOCK_N, BLOCK_D, TMA)
        value_source = open_rows(value, first_key, stop, PAGE_SIZE, HEAD_DIM_V, BLOCK_N, BLOCK_DV, TMA)
        # No block crosses the end of a page, and dropout draws for four keys at once.
        ALIGNED: tl.constexpr = PAGE_SIZE > 0 or (problem.dropout is not None)
        first, full, partial, end = split_range(begin, full_begin, full_end, stop, BLOCK_N, ALIGNED)
        if partials is not None:
            # Clipped to the window and the length before it is split.
            share = tl.cdiv(tl.cdiv(stop - first, BLOCK_N), splits)
            share = tl.maximum(share, _MIN_SPLIT_BLOCKS + 1) * BLOCK_N
            lower = first + split * share
            upper = lower + share
            first, full = tl.maximum(first, lower), tl.maximum(tl.minimum(full, upper), lower)
            partial, end = tl.maximum(tl.minimum(partial, upper), lower), tl.minimum(stop, upper)
        for part in tl.static_range(3):
            part_begin = first if part == 0 else (full if part == 1 else partial)
            part_end = full if part == 0 else (partial if part == 1 else end)
            for n in tl.range(part_begin, part_end, BLOCK_N, disable_licm=True):
                keys = n + tl.arange(0, BLOCK_N)
                k = load_block(
                    key_source, problem, batch, kv_head, first_key, n, stop, PAGE_SIZE, HEAD_DIM, BLOCK_N, BLOCK_D, TMA
                )
                s, _capped = scores_of(
                    tl.dot(q, k.T, input_precision=PRECISION), problem, batch, heads[:, None], positions[:, None],
                    keys[None, :], in_tile[:, None], len_k, offset, MODIFIED, part != 1,
                )  # fmt: skip
                fresh = tl.maximum(top, tl.max(s, 1))
                limit = tl.where(fresh == float("-inf"), 0.0, fresh)
                p = exponentials(s, limit[:, None], factor, EXACT)
                shrink = tl.exp2((top - limit) * factor)
                total = total * shrink + tl.sum(p, 1)
                acc *= shrink[:, None]
                top = fresh
                v = load_block(
                    value_source, problem, batch, kv_head, first_key, n, stop,
                    PAGE_SIZE, HEAD_DIM_V, BLOCK_N, BLOCK_DV, TMA,
                )  # fmt: skip
                if HAS_HOLES:
                    v = without_hidden(v, tl.max(p, 0) > 0.0)
                elif ALIGNED and part != 1:
                    v = without_hidden(v, (keys >= begin) & (keys < stop))
                if problem.dropout is not None:
                    p *= dropout_factor(problem.dropout, batch, heads[:, None], positions[:, None], n, BLOCK_N, False)
                acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)

        columns_v = tl.arange(0, BLOCK_DV)
        in_columns = (columns_v < HEAD_DIM_V)[None, :]
        at = row_numbers_at(problem, batch, first_query, heads) + positions
        if partials is not None:
            at += tl.cast(split, tl.int64) * partials.rows
            values = partials.sums + at[:, None] * HEAD_DIM_V + columns_v[None, :]
            tl.store(values, acc, mask=in_tile[:, None] & in_columns)
            tl.store(partials.top + at, top, mask=in_tile)
            tl.store(partials.total + at, total, mask=in_tile)
        else:
            o, top, inverse, lse_value = finish(top, total, acc, problem, heads, in_tile, factor)
            where = packed_addresses(out, problem, batch, first_query, positions, heads, columns_v)
            tl.store(where, o.to(out.data.dtype.element_ty), mask=in_tile[:, None] & in_columns)
            store_row_numbers(lse, stats, stats_plane, at, lse_value, top, inverse, in_tile)


@triton.jit
def attention_forward_kernel(
    query, key, value, out, lse, stats, stats_plane, partials, problem, schedule, splits,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    PAGE_SIZE: tl.constexpr, TMA: tl.constexpr, MODIFIED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out, lse and stats of BLOCK_M packed rows a job; or, with ``partials``, those of one split of their keys.

    Grid: (programs, splits).
    """
    number = tl.program_id(0)
    while number < schedule.tiles * schedule.heads:
        tile, kv_head, batch = job(schedule, number, True)
        _forward_tile(
            query, key, value, out, lse, stats, stats_plane, partials, problem, tile, kv_head, batch,
            tl.program_id(1), splits, GROUP, HEAD_DIM, HEAD_DIM_V, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, PAGE_SIZE, TMA,
            MODIFIED, PRECISION,
        )  # fmt: skip
        number = next_job(schedule, number)
