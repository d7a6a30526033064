"""The same attention in plain PyTorch, to put inside the same model: eager, and PyTorch's own fused function.

Both take dense layouts only, as PyTorch's functions do: they compute the padding of a padded batch.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from transformer_fast.models.layers import AttentionOptions
from transformer_fast.models.layout import TokenLayout


@lru_cache(maxsize=16)
def _band(seqlen: int, causal: bool, window_size: tuple[int, int] | None) -> Tensor:
    """``(seqlen, seqlen)`` bool, True = visible. Kept, so that no peer is charged for building it."""
    ahead = torch.arange(seqlen) - torch.arange(seqlen)[:, None]
    left, right = window_size if window_size is not None else (seqlen, seqlen)
    return (ahead >= -left) & (ahead <= (0 if causal else right))


def dense_mask(layout: TokenLayout, options: AttentionOptions) -> Tensor | None:
    """What the peers need to be told to see what ours sees, broadcastable to ``(batch, heads, seqlen, seqlen)``."""
    if layout.cu_seqlens is not None or layout.seqlens_k is not None:
        raise ValueError("the peers take padded batches without a cache")
    mask = None
    if options.causal or options.window_size is not None:
        mask = _band(layout.seqlen, options.causal, options.window_size)[None, None]
    if layout.key_padding_mask is not None:
        keep = layout.key_padding_mask[:, None, None]
        mask = keep if mask is None else mask & keep
    return mask


def eager_attention(
    query: Tensor, key: Tensor, value: Tensor, layout: TokenLayout, options: AttentionOptions
) -> Tensor:
    """Attention written out: scores, mask, softmax, weighted sum."""
    query, key, value = (layout.heads_first(x) for x in (query, key, value))
    group_size = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group_size, 1), value.repeat_interleave(group_size, 1)
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    mask = dense_mask(layout, options)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return (scores.softmax(-1) @ value).transpose(1, 2).flatten(0, 1)


def sdpa_attention(query: Tensor, key: Tensor, value: Tensor, layout: TokenLayout, options: AttentionOptions) -> Tensor:
    """``torch.nn.functional.scaled_dot_product_attention``, told what it can be told without a mask."""
    query, key, value = (layout.heads_first(x) for x in (query, key, value))
    only_causal = options.causal and options.window_size is None and layout.key_padding_mask is None
    out = F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=None if only_causal else dense_mask(layout, options),
        is_causal=only_causal,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return out.transpose(1, 2).flatten(0, 1)
