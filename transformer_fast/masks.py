"""The one mask of the library: a query row sees one contiguous interval of keys.

For batch entry ``b`` and query row ``i``, with absolute position ``p = i + offset_b``, key ``j`` is
visible when::

    start_b <= j < end_b              the sequence's own keys
    p - left <= j <= p + right        the window; causal is right = 0, no window is infinity

``csrc/core/mask.h`` says the same for native code, and the tests prove both texts equal. This file also
holds the helpers that turn padding into packed sequences and back.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

#: A bound that no sequence reaches: stands for "no window" on either side.
UNBOUNDED = 2**40


class SequenceMask(NamedTuple):
    """The mask of one sequence: the choice of (start, end, offset, left, right) that every variant is."""

    start: int
    end: int
    offset: int
    left: int
    right: int


class TileRange(NamedTuple):
    """What a tile of query rows sees: keys in [begin, end) by some row, in [full_begin, full_end) by all rows.

    An empty range has begin == end; without a key that all rows see, full_begin == full_end.
    """

    begin: int
    full_begin: int
    full_end: int
    end: int


def bounds(left: int, right: int) -> tuple[int, int]:
    """Window sizes with -1 for "unbounded" -> sizes with a bound no sequence reaches."""
    return (UNBOUNDED if left < 0 else left, UNBOUNDED if right < 0 else right)


def row_interval(mask: SequenceMask, row: int) -> tuple[int, int]:
    """The keys [lo, hi) that query row ``row`` sees; lo == hi when it sees none."""
    position = row + mask.offset
    lo = max(mask.start, position - mask.left)
    hi = min(mask.end, position + mask.right + 1)
    return (lo, hi) if lo < hi else (mask.start, mask.start)


def tile_range(mask: SequenceMask, first_row: int, last_row: int) -> TileRange:
    """What rows first_row..last_row (inclusive) see together.

    Both ends of a row's interval move up with the row, so the union starts with the first row's lower end and
    stops with the last row's upper end, and the intersection is the other two.
    """
    first, last = first_row + mask.offset, last_row + mask.offset
    begin = max(mask.start, first - mask.left)
    end = min(mask.end, last + mask.right + 1)
    full_begin = max(mask.start, last - mask.left)
    full_end = min(mask.end, first + mask.right + 1)
    if begin >= end:
        return TileRange(mask.start, mask.start, mask.start, mask.start)
    if full_begin >= full_end:
        return TileRange(begin, begin, begin, end)
    return TileRange(begin, full_begin, full_end, end)


def visible_keys(
    seqlen_q: int,
    seqlen_k: int,
    left: int,
    right: int,
    *,
    seqlens_k: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """The mask as a dense matrix, for the reference and for tests.

    Args:
        left, right: window sizes, -1 for unbounded.
        seqlens_k: (batch,) key lengths; they move the alignment.
        key_padding_mask: (batch, seqlen_k) bool, True = keep; it does not move the alignment.

    Returns:
        bool (batch or 1, seqlen_q, seqlen_k), True where the key is visible.
    """
    left, right = bounds(left, right)
    end = torch.tensor([seqlen_k], device=device) if seqlens_k is None else seqlens_k.to(torch.int64)
    end = end.view(-1, 1, 1)  # (batch, 1, 1)
    position = torch.arange(seqlen_q, device=device).view(1, -1, 1) + (end - seqlen_q)
    j = torch.arange(seqlen_k, device=device).view(1, 1, -1)
    visible = (j < end) & (j >= position - left) & (j <= position + right)
    if key_padding_mask is not None:
        visible = visible & key_padding_mask[:, None, :]
    return visible


def cu_seqlens_from_mask(key_padding_mask: Tensor) -> tuple[Tensor, Tensor, int]:
    """Where the kept tokens of a padded batch stand, and how they divide into sequences.

    Args:
        key_padding_mask: bool (batch, seqlen), True = keep; any pattern.

    Returns:
        ``indices`` int64 (total,), positions of kept tokens in the flattened (batch * seqlen) batch;
        ``cu_seqlens`` int32 (batch + 1,); ``max_seqlen`` int.
    """
    lengths = key_padding_mask.sum(dim=1, dtype=torch.int32)
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    indices = key_padding_mask.flatten().nonzero().flatten()
    return indices, cu_seqlens, int(lengths.max()) if lengths.numel() else 0


def unpad(hidden: Tensor, indices: Tensor) -> Tensor:
    """(batch, seqlen, ...) -> (total, ...): the kept tokens only."""
    return hidden.flatten(0, 1).index_select(0, indices)


def repad(packed: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """(total, ...) -> (batch, seqlen, ...), zeros where there was padding."""
    padded = packed.new_zeros((batch * seqlen, *packed.shape[1:]))
    return padded.index_copy(0, indices, packed).unflatten(0, (batch, seqlen))
