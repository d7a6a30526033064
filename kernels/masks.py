"""The one mask of the library, for Triton: a query row sees one contiguous interval of keys.

``transformer_fast/masks.py`` and ``csrc/core/mask.h`` say the same; the tests hold the three texts equal. Positions
are 32-bit here, so "no window" is a bound of its own that no sequence reaches and no sum with a position overflows.
"""

import triton
import triton.language as tl

#: Stands for an unbounded side of a window; lengths must stay below it.
UNBOUNDED = 2**30


@triton.jit
def tile_range(start, end, offset, left, right, first_row, last_row):
    """What rows first_row..last_row see together: (begin, full_begin, full_end, end).

    Keys in [begin, end) are seen by some row, keys in [full_begin, full_end) by all of them.
    """
    first = first_row + offset
    last = last_row + offset
    begin = tl.maximum(start, first - left)
    stop = tl.minimum(end, last + right + 1)
    full_begin = tl.maximum(start, last - left)
    full_end = tl.minimum(end, first + right + 1)
    is_empty = begin >= stop
    begin = tl.where(is_empty, start, begin)
    stop = tl.where(is_empty, start, stop)
    has_full = (full_begin < full_end) & (begin < stop)
    full_begin = tl.where(has_full, full_begin, begin)
    full_end = tl.where(has_full, full_end, begin)
    return begin, full_begin, full_end, stop


@triton.jit
def row_interval(start, end, offset, left, right, rows):
    """The keys [lo, hi) that rows see; none where hi <= lo. A comparison with each is all that an element costs."""
    position = rows + offset
    return tl.maximum(start, position - left), tl.minimum(end, position + right + 1)
