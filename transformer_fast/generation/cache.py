"""Keys and values of the tokens so far, kept for the next ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from transformer_fast.attention import attention
from transformer_fast.models.layers import AttentionOptions, fused_attention
from transformer_fast.models.layout import TokenLayout

#: Attention is shown a multiple of so many slots, of which ``seqlens_k`` says how many are filled: a shape that it has
#: not seen before takes it 150 us to check and plan (on a CPU), which every step would pay otherwise.
_GRAIN = 128


@dataclass(frozen=True)
class CacheShape:
    """What one layer keeps of a token. ``window``: how many tokens a query sees, itself included; None is all."""

    num_kv_heads: int
    head_dim: int
    window: int | None = None


class _Step:
    """One forward pass: where its rows stand and go. Worked out once, for all layers."""

    def __init__(self, layout: TokenLayout, before: Tensor, *, is_first: bool, slot: int | None = None) -> None:
        self.layout, self.before, self.is_first = layout, before, is_first
        #: Where the rows of the only sequence go, if that is known without waiting for the device.
        self.slot = slot
        self.seqlens = before + layout.lengths
        self._places: dict[int | None, tuple[Tensor | None, Any]] = {}
        self._visible: dict[int, dict[str, Any]] = {}

    @cached_property
    def index(self) -> Tensor:
        """``(tokens,)`` int64: which token of its sequence each row is."""
        layout, ids = self.layout, self.layout.sequence_ids
        if layout.cu_seqlens is not None:
            return torch.arange(len(ids), device=ids.device) - layout.cu_seqlens[ids]
        if layout.key_padding_mask is not None:
            return layout.key_padding_mask.cumsum(1).flatten() - 1
        return (torch.arange(layout.seqlen, device=ids.device) + self.before[:, None]).flatten()

    def places(self, ring: int | None) -> tuple[Tensor | None, Any]:
        """The rows to keep, None for all, and the index into ``(batch, heads, slots, head_dim)`` where they go.

        A slice of the slots where there is one sequence, which is copied in a third of the time.
        A row per slot at most: of a prompt that is longer than the ring its last tokens, to find which of a padded
        batch waits for the device.
        """
        if ring is None and self.slot is not None:
            return None, slice(self.slot, self.slot + self.layout.max_seqlen)
        if ring not in self._places:
            rows, ids, index = None, self.layout.sequence_ids, self.index
            mask, is_long = self.layout.key_padding_mask, ring is not None and self.layout.max_seqlen > ring
            if mask is not None or is_long:
                keep = torch.ones_like(index, dtype=torch.bool) if mask is None else mask.flatten()
                if ring is not None:
                    keep = keep & (index >= self.seqlens[ids] - ring)
                rows = keep.nonzero().squeeze(1)
                ids, index = ids[rows], index[rows]
            self._places[ring] = rows, (ids, slice(None), index if ring is None else index % ring)
        return self._places[ring]

    def visible(self, window: int, ring: int) -> dict[str, Any]:
        """How queries that see ``window`` tokens attend to the slots of a ring, as arguments of ``attention``.

        The order of keys does not matter once they carry their positions, so that the ring is read as it lies. A slot
        is hidden by its token's age: slots without a token yet, and those of tokens taken back, look too old.
        """
        if window not in self._visible:
            how: dict[str, Any] = {"causal": False, "window_size": None}
            if window == ring:  # one row, which sees all that there is
                how["seqlens_k"] = self.seqlens.clamp(max=window)
            else:
                position = self.index.view(self.layout.batch, -1, 1)
                age = (position - torch.arange(ring, device=position.device)) % ring
                seen = (age < window) & (age <= position)  # (batch, seqlen, ring)
                how |= {"key_padding_mask": seen[:, 0]} if self.layout.seqlen == 1 else {"bias": seen[:, None]}
            self._visible[window] = how
        return self._visible[window]


def _write(buffer: Tensor, key: Tensor, value: Tensor, places: tuple[Tensor | None, Any]) -> None:
    """Rows into a buffer ``(2, batch, heads, slots, head_dim)``; a cache takes no part in gradients."""
    rows, where = places
    for part, new in zip(buffer, (key.detach(), value.detach()), strict=True):
        if isinstance(where, slice):
            part[0, :, where] = new.transpose(0, 1)
            continue
        part[where] = (new if rows is None else new[rows]).to(part.dtype)  # autocast leaves keys wide


class KVCache:
    """Preallocated keys and values, written in place; sequences may differ in length.

    ``buffers`` holds for each layer its keys and values ``(2, batch, num_kv_heads, slots, head_dim)``, allocated on
    first use. One head's keys lie together, which is the order in which decoding reads them. A layer with a window
    keeps a ring of ``window + slack`` slots, where that is less than the capacity: token ``i`` is in slot ``i % ring``.

    Args:
        batch: number of sequences.
        layers: what each layer keeps.
        capacity: tokens of a sequence that there is room for; one token more and it grows by half or more, by copying.
        slack: how many of the latest tokens :meth:`crop` can always take back, for speculative decoding.
    """

    def __init__(
        self,
        batch: int,
        layers: Sequence[CacheShape],
        capacity: int,
        *,
        device: torch.device | str,
        dtype: torch.dtype,
        slack: int = 0,
    ) -> None:
        for name, number, least in (("batch", batch, 1), ("capacity", capacity, 1), ("slack", slack, 0)):
            if number < least:
                raise ValueError(f"{name}={number} must be at least {least}")
        self.batch, self.layers, self.capacity, self.slack = batch, tuple(layers), capacity, slack
        self.device, self.dtype = torch.device(device), dtype
        self.buffers: list[Tensor | None] = [None] * len(self.layers)
        self.seqlens = torch.zeros(batch, dtype=torch.int32, device=device)
        self.max_seqlen = 0
        #: Columns of the grids so far, which of the first one's were padding (False), and whether positions are counted
        #: by each sequence's tokens; a model's ``forward`` goes by columns.
        self.columns, self.by_token = 0, False
        self.padding: Tensor | None = None
        #: Is max_seqlen the length of the only sequence there ever was, or an upper bound?
        self._is_exact = True
        self._highest: Tensor | None = None  # lengths before tokens were taken back, where some were
        self._step: _Step | None = None

    @property
    def is_empty(self) -> bool:
        """Whether no token has been taken in yet."""
        return self.max_seqlen == 0

    @property
    def nbytes(self) -> int:
        """Memory of the buffers."""
        return sum(buffer.nbytes for buffer in self.buffers if buffer is not None)

    def extend(self, layout: TokenLayout) -> None:
        """Take in the tokens of ``layout``: their number now, their keys and values as each layer makes them.

        A first prompt may be packed or padded; what comes later is dense.
        """
        if layout.batch != self.batch:
            raise ValueError(f"the layout has batch {layout.batch}; allowed: {self.batch}, as the cache")
        if not self.is_empty and (layout.cu_seqlens is not None or layout.key_padding_mask is not None):
            raise ValueError("an attention_mask is for the first prompt; a cache that is in use takes unpadded tokens")
        self._is_exact = self._is_exact and layout.batch == 1 and layout.key_padding_mask is None
        slot = self.max_seqlen if self._is_exact else None
        self._step = _Step(layout, self.seqlens, is_first=self.is_empty, slot=slot)
        if self.is_empty:
            self.padding = layout.mask
        self.columns += layout.seqlen
        self.seqlens = self._step.seqlens
        self.max_seqlen += layout.max_seqlen
        if self.max_seqlen > self.capacity:
            self.capacity = max(self.max_seqlen, self.capacity + (self.capacity + 1) // 2)

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        layout: TokenLayout,
        options: AttentionOptions,
        bias: Tensor | None = None,
    ) -> Tensor:
        """Keep a layer's new keys and values, and attend to all so far.

        Args:
            query: ``(tokens, num_heads, head_dim)`` in the layout that :meth:`extend` was given.
            key, value: ``(tokens, num_kv_heads, head_dim)`` of the same tokens.
            bias: added to the scores, ``(1 or batch, num_heads, seqlen, max_seqlen)``; for layers without a window.

        Returns:
            ``(tokens, num_heads, head_dim)``.
        """
        step, buffer, ring = self._step, self._buffer(layer, value.dtype), self._ring(layer)
        assert step is not None, "extend() comes before attend()"
        how = options.arguments()
        if step.is_first:  # nothing to read back
            _write(buffer, key, value, step.places(ring))
            return fused_attention(query, key, value, layout, options, bias=bias)
        if ring is None or self.max_seqlen <= ring:  # each token is in the slot of its number
            how |= {"seqlens_k": self.seqlens, "bias": bias}
            _write(buffer, key, value, step.places(ring))
            longest = self.max_seqlen if bias is not None else -(-self.max_seqlen // _GRAIN) * _GRAIN
            buffer = buffer[:, :, :, :longest]
        else:
            window = ring - self.slack
            self._check_window(layer, window, options, bias)
            if layout.seqlen > self.slack + 1:  # the new tokens take the slots of some that the first of them sees
                latest, how["seqlens_k"] = self._latest(buffer, key, value, window, ring)
            else:
                latest, how = buffer, how | step.visible(window, ring)
            _write(buffer, key, value, step.places(ring))
            buffer = latest
        out = cast(Tensor, attention(layout.to_grid(query).transpose(1, 2), buffer[0], buffer[1], **how))
        return layout.take_rows(out.transpose(1, 2))

    def _ring(self, layer: int) -> int | None:
        window = self.layers[layer].window
        return None if window is None else window + self.slack

    def _check_window(self, layer: int, window: int, options: AttentionOptions, bias: Tensor | None) -> None:
        if not options.causal or options.window_size is None or options.window_size[0] + 1 != window:
            raise ValueError(
                f"layer {layer} asks for causal={options.causal}, window_size={options.window_size}; "
                f"allowed: causal with the window of {window} tokens that its cache is made for"
            )
        if bias is not None:
            raise ValueError(f"layer {layer} has a bias and a window of {window} tokens; allowed: one of them")

    def _buffer(self, layer: int, dtype: torch.dtype) -> Tensor:
        """The layer's buffer, allocated or grown when it is too small. A ring that grows has not been filled yet."""
        shape, old = self.layers[layer], self.buffers[layer]
        slots = min(self.capacity, self._ring(layer) or self.capacity)
        if old is not None and old.shape[3] >= slots:
            return old
        # Not read before it is written: the slots past seqlens need no value.
        size = (2, self.batch, shape.num_kv_heads, slots, shape.head_dim)
        buffer = torch.empty(size, device=self.device, dtype=dtype)  # autocast's, where it is on
        if old is not None:
            buffer[:, :, :, : old.shape[3]] = old
        self.buffers[layer] = buffer
        return buffer

    def _latest(self, buffer: Tensor, key: Tensor, value: Tensor, window: int, ring: int) -> tuple[Tensor, Tensor]:
        """What the queries of a longer piece see: the tokens in a ring that the first of them sees, then the new ones.

        Returns:
            keys and values ``(2, batch, num_kv_heads, seqlen_k, head_dim)`` and their lengths ``(batch,)`` int32.
        """
        step, (_, _, heads, _, head_dim) = self._step, buffer.shape
        assert step is not None
        ids, new = step.layout.sequence_ids, step.layout.seqlen
        old = min(window - 1, self.max_seqlen - new)
        first = (step.before - (window - 1)).clamp(min=0)  # of each sequence, the oldest token that is seen
        slots = (first[:, None] + torch.arange(old, device=self.device)) % ring  # (batch, old)
        rings = torch.arange(2 * self.batch * heads, device=self.device).view(2, self.batch, heads, 1)
        # Keys stand in the order of their positions, without gaps where a sequence has fewer old ones.
        latest = buffer.new_empty(2, self.batch, heads, old + new, head_dim)
        latest[:, :, :, :old] = F.embedding(rings * ring + slots[:, None], buffer.view(-1, head_dim))
        _write(latest, key, value, (None, (ids, slice(None), step.index - first[ids])))
        return latest, self.seqlens - first

    def reorder(self, index: Tensor) -> None:
        """Row ``i`` becomes what row ``index[i]`` was, for beam search; ``index`` ``(new_batch,)`` int64."""
        for layer, old in enumerate(self.buffers):
            if old is not None:
                filled = min(self.max_seqlen, old.shape[3])
                new = old.new_empty(2, len(index), *old.shape[2:])
                new[:, :, :, :filled] = old[:, :, :, :filled].index_select(1, index)
                self.buffers[layer] = new
        self.batch, self.seqlens, self._step = len(index), self.seqlens[index], None
        self._highest = None if self._highest is None else self._highest[index]
        self.padding = None if self.padding is None else self.padding[index]

    def crop(self, seqlens: Tensor | Sequence[int]) -> None:
        """Forget what comes after these many tokens of each sequence ``(batch,)``. Waits for the device.

        Raises:
            ValueError: a layer with a window has overwritten tokens that the next one would see; nothing is changed.
        """
        wanted = torch.as_tensor(seqlens, dtype=torch.int32, device=self.device).minimum(self.seqlens)
        highest = self.seqlens if self._highest is None else self._highest.maximum(self.seqlens)
        lengths = list(zip(*torch.stack((wanted, highest)).tolist(), strict=True))
        if min(length for length, _ in lengths) < 0:
            raise ValueError(f"seqlens={[length for length, _ in lengths]}; allowed: at least 0")
        for window in {shape.window for shape in self.layers if shape.window is not None}:
            for row, (length, high) in enumerate(lengths):
                # Tokens before `lost` are overwritten, and the next token sees those from `first` on.
                lost, first = high - window - self.slack, max(length - window + 1, 0)
                if first < min(lost, length):
                    raise ValueError(
                        f"seqlens[{row}]={length} of {high} tokens forgets too many for a window of {window} tokens; "
                        f"allowed: at most slack={self.slack} fewer than there have been"
                    )
        self.seqlens, self._highest, self._step = wanted, highest, None
        before, self.max_seqlen = self.max_seqlen, max(length for length, _ in lengths)
        self._is_exact = self.batch == 1
        self.columns -= before - self.max_seqlen


class CrossCache:
    """Keys and values of an encoder's rows, computed once for the cross-attention of a decoder's every step."""

    def __init__(self) -> None:
        self.buffers: dict[int, Tensor] = {}
        #: ``(batch,)`` int32, None where all are as long as the buffers.
        self.seqlens: Tensor | None = None

    def has(self, layer: int) -> bool:
        """Whether the layer's keys and values are stored."""
        return layer in self.buffers

    def store(self, layer: int, key: Tensor, value: Tensor, layout: TokenLayout) -> None:
        """Keep rows ``(tokens, num_kv_heads, head_dim)`` as ``(2, batch, num_kv_heads, longest, head_dim)``."""
        step = _Step(layout, torch.zeros(layout.batch, dtype=torch.int32, device=key.device), is_first=True)
        buffer = key.new_empty(2, layout.batch, key.shape[1], layout.max_seqlen, key.shape[2])
        _write(buffer, key, value, step.places(None))
        self.buffers[layer] = buffer
        self.seqlens = None if layout.cu_seqlens is None and layout.key_padding_mask is None else step.seqlens

    def attend(self, layer: int, query: Tensor, layout: TokenLayout, options: AttentionOptions) -> Tensor:
        """Queries ``(tokens, num_heads, head_dim)`` see all keys of their sequence; returns the same shape."""
        key, value = self.buffers[layer]
        how = options.arguments() | {"causal": False, "window_size": None, "seqlens_k": self.seqlens}
        out = cast(Tensor, attention(layout.to_grid(query).transpose(1, 2), key, value, **how))
        return layout.take_rows(out.transpose(1, 2))

    def reorder(self, index: Tensor) -> None:
        """As :meth:`KVCache.reorder`. Beams of one prompt have equal keys and may change places without it."""
        self.buffers = {layer: buffer.index_select(1, index) for layer, buffer in self.buffers.items()}
        self.seqlens = None if self.seqlens is None else self.seqlens[index]
