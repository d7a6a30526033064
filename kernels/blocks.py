"""Blocks of rows from memory: by tensor descriptors (TMA, compute capability 9.0 and later) or by pointers."""

import triton
import triton.language as tl


@triton.jit
def open_rows(
    rows, first, stop, PAGE_SIZE: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
    TMA: tl.constexpr,
):  # fmt: skip
    """What ``load_block`` loads from: a tensor descriptor that ends at row ``stop`` of a sequence, or the rows."""
    if TMA:
        # Made anew for each tile. One for all tiles could not end where the tile's keys end, and to hide what lies
        # behind them would take the values through registers: at head_dim 128 that spilled.
        return tl.make_tensor_descriptor(
            rows.data,
            shape=[rows.batches, rows.heads, rows.rows if PAGE_SIZE > 0 else tl.maximum(first + stop, 1), DIM],
            strides=[rows.batch, rows.head, rows.row, 1],
            block_shape=[1, 1, BLOCK, BLOCK_D],
        )
    else:
        return rows


@triton.jit
def pages_of(problem, batch):
    """Where the pages of a sequence stand in the block table."""
    return problem.block_table.data + tl.cast(batch, tl.int64) * problem.block_table.batch


@triton.jit
def load_block(
    source, problem, batch, head, first, n, stop,
    PAGE_SIZE: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Rows [n, n + BLOCK) of a sequence that begins at row ``first``: (BLOCK, BLOCK_D).

    Rows from ``stop`` on and columns from DIM on are 0; only where a descriptor reads a page is there what lies there.
    PAGE_SIZE is 0 where there are no pages.
    """
    entry = batch
    if problem.cu_seqlens_q is not None:
        entry = batch * 0
    row = first + n
    IN_ONE_PAGE: tl.constexpr = PAGE_SIZE > 0 and PAGE_SIZE % BLOCK == 0
    if IN_ONE_PAGE:
        entry = tl.load(pages_of(problem, batch) + n // PAGE_SIZE * problem.block_table.stride)
        row = n % PAGE_SIZE
    if TMA:
        return source.load([entry, head, row, 0]).reshape([BLOCK, BLOCK_D])
    else:
        # Offsets are 64-bit: a batch of long sequences is larger than 2^31 elements.
        own = n + tl.arange(0, BLOCK)
        inside = own < stop
        columns = tl.arange(0, BLOCK_D)
        at = source.data + tl.cast(head, tl.int64) * source.head
        if PAGE_SIZE > 0 and not IN_ONE_PAGE:
            page = tl.load(
                pages_of(problem, batch) + own // PAGE_SIZE * problem.block_table.stride, mask=inside, other=0
            )
            rows = page.to(tl.int64) * source.batch + (own % PAGE_SIZE).to(tl.int64) * source.row
        else:
            at += tl.cast(entry, tl.int64) * source.batch + tl.cast(row, tl.int64) * source.row
            rows = tl.arange(0, BLOCK).to(tl.int64) * source.row
        mask = inside[:, None]
        if DIM != BLOCK_D:
            mask = mask & (columns < DIM)[None, :]
        return tl.load(at + rows[:, None] + columns[None, :], mask=mask, other=0.0)


@triton.jit
def store_block(
    rows, values, problem, batch, head, first, n, stop,
    DIM: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Rows [n, min(n + BLOCK, stop)) of a sequence that begins at row ``first``."""
    entry = batch
    if problem.cu_seqlens_q is not None:
        entry = batch * 0
    values = values.to(rows.data.dtype.element_ty)
    if TMA:
        target = open_rows(rows, first, stop, 0, DIM, BLOCK, BLOCK_D, TMA)
        target.store([entry, head, first + n, 0], values.reshape([1, 1, BLOCK, BLOCK_D]))
    else:
        own, columns = n + tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
        at = rows.data + tl.cast(entry, tl.int64) * rows.batch + tl.cast(head, tl.int64) * rows.head
        at += tl.cast(first + n, tl.int64) * rows.row
        at = at + tl.arange(0, BLOCK).to(tl.int64)[:, None] * rows.row + columns[None, :]
        tl.store(at, values, mask=(own < stop)[:, None] & (columns < DIM)[None, :])


@triton.jit
def without_hidden(block, keep):
    """Rows that nobody sees become 0: they may hold NaN, and 0 times NaN is NaN."""
    return tl.where(keep[:, None], block, 0.0).to(block.dtype)


@triton.jit
def packed_rows(tile, kv_head, GROUP: tl.constexpr, BLOCK_M: tl.constexpr):
    """The rows of a tile in which the query heads of a KV head are packed: (packed index, positions, heads)."""
    packed = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    return packed, packed // GROUP, kv_head * GROUP + packed % GROUP


@triton.jit
def addresses(rows, entry, heads, row, columns):
    """Addresses of the elements of some rows: (rows, columns). Offsets are 64-bit."""
    at = tl.cast(entry, tl.int64) * rows.batch + tl.cast(heads, tl.int64) * rows.head
    at += tl.cast(row, tl.int64) * rows.row
    return rows.data + at[:, None] + columns[None, :]


@triton.jit
def packed_addresses(rows, problem, batch, first_query, positions, heads, columns):
    """The same of packed rows of a sequence."""
    entry = batch
    if problem.cu_seqlens_q is not None:
        entry = batch * 0
    return addresses(rows, entry, heads, first_query + positions, columns)


@triton.jit
def row_numbers_at(problem, batch, first_query, heads):
    """Where the numbers of a head's rows (one number a row: lse and the like) begin."""
    entry = batch
    if problem.cu_seqlens_q is not None:
        entry = batch * 0
    return tl.cast(entry, tl.int64) * problem.lse_batch + tl.cast(heads, tl.int64) * problem.lse_head + first_query
