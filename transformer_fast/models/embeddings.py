"""word2vec: word vectors learned from the words around, by negative sampling (Mikolov et al., 2013, both papers)."""

from __future__ import annotations

import string
import struct
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """Words, and how often each was seen: int64 (words,)."""

    words: tuple[str, ...]
    counts: Tensor

    @classmethod
    def build(cls, sentences: Iterable[Iterable[str]], min_count: int = 5) -> Vocabulary:
        """The words seen at least ``min_count`` times, the most frequent first."""
        seen = {word: n for word, n in Counter(chain.from_iterable(sentences)).most_common() if n >= min_count}
        return cls(tuple(seen), torch.tensor(list(seen.values()), dtype=torch.int64))

    @cached_property
    def index(self) -> dict[str, int]:
        return {word: i for i, word in enumerate(self.words)}

    def encode(self, sentence: Iterable[str]) -> Tensor:
        """Ids (n,) of the known words of a sentence."""
        return torch.tensor([self.index[word] for word in sentence if word in self.index], dtype=torch.int64)

    def keep_probability(self, threshold: float = 1e-5) -> Tensor:
        """Chance (words,) of an occurrence to survive subsampling: sqrt(threshold / the word's frequency)."""
        return (threshold * self.counts.sum() / self.counts).sqrt().clamp(max=1.0)

    def subsample(self, text: Tensor, threshold: float, generator: Generator) -> Tensor:
        """The ids of a text that survive."""
        return text[torch.rand(len(text), generator=generator) < self.keep_probability(threshold)[text]]

    @cached_property
    def noise_table(self) -> Tensor:
        """Where each word's share ends between 0 and 1, float64: shares are as counts to the power of 0.75."""
        ends = self.counts.double().pow(0.75).cumsum(0)
        return ends / ends[-1]

    def draw_noise(self, shape: Sequence[int], generator: Generator) -> Tensor:
        """Negative samples: ids of this shape."""
        chance = torch.rand(shape, generator=generator, dtype=torch.float64)
        return torch.searchsorted(self.noise_table, chance, right=True)


def skipgram_pairs(texts: Iterable[Tensor], window: int, generator: Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """For each text (n,): inputs and targets (pairs,), each word with each of those around it.

    How far "around" reaches is drawn for each word, from 1 to ``window``: near words count more.
    """
    for text in texts:
        positions, keep = _windows(len(text), window, generator)
        yield text[keep.nonzero()[:, 0]], text[positions[keep]]


def cbow_windows(texts: Iterable[Tensor], window: int, generator: Generator) -> Iterator[tuple[Tensor, ...]]:
    """For each text (n,): inputs (n, 2 * window) around each word, targets (n,), and which of the inputs count.

    Windows as in :func:`skipgram_pairs`. A word without any other around it is left out.
    """
    for text in texts:
        positions, keep = _windows(len(text), window, generator)
        some = keep.any(dim=1)
        yield text[positions[some]], text[some], keep[some]


def _windows(length: int, window: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """Positions (length, 2 * window) around each position, 0 where there is none, and which of them count."""
    offsets = torch.cat((torch.arange(-window, 0), torch.arange(1, window + 1)))
    positions = torch.arange(length)[:, None] + offsets
    reach = torch.randint(1, window + 1, (length, 1), generator=generator)
    keep = (offsets.abs() <= reach) & (positions >= 0) & (positions < length)
    return positions.where(keep, 0), keep


class Word2Vec(nn.Module):
    """A vector ``in_vectors[i]`` for each word, and ``out_vectors[i]`` for it as a target; both (words, dim)."""

    def __init__(self, vocabulary: Vocabulary, dim: int) -> None:
        super().__init__()
        self.vocabulary = vocabulary
        self.in_vectors = nn.Parameter((torch.rand(len(vocabulary.words), dim) - 0.5) / dim)
        self.out_vectors = nn.Parameter(torch.zeros(len(vocabulary.words), dim))

    def forward(self, inputs: Tensor, targets: Tensor, negatives: Tensor, keep: Tensor | None = None) -> Tensor:
        """The mean negative-sampling loss of n examples.

        Args:
            inputs: (n,) for skip-gram; (n, w) for CBOW, which predicts from the mean of the words around.
            targets: (n,).
            negatives: (n, k); a negative that is the target does not count.
            keep: bool (n, w), which of CBOW's inputs count; by default all.
        """
        hidden = F.embedding(inputs, self.in_vectors)
        if inputs.dim() == 2:
            share = torch.ones_like(inputs) if keep is None else keep
            hidden = (hidden * share[..., None]).sum(1) / share.sum(1, keepdim=True).clamp(min=1)  # (n, dim)
        candidates = torch.cat((targets[:, None], negatives), dim=1)
        scores = (F.embedding(candidates, self.out_vectors) @ hidden[..., None]).squeeze(2)  # (n, 1 + k)
        wrong = F.softplus(scores[:, 1:]) * (negatives != targets[:, None])
        return (F.softplus(-scores[:, 0]) + wrong.sum(1)).mean()

    def nearest(self, word: str, k: int = 10) -> list[tuple[str, float]]:
        """The k other words whose vectors have the largest cosine with this word's, and the cosines."""
        return self._closest([word], [], k)

    def analogy(self, a: str, b: str, c: str, k: int = 1) -> list[tuple[str, float]]:
        """Words that are to ``c`` as ``b`` is to ``a``: nearest to b - a + c, each scaled to length 1."""
        return self._closest([b, c], [a], k)

    @torch.no_grad()
    def _closest(self, plus: list[str], minus: list[str], k: int) -> list[tuple[str, float]]:
        words, index = self.vocabulary.words, self.vocabulary.index
        for word in plus + minus:
            if word not in index:
                raise ValueError(f"word={word!r}; allowed: one of the {len(words)} in the vocabulary")
        given = [index[word] for word in plus + minus]
        units = F.normalize(self.in_vectors, dim=1)
        signs = torch.tensor([1.0] * len(plus) + [-1.0] * len(minus)).to(units)
        cosines = (units @ F.normalize(signs @ units[given], dim=0)).index_fill(0, torch.tensor(given), -torch.inf)
        best = cosines.topk(min(k, len(words) - len(set(given))))
        return [(words[i], cosine) for cosine, i in zip(*map(Tensor.tolist, best), strict=True)]

    def save_text(self, path: str | Path) -> None:
        """Write ``in_vectors`` in word2vec's text format: "count dim", then each word and its numbers on a line.

        A number has as few digits, from 6 to 9, as give the same float32 again.
        """
        for word in self.vocabulary.words:
            if not word or set(word) & set(string.whitespace):
                raise ValueError(f"word={word!r}; allowed in the text format: not empty, and no white space")
        with open(path, "w", encoding="utf-8", newline="\n") as file:
            file.write("{} {}\n".format(*self.in_vectors.shape))
            for word, row in zip(self.vocabulary.words, self.in_vectors.tolist(), strict=True):
                file.write(" ".join([word, *map(_shortest, row)]) + "\n")

    @classmethod
    def load_text(cls, path: str | Path) -> Word2Vec:
        """Read word2vec's text format. It knows no counts: each word has 1. ``out_vectors`` are zero."""
        vectors: dict[str, Tensor] = {}
        with open(path, encoding="utf-8", newline="\n") as file:
            header = file.readline().split()
            if len(header) != 2 or not all(map(str.isdecimal, header)):
                raise ValueError(f"{path}, line 1: {' '.join(header)!r}; allowed: 'count dim'")
            count, dim = map(int, header)
            for number, line in enumerate(file, start=2):
                word, *values = line.rstrip(" \r\n").split(" ")
                if word in vectors or len(values) != dim:
                    raise ValueError(
                        f"{path}, line {number}: {word!r} with {len(values)} numbers; allowed: a new word with {dim}"
                    )
                try:
                    vectors[word] = torch.tensor([float(value) for value in values])
                except ValueError as error:
                    raise ValueError(f"{path}, line {number}: {error}") from None
        if len(vectors) != count:
            raise ValueError(f"{path}, line 1: count {count}; allowed: {len(vectors)}, as many as lines follow")
        model = cls(Vocabulary(tuple(vectors), torch.ones(count, dtype=torch.int64)), dim)
        model.in_vectors.data = torch.stack(list(vectors.values())) if vectors else model.in_vectors.data
        return model


def _shortest(value: float) -> str:
    """A decimal that reads as the same float32: the shortest, but for numbers too small for all 24 bits."""
    texts = (f"{value:.{digits}g}" for digits in (6, 7, 8))
    return next((text for text in texts if struct.pack("f", float(text)) == struct.pack("f", value)), f"{value:.9g}")
