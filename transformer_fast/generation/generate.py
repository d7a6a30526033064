"""From a prompt to its continuation: what to generate with which model, on which cache."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from transformer_fast.generation.config import GenerationConfig, as_ids
from transformer_fast.generation.search import beam_search, sample_search
from transformer_fast.generation.speculative import speculative_search
from transformer_fast.models.base import Model
from transformer_fast.models.checks import check_ids
from transformer_fast.models.model import DecoderModel, Seq2SeqModel


@torch.no_grad()
def generate(
    model: Model,
    inputs: Tensor | None,
    *,
    attention_mask: Tensor | None = None,
    decoder_input_ids: Tensor | None = None,
    config: GenerationConfig | None = None,
    on_tokens: Callable[[Tensor], None] | None = None,
    draft_model: DecoderModel | None = None,
    prompt_lookup: int | None = None,
    num_draft_tokens: int = 4,
    **options: Any,
) -> Tensor:
    """Continue each prompt, or decode what the encoder reads.

    Args:
        model: with a language head.
        inputs: ``(batch, seqlen)`` ids, or ``(batch, mel bins, frames)`` features for models of audio.
        attention_mask: ``(batch, seqlen)`` of ids of unequal length, padded on either side. Without one, a
            decoder-only model takes the padding token as padding, unless it ends sequences too.
        decoder_input_ids: ``(batch, length)``, what the decoder of an encoder-decoder begins with, after its start
            token, which is put before them where none has it (but not in models of audio).
        config: how to generate; default what the checkpoint says.
        on_tokens: called with each step's tokens ``(rows,)``, for streaming; not with beams.
        draft_model: a quicker model of the same vocabulary, which proposes ``num_draft_tokens`` at a time for ``model``
            to check in one pass; for decoder-only models, without beams. Greedy ids are the same, and draws have the
            same distribution. ``on_tokens`` gets a column once all rows have come so far.
        prompt_lookup: in place of a draft model: proposed is what followed where the sequence had its last so many
            tokens before, or fewer of them.
        options: of :class:`GenerationConfig`, in place of the config's; and ``use_cache=True``, which always holds.

    Returns:
        ``(batch * num_return_sequences, length)`` int64: the prompts, or what the decoder began with, and the new
        tokens, as in ``transformers``.
    """
    if not hasattr(model.head, "logits") or not isinstance(model, (DecoderModel, Seq2SeqModel)):
        raise TypeError(f"model is a {type(model).__name__} with no language head to generate with")
    is_decoder = isinstance(model, DecoderModel)
    if inputs is None:
        raise TypeError("input_ids is None; allowed: (batch, seqlen) ids, or input_features for models of audio")
    if is_decoder and decoder_input_ids is not None:
        raise TypeError(f"decoder_input_ids is given to a {type(model).__name__}, which reads input_ids alone")
    if model.stacks[0].config.front_end == "tokens":
        check_ids("input_ids", inputs, attention_mask=attention_mask)
    if options.pop("use_cache", True) is not True:
        raise ValueError("use_cache is not True; allowed: True, as there is no generation without a cache")
    settings = (config or GenerationConfig.from_values(model.generation_defaults)).replace(**options)
    if settings.num_beams > 1 and on_tokens is not None:
        raise ValueError(f"on_tokens with num_beams={settings.num_beams}: beams have no token until the end")
    if is_decoder and attention_mask is None:  # for encoders transformers infers none, and neither do we
        attention_mask = _mask_of(inputs, settings)
    if attention_mask is not None and not bool(attention_mask.bool().any(1).all()):
        raise ValueError("attention_mask leaves a prompt without any token")
    ids = inputs if is_decoder else _decoder_start(decoder_input_ids, inputs, settings)
    limit = settings.length_limit(
        ids.shape[1], model.config.max_positions if model.config.positions == "learned" else None
    )
    _check_positions("model", model, limit)
    settings = settings.replace(max_new_tokens=limit - ids.shape[1])  # the default depends on the model
    repeats = settings.rows_per_prompt
    if draft_model is not None or prompt_lookup is not None:
        if not isinstance(model, DecoderModel) or settings.num_beams > 1:
            raise ValueError(
                f"draft_model or prompt_lookup with a {type(model).__name__}, num_beams={settings.num_beams}; "
                "allowed: a DecoderModel, without beams"
            )
        if draft_model is not None:
            _check_positions("draft_model", draft_model, limit)
        ids = ids.repeat_interleave(repeats, 0)
        mask = None if attention_mask is None else attention_mask.repeat_interleave(repeats, 0)
        return speculative_search(
            model,
            ids,
            mask,
            settings,
            draft_model=draft_model,
            prompt_lookup=prompt_lookup,
            num_draft_tokens=num_draft_tokens,
            on_tokens=on_tokens,
        ).ids
    stepper = _Steps(model, inputs, attention_mask, ids, repeats, limit)
    ids = ids.repeat_interleave(repeats, 0)
    if settings.num_beams > 1:
        return beam_search(stepper, ids, settings)
    return sample_search(stepper, ids, settings, on_tokens)


def _mask_of(ids: Tensor, settings: GenerationConfig) -> Tensor | None:
    """Where ids that come without a mask are no padding; None where all are."""
    pad = settings.pad_token_id
    if pad is None or pad in as_ids(settings.eos_token_id):
        return None
    mask = ids != pad
    return None if bool(mask.all()) else mask


def _check_positions(name: str, model: Model, limit: int) -> None:
    longest = model.config.max_positions
    if model.config.positions == "learned" and limit - 1 > longest:  # the last token is not fed back
        raise ValueError(f"a length of {limit} is more than the {name}'s max_positions={longest}")


def _decoder_start(given: Tensor | None, inputs: Tensor, settings: GenerationConfig) -> Tensor:
    """``(batch, length)``: what the decoder begins with."""
    start = settings.decoder_start_token_id
    start = settings.bos_token_id if start is None else start
    if given is not None and (given.dim() != 2 or given.shape[0] != len(inputs) or given.shape[1] == 0):
        raise ValueError(f"decoder_input_ids has shape {tuple(given.shape)}; allowed: ({len(inputs)}, length)")
    if given is not None and (inputs.dim() != 2 or start is None or bool((given[:, 0] == start).any())):
        return given
    if start is None:
        raise ValueError("there is no decoder_start_token_id: give it, or decoder_input_ids")
    first = torch.full((len(inputs), 1), start, dtype=torch.int64, device=inputs.device)
    return first if given is None else torch.cat((first, given), 1)


class _Steps:
    """A :class:`Stepper`: the prompt once, then each row ``repeats`` times."""

    def __init__(
        self, model: Any, inputs: Tensor, mask: Tensor | None, ids: Tensor, repeats: int, capacity: int
    ) -> None:
        self.ids, self.repeats = ids, torch.arange(len(ids), device=ids.device).repeat_interleave(repeats)
        if isinstance(model, DecoderModel):
            self.cache: Any = model.new_cache(len(ids), capacity)
            self.logits = partial(model.next_token_logits, cache=self.cache)
            self.first = partial(self.logits, attention_mask=mask)
        else:
            self.cache = model.start(inputs, mask, capacity=capacity)
            self.first = self.logits = partial(model.next_token_logits, context=self.cache)

    def __call__(self, tokens: Tensor | None) -> Tensor:
        if tokens is not None:
            return self.logits(tokens[:, None])
        logits = self.first(self.ids)
        self.reorder(self.repeats)
        return logits[self.repeats]

    def reorder(self, index: Tensor) -> None:
        self.cache.reorder(index)
