"""Which tile a program works on, heaviest first, and where its sequence lies."""

import triton
import triton.language as tl


@triton.jit
def job(schedule, number, LAST_FIRST: tl.constexpr):
    """Job number -> (tile, kv_head, batch).

    Within a section of heads the tiles go from the heaviest to the lightest, since what starts last decides when
    all is done. Under a causal mask the last rows see the most keys (LAST_FIRST), and the first keys are seen by the
    most rows; of sequences of unequal length only the longest have the last tiles.
    """
    in_section = schedule.section * schedule.tiles
    first_head = number // in_section * schedule.section
    width = tl.minimum(schedule.section, schedule.heads - first_head)
    rest = number % in_section
    tile = rest // width
    if LAST_FIRST:
        tile = schedule.tiles - 1 - tile
    head = first_head + rest % width
    return tile, head % schedule.kv_heads, head // schedule.kv_heads


@triton.jit
def next_job(schedule, number):
    """The job after this one: the next that nobody has taken, or none."""
    if schedule.queue is None:
        return number * 0 + schedule.tiles * schedule.heads
    else:  # what stands behind a compile-time return is compiled all the same
        return tl.num_programs(0) + tl.atomic_add(schedule.queue, 1)


@triton.jit
def sequence(problem, batch):
    """(first_query, first_key, len_q, len_k): where rows and keys of a batch entry begin, and how many there are."""
    zero = batch * 0  # numbers of one kind on both ways
    first_query, first_key, len_q, len_k = zero, zero, zero + problem.seqlen_q, zero + problem.seqlen_k
    if problem.cu_seqlens_q is not None:
        first_query = tl.load(problem.cu_seqlens_q + batch)
        len_q = tl.load(problem.cu_seqlens_q + batch + 1) - first_query
        first_key = tl.load(problem.cu_seqlens_k + batch)
        len_k = tl.load(problem.cu_seqlens_k + batch + 1) - first_key
    if problem.seqlens_k is not None:
        len_k = tl.load(problem.seqlens_k.data + batch * problem.seqlens_k.stride)
    return first_query, first_key, len_q, len_k


@triton.jit
def split_range(begin, full_begin, full_end, stop, BLOCK: tl.constexpr, ALIGNED: tl.constexpr):
    """Blocks of a range of ``masks.tile_range``: (first, full, partial, stop).

    Blocks in [first, full) and [partial, stop) need the mask, those in [full, partial) do not. They are counted from
    the range's begin, or where they have to be ALIGNED from the block in which it lies.
    """
    first = begin // BLOCK * BLOCK if ALIGNED else begin
    full = first + tl.cdiv(full_begin - first, BLOCK) * BLOCK
    partial = first + (full_end - first) // BLOCK * BLOCK
    has_full = full < partial
    return first, tl.where(has_full, full, first), tl.where(has_full, partial, first), stop
