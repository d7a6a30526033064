"""Speculative decoding changes how long it takes: not what greedy search gives, and not what sampling draws from."""

from __future__ import annotations

import itertools
import math
import random
from typing import Any

import pytest
import torch
from models.recomputed import recompute
from torch import Tensor

from transformer_fast.generation import GenerationConfig, generate, speculative, speculative_search
from transformer_fast.generation.processors import processor
from transformer_fast.generation.speculative import Chooser, draft_by_lookup, draft_with_model
from transformer_fast.models import Architecture, CausalLM, DecoderModel, HeadConfig, ModelConfig, from_config

VOCAB = 50
STACK = dict(vocab_size=VOCAB, hidden_size=24, num_layers=1, num_heads=3, intermediate_size=40, causal=True)
#: On the left, on the right, and none: which of 9 columns a prompt has.
MASKS = {
    "full": torch.ones(4, 9, dtype=torch.bool),
    "left": torch.arange(9) >= torch.tensor([0, 8, 3, 5])[:, None],
    "right": torch.arange(9) <= torch.tensor([8, 0, 3, 5])[:, None],
}
OPTIONS: dict[str, dict[str, Any]] = {
    "greedy": dict(),
    "processed": dict(repetition_penalty=1.3, no_repeat_ngram_size=2, min_new_tokens=7, forced_eos_token_id=3),
    "never ending": dict(eos_token_id=()),
}
ENDS = dict(eos_token_id=[3, 7, 11, 20], pad_token_id=1)
DRAFTS = ("itself", "near", "far", "lookup")


@pytest.fixture
def gpt2(randomized) -> CausalLM:
    return randomized(CausalLM(ModelConfig(**STACK, max_positions=28)))


@pytest.fixture
def draft(decoder, decoder_config, randomized):
    """By name: the model itself, one that differs a little, one that has nothing in common, and no model."""
    near = CausalLM(decoder_config)
    near.load_state_dict({name: t + 0.03 * torch.randn_like(t) for name, t in decoder.state_dict().items()})
    far = randomized(CausalLM(ModelConfig(**STACK, max_positions=64)))
    drafts = {"itself": decoder, "near": near, "far": far}
    return lambda name: dict(draft_model=drafts[name]) if name in drafts else dict(prompt_lookup=2)


@pytest.mark.parametrize("name", DRAFTS)
@pytest.mark.parametrize("side", MASKS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_greedy_ids(options, side, name, decoder, draft):
    """Rows accept different numbers of tokens and end at different lengths. Windows have 5 tokens, drafts up to 7."""
    ids, mask = torch.randint(VOCAB, (4, 9)), MASKS[side]
    how = dict(attention_mask=mask, max_new_tokens=24) | ENDS | options
    expected_stream: list[Tensor] = []
    expected = generate(decoder, ids, on_tokens=expected_stream.append, **how)
    stream: list[Tensor] = []
    how |= draft(name) | dict(num_draft_tokens=random.choice((1, 4, 7)))
    assert generate(decoder, ids, on_tokens=stream.append, **how).tolist() == expected.tolist()
    assert torch.stack(stream).tolist() == torch.stack(expected_stream).tolist()


@pytest.mark.parametrize("number", [1, 3, 6])
def test_as_good_a_draft_as_there_can_be(number, decoder):
    """One pass for the prompt and a token, then as many tokens a pass as can be, each row alike."""
    config, passes = GenerationConfig(max_new_tokens=23), []
    decoder.head.register_forward_pre_hook(lambda *_: passes.append(1))
    ids = torch.randint(VOCAB, (3, 9))
    found = speculative_search(decoder, ids, None, config, draft_model=decoder, num_draft_tokens=number)
    row_passes = 3 * (1 + math.ceil(22 / (number + 1)))
    assert (found.new_tokens, found.row_passes) == (3 * 23, row_passes)
    assert found.tokens_per_pass == 3 * 23 / row_passes


@pytest.mark.parametrize("side", MASKS)
@torch.no_grad()
def test_a_draft_proposes_what_it_would_say_alone(side, decoder, draft, monkeypatch):
    """However many of its tokens were accepted in this row and the others."""
    near, mask, lengths, complaints = draft("near")["draft_model"], MASKS[side], set(), []

    def checked(reader, chooser, rows, count):
        tokens, proposed = draft_with_model(reader, chooser, rows, count)
        lengths.add(len({len(row) for row in rows}))
        for row, new in zip(rows, tokens, strict=True):
            keep = next(m for i, m in enumerate(mask) if torch.equal(row[:9], ids[i]))
            real = torch.cat((row[:9][keep], row[9:]))
            for token in new:
                complaints.append(bool(near(real[None]).logits[0, -1].argmax() != token))
                real = torch.cat((real, token[None]))
        return tokens, proposed

    monkeypatch.setattr(speculative, "draft_with_model", checked)
    ids = torch.randint(VOCAB, (4, 9))
    speculative.speculative_search(decoder, ids, mask, GenerationConfig(max_new_tokens=24), draft_model=near)
    assert max(lengths) > 1, "rows of unequal length"
    assert len(complaints) > 50
    assert not any(complaints)


def test_lookup_finds_what_came_before():
    row = torch.tensor([5, 6, 7, 8, 9, 5, 6, 7])
    tokens, proposed = draft_by_lookup(2, 10, [row], 3)
    assert tokens.tolist() == [[8, 9, 5]]
    assert proposed.argmax(2).tolist() == tokens.tolist()
    assert proposed.sum(2).eq(1).all()
    # The first of several places; two tokens go before one.
    assert draft_by_lookup(2, 10, [torch.tensor([2, 9, 1, 2, 7, 1, 2, 8, 1, 2])], 2)[0].tolist() == [[7, 1]]
    # Nothing, or less than for another row; fewer tokens than asked for; what is past the vocabulary.
    assert draft_by_lookup(3, 10, [torch.tensor([1, 2, 3])], 3)[0].shape == (1, 0)
    rows = [row, torch.tensor([1, 2, 3]), torch.tensor([4, 1, 4]), torch.tensor([1, 2, 99, 1, 2])]
    assert draft_by_lookup(3, 10, rows, 4)[0].tolist() == [[8, 9, 5, 6], [3] * 4, [1, 4, 4, 4], [9, 1, 2, 2]]


def test_a_text_that_repeats_itself_takes_few_passes():
    """The model counts in a circle."""
    config = ModelConfig(**STACK | dict(vocab_size=6), max_positions=64)
    model = DecoderModel(Architecture(decoder=config, head=HeadConfig("language", tied=False)))
    with torch.no_grad():
        for parameter in model.decoder.parameters():
            parameter.zero_()
        model.decoder.embeddings.tokens.weight.copy_(torch.eye(6, 24))
        model.decoder.final_norm.weight.fill_(1)
        model.head.weight.copy_(torch.eye(6, 24).roll(1, 0))
    ids = torch.tensor([[0, 1, 2, 3, 4, 5, 0], [3, 4, 5, 0, 1, 2, 3]])
    found = speculative_search(model, ids, None, GenerationConfig(max_new_tokens=21), prompt_lookup=1)
    assert found.ids.tolist() == [[(start + i) % 6 for i in range(28)] for start in (0, 3)]
    assert found.row_passes == 2 * (1 + 20 / 5)


def assert_drawn_from(counts: Tensor, probabilities: Tensor) -> None:
    """By Bernstein's inequality and the union bound, counts are this near to their means but once in a million times.

    What is impossible never happened.
    """
    number, probabilities = counts.sum(), probabilities.double()
    assert torch.allclose(probabilities.sum(), torch.ones((), dtype=torch.float64))
    log = math.log(2 * counts.numel() * 1e6)
    bound = log / 3 + (log**2 / 9 + 2 * number * probabilities * (1 - probabilities) * log).sqrt()
    assert ((counts - number * probabilities).abs() <= bound).all(), f"{counts / number}\n{probabilities}"
    assert (counts[probabilities == 0] == 0).all()


@pytest.mark.parametrize("lookup", [False, True], ids=["drawn", "certain"])
def test_what_is_accepted_and_drawn_in_place_of_the_rest(lookup):
    """Two proposed tokens and one more, of 4: their distribution is the product of what was wanted."""
    rows, chooser = 200_000, Chooser(GenerationConfig(do_sample=True, max_new_tokens=3), 1, torch.device("cpu"))
    wanted, proposed = torch.rand(3, 4).softmax(1) ** 2, torch.rand(2, 4) ** 3
    wanted[0, 3] = proposed[1, 0] = 0  # impossible, and never proposed
    wanted, proposed = (x / x.sum(1, keepdim=True) for x in (wanted, proposed))
    if lookup:
        proposed = torch.eye(4)[[1, 2]]
    tokens = torch.stack([torch.multinomial(p, rows, replacement=True) for p in proposed], 1)
    accepted, last = chooser.check(tokens, proposed.expand(rows, 2, 4), wanted.expand(rows, 3, 4))
    # What comes after the accepted ones and the last is drawn later, from what is wanted there.
    made = torch.stack([torch.multinomial(p, rows, replacement=True) for p in wanted], 1)
    place = torch.arange(3)
    made = torch.where(place < accepted[:, None], torch.cat((tokens, last[:, None]), 1), made)
    made = torch.where(place == accepted[:, None], last[:, None], made)
    joint = torch.einsum("a,b,c->abc", *wanted).flatten()
    assert_drawn_from(torch.bincount(made @ torch.tensor([16, 4, 1]), minlength=64), joint)
    first = torch.minimum(wanted[0], proposed[0]).sum()
    assert_drawn_from(torch.stack(((accepted == 0).sum(), (accepted > 0).sum())), torch.stack((1 - first, first)))


@torch.no_grad()
@pytest.mark.parametrize("how", ["drawn", "looked up"])
def test_what_sampling_draws_from(how, randomized):
    """All continuations by three tokens of 4, one of which ends them, by their number in 4,000 draws."""
    rows, fill, ids = 4000, 4, torch.tensor([[0, 1, 3, 0, 1]])
    model, other = (randomized(CausalLM(ModelConfig(**STACK | dict(vocab_size=4), max_positions=8))) for _ in range(2))
    options = dict(do_sample=True, temperature=1.5, top_k=3, repetition_penalty=1.2, max_new_tokens=3)
    config = GenerationConfig(**options, eos_token_id=2, pad_token_id=fill)
    process, expected = processor(config, 5, ids.device), torch.zeros(5, 5, 5)
    for made in itertools.product(range(4), repeat=3):
        made = made[: made.index(2) + 1] if 2 in made else made
        sequence, probability = torch.cat((ids, torch.tensor([made])), 1), 1.0
        for length in range(5, sequence.shape[1]):
            before = sequence[:, :length]
            probability *= process(before, model(before).logits[:, -1]).softmax(-1)[0, sequence[0, length]]
        expected[(*made, fill, fill)[:3]] = probability
    draft = dict(prompt_lookup=2) if how == "looked up" else dict(draft_model=other)
    made = generate(model, ids, config=config, num_return_sequences=rows, num_draft_tokens=2, **draft)[:, 5:]
    counts = torch.zeros(125, dtype=torch.int64)
    counts += torch.bincount(
        torch.nn.functional.pad(made, (0, 3 - made.shape[1]), value=fill) @ torch.tensor([25, 5, 1]), minlength=125
    )
    assert_drawn_from(counts, expected.flatten())
    for place in range(3):
        others = [p for p in range(3) if p != place]
        assert_drawn_from(counts.view(5, 5, 5).sum(others), expected.sum(others))


def test_a_seed_repeats_and_another_does_not(decoder, draft):
    ids = torch.randint(VOCAB, (2, 5))
    how = dict(do_sample=True, temperature=1.5, max_new_tokens=20) | draft("near")
    made = [generate(decoder, ids, seed=seed, **how) for seed in (1, 1, 2)]
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])


@pytest.mark.parametrize("prompts", [1, 2])
@pytest.mark.parametrize("draft_options", [{}, dict(prompt_lookup=2)], ids=["plain", "lookup"])
def test_a_position_table_is_used_to_its_end(prompts, draft_options, gpt2):
    """By default no more tokens are made than it has rows, and proposals do not go beyond it either."""
    ids = torch.randint(VOCAB, (prompts, 20))
    made = generate(gpt2, ids, **draft_options)
    assert made.tolist() == recompute(gpt2, ids, max_new_tokens=8).tolist()
    longest = generate(gpt2, ids, max_new_tokens=9, **draft_options)
    assert torch.equal(longest[:, :28], made)
    if draft_options:
        itself = generate(gpt2, ids, max_new_tokens=9, draft_model=gpt2, num_draft_tokens=6)
        assert torch.equal(itself, longest)


def test_complaints(decoder, gpt2):
    ids = torch.randint(VOCAB, (1, 5))
    t5 = from_config(dict(model_type="t5", vocab_size=VOCAB, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2))
    small = CausalLM(ModelConfig(**STACK | dict(vocab_size=49), max_positions=64))
    for model, options, complaint in (
        (decoder, dict(prompt_lookup=0), "prompt_lookup=0; allowed: at least 1"),
        (decoder, dict(prompt_lookup=2, num_draft_tokens=0), "num_draft_tokens=0; allowed: at least 1"),
        (decoder, dict(prompt_lookup=2, draft_model=decoder), "both given; allowed: one of them"),
        (decoder, dict(prompt_lookup=2, num_beams=2), "num_beams=2; allowed: .* without beams"),
        (decoder, dict(draft_model=small), "CausalLM with vocab_size=49; allowed: .* the model's 50 tokens"),
        (decoder, dict(draft_model=t5), "Seq2SeqModel with vocab_size=50; allowed: a decoder-only model"),
        (decoder, dict(draft_model=gpt2, max_new_tokens=30), "length of 35 .* draft_model's max_positions=28"),
        (t5, dict(prompt_lookup=2, decoder_start_token_id=0), "with a Seq2SeqModel, .* allowed: a DecoderModel"),
    ):
        with pytest.raises(ValueError, match=complaint):
            generate(model, ids, **options)
    with pytest.raises(ValueError, match="neither given; allowed: one of them"):
        speculative_search(decoder, ids, None, GenerationConfig())
