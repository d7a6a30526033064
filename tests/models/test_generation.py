"""Generation: the cache changes nothing but the time; sampling does what it says."""

from __future__ import annotations

import pytest
import torch

from transformer_fast.generation import KVCache, Sampling, generate, next_tokens
from transformer_fast.models import CausalLM
from transformer_fast.testing import judge

CPU = torch.device("cpu")


def judge_logits(cached: torch.Tensor, decoder: CausalLM, ids: torch.Tensor) -> None:
    """The logits of cached steps (batch, steps, vocab) against the last ones of one uncached pass over ``ids``."""
    with torch.no_grad():
        baseline = decoder(ids)[:, -cached.shape[1] :]
        oracle = decoder.double()(ids)[:, -cached.shape[1] :]
    decoder.float()
    verdict = judge(cached, oracle, baseline, name="cached logits")
    assert verdict.passed, str(verdict)


@torch.no_grad()
def feed(decoder: CausalLM, ids: torch.Tensor, pieces: list[int]) -> torch.Tensor:
    """Logits (batch, seqlen, vocab) of ``ids`` fed through a cache in pieces of the given lengths."""
    cache = KVCache(decoder.config, len(ids), sum(pieces), device=CPU, dtype=torch.float32)
    logits = [decoder(piece, cache=cache) for piece in ids.split(pieces, 1)]
    assert cache.seqlens.tolist() == [sum(pieces)] * len(ids)
    return torch.cat(logits, 1)


@pytest.mark.parametrize(
    "pieces",
    [[20], [12] + [1] * 8, [1] * 20, [7, 5, 1, 7]],
    ids=["prompt only", "prompt, then one by one", "one by one", "prompt in chunks"],
)
def test_cached_logits(pieces, decoder):
    """The window of 5 is shorter than every one of these sequences."""
    ids = torch.randint(50, (3, 20))
    judge_logits(feed(decoder, ids, pieces), decoder, ids)


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.8, seed=3), Sampling(1.1, top_k=5, seed=4)])
def test_cached_generation_equals_recomputation(sampling, decoder):
    prompt = torch.randint(50, (2, 7))
    streamed: list[torch.Tensor] = []
    cached = generate(decoder, prompt, max_new_tokens=25, sampling=sampling, on_tokens=streamed.append)
    recomputed = generate(decoder, prompt, max_new_tokens=25, sampling=sampling, use_cache=False)
    assert cached.shape == (2, 25)
    assert torch.equal(cached, recomputed)
    assert torch.equal(torch.stack(streamed, 1), cached)


@torch.no_grad()
@pytest.mark.parametrize("use_cache", [True, False], ids=["cached", "recomputed"])
def test_greedy_takes_the_most_likely_token_each_time(use_cache, decoder):
    prompt = torch.randint(50, (2, 7))
    made = generate(decoder, prompt, max_new_tokens=15, use_cache=use_cache)
    logits = decoder(torch.cat((prompt, made), 1))
    assert torch.equal(logits[:, 6:-1].argmax(-1), made)


@pytest.mark.parametrize("use_cache", [True, False], ids=["cached", "recomputed"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_prompts_of_unequal_length(side, use_cache, decoder):
    """Each prompt of a padded batch is continued as if it were alone."""
    prompts = [torch.randint(50, (length,)) for length in (9, 1, 6)]
    ids, mask = torch.full((3, 9), 49), torch.zeros(3, 9, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        columns = slice(9 - len(prompt), 9) if side == "left" else slice(0, len(prompt))
        ids[row, columns], mask[row, columns] = prompt, True
    together = generate(decoder, ids, attention_mask=mask, max_new_tokens=12, use_cache=use_cache)
    for row, prompt in enumerate(prompts):
        assert torch.equal(together[row : row + 1], generate(decoder, prompt[None], max_new_tokens=12))


def test_a_seed_repeats_and_another_does_not(decoder):
    prompt = torch.randint(50, (1, 4))
    made = [generate(decoder, prompt, max_new_tokens=30, sampling=Sampling(1.5, seed=seed)) for seed in (1, 1, 2)]
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])


def test_sampling_follows_the_distribution():
    logits = torch.tensor([[0.0, -1.0, 2.0, 1.0]]).expand(20_000, 4)
    drawn = next_tokens(logits, Sampling(2.0, top_k=3), torch.Generator().manual_seed(0))
    expected = (torch.tensor([0.0, -torch.inf, 2.0, 1.0]) / 2).softmax(0)
    counts = torch.bincount(drawn, minlength=4)
    assert counts[1] == 0, "outside of the top 3"
    # Five standard deviations of a count.
    spread = 5 * (len(drawn) * expected * (1 - expected)).sqrt()
    assert ((counts - len(drawn) * expected).abs() <= spread).all()
    assert next_tokens(logits, Sampling()).eq(2).all()
    assert next_tokens(logits, Sampling(1.0, top_k=1)).eq(2).all()


def test_no_token_asked_for(decoder):
    assert generate(decoder, torch.zeros(2, 3, dtype=torch.int64), max_new_tokens=0).shape == (2, 0)


def test_complaints(decoder):
    ids = torch.zeros(1, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match="at least one token"):
        generate(decoder, ids[:, :0], max_new_tokens=1)
    with pytest.raises(ValueError, match="without any token"):
        generate(decoder, ids, attention_mask=torch.zeros_like(ids), max_new_tokens=1)
    with pytest.raises(ValueError, match="temperature=-1"):
        Sampling(-1.0)
    with pytest.raises(ValueError, match="top_k=0"):
        Sampling(1.0, top_k=0)
    cache = KVCache(decoder.config, 1, 5, device=CPU, dtype=torch.float32)
    decoder(ids, cache=cache)
    with pytest.raises(ValueError, match="room for 5 tokens"):
        decoder(ids, cache=cache)
    with pytest.raises(ValueError, match="first prompt"):
        decoder(ids[:, :1], torch.ones(1, 1), cache=cache)
