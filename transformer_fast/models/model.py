"""Whole models: a stack, or an encoder and a decoder, under a head. They take Hugging Face's argument names."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from transformer_fast.models.config import Architecture, ModelConfig
from transformer_fast.models.frontends import AudioEmbeddings
from transformer_fast.models.heads import LanguageHead, Targets, build_head
from transformer_fast.models.layers import AttentionFunction, Context
from transformer_fast.models.layout import TokenLayout
from transformer_fast.models.objectives import shift_right
from transformer_fast.models.output import ModelOutput
from transformer_fast.models.stack import Stack

if TYPE_CHECKING:
    from transformer_fast.generation.cache import CacheShape, KVCache
    from transformer_fast.generation.paged import PagedBatch

#: How much a cache that grows with use begins with, beyond the prompt.
_ROOM = 256


def check_grids(name: str, ids: Tensor, **grids: Tensor | None) -> None:
    """Ids are ``(batch, seqlen)``, and what goes with them has their shape: else rows would mix between sequences."""
    if ids.dim() != 2:
        raise ValueError(f"{name} has shape {tuple(ids.shape)}; allowed: (batch, seqlen)")
    for other, grid in grids.items():
        if grid is not None and grid.shape != ids.shape:
            raise ValueError(f"{other} has shape {tuple(grid.shape)}; allowed: {tuple(ids.shape)}, as {name}")


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


class Model(nn.Module):
    """What the three kinds of models share."""

    #: Of the stack that the head stands on; and what ``generate`` does unless told otherwise.
    config: ModelConfig
    generation_defaults: dict[str, Any]
    head: Any

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        self.architecture = architecture
        self.config = architecture.stack
        self.generation_defaults = dict(architecture.values)

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
        for stack in self.stacks:
            stack.set_backend(backend)

    def set_attention(self, attend: AttentionFunction) -> None:
        """Which function every self-attention layer calls: the library's own, or a peer to measure against."""
        for stack in self.stacks:
            stack.set_attention(attend)

    def _build_head(self, tokens: nn.Embedding | None) -> None:
        self.head = build_head(self.architecture, tokens)

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

    def _targets(self, given: Mapping[str, Any]) -> Targets:
        """The labels among the arguments; a name that nobody knows is an error."""
        unknown = sorted(set(given) - set(self.head.targets))
        if unknown:
            known = ", ".join(self.head.targets) or "none"
            raise TypeError(f"{type(self).__name__} got {', '.join(unknown)}; labels that its head takes: {known}")
        return {name: value for name, value in given.items() if value is not None}

    def _layout(
        self, ids: Tensor, mask: Tensor | None, position_ids: Tensor | None, targets: Targets | None, packed: bool
    ) -> TokenLayout:
        """The rows to compute: the real tokens, unless what the head makes of them depends on the padding.

        ``targets`` of None: no head reads the rows, or their last ones only; then windows count tokens.
        """
        batch, seqlen = ids.shape
        if position_ids is not None and position_ids.shape not in ((1, seqlen), (batch, seqlen)):
            raise ValueError(f"position_ids has shape {tuple(position_ids.shape)}; allowed: {(batch, seqlen)}")
        if mask is None or bool(mask.all()):
            return TokenLayout.dense(batch, seqlen, device=ids.device, position_ids=position_ids)
        if packed and targets is not None:
            keep = mask.bool()
            # Packing closes the holes of a mask, which a window would notice: it counts columns.
            starts = (keep.int().diff(dim=1) == 1).sum(1) + keep[:, 0]
            holes = self.config.sliding_window is not None and bool((starts > 1).any())
            packed = not holes and not self.head.needs_padding(ids, mask, targets)
        return TokenLayout.from_mask(mask, packed=packed, position_ids=position_ids)

    def _check_cacheable(self, name: str, layout: TokenLayout, cache: KVCache | PagedBatch) -> None:
        """A cache keeps tokens without padding: windows and relative places that go by column allow it on the left."""
        by_column = cache.is_empty and not cache.by_token
        places = self.config.sliding_window is not None or self.config.positions == "relative"
        if by_column and places and layout.mask is not None and not bool(layout.mask[:, -1].all()):
            raise ValueError(f"{name} is padded on the right; allowed with a cache in this model: on the left")

    @staticmethod
    def _states(states: list[Tensor], last: Tensor, layout: TokenLayout, unnormed: bool = False) -> tuple[Tensor, ...]:
        """``hidden_states``: the input of each layer, and the last result, in the grid."""
        rows = states if unnormed else [*states[:-1], last]
        return tuple(layout.to_grid(x) for x in rows)


class EncoderModel(Model):
    """A bidirectional stack: text (BERT and kin, T5's encoder) or images (ViT)."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__(architecture)
        assert architecture.encoder is not None
        self.encoder = Stack(architecture.encoder)
        self._build_head(self.encoder.tokens)

    def encode(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        *,
        targets: Targets | None = None,
        packed: bool = True,
        states: list[Tensor] | None = None,
    ) -> tuple[Tensor, TokenLayout]:
        """``(batch, seqlen)`` ids to rows ``(tokens, d)`` and their layout. Arguments as in :meth:`forward`."""
        check_grids("input_ids", input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids)
        self.encoder.check_length(input_ids.shape[1])
        pad = self.config.positions_from_pad
        if pad is not None and position_ids is None:
            # Counted over what is no padding; padding itself stands on the row before the first position's.
            real = input_ids != pad
            position_ids = real.cumsum(1) * real - 1
        elif position_ids is not None:
            position_ids = position_ids - self.config.position_offset
        layout = self._layout(input_ids, attention_mask, position_ids, targets, packed)
        types = None if token_type_ids is None else layout.take_rows(token_type_ids)
        x = self.encoder.embed(layout.take_rows(input_ids), layout, types)
        return self.encoder.run(x, Context(layout), states), layout

    def encode_image(
        self, pixel_values: Tensor, interpolate_pos_encoding: bool, states: list[Tensor] | None
    ) -> tuple[Tensor, TokenLayout]:
        """``(batch, channels, height, width)`` to rows ``(tokens, d)`` and their layout."""
        x = self.encoder.embeddings(pixel_values, interpolate_pos_encoding)
        layout = TokenLayout.dense(x.shape[0], x.shape[1], device=x.device)
        return self.encoder.run(x.flatten(0, 1), Context(layout), states), layout

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        output_hidden_states: bool = False,
        packed: bool = True,
        **labels: Tensor | None,
    ) -> ModelOutput:
        """What the head gives, in the shape that was asked for; zeros where there was padding.

        Args:
            input_ids: ``(batch, seqlen)`` int64.
            attention_mask: ``(batch, seqlen)``, nonzero = a real token; any pattern.
            token_type_ids, position_ids: ``(batch, seqlen)``; positions default to the columns, as in BERT, where left
                padding shifts them, or to a count over the ids that are no padding (RoBERTa).
            pixel_values: ``(batch, channels, height, width)``, for models of images.
            packed: compute the real tokens only, or compute the padding too and mask it.
            labels: those that the head takes, by their names.
        """
        targets = self._targets(labels)
        states: list[Tensor] | None = [] if output_hidden_states else None
        if pixel_values is not None:
            rows, layout = self.encode_image(pixel_values, interpolate_pos_encoding, states)
        elif input_ids is not None:
            grids = (input_ids, attention_mask, token_type_ids, position_ids)
            rows, layout = self.encode(*grids, targets=targets, packed=packed, states=states)
        else:
            raise TypeError("input_ids is None; allowed: (batch, seqlen) ids, or pixel_values")
        output = ModelOutput(self.head.results(rows, layout, input_ids, targets))
        if states is not None:
            output["hidden_states"] = self._states(states, rows, layout, self.architecture.final_state_unnormed)
        return output


class DecoderModel(Model):
    """A causal stack: GPT, Llama and kin."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__(architecture)
        assert architecture.decoder is not None
        self.decoder = Stack(architecture.decoder)
        self._build_head(self.decoder.tokens)

    def cache_shapes(self) -> list[CacheShape]:
        """What a cache has to hold for each layer."""
        return self.decoder.cache_shapes()

    def new_cache(self, batch: int, capacity: int, **options: Any) -> KVCache:
        """A cache for ``batch`` sequences of up to ``capacity`` tokens."""
        from transformer_fast.generation.cache import KVCache

        return KVCache(batch, self.cache_shapes(), capacity, device=self.device, dtype=self.dtype, **options)

    def decode(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        cache: KVCache | PagedBatch | None = None,
        *,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        targets: Targets | None = None,
        packed: bool = True,
        states: list[Tensor] | None = None,
    ) -> tuple[Tensor, TokenLayout]:
        """``(batch, seqlen)`` ids to rows ``(tokens, d)`` and their layout; arguments as in :meth:`forward`."""
        check_grids("input_ids", input_ids, token_type_ids=token_type_ids)
        seqlen = input_ids.shape[1]
        continues = cache is not None and not cache.is_empty
        if not continues:
            check_grids("input_ids", input_ids, attention_mask=attention_mask)
            layout = self._layout(input_ids, attention_mask, position_ids, targets, packed)
        else:
            assert cache is not None
            layout = _continued("attention_mask", input_ids, attention_mask, position_ids, cache)
        self.decoder.check_length(seqlen + (cache.max_seqlen if cache is not None and continues else 0))
        types = None if token_type_ids is None else layout.take_rows(token_type_ids)
        x = self.decoder.embed(layout.take_rows(input_ids), layout, types)
        if cache is not None:
            self._check_cacheable("attention_mask", layout, cache)
            cache.extend(layout)
        return self.decoder.run(x, Context(layout, cache=cache), states), layout

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: KVCache | None = None,
        use_cache: bool = False,
        output_hidden_states: bool = False,
        packed: bool = True,
        **labels: Tensor | None,
    ) -> ModelOutput:
        """What the head gives, in the shape that was asked for; zeros where there was padding.

        Args:
            input_ids: ``(batch, seqlen)`` int64.
            attention_mask: ``(batch, seqlen)``, nonzero = a real token, padded on either side; after
                ``past_key_values`` it covers the earlier columns too, as in ``transformers``.
            position_ids: ``(batch, seqlen)``; default the columns, as in ``transformers``' ``forward``.
            past_key_values: of an earlier call with ``use_cache=True``; the new tokens are taken in.
            labels: those that the head takes, by their names.
        """
        targets = self._targets(labels)
        states: list[Tensor] | None = [] if output_hidden_states else None
        cache = past_key_values
        if cache is not None and not hasattr(cache, "attend"):
            raise TypeError(f"past_key_values is a {type(cache).__name__}; allowed: what use_cache=True gave")
        if cache is None and use_cache:
            cache = self.new_cache(len(input_ids), input_ids.shape[1] + _ROOM)
        rows, layout = self.decode(
            input_ids,
            attention_mask,
            cache,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            targets=targets,
            packed=packed,
            states=states,
        )
        output = ModelOutput(self.head.results(rows, layout, input_ids, targets))
        if cache is not None:
            output["past_key_values"] = cache
        if states is not None:
            output["hidden_states"] = self._states(states, rows, layout)
        return output

    def next_token_logits(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, cache: KVCache | PagedBatch | None = None
    ) -> Tensor:
        """``(batch, vocab_size)``: the logits after each sequence's last token, and no others.

        Positions are counted over real tokens, so that padding on either side changes nothing.
        """
        position_ids = None
        if attention_mask is not None:
            if not bool(attention_mask.bool().any(1).all()):
                raise ValueError("attention_mask leaves a sequence without any token")
            position_ids = (attention_mask.bool().cumsum(1) - 1).clamp(min=0)
        if cache is not None:
            cache.by_token = True
        rows, layout = self.decode(input_ids, attention_mask, cache, position_ids=position_ids)
        return self.head.logits(layout.last_rows(rows))

    def generate(self, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Any) -> Tensor:
        """Continue prompts; see :func:`transformer_fast.generation.generate`."""
        from transformer_fast.generation import generate

        return generate(self, input_ids, attention_mask=attention_mask, **options)

    def loss(self, input_ids: Tensor) -> Tensor:
        """Mean cross-entropy in nats of each token given those before it; ``input_ids`` (batch, seqlen + 1).

        Never holds the logits of all tokens at once.
        """
        rows, _ = self.decode(input_ids[:, :-1])
        return self.head.loss(rows, input_ids[:, 1:].flatten())


class CausalLM(DecoderModel):
    """A decoder with fresh weights and its token table as the output projection, from a stack's configuration alone."""

    def __init__(self, config: ModelConfig) -> None:
        from transformer_fast.models.config import HeadConfig

        if not config.causal:
            raise ValueError("a language model that predicts the next token needs a configuration with causal=True")
        super().__init__(Architecture(decoder=config, head=HeadConfig("language")))
        self.initialize()


class Seq2SeqModel(Model):
    """An encoder of text or audio, and a decoder that reads its rows by cross-attention."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__(architecture)
        assert architecture.encoder is not None and architecture.decoder is not None
        self.encoder = Stack(architecture.encoder)
        self.decoder = Stack(architecture.decoder, self.encoder.tokens if architecture.shared_tokens else None)
        self._build_head(self.decoder.tokens)

    def encode(
        self, inputs: Tensor, attention_mask: Tensor | None = None, states: list[Tensor] | None = None
    ) -> tuple[Tensor, TokenLayout]:
        """``(batch, seqlen)`` ids or ``(batch, mel bins, frames)`` features to rows ``(tokens, d)``, and layout."""
        if self.encoder.config.front_end == "audio":
            x = self.encoder.embeddings(inputs)
            layout = TokenLayout.dense(x.shape[0], x.shape[1], device=x.device)
            return self.encoder.run(x.flatten(0, 1), Context(layout), states), layout
        check_grids("input_ids", inputs, attention_mask=attention_mask)
        self.encoder.check_length(inputs.shape[1])
        layout = self._layout(inputs, attention_mask, None, None, packed=True)
        return self.encoder.run(self.encoder.embed(layout.take_rows(inputs), layout), Context(layout), states), layout

    def decode(
        self,
        decoder_input_ids: Tensor,
        context: Context,
        decoder_attention_mask: Tensor | None = None,
        states: list[Tensor] | None = None,
        targets: Targets | None = None,
    ) -> tuple[Tensor, TokenLayout]:
        """``(batch, seqlen)`` ids to rows and their layout; ``context`` holds the encoder's rows and the caches."""
        check_grids("decoder_input_ids", decoder_input_ids)
        ids, mask, cache = decoder_input_ids, decoder_attention_mask, context.cache
        if cache is not None and not cache.is_empty:
            layout = _continued("decoder_attention_mask", ids, mask, None, cache)
            self.decoder.check_length(ids.shape[1] + cache.max_seqlen)
        else:
            check_grids("decoder_input_ids", ids, decoder_attention_mask=mask)
            self.decoder.check_length(ids.shape[1])
            layout = self._layout(ids, mask, None, targets, packed=cache is None or self.decoder.relative is None)
        x = self.decoder.embed(layout.take_rows(ids), layout)
        if cache is not None:
            self._check_cacheable("decoder_attention_mask", layout, cache)
            cache.extend(layout)
        context.layout = layout
        return self.decoder.run(x, context, states), layout

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        input_features: Tensor | None = None,
        past_key_values: Context | None = None,
        use_cache: bool = False,
        output_hidden_states: bool = False,
        **labels: Tensor | None,
    ) -> ModelOutput:
        """What the head gives for the decoder's tokens, and the encoder's last hidden state.

        Args:
            input_ids, attention_mask: ``(batch, seqlen)`` of the encoder.
            decoder_input_ids, decoder_attention_mask: ``(batch, seqlen)``; default: the labels, or the encoder's ids,
                one place to the right, with the decoder's start token first.
            input_features: ``(batch, mel bins, frames)``, for models of audio.
            past_key_values: of an earlier call with ``use_cache=True``; the encoder is not run again.
            labels: those that the head takes, by their names.
        """
        targets = self._targets(labels)
        states: dict[str, list[Tensor]] = {"encoder": [], "decoder": []} if output_hidden_states else {}
        context = past_key_values
        inputs = input_ids if input_features is None else input_features
        if context is None:
            if inputs is None:
                raise TypeError("input_ids is None; allowed: (batch, seqlen) ids, or input_features")
            memory, memory_layout = self.encode(inputs, attention_mask, states.get("encoder"))
            context = Context(memory_layout, memory=memory, memory_layout=memory_layout)
            if use_cache:
                self.add_caches(context, len(inputs), _ROOM)
        ids = self._decoder_ids(decoder_input_ids, input_ids, targets)
        rows, layout = self.decode(ids, context, decoder_attention_mask, states.get("decoder"), targets)
        read = input_ids if self.architecture.head.kind == "sequence" else ids
        output = ModelOutput(self.head.results(rows, layout, read, targets))
        if context.memory is not None and context.memory_layout is not None:
            output["encoder_last_hidden_state"] = context.memory_layout.to_grid(context.memory)
            if states:
                encoded = self._states(states["encoder"], context.memory, context.memory_layout)
                output["encoder_hidden_states"] = encoded
        if states:
            output["decoder_hidden_states"] = self._states(states["decoder"], rows, layout)
        if context.cache is not None:
            output["past_key_values"] = context
        return output

    def _decoder_ids(self, given: Tensor | None, input_ids: Tensor | None, targets: Targets) -> Tensor:
        """The decoder's ids: as given, or what teacher forcing makes of the labels."""
        if given is not None:
            return given
        source = targets.get("labels") if isinstance(self.head, LanguageHead) else input_ids
        if source is None:
            raise TypeError("decoder_input_ids is None; allowed: (batch, seqlen) ids, or labels to make them of")
        start, pad = (self.architecture.token(name) for name in ("decoder_start_token_id", "pad_token_id"))
        if start is None or pad is None:
            raise ValueError("the configuration has no decoder_start_token_id or pad_token_id: give decoder_input_ids")
        return shift_right(source, start, pad)

    def add_caches(self, context: Context, batch: int, capacity: int) -> None:
        """Let ``context`` keep the decoder's keys and values, and the encoder's."""
        from transformer_fast.generation.cache import CrossCache, KVCache

        shapes = self.decoder.cache_shapes()
        context.cache = KVCache(batch, shapes, capacity, device=self.device, dtype=self.dtype)
        context.cross_cache = CrossCache()

    def generate(self, inputs: Tensor | None = None, attention_mask: Tensor | None = None, **options: Any) -> Tensor:
        """Decode what the encoder read; see :func:`transformer_fast.generation.generate`."""
        from transformer_fast.generation import generate

        for name in ("input_ids", "input_features"):
            inputs = options.pop(name, inputs)
        if inputs is None:
            raise TypeError("input_ids is None; allowed: (batch, seqlen) ids, or input_features")
        return generate(self, inputs, attention_mask=attention_mask, **options)


def build(architecture: Architecture) -> Model:
    """An empty model of the kind that ``architecture`` asks for."""
    if architecture.encoder is None:
        return DecoderModel(architecture)
    return EncoderModel(architecture) if architecture.decoder is None else Seq2SeqModel(architecture)
