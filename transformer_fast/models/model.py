"""Whole models of three kinds: an encoder, a decoder, or both. They take Hugging Face's argument names."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from transformer_fast.models.base import Model, States
from transformer_fast.models.checks import check_inputs
from transformer_fast.models.config import Architecture, HeadConfig, ModelConfig
from transformer_fast.models.heads import LanguageHead, Targets
from transformer_fast.models.layers import Context
from transformer_fast.models.layout import TokenLayout
from transformer_fast.models.objectives import shift_right
from transformer_fast.models.output import ModelOutput

if TYPE_CHECKING:
    from transformer_fast.generation.cache import CacheShape, KVCache
    from transformer_fast.generation.paged import PagedBatch

#: How much a cache that grows with use begins with, beyond the prompt.
_ROOM = 256


class EncoderModel(Model):
    """A bidirectional stack: text (BERT and kin, T5's encoder) or images (ViT)."""

    def encode(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        *,
        states: States = None,
        **how: Any,
    ) -> tuple[Tensor, TokenLayout]:
        """``(batch, seqlen)`` ids to rows ``(tokens, d)`` and their layout.

        Arguments as in :meth:`forward`, and ``targets`` and ``packed`` of :meth:`read`.
        """
        x, layout = self.read(
            self.encoder, input_ids, attention_mask, types=token_type_ids, position_ids=position_ids, **how
        )
        return self.run(self.encoder, x, Context(layout), states)

    def encode_image(
        self, pixel_values: Tensor, interpolate_pos_encoding: bool = False, states: States = None
    ) -> tuple[Tensor, TokenLayout]:
        """``(batch, channels, height, width)`` to rows ``(tokens, d)`` and their layout."""
        x, layout = self.read_grid(self.encoder, pixel_values, interpolate_pos_encoding)
        return self.run(self.encoder, x, Context(layout), states)

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
            pixel_values: ``(batch, channels, height, width)``, for models of images, which read nothing else.
            packed: compute the real tokens only, or compute the padding too and mask it.
            labels: those that the head takes, by their names.
        """
        targets = self.targets(labels)
        states: States = [] if output_hidden_states else None
        text = {"attention_mask": attention_mask, "token_type_ids": token_type_ids, "position_ids": position_ids}
        if self.config.front_end == "patches":
            images = "(batch, channels, height, width) images"
            check_inputs("pixel_values", pixel_values, images, input_ids=input_ids, **text)
            assert pixel_values is not None
            rows, layout = self.encode_image(pixel_values, interpolate_pos_encoding, states)
        else:
            other = {"pixel_values": pixel_values, "interpolate_pos_encoding": interpolate_pos_encoding or None}
            check_inputs("input_ids", input_ids, "(batch, seqlen) ids", **other)
            assert input_ids is not None
            rows, layout = self.encode(input_ids, **text, targets=targets, packed=packed, states=states)
        return self.results(rows, layout, input_ids, targets, hidden_states=None if states is None else tuple(states))


class DecoderModel(Model):
    """A causal stack: GPT, Llama and kin."""

    def cache_shapes(self) -> tuple[CacheShape, ...]:
        """What a cache has to hold for each layer."""
        return self.decoder.cache_shapes

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
        states: States = None,
        last_only: bool = False,
        **how: Any,
    ) -> tuple[Tensor, TokenLayout]:
        """``(batch, seqlen)`` ids to rows ``(tokens, d)`` and their layout.

        Arguments as in :meth:`forward`, ``targets`` and ``packed`` of :meth:`read`, and ``last_only`` of
        :meth:`Stack.run`.
        """
        x, layout = self.read(self.decoder, input_ids, attention_mask, types=token_type_ids, cache=cache, **how)
        return self.run(self.decoder, x, Context(layout, cache=cache), states, last_only=last_only)

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
            past_key_values: of an earlier call with ``use_cache=True``; the new tokens are taken in. No gradient flows
                through what it holds.
            labels: those that the head takes, by their names.
        """
        targets = self.targets(labels)
        check_inputs("input_ids", input_ids, "(batch, seqlen) ids")
        states: States = [] if output_hidden_states else None
        cache = past_key_values
        if cache is not None and not hasattr(cache, "attend"):
            raise TypeError(f"past_key_values is a {type(cache).__name__}; allowed: what use_cache=True gave")
        if cache is None and use_cache:
            cache = self.new_cache(len(input_ids), input_ids.shape[-1] + _ROOM)
        how: dict[str, Any] = {"position_ids": position_ids, "targets": targets, "packed": packed}
        rows, layout = self.decode(
            input_ids, attention_mask, cache, token_type_ids=token_type_ids, states=states, **how
        )
        hidden = None if states is None else tuple(states)
        return self.results(rows, layout, input_ids, targets, past_key_values=cache, hidden_states=hidden)

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
            if self.config.positions not in ("relative", "none"):
                position_ids = (attention_mask.bool().cumsum(1) - 1).clamp(min=0)
        if cache is not None:
            cache.by_token = True
        rows, _ = self.decode(input_ids, attention_mask, cache, position_ids=position_ids, last_only=True)
        return self.head.logits(rows)

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
        if not config.causal:
            raise ValueError("a language model that predicts the next token needs a configuration with causal=True")
        super().__init__(Architecture(decoder=config, head=HeadConfig("language")))
        self.initialize()


class Seq2SeqModel(Model):
    """An encoder of text or audio, and a decoder that reads its rows by cross-attention."""

    def encode(
        self, inputs: Tensor, attention_mask: Tensor | None = None, states: States = None
    ) -> tuple[Tensor, TokenLayout]:
        """``(batch, seqlen)`` ids or ``(batch, mel bins, frames)`` features to rows ``(tokens, d)``, and layout."""
        if self.encoder.config.front_end == "audio":
            x, layout = self.read_grid(self.encoder, inputs)
        else:
            x, layout = self.read(self.encoder, inputs, attention_mask)
        return self.run(self.encoder, x, Context(layout), states)

    def decode(
        self,
        decoder_input_ids: Tensor,
        context: Context,
        decoder_attention_mask: Tensor | None = None,
        states: States = None,
        targets: Targets | None = None,
    ) -> tuple[Tensor, TokenLayout]:
        """``(batch, seqlen)`` ids to rows and their layout; ``context`` holds the encoder's rows and the caches."""
        cache = context.cache
        x, context.layout = self.read(
            self.decoder,
            decoder_input_ids,
            decoder_attention_mask,
            prefix="decoder_",
            cache=cache,
            targets=targets,
            packed=cache is None or self.decoder.relative is None,
        )
        return self.run(self.decoder, x, context, states)

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
            input_features: ``(batch, mel bins, frames)``, for models of audio, which have no mask.
            past_key_values: of an earlier call with ``use_cache=True``; the encoder is not run again. No gradient flows
                through what it holds.
            labels: those that the head takes, by their names.
        """
        targets = self.targets(labels)
        encoded: States = [] if output_hidden_states else None
        decoded: States = [] if output_hidden_states else None
        context = past_key_values
        if context is None:
            inputs = self.inputs(input_ids, input_features)
            context = self.start(inputs, attention_mask, capacity=_ROOM if use_cache else 0, states=encoded)
        elif not isinstance(context, Context):
            raise TypeError(f"past_key_values is a {type(context).__name__}; allowed: what use_cache=True gave")
        ids = self._decoder_ids(decoder_input_ids, input_ids, targets)
        rows, layout = self.decode(ids, context, decoder_attention_mask, decoded, targets)
        read = input_ids if self.architecture.head.kind == "sequence" else ids
        more: dict[str, Any] = {}
        if context.memory is not None and context.memory_layout is not None:
            more["encoder_last_hidden_state"] = context.memory_layout.to_grid(context.memory)
        if encoded is not None and decoded is not None:
            more |= {"encoder_hidden_states": tuple(encoded) or None, "decoder_hidden_states": tuple(decoded)}
        past = None if context.cache is None else context
        return self.results(rows, layout, read, targets, past_key_values=past, **more)

    def inputs(self, input_ids: Tensor | None, input_features: Tensor | None) -> Tensor:
        """What the encoder reads, of the two: TypeError unless it is that one."""
        given = {"input_ids": input_ids, "input_features": input_features}
        is_audio = self.encoder.config.front_end == "audio"
        name, shape = ("input_features", "mel bins, frames) features") if is_audio else ("input_ids", "seqlen) ids")
        value = given.pop(name)
        check_inputs(name, value, f"(batch, {shape}", **given)
        assert value is not None
        return value

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

    def start(
        self, inputs: Tensor, attention_mask: Tensor | None = None, *, capacity: int, states: States = None
    ) -> Context:
        """What the decoder reads of the encoder; with caches of both, where ``capacity`` tokens are to be made."""
        from transformer_fast.generation.cache import CrossCache, KVCache

        memory, layout = self.encode(inputs, attention_mask, states)
        context = Context(layout, memory=memory, memory_layout=layout)
        if capacity:
            shapes = self.decoder.cache_shapes
            context.cache = KVCache(layout.batch, shapes, capacity, device=self.device, dtype=self.dtype)
            context.cross_cache = CrossCache()
        return context

    def next_token_logits(self, decoder_input_ids: Tensor, context: Context) -> Tensor:
        """``(batch, vocab_size)``: the logits after each sequence's last token, and no others."""
        rows, layout = self.decode(decoder_input_ids, context)
        return self.head.logits(layout.last_rows(rows))

    def generate(self, inputs: Tensor | None = None, attention_mask: Tensor | None = None, **options: Any) -> Tensor:
        """Decode what the encoder read; see :func:`transformer_fast.generation.generate`."""
        from transformer_fast.generation import generate

        for name in ("input_ids", "input_features"):
            inputs = options.pop(name, inputs)
        return generate(self, inputs, attention_mask=attention_mask, **options)


def build(architecture: Architecture) -> Model:
    """An empty model of the kind that ``architecture`` asks for."""
    if architecture.encoder is None:
        return DecoderModel(architecture)
    return EncoderModel(architecture) if architecture.decoder is None else Seq2SeqModel(architecture)
