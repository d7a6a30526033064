"""The rotary position embedding (Su et al., "RoFormer", 2021) of padded or packed tokens, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from ...attn_probs import places
from ...options import PACKED, PADDED


def apply_rotary(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    seqlen_offsets: int | Tensor = 0,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    interleaved: bool = False,
    inplace: bool = False,
    conjugate: bool = False,
) -> Tensor:
    """Rotates the first rotary_dim numbers of each head; without a rule for gradients of its own.

    Args:
        x: (batch, seqlen, num_heads, head_dim), or with ``cu_seqlens`` packed, (total, num_heads, head_dim).
        cos, sin: (seqlen_rotary, rotary_dim / 2), a row a position.
        seqlen_offsets: the position of a sequence's first token: an integer, or int32 or int64 (batch,).
        cu_seqlens: int32 (batch + 1,), where each packed sequence begins.
        max_seqlen: the longest packed sequence; not needed.
        interleaved: pairs are numbers 2i and 2i + 1 (GPT-J), else i and i + rotary_dim / 2 (GPT-NeoX).
        inplace: write into ``x``.
        conjugate: turn the other way: the inverse, and the gradient.

    Returns:
        a tensor like ``x``, or ``x`` itself if ``inplace``. The arithmetic is in float32.

    Raises:
        ValueError, TypeError: a shape does not fit, or a position lies outside ``cos``.
    """
    allowed = PADDED if cu_seqlens is None else f"{PACKED}, packed"
    if x.dim() != (4 if cu_seqlens is None else 3):
        raise ValueError(f"x has shape {tuple(x.shape)}; allowed: {allowed}")
    check_tables(x, cos, sin)
    batch = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if isinstance(seqlen_offsets, Tensor) and tuple(seqlen_offsets.shape) != (batch,):
        raise ValueError(f"seqlen_offsets has shape {tuple(seqlen_offsets.shape)}; allowed: an integer or ({batch},)")
    if cu_seqlens is not None:
        sequence, place = places(cu_seqlens)
        first = seqlen_offsets[sequence] if isinstance(seqlen_offsets, Tensor) else seqlen_offsets
        cos, sin = rows_at(cos, place + first), rows_at(sin, place + first)
    elif isinstance(seqlen_offsets, Tensor):
        positions = seqlen_offsets.unsqueeze(1) + torch.arange(x.shape[1], device=x.device)
        cos, sin = rows_at(cos, positions), rows_at(sin, positions)
    else:
        end = seqlen_offsets + x.shape[1]
        if not 0 <= seqlen_offsets <= end <= cos.shape[0]:
            raise ValueError(_out_of_range(seqlen_offsets, end - 1, cos))
        cos, sin = cos[seqlen_offsets:end], sin[seqlen_offsets:end]
    return rotate(x, cos.unsqueeze(-2), sin.unsqueeze(-2), interleaved, inplace=inplace, conjugate=conjugate)


def check_tables(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Raise ValueError unless ``cos`` and ``sin`` are tables for the heads of ``x``."""
    if cos.dim() != 2 or not 0 < 2 * cos.shape[-1] <= x.shape[-1]:
        raise ValueError(
            f"cos has shape {tuple(cos.shape)}; allowed: (seqlen_rotary, rotary_dim / 2), rotary_dim at most "
            f"{x.shape[-1]}, the head_dim"
        )
    if sin.shape != cos.shape:
        raise ValueError(f"sin has shape {tuple(sin.shape)}; allowed: {tuple(cos.shape)}, as cos")


def rows_at(table: Tensor, positions: Tensor) -> Tensor:
    """(seqlen_rotary, n) at positions (...) -> (..., n).

    Raises:
        ValueError: a position lies outside, which is looked for only where that does not stall a device.
    """
    if positions.device.type == "cpu" and positions.numel():
        first, last = positions.aminmax()
        if first < 0 or last >= table.shape[0]:
            raise ValueError(_out_of_range(int(first), int(last), table))
    return table[positions.long()]


def _out_of_range(first: int, last: int, table: Tensor) -> str:
    return f"positions are {first} to {last}; allowed: 0 to {table.shape[0] - 1}, the rows of cos and sin"


def rotate(
    x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, *, inplace: bool = False, conjugate: bool = False
) -> Tensor:
    """The rotation by angles that are there already: ``cos`` and ``sin`` broadcast to (..., rotary_dim / 2)."""
    half = cos.shape[-1]
    part = x[..., : 2 * half]
    wide = torch.promote_types(x.dtype, torch.float32)
    first, second = (part[..., 0::2], part[..., 1::2]) if interleaved else part.split(half, -1)
    first, second, cos, sin = first.to(wide), second.to(wide), cos.to(wide), sin.to(wide)
    if conjugate:
        sin = -sin
    pairs = (first * cos - second * sin, first * sin + second * cos)
    rotated = torch.stack(pairs, -1).flatten(-2) if interleaved else torch.cat(pairs, -1)
    if inplace:
        part.copy_(rotated)
        return x
    rotated = rotated.to(x.dtype)
    return rotated if 2 * half == x.shape[-1] else torch.cat((rotated, x[..., 2 * half :]), -1)
