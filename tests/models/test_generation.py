"""Generation: the cache changes nothing but the time; padding changes nothing at all; seeds repeat."""

from __future__ import annotations

import pytest
import torch
from models.recomputed import recompute

from transformer_fast.generation import generate
from transformer_fast.models import CausalLM
from transformer_fast.testing import judge


@torch.no_grad()
def feed(decoder: CausalLM, ids: torch.Tensor, pieces: list[int]) -> torch.Tensor:
    """Logits (batch, seqlen, vocab) of ``ids`` fed through a cache in pieces of the given lengths."""
    cache, logits = None, []
    for piece in ids.split(pieces, 1):
        output = decoder(piece, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        logits.append(output.logits)
    assert cache is not None and cache.seqlens.tolist() == [sum(pieces)] * len(ids)
    return torch.cat(logits, 1)


@torch.no_grad()
@pytest.mark.parametrize(
    "pieces",
    [[20], [12] + [1] * 8, [1] * 20, [7, 5, 1, 7]],
    ids=["prompt only", "prompt, then one by one", "one by one", "prompt in chunks"],
)
def test_cached_logits(pieces, decoder):
    """The window of 5 is shorter than every one of these sequences."""
    ids = torch.randint(50, (3, 20))
    cached, baseline = feed(decoder, ids, pieces), decoder(ids).logits
    verdict = judge(cached, decoder.double()(ids).logits, baseline, name="cached logits")
    assert verdict.passed, str(verdict)


@pytest.mark.parametrize(
    "options",
    [{}, {"do_sample": True, "temperature": 0.8, "seed": 3}, {"do_sample": True, "top_k": 5, "seed": 4}],
    ids=["greedy", "sampling", "top k"],
)
def test_cached_generation_equals_recomputation(options, decoder):
    prompt = torch.randint(50, (2, 7))
    streamed: list[torch.Tensor] = []
    cached = generate(decoder, prompt, max_new_tokens=25, on_tokens=streamed.append, **options)
    recomputed = recompute(decoder, prompt, max_new_tokens=25, **options)
    assert cached.shape == (2, 7 + 25)
    assert torch.equal(cached, recomputed)
    assert torch.equal(torch.stack(streamed, 1), cached[:, 7:])


@torch.no_grad()
@pytest.mark.parametrize("make", [generate, recompute], ids=["cached", "recomputed"])
def test_greedy_takes_the_most_likely_token_each_time(make, decoder):
    made = make(decoder, torch.randint(50, (2, 7)), max_new_tokens=15)
    assert torch.equal(decoder(made).logits[:, 6:-1].argmax(-1), made[:, 7:])


@pytest.mark.parametrize("make", [generate, recompute], ids=["cached", "recomputed"])
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_prompts_of_unequal_length(side, options, make, decoder):
    """Each prompt of a padded batch is continued as if it were alone."""
    prompts = [torch.randint(50, (length,)) for length in (9, 1, 6)]
    ids, mask = torch.full((3, 9), 49), torch.zeros(3, 9, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        columns = slice(9 - len(prompt), 9) if side == "left" else slice(0, len(prompt))
        ids[row, columns], mask[row, columns] = prompt, True
    together = make(decoder, ids, attention_mask=mask, max_new_tokens=12, **options)
    for row, prompt in enumerate(prompts):
        alone = make(decoder, prompt[None], max_new_tokens=12, **options)
        assert torch.equal(together[row, 9:], alone[0, len(prompt) :])


def test_a_seed_repeats_and_another_does_not(decoder):
    prompt = torch.randint(50, (1, 4))
    made = [
        generate(decoder, prompt, max_new_tokens=30, do_sample=True, temperature=1.5, seed=seed) for seed in (1, 1, 2)
    ]
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])


def test_complaints(decoder):
    ids = torch.zeros(1, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match="at least one token"):
        generate(decoder, ids[:, :0], max_new_tokens=1)
    with pytest.raises(ValueError, match="without any token"):
        generate(decoder, ids, attention_mask=torch.zeros_like(ids), max_new_tokens=1)
    with pytest.raises(ValueError, match="on_tokens with num_beams=2"):
        generate(decoder, ids, max_new_tokens=1, num_beams=2, on_tokens=print)
    with pytest.raises(TypeError, match="unknown generation option: colour"):
        generate(decoder, ids, colour="red")
    with pytest.raises(ValueError, match="use_cache is not True"):
        generate(decoder, ids, use_cache=False)
    cache = decoder(ids, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="hides other tokens"):
        decoder(ids[:, :1], torch.zeros(1, 5), past_key_values=cache)
