"""From a model's scores for the next token to those that a search uses.

The rules, their order and their corner cases are those of ``transformers`` 5.17
(``GenerationMixin._get_logits_processor``), so that a checkpoint's ``generation_config.json`` means the same here.
Every rule takes ids ``(rows, length)`` int64, the prompt included, and scores ``(rows, vocab)`` float32, and gives
new scores: those it was given stay as they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from transformer_fast.generation.config import GenerationConfig, as_ids

#: ``(ids, scores)`` to scores.
Processor = Callable[[Tensor, Tensor], Tensor]


def processor(config: GenerationConfig, prompt_length: int, device: torch.device) -> Processor:
    """All that ``config`` asks for, as one function; with an encoder the prompt is the decoder's."""
    rules = list(_rules(config, prompt_length, device))

    def process(ids: Tensor, scores: Tensor) -> Tensor:
        for rule in rules:
            scores = rule(ids, scores)
        return scores

    return process


def _rules(config: GenerationConfig, prompt_length: int, device: torch.device) -> Iterator[Processor]:
    tensor = partial(torch.tensor, dtype=torch.int64, device=device)
    eos, forced_eos = as_ids(config.eos_token_id), as_ids(config.forced_eos_token_id)
    limit = config.length_limit(prompt_length)
    if config.repetition_penalty != 1:
        yield partial(_penalize_repetition, penalty=config.repetition_penalty)
    if config.no_repeat_ngram_size:
        yield partial(_forbid_repeated_ngrams, size=config.no_repeat_ngram_size)
    # An end is never a bad word by itself.
    words = {tuple(word) for word in config.bad_words_ids} - {(token,) for token in eos}
    for size in sorted(set(map(len, words))):
        alike = [word for word in words if len(word) == size]
        yield partial(_forbid_words, words=tensor(alike), largest=max(map(max, alike)))
    if eos:
        yield partial(_ban, tokens=tensor(eos), lengths=range(config.length_floor(prompt_length)))
    if config.forced_bos_token_id is not None:
        yield partial(_force, tokens=tensor([config.forced_bos_token_id]), at=1)
    if forced_eos:
        yield partial(_force, tokens=tensor(forced_eos), at=limit - 1)
    if config.suppress_tokens:
        yield partial(_ban, tokens=tensor(config.suppress_tokens), lengths=range(limit))
    if config.begin_suppress_tokens:
        # A forced token, after a prompt of one, is not yet the beginning.
        begin = prompt_length + (prompt_length == 1 and config.forced_bos_token_id is not None)
        yield partial(_ban, tokens=tensor(config.begin_suppress_tokens), lengths=range(begin, begin + 1))
    if config.do_sample:
        yield from _draw_rules(config, len(eos))
    if config.renormalize_logits:
        yield lambda ids, scores: scores.log_softmax(-1)


def _draw_rules(config: GenerationConfig, num_ends: int) -> Iterator[Processor]:
    # Beams need a token to go on with, whichever ends are drawn.
    least = 1 if config.num_beams == 1 else 1 + max(num_ends, 1)
    if config.temperature != 1:
        yield lambda ids, scores: scores / config.temperature
    if config.top_k:
        yield partial(_keep_top_k, k=max(config.top_k, least))
    if config.top_p < 1:
        yield partial(_keep_top_p, p=config.top_p, least=least)
    if config.min_p is not None:
        yield partial(_keep_min_p, p=config.min_p, least=least)


def _penalize_repetition(ids: Tensor, scores: Tensor, penalty: float) -> Tensor:
    seen = scores.gather(1, ids)
    return scores.scatter(1, ids, torch.where(seen < 0, seen * penalty, seen / penalty))


def _forbid_where(scores: Tensor, tokens: Tensor, hit: Tensor) -> Tensor:
    """Minus infinity for those of the ``tokens`` ``(rows, n)`` whose ``hit`` ``(rows, n)`` is True at any place."""
    bound = torch.full_like(hit, math.inf, dtype=scores.dtype).masked_fill(hit, -math.inf)
    return scores.scatter_reduce(1, tokens, bound, "amin")


def _forbid_repeated_ngrams(ids: Tensor, scores: Tensor, size: int) -> Tensor:
    length = ids.shape[1]
    if length < size:
        return scores
    ngrams = ids.unfold(1, size, 1)  # (rows, places, size)
    hit = (ngrams[..., :-1] == ids[:, None, length + 1 - size :]).all(-1)
    return _forbid_where(scores, ngrams[..., -1], hit)


def _forbid_words(ids: Tensor, scores: Tensor, words: Tensor, largest: int) -> Tensor:
    """``words`` is ``(n, size)``, all of one size, and ``largest`` their largest id."""
    (rows, length), (count, size), vocab = ids.shape, words.shape, scores.shape[1]
    if largest >= vocab:
        raise ValueError(f"bad_words_ids has the token {largest}; allowed: below the vocabulary's size, {vocab}")
    # The same in transformers: ids that are all of a word but its end, and no more than that, forbid nothing.
    if length < size:
        return scores
    hit = (ids[:, None, length + 1 - size :] == words[:, :-1]).all(-1)  # (rows, n)
    return _forbid_where(scores, words[:, -1].expand(rows, count), hit)


def _is_one_of(tokens: Tensor, scores: Tensor) -> Tensor:
    """``(vocab,)`` bool. Ids past the vocabulary are no token: the files of cut-down models have them."""
    return torch.isin(torch.arange(scores.shape[1], device=scores.device), tokens)


def _ban(ids: Tensor, scores: Tensor, tokens: Tensor, lengths: range) -> Tensor:
    """Minus infinity for ``tokens`` at these lengths."""
    return scores.masked_fill(_is_one_of(tokens, scores), -math.inf) if ids.shape[1] in lengths else scores


def _force(ids: Tensor, scores: Tensor, tokens: Tensor, at: int) -> Tensor:
    """Nothing but ``tokens`` at the length ``at``."""
    if ids.shape[1] != at:
        return scores
    return torch.zeros_like(scores).masked_fill(~_is_one_of(tokens, scores), -math.inf)


def _keep_top_k(ids: Tensor, scores: Tensor, k: int) -> Tensor:
    worst = scores.topk(min(k, scores.shape[1])).values[:, -1:]
    return scores.masked_fill(scores < worst, -math.inf)


def _keep_top_p(ids: Tensor, scores: Tensor, p: float, least: int) -> Tensor:
    ascending, order = scores.sort(-1)
    drop = ascending.softmax(-1).cumsum(-1) <= 1 - p
    drop[:, -least:] = False
    return scores.masked_fill(torch.zeros_like(drop).scatter(1, order, drop), -math.inf)


def _keep_min_p(ids: Tensor, scores: Tensor, p: float, least: int) -> Tensor:
    probabilities = scores.softmax(-1)
    drop = probabilities < p * probabilities.amax(-1, keepdim=True)
    best = probabilities.topk(min(least, scores.shape[1])).indices
    return scores.masked_fill(drop.scatter(1, best, False), -math.inf)
