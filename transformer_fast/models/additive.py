"""Attention as Bahdanau et al. (2015) introduced it, and scaled dot products behind the same interface.

A reference, to compare and to read: both hold a vector for each pair of a query and a key.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from transformer_fast import attention


def masked_softmax(scores: Tensor, keep: Tensor) -> Tensor:
    """Softmax of the scores over the last dimension where ``keep`` is True; 0 elsewhere, and in rows without any.

    What ``scores`` holds elsewhere, NaN too, reaches neither the result nor a gradient.
    """
    empty = ~keep.any(dim=-1, keepdim=True)
    return scores.masked_fill(~keep, -torch.inf).masked_fill(empty, 0.0).softmax(dim=-1).masked_fill(~keep, 0.0)


class AdditiveAttention(nn.Module):
    """Scores ``v^T tanh(W_q q + W_k k)``; their softmax over the keys weighs the values."""

    def __init__(self, dim_q: int, dim_k: int, hidden_size: int) -> None:
        super().__init__()
        self.query = nn.Linear(dim_q, hidden_size, bias=False)
        self.key = nn.Linear(dim_k, hidden_size, bias=False)
        self.score = nn.Linear(hidden_size, 1, bias=False)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, *, key_padding_mask: Tensor | None = None, causal: bool = False
    ) -> tuple[Tensor, Tensor]:
        """The weighted values, and the weights.

        Args:
            query: (batch, seqlen_q, d_q).
            key: (batch, seqlen_k, d_k).
            value: (batch, seqlen_k, d_v).
            key_padding_mask: bool (batch, seqlen_k), True = keep.
            causal: the last query sees the last key, as in :func:`transformer_fast.attention`.

        Returns:
            (batch, seqlen_q, d_v) and (batch, seqlen_q, seqlen_k). A query that sees no key gets zeros. What a query
            does not see, be it NaN, reaches neither its results nor the gradients through them.
        """
        query, key, keep = self._project(query, key, key_padding_mask, causal)
        hidden = ~keep[..., None]
        pairs = (query[:, :, None] + key[:, None]).masked_fill(hidden, 0.0)  # (batch, seqlen_q, seqlen_k, hidden_size)
        weights = masked_softmax(self.score(pairs.tanh()).squeeze(-1), keep)
        return (weights[..., None] * value[:, None].masked_fill(hidden, 0.0)).sum(dim=2), weights

    def _project(
        self, query: Tensor, key: Tensor, key_padding_mask: Tensor | None, causal: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys (batch, seqlen, hidden_size), and which pairs are seen: (batch, seqlen_q, seqlen_k)."""
        keep = torch.ones(*query.shape[:2], key.shape[1], dtype=torch.bool, device=query.device)
        keep = keep.tril(key.shape[1] - query.shape[1]) if causal else keep
        keep = keep if key_padding_mask is None else keep & key_padding_mask[:, None]
        # Zero times NaN is NaN: rows in no pair must not be there when the gradients of the projections are made.
        query = query.masked_fill(~keep.any(dim=2)[..., None], 0.0)
        return self.query(query), self.key(key.masked_fill(~keep.any(dim=1)[..., None], 0.0)), keep


class ScaledDotProduct(AdditiveAttention):
    """Scores ``(W_q q) . (W_k k) / sqrt(hidden_size)``, with the values weighed by :func:`transformer_fast.attention`.

    The weights are computed once more for the caller, who in a real model does without them.
    """

    def __init__(self, dim_q: int, dim_k: int, hidden_size: int) -> None:
        super().__init__(dim_q, dim_k, hidden_size)
        del self.score

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, *, key_padding_mask: Tensor | None = None, causal: bool = False
    ) -> tuple[Tensor, Tensor]:
        """As :meth:`AdditiveAttention.forward`."""
        query, key, keep = self._project(query, key, key_padding_mask, causal)
        heads = (rows[:, None] for rows in (query, key, value))
        out = cast(Tensor, attention(*heads, key_padding_mask=key_padding_mask, causal=causal))
        pairs = query[:, :, None] * key[:, None].masked_fill(~keep[..., None], 0.0)
        return out[:, 0], masked_softmax(pairs.sum(dim=-1) * query.shape[-1] ** -0.5, keep)
