"""Several tokens a step: something quick proposes them, and one pass of the model checks them all.

What is proposed changes how long it takes, and nothing else: greedy search gives the same ids (but for ties that
rounding decides), and sampling draws from the same distribution (Leviathan et al., "Fast Inference from Transformers
via Speculative Decoding", 2023).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from transformer_fast.generation.config import GenerationConfig, as_ids
from transformer_fast.generation.processors import processor
from transformer_fast.generation.search import filling, generator_of
from transformer_fast.models.model import DecoderModel


class Speculated(NamedTuple):
    """What :func:`speculative_search` made. A pass of the model counts once for each row."""

    ids: Tensor
    new_tokens: int
    row_passes: int

    @property
    def tokens_per_pass(self) -> float:
        """1, and the mean number of accepted tokens."""
        return self.new_tokens / self.row_passes


class Chooser:
    """What tokens are drawn from. Greedy search is a draw where one token is certain."""

    def __init__(self, config: GenerationConfig, prompt_length: int, device: torch.device) -> None:
        self.greedy, self.process = not config.do_sample, processor(config, prompt_length, device)
        self.generator = generator_of(config, device)

    def probabilities(self, rows: Sequence[Tensor], logits: Tensor) -> Tensor:
        """Of the token after each row ``(length,)`` and its last beginnings, whose logits are ``(rows, n, vocab)``."""
        first = 1 - logits.shape[1]
        scores = [
            self.process(row[None, : len(row) + first + place], after[None])
            for row, places in zip(rows, logits.float(), strict=True)
            for place, after in enumerate(places)
        ]
        joined = torch.cat(scores).view(logits.shape)
        return F.one_hot(joined.argmax(-1), logits.shape[2]).float() if self.greedy else joined.softmax(-1)

    def draw(self, weights: Tensor) -> Tensor:
        """A token of each row, ``(rows, vocab)`` to ``(rows,)``."""
        return weights.argmax(1) if self.greedy else torch.multinomial(weights, 1, generator=self.generator)[:, 0]

    def check(self, tokens: Tensor, proposed: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
        """How many of ``tokens`` ``(rows, n)`` are accepted ``(rows,)``, and the token that follows them ``(rows,)``.

        They were drawn from ``proposed`` ``(rows, n, vocab)`` and come out as if from ``wanted`` ``(rows, n + 1,
        vocab)``: each is accepted with the probability wanted / proposed, and the first that is not gives way to a draw
        from what ``wanted`` has beyond ``proposed``.
        """
        chances = (wanted[:, :-1].gather(2, tokens[..., None]) / proposed.gather(2, tokens[..., None])).squeeze(2)
        lots = torch.zeros_like(chances)  # a greedy chance is 0 or 1
        if not self.greedy:
            lots.uniform_(generator=self.generator)
        accepted = (lots < chances).long().cumprod(1).sum(1)
        here = torch.arange(len(tokens), device=tokens.device), accepted
        wanted, proposed = wanted[here], F.pad(proposed, (0, 0, 0, 1))[here]  # nothing is proposed after the last
        beyond = (wanted - proposed).clamp(min=0)
        # Of two that are equal but for rounding there may be nothing left.
        return accepted, self.draw(torch.where(beyond.any(1, keepdim=True), beyond, wanted))


class _Reader:
    """A model, and a cache of what it has read of each row."""

    def __init__(self, model: DecoderModel, ids: Tensor, mask: Tensor | None, limit: int, slack: int) -> None:
        self.model, self.cache = model, model.new_cache(len(ids), limit, slack=slack)
        self.logits = model.next_token_logits(ids, mask, self.cache)[:, None]
        self.padding = ids.shape[1] - self.cache.seqlens

    def unread(self, rows: Sequence[Tensor]) -> Tensor:
        """Forget what did not become a part of the rows; returns the ids ``(rows, n)`` to be read now, one or more.

        To be called each time that the rows have grown: then all but their last token is as it was read.
        """
        lengths = torch.tensor([len(row) for row in rows], device=self.padding.device) - self.padding
        # Of each row as many as are missing of any: two in a draft whose tokens were all accepted, the last unread.
        count = int((lengths - self.cache.seqlens.minimum(lengths - 1)).max())
        self.cache.crop(lengths - count)
        return torch.stack([row[-count:] for row in rows])

    def read(self, ids: Tensor) -> Tensor:
        """The logits ``(rows, n, vocab)`` after each of the next tokens ``(rows, n)``."""
        states, _ = self.model.decode(ids, cache=self.cache)
        return self.model.head.logits(states).unflatten(0, ids.shape)

    def keep(self, index: Tensor) -> None:
        """Only the rows at ``index`` go on."""
        self.cache.reorder(index)
        self.padding = self.padding[index]


def draft_with_model(draft: _Reader, chooser: Chooser, rows: Sequence[Tensor], count: int) -> tuple[Tensor, Tensor]:
    """``count`` tokens ``(rows, count)`` to follow, and what another model drew them from ``(rows, count, vocab)``."""
    new = draft.unread(rows)
    tokens = new[:, :0]
    proposed = F.one_hot(tokens, draft.model.config.vocab_size).float()
    for _ in range(count):
        grown = [torch.cat(parts) for parts in zip(rows, tokens, strict=True)]
        step = chooser.probabilities(grown, draft.read(new)[:, -1:])
        new = chooser.draw(step[:, 0])[:, None]
        tokens, proposed = torch.cat((tokens, new), 1), torch.cat((proposed, step), 1)
    return tokens, proposed


def draft_by_lookup(size: int, vocab: int, rows: Sequence[Tensor], count: int) -> tuple[Tensor, Tensor]:
    """What followed where a row had its last ``size`` tokens before, or fewer (Saxena, "Prompt Lookup Decoding", 2023).

    As :func:`draft_with_model`, with fewer than ``count`` tokens where no row has so many.
    """
    found = [_continuation(size, row, count) for row in rows]
    longest = max(map(len, found))
    # Where there are fewer anything will do: it is checked like the others.
    filled = [torch.cat((new, row[-1:].expand(longest - len(new)))) for new, row in zip(found, rows, strict=True)]
    tokens = torch.stack(filled).clamp(0, vocab - 1)  # padding may be no token
    return tokens, F.one_hot(tokens, vocab).float()


def _continuation(size: int, row: Tensor, count: int) -> Tensor:
    for length in range(min(size, len(row) - 1), 0, -1):
        places = (row[:-1].unfold(0, length, 1) == row[-length:]).all(1).nonzero()
        if len(places):
            return row[int(places[0]) + length :][:count]
    return row[:0]


@torch.no_grad()
def speculative_search(
    model: DecoderModel,
    ids: Tensor,
    mask: Tensor | None,
    config: GenerationConfig,
    *,
    draft_model: DecoderModel | None = None,
    prompt_lookup: int | None = None,
    num_draft_tokens: int = 4,
    on_tokens: Callable[[Tensor], None] | None = None,
) -> Speculated:
    """:func:`sample_search` for the rows of ``ids`` ``(rows, prompt length)``, with proposals before each pass.

    By ``draft_model`` or ``prompt_lookup``. ``on_tokens`` is called for each column of new tokens ``(rows,)``, once all
    rows have come so far.
    """
    _check_options(model, draft_model, prompt_lookup, num_draft_tokens)
    limit, chooser = config.length_limit(ids.shape[1]), Chooser(config, ids.shape[1], ids.device)
    ends = as_ids(config.eos_token_id)
    fill = filling(config)
    models = [model] if draft_model is None else [model, draft_model]
    reader, *drafts = readers = [_Reader(each, ids, mask, limit, num_draft_tokens) for each in models]
    lookup = partial(draft_by_lookup, prompt_lookup or 0, model.config.vocab_size)
    propose = partial(draft_with_model, drafts[0], chooser) if drafts else lookup
    sequences, running, row_passes, shown = list(ids), list(range(len(ids))), 0, ids.shape[1]
    tokens, proposed, logits = ids[:, :0], reader.logits[:, :0].float(), reader.logits
    while running:
        rows = [torch.cat((sequences[i], new)) for i, new in zip(running, tokens, strict=True)]
        made = _taken(ends, tokens, *chooser.check(tokens, proposed, chooser.probabilities(rows, logits)))
        row_passes += len(running)
        for i, (new, _) in zip(running, made, strict=True):
            sequences[i] = torch.cat((sequences[i], new))
        going = [row for row, i in enumerate(running) if len(sequences[i]) < limit and not made[row][1]]
        running = [running[row] for row in going]
        rows = [sequences[i] for i in running]
        if on_tokens is not None:
            known = min(map(len, rows)) if rows else max(map(len, sequences))
            for column in pad_sequence(sequences, padding_value=fill)[shown:known]:
                on_tokens(column)
            shown = known
        if rows:
            if len(going) < len(made):
                for each in readers:
                    each.keep(torch.tensor(going, device=ids.device))
            tokens, proposed = propose(rows, min(num_draft_tokens, limit - 1 - max(map(len, rows))))
            logits = reader.read(torch.cat((reader.unread(rows), tokens), 1))
    new_tokens = sum(map(len, sequences)) - ids.numel()
    return Speculated(pad_sequence(sequences, batch_first=True, padding_value=fill), new_tokens, row_passes)


def _taken(ends: Sequence[int], tokens: Tensor, accepted: Tensor, last: Tensor) -> list[tuple[Tensor, bool]]:
    """Each row's new tokens, the ``accepted`` ones of ``tokens`` and the ``last``, and whether one ends it."""
    new = F.pad(tokens, (0, 1)).scatter(1, accepted[:, None], last[:, None])  # (rows, n + 1)
    ended = torch.isin(new, new.new_tensor(ends)) & (torch.arange(new.shape[1], device=new.device) <= accepted[:, None])
    counts = torch.where(ended.any(1), ended.int().argmax(1), accepted) + 1
    found = torch.stack((counts, ended.any(1)), 1).tolist()
    return [(row[:count], bool(is_done)) for row, (count, is_done) in zip(new, found, strict=True)]


def _check_options(
    model: DecoderModel, draft_model: DecoderModel | None, prompt_lookup: int | None, num_draft_tokens: int
) -> None:
    if (draft_model is None) == (prompt_lookup is None):
        given = "both" if draft_model is not None else "neither"
        raise ValueError(f"draft_model and prompt_lookup: {given} given; allowed: one of them")
    for name, number in (("prompt_lookup", prompt_lookup), ("num_draft_tokens", num_draft_tokens)):
        if number is not None and number < 1:
            raise ValueError(f"{name}={number}; allowed: at least 1")
    if draft_model is not None:
        sizes = draft_model.config.vocab_size, model.config.vocab_size
        if not isinstance(draft_model, DecoderModel) or not hasattr(draft_model.head, "logits") or sizes[0] != sizes[1]:
            raise ValueError(
                f"draft_model is a {type(draft_model).__name__} with vocab_size={sizes[0]}; "
                f"allowed: a decoder-only model with a language head and the model's {sizes[1]} tokens"
            )
