"""Generation against Hugging Face's: the same tokens from greedy and beam search, and cached logits step by step."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from models.checkpoints_hf import CASES, VOCAB, Case, Options, rewrite
from models.inputs_hf import make_inputs
from models.oracle_hf import RUNS, InFloat64, Jittered, Shelf, arguments_for, load_theirs, worst
from torch import Tensor, nn

from transformer_fast.models import from_pretrained
from transformer_fast.testing import judge

NEW_TOKENS = 10
#: Hundreds of units in the last place: tokens that survive such noise are not a matter of rounding.
NOISE = 3e-5

BY_ID = {case.id: case for case in CASES}
GENERATING = [
    "gpt LMHeadModel",
    "gpt2 LMHeadModel",
    "gpt2 LMHeadModel scaled by layer",
    "llama CausalLM",
    "llama CausalLM llama3 rope, old spelling",
    "mistral CausalLM window",
    "gemma2 CausalLM",
    "t5 ConditionalGeneration 1.0",
    "t5 ConditionalGeneration 1.1",
    "bart ConditionalGeneration",
    "marian MTModel",
    "whisper ConditionalGeneration",
]
SEARCHES: dict[str, Options] = {
    "greedy": dict(),
    "greedy without repeats": dict(no_repeat_ngram_size=2, repetition_penalty=1.3),
    "beams": dict(num_beams=3),
    "two of four beams, early": dict(num_beams=4, num_return_sequences=2, length_penalty=0.3, early_stopping=True),
    "long beams": dict(num_beams=3, length_penalty=1.7, early_stopping="never", min_new_tokens=4),
}
each_case = pytest.mark.parametrize("case", [BY_ID[name] for name in GENERATING], ids=GENERATING)


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory, seed: int) -> Shelf:
    return Shelf(tmp_path_factory.mktemp("checkpoints"), seed)


def less_like_the_input(tensors: dict[str, Tensor], config: Options) -> None:
    """Weak token tables and strong positions: with one table for both ends, all would repeat the last token."""
    for key, tensor in tensors.items():
        if any(part in key for part in ("embed_positions", "positions_embed", "wpe")):
            tensors[key] = tensor * 10
        elif any(part in key for part in ("embed_tokens", "tokens_embed", "wte", "shared")):
            tensors[key] = tensor / 4
        elif "conv2.weight" in key or (
            "encoder_attn.out_proj.weight" in key and "model.encoder.conv2.weight" in tensors
        ):
            tensors[key] = tensor * 5  # what was heard counts: else all sounds have one continuation


@pytest.fixture(scope="module")
def pair(shelf: Shelf, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """For a case: their model and ours, of the same file."""
    pairs: dict[Case, tuple[transformers.PreTrainedModel, nn.Module]] = {}

    def pair_of(case: Case) -> tuple[transformers.PreTrainedModel, nn.Module]:
        if case not in pairs:
            folder = tmp_path_factory.mktemp("generation") / "checkpoint"
            rewrite(shelf.folder(case), folder, less_like_the_input)
            pairs[case] = load_theirs(case, folder), from_pretrained(folder, dtype=torch.float32)
        return pairs[case]

    return pair_of


def prompts(case: Case, seed: int) -> dict[str, Tensor]:
    """Sequences of unequal length, padded on the left; or features of sounds."""
    arguments = make_inputs(case, "right" if case.inputs == "speech" else "left", seed).arguments
    return {name: arguments[name] for name in ("input_ids", "attention_mask", "input_features") if name in arguments}


def their_tokens(model: transformers.PreTrainedModel, arguments: dict[str, Tensor], **options: Any) -> Tensor:
    # Whisper's own generate cuts audio in pieces and drops the prompt. The cache of T5 has as many layers as the
    # encoder, which with a deeper decoder is an IndexError.
    use_cache = not isinstance(model, transformers.T5ForConditionalGeneration)
    generate = transformers.GenerationMixin.generate
    return generate(model, **arguments, max_new_tokens=NEW_TOKENS, do_sample=False, use_cache=use_cache, **options)


def settled(
    model: transformers.PreTrainedModel, case: Case, seed: int, options: Options, *, ends: bool = False
) -> tuple[dict[str, Tensor], Options, Tensor]:
    """Prompts, options and the tokens that follow: no choice is a near tie, and there are several tokens.

    With ``ends``, one of them is made the end token: such that some sequences end with it, and some do not.
    """
    for attempt in range(50):
        arguments = prompts(case, seed + 1000 * attempt)
        start = arguments["input_ids"].shape[1] if case.inputs == "decoder" else 1
        trials = [(options, their_tokens(model, arguments, **options))]
        if ends:
            trials = list(with_an_end(model, arguments, options, trials[0][1][:, start:]))
        for wanted, expected in trials:
            new = expected[:, start:]
            if len(new.unique()) > 2 and len(new.unique(dim=0)) > 1:
                with Jittered(NOISE):
                    noisy = [their_tokens(model, arguments, **wanted) for _ in range(3)]
                if all(torch.equal(ids, expected) for ids in noisy):
                    return arguments, wanted, expected
    raise AssertionError("no prompts found whose continuations are beyond doubt")


def with_an_end(
    model: transformers.PreTrainedModel, arguments: dict[str, Tensor], options: Options, new: Tensor
) -> Iterator[tuple[Options, Tensor]]:
    """Options with an end token, and the tokens of a batch that it ends in part, for each such token among the new."""
    for token in new.unique().tolist():
        wanted = options | dict(eos_token_id=token, forced_eos_token_id=None)
        expected = their_tokens(model, arguments, **wanted)
        ended = (expected[:, -new.shape[1] :] == token).any(1)
        if ended.any() and not ended.all():
            yield wanted, expected


@each_case
@pytest.mark.parametrize("search", SEARCHES)
def test_tokens(case: Case, search: str, pair: Any, seed: int) -> None:
    theirs, ours = pair(case)
    arguments, options, expected = settled(theirs, case, seed, SEARCHES[search])
    found = ours.generate(**arguments, max_new_tokens=NEW_TOKENS, do_sample=False, **options)
    assert found.tolist() == expected.tolist()


@each_case
@pytest.mark.parametrize("search", ["greedy", "beams"])
def test_a_sequence_ends_with_the_end_token(case: Case, search: str, pair: Any, seed: int) -> None:
    """The others go on, and padding follows the end of the first."""
    theirs, ours = pair(case)
    arguments, options, expected = settled(theirs, case, seed, SEARCHES[search], ends=True)
    found = ours.generate(**arguments, max_new_tokens=NEW_TOKENS, do_sample=False, **options)
    assert found.tolist() == expected.tolist()


@torch.no_grad()
@each_case
def test_logits_of_cached_steps(case: Case, shelf: Shelf, seed: int) -> None:
    """One token after another, then two at once: the logits of the whole sequence without a cache."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{case.id} {seed}".encode()))
    arguments = prompts(case, seed)
    batch = len(next(iter(arguments.values())))
    more = torch.randint(4, VOCAB - 4, (batch, 8), generator=generator)
    is_decoder = case.inputs == "decoder"
    if is_decoder:
        mask = arguments["attention_mask"]
        whole = dict(
            input_ids=torch.cat((arguments["input_ids"], more), 1),
            attention_mask=torch.cat((mask, torch.ones_like(more)), 1),
        )
    else:
        whole = arguments | dict(decoder_input_ids=more)
    ids = whole["input_ids" if is_decoder else "decoder_input_ids"]
    first = ids.shape[1] - 5
    outputs = ours_step(shelf.model(case), whole, arguments, ids[:, :first], first, None)
    logits = [outputs.logits]
    for start, stop in ((first, first + 1), (first + 1, first + 2), (first + 2, first + 4), (first + 4, first + 5)):
        outputs = ours_step(shelf.model(case), whole, {}, ids[:, start:stop], stop, outputs.past_key_values)
        logits.append(outputs.logits)
    keep = whole["attention_mask"].bool() if is_decoder else torch.ones_like(ids, dtype=torch.bool)
    with InFloat64():
        model = shelf.theirs(case, torch.float64)
        oracle = model(**arguments_for(model, whole)).logits[keep]
    with Jittered():
        baselines = [shelf.theirs(case)(**whole).logits[keep] for _ in range(RUNS)]
    verdict = judge(torch.cat(logits, 1)[keep], oracle, worst(baselines, oracle), name="logits")
    assert verdict.passed, str(verdict)


def ours_step(
    model: nn.Module, whole: dict[str, Tensor], encoded: dict[str, Tensor], ids: Tensor, length: int, cache: Any
) -> Any:
    """New tokens and, after the first call, the cache; a decoder's mask covers the earlier columns too."""
    if "decoder_input_ids" in whole:
        return model(**encoded, decoder_input_ids=ids, past_key_values=cache, use_cache=True)
    mask = whole["attention_mask"][:, :length]
    return model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True)
