"""Answers that are parts of a text."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from transformer_fast.tasks.loading import Source, batches, load

#: Tokens of question and context together; what such models were trained with.
DEFAULT_SEQLEN = 384


class Answer(NamedTuple):
    """A part of the context: ``text`` is its characters from ``start`` to ``end``, ``score`` a probability."""

    text: str
    score: float
    start: int
    end: int


@torch.no_grad()
def answer(
    model: Source,
    question: str,
    context: str,
    *,
    top_k: int = 1,
    max_answer_tokens: int = 30,
    max_seqlen: int | None = None,
    overlap: int | None = None,
    batch_size: int = 8,
) -> list[Answer]:
    """The likeliest answers in ``context``, best first.

    A span's score is the product of the probabilities of its first and last token. They are over the context's tokens
    and the first of all, which stands for "no answer here"; so spans of several windows can be compared.

    Args:
        model: a folder, a repository on the hub, or what ``load`` gave, with a question answering head.
        question: what is asked.
        context: where the answer is; one longer than ``max_seqlen`` is read in windows.
        top_k: how many answers.
        max_answer_tokens: no answer is longer.
        max_seqlen: tokens of the question and a window; default 384, or what the model can hold.
        overlap: tokens that a window shares with the next; default 128, or less where windows are short.
        batch_size: so many windows at a time.
    """
    loaded = load(model)
    loaded.require("answer", "a question answering head", loaded.model.architecture.head.kind == "question")
    for name, value in (("top_k", top_k), ("max_answer_tokens", max_answer_tokens)):
        if value < 1:
            raise ValueError(f"{name}={value}; allowed: 1 or more")
    if not context.strip():
        raise ValueError("context is empty; allowed: a text that holds the answer")
    limit = min(loaded.max_seqlen or DEFAULT_SEQLEN, max_seqlen or DEFAULT_SEQLEN)
    if overlap is None:
        # Half of what the question leaves, at most.
        overlap = min(128, max((limit - len(loaded.tokenizer.encode([question], [""])[0].ids)) // 2, 0))
    windows = loaded.tokenizer.windows(question, context, max_seqlen=limit, overlap=overlap)
    best: dict[tuple[int, int], float] = {}
    for batch in batches(windows, batch_size):
        output = loaded.model(**loaded.inputs(batch))
        for window, start, end in zip(batch, output.start_logits.cpu(), output.end_logits.cpu(), strict=True):
            for span, score in _spans(window, start, end, top_k, max_answer_tokens):
                best[span] = max(score, best.get(span, 0.0))
    ranked = sorted(best.items(), key=lambda item: item[1], reverse=True)[:top_k]
    return [Answer(context[start:end], score, start, end) for (start, end), score in ranked]


def _spans(
    window: Any, start: Tensor, end: Tensor, top_k: int, longest: int
) -> Iterator[tuple[tuple[int, int], float]]:
    """The best spans of a window, in characters of the context, and their scores; logits are ``(seqlen,)``."""
    inside = [column for column, part in enumerate(window.sequence_ids) if part == 1]
    columns = [0, *inside]
    first, last = (logits[columns].double().softmax(0)[1:] for logits in (start, end))
    scores = (first[:, None] * last).triu().tril(longest - 1)  # rows: first tokens; columns: last tokens
    values, places = scores.flatten().topk(min(top_k, scores.numel()))
    for score, place in zip(values.tolist(), places.tolist(), strict=True):
        if score > 0:
            left, right = inside[place // len(inside)], inside[place % len(inside)]
            yield (window.offsets[left][0], window.offsets[right][1]), score
