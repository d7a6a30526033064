"""Labels of tokens, put together to those of words and names."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any, Literal, NamedTuple

import torch

from transformer_fast.tasks.loading import Done, Source, batches, load

Aggregate = Literal["none", "simple", "first"]


class Entity(NamedTuple):
    """A labelled part of a text: ``text`` is its characters from ``start`` to ``end``, ``score`` a probability."""

    label: str
    score: float
    text: str
    start: int
    end: int


@torch.no_grad()
def tag(
    model: Source,
    texts: Sequence[str],
    *,
    aggregate: Aggregate = "simple",
    ignore: Sequence[str] = ("O",),
    batch_size: int = 32,
    on_done: Done = None,
) -> list[list[Entity]]:
    """The labelled parts of each text, in order.

    Args:
        model: a folder, a repository on the hub, or what ``load`` gave, with a token classification head.
        texts: what is to be labelled; what the model cannot hold is cut, with a warning.
        aggregate: "none" for each token by itself; "simple": neighbours of one label are one entity, a ``B-`` begins
            another, and the score is their mean; "first": the same, after all of a word got its first token's label.
        ignore: labels that are left out.
        batch_size: so many texts at a time.
        on_done: called with the number of texts after each batch.
    """
    loaded = load(model)
    loaded.require("tag", "a token classification head", loaded.model.architecture.head.kind == "token")
    if aggregate not in ("none", "simple", "first"):
        raise ValueError(f"aggregate={aggregate!r}; allowed: none, simple, first")
    if not loaded.tokenizer.has_offsets:
        raise ValueError("tag needs the offsets of tokens: a tokenizer.json, not a function")
    found = []
    for batch in batches(texts, batch_size, on_done):
        encodings = loaded.encode(batch, max_seqlen=loaded.max_seqlen)
        scores, best = loaded.model(**loaded.inputs(encodings)).logits.float().softmax(-1).max(-1)
        for row, (text, encoding) in enumerate(zip(batch, encodings, strict=True)):
            tokens = _tokens(text, encoding, [loaded.labels[i] for i in best[row].tolist()], scores[row].tolist())
            entities = _aggregated(text, tokens, aggregate)
            found.append([entity for entity in entities if entity.label not in ignore])
    return found


def _tokens(text: str, encoding: Any, labels: Sequence[str], scores: Sequence[float]) -> list[tuple[Entity, int]]:
    """Each token that is not special, with the number of its word."""
    special = encoding.special_tokens_mask
    found = []
    for column, (start, end) in enumerate(encoding.offsets):
        if not special[column]:
            entity = Entity(labels[column], scores[column], text[start:end], start, end)
            found.append((entity, encoding.word_ids[column]))
    return found


def _aggregated(text: str, tokens: list[tuple[Entity, int]], aggregate: Aggregate) -> list[Entity]:
    entities = [entity for entity, _ in tokens]
    if aggregate == "none":
        return entities
    if aggregate == "first":
        words = [[entity for entity, _ in word] for _, word in groupby(tokens, key=lambda token: token[1])]
        entities = [word[0]._replace(end=word[-1].end) for word in words]
    groups: list[list[Entity]] = []
    for entity in entities:
        begins, name = _parts(entity.label)
        if groups and not begins and name == _parts(groups[-1][-1].label)[1]:
            groups[-1].append(entity)
        else:
            groups.append([entity])
    return [_merged(text, group) for group in groups]


def _parts(label: str) -> tuple[bool, str]:
    """Whether a label begins something, and what: ``B-PER`` does, ``I-PER`` goes on, and so does one without a sign."""
    return label.startswith("B-"), label[2:] if label.startswith(("B-", "I-")) else label


def _merged(text: str, group: Sequence[Entity]) -> Entity:
    start, end = group[0].start, group[-1].end
    score = sum(entity.score for entity in group) / len(group)
    return Entity(_parts(group[0].label)[1], score, text[start:end], start, end)
