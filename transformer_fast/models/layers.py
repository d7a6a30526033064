"""The parts of a block: norms, feed-forward, rotary positions and attention. All work on rows ``(tokens, d)``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transformer_fast import attention, attention_varlen

if TYPE_CHECKING:
    from transformer_fast.generation.cache import KVCache
    from transformer_fast.models.config import ModelConfig
    from transformer_fast.models.layout import TokenLayout

Rotary = tuple[Tensor, Tensor]


def build_norm(config: ModelConfig) -> nn.Module:
    """The norm that ``config`` names, over the last dimension."""
    if config.norm == "rmsnorm":
        return nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
    return nn.LayerNorm(config.hidden_size, eps=config.norm_eps)


class MLP(nn.Module):
    """Feed-forward layer: exact GELU, or SwiGLU with the gate and the value in one projection."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gated = config.activation == "swiglu"
        inner = config.intermediate_size
        self.up = nn.Linear(config.hidden_size, 2 * inner if self.gated else inner, bias=config.linear_bias)
        self.down = nn.Linear(inner, config.hidden_size, bias=config.linear_bias)

    def forward(self, x: Tensor) -> Tensor:
        """``(tokens, d)`` to ``(tokens, d)``."""
        x = self.up(x)
        if self.gated:
            gate, value = x.chunk(2, dim=-1)
            return self.down(F.silu(gate) * value)
        return self.down(F.gelu(x))


def rotary_tables(positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> Rotary:
    """Cosines and sines ``(tokens, 1, head_dim // 2)`` of the rotary angles.

    Made once in each forward pass and shared by all layers, so that no table has a maximal length.
    The angles are float32 whatever the model's dtype: bfloat16 cannot hold a position above 256.
    """
    exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
    angles = positions[:, None].float() * theta**-exponents
    return angles.cos().to(dtype)[:, None], angles.sin().to(dtype)[:, None]


def apply_rotary(x: Tensor, rotary: Rotary) -> Tensor:
    """Rotate ``(tokens, heads, head_dim)``; the pairs are dimension ``i`` and ``i + head_dim / 2``."""
    cos, sin = rotary
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


@dataclass
class AttentionOptions:
    """What one layer asks of the attention function, beside the tensors."""

    causal: bool
    window_size: tuple[int, int] | None
    backend: str = "auto"


class AttentionFunction(Protocol):
    """What :attr:`Attention.attend` may be set to.

    ``query`` is ``(tokens, num_heads, head_dim)``. ``key`` and ``value`` are ``(tokens, num_kv_heads,
    head_dim)``, or ``(batch, num_kv_heads, seqlen_k, head_dim)`` when they come from a cache.
    Returns ``(tokens, num_heads, head_dim)``.
    """

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, layout: TokenLayout, options: AttentionOptions
    ) -> Tensor: ...


def heads_first(x: Tensor, layout: TokenLayout) -> Tensor:
    """``(batch * seqlen, heads, head_dim)`` seen as ``(batch, heads, seqlen, head_dim)``, without a copy."""
    return x.unflatten(0, (layout.batch, layout.seqlen)).transpose(1, 2)


def fused_attention(
    query: Tensor, key: Tensor, value: Tensor, layout: TokenLayout, options: AttentionOptions
) -> Tensor:
    """The library's attention, packed or dense as the layout is."""
    how: dict[str, Any] = {"causal": options.causal, "window_size": options.window_size, "backend": options.backend}
    if layout.cu_seqlens is not None:
        ends, longest = layout.cu_seqlens, layout.max_seqlen
        return cast(Tensor, attention_varlen(query, key, value, ends, ends, longest, longest, **how))
    if key.dim() == 3:
        key, value = heads_first(key, layout), heads_first(value, layout)
    lengths: dict[str, Any] = {"seqlens_k": layout.seqlens_k, "key_padding_mask": layout.key_padding_mask}
    out = cast(Tensor, attention(heads_first(query, layout), key, value, **lengths, **how))
    return out.transpose(1, 2).flatten(0, 1)


class Attention(nn.Module):
    """Self-attention with one projection for queries, keys and values.

    The query, key and value that go to the kernel are views into that projection's output: the
    kernels take their strides, so nothing is copied between the two matrix products but the
    rotation. ``attend`` can be set to another :class:`AttentionFunction`, to measure against it.
    """

    attend: AttentionFunction

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.num_heads, self.num_kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        self.options = AttentionOptions(config.causal, config.window_of(layer))
        self.attend = fused_attention
        all_heads = self.num_heads + 2 * self.num_kv_heads
        self.qkv = nn.Linear(config.hidden_size, all_heads * self.head_dim, bias=config.linear_bias)
        self.out = nn.Linear(self.num_heads * self.head_dim, config.hidden_size, bias=config.linear_bias)

    def forward(
        self, x: Tensor, layout: TokenLayout, rotary: Rotary | None = None, cache: KVCache | None = None
    ) -> Tensor:
        """``(tokens, d)`` to ``(tokens, d)``; with a cache, its keys are extended by these rows first."""
        heads = self.qkv(x).unflatten(-1, (-1, self.head_dim))  # (tokens, num_heads + 2 * num_kv_heads, head_dim)
        query_and_key, value = heads.split((self.num_heads + self.num_kv_heads, self.num_kv_heads), dim=1)
        if rotary is not None:
            query_and_key = apply_rotary(query_and_key, rotary)
        query, key = query_and_key.split((self.num_heads, self.num_kv_heads), dim=1)
        if cache is not None:
            key, value = cache.append(self.layer, key, value, layout)
        return self.out(self.attend(query, key, value, layout, self.options).flatten(1))
