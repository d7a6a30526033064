"""The two searches: one token after another, and beams.

Both work on any model that is given as a :class:`Stepper`, and give the ids that ``transformers`` 5.17 gives for the
same scores (``GenerationMixin._sample`` and ``_beam_search``), corner cases included.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from transformer_fast.generation.config import GenerationConfig, as_ids
from transformer_fast.generation.processors import processor

#: Added to the score of what must not be chosen. Finite: where there is nothing else, it still has an order.
BARRED = -1.0e9


class Stepper(Protocol):
    """A model and its cache, for a fixed number of rows, that has been given the prompts."""

    def __call__(self, tokens: Tensor | None) -> Tensor:
        """Take in ``tokens`` ``(rows,)``, None the first time; gives the logits ``(rows, vocab)`` after them."""
        ...

    def reorder(self, index: Tensor) -> None:
        """Row ``i`` goes on as what row ``index[i]`` was, which had the same prompt."""
        ...


@torch.no_grad()
def sample_search(
    stepper: Stepper, ids: Tensor, config: GenerationConfig, on_tokens: Callable[[Tensor], None] | None = None
) -> Tensor:
    """Continue the rows of ``ids`` ``(rows, prompt length)`` by the best token each time, or by a drawn one.

    That goes on until all have ended or are as long as they may be; rows that end early are filled with the padding
    token. ``on_tokens`` is called with each step's tokens ``(rows,)``. Returns ``(rows, length)``, prompts included.
    """
    limit = config.length_limit(ids.shape[1])
    process = processor(config, ids.shape[1], ids.device)
    generator, ends = generator_of(config, ids.device), _ends(config, ids.device)
    fill = filling(config)
    done = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
    tokens = None
    while True:
        scores = process(ids, stepper(tokens).float())
        if config.do_sample:
            tokens = torch.multinomial(scores.softmax(-1), 1, generator=generator).squeeze(1)
        else:
            tokens = scores.argmax(-1)
        if ends is not None:
            tokens = tokens.masked_fill(done, fill)
            done = done | torch.isin(tokens, ends)
        ids = torch.cat((ids, tokens[:, None]), 1)
        if on_tokens is not None:
            on_tokens(tokens)
        # Where nothing ends a row, the device is not waited for.
        if ids.shape[1] >= limit or (ends is not None and bool(done.all())):
            return ids


@torch.no_grad()
def beam_search(stepper: Stepper, ids: Tensor, config: GenerationConfig) -> Tensor:
    """The sequences of the best scores, among those that ``num_beams`` beams for each prompt come across.

    ``ids`` ``(batch * num_beams, prompt length)`` has each prompt ``num_beams`` times in a row. Returns
    ``(batch * num_return_sequences, length)``, prompts included, each prompt's best sequence first.
    """
    num_beams, (rows, prompt_length) = config.num_beams, ids.shape
    if rows % num_beams:
        raise ValueError(f"ids has {rows} rows; allowed: a multiple of num_beams={num_beams}")
    search = _BeamSearch(config, prompt_length, ids.device)
    running = search.start(ids.reshape(-1, num_beams, prompt_length))
    kept = running._replace(scores=torch.full_like(running.scores, BARRED))
    improvable = torch.ones(len(running.ids), 1, dtype=torch.bool, device=ids.device)
    tokens = None
    while True:
        candidates = search.candidates(running, stepper(tokens))
        running = search.survivors(candidates)
        kept = search.results(kept, candidates, improvable)
        improvable = improvable & search.may_improve(running, kept)
        stop = ~improvable.any() | candidates.ended.all()
        if config.early_stopping is True:
            stop = stop | kept.ended.all()
        if bool(stop):
            break
        stepper.reorder(running.rows.flatten())
        tokens = running.ids[:, :, -1].flatten()
    best = slice(0, config.num_return_sequences)
    return kept.ids[:, best, : int(kept.lengths[:, best].max())].flatten(0, 1)


class _Beams(NamedTuple):
    """``n`` sequences for each prompt, best first. All but ``ids`` are ``(batch, n)``."""

    ids: Tensor  # (batch, n, length)
    scores: Tensor  # float32, the sum of log-probabilities; divided for the length in those that are kept
    lengths: Tensor  # how many ids are no filling
    ended: Tensor  # bool
    rows: Tensor  # the row of the step before that each one continues

    def take(self, index: Tensor) -> _Beams:
        """Those at ``index`` ``(batch, m)``."""
        ids, *others = self
        return _Beams(ids.take_along_dim(index[:, :, None], 1), *(other.gather(1, index) for other in others))


class _BeamSearch:
    """The parts of a step, for prompts of one length."""

    def __init__(self, config: GenerationConfig, prompt_length: int, device: torch.device) -> None:
        self.config, self.prompt_length = config, prompt_length
        self.limit = config.length_limit(prompt_length)
        self.process = processor(config, prompt_length, device)
        self.generator, self.ends = generator_of(config, device), _ends(config, device)
        # So many that num_beams are left to go on with when all others end.
        self.num_candidates = config.num_beams * max(2, 1 + len(as_ids(config.eos_token_id)))
        # A pad_token_id of 0 (T5's) counts as none in transformers' beam search; the same here, for the same ids.
        self.fill = config.pad_token_id or _first_end(config)

    def start(self, ids: Tensor) -> _Beams:
        """The prompts ``(batch, num_beams, length)``. All beams being alike, only the first may be continued."""
        rows = torch.arange(ids.shape[0] * ids.shape[1], device=ids.device).view(ids.shape[:2])
        scores = torch.full(rows.shape, BARRED, dtype=torch.float32, device=ids.device)
        scores[:, 0] = 0
        return _Beams(ids, scores, torch.full_like(rows, ids.shape[2]), torch.zeros_like(rows, dtype=torch.bool), rows)

    def candidates(self, running: _Beams, logits: Tensor) -> _Beams:
        """The best continuations by one token, or drawn ones."""
        batch, num_beams, length = running.ids.shape
        scores = self.process(running.ids.flatten(0, 1), logits.float().log_softmax(-1))
        vocab = scores.shape[1]
        scores = (scores.view(batch, num_beams, vocab) + running.scores[:, :, None]).flatten(1)
        if self.config.do_sample:
            chosen = torch.multinomial(scores.softmax(-1), self.num_candidates, generator=self.generator)
        else:
            chosen = scores.topk(self.num_candidates).indices
        beams, tokens = chosen // vocab, chosen % vocab
        ended = torch.full_like(tokens, length + 1 >= self.limit, dtype=torch.bool)
        if self.ends is not None:
            ended = ended | torch.isin(tokens, self.ends)
        ids = torch.cat((running.take(beams).ids, tokens[:, :, None]), 2)
        rows = beams + torch.arange(batch, device=beams.device)[:, None] * num_beams
        return _Beams(ids, scores.gather(1, chosen), torch.full_like(tokens, length + 1), ended, rows)

    def survivors(self, candidates: _Beams) -> _Beams:
        """The best candidates that have not ended."""
        scores, best = _bar(candidates.scores, candidates.ended).topk(self.config.num_beams)
        return candidates.take(best)._replace(scores=scores)

    def results(self, kept: _Beams, candidates: _Beams, improvable: Tensor) -> _Beams:
        """The best ended sequences so far. Of the candidates only the first ``num_beams`` may become one."""
        is_first = torch.arange(self.num_candidates, device=improvable.device) < self.config.num_beams
        ended = candidates.ended & is_first
        scores = candidates.scores / self._length_weight(candidates.ids.shape[2])
        if self.config.early_stopping is True:
            scores = _bar(scores, kept.ended.all(1, keepdim=True))
        # One after the other: their rounding orders what has not ended, in transformers too.
        scores = _bar(_bar(scores, ~improvable), ~ended)
        longer = kept._replace(ids=F.pad(kept.ids, (0, 1), value=self.fill))
        pairs = zip(longer, candidates._replace(scores=scores, ended=ended), strict=True)
        both = _Beams(*(torch.cat(pair, 1) for pair in pairs))
        return both.take(both.scores.topk(self.config.num_beams).indices)

    def may_improve(self, running: _Beams, kept: _Beams) -> Tensor:
        """``(batch, 1)``: whether the best beam could still come before the worst one that has ended."""
        grows = self.config.early_stopping == "never" and self.config.length_penalty > 0
        best = running.scores[:, :1] / self._length_weight(self.limit if grows else running.ids.shape[2])
        return best > kept.scores.amin(1, keepdim=True)  # about BARRED while fewer than num_beams have ended

    def _length_weight(self, length: int) -> float:
        """What the score of a sequence of this length is divided by."""
        return float(length - self.prompt_length) ** self.config.length_penalty


def _bar(scores: Tensor, barred: Tensor) -> Tensor:
    return scores + barred.to(scores.dtype) * BARRED


def _ends(config: GenerationConfig, device: torch.device) -> Tensor | None:
    return torch.tensor(as_ids(config.eos_token_id), device=device) if config.eos_token_id else None


def filling(config: GenerationConfig) -> int:
    """The token that follows the end of a sequence where others go on."""
    return _first_end(config) if config.pad_token_id is None else config.pad_token_id


def _first_end(config: GenerationConfig) -> int:
    """The token that fills where no padding token is given; -1, never used, where nothing ends a sequence."""
    return (*as_ids(config.eos_token_id), -1)[0]


def generator_of(config: GenerationConfig, device: torch.device) -> torch.Generator | None:
    """A source of randomness at the seed's start, or None for torch's own."""
    return None if config.seed is None else torch.Generator(device).manual_seed(config.seed)
