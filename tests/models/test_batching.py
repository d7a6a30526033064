"""Continuous batching: each request gets the tokens that it would get alone, whoever runs beside it."""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transformer_fast.generation.batching import ContinuousBatch
from transformer_fast.generation.cache import CacheShape
from transformer_fast.models.layers import AttentionOptions, fused_attention
from transformer_fast.models.layout import TokenLayout

VOCAB, SIZE, HEADS, KV_HEADS = 40, 16, 4, 2
WINDOWS = (None, 5)


class TinyDecoder(nn.Module):
    """Two attention layers over token and position vectors, and what continuous batching asks of a model."""

    dtype, device = torch.float32, torch.device("cpu")

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = (nn.Parameter(torch.randn(n, SIZE)) for n in (VOCAB, 100))
        self.qkv, self.out = (
            nn.ParameterList(torch.randn(SIZE, n) / 2 for _ in WINDOWS) for n in (SIZE + 2 * 4 * KV_HEADS, SIZE)
        )
        self.computed: list[tuple[int, int]] = []

    def cache_shapes(self) -> list[CacheShape]:
        return [CacheShape(KV_HEADS, SIZE // HEADS, window) for window in WINDOWS]

    def next_token_logits(self, input_ids: Tensor, cache=None) -> Tensor:
        batch, seqlen = input_ids.shape
        self.computed.append((batch, seqlen))
        cached = None if cache is None or cache.is_empty else cache.seqlens
        layout = TokenLayout.dense(batch, seqlen, device=self.device, cached=cached)
        if cache is not None:
            cache.extend(layout)
        x = self.tokens[input_ids.flatten()] + self.positions[layout.positions]
        for layer, window in enumerate(WINDOWS):
            heads = (F.rms_norm(x, (SIZE,)) @ self.qkv[layer]).unflatten(1, (-1, SIZE // HEADS))
            parts = heads.split((HEADS, KV_HEADS, KV_HEADS), 1)
            options = AttentionOptions(True, None if window is None else (window - 1, 0))
            if cache is None:
                out = fused_attention(*parts, layout, options)
            else:
                out = cache.attend(layer, *parts, layout, options)
            x = x + out.flatten(1) @ self.out[layer]
        return layout.last_rows(x) @ self.tokens.T


@torch.no_grad()
def alone(model: TinyDecoder, prompt: list[int], max_new_tokens: int, ends: set[int] = frozenset()) -> list[int]:
    """The definition: all of the sequence again for each token."""
    made: list[int] = []
    while len(made) < max_new_tokens and not ends & set(made[-1:]):
        made.append(int(model.next_token_logits(torch.tensor([prompt + made])).argmax()))
    return made


def prompt(length: int) -> list[int]:
    return torch.randint(VOCAB, (length,)).tolist()


@pytest.fixture
def model() -> TinyDecoder:
    return TinyDecoder()


@pytest.mark.parametrize(
    ("num_pages", "page_size", "max_batch"), [(100, 4, 3), (300, 1, 8), (12, 4, 8), (40, 1, 4), (3, 16, 8)]
)
def test_every_request_gets_its_own_tokens(num_pages, page_size, max_batch, model):
    """Also where pages are so few that requests lose theirs: none has more than 37 tokens."""
    batch = ContinuousBatch(model, num_pages=num_pages, page_size=page_size, max_batch=max_batch)
    begin, expected = prompt(9), {}
    for _ in range(12):
        ids = random.choice((begin[: random.randint(1, 9)], [])) + prompt(random.randint(1, 8))
        count, ends = random.randint(1, 20), set(prompt(random.randint(0, 2)))
        expected[batch.submit(ids, max_new_tokens=count, eos_token_ids=ends)] = alone(model, ids, count, ends)
    assert batch.run() == expected
    assert batch.cache.available == num_pages, "all pages came back"
    assert batch.preemptions == 0 or num_pages * page_size < max_batch * 37
    assert batch.run() == {}


def test_requests_join_and_leave_while_others_run(model):
    batch = ContinuousBatch(model, num_pages=50, page_size=4, max_batch=2)
    prompts, streamed = [prompt(n) for n in (5, 3, 7)], {}

    def step() -> set[int]:
        made = batch.step()
        for number, tokens in made.items():
            streamed.setdefault(number, []).extend(tokens)
        return set(made)

    counts = (9, 4, 3)
    batch.submit(prompts[0], max_new_tokens=counts[0])
    assert [step(), step()] == [{0}, {0}]
    for i in (1, 2):
        batch.submit(prompts[i], max_new_tokens=counts[i])
    assert [step() for _ in range(6)] == [{0, 1}] * 3 + [{0, 2}] * 2 + [{0}]
    assert step() == set()
    assert streamed == {i: alone(model, prompts[i], counts[i]) for i in range(3)} == batch.run()


def test_what_is_computed(model):
    """Each prompt once by itself, a shared beginning not again, and one token for all of the batch."""
    batch = ContinuousBatch(model, num_pages=50, page_size=4)
    begin = prompt(8)
    for length in (1, 2, 3):
        batch.submit(begin + prompt(length), max_new_tokens=3)
    batch.run()
    assert model.computed == [(1, 9), (1, 2), (1, 3), (3, 1), (3, 1)]


def test_the_youngest_gives_way_and_is_the_next_to_start(model):
    """Five pages of four: two prompts of 7 tokens run together, and their ninth tokens need a page each."""
    batch = ContinuousBatch(model, num_pages=5, page_size=4, max_batch=2)
    prompts, counts = [prompt(7), prompt(7), prompt(1)], (4, 8, 2)
    for ids, count in zip(prompts, counts, strict=True):
        batch.submit(ids, max_new_tokens=count)
    made = [set(batch.step()) for _ in range(4)]
    assert made == [{0, 1}, {0}, {0}, {1, 2}]
    assert batch.run() == {i: alone(model, ids, counts[i]) for i, ids in enumerate(prompts)}
    assert batch.preemptions == 1


def test_what_gave_way_is_not_computed_again_while_it_is_known(model):
    """Its two pages are full, the second one of a token that was made."""
    batch = ContinuousBatch(model, num_pages=5, page_size=4)
    for count in (4, 8):
        batch.submit(prompt(7), max_new_tokens=count)
    batch.run()
    assert batch.preemptions == 1
    assert model.computed == [(1, 7), (1, 7), (2, 1)] + [(1, 1)] * 8


def test_nobody_starts_at_the_cost_of_those_who_run(model):
    """Two of three pages are free, for a prompt of two; but the one that runs will need one of them."""
    batch = ContinuousBatch(model, num_pages=3, page_size=4)
    batch.submit(prompt(3), max_new_tokens=3)
    batch.submit(prompt(8), max_new_tokens=1)
    assert [set(batch.step()) for _ in range(3)] == [{0}, {0}, {1}]
    assert batch.preemptions == 0


def test_complaints(model):
    with pytest.raises(ValueError, match="max_batch=0"):
        ContinuousBatch(model, num_pages=3, max_batch=0)
    batch = ContinuousBatch(model, num_pages=3, page_size=4)
    for ids, count in (([], 1), ([1], 0), ([1] * 12, 2), ([1], 13)):
        with pytest.raises(ValueError, match=f"{len(ids)} prompt_ids and max_new_tokens={count}; .* 13 together"):
            batch.submit(ids, max_new_tokens=count)
    batch.submit([1] * 12, max_new_tokens=1)
    assert len(batch.run()[0]) == 1
