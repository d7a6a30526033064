"""One block, and the encoder and decoder stacks made of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from transformer_fast.models.config import ModelConfig
from transformer_fast.models.layers import MLP, Attention, AttentionFunction, Rotary, build_norm, rotary_tables
from transformer_fast.models.layout import TokenLayout

if TYPE_CHECKING:
    from transformer_fast.generation.cache import KVCache


class Embeddings(nn.Module):
    """Token, position and token-type embeddings, whichever the configuration has."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.tokens = nn.Embedding(config.vocab_size, size)
        self.positions = nn.Embedding(config.max_positions, size) if config.positions == "learned" else None
        self.types = nn.Embedding(config.token_types, size) if config.token_types else None
        self.norm = build_norm(config) if config.embedding_norm else None

    def forward(self, input_ids: Tensor, positions: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        """``(tokens,)`` ids, positions and types to ``(tokens, d)``; types default to 0."""
        x = self.tokens(input_ids)
        if self.types is not None:
            x = x + (self.types.weight[0] if token_type_ids is None else self.types(token_type_ids))
        if self.positions is not None:
            x = x + self.positions(positions)
        return x if self.norm is None else self.norm(x)


class Block(nn.Module):
    """Attention and feed-forward, each with a residual, the norms before them or after the sums."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.pre_norm = config.norm_placement == "pre"
        self.attention = Attention(config, layer)
        self.attention_norm = build_norm(config)
        self.mlp = MLP(config)
        self.mlp_norm = build_norm(config)

    def forward(
        self, x: Tensor, layout: TokenLayout, rotary: Rotary | None = None, cache: KVCache | None = None
    ) -> Tensor:
        """``(tokens, d)`` to ``(tokens, d)``."""
        if self.pre_norm:
            x = x + self.attention(self.attention_norm(x), layout, rotary, cache)
            return x + self.mlp(self.mlp_norm(x))
        x = self.attention_norm(x + self.attention(x, layout, rotary, cache))
        return self.mlp_norm(x + self.mlp(x))


def _check_grids(input_ids: Tensor, **grids: Tensor | None) -> None:
    """Ids are ``(batch, seqlen)``, and what goes with them has their shape: else rows would mix between sequences."""
    if input_ids.dim() != 2:
        raise ValueError(f"input_ids has shape {tuple(input_ids.shape)}; allowed: (batch, seqlen)")
    for name, grid in grids.items():
        if grid is not None and grid.shape != input_ids.shape:
            raise ValueError(f"{name} has shape {tuple(grid.shape)}; allowed: {tuple(input_ids.shape)}, as input_ids")


class Stack(nn.Module):
    """Embeddings, blocks, and the final norm that a pre-norm stack needs. Rows in, rows out."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.final_norm = build_norm(config) if config.norm_placement == "pre" else nn.Identity()

    def run(
        self,
        input_ids: Tensor,
        layout: TokenLayout,
        token_type_ids: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """``input_ids`` (tokens,) in ``layout`` to hidden states ``(tokens, d)``."""
        config = self.config
        if config.positions == "learned" and layout.seqlen > config.max_positions:
            raise ValueError(f"{layout.seqlen} tokens are more than the model's max_positions={config.max_positions}")
        x = self.embeddings(input_ids, layout.positions, token_type_ids)
        rotary = None
        if config.positions == "rope":
            rotary = rotary_tables(layout.positions, config.head_dim, config.rope_theta, x.dtype)
        for block in self.blocks:
            x = block(x, layout, rotary, cache)
        return self.final_norm(x)

    def set_backend(self, backend: str) -> None:
        """Which attention back end every layer asks for, by name."""
        for module in self.modules():
            if isinstance(module, Attention):
                module.options.backend = backend

    def set_attention(self, attend: AttentionFunction) -> None:
        """Which attention function every layer calls: the library's own, or a peer to measure against."""
        for module in self.modules():
            if isinstance(module, Attention):
                module.attend = attend


class Encoder(Stack):
    """Bidirectional stack. Padded batches are taken packed, unless asked otherwise."""

    def encode(
        self, input_ids: Tensor, attention_mask: Tensor | None, token_type_ids: Tensor | None, *, packed: bool
    ) -> tuple[Tensor, TokenLayout]:
        """As :meth:`forward`, but leaves the hidden states as rows ``(tokens, d)`` with their layout, for heads."""
        _check_grids(input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids)
        batch, seqlen = input_ids.shape
        if attention_mask is None:
            layout = TokenLayout.dense(batch, seqlen, device=input_ids.device)
        else:
            layout = TokenLayout.from_mask(attention_mask, packed=packed)
        types = None if token_type_ids is None else layout.take_rows(token_type_ids)
        return self.run(layout.take_rows(input_ids), layout, types), layout

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        *,
        packed: bool = True,
    ) -> Tensor:
        """``(batch, seqlen)`` ids to hidden states ``(batch, seqlen, d)``, zeros where there was padding.

        Args:
            attention_mask: ``(batch, seqlen)``, nonzero = a real token; any pattern. Positions are the
                columns of the batch, as in BERT: left padding shifts them.
            packed: compute the real tokens only, or compute the padding too and mask it.
        """
        rows, layout = self.encode(input_ids, attention_mask, token_type_ids, packed=packed)
        return layout.to_grid(rows)


class Decoder(Stack):
    """Causal stack, with a cache of keys and values when it generates."""

    def decode(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, cache: KVCache | None = None
    ) -> tuple[Tensor, TokenLayout]:
        """``(batch, seqlen)`` ids to rows ``(tokens, d)`` and their layout.

        Args:
            attention_mask: ``(batch, seqlen)`` for prompts of unequal length, padded on either side;
                positions are counted over the real tokens.
            cache: continues each sequence after the tokens that the cache holds, and takes the new ones in.
        """
        _check_grids(input_ids, attention_mask=attention_mask)
        batch, seqlen = input_ids.shape
        if attention_mask is not None:
            layout = TokenLayout.from_mask(attention_mask, count_from="token")
        else:
            cached = None if cache is None or cache.is_empty else cache.seqlens
            layout = TokenLayout.dense(batch, seqlen, device=input_ids.device, cached=cached)
        if cache is not None:
            cache.extend(layout)
        return self.run(layout.take_rows(input_ids), layout, cache=cache), layout

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        """As :meth:`decode`, put back into ``(batch, seqlen, d)``."""
        rows, layout = self.decode(input_ids, attention_mask, cache)
        return layout.to_grid(rows)
