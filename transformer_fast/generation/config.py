"""How text is generated: one frozen record, with the names and defaults of a ``generation_config.json``."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, TypeAlias

#: One token id, several, or none.
Ids: TypeAlias = "int | Sequence[int] | None"


def as_ids(value: Ids) -> tuple[int, ...]:
    """One form for all three."""
    return () if value is None else (value,) if isinstance(value, int) else tuple(value)


@dataclass(frozen=True)
class GenerationConfig:
    """Which continuation is searched for, and how. None is the default, save that ``top_k=None`` is no limit, as 0 is.

    Attributes:
        max_new_tokens, min_new_tokens: how many tokens are made; they go before ``max_length`` and ``min_length``,
            which count the prompt too. 20 new ones where nothing is said.
        num_beams: 1 for greedy search or sampling, more for beam search.
        num_return_sequences: continuations of each prompt.
        do_sample: draw tokens instead of taking the best; the options down to ``seed`` concern draws only.
        top_k: draw from the ``top_k`` best tokens; 0 for all.
        top_p: draw from the fewest best tokens that have this much of the probability together.
        min_p: draw from the tokens with at least this share of the best one's probability.
        seed: makes draws repeatable; None for torch's own stream.
        repetition_penalty: above 1 makes tokens less likely that are there already, the prompt's included.
        no_repeat_ngram_size: no run of so many tokens comes twice; 0 for no such rule.
        bad_words_ids: runs of tokens that are not made.
        length_penalty: a beam's score is divided by its number of new tokens to this power.
        early_stopping: when beams stop. True: with ``num_beams`` ended ones. False: when better ones are unlikely.
            ``"never"``: when better ones are impossible.
        eos_token_id: the token or tokens that end a sequence.
        pad_token_id: fills what follows the end; by default the first ``eos_token_id``.
        forced_bos_token_id: the token after a prompt of one token, a decoder's start.
        forced_eos_token_id: the last token of a sequence of the greatest length, or tokens to choose it from.
        suppress_tokens, begin_suppress_tokens: tokens that are not made; that are not made first.
        renormalize_logits: scores are log-probabilities again after all other rules, which beams add up.
    """

    max_new_tokens: int | None = None
    max_length: int | None = None
    min_new_tokens: int | None = None
    min_length: int = 0
    num_beams: int = 1
    num_return_sequences: int = 1
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int | None = 50
    top_p: float = 1.0
    min_p: float | None = None
    seed: int | None = None
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    bad_words_ids: Sequence[Sequence[int]] = ()
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    eos_token_id: Ids = ()
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    decoder_start_token_id: int | None = None
    forced_bos_token_id: int | None = None
    forced_eos_token_id: Ids = ()
    suppress_tokens: Sequence[int] = ()
    begin_suppress_tokens: Sequence[int] = ()
    renormalize_logits: bool = False

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is None:
                value = 0 if field.name == "top_k" else field.default
            if field.name in ("eos_token_id", "forced_eos_token_id", "suppress_tokens", "begin_suppress_tokens"):
                value = _checked_ids(field.name, value)
            elif field.name == "bad_words_ids":
                if not (isinstance(value, Sequence) and all(isinstance(word, Sequence) and word for word in value)):
                    raise ValueError(f"bad_words_ids={value!r}; allowed: a list of lists of token ids")
                value = tuple(_checked_ids(field.name, word) for word in value)
            object.__setattr__(self, field.name, value)
        for names, kind, least, most in _NUMBERS:
            for name in names.split():
                value = getattr(self, name)
                right = isinstance(value, (int, kind)) and not isinstance(value, bool) and least <= value <= most
                if not (right or value is None):
                    raise ValueError(f"{name}={value!r}; allowed: {kind.__name__} from {least} to {most}")
        self._check_choices()

    def _check_choices(self) -> None:
        """Refuse what is not a choice, and values that are fine each alone but not together."""
        for name in ("do_sample", "renormalize_logits"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}={getattr(self, name)!r}; allowed: True or False")
        if not (isinstance(self.early_stopping, bool) or self.early_stopping == "never"):
            raise ValueError(f"early_stopping={self.early_stopping!r}; allowed: True, False or 'never'")
        if self.do_sample and self.temperature == 0:
            raise ValueError("temperature=0 with do_sample=True; allowed: above 0, or do_sample=False")
        if self.num_return_sequences > self.num_beams and (self.num_beams > 1 or not self.do_sample):
            most = f"at most num_beams={self.num_beams}, or any number with do_sample=True and num_beams=1"
            raise ValueError(f"num_return_sequences={self.num_return_sequences}; allowed: {most}")
        for name in ("forced_bos_token_id", "forced_eos_token_id"):
            forced = as_ids(getattr(self, name))
            if forced and set(forced) <= set(self.suppress_tokens):
                raise ValueError(f"{name}={getattr(self, name)} is in suppress_tokens too; allowed: one or the other")

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> GenerationConfig:
        """From a ``generation_config.json``, or a ``config.json`` with such keys; other keys are passed over.

        But with a warning where they would change what is generated.
        """
        others = [(name, neutral) for neutral, names in _NOT_HERE for name in names.split()]
        missed = [name for name, neutral in others if values.get(name) not in (None, neutral, [], {})]
        if missed:
            settings = ", ".join(f"{name}={values[name]!r}" for name in sorted(missed))
            warnings.warn(f"generation settings that are not supported, and have no effect: {settings}", stacklevel=3)
        known = {field.name for field in fields(cls)}
        return cls(**{name: value for name, value in values.items() if name in known and value is not None})

    def replace(self, **changes: Any) -> GenerationConfig:
        """A copy with other values."""
        known = {field.name for field in fields(self)}
        if unknown := sorted(set(changes) - known):
            raise TypeError(f"unknown generation option: {', '.join(unknown)}; allowed: {', '.join(sorted(known))}")
        return dataclasses.replace(self, **changes)

    @property
    def rows_per_prompt(self) -> int:
        """How often each prompt stands in the batch that is searched."""
        return max(self.num_beams, self.num_return_sequences)

    def length_limit(self, prompt_length: int, max_positions: int | None = None) -> int:
        """The greatest length, prompt included; ``max_positions`` bounds it only where no length was asked for."""
        if self.max_new_tokens is not None:
            limit = prompt_length + self.max_new_tokens
        elif self.max_length is not None:
            limit = self.max_length
        else:
            limit = prompt_length + 20 if max_positions is None else min(prompt_length + 20, max_positions)
        if prompt_length >= limit:
            raise ValueError(f"the prompt has {prompt_length} tokens; allowed: fewer than the greatest length, {limit}")
        return limit

    def length_floor(self, prompt_length: int) -> int:
        """The length, prompt included, before which no sequence ends."""
        return self.min_length if self.min_new_tokens is None else prompt_length + self.min_new_tokens


#: What else a file of transformers may ask for, by the value that asks for nothing; None does so everywhere.
_NOT_HERE: tuple[tuple[object, str], ...] = (
    (None, "constraints dola_layers exponential_decay_length_penalty force_words_ids forced_decoder_ids max_time"),
    (None, "sequence_bias stop_strings top_h watermarking_config"),
    (0, "diversity_penalty encoder_no_repeat_ngram_size epsilon_cutoff eta_cutoff penalty_alpha"),
    (1, "encoder_repetition_penalty guidance_scale num_beam_groups typical_p"),
    (False, "remove_invalid_values token_healing"),
)

#: Names, their type, the least value and the greatest. Ids may be negative: files have -1 for "none".
_NUMBERS: tuple[tuple[str, type[float], float, float], ...] = (
    ("max_new_tokens max_length num_beams num_return_sequences", int, 1, math.inf),
    ("min_new_tokens min_length top_k no_repeat_ngram_size seed", int, 0, math.inf),
    ("pad_token_id bos_token_id decoder_start_token_id forced_bos_token_id", int, -math.inf, math.inf),
    ("top_p min_p", float, 0, 1),
    ("temperature", float, 0, math.inf),
    ("repetition_penalty", float, math.ulp(0.0), math.inf),
    ("length_penalty", float, -math.inf, math.inf),
)


def _checked_ids(name: str, value: Any) -> tuple[int, ...]:
    ids = as_ids(value) if isinstance(value, (int, Sequence)) else (value,)
    if not all(isinstance(token, int) and not isinstance(token, bool) for token in ids):
        raise ValueError(f"{name}={value!r}; allowed: token ids")
    return ids
