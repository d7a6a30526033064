"""Continuous batching of real models: each request gets the ids that `generate` makes of it alone.

A window on every layer (Mistral), one on every other layer with capped scores (Gemma 2), and a position table (GPT-2).
"""

from __future__ import annotations

import random

import pytest
import torch

from transformer_fast.generation.batching import ContinuousBatch
from transformer_fast.models import CausalLM, DecoderModel, ModelConfig, from_config, presets

VOCAB, LONGEST = 53, 40
LLAMA = dict(
    vocab_size=VOCAB,
    hidden_size=24,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=6,
    intermediate_size=37,
    max_position_embeddings=64,
    sliding_window=4,
    rope_theta=500.0,
)
GPT2 = dict(vocab_size=VOCAB, n_embd=20, n_layer=2, n_head=2, n_positions=LONGEST)
GEMMA2 = dict(
    num_hidden_layers=3,
    head_dim=10,
    query_pre_attn_scalar=17,
    sliding_window=6,
    attn_logit_softcapping=1.5,
    final_logit_softcapping=2.5,
)
CONFIGS = {
    "mistral": dict(model_type="mistral", architectures=["MistralForCausalLM"], **LLAMA),
    "gemma2": dict(model_type="gemma2", architectures=["Gemma2ForCausalLM"], **LLAMA | GEMMA2),
    "gpt2": dict(model_type="gpt2", architectures=["GPT2LMHeadModel"], **GPT2),
}


@pytest.fixture(params=CONFIGS)
def model(request, randomized) -> DecoderModel:
    return randomized(from_config(CONFIGS[request.param]).eval())


def prompt(length: int) -> list[int]:
    return torch.randint(VOCAB, (length,)).tolist()


def alone(model: DecoderModel, ids: list[int], count: int, ends: list[int]) -> list[int]:
    made = model.generate(torch.tensor([ids]), max_new_tokens=count, eos_token_id=ends, pad_token_id=None)
    return made[0, len(ids) :].tolist()


@pytest.mark.parametrize(("num_pages", "page_size"), [(40, 4), (12, 4), (45, 1)], ids=["room", "tight", "small pages"])
def test_requests_that_arrive_while_others_run(num_pages, page_size, model):
    """Half of them begin alike; where room is tight, some give their pages up and are computed again."""
    batch = ContinuousBatch(model, num_pages=num_pages, page_size=page_size, max_batch=5)
    begin, expected, found = prompt(13), {}, {}
    for number in range(10):
        ids = (begin[: random.randint(8, 13)] if number % 2 else []) + prompt(random.randint(1, 9))
        count, ends = random.randint(6, 18), prompt(2)
        expected[batch.submit(ids, max_new_tokens=count, eos_token_ids=ends)] = alone(model, ids, count, ends)
        for _ in range(random.randint(0, 2)):
            for request, tokens in batch.step().items():
                found.setdefault(request, []).extend(tokens)
    while made := batch.step():
        for request, tokens in made.items():
            found.setdefault(request, []).extend(tokens)
    assert found == expected == batch.run()
    assert batch.cache.available == num_pages, "all pages came back"


def test_requests_that_give_way(model):
    """Three of 24 tokens, six pages each, and there are twelve. What is known still is not computed again."""
    batch = ContinuousBatch(model, num_pages=12, page_size=4)
    prompts = [prompt(9) for _ in range(3)]
    for ids in prompts:
        batch.submit(ids, max_new_tokens=15)
    assert batch.run() == {number: alone(model, ids, 15, []) for number, ids in enumerate(prompts)}
    assert batch.preemptions > 0


def test_a_beginning_that_is_shared(model, monkeypatch):
    """Two full pages of 4 are computed once, and are longer than the windows; the last token is always computed."""
    batch = ContinuousBatch(model, num_pages=30, page_size=4)
    begin, computed, decode = prompt(8), [], model.decode
    monkeypatch.setattr(
        model, "decode", lambda ids, *rest, **more: computed.append(ids.shape) or decode(ids, *rest, **more)
    )
    prompts = [begin + prompt(length) for length in (3, 5, 1)] + [begin]
    for ids in prompts:
        batch.submit(ids, max_new_tokens=4)
    found = batch.run()
    assert computed == [(1, 11), (1, 5), (1, 1), (1, 4), (4, 1), (4, 1), (4, 1)]
    assert found == {number: alone(model, ids, 4, []) for number, ids in enumerate(prompts)}


def test_what_cannot_be_batched():
    t5 = dict(vocab_size=VOCAB, d_model=24, d_kv=6, d_ff=37, num_layers=1, num_heads=4, model_type="t5")
    with pytest.raises(TypeError, match="Seq2SeqModel with positions='relative'; allowed: a decoder-only model"):
        ContinuousBatch(from_config(t5), num_pages=4)
    with pytest.raises(TypeError, match="Seq2SeqModel with positions='sinusoidal'; allowed: a decoder-only model"):
        ContinuousBatch(from_config(presets.transformer_2017(VOCAB), device="meta"), num_pages=4)
    stack = dict(vocab_size=VOCAB, hidden_size=24, num_layers=1, num_heads=4, intermediate_size=37, max_positions=32)
    with pytest.raises(TypeError, match="CausalLM with positions='relative'; allowed"):
        ContinuousBatch(CausalLM(ModelConfig(**stack, causal=True, positions="relative")), num_pages=4)
    batch = ContinuousBatch(from_config(CONFIGS["gpt2"]), num_pages=30, page_size=4)
    with pytest.raises(ValueError, match=f"max_new_tokens={LONGEST}; .* {LONGEST + 1} together, .* positions"):
        batch.submit([1, 2], max_new_tokens=LONGEST)
    batch.submit([1, 2], max_new_tokens=LONGEST - 1)
    assert len(batch.run()[0]) == LONGEST - 1
