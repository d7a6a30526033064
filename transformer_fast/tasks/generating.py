"""Text from text: continuing prompts, summaries, translations."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from transformer_fast.generation import GenerationConfig
from transformer_fast.generation.config import as_ids
from transformer_fast.models import DecoderModel, Seq2SeqModel
from transformer_fast.tasks.loading import Done, Loaded, Source, batches, load
from transformer_fast.tasks.streaming import TextStream, continuation

#: New tokens where neither the caller nor the checkpoint says how many.
DEFAULT_NEW_TOKENS = 100

_NAMES = frozenset(field.name for field in fields(GenerationConfig))


def generate(
    model: Source,
    prompts: Sequence[str],
    *,
    on_text: Callable[[int, str], None] | None = None,
    on_step: Callable[[], None] | None = None,
    **options: Any,
) -> list[str]:
    """Continue prompts by a causal model, or answer them by an encoder-decoder, all as one batch.

    Args:
        model: a folder, a repository on the hub, or what ``load`` gave.
        prompts: texts of any lengths; their tokens are padded on the left.
        on_text: called with the row of a sequence and the next piece of its text, while it is made; no beams then.
        on_step: called after each step, which is one token of every sequence; no beams then.
        options: of :class:`transformer_fast.generation.GenerationConfig`, in place of the checkpoint's.

    Returns:
        the new text of each prompt, ``num_return_sequences`` times in a row.
    """
    loaded = load(model)
    language = loaded.model.architecture.head.kind == "language" and _reads_text(loaded)
    loaded.require("generate", "a causal language head, or an encoder-decoder with a language head", language)
    if not prompts:
        return []
    return _continue(loaded, prompts, options, on_text=on_text, on_step=on_step)


def summarize(
    model: Source,
    texts: Sequence[str],
    *,
    prefix: str | None = None,
    batch_size: int = 8,
    on_done: Done = None,
    **options: Any,
) -> list[str]:
    """Summaries by an encoder-decoder; settings and prefix are those that config.json has for the task.

    Args:
        model: a folder, a repository on the hub, or what ``load`` gave.
        texts: what is to be summarized; what the model cannot hold is cut, with a warning.
        prefix: what is written before each text; default the checkpoint's (T5: ``"summarize: "``), or nothing.
        batch_size: so many texts at a time.
        on_done: called with the number of texts after each batch.
        options: of :class:`transformer_fast.generation.GenerationConfig`, in place of the checkpoint's.
    """
    loaded = load(model)
    _require_seq2seq(loaded, "summarize")
    return _transduce(loaded, texts, _task_settings(loaded, "summarization"), prefix, batch_size, on_done, options)


def translate(
    model: Source,
    texts: Sequence[str],
    *,
    source: str | None = None,
    target: str | None = None,
    prefix: str | None = None,
    batch_size: int = 8,
    on_done: Done = None,
    **options: Any,
) -> list[str]:
    """Translations by an encoder-decoder.

    Args:
        model: a folder, a repository on the hub, or what ``load`` gave.
        texts: what is to be translated.
        source, target: languages as config.json names them (T5: ``translation_en_to_de``), or, of a Marian model with
            several targets, the target's token (``>>fra<<``) without its signs. A model for one pair needs neither.
        prefix: what is written before each text, in place of what belongs to the languages.
        batch_size, on_done, options: as in :func:`summarize`.
    """
    loaded = load(model)
    _require_seq2seq(loaded, "translate")
    settings: Mapping[str, Any] = {}
    if prefix is None:
        settings = _translation_settings(loaded, source, target)
    return _transduce(loaded, texts, settings, prefix, batch_size, on_done, options)


def _translation_settings(loaded: Loaded, source: str | None, target: str | None) -> Mapping[str, Any]:
    """What config.json has for a pair of languages, or the target's token as the prefix."""
    tasks = loaded.model.architecture.values.get("task_specific_params") or {}
    known = [name for name in tasks if name.startswith("translation")]
    name = f"translation_{source}_to_{target}"
    if name in tasks:
        return _task_settings(loaded, name)
    if target is not None and loaded.tokenizer.token_id(f">>{target}<<") is not None:
        return {"prefix": f">>{target}<< "}
    if source is None and target is None and len(known) < 2:
        return _task_settings(loaded, known[0]) if known else {}
    pairs = ", ".join(name.removeprefix("translation_").replace("_to_", " to ") for name in known)
    raise ValueError(
        f"source={source!r} and target={target!r} are no languages that {loaded.folder} names; allowed: "
        f"{pairs or 'none, it translates as it is'}, or a prefix"
    )


def _require_seq2seq(loaded: Loaded, task: str) -> None:
    model = loaded.model
    fits = isinstance(model, Seq2SeqModel) and model.architecture.head.kind == "language" and _reads_text(loaded)
    loaded.require(task, "an encoder-decoder with a language head", fits)


def _reads_text(loaded: Loaded) -> bool:
    return loaded.model.stacks[0].config.front_end == "tokens" and isinstance(
        loaded.model, (DecoderModel, Seq2SeqModel)
    )


def _task_settings(loaded: Loaded, task: str) -> Mapping[str, Any]:
    return (loaded.model.architecture.values.get("task_specific_params") or {}).get(task) or {}


def _transduce(
    loaded: Loaded,
    texts: Sequence[str],
    settings: Mapping[str, Any],
    prefix: str | None,
    batch_size: int,
    on_done: Done,
    options: Mapping[str, Any],
) -> list[str]:
    prefix = settings.get("prefix", "") if prefix is None else prefix
    found: list[str] = []
    for batch in batches(texts, batch_size, on_done):
        found += _continue(loaded, [prefix + text for text in batch], options, settings)
    return found


def generation_config(
    loaded: Loaded, options: Mapping[str, Any], prompt_length: int, settings: Mapping[str, Any] | None = None
) -> GenerationConfig:
    """What ``options`` ask for (None asks for nothing), else what the checkpoint says for the task, else in general.

    ``settings`` are those of the task.
    """
    asked = {name: value for name, value in options.items() if value is not None}
    if unknown := sorted(set(asked) - _NAMES):
        raise ValueError(f"unknown generation option: {', '.join(unknown)}; allowed: {', '.join(sorted(_NAMES))}")
    values = {**loaded.model.generation_defaults, **(settings or {})}
    for total, new in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")):
        if total in asked:  # what the checkpoint says in new tokens would go before it
            values.pop(new, None)
    values.update(asked)
    if values.get("max_length") is None and values.get("max_new_tokens") is None:
        config = loaded.model.config
        room = config.max_positions + 1 - prompt_length if config.positions == "learned" else DEFAULT_NEW_TOKENS
        values["max_new_tokens"] = max(min(DEFAULT_NEW_TOKENS, room), 1)
    return GenerationConfig.from_values(values)


@torch.no_grad()
def _continue(
    loaded: Loaded,
    texts: Sequence[str],
    options: Mapping[str, Any],
    settings: Mapping[str, Any] | None = None,
    *,
    on_text: Callable[[int, str], None] | None = None,
    on_step: Callable[[], None] | None = None,
) -> list[str]:
    """New text after each of ``texts``, or in answer to it."""
    model, tokenizer = loaded.model, loaded.tokenizer
    causal = isinstance(model, DecoderModel)
    encodings = loaded.encode(texts, max_seqlen=None if causal else loaded.max_seqlen)
    batch = tokenizer.pad(encodings, padding_side="left" if causal else "right")
    config = generation_config(loaded, options, batch.input_ids.shape[1] if causal else 1, settings)
    prompts = [e.ids if causal else [] for e in encodings for _ in range(config.num_return_sequences)]
    listener = None if on_text is None else _Listener(tokenizer.decode, prompts, config, on_text)

    def on_tokens(tokens: Tensor) -> None:
        if listener is not None:
            listener(tokens)
        if on_step is not None:
            on_step()

    ids = model.generate(
        batch.input_ids.to(model.device),
        batch.attention_mask.to(model.device),
        config=config,
        on_tokens=None if listener is None and on_step is None else on_tokens,
    )
    if listener is not None:
        listener.finish()
    start = batch.input_ids.shape[1] if causal else 1
    rows = [until_end(row, config) for row in ids[:, start:].tolist()]
    return [continuation(tokenizer.decode, prompt, row) for prompt, row in zip(prompts, rows, strict=True)]


def until_end(ids: list[int], config: GenerationConfig) -> list[int]:
    """Ids up to the first that ends a sequence: behind it is padding, which need not be a special token."""
    ends = as_ids(config.eos_token_id)
    return ids[: next((place for place, token in enumerate(ids) if token in ends), len(ids))]


class _Listener:
    """Turns each step's tokens into pieces of the rows' texts."""

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str],
        prompts: Sequence[Sequence[int]],
        config: GenerationConfig,
        on_text: Callable[[int, str], None],
    ) -> None:
        self.streams = {row: TextStream(decode, prompt) for row, prompt in enumerate(prompts)}
        self.ends = as_ids(config.eos_token_id)
        self.on_text = on_text

    def __call__(self, tokens: Tensor) -> None:
        for row, token in enumerate(tokens.tolist()):
            if row not in self.streams:
                continue
            if token in self.ends:
                self._tell(row, self.streams.pop(row).finish())
            else:
                self._tell(row, self.streams[row].push(token))

    def finish(self) -> None:
        """What was held back of the rows that did not end."""
        for row, stream in self.streams.items():
            self._tell(row, stream.finish())

    def _tell(self, row: int, piece: str) -> None:
        if piece:
            self.on_text(row, piece)
