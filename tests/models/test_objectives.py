"""Pretraining objectives: no corruption loses anything, its shares are as promised, and special tokens stay."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from transformer_fast.models.objectives import (
    IGNORED,
    denoise,
    mask_tokens,
    next_sentence_pairs,
    pad_batch,
    shift_right,
    span_corruption,
)

MASK, LAST = 3, 99  # LAST: T5's first sentinel
FALSE_ALARMS = 1e-9  # how often a right count may be refused


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def likely(hits: int, n: int, p: float) -> bool:
    """Whether so many hits in n independent trials of chance p are no rarer than FALSE_ALARMS.

    Chernoff: P(a share of hits at least as far off, on one side) <= exp(-n * KL(share || p)).
    """
    share = hits / n
    parts = ((share, p), (1 - share, 1 - p))
    return n * sum(a * math.log(a / b) for a, b in parts if a) <= math.log(2 / FALSE_ALARMS)


def test_the_bound_itself_can_refuse():
    assert likely(150, 1000, 0.15) and likely(190, 1000, 0.15)
    assert not likely(230, 1000, 0.15) and not likely(80, 1000, 0.15)
    assert not likely(0, 1000, 0.15) and not likely(1000, 1000, 0.15)


# ------------------------------------------------------------------------------------------------------ masked tokens


def test_masking_loses_nothing_and_spares_special_tokens():
    ids, special = torch.randint(5, 50, (40, 30)), torch.rand(40, 30) < 0.2
    before = ids.clone()
    inputs, labels = mask_tokens(ids, special, 50, MASK, generator(), probability=0.6)
    assert torch.equal(ids, before)
    assert torch.equal(labels.where(labels != IGNORED, inputs), ids)
    assert torch.equal(inputs[special], ids[special]) and (labels[special] == IGNORED).all()


@pytest.mark.parametrize("probability", [0.15, 0.5])
def test_masking_shares(probability):
    """15% chosen, of these 80% masked, 10% random, 10% kept."""
    vocab_size = 1000
    ids, special = torch.full((100_000,), 7), torch.arange(100_000) % 4 == 0
    inputs, labels = mask_tokens(ids, special, vocab_size, MASK, generator(), probability)
    chosen = labels != IGNORED
    n = int(chosen.sum())
    assert likely(n, int((~special).sum()), probability)
    fates = Counter(inputs[chosen].tolist())
    assert likely(fates.pop(MASK), n, 0.8 + 0.1 / vocab_size)
    assert likely(fates.pop(7), n, 0.1 + 0.1 / vocab_size)
    assert likely(fates.total(), n, 0.1 * (1 - 2 / vocab_size))
    assert all(likely(count, n, 0.1 / vocab_size) for count in fates.values()) and min(fates) < 10 < 990 < max(fates)


def test_masking_repeats_with_its_seed_and_takes_any_probability():
    ids, special = torch.randint(5, 50, (20, 30)), torch.zeros(20, 30, dtype=torch.bool)
    first, again, other = (mask_tokens(ids, special, 50, MASK, generator(seed))[0] for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert (mask_tokens(ids, special, 50, MASK, generator(), 1.0)[1] == ids).all()
    assert (mask_tokens(ids, special, 50, MASK, generator(), 0.0)[1] == IGNORED).all()
    with pytest.raises(ValueError, match=r"probability=1\.5; allowed: 0 to 1"):
        mask_tokens(ids, special, 50, MASK, generator(), 1.5)


# ------------------------------------------------------------------------------------------------------ next sentence


def test_next_sentences():
    """Sentences carry their document and number, so that each pair says where it came from."""
    sizes = (60, 1, 40, 0, 25)
    documents = [
        [torch.tensor([100 + document, 1000 + number])[: 2 - number % 2] for number in range(0, 2 * size, 2)]
        for document, size in enumerate(sizes)
    ]
    seen, pairs, chosen = [], 0, Counter()
    for seed in range(20):
        for ids, segments, label in next_sentence_pairs(documents, 1, 2, generator(seed)):
            cls, document, number, sep, other, second, end = ids.tolist()
            assert (cls, sep, end) == (1, 2, 2) and segments.tolist() == [0] * 4 + [1] * 3
            assert (other != document) if label else (other, second) == (document, number + 2)
            seen.append((document, number))
            pairs += 1
            chosen[document, other] += label
    assert Counter(seen) == Counter(
        {(100 + d, 1000 + 2 * i): 20 for d, size in enumerate(sizes) for i in range(size - 1)}
    )
    assert likely(chosen.total(), pairs, 0.5)
    others = {other: count for (document, other), count in chosen.items() if document == 100 and other != 100}
    assert set(others) == {101, 102, 104}, "each other document, whatever its length"
    assert all(likely(count, sum(others.values()), 1 / 3) for count in others.values())
    with pytest.raises(ValueError, match="documents has 1 with sentences; allowed: at least 2"):
        next(next_sentence_pairs([documents[0], []], 1, 2, generator()))


# ---------------------------------------------------------------------------------------------------- span corruption


def restored(inputs: list[int], targets: list[int]) -> list[int]:
    """The text that T5's inputs and targets were made from."""
    spans: dict[int, list[int]] = {}
    for token in targets:
        if token > LAST - 50:
            current = spans[token] = []
        else:
            current.append(token)
    assert list(spans) == list(range(LAST, LAST - len(spans), -1)), "sentinels count down"
    assert spans[LAST - len(spans) + 1] == [], "the closing one has no span"
    text = [token for piece in inputs for token in spans.pop(piece, [piece])]
    assert len(spans) == 1
    return text


@given(st.data())
def test_span_corruption_loses_nothing(data):
    n = data.draw(st.integers(2, 60))
    density, mean_span = data.draw(st.floats(0, 1)), data.draw(st.floats(1, 6))
    ids = torch.randint(40, (n,), generator=generator(n))
    inputs, targets = span_corruption(ids, LAST, generator(data.draw(st.integers(0, 9))), density, mean_span)
    assert restored(inputs.tolist(), targets.tolist()) == ids.tolist()
    spans = int((inputs > 40).sum())
    noise = min(max(round(n * density), 1), n - 1)
    assert len(inputs) == n - noise + spans and len(targets) == noise + spans + 1
    assert spans == min(max(round(noise / mean_span), 1), n - noise, noise)


def test_span_corruption_of_a_long_text():
    """T5's own setting, 15% in spans of 3 on average: 512 tokens give 77 in 26 spans."""
    inputs, targets = span_corruption(torch.arange(512), 32099, generator())
    assert int((inputs >= 32099 - 25).sum()) == 26 and len(inputs) == 512 - 77 + 26
    assert len(targets) == 77 + 26 + 1 and targets[-1] == 32099 - 26 and targets[0] == 32099


def test_all_ways_to_place_spans_are_equally_likely():
    """Five kept and four corrupted tokens, each in two parts: 4 times 3 ways."""
    seen: Counter[tuple[int, ...]] = Counter()
    seeds = 2400
    for seed in range(seeds):
        inputs, _ = span_corruption(torch.arange(9), LAST, generator(seed), density=4 / 9, mean_span=2.0)
        seen[tuple(inputs.tolist())] += 1
    assert len(seen) == 12
    assert all(likely(count, seeds, 1 / 12) for count in seen.values())


def test_span_corruption_errors():
    with pytest.raises(ValueError, match=r"first_sentinel=99; allowed: one down from which 2 are not in ids"):
        span_corruption(torch.tensor([5, 98]), LAST, generator())
    with pytest.raises(ValueError, match=r"ids has shape \(1,\); allowed: \(seqlen,\) of at least 2"):
        span_corruption(torch.tensor([5]), LAST, generator())


# ---------------------------------------------------------------------------------------------------------- denoising


def is_subsequence(part: list[int], whole: list[int]) -> bool:
    rest = iter(whole)
    return all(token in rest for token in part)


@given(st.data())
def test_denoising_keeps_the_rest_in_order(data):
    n = data.draw(st.integers(0, 60))
    ratio, mean_span = data.draw(st.floats(0, 1)), data.draw(st.floats(0, 5))
    ids = torch.arange(10, 10 + n)
    inputs, targets = denoise(ids, MASK, generator(data.draw(st.integers(0, 9))), ratio, mean_span)
    kept = inputs[inputs != MASK].tolist()
    assert torch.equal(targets, ids)
    assert len(kept) == n - round(ratio * n), "exactly the share asked for is gone"
    assert is_subsequence(kept, ids.tolist())
    assert (MASK in inputs) == (round(ratio * n) > 0)


def test_denoising_span_lengths_are_poisson():
    """Read off the masks that stand alone between two kept tokens, in one long text."""
    n = 200_000
    inputs = denoise(torch.arange(10, 10 + n), MASK, generator())[0].tolist()
    lengths = Counter(
        after - before - 1
        for before, token, after in zip(inputs, inputs[1:], inputs[2:], strict=False)
        if token == MASK and MASK not in (before, after)
    )
    total = lengths.total()
    assert total > 5_000
    for length in range(10):
        chance = math.exp(-3) * 3**length / math.factorial(length)
        # The last span was cut, to any length.
        assert any(likely(lengths[length] + cut, total, chance) for cut in (-1, 0, 1)), length


def test_sentences_are_permuted_whole():
    end = 9
    sentences = [[10, 11, end], [20, end], [30, 31, 32, end], [40, 41]]
    ids = torch.tensor([token for sentence in sentences for token in sentence])
    orders: Counter[tuple[int, ...]] = Counter()
    seeds = 1200
    for seed in range(seeds):
        inputs, targets = denoise(ids, MASK, generator(seed), ratio=0.0, end_of_sentence=end)
        assert torch.equal(targets, ids)
        order = [token // 10 for token in inputs.tolist() if token % 10 == 0]
        assert inputs.tolist() == [token for which in order for token in sentences[which - 1]]
        orders[tuple(order)] += 1
    assert len(orders) == 24 and all(likely(count, seeds, 1 / 24) for count in orders.values())
    inputs, _ = denoise(ids, MASK, generator(), end_of_sentence=end)
    assert len(inputs[inputs != MASK]) == len(ids) - round(0.3 * len(ids))


# ------------------------------------------------------------------------------------------------------------ batches


def test_pad_batch():
    ids, mask = pad_batch([torch.tensor([5, 6, 7]), torch.tensor([], dtype=torch.int64), torch.tensor([8])], pad=1)
    assert ids.tolist() == [[5, 6, 7], [1, 1, 1], [8, 1, 1]] and ids.dtype == torch.int64
    assert mask.tolist() == [[True] * 3, [False] * 3, [True, False, False]] and mask.dtype == torch.bool


def test_shift_right():
    labels = torch.tensor([[5, 6, 7], [8, IGNORED, IGNORED]])
    inputs = shift_right(labels, start_id=2, pad_id=0)
    assert inputs.tolist() == [[2, 5, 6], [2, 8, 0]]
    assert labels[1, 1] == IGNORED, "a new tensor"
    assert shift_right(torch.tensor([], dtype=torch.int64), 2, 0).tolist() == []
