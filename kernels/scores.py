"""From products q . k to scores, in either orientation of a block: rows by keys, or keys by rows.

Indices come as two-dimensional tensors that broadcast to the block.
"""

import triton
import triton.language as tl
from triton.language.random import philox_impl

from .masks import row_interval

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def tanh(x):
    """tanh by exp2 where that keeps its accuracy, by its series near 0."""
    e = tl.exp2(tl.abs(x) * (-2.0 * LOG2E))
    t = (1.0 - e) / (1.0 + e)
    x2 = x * x
    series = x * (1.0 + x2 * (-1 / 3 + x2 * (2 / 15 + x2 * (-17 / 315 + x2 * (62 / 2835 - x2 * (1382 / 155925))))))
    return tl.where(x2 < 0.09, series, tl.where(x < 0.0, -t, t))


@triton.jit
def dropout_factor(dropout, batch, heads, rows, n, BLOCK_N: tl.constexpr, KEYS_FIRST: tl.constexpr):
    """1 / (1 - p) where an element is kept, else 0: Philox4x32-10, keyed as everywhere in the library.

    One counter serves four keys, so ``n``, the first of the block's keys, is a multiple of 4. ``heads`` and ``rows``
    broadcast to the block, which is keys by rows with KEYS_FIRST, else rows by keys.
    """
    groups = n // 4 + tl.arange(0, BLOCK_N // 4)
    groups = groups[:, None] if KEYS_FIRST else groups[None, :]
    zero = (heads + rows + groups) * 0
    c0 = (zero + groups).to(tl.uint32, bitcast=True)
    c1 = (zero + rows).to(tl.uint32, bitcast=True)
    c2 = (zero + heads).to(tl.uint32, bitcast=True)
    c3 = (zero + batch).to(tl.uint32, bitcast=True)
    seed = tl.load(dropout.seed)
    w0, w1, w2, w3 = philox_impl(c0, c1, c2, c3, seed.to(tl.uint32), (seed >> 32).to(tl.uint32))
    least = dropout.threshold
    kept = (w0 >= least).to(tl.int32) | (w1 >= least).to(tl.int32) * 2
    kept = kept | (w2 >= least).to(tl.int32) * 4 | (w3 >= least).to(tl.int32) * 8
    word = tl.arange(0, 4)
    if KEYS_FIRST:
        bits = (kept[:, None, :] >> word[None, :, None]).reshape([BLOCK_N, kept.shape[1]])
    else:
        bits = (kept[:, :, None] >> word[None, None, :]).reshape([kept.shape[0], BLOCK_N])
    return tl.where((bits & 1) != 0, dropout.keep, 0.0)


@triton.jit
def scores_of(
    product, problem, batch, heads, rows, keys, in_tile, len_k, offset, MODIFIED: tl.constexpr, MASKED: tl.constexpr
):
    """(scores, scores as the softcap left them): -inf where a row does not see a key.

    Raw products where nothing but the mask changes them, else natural units, in which a bias of -FLT_MAX still fits.
    """
    s = product
    if MODIFIED:
        s *= problem.softmax_scale
    if problem.softcap is not None:
        s = problem.softcap * tanh(s / problem.softcap)
    capped = s
    if problem.bias is not None:
        bias = problem.bias
        at = bias.data + tl.cast(batch, tl.int64) * bias.batch + tl.cast(heads, tl.int64) * bias.head
        at = at + rows.to(tl.int64) * bias.row + keys.to(tl.int64) * bias.key
        inside = in_tile & (keys < problem.seqlen_k)
        if bias.data.dtype.element_ty == tl.uint8:
            s = tl.where(tl.load(at, mask=inside, other=0) != 0, s, float("-inf"))
        else:
            b = tl.load(at, mask=inside, other=float("-inf")).to(tl.float32)
            s = tl.where(b == float("-inf"), b, s + b)  # a hidden key's score may be NaN
    if problem.alibi is not None:
        slopes = problem.alibi.data + batch * problem.alibi.batch + heads * problem.alibi.stride
        s -= tl.load(slopes) * tl.abs(rows + offset - keys).to(tl.float32)
    if problem.key_mask is not None:
        at = problem.key_mask.data + tl.cast(batch, tl.int64) * problem.key_mask.batch + keys * problem.key_mask.stride
        s = tl.where(tl.load(at, mask=keys < problem.seqlen_k, other=0) != 0, s, float("-inf"))
    if MASKED:
        lo, hi = row_interval(0, len_k, offset, problem.left, problem.right, rows)
        hi = tl.where(in_tile, hi, lo)
        s = tl.where((keys >= lo) & (keys < hi), s, float("-inf"))
    return s, capped


@triton.jit
def base2_factor(problem, MODIFIED: tl.constexpr):
    """From a difference of scores to a power of 2."""
    return LOG2E if MODIFIED else problem.softmax_scale * LOG2E


@triton.jit
def exponentials(s, top, factor, EXACT: tl.constexpr):
    """exp2((s - top) * factor); ``top`` is finite.

    Half precision takes one multiply-add, whose error is that of top * factor: too large for float32, and infinite
    for scores near -FLT_MAX, as a bias makes them (EXACT).
    """
    if EXACT:
        return tl.exp2((s - top) * factor)
    return tl.exp2(s * factor - top * factor)


@triton.jit
def through_softcap(ds, capped, problem):
    """The gradient before the softcap from that after it."""
    if problem.softcap is not None:
        t = capped / problem.softcap
        ds *= 1.0 - t * t
    return ds
