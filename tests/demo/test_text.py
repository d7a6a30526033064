"""The text of the demo, and the 3-gram model it is measured by."""

from __future__ import annotations

import collections
import itertools
import math
import sys

import pytest
import torch

from transformer_fast.demo import training
from transformer_fast.demo.text import load_corpus, sentences, spread


def test_training_and_validation_share_no_paragraph():
    corpus = load_corpus()
    learned, unseen = set(corpus.training), set(corpus.validation)
    assert not learned & unseen
    assert len(learned) == len(corpus.training) and len(unseen) == len(corpus.validation), "each once"
    share = sum(map(len, unseen)) / sum(map(len, learned | unseen))
    assert 0.05 < share < 0.2
    assert sum(map(len, learned)) > 100_000, "enough to learn from"


def test_it_is_prose():
    found = sentences(load_corpus())
    assert len(found) == len(set(found)) > 1000
    assert all(sentence[-1] in ".!?" and "  " not in sentence and "\n" not in sentence for sentence in found)
    letters = [sum(c.isalpha() or c == " " for c in sentence) / len(sentence) for sentence in found]
    assert sum(letters) / len(letters) > 0.9
    lengths = [len(sentence) for sentence in spread(found, 200)]
    assert min(lengths) < 50 < 200 < max(lengths), "of mixed length"


def test_without_pydoc_data_it_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydoc_data", None)
    with pytest.raises(RuntimeError, match="pydoc_data"):
        load_corpus()


def test_spread_takes_from_everywhere():
    assert spread(list("abcdefghij"), 5) == list("acegi")
    assert spread(list("abc"), 7) == list("abc")


def test_ngram_loss_against_its_definition():
    """With counts that dwarf the smoothing it is the conditional entropy: a coin after two equal letters, else an a."""
    letters = [0, 0]
    for coin in torch.randint(2, (30_000,)).tolist():
        letters.append(coin if letters[-1] == letters[-2] else 0)
    after = collections.Counter(zip(letters, letters[1:], letters[2:], strict=False))
    before = collections.Counter(itertools.pairwise(letters[:-1]))
    entropy = -sum(n * math.log(n / before[key[:2]]) for key, n in after.items()) / sum(after.values())
    text = torch.tensor(letters, dtype=torch.uint8) + ord("a")
    assert entropy > 0.1
    assert training.ngram_loss(text, text) == pytest.approx(entropy, rel=2e-3)


def test_chunks_are_contiguous_and_from_everywhere():
    data = torch.arange(200, dtype=torch.uint8)
    chunks = training.random_chunks(data, 500, 10, torch.Generator().manual_seed(0))
    assert torch.equal(chunks - chunks[:, :1], torch.arange(10).expand(500, 10))
    assert chunks.min() == 0 and chunks.max() == 199


def test_learning_rate_warms_up_and_decays():
    plan = training.TrainingPlan()
    rates = [training.learning_rate_at(i / 100, plan) for i in range(101)]
    top = rates.index(max(rates))
    assert rates[0] == 0 and rates[:top] == sorted(rates[:top])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert max(rates) == pytest.approx(plan.learning_rate, rel=0.01) and 0 < rates[-1] < plan.learning_rate / 10
