"""Forward pass: online softmax over blocks of keys (Milakov & Gimelshein 2018; Dao et al. 2022), one tile a program.

The query heads of a group are packed into the rows of a tile: packed row r is position r // GROUP of head
kv_head * GROUP + r % GROUP. The blocks of keys fall into three ranges, partial, full and partial, and only the
partial ones pay for mask arithmetic.
"""

import triton
import triton.language as tl
from triton.language.random import philox_impl

from .masks import tile_range, visible

_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _sequence(cu_seqlens_q, cu_seqlens_k, seqlens_k, batch, seqlen_q, seqlen_k, PACKED: tl.constexpr,
              HAS_SEQLENS_K: tl.constexpr):  # fmt: skip
    """Where the rows and keys of a batch entry begin, and how many there are."""
    zero = batch * 0  # numbers of one kind on both ways
    first_query, first_key, len_q, len_k = zero, zero, zero + seqlen_q, zero + seqlen_k
    if PACKED:
        first_query = tl.load(cu_seqlens_q + batch)
        len_q = tl.load(cu_seqlens_q + batch + 1) - first_query
        first_key = tl.load(cu_seqlens_k + batch)
        len_k = tl.load(cu_seqlens_k + batch + 1) - first_key
    if HAS_SEQLENS_K:
        len_k = tl.load(seqlens_k + batch)
    return first_query, first_key, len_q, len_k


@triton.jit
def tanh(x):
    """tanh by exp2 where that keeps its accuracy, by its series near 0."""
    e = tl.exp2(tl.abs(x) * (-2.0 * _LOG2E))
    t = (1.0 - e) / (1.0 + e)
    x2 = x * x
    series = x * (1.0 + x2 * (-1 / 3 + x2 * (2 / 15 + x2 * (-17 / 315 + x2 * (62 / 2835 - x2 * (1382 / 155925))))))
    return tl.where(x2 < 0.09, series, tl.where(x < 0.0, -t, t))


@triton.jit
def dropout_factor(rng_seed, batch, heads, positions, keys, threshold, keep):
    """1 / (1 - p) where an element is kept, else 0: Philox4x32-10, keyed as everywhere in the library."""
    zero = (heads * 0)[:, None] + (keys * 0)[None, :]
    c0 = (zero + (keys // 4)[None, :]).to(tl.uint32, bitcast=True)
    c1 = (zero + positions[:, None]).to(tl.uint32, bitcast=True)
    c2 = (zero + heads[:, None]).to(tl.uint32, bitcast=True)
    c3 = (zero + batch).to(tl.uint32, bitcast=True)
    seed = tl.load(rng_seed)  # int64: read where it lies, so that nothing waits for the device
    w0, w1, w2, w3 = philox_impl(c0, c1, c2, c3, seed.to(tl.uint32), (seed >> 32).to(tl.uint32))
    word = (keys % 4)[None, :]
    random = tl.where(word == 0, w0, tl.where(word == 1, w1, tl.where(word == 2, w2, w3)))
    return tl.where(random >= threshold, keep, 0.0)


@triton.jit
def scores_of(
    q, k, batch, heads, positions, keys, in_tile, start, end, offset, left, right, softmax_scale, softcap,
    alibi_slopes, alibi_batch, alibi_head, bias, bias_batch, bias_head, bias_row, bias_key, key_mask, key_mask_batch,
    key_mask_key, seqlen_k,
    MASKED: tl.constexpr, MODIFIED: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_ALIBI: tl.constexpr,
    BIAS: tl.constexpr, HAS_KEY_MASK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Scores of a block, -inf where a row does not see a key.

    Raw products where nothing changes them, else natural units, in which a bias of -FLT_MAX still fits.
    """
    s = tl.dot(q, k, input_precision=PRECISION)
    if MODIFIED:
        s *= softmax_scale
    if HAS_SOFTCAP:
        s = softcap * tanh(s / softcap)
    if BIAS != "none":
        at = batch * bias_batch + (heads * bias_head + positions * bias_row)[:, None] + (keys * bias_key)[None, :]
        inside = in_tile[:, None] & (keys < seqlen_k)[None, :]
        if BIAS == "float":
            b = tl.load(bias + at, mask=inside, other=float("-inf")).to(tl.float32)
            s = tl.where(b == float("-inf"), b, s + b)  # a hidden key's score may be NaN
        else:
            s = tl.where(tl.load(bias + at, mask=inside, other=0) != 0, s, float("-inf"))
    if HAS_ALIBI:
        slopes = tl.load(alibi_slopes + batch * alibi_batch + heads * alibi_head, mask=in_tile, other=0.0)
        s -= slopes[:, None] * tl.abs(positions[:, None] + offset - keys[None, :]).to(tl.float32)
    if HAS_KEY_MASK:
        kept = tl.load(key_mask + batch * key_mask_batch + keys * key_mask_key, mask=keys < seqlen_k, other=0)
        s = tl.where((kept != 0)[None, :], s, float("-inf"))
    if MASKED:
        seen = visible(start, end, offset, left, right, positions[:, None], keys[None, :])
        s = tl.where(seen, s, float("-inf"))
    return s


@triton.jit
def attention_forward_kernel(
    query, key, value, out, lse, stats,
    cu_seqlens_q, cu_seqlens_k, seqlens_k, key_mask, bias, alibi_slopes, sinks, rng_seed,
    query_batch, query_head, query_row, key_batch, key_head, key_row, value_batch, value_head, value_row,
    out_batch, out_head, out_row, seqlens_k_stride, key_mask_batch, key_mask_key,
    bias_batch, bias_head, bias_row, bias_key, alibi_batch, alibi_head, sinks_stride,
    seqlen_q, seqlen_k, lse_batch, lse_head, stats_plane, left, right,
    softmax_scale, softcap, dropout_threshold, dropout_keep,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    PACKED: tl.constexpr, HAS_SEQLENS_K: tl.constexpr, HAS_KEY_MASK: tl.constexpr, BIAS: tl.constexpr,
    HAS_ALIBI: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_SINKS: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    MODIFIED: tl.constexpr, NEED_LSE: tl.constexpr, NEED_STATS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of BLOCK_M packed rows of one (batch entry, KV head).

    Grid: (tiles of the longest sequence, KV heads, batch). Heavy tiles come first: under a causal mask the last rows
    see the most keys.
    """
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    kv_head, batch = tl.program_id(1), tl.program_id(2)
    first_query, first_key, len_q, len_k = _sequence(
        cu_seqlens_q, cu_seqlens_k, seqlens_k + batch * (seqlens_k_stride - 1), batch, seqlen_q, seqlen_k, PACKED,
        HAS_SEQLENS_K,
    )  # fmt: skip
    if tile * BLOCK_M >= len_q * GROUP:
        return
    start, end, offset = 0, len_k, len_k - len_q

    packed = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    in_tile = packed < len_q * GROUP
    positions, heads = packed // GROUP, kv_head * GROUP + packed % GROUP
    columns, columns_v = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    # Offsets are 64-bit: a batch of long sequences is larger than 2^31 elements.
    q_at = batch.to(tl.int64) * query_batch + (first_query + positions).to(tl.int64) * query_row + heads * query_head
    q = tl.load(
        query + q_at[:, None] + columns[None, :], mask=in_tile[:, None] & (columns < HEAD_DIM)[None, :], other=0.0
    )
    k_at = key + batch.to(tl.int64) * key_batch + kv_head * key_head + first_key.to(tl.int64) * key_row
    v_at = value + batch.to(tl.int64) * value_batch + kv_head * value_head + first_key.to(tl.int64) * value_row

    factor = _LOG2E if MODIFIED else softmax_scale * _LOG2E  # from a difference of scores to base 2
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)

    last_row = tl.minimum(tile * BLOCK_M + BLOCK_M, len_q * GROUP) - 1
    begin, full_begin, full_end, stop = tile_range(
        start, end, offset, left, right, tile * BLOCK_M // GROUP, last_row // GROUP
    )
    # Whole blocks: [first, full) and [partial, stop) need the mask, [full, partial) does not.
    first = begin // BLOCK_N * BLOCK_N
    full = tl.cdiv(full_begin, BLOCK_N) * BLOCK_N
    partial = full_end // BLOCK_N * BLOCK_N
    has_full = full < partial
    full, partial = tl.where(has_full, full, first), tl.where(has_full, partial, first)
    for part in tl.static_range(3):
        part_begin = first if part == 0 else (full if part == 1 else partial)
        part_end = full if part == 0 else (partial if part == 1 else stop)
        for n in range(part_begin, part_end, BLOCK_N):
            keys = n + tl.arange(0, BLOCK_N)
            in_block = keys < stop
            k = tl.load(
                k_at + columns[:, None] + keys.to(tl.int64)[None, :] * key_row,
                mask=(columns < HEAD_DIM)[:, None] & in_block[None, :], other=0.0,
            )  # fmt: skip
            s = scores_of(
                q, k, batch, heads, positions, keys, in_tile, start, end, offset, left, right, softmax_scale, softcap,
                alibi_slopes, alibi_batch, alibi_head, bias, bias_batch, bias_head, bias_row, bias_key, key_mask,
                key_mask_batch, key_mask_key, seqlen_k,
                part != 1, MODIFIED, HAS_SOFTCAP, HAS_ALIBI, BIAS, HAS_KEY_MASK, PRECISION,
            )  # fmt: skip
            fresh = tl.maximum(top, tl.max(s, 1))
            limit = tl.where(fresh == float("-inf"), 0.0, fresh)
            p = tl.exp2((s - limit[:, None]) * factor)
            shrink = tl.exp2((top - limit) * factor)
            total = total * shrink + tl.sum(p, 1)
            acc *= shrink[:, None]
            top = fresh
            v = tl.load(
                v_at + keys.to(tl.int64)[:, None] * value_row + columns_v[None, :],
                mask=in_block[:, None] & (columns_v < HEAD_DIM_V)[None, :], other=0.0,
            )  # fmt: skip
            if part != 1 or HAS_KEY_MASK or BIAS != "none":
                # NaN and Inf of a key that no row of the tile sees: 0 times them is NaN.
                v = tl.where((tl.max(p, 0) > 0.0)[:, None], v, 0.0).to(v.dtype)
            if HAS_DROPOUT:
                p *= dropout_factor(rng_seed, batch, heads, positions, keys, dropout_threshold, dropout_keep)
            acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)

    empty = (top == float("-inf")) & (total == 0.0)  # scores that are all NaN leave no maximum, but a sum
    if HAS_SINKS:
        sink = tl.load(sinks + heads * sinks_stride, mask=in_tile, other=float("-inf")).to(tl.float32)
        fresh = tl.maximum(top, sink)
        limit = tl.where(fresh == float("-inf"), 0.0, fresh)
        shrink = tl.exp2((top - limit) * factor)
        total = total * shrink + tl.exp2((sink - limit) * factor)
        acc *= shrink[:, None]
        top = fresh
    inverse = tl.where(empty, 0.0, 1.0 / tl.where(empty, 1.0, total))
    acc = tl.where(empty[:, None], 0.0, acc * inverse[:, None])
    o_at = batch.to(tl.int64) * out_batch + (first_query + positions).to(tl.int64) * out_row + heads * out_head
    tl.store(
        out + o_at[:, None] + columns_v[None, :], acc.to(out.dtype.element_ty),
        mask=in_tile[:, None] & (columns_v < HEAD_DIM_V)[None, :],
    )  # fmt: skip
    if NEED_LSE:
        at = batch.to(tl.int64) * lse_batch + heads.to(tl.int64) * lse_head + first_query + positions
        natural = factor / _LOG2E
        value_of = tl.where(empty, float("-inf"), top * natural + tl.log(tl.where(empty, 1.0, total)))
        tl.store(lse + at, value_of, mask=in_tile)
        if NEED_STATS:
            tl.store(stats + at, tl.where(empty, 0.0, top), mask=in_tile)
            tl.store(stats + stats_plane + at, inverse, mask=in_tile)
