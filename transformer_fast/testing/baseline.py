"""Attention in plain PyTorch: the second opinion, written from the definition and sharing nothing with the library.

It plays two parts. In the dtype of a problem it is the yardstick of the tolerance rule (how far off is PyTorch
itself?). In float64 it checks the oracle: two independent texts of the definition that agree are believed.

It is written for plainness: it materialises every score and repeats K and V for grouped queries.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from transformer_fast.testing.tolerance import ULPS

MINUS_INF = float("-inf")
#: What a unit in the last place of a half precision counts: all that the rule allows come to one and a half. One
#: rounding is off by half a unit at most, and a sum of rounded terms, the worst of thousands, by three times that.
STORED = 1.5 / ULPS


def visible_pairs(
    batch: int,
    seqlen_q: int,
    seqlen_k: int,
    *,
    causal: bool = False,
    window_size: tuple[int | None, int | None] | None = None,
    seqlens_k: list[int] | None = None,
    key_padding_mask: Tensor | None = None,
) -> Tensor:
    """Which query row sees which key: bool `(batch, 1, seqlen_q, seqlen_k)`, True where visible.

    Row i stands at position i + (key length - seqlen_q), so that the last row stands at the last key.
    `key_padding_mask` is bool `(batch, seqlen_k)`, True = keep, and moves no row.
    """
    row = torch.arange(seqlen_q)[:, None]
    key = torch.arange(seqlen_k)[None, :]
    left, right = window_size or (None, None)
    if causal:
        right = 0
    masks = []
    for b in range(batch):
        length = seqlen_k if seqlens_k is None else seqlens_k[b]
        position = row + length - seqlen_q
        mask = (key < length).expand(seqlen_q, seqlen_k)
        if left is not None and left >= 0:
            mask = mask & (key >= position - left)
        if right is not None and right >= 0:
            mask = mask & (key <= position + right)
        if key_padding_mask is not None:
            mask = mask & key_padding_mask[b].cpu()
        masks.append(mask)
    if not masks:
        return torch.ones(0, 1, seqlen_q, seqlen_k, dtype=torch.bool)
    return torch.stack(masks)[:, None]


def alibi_bias(slopes: Tensor, batch: int, seqlen_q: int, seqlen_k: int, seqlens_k: list[int] | None) -> Tensor:
    """`-slope * |distance|`, `(batch, num_heads, seqlen_q, seqlen_k)`; slopes `([batch,] num_heads)`."""
    row, key = torch.arange(seqlen_q)[:, None], torch.arange(seqlen_k)[None, :]
    lengths = torch.tensor([seqlen_k] * batch if seqlens_k is None else seqlens_k).reshape(batch, 1, 1)
    distance = (row + (lengths - seqlen_q) - key).abs()
    slopes = slopes.expand(batch, slopes.shape[-1])
    return -slopes[:, :, None, None] * distance[:, None].to(slopes.device, slopes.dtype)


def plain_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    visible: Tensor,
    softmax_scale: float,
    softcap: float | None = None,
    alibi: Tensor | None = None,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
    keep: Tensor | None = None,
    dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Naive eager attention in the dtype of the query.

    Args:
        query, key, value: `(batch, heads, seqlen, head_dim)`; fewer heads in key and value are repeated.
        visible: bool, broadcastable to the scores `(batch, num_heads, seqlen_q, seqlen_k)`.
        alibi, bias: float, broadcastable to the scores; added after the softcap.
        sinks: `(num_heads,)` extra logit of each row.
        keep: bool, as the scores: which probabilities dropout keeps.

    Returns:
        out, lse (float32 or wider), probabilities before dropout, and logits (-inf where not visible).
    """
    group_size = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group_size, dim=1), value.repeat_interleave(group_size, dim=1)
    logits = query @ key.transpose(-1, -2) * softmax_scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    for extra in (alibi, bias):
        if extra is not None:
            logits = logits + extra.to(logits.dtype)
    logits = logits.masked_fill(~visible, MINUS_INF)
    with_sink = logits
    if sinks is not None:
        column = sinks.to(logits.dtype)[None, :, None, None].expand(*logits.shape[:-1], 1)
        with_sink = torch.cat([logits, column], dim=-1)
    # A row that sees no key: zero probabilities instead of softmax's 0/0, in value and in gradient, sink or not.
    empty = (logits == MINUS_INF).all(dim=-1, keepdim=True)
    safe = with_sink.masked_fill(empty, 0.0)
    probabilities = torch.softmax(safe, dim=-1)[..., : logits.shape[-1]].masked_fill(logits == MINUS_INF, 0.0)
    lse = _logsumexp(safe).masked_fill(empty[..., 0], MINUS_INF)
    dropped = probabilities if keep is None else probabilities * keep / (1.0 - dropout_p)
    return dropped @ value, lse, probabilities, logits


def _logsumexp(logits: Tensor) -> Tensor:
    """Over the last dimension: exponentials in the dtype of the logits, like softmax, their sum in float32 or wider."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    if logits.shape[-1] == 0:
        return torch.full(logits.shape[:-1], MINUS_INF, dtype=wide, device=logits.device)
    largest = logits.detach().amax(dim=-1, keepdim=True)
    return largest[..., 0].to(wide) + torch.exp(logits - largest).sum(dim=-1, dtype=wide).log()


def rounding_units(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dout: Tensor,
    dlse: Tensor | None,
    *,
    dtype: torch.dtype,
    sinks: Tensor | None,
    bias: Tensor | None,
    softmax_scale: float,
    dropout_p: float,
    **options: Any,
) -> dict[str, Tensor]:
    """Size of a unit in the last place in each output and gradient, for the `unit` argument of the tolerance rule.

    That of the terms which are added up, in quadrature, as independent errors add: a result near zero is no more
    exact than its terms. Arithmetic is in float32 whatever the dtype; an error in a logit changes a probability in
    proportion. Numbers stored in `dtype` are rounded to it, but once and not at every step of a sum: its unit counts
    by `STORED`.

    Args:
        query, key, value, sinks, bias, options: float64, as for `plain_attention`.
        dout, dlse: incoming gradients, as out and lse.
        dtype: that of the problem.

    Returns:
        float64 tensors by name: out, lse, query, key, value, and bias and sinks if given.
    """
    out, lse, p, logits = plain_attention(
        query, key, value, sinks=sinks, bias=bias, softmax_scale=softmax_scale, dropout_p=dropout_p, **options
    )
    group = (key.shape[1], query.shape[1] // key.shape[1])
    key2, value2 = (t.square().repeat_interleave(group[1], dim=1) for t in (key, value))
    lse = lse.masked_fill(lse == MINUS_INF, 0.0)
    logit_size = logits.masked_fill(logits == MINUS_INF, 0.0).abs()
    ulp32 = torch.finfo(torch.float32).eps
    ulp = stored_ulp(dtype)

    unit_p2 = (p / (1.0 - dropout_p) * (ulp + ulp32 * logit_size)).square()
    delta2 = (dout * out).square().sum(-1, keepdim=True)
    if dlse is not None:
        delta2 = delta2 + dlse.square()[..., None]
    unit_ds2 = unit_p2 * (dout.square() @ value2.transpose(-1, -2) + delta2)

    def over_group(t: Tensor) -> Tensor:  # (batch, num_heads, ...) -> (batch, num_kv_heads, ...)
        return t.unflatten(1, group).sum(2)

    largest = logit_size.amax(-1) if logits.shape[-1] else torch.zeros_like(lse)
    units = {
        "out": (unit_p2 @ value2).sqrt(),
        "lse": ulp32 * (lse.abs() + largest) + unit_p2.sum(-1).sqrt(),
        "query": softmax_scale * (unit_ds2 @ key2).sqrt(),
        "key": softmax_scale * over_group(unit_ds2.transpose(-1, -2) @ query.square()).sqrt(),
        "value": over_group(unit_p2.transpose(-1, -2) @ dout.square()).sqrt(),
    }
    if bias is not None:
        units["bias"] = unit_ds2.sum_to_size(bias.shape).sqrt()
    if sinks is not None:
        # d sink = -p_sink * delta, with p_sink = exp(sink - lse).
        sink = sinks[None, :, None]
        exponent = sink.masked_fill(sink == MINUS_INF, 0.0).abs() + lse.abs()
        p_sink = torch.exp(sink - lse).masked_fill((logits == MINUS_INF).all(-1), 0.0)
        unit_p_sink2 = (p_sink * (ulp + ulp32 * exponent)).square()
        units["sinks"] = (unit_p_sink2[..., None] * delta2).sum((0, 2, 3)).sqrt()
    return {name: unit.abs() for name, unit in units.items()}


def stored_ulp(dtype: torch.dtype) -> float:
    """Relative size of a unit in the last place for numbers computed in float32 and stored in a dtype."""
    ulp32 = torch.finfo(torch.float32).eps
    return max(ulp32, STORED * torch.finfo(dtype).eps)
