"""What all kinds of models share: where their weights are, and how ids become the first hidden states."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from transformer_fast.models.checks import check_ids, check_range, labels_of
from transformer_fast.models.config import Architecture, ModelConfig
from transformer_fast.models.frontends import AudioEmbeddings
from transformer_fast.models.heads import LanguageHead, Targets, build_head
from transformer_fast.models.layers import Attention, AttentionFunction, Context
from transformer_fast.models.layout import TokenLayout
from transformer_fast.models.output import ModelOutput
from transformer_fast.models.stack import Stack

if TYPE_CHECKING:
    from transformer_fast.generation.cache import KVCache
    from transformer_fast.generation.paged import PagedBatch

#: The input of each layer, where it is asked for.
States = list[Tensor] | None


class Model(nn.Module):
    """A stack, or an encoder and a decoder, under a head."""

    #: Of the stack that the head stands on; and what ``generate`` does unless told otherwise.
    config: ModelConfig
    generation_defaults: dict[str, Any]
    head: Any

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        self.architecture = architecture
        self.config = architecture.stack
        self.generation_defaults = dict(architecture.values)
        if architecture.encoder is not None:
            self.encoder = Stack(architecture.encoder)
        if architecture.decoder is not None:
            shared = architecture.encoder is not None and architecture.shared_tokens
            self.decoder = Stack(architecture.decoder, self.encoder.tokens if shared else None)
        self.head = build_head(architecture, self.stacks[-1].tokens)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return next(self.parameters()).dtype

    @property
    def stacks(self) -> list[Stack]:
        """The encoder, the decoder, or both."""
        return [module for module in self.children() if isinstance(module, Stack)]

    def set_backend(self, backend: str) -> None:
        """Which attention back end every layer asks for, by name."""
        for module in self.modules():
            if isinstance(module, Attention):
                module.options.backend = backend

    def set_attention(self, attend: AttentionFunction) -> None:
        """Which function every self-attention layer calls: the library's own, or a peer to measure against."""
        for module in self.modules():
            if isinstance(module, Attention):
                module.attend = attend

    def tie(self) -> None:
        """Make the output projection the token table again, after one of them was replaced."""
        if isinstance(self.head, LanguageHead) and self.architecture.head.tied:
            tokens = self.stacks[-1].tokens
            assert tokens is not None
            self.head.weight = tokens.weight

    @torch.no_grad()
    def initialize(self) -> None:
        """Draw fresh weights; what each layer adds to the residual stream shrinks with the number of layers."""
        std = self.config.initializer_range
        residual_std = std / math.sqrt(2 * self.config.num_layers)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 1:
                plus_one = self.config.norm_plus_one
                parameter.fill_(1.0 if name.endswith("norm.weight") and not plus_one else 0.0)
            else:
                adds_to_residual = name.endswith((".out.weight", "mlp.down.weight"))
                parameter.normal_(0.0, residual_std if adds_to_residual else std)
        for buffer in self.buffers():
            buffer.zero_()
        for module in self.modules():
            if isinstance(module, AudioEmbeddings):
                module.initialize_positions()

    def save_pretrained(self, path: str | Path) -> None:
        """Write config.json and the weights, as ``transformers`` reads them and :func:`from_pretrained` does."""
        from transformer_fast.models.pretrained import save_pretrained

        save_pretrained(self, path)

    def targets(self, given: Mapping[str, Any]) -> Targets:
        """The labels among the arguments; a name that nobody knows is an error."""
        return labels_of(given, self.head.targets, type(self).__name__)

    def read(
        self,
        stack: Stack,
        ids: Tensor,
        mask: Tensor | None = None,
        *,
        prefix: str = "",
        types: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: KVCache | PagedBatch | None = None,
        targets: Targets | None = None,
        packed: bool = True,
    ) -> tuple[Tensor, TokenLayout]:
        """``(batch, seqlen)`` ids to a stack's first hidden states ``(tokens, d)`` and their layout.

        Args:
            prefix: of the arguments' names in errors, "decoder_" or none.
            types, position_ids: as in the models' ``forward``.
            cache: takes the tokens in; ``mask`` then covers its earlier columns too.
            targets: the labels that the head will be given, None where no head reads these rows or only the last ones.
            packed: compute the real tokens only, where the head allows it, or the padding too.
        """
        config, name, mask_name = stack.config, f"{prefix}input_ids", f"{prefix}attention_mask"
        past = 0 if cache is None else cache.max_seqlen
        check_ids(name, ids, token_type_ids=types, **({} if past else {mask_name: mask}))
        stack.check_length(ids.shape[1] + past)
        positions = self._positions(config, ids, position_ids)
        if cache is not None and past:
            layout = _continued(mask_name, ids, mask, positions, cache)
        else:
            layout = self._layout(ids, mask, positions, targets, packed)
        rows = layout.take_rows(ids)
        check_range(name, rows, config.vocab_size)
        if position_ids is not None and config.positions == "learned":
            offset = config.position_offset
            check_range("position_ids", layout.positions + offset, config.max_positions + offset)
        if types is not None:
            types = layout.take_rows(types)
            if config.token_types or config.types_are_tokens:
                check_range("token_type_ids", types, config.token_types or config.vocab_size)
        if cache is not None:
            self._check_cache(mask_name, layout, cache, stack)
            # A decoder's cache holds the encoder's keys too, from the first call on.
            if (past or prefix) and self.training and torch.is_grad_enabled():
                warnings.warn(
                    "past_key_values in training: no gradient flows through what a cache holds; "
                    "give all tokens at once, without use_cache, for the whole gradient",
                    stacklevel=4,
                )
            cache.extend(layout)
        return stack.embeddings(rows, layout.positions, types), layout

    @staticmethod
    def read_grid(stack: Stack, *inputs: Any) -> tuple[Tensor, TokenLayout]:
        """Images or sounds, of equal length all, to a stack's first hidden states and their layout."""
        x = stack.embeddings(*inputs)
        return x.flatten(0, 1), TokenLayout.dense(x.shape[0], x.shape[1], device=x.device)

    @staticmethod
    def _positions(config: ModelConfig, ids: Tensor, position_ids: Tensor | None) -> Tensor | None:
        """``(batch or 1, seqlen)`` from 0 on, None for the columns."""
        if position_ids is not None:
            (batch, seqlen), shape = ids.shape, tuple(position_ids.shape)
            if shape not in ((1, seqlen), (batch, seqlen)):
                raise ValueError(f"position_ids has shape {shape}; allowed: {(batch, seqlen)}")
            if config.positions in ("relative", "none"):
                raise ValueError(f"position_ids is given to a model with positions={config.positions!r}; allowed: None")
            return position_ids - config.position_offset
        if config.positions_from_pad is None:
            return None
        # Counted over what is no padding; padding itself stands on the row before the first position's.
        real = ids != config.positions_from_pad
        return real.cumsum(1) * real - 1

    def _layout(
        self, ids: Tensor, mask: Tensor | None, position_ids: Tensor | None, targets: Targets | None, packed: bool
    ) -> TokenLayout:
        """The rows to compute: the real tokens, unless what the head makes of them depends on the padding."""
        if mask is None or bool(mask.all()):
            return TokenLayout.dense(*ids.shape, device=ids.device, position_ids=position_ids)
        if packed and targets is not None:
            keep = mask.bool()
            # Packing closes the holes of a mask, which a window would notice: it counts columns.
            starts = (keep.int().diff(dim=1) == 1).sum(1) + keep[:, 0]
            holes = self.config.sliding_window is not None and bool((starts > 1).any())
            packed = not holes and not self.head.needs_padding(ids, mask, targets)
        return TokenLayout.from_mask(mask, packed=packed, position_ids=position_ids)

    def _check_cache(self, name: str, layout: TokenLayout, cache: KVCache | PagedBatch, stack: Stack) -> None:
        """A cache is one of this model, and padded where windows and relative places, which go by column, allow it."""
        dtype = stack.embeddings.tokens.weight.dtype  # a tenth of the time of self.dtype, which is a matter here
        if cache.layers != stack.cache_shapes or cache.dtype != dtype:
            raise ValueError(
                f"past_key_values holds {len(cache.layers)} layers like {cache.layers[0]} in {cache.dtype}; "
                f"allowed: {len(stack.cache_shapes)} like {stack.cache_shapes[0]} in {dtype}, as this model makes"
            )
        by_column = cache.is_empty and not cache.by_token
        places = self.config.sliding_window is not None or self.config.positions == "relative"
        if by_column and places and layout.mask is not None and not bool(layout.mask[:, -1].all()):
            raise ValueError(f"{name} is padded on the right; allowed with a cache in this model: on the left")

    def run(
        self, stack: Stack, x: Tensor, context: Context, states: States = None, **how: bool
    ) -> tuple[Tensor, TokenLayout]:
        """A stack on its first hidden states; returns the last ones ``(tokens, d)`` and their layout.

        ``states`` becomes ``hidden_states``: the input of each layer, and the last result, in the grid. More options
        are those of :meth:`Stack.run`.
        """
        rows, layout = stack.run(x, context, states, **how), context.layout
        if states is not None:
            if not self.architecture.final_state_unnormed:
                states[-1] = rows
            states[:] = map(layout.to_grid, states)
        return rows, layout

    def results(
        self, rows: Tensor, layout: TokenLayout, ids: Tensor | None, targets: Targets, **more: object
    ) -> ModelOutput:
        """What the head gives, and what else there is; None is left out."""
        found = self.head.results(rows, layout, ids, targets)
        return ModelOutput(found, **{name: value for name, value in more.items() if value is not None})


def _continued(
    name: str, ids: Tensor, mask: Tensor | None, position_ids: Tensor | None, cache: KVCache | PagedBatch
) -> TokenLayout:
    """Tokens ``(batch, seqlen)`` after those of ``cache``; ``mask`` covers these and the earlier columns."""
    (batch, seqlen), device = ids.shape, ids.device
    columns = cache.columns
    if mask is not None and not cache.by_token:
        if mask.shape != (batch, columns + seqlen):
            allowed = f"({batch}, {columns + seqlen}): the {columns} columns of the cache and the new ones"
            raise ValueError(f"{name} has shape {tuple(mask.shape)}; allowed: {allowed}")
        known = torch.ones_like(mask, dtype=torch.bool)
        if cache.padding is not None:
            known[:, : cache.padding.shape[1]] = cache.padding
        if not torch.equal(mask.bool(), known):
            raise ValueError(f"{name} hides other tokens than those that were padding in the cache's first prompt")
    if position_ids is None and not cache.by_token:
        position_ids = torch.arange(columns, columns + seqlen, device=device)[None]
    return TokenLayout.dense(batch, seqlen, device=device, cached=cache.seqlens, position_ids=position_ids)
