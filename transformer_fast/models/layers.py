"""The parts of a block: norms, feed-forward, rotary positions and attention. All work on rows ``(tokens, d)``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transformer_fast import attention, attention_varlen
from transformer_fast.linear import GATES, layer_followed, layers_followed
from transformer_fast.pointwise import rms_norm, rotate

if TYPE_CHECKING:
    from transformer_fast.generation.cache import CrossCache
    from transformer_fast.models.config import ModelConfig
    from transformer_fast.models.layout import TokenLayout

Rotary = tuple[Tensor, Tensor]


class RMSNorm(nn.Module):
    """Division by the root mean square (Zhang and Sennrich, 2019); the gain is ``weight``, or ``1 + weight``."""

    def __init__(self, size: int, eps: float, *, plus_one: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size) if plus_one else torch.ones(size))
        self.eps, self.plus_one = eps, plus_one

    def forward(self, x: Tensor) -> Tensor:
        """``(..., d)`` to the same, over the last dimension."""
        return rms_norm(x, self.weight, self.eps, plus_one=self.plus_one)


def build_norm(config: ModelConfig) -> nn.Module:
    """The norm that ``config`` names, over the last dimension."""
    if config.norm == "rmsnorm":
        return RMSNorm(config.hidden_size, config.norm_eps, plus_one=config.norm_plus_one)
    return nn.LayerNorm(config.hidden_size, eps=config.norm_eps, bias=config.norm_bias)


class FusedLinear(nn.Linear):
    """Several projections of the same rows as one matrix product: their rows stand one after the other in ``weight``.

    Args:
        parts: the number of outputs of each projection, and whether it has a bias. ``bias`` holds those that do.
    """

    product = staticmethod(F.linear)  # which ``dropin.pack_linears`` exchanges

    def __init__(self, in_features: int, parts: Sequence[tuple[int, bool]]) -> None:
        super().__init__(in_features, sum(size for size, _ in parts), bias=False)
        self.parts = tuple(parts)
        with_bias = sum(size for size, has_bias in parts if has_bias)
        if with_bias:
            self.bias = nn.Parameter(torch.zeros(with_bias))

    def full_bias(self, x: Tensor) -> Tensor | None:
        """``(all outputs,)``, with zeros for the projections that have none."""
        bias: Tensor | None = self.bias
        if bias is None or len(bias) == self.out_features:
            return bias
        held = iter(bias.split([size for size, has_bias in self.parts if has_bias]))
        return torch.cat([next(held) if has_bias else x.new_zeros(size) for size, has_bias in self.parts])

    def forward(self, x: Tensor) -> Tensor:
        """``(tokens, in_features)`` to ``(tokens, all outputs)``."""
        return self.product(x, self.weight, self.full_bias(x))


def table(rows: int, size: int, padding_id: int | None = None) -> nn.Embedding:
    """A table of zeros: to draw random ones on the meta device, PyTorch imports its compiler, for seconds."""
    return nn.Embedding(rows, size, padding_id, _weight=torch.zeros(rows, size))


class MLP(nn.Module):
    """Feed-forward layer; a gated one has the gate and the value in one projection."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.activation = config.activation
        inner, has_bias = config.intermediate_size, "mlp" in config.biases
        parts = 2 if config.activation in GATES else 1
        self.up = FusedLinear(config.hidden_size, [(inner, has_bias)] * parts)
        self.down = nn.Linear(inner, config.hidden_size, bias=has_bias)
        self.dropout_p = config.activation_dropout

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """``(tokens, d)`` to ``(tokens, d)``, added to ``residual``."""
        if not (self.training and self.dropout_p):
            return layers_followed(self.up, self.activation, self.down, x, residual)
        x = F.dropout(layer_followed(self.up, x, self.activation), self.dropout_p)
        return layer_followed(self.down, x, residual=residual)


def rotary_frequencies(config: ModelConfig, device: torch.device) -> Tensor:
    """``(head_dim // 2,)`` float32 radians a position, scaled as ``rope_scaling`` says.

    "linear" divides positions by the factor (Chen et al., 2023). "llama3" divides only the slow frequencies, those
    that turn less than ``low_freq_factor`` times within the original context, leaves the quick ones, and blends
    between the two (Llama 3.1).
    """
    exponents = torch.arange(0, config.head_dim, 2, device=device, dtype=torch.float32) / config.head_dim
    frequencies = 1.0 / (config.rope_theta**exponents)
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    slowed = frequencies / scaling["factor"]
    if scaling["rope_type"] == "linear":
        return slowed
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return keep * frequencies + (1 - keep) * slowed


def rotary_tables(positions: Tensor, config: ModelConfig, dtype: torch.dtype) -> Rotary:
    """Cosines and sines ``(tokens, 1, head_dim // 2)`` of the rotary angles.

    Made once in each forward pass and shared by all layers, so that no table has a maximal length.
    The angles are float32 whatever the model's dtype: bfloat16 cannot hold a position above 256.
    """
    wide = torch.promote_types(torch.float32, dtype)
    angles = positions[:, None].to(wide) * rotary_frequencies(config, positions.device).to(wide)
    return angles.cos().to(dtype)[:, None], angles.sin().to(dtype)[:, None]


def apply_rotary(x: Tensor, rotary: Rotary) -> Tensor:
    """Rotate ``(tokens, heads, head_dim)``; the pairs are dimension ``i`` and ``i + head_dim / 2``."""
    return rotate(x, *rotary)


class RelativeBias(nn.Module):
    """A bias for each head and bucket of distance, shared by all layers (T5: Raffel et al., 2020).

    Half of a direction's buckets are one distance each; the others grow by a constant factor up to
    ``max_distance``, and the last takes all beyond. A causal stack has no buckets for keys ahead.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.causal, self.max_distance = config.causal, config.relative_max_distance
        self.table = table(config.relative_buckets, config.num_heads)

    def buckets(self, ahead: Tensor) -> Tensor:
        """The bucket of each distance, int64: ``ahead`` is the key's position less the query's."""
        number, first = self.table.num_embeddings, torch.zeros_like(ahead)
        if self.causal:
            distance = (-ahead).clamp(min=0)
        else:
            number //= 2
            first, distance = (ahead > 0) * number, ahead.abs()
        exact = number // 2
        # In float32, as the reference rounds there too.
        growth = (distance.clamp(min=1).float() / exact).log() / math.log(self.max_distance / exact)
        far = (exact + (growth * (number - exact)).long()).clamp(max=number - 1)
        return first + torch.where(distance < exact, distance, far)

    def forward(self, query_positions: Tensor, seqlen_k: int) -> Tensor:
        """``(batch or 1, seqlen_q)`` positions to ``(batch or 1, num_heads, seqlen_q, seqlen_k)``."""
        keys = torch.arange(seqlen_k, device=query_positions.device)
        return self.table(self.buckets(keys - query_positions[..., None])).movedim(-1, 1)


@dataclass
class AttentionOptions:
    """What one layer asks of the attention function, beside the tensors."""

    causal: bool
    window_size: tuple[int, int] | None
    backend: str = "auto"
    softmax_scale: float | None = None
    softcap: float | None = None
    dropout_p: float = 0.0

    def arguments(self) -> dict[str, Any]:
        """As keywords of ``attention`` and ``attention_varlen``."""
        return dict(vars(self))


class AttentionFunction(Protocol):
    """What :attr:`Attention.attend` may be set to.

    ``query`` is ``(tokens, num_heads, head_dim)``, ``key`` and ``value`` are ``(tokens, num_kv_heads, head_dim)``.
    Returns ``(tokens, num_heads, head_dim)``.
    """

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, layout: TokenLayout, options: AttentionOptions
    ) -> Tensor: ...


def fused_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: TokenLayout,
    options: AttentionOptions,
    *,
    bias: Tensor | None = None,
    key_layout: TokenLayout | None = None,
) -> Tensor:
    """The library's attention, packed where the layouts are. ``key_layout``: of the keys, where it is another.

    A ``bias`` has no packed form: queries and keys are put back into the grid for it, and attention skips the
    padding by its mask.
    """
    keys = key_layout or layout
    how = options.arguments()
    if bias is None and (layout.cu_seqlens is not None or keys.cu_seqlens is not None):
        ends = (layout.boundaries, keys.boundaries, layout.max_seqlen, keys.max_seqlen)
        return cast(Tensor, attention_varlen(query, key, value, *ends, **how))
    grids = [part.heads_first(x) for part, x in ((layout, query), (keys, key), (keys, value))]
    out = cast(Tensor, attention(*grids, key_padding_mask=keys.mask, bias=bias, **how))
    return layout.take_rows(out.transpose(1, 2))


@dataclass
class Context:
    """What a stack's blocks share in one forward pass.

    Attributes:
        layout: where each row stands.
        rotary, bias: of the positions, for the stacks that have them.
        cache: of the keys and values of earlier tokens.
        memory, memory_layout: the encoder's rows, for cross-attention; ``memory`` may be None once
            ``cross_cache`` holds their keys and values.
        last_only: of the block that runs, each sequence's last row is all that is read.
    """

    layout: TokenLayout
    rotary: Rotary | None = None
    bias: Tensor | None = None
    cache: Any = None  # a KVCache or a PagedBatch
    memory: Tensor | None = None
    memory_layout: TokenLayout | None = None
    cross_cache: CrossCache | None = None
    last_only: bool = False

    def wanted(self, rows: Tensor) -> Tensor:
        """Those of ``(tokens, d)`` that are read of the block that runs."""
        return self.layout.last_rows(rows) if self.last_only else rows

    def reorder(self, index: Tensor) -> None:
        """In the caches of a decoder, row ``i`` becomes what row ``index[i]`` was, which had the same source."""
        assert self.cache is not None and self.cross_cache is not None
        # Rows of one source read the same keys, whichever changes places with which: only their number matters.
        if len(index) != len(self.cache.seqlens):
            self.cross_cache.reorder(index)
        self.cache.reorder(index)


class Attention(nn.Module):
    """Self-attention with one projection for queries, keys and values; or cross-attention, with two.

    The query, key and value that go to the kernel are views into that projection's output: the
    kernels take their strides, so nothing is copied between the two matrix products but the
    rotation. ``attend`` can be set to another :class:`AttentionFunction`, to measure against it.
    """

    attend: AttentionFunction

    def __init__(self, config: ModelConfig, layer: int, *, cross: bool = False) -> None:
        super().__init__()
        self.layer = layer
        self.num_heads, self.num_kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        self.dropout_p = config.attention_dropout
        window = None if cross else config.window_of(layer)
        self.options = AttentionOptions(
            config.causal and not cross, window, softmax_scale=config.scale_of(layer), softcap=config.softcap
        )
        self.attend = fused_attention
        heads = {"q": self.num_heads, "k": self.num_kv_heads, "v": self.num_kv_heads}
        parts = [(number * self.head_dim, name in config.biases) for name, number in heads.items()]
        if cross:
            self.q, self.kv = FusedLinear(config.hidden_size, parts[:1]), FusedLinear(config.hidden_size, parts[1:])
        else:
            self.qkv = FusedLinear(config.hidden_size, parts)
        self.out = nn.Linear(self.num_heads * self.head_dim, config.hidden_size, bias="out" in config.biases)

    def _options(self) -> AttentionOptions:
        if self.training and self.dropout_p:
            return replace(self.options, dropout_p=self.dropout_p)
        return self.options

    def forward(self, x: Tensor, context: Context, residual: Tensor | None = None) -> Tensor:
        """``(tokens, d)`` to those rows that are wanted, added to ``residual``, which has only them.

        With a cache, its keys are extended by these rows first.
        """
        out = self._cross(x, context) if hasattr(self, "kv") else self._self(x, context)
        return layer_followed(self.out, context.wanted(out.flatten(1)), residual=residual)

    def _self(self, x: Tensor, context: Context) -> Tensor:
        heads = self.qkv(x).unflatten(-1, (-1, self.head_dim))  # (tokens, num_heads + 2 * num_kv_heads, head_dim)
        query_and_key, value = heads.split((self.num_heads + self.num_kv_heads, self.num_kv_heads), dim=1)
        if context.rotary is not None:
            query_and_key = apply_rotary(query_and_key, context.rotary)
        query, key = query_and_key.split((self.num_heads, self.num_kv_heads), dim=1)
        more: dict[str, Any] = {} if context.bias is None else {"bias": context.bias}
        if context.cache is not None:
            return context.cache.attend(self.layer, query, key, value, context.layout, self._options(), **more)
        return self.attend(query, key, value, context.layout, self._options(), **more)

    def _cross(self, x: Tensor, context: Context) -> Tensor:
        query = self.q(x).unflatten(-1, (-1, self.head_dim))
        cache, layout = context.cross_cache, context.memory_layout
        if cache is not None and cache.has(self.layer):
            return cache.attend(self.layer, query, context.layout, self._options())
        assert context.memory is not None and layout is not None
        heads = self.kv(context.memory).unflatten(-1, (-1, self.head_dim))
        key, value = heads.split(self.num_kv_heads, dim=1)
        if cache is not None:
            cache.store(self.layer, key, value, layout)
            return cache.attend(self.layer, query, context.layout, self._options())
        return fused_attention(query, key, value, context.layout, self._options(), key_layout=layout)
