"""What a ``BlockMask`` of FlexAttention says, as arguments of :func:`attention` and :func:`attention_varlen`.

Nothing is guessed from names or source text. The mask is evaluated at every element, once a block mask, and each
family of intervals is fitted to what the rows see: the tightest window and lengths that cover it. If these reproduce
every row, the mask is of that family; if not, it is not. So a mask is either run exactly or not recognized.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..masks import UNBOUNDED
from ..spec import UnsupportedError

#: Elements of the mask that are evaluated at a time.
_CHUNK = 2**22
#: The largest mask, in elements of one byte, that is kept as it is where no interval says it.
DENSE_LIMIT = 2**28

Window = tuple[int | None, int | None]


@dataclass(frozen=True, eq=False)
class RecognizedMask:
    """A block mask as arguments: a snapshot, which :func:`flex_attention` takes in its place.

    ``kind`` is "window" (a window, and keys that nobody sees), "lengths" (a window that ends at each sequence's
    length), "documents" (packed sequences) or "dense" (a boolean mask, whose empty tiles are skipped).
    """

    kind: str
    batch: int
    num_heads: int
    seq_lengths: tuple[int, int]
    window_size: Window = (None, None)
    num_keys: int = 0  # of "window": keys past these are seen by no row, and left out
    key_padding_mask: Tensor | None = None  # bool (batch, num_keys)
    seqlens_k: Tensor | None = None  # int32 (batch,)
    cu_seqlens_q: Tensor | None = None  # int32 (sequences + 1,), over the flattened batch
    cu_seqlens_k: Tensor | None = None
    max_seqlen_q: int = 0
    max_seqlen_k: int = 0
    mask: Tensor | None = None  # bool (batch or 1, num_heads or 1, seqlen_q, seqlen_k)

    def __str__(self) -> str:
        window = f"window_size={self.window_size}"
        if self.kind == "window":
            padding = "" if self.key_padding_mask is None else " and a key_padding_mask"
            return f"window: {window} over {self.num_keys} keys{padding}"
        if self.kind == "lengths":
            return f"lengths: {window} that ends at seqlens_k"
        if self.kind == "documents":
            assert self.cu_seqlens_q is not None
            return f"documents: {len(self.cu_seqlens_q) - 1} packed sequences, {window} in each"
        assert self.mask is not None
        return f"dense: a boolean mask of {tuple(self.mask.shape)}"


# ------------------------------------------------------------------------------------------------ the mask itself


class _Grid:
    """A block mask's elements, evaluated some rows at a time."""

    def __init__(self, block_mask: Any, batch: int, num_heads: int) -> None:
        self.seqlen_q, self.seqlen_k = block_mask.seq_lengths
        self.mod, self.block_mask = block_mask.mask_mod, block_mask
        self.device = block_mask.kv_num_blocks.device
        blocks = (_listed(block_mask, "kv"), _listed(block_mask, "full_kv"))
        for dim, size, name in ((0, batch, "batch"), (1, num_heads, "num_heads")):
            if blocks[0].shape[dim] not in (1, size):
                raise ValueError(f"block_mask has {name} {blocks[0].shape[dim]}; allowed: 1 or {size}, as the query")
            if all(_same_along(b, dim) for b in blocks):
                blocks = (blocks[0].narrow(dim, 0, 1), blocks[1].narrow(dim, 0, 1))
        self.partial, self.full = blocks
        self.batch = batch if blocks[0].shape[0] > 1 or self._depends_on(0, batch) else 1
        self.num_heads = num_heads if blocks[0].shape[1] > 1 or self._depends_on(1, num_heads) else 1

    def indices(self, *sizes: int) -> list[Tensor]:
        return [torch.arange(n, device=self.device) for n in sizes]

    def _depends_on(self, dim: int, size: int) -> bool:
        """Does the mask's value come from this index at all? Asked of its data flow, so the answer holds everywhere."""
        if size == 1 or self.mod is _noop_mask():
            return False
        try:
            with indexable():
                torch.vmap(self.mod, in_dims=tuple(0 if d == dim else None for d in range(4)), out_dims=None)(
                    *(i if d == dim else i[0] for d, i in enumerate(self.indices(2, 2, 2, 2)))
                )
        except ValueError:  # "cannot return a BatchedTensor": yes. Should the mod itself fail, it does so again soon
            return True
        return False

    def rows(self, begin: int, end: int) -> Tensor:
        """bool (batch, num_heads, end - begin, seqlen_k), as FlexAttention's kernels see it: blocks that are not
        listed are hidden whatever the mask_mod says, full ones visible.
        """
        function = self.mod
        for place in (3, 2, 1, 0):
            function = torch.vmap(function, in_dims=tuple(0 if d == place else None for d in range(4)))
        b, h, q, k = self.indices(self.batch, self.num_heads, end, self.seqlen_k)
        with indexable():
            mask = function(b, h, q[begin:], k)
        if mask.dtype != torch.bool:
            raise TypeError(f"block_mask.mask_mod returns {mask.dtype}; allowed: torch.bool")
        # One row of blocks after the other: to spread all of them over the elements took longer than the mask.
        block_q, block_k = self.block_mask.BLOCK_SIZE
        place, result = k // block_k, torch.empty_like(mask, memory_format=torch.contiguous_format)
        for row in range(begin // block_q, -(-end // block_q)):
            part = slice(max(row * block_q, begin) - begin, min(row * block_q + block_q, end) - begin)
            partial, full = (blocks[:, : self.num_heads, row : row + 1, place] for blocks in (self.partial, self.full))
            torch.logical_and(mask[:, :, part], partial, out=result[:, :, part]).logical_or_(full)
        return result

    def chunks(self) -> Iterator[tuple[int, int]]:
        step = max(1, _CHUNK // max(1, self.batch * self.num_heads * self.seqlen_k))
        for begin in range(0, self.seqlen_q, step):
            yield begin, min(begin + step, self.seqlen_q)

    def dense(self) -> Tensor:
        shape = (self.batch, self.num_heads, self.seqlen_q, self.seqlen_k)
        size = self.batch * self.num_heads * self.seqlen_q * self.seqlen_k
        if size > DENSE_LIMIT:
            raise UnsupportedError(
                f"block_mask is none of the masks known as intervals (causal, sliding window, padding, documents), and "
                f"as a boolean mask of {shape} it has {size} elements; allowed: at most {DENSE_LIMIT}. "
                "torch.nn.attention.flex_attention.flex_attention runs it"
            )
        result = torch.empty(shape, dtype=torch.bool, device=self.device)
        for begin, end in self.chunks():
            result[:, :, begin:end] = self.rows(begin, end)
        return result


def indexable() -> Any:
    """Inside, ``table[index]`` works where vmap stands behind the index, as in FlexAttention."""
    from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex

    return TransformGetItemToIndex()


def _noop_mask() -> Any:
    from torch.nn.attention.flex_attention import noop_mask

    return noop_mask


def _listed(block_mask: Any, kind: str) -> Tensor:
    """Which blocks a list names: bool (batch, num_heads, blocks of rows, blocks of keys)."""
    block_q, block_k = block_mask.BLOCK_SIZE
    seqlen_q, seqlen_k = block_mask.seq_lengths
    counts, indices = getattr(block_mask, f"{kind}_num_blocks"), getattr(block_mask, f"{kind}_indices")
    leading = block_mask.kv_num_blocks.shape[:2]
    size = max(-(-seqlen_k // block_k), block_mask.kv_indices.shape[-1])
    rows = max(-(-seqlen_q // block_q), block_mask.kv_indices.shape[-2])
    blocks = torch.zeros((*leading, rows, size + 1), dtype=torch.bool, device=block_mask.kv_num_blocks.device)
    if counts is not None:
        places = torch.arange(indices.shape[-1], device=indices.device)
        used = torch.where(places < counts[..., None], indices.long(), size)  # what is not used goes past the end
        blocks[..., : indices.shape[-2], :].scatter_(-1, used, True)
    return blocks[..., :size]


def _same_along(blocks: Tensor, dim: int) -> bool:
    return blocks.shape[dim] <= 1 or bool((blocks == blocks.narrow(dim, 0, 1)).all())


# ----------------------------------------------------------------------------------------- what each row sees


@dataclass(frozen=True)
class _Rows:
    """Of each row the first key seen, one past the last, and how many: (batch, seqlen_q), the same in every head; where
    there is none, lo == hi.

    ``keep`` (batch, seqlen_k): keys that some row sees.
    """

    lo: Tensor
    hi: Tensor
    count: Tensor
    keep: Tensor

    @property
    def seen(self) -> Tensor:
        return self.count > 0

    @property
    def are_intervals(self) -> bool:
        return bool((self.count == self.hi - self.lo).all())


def _rows_of(grid: _Grid) -> _Rows | None:
    """None where heads differ."""
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    keep = torch.zeros((grid.batch, grid.seqlen_k), dtype=torch.bool, device=grid.device)
    for begin, end in grid.chunks():
        mask = grid.rows(begin, end)
        if mask.shape[1] > 1 and not bool((mask == mask[:, :1]).all()):
            return None
        mask = mask[:, 0]  # (batch, rows, seqlen_k)
        ones = mask.view(torch.uint8)  # of equal numbers argmax takes the first
        lo, count = ones.argmax(-1), mask.sum(-1, dtype=torch.int32).long()
        hi = torch.where(count > 0, grid.seqlen_k - ones.flip(-1).argmax(-1), lo)
        parts.append((lo, hi, count))
        keep |= mask.any(1)
    lo, hi, count = (torch.cat(part, 1) for part in zip(*parts, strict=True))
    return _Rows(lo, hi, count, keep)


def _fit(rows: _Rows, position: Tensor, begin: Tensor | int, end: Tensor | int) -> tuple[int, int]:
    """The tightest (left, right) around ``position``, UNBOUNDED where it cuts nothing off [begin, end)."""
    seen = rows.seen
    if not bool(seen.any()):
        return UNBOUNDED, UNBOUNDED
    left = int((position - rows.lo)[seen].max())
    right = int((rows.hi - 1 - position)[seen].max())
    if left >= int((position - begin).max()):
        left = UNBOUNDED
    if right >= int((end - 1 - position).max()):
        right = UNBOUNDED
    return left, right


def _public(left: int, right: int) -> Window:
    return (None if left >= UNBOUNDED else left, None if right >= UNBOUNDED else right)


def _window(rows: _Rows, seqlen_k: int) -> dict[str, Any] | None:
    """One window for all, and of each sequence the keys that are kept.

    Rows are no wider than both by construction, so equal numbers of keys mean equal keys.
    """
    seqlen_q = rows.lo.shape[1]
    i = torch.arange(seqlen_q, device=rows.lo.device)
    kept = rows.keep.any(0).nonzero().flatten()  # of all sequences
    first, last = (int(kept[0]), int(kept[-1])) if len(kept) else (0, 0)
    left, right = _fit(rows, i, first, last + 1)
    lo, hi = (i - left).clamp(0, seqlen_k), (i + right + 1).clamp(0, seqlen_k)
    below = torch.nn.functional.pad(rows.keep.long().cumsum(1), (1, 0))  # kept keys before each
    if not torch.equal(rows.count, (below[:, torch.maximum(lo, hi)] - below[:, lo])):
        return None
    # attention() aligns the last row with the last key, and windows reach to both sides of it. So what it is given ends
    # with the last key that is seen; where that is before the last row's window, the last rows see nothing.
    num_keys = last + 1
    offset = num_keys - seqlen_q
    if left < UNBOUNDED:
        left += offset
    if right < UNBOUNDED:
        right -= offset
    if left < 0:
        return None
    keep = rows.keep[:, :num_keys]
    return {
        "kind": "window",
        "window_size": _public(left, right),
        "num_keys": num_keys,
        "key_padding_mask": None if bool(keep.all()) else keep.contiguous(),
    }


def _lengths(rows: _Rows) -> dict[str, Any] | None:
    """A window whose last row stands at the last key of each sequence: a cache with lengths of its own."""
    seqlen_q = rows.lo.shape[1]
    end = rows.hi.amax(1, keepdim=True)  # (batch, 1)
    position = torch.arange(seqlen_q, device=end.device) + end - seqlen_q
    left, right = _fit(rows, position, 0, end)
    lo = (position - left).clamp(min=0)
    hi = torch.minimum(position + right + 1, end)
    if left < 0 or not _same_intervals(rows, lo, hi):
        return None
    return {"kind": "lengths", "window_size": _public(left, right), "seqlens_k": end.flatten().int()}


def _same_intervals(rows: _Rows, lo: Tensor, hi: Tensor) -> bool:
    empty = lo >= hi
    equal = (rows.lo == lo) & (rows.hi == hi)
    return bool(torch.where(empty, ~rows.seen, equal).all())


def _sequences(lo: list[int], hi: list[int], seqlen_k: int) -> list[tuple[int, int, int]] | None:
    """One batch entry as sequences (rows, keys, first key), one after the other; None where rows do not allow it.

    Where no row sees the keys on both sides, a sequence may end. Rows that see nothing and keys that nobody sees are
    sequences without keys and without rows.
    """
    crossing = [0] * (seqlen_k + 1)  # how many rows see both k - 1 and k, as differences
    for a, b in zip(lo, hi, strict=True):
        if b - a > 1:
            crossing[a + 1] += 1
            crossing[b] -= 1
    cuts = [k for k, n in enumerate(itertools.accumulate(crossing)) if n == 0] + [seqlen_k]
    begin_of = [0] * (seqlen_k + 1)
    end_of = list(begin_of)
    for a, b in itertools.pairwise(cuts):
        begin_of[a:b], end_of[a:b] = [a] * (b - a), [b] * (b - a)
    result, used = [], 0
    starts = (begin_of[a] if a < b else None for a, b in zip(lo, hi, strict=True))
    for begin, group in itertools.groupby(starts):
        num_rows = len(list(group))
        if begin is None:
            result.append((num_rows, 0, used))
            continue
        if begin < used:  # back to keys that an earlier sequence has taken
            return None
        if begin > used:
            result.append((0, begin - used, used))
        used = end_of[begin]
        result.append((num_rows, used - begin, begin))
    if used < seqlen_k:
        result.append((0, seqlen_k - used, used))
    return result


def _documents(rows: _Rows, seqlen_k: int, batch: int) -> dict[str, Any] | None:
    """Sequences packed one after the other, and one window in all of them."""
    found = [_sequences(lo, hi, seqlen_k) for lo, hi in zip(rows.lo.tolist(), rows.hi.tolist(), strict=True)]
    begins, ends, shifts = [], [], []  # per row: its sequence's keys, and position minus row
    for sequences in found:
        if sequences is None:
            return None
        row = 0
        for num_rows, num_keys, first in sequences:
            row += num_rows
            begins += [first] * num_rows
            ends += [first + num_keys] * num_rows
            shifts += [first + num_keys - row] * num_rows
    begin, end, shift = (torch.tensor(t, device=rows.lo.device).view_as(rows.lo) for t in (begins, ends, shifts))
    position = torch.arange(rows.lo.shape[1], device=rows.lo.device) + shift
    left, right = _fit(rows, position, begin, end)
    lo, hi = torch.maximum(begin, position - left), torch.minimum(end, position + right + 1)
    if not _same_intervals(rows, lo, hi):
        return None
    sizes = [s for sequences in found if sequences is not None for s in sequences] * (batch // len(found))
    cu = [[0, *itertools.accumulate(s[side] for s in sizes)] for side in (0, 1)]
    cu_q, cu_k = (torch.tensor(c, dtype=torch.int32, device=rows.lo.device) for c in cu)
    return {
        "kind": "documents",
        "window_size": _public(left, right),
        "cu_seqlens_q": cu_q,
        "cu_seqlens_k": cu_k,
        "max_seqlen_q": max(s[0] for s in sizes),
        "max_seqlen_k": max(s[1] for s in sizes),
    }


def recognize(block_mask: Any, batch: int = 1, num_heads: int = 1) -> RecognizedMask:
    """Read a ``BlockMask``: every element of it is evaluated, some rows at a time.

    Args:
        block_mask: ``torch.nn.attention.flex_attention.BlockMask``; its batch and heads are 1 or those given.
        batch, num_heads: of the query.

    Returns:
        a :class:`RecognizedMask` that says exactly the same. ``print`` shows what was found. It is a snapshot: tensors
        that the ``mask_mod`` reads may change afterwards without effect on it.

    Raises:
        TypeError, ValueError: it is not a block mask, or one of other sizes.
        UnsupportedError: it is no family of intervals, and too large for a boolean mask.
    """
    _check_block_mask(block_mask)
    with torch.no_grad(), torch.inference_mode(False):  # what is kept may be used in training later
        return _recognize(block_mask, batch, num_heads)


def _recognize(block_mask: Any, batch: int, num_heads: int) -> RecognizedMask:
    grid = _Grid(block_mask, batch, num_heads)
    size: dict[str, Any] = {"batch": batch, "num_heads": num_heads, "seq_lengths": (grid.seqlen_q, grid.seqlen_k)}
    rows = _rows_of(grid) if grid.seqlen_q and grid.seqlen_k else None
    if rows is not None:
        found = _window(rows, grid.seqlen_k)
        if found is None and rows.are_intervals:
            found = _lengths(rows) or _documents(rows, grid.seqlen_k, batch)
        if found is not None:
            for name in ("key_padding_mask", "seqlens_k"):
                if found.get(name) is not None:
                    found[name] = found[name].expand(batch, *found[name].shape[1:]).contiguous()
            return RecognizedMask(**found, **size)
        grid.num_heads = 1  # they are all the same
    return RecognizedMask("dense", **size, mask=grid.dense())


def _check_block_mask(block_mask: Any) -> None:
    for name in ("mask_mod", "seq_lengths", "kv_num_blocks", "kv_indices", "BLOCK_SIZE"):
        if not hasattr(block_mask, name):
            raise TypeError(
                f"block_mask is of type {type(block_mask).__name__}; allowed: None, a BlockMask of "
                "torch.nn.attention.flex_attention, or what recognize() made of one"
            )
    if block_mask.kv_num_blocks.dim() != 3:
        shape = tuple(block_mask.kv_num_blocks.shape)
        raise ValueError(f"block_mask has kv_num_blocks of {shape}; allowed: (batch, num_heads, blocks of rows)")
