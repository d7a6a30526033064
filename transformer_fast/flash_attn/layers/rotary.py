"""The rotary position embedding under flash-attn's names, with gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..ops.triton.rotary import apply_rotary

__all__ = [
    "RotaryEmbedding",
    "apply_rotary_emb",
    "apply_rotary_emb_func",
    "apply_rotary_emb_kv_",
    "apply_rotary_emb_qkv_",
    "apply_rotary_emb_torch",
]


class _ApplyRotary(torch.autograd.Function):
    """Its gradient is the inverse rotation. cos and sin take none, as in flash-attn."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, *rest: Any) -> Tensor:
        interleaved, inplace, offsets, cu_seqlens = rest
        if inplace and not (x.is_leaf and x.requires_grad):  # flash-attn overwrites such a leaf all the same
            ctx.mark_dirty(x)
        is_tensor = isinstance(offsets, Tensor)
        ctx.save_for_backward(cos, sin, cu_seqlens, offsets if is_tensor else None)
        ctx.interleaved, ctx.offset = interleaved, None if is_tensor else offsets
        return apply_rotary(x, cos, sin, offsets, cu_seqlens, None, interleaved, inplace)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Any, ...]:
        cos, sin, cu_seqlens, offsets = ctx.saved_tensors
        offsets = ctx.offset if offsets is None else offsets
        dx = apply_rotary(dout, cos, sin, offsets, cu_seqlens, None, ctx.interleaved, conjugate=True)
        return dx, *[None] * 6


def apply_rotary_emb(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool = False,
    inplace: bool = False,
    seqlen_offsets: int | Tensor = 0,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> Tensor:
    """Rotary position embedding of the first rotary_dim numbers of each head (Su et al., "RoFormer", 2021).

    Args:
        x: (batch, seqlen, num_heads, head_dim), or with ``cu_seqlens`` packed, (total, num_heads, head_dim).
        cos, sin: (seqlen_rotary, rotary_dim / 2), a row a position; they take no gradient.
        interleaved: pairs are numbers 2i and 2i + 1 (GPT-J), else i and i + rotary_dim / 2 (GPT-NeoX).
        inplace: write into ``x`` and return it.
        seqlen_offsets: the position of a sequence's first token: an integer, or int32 or int64 (batch,).
        cu_seqlens: int32 (batch + 1,), where each packed sequence begins.
        max_seqlen: the longest packed sequence; not needed.

    Returns:
        a tensor like ``x``.

    Raises:
        ValueError, TypeError: a shape does not fit, or a position lies outside ``cos``.
    """
    return _ApplyRotary.apply(x, cos, sin, interleaved, inplace, seqlen_offsets, cu_seqlens)


apply_rotary_emb_func = apply_rotary_emb


def apply_rotary_emb_torch(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """The same step by step, by autograd's rules and in the dtype of the inputs.

    Args:
        x: (batch, seqlen, num_heads, head_dim).
        cos, sin: (seqlen, rotary_dim / 2) or (batch, seqlen, rotary_dim / 2).
        interleaved: as in :func:`apply_rotary_emb`.
    """
    half = cos.shape[-1]
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    part = x[..., : 2 * half]
    first, second = (part[..., 0::2], part[..., 1::2]) if interleaved else part.split(half, -1)
    pairs = (first * cos - second * sin, first * sin + second * cos)
    rotated = torch.stack(pairs, -1).flatten(-2) if interleaved else torch.cat(pairs, -1)
    return torch.cat((rotated, x[..., 2 * half :]), -1)


class _ApplyRotaryParts(torch.autograd.Function):
    """In place on some of the tensors that lie in one: ``parts`` names slices of a dimension with their tables."""

    @staticmethod
    def forward(ctx: Any, packed: Tensor, interleaved: bool, offsets: Any, parts: Any) -> Tensor:
        if not (packed.is_leaf and packed.requires_grad):
            ctx.mark_dirty(packed)
        ctx.rule = interleaved, offsets, parts
        return _rotate_parts(packed, interleaved, offsets, parts, conjugate=False)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Any, ...]:
        return _rotate_parts(dout.clone(), *ctx.rule, conjugate=True), None, None, None


def _rotate_parts(packed: Tensor, interleaved: bool, offsets: Any, parts: Any, *, conjugate: bool) -> Tensor:
    for place, cos, sin in parts:
        apply_rotary(packed[:, :, place], cos, sin, offsets, None, None, interleaved, inplace=True, conjugate=conjugate)
    return packed


def apply_rotary_emb_qkv_(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    cos_k: Tensor | None = None,
    sin_k: Tensor | None = None,
    interleaved: bool = False,
    seqlen_offsets: int | Tensor = 0,
    num_heads_q: int | None = None,
) -> Tensor:
    """:func:`apply_rotary_emb` in place on the queries and keys of a packed tensor.

    Args:
        qkv: (batch, seqlen, 3, num_heads, head_dim), or (batch, seqlen, num_heads_q + 2 * num_kv_heads, head_dim).
        cos_k, sin_k: other tables for the keys.
        num_heads_q: needed for the second form.

    Returns:
        ``qkv``.

    Raises:
        ValueError, TypeError: as :func:`apply_rotary_emb`, or the heads do not divide up.
    """
    queries: int | slice = 0
    keys: int | slice = 1
    if qkv.dim() == 4:
        if num_heads_q is None:
            raise TypeError("num_heads_q is None; allowed: the number of query heads, for a qkv of four dimensions")
        num_kv_heads, rest = divmod(qkv.shape[2] - num_heads_q, 2)
        if num_kv_heads < 1 or rest:
            raise ValueError(f"num_heads_q is {num_heads_q}; allowed: {qkv.shape[2]} heads less an even number")
        queries, keys = slice(num_heads_q), slice(num_heads_q, num_heads_q + num_kv_heads)
    elif qkv.dim() != 5 or qkv.shape[2] != 3:
        raise ValueError(f"qkv has shape {tuple(qkv.shape)}; allowed: (batch, seqlen, 3, num_heads, head_dim)")
    parts = (queries, cos, sin), (keys, cos if cos_k is None else cos_k, sin if sin_k is None else sin_k)
    return _ApplyRotaryParts.apply(qkv, interleaved, seqlen_offsets, parts)


def apply_rotary_emb_kv_(
    kv: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False, seqlen_offsets: int | Tensor = 0
) -> Tensor:
    """:func:`apply_rotary_emb` in place on the keys of ``kv``, (batch, seqlen, 2, num_kv_heads, head_dim)."""
    if kv.dim() != 5 or kv.shape[2] != 2:
        raise ValueError(f"kv has shape {tuple(kv.shape)}; allowed: (batch, seqlen, 2, num_kv_heads, head_dim)")
    return _ApplyRotaryParts.apply(kv, interleaved, seqlen_offsets, ((0, cos, sin),))


class RotaryEmbedding(nn.Module):
    """Rotary embedding that makes its tables as far as they are needed, without parameters.

    Args:
        dim: rotary_dim, at most the head_dim.
        base: of the wavelengths.
        interleaved: as in :func:`apply_rotary_emb`.
        scale_base: if given, the decay of XPos (Sun et al., "A Length-Extrapolatable Transformer", 2022); often 512.
        device: of the frequencies.
    """

    inv_freq: Tensor

    def __init__(
        self,
        dim: int,
        base: float = 10000.0,
        interleaved: bool = False,
        scale_base: float | None = None,
        device: Any = None,
    ) -> None:
        super().__init__()
        self.dim, self.base, self.interleaved, self.scale_base = dim, float(base), interleaved, scale_base
        self.register_buffer("inv_freq", self._frequencies(device), persistent=False)
        self._cos_cached: Tensor | None = None
        self._sin_cached: Tensor | None = None
        self._cos_k_cached: Tensor | None = None
        self._sin_k_cached: Tensor | None = None

    def _frequencies(self, device: Any) -> Tensor:
        return self.base ** (-torch.arange(0, self.dim, 2, device=device, dtype=torch.float32) / self.dim)

    def _update_cos_sin_cache(self, seqlen: int, device: Any = None, dtype: torch.dtype | None = None) -> None:
        """Tables of at least ``seqlen`` rows. Subclasses in model code call it and read them, by these names."""
        known = self._cos_cached
        if (
            known is not None
            and known.shape[0] >= seqlen
            and known.device == device
            and known.dtype == dtype
            and not (self.training and known.is_inference())
        ):
            return
        # In float32 from the start: a model that was cast has rounded its frequencies, and far positions need them.
        frequencies = self.inv_freq if self.inv_freq.dtype == torch.float32 else self._frequencies(device)
        position = torch.arange(seqlen, device=device, dtype=torch.float32)
        angle = torch.outer(position, frequencies.to(position.device))
        cos, sin = angle.cos(), angle.sin()
        if self.scale_base is None:
            self._cos_cached, self._sin_cached = cos.to(dtype), sin.to(dtype)
            self._cos_k_cached, self._sin_k_cached = self._cos_cached, self._sin_cached
            return
        even = torch.arange(0, self.dim, 2, device=device, dtype=torch.float32)
        decay = (even + 0.4 * self.dim) / (1.4 * self.dim)
        scale = decay ** ((position - seqlen // 2) / self.scale_base).unsqueeze(1)
        self._cos_cached, self._sin_cached = (cos * scale).to(dtype), (sin * scale).to(dtype)
        self._cos_k_cached, self._sin_k_cached = (cos / scale).to(dtype), (sin / scale).to(dtype)

    def forward(
        self,
        qkv: Tensor,
        kv: Tensor | None = None,
        seqlen_offset: int | Tensor = 0,
        max_seqlen: int | None = None,
        num_heads_q: int | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Rotates in place and returns what was given.

        Args:
            qkv: as in :func:`apply_rotary_emb_qkv_`; beside ``kv`` the queries alone, (batch, seqlen, heads, head_dim).
            kv: (batch, seqlen, 2, num_kv_heads, head_dim).
            seqlen_offset: the first position, an integer or (batch,); with the latter give ``max_seqlen``.
            max_seqlen: how far the tables must reach.
            num_heads_q: as in :func:`apply_rotary_emb_qkv_`.
        """
        if max_seqlen is None:
            last = int(seqlen_offset.max()) if isinstance(seqlen_offset, Tensor) else seqlen_offset
            max_seqlen = qkv.shape[1] + last
        self._update_cos_sin_cache(max_seqlen, qkv.device, qkv.dtype)
        cos, sin, cos_k, sin_k = self._cos_cached, self._sin_cached, self._cos_k_cached, self._sin_k_cached
        assert cos is not None and sin is not None and cos_k is not None and sin_k is not None
        if kv is None:
            return apply_rotary_emb_qkv_(qkv, cos, sin, cos_k, sin_k, self.interleaved, seqlen_offset, num_heads_q)
        queries = apply_rotary_emb(qkv, cos, sin, self.interleaved, True, seqlen_offset)
        return queries, apply_rotary_emb_kv_(kv, cos_k, sin_k, self.interleaved, seqlen_offset)
