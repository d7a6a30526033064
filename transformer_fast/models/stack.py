"""One block, and the stack made of it. Rows ``(tokens, d)`` in, rows out."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from transformer_fast.linear import is_heard
from transformer_fast.models.config import ModelConfig
from transformer_fast.models.frontends import AudioEmbeddings, Embeddings, PatchEmbeddings
from transformer_fast.models.layers import (
    MLP,
    Attention,
    Context,
    RelativeBias,
    build_norm,
    rotary_tables,
)

if TYPE_CHECKING:
    from transformer_fast.generation.cache import CacheShape


class Block(nn.Module):
    """Attention, cross-attention where there is an encoder, and feed-forward, each added to what it read.

    Its norms stand where ``norm_placement`` says: ``*_norm`` before the layer or after the sum, and
    ``*_post_norm`` after the layer in the sandwich form. The parallel form has one norm for all.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.placement = config.norm_placement
        self.dropout = nn.Dropout(config.dropout)
        self.attention_dropout = dropout(config, config.attention_output_dropout)
        self.attention = Attention(config, layer)
        self.attention_norm = build_norm(config)
        self.cross = Attention(config, layer, cross=True) if config.cross_attention else None
        self.cross_norm = build_norm(config) if config.cross_attention else None
        self.mlp = MLP(config)
        self.mlp_norm = None if self.placement == "parallel" else build_norm(config)
        sandwich = self.placement == "sandwich"
        self.attention_post_norm = build_norm(config) if sandwich else None
        self.mlp_post_norm = build_norm(config) if sandwich else None

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """``(tokens, d)`` to those rows that are wanted."""
        if self.mlp_norm is None:
            seen = self.attention_norm(x)
            return context.wanted(x) + self.dropout(self.attention(seen, context) + self.mlp(context.wanted(seen)))
        x = self._add(x, self.attention, self.attention_norm, self.attention_post_norm, self.attention_dropout, context)
        if self.cross is not None and self.cross_norm is not None:
            x = self._add(x, self.cross, self.cross_norm, None, self.attention_dropout, context)
        return self._add(x, self.mlp, self.mlp_norm, self.mlp_post_norm, self.dropout)

    def _add(
        self, x: Tensor, layer: nn.Module, norm: nn.Module, post: nn.Module | None, drop: nn.Module, *context: Context
    ) -> Tensor:
        before = self.placement != "post"
        seen = norm(x) if before else x
        for shared in context:
            x = shared.wanted(x)
        drops = type(drop) is not nn.Dropout or (drop.training and drop.p) or is_heard(drop)
        if post is None and not drops and type(layer) in (Attention, MLP) and not is_heard(layer):
            x = layer(seen, *context, residual=x)
        else:
            y = layer(seen, *context)
            x = x + drop(y if post is None else post(y))
        return x if before else norm(x)


def dropout(config: ModelConfig, own: float | None) -> nn.Dropout:
    """With a place's own probability, or where it has none the stack's."""
    return nn.Dropout(config.dropout if own is None else own)


_FRONT_ENDS = {"patches": PatchEmbeddings, "audio": AudioEmbeddings}


class Stack(nn.Module):
    """What makes the first hidden states, the blocks, and the final norm."""

    def __init__(self, config: ModelConfig, tokens: nn.Embedding | None = None) -> None:
        super().__init__()
        self.config = config
        front_end = _FRONT_ENDS.get(config.front_end)
        self.embeddings: Any = Embeddings(config, tokens) if front_end is None else front_end(config)
        self.dropout = dropout(config, config.embedding_dropout)
        self.relative = RelativeBias(config) if config.positions == "relative" else None
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.final_norm = build_norm(config) if config.final_norm else None
        self.final_dropout = nn.Dropout(config.final_dropout)

    @property
    def tokens(self) -> nn.Embedding | None:
        """The token table, where the stack reads tokens."""
        return self.embeddings.tokens if isinstance(self.embeddings, Embeddings) else None

    def run(
        self, x: Tensor, context: Context, states: list[Tensor] | None = None, *, last_only: bool = False
    ) -> Tensor:
        """The first hidden states ``(tokens, d)`` to the last ones; each layer's input is appended to ``states``.

        ``last_only``: to those of each sequence's last token, ``(batch, d)``. What comes after the last block's
        attention is then not computed for the others.
        """
        layout, config = context.layout, self.config
        x = self.dropout(x)
        if config.positions == "rope":
            context.rotary = rotary_tables(layout.positions, config, x.dtype)
        if self.relative is not None:
            keys = layout.seqlen if context.cache is None else context.cache.max_seqlen
            context.bias = self.relative(layout.grid_positions, keys)
        contexts, narrows = [context] * len(self.blocks), last_only and layout.seqlen > 1 and self._may_narrow()
        if narrows:  # a context of its own: checkpoints of other blocks may read theirs again, later
            contexts[-1] = replace(context, last_only=True)
        for block, its_own in zip(self.blocks, contexts, strict=True):
            if states is not None:
                states.append(x)
            x = block(x, its_own)
        if states is not None:
            states.append(x)
        x = self.final_dropout(x if self.final_norm is None else self.final_norm(x))
        return layout.last_rows(x) if last_only and not narrows else x

    def _may_narrow(self) -> bool:
        """May the last block leave out rows? Not where somebody listens from there on, or it is not as it was built."""
        block, after = self.blocks[-1], (self.final_norm, self.final_dropout)
        if not (type(block) is Block and block.cross is None and type(block.attention) is Attention):
            return False
        modules = [*block.modules(), *(module for module in after if module is not None)]
        watched = any(module._backward_hooks or module._backward_pre_hooks for module in modules)
        return type(block.mlp) is MLP and not watched and not any(map(is_heard, modules))

    def check_length(self, length: int) -> None:
        """Refuse sequences longer than the position table."""
        if self.config.positions == "learned" and length > self.config.max_positions:
            raise ValueError(f"{length} tokens are more than the model's max_positions={self.config.max_positions}")

    @cached_property
    def cache_shapes(self) -> tuple[CacheShape, ...]:
        """What a cache has to hold for each layer."""
        from transformer_fast.generation.cache import CacheShape

        config = self.config
        windows = [config.window_of(layer) for layer in range(config.num_layers)]
        return tuple(CacheShape(config.num_kv_heads, config.head_dim, None if w is None else w[0] + 1) for w in windows)
