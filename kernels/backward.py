"""Backward pass in two kernels, each sum in the registers of one job: bit-identical from run to run (Dao 2023).

dkdv: one block of keys against all rows that see it, head after head of the group. dq: one tile of packed rows
against all keys that it sees, as in the forward pass. The row maximum and the inverse sum come from forward
(``stats``); ``delta`` is rowsum(dout * out) - dlse.
"""

import triton
import triton.language as tl

from .blocks import (
    addresses,
    load_block,
    open_rows,
    packed_addresses,
    packed_rows,
    row_numbers_at,
    store_block,
    without_hidden,
)
from .masks import tile_range
from .schedule import job, sequence, split_range
from .scores import base2_factor, dropout_factor, exponentials, scores_of, through_softcap


@triton.jit
def attention_backward_preprocess_kernel(
    out, dout, dlse, delta, rows_in_all, num_heads, rows_a_head,
    HEAD_DIM_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """delta, float32, for BLOCK_M rows a program, laid out as lse. Grid: (programs,)."""
    at = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    in_tile = at < rows_in_all
    batch, heads, row = at // (rows_a_head * num_heads), at // rows_a_head % num_heads, at % rows_a_head
    columns = tl.arange(0, BLOCK_DV)
    mask = in_tile[:, None] & (columns < HEAD_DIM_V)[None, :]
    o = tl.load(addresses(out, batch, heads, row, columns), mask=mask, other=0.0).to(tl.float32)
    do = tl.load(addresses(dout, batch, heads, row, columns), mask=mask, other=0.0).to(tl.float32)
    total = tl.sum(o * do, 1)
    if dlse is not None:
        total -= tl.load(dlse + at, mask=in_tile, other=0.0)
    tl.store(delta + at, total, mask=in_tile)


@triton.jit
def gradient_of_scores(
    product, dp, dropped, top, inverse, delta, problem, batch, heads, rows, keys, in_tile, len_k, offset, factor,
    EXACT: tl.constexpr, MODIFIED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """(probabilities as they met the values, d loss / d product / softmax_scale, d loss / d bias) of a block.

    ``dp`` is dout . v, ``dropped`` the factors of dropout or None. Works in either orientation.
    """
    s, capped = scores_of(product, problem, batch, heads, rows, keys, in_tile, len_k, offset, MODIFIED, MASKED)
    p = exponentials(s, top, factor, EXACT) * inverse
    kept = p
    if dropped is not None:
        kept = p * dropped
        dp = dp * dropped
    ds = p * (dp - delta)
    inner = through_softcap(ds, capped, problem)
    if MASKED or (problem.key_mask is not None) or (problem.bias is not None):
        # A hidden key and its value may be NaN.
        ds, inner = tl.where(p > 0.0, ds, 0.0), tl.where(p > 0.0, inner, 0.0)
    return kept, inner, ds


@triton.jit
def attention_backward_dkdv_kernel(
    query, key, value, dout, dkey, dvalue, stats, stats_plane, delta, problem, schedule,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    TMA: tl.constexpr, MODIFIED: tl.constexpr, PRECISION: tl.constexpr, NEED_DK: tl.constexpr, NEED_DV: tl.constexpr,
):  # fmt: skip
    """dkey and dvalue of BLOCK_N keys of a KV head a job, or one of them. Grid: (jobs,).

    At head_dim 256 the sums of both do not fit into the registers: one launch each, for one more product in five.
    """
    tile, kv_head, batch = job(schedule, tl.program_id(0), False)
    first_query, first_key, len_q, len_k = sequence(problem, batch)
    stored_keys = len_k if problem.cu_seqlens_k is not None else problem.seqlen_k  # padding gets a gradient of 0
    n = tile * BLOCK_N
    if n < stored_keys:
        offset = len_k - len_q
        keys = n + tl.arange(0, BLOCK_N)
        key_source = open_rows(key, first_key, len_k, 0, HEAD_DIM, BLOCK_N, BLOCK_D, TMA)
        value_source = open_rows(value, first_key, len_k, 0, HEAD_DIM_V, BLOCK_N, BLOCK_DV, TMA)
        k = load_block(key_source, problem, batch, kv_head, first_key, n, len_k, 0, HEAD_DIM, BLOCK_N, BLOCK_D, TMA)
        v = load_block(
            value_source, problem, batch, kv_head, first_key, n, len_k, 0, HEAD_DIM_V, BLOCK_N, BLOCK_DV, TMA
        )
        EXACT: tl.constexpr = (k.dtype == tl.float32) or MODIFIED
        factor = base2_factor(problem, MODIFIED)
        dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)

        # The rows that see a key: the mask with the sides of rows and keys exchanged.
        last_key = tl.minimum(n + BLOCK_N, len_k) - 1
        begin, full_begin, full_end, stop = tile_range(
            0, tl.where(n < len_k, len_q, 0), -offset, problem.right, problem.left, n, last_key
        )
        first, full, partial, stop = split_range(begin, full_begin, full_end, stop, BLOCK_M, False)
        query_source = open_rows(query, first_query, stop, 0, HEAD_DIM, BLOCK_M, BLOCK_D, TMA)
        dout_source = open_rows(dout, first_query, stop, 0, HEAD_DIM_V, BLOCK_M, BLOCK_DV, TMA)
        for member in tl.range(0, GROUP, disable_licm=True):
            head = kv_head * GROUP + member
            at = row_numbers_at(problem, batch, first_query, head)
            for part in tl.static_range(3):
                part_begin = first if part == 0 else (full if part == 1 else partial)
                part_end = full if part == 0 else (partial if part == 1 else stop)
                for m in tl.range(part_begin, part_end, BLOCK_M, disable_licm=True):
                    rows = m + tl.arange(0, BLOCK_M)
                    in_tile = rows < stop
                    q = load_block(
                        query_source, problem, batch, head, first_query, m, stop, 0, HEAD_DIM, BLOCK_M, BLOCK_D, TMA
                    )
                    do = load_block(
                        dout_source, problem, batch, head, first_query, m, stop, 0, HEAD_DIM_V, BLOCK_M, BLOCK_DV, TMA
                    )
                    top = tl.load(stats + at + rows, mask=in_tile, other=0.0)
                    inverse = tl.load(stats + stats_plane + at + rows, mask=in_tile, other=0.0)
                    delta_here = tl.load(delta + at + rows, mask=in_tile, other=0.0)
                    # Keys by rows: the transposed products, so that no result has to be transposed.
                    product = tl.dot(k, q.T, input_precision=PRECISION)
                    dp = tl.dot(v, do.T, input_precision=PRECISION) if NEED_DK else product
                    dropped = None
                    if problem.dropout is not None:
                        dropped = dropout_factor(problem.dropout, batch, head, rows[None, :], n, BLOCK_N, True)
                    kept, ds, _unscaled = gradient_of_scores(
                        product, dp, dropped, top[None, :], inverse[None, :], delta_here[None, :], problem, batch, head,
                        rows[None, :], keys[:, None], in_tile[None, :], len_k, offset, factor, EXACT, MODIFIED,
                        part != 1,
                    )  # fmt: skip
                    if NEED_DV:
                        dv = tl.dot(kept.to(do.dtype), do, dv, input_precision=PRECISION)
                    if NEED_DK:
                        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)

        # A key beyond the sequence saw products with whatever lies there.
        held = (keys < len_k)[:, None]
        if NEED_DK:
            dk = tl.where(held, dk * problem.softmax_scale, 0.0)
            store_block(dkey, dk, problem, batch, kv_head, first_key, n, stored_keys, HEAD_DIM, BLOCK_N, BLOCK_D, TMA)
        if NEED_DV:
            dv = tl.where(held, dv, 0.0)
            store_block(
                dvalue, dv, problem, batch, kv_head, first_key, n, stored_keys, HEAD_DIM_V, BLOCK_N, BLOCK_DV, TMA
            )


@triton.jit
def attention_backward_dq_kernel(
    query, key, value, dout, dquery, stats, stats_plane, delta, problem, schedule,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    TMA: tl.constexpr, MODIFIED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dquery of BLOCK_M packed rows a job. Grid: (programs,)."""
    tile, kv_head, batch = job(schedule, tl.program_id(0), True)
    first_query, first_key, len_q, len_k = sequence(problem, batch)
    if tile * BLOCK_M < len_q * GROUP:
        offset = len_k - len_q
        packed, positions, heads = packed_rows(tile, kv_head, GROUP, BLOCK_M)
        in_tile = packed < len_q * GROUP
        columns, columns_v = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
        in_columns = in_tile[:, None] & (columns < HEAD_DIM)[None, :]
        q = tl.load(
            packed_addresses(query, problem, batch, first_query, positions, heads, columns), mask=in_columns, other=0.0
        )
        do = tl.load(
            packed_addresses(dout, problem, batch, first_query, positions, heads, columns_v),
            mask=in_tile[:, None] & (columns_v < HEAD_DIM_V)[None, :], other=0.0,
        )  # fmt: skip
        EXACT: tl.constexpr = (q.dtype == tl.float32) or MODIFIED
        HAS_HOLES: tl.constexpr = (problem.key_mask is not None) or (problem.bias is not None)
        factor = base2_factor(problem, MODIFIED)
        at = row_numbers_at(problem, batch, first_query, heads) + positions
        top = tl.load(stats + at, mask=in_tile, other=0.0)
        inverse = tl.load(stats + stats_plane + at, mask=in_tile, other=0.0)
        delta_here = tl.load(delta + at, mask=in_tile, other=0.0)
        dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

        last_row = tl.minimum(tile * BLOCK_M + BLOCK_M, len_q * GROUP) - 1
        begin, full_begin, full_end, stop = tile_range(
            0, len_k, offset, problem.left, problem.right, tile * BLOCK_M // GROUP, last_row // GROUP
        )
        ALIGNED: tl.constexpr = problem.dropout is not None
        first, full, partial, stop = split_range(begin, full_begin, full_end, stop, BLOCK_N, ALIGNED)
        key_source = open_rows(key, first_key, stop, 0, HEAD_DIM, BLOCK_N, BLOCK_D, TMA)
        value_source = open_rows(value, first_key, stop, 0, HEAD_DIM_V, BLOCK_N, BLOCK_DV, TMA)
        for part in tl.static_range(3):
            part_begin = first if part == 0 else (full if part == 1 else partial)
            part_end = full if part == 0 else (partial if part == 1 else stop)
            for n in tl.range(part_begin, part_end, BLOCK_N, disable_licm=True):
                keys = n + tl.arange(0, BLOCK_N)
                k = load_block(
                    key_source, problem, batch, kv_head, first_key, n, stop, 0, HEAD_DIM, BLOCK_N, BLOCK_D, TMA
                )
                v = load_block(
                    value_source, problem, batch, kv_head, first_key, n, stop, 0, HEAD_DIM_V, BLOCK_N, BLOCK_DV, TMA
                )
                dropped = None
                if problem.dropout is not None:
                    dropped = dropout_factor(
                        problem.dropout, batch, heads[:, None], positions[:, None], n, BLOCK_N, False
                    )
                _kept, ds, _unscaled = gradient_of_scores(
                    tl.dot(q, k.T, input_precision=PRECISION), tl.dot(do, v.T, input_precision=PRECISION), dropped,
                    top[:, None], inverse[:, None], delta_here[:, None], problem, batch, heads[:, None],
                    positions[:, None], keys[None, :], in_tile[:, None], len_k, offset, factor, EXACT, MODIFIED,
                    part != 1,
                )  # fmt: skip
                if HAS_HOLES:
                    k = without_hidden(k, tl.max(tl.abs(ds), 0) > 0.0)
                elif ALIGNED and part != 1:
                    k = without_hidden(k, (keys >= begin) & (keys < stop))
                dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)

        tl.store(
            packed_addresses(dquery, problem, batch, first_query, positions, heads, columns),
            (dq * problem.softmax_scale).to(dquery.data.dtype.element_ty), mask=in_columns,
        )  # fmt: skip


@triton.jit
def attention_backward_dbias_kernel(
    query, key, value, dout, dbias, stats, stats_plane, delta, problem, batches, heads,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    ONE_BATCH: tl.constexpr, ONE_HEAD: tl.constexpr, ONE_ROW: tl.constexpr, ONE_KEY: tl.constexpr,
    MODIFIED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient of one block of the bias a program, summed over everything that the bias broadcasts over (ONE_*).

    Grid: (batches or 1 times heads or 1, blocks of rows or 1, blocks of keys or 1).
    """
    entry, member = tl.program_id(0) * 0, tl.program_id(0)
    if not ONE_HEAD:
        entry, member = tl.program_id(0) // heads, tl.program_id(0) % heads
    elif not ONE_BATCH:
        entry, member = tl.program_id(0), tl.program_id(0) * 0
    row_begin, row_end = tl.program_id(1) * BLOCK_M, tl.program_id(1) * BLOCK_M + 1
    if ONE_ROW:
        row_end = problem.seqlen_q
    key_begin, key_end = tl.program_id(2) * BLOCK_N, tl.program_id(2) * BLOCK_N + 1
    if ONE_KEY:
        key_end = problem.seqlen_k
    factor = base2_factor(problem, MODIFIED)
    EXACT: tl.constexpr = (query.data.dtype.element_ty == tl.float32) or MODIFIED
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for b in tl.range(0 if ONE_BATCH else entry, batches if ONE_BATCH else entry + 1, disable_licm=True):
        first_query, first_key, len_q, len_k = sequence(problem, b)
        offset = len_k - len_q
        for h in tl.range(0 if ONE_HEAD else member, heads if ONE_HEAD else member + 1, disable_licm=True):
            for m in tl.range(row_begin, row_end, BLOCK_M, disable_licm=True):
                rows = m + tl.arange(0, BLOCK_M)
                in_tile = rows < len_q
                q = load_block(query, problem, b, h, first_query, m, len_q, 0, HEAD_DIM, BLOCK_M, BLOCK_D, False)
                do = load_block(dout, problem, b, h, first_query, m, len_q, 0, HEAD_DIM_V, BLOCK_M, BLOCK_DV, False)
                at = row_numbers_at(problem, b, first_query, h) + rows
                top = tl.load(stats + at, mask=in_tile, other=0.0)
                inverse = tl.load(stats + stats_plane + at, mask=in_tile, other=0.0)
                delta_here = tl.load(delta + at, mask=in_tile, other=0.0)
                last_row = tl.minimum(m + BLOCK_M, len_q) - 1
                begin, _full_begin, _full_end, stop = tile_range(
                    0, len_k, offset, problem.left, problem.right, m, last_row
                )
                lower = tl.maximum(key_begin, begin // BLOCK_N * BLOCK_N)
                for n in tl.range(lower, tl.minimum(key_end, stop), BLOCK_N, disable_licm=True):
                    keys = n + tl.arange(0, BLOCK_N)
                    kv_head = h // GROUP
                    k = load_block(key, problem, b, kv_head, first_key, n, stop, 0, HEAD_DIM, BLOCK_N, BLOCK_D, False)
                    v = load_block(
                        value, problem, b, kv_head, first_key, n, stop, 0, HEAD_DIM_V, BLOCK_N, BLOCK_DV, False
                    )
                    dropped = None
                    if problem.dropout is not None:
                        dropped = dropout_factor(problem.dropout, b, h, rows[:, None], n, BLOCK_N, False)
                    _kept, _inner, ds = gradient_of_scores(
                        tl.dot(q, k.T, input_precision=PRECISION), tl.dot(do, v.T, input_precision=PRECISION), dropped,
                        top[:, None], inverse[:, None], delta_here[:, None], problem, b, h, rows[:, None],
                        keys[None, :], in_tile[:, None], len_k, offset, factor, EXACT, MODIFIED, True,
                    )  # fmt: skip
                    total += ds

    rows, keys = row_begin + tl.arange(0, BLOCK_M), key_begin + tl.arange(0, BLOCK_N)
    if ONE_ROW:
        total = tl.sum(total, 0)[None, :]
        rows = row_begin + tl.arange(0, 1)
    if ONE_KEY:
        total = tl.sum(total, 1)[:, None]
        keys = key_begin + tl.arange(0, 1)
    at = tl.cast(entry, tl.int64) * dbias.batch + tl.cast(member, tl.int64) * dbias.head
    at = at + rows.to(tl.int64)[:, None] * dbias.row + keys.to(tl.int64)[None, :] * dbias.key
    size_rows = 1 if ONE_ROW else problem.seqlen_q
    size_keys = 1 if ONE_KEY else problem.seqlen_k
    tl.store(
        dbias.data + at, total.to(dbias.data.dtype.element_ty),
        mask=(rows < size_rows)[:, None] & (keys < size_keys)[None, :],
    )  # fmt: skip
