"""Keys and values of the tokens so far, kept for the next ones."""

from __future__ import annotations

import torch
from torch import Tensor

from transformer_fast.models.config import ModelConfig
from transformer_fast.models.layout import TokenLayout


class KVCache:
    """Preallocated keys and values, written in place.

    ``keys`` and ``values`` are ``(num_layers, batch, num_kv_heads, capacity, head_dim)``: one head's keys
    lie together in memory, which is the order in which decoding reads them. Sequences may differ in
    length; ``seqlens`` ``(batch,)`` int32 says how much of each is filled, and attention reads no further.
    """

    def __init__(
        self, config: ModelConfig, batch: int, capacity: int, *, device: torch.device, dtype: torch.dtype
    ) -> None:
        if config.positions == "learned" and capacity > config.max_positions:
            raise ValueError(f"capacity={capacity} is more than the model's max_positions={config.max_positions}")
        shape = (config.num_layers, batch, config.num_kv_heads, capacity, config.head_dim)
        self.capacity = capacity
        # Not read before it is written: the slots past seqlens need no value.
        self.keys = torch.empty(shape, device=device, dtype=dtype)
        self.values = torch.empty(shape, device=device, dtype=dtype)
        self.seqlens = torch.zeros(batch, dtype=torch.int32, device=device)
        # The longest sequence as a Python number, so that no step waits for the device to tell.
        self.max_seqlen = 0

    @property
    def is_empty(self) -> bool:
        """Whether no token has been taken in yet."""
        return self.max_seqlen == 0

    def extend(self, layout: TokenLayout) -> None:
        """Take in the tokens of ``layout``: their number now, their keys and values as each layer makes them."""
        if layout.cu_seqlens is not None and not self.is_empty:
            raise ValueError("an attention_mask is for the first prompt; a cache that is in use takes unpadded tokens")
        needed = self.max_seqlen + layout.max_seqlen
        if needed > self.capacity:
            raise ValueError(f"the cache has room for {self.capacity} tokens a sequence, and {needed} are needed")
        self.seqlens = self.seqlens + layout.lengths
        self.max_seqlen = needed

    def append(self, layer: int, key: Tensor, value: Tensor, layout: TokenLayout) -> tuple[Tensor, Tensor]:
        """Write the new rows ``(tokens, num_kv_heads, head_dim)``; returns what their queries attend to.

        For a first prompt that is the rows themselves. After that it is views into the cache,
        ``(batch, num_kv_heads, max_seqlen, head_dim)``, which ``layout.seqlens_k`` limits for each sequence.
        """
        where = (layout.sequence_ids, slice(None), layout.positions)
        keys, values = self.keys[layer], self.values[layer]
        keys[where] = key
        values[where] = value
        if layout.seqlens_k is None:
            return key, value
        return keys[:, :, : self.max_seqlen], values[:, :, : self.max_seqlen]
