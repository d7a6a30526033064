"""transformers' generate() with our attention: the same ids as with eager, whatever the cache and the search."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import transformers
from dropin.promised import PROMISED
from models.checkpoints_hf import BART, GEMMA2, GPT, LLAMA, T5, VOCAB, WHISPER, Case, build
from models.inputs_hf import padding_mask
from torch import Tensor

from transformer_fast.dropin.huggingface import register_with_transformers

NAME = register_with_transformers()
PROMPTS = (7, 3, 5)
NEW_TOKENS = 9  # past every window below

GPT_OSS = LLAMA | dict(
    num_local_experts=3, num_experts_per_tok=2, sliding_window=4, intermediate_size=36, eos_token_id=2
)
CASES = [
    Case("llama", "LlamaForCausalLM", "LlamaConfig", LLAMA | dict(head_dim=24), "decoder", ""),
    Case("mistral", "MistralForCausalLM", "MistralConfig", LLAMA | dict(sliding_window=4), "decoder", ""),
    Case("gemma2", "Gemma2ForCausalLM", "Gemma2Config", GEMMA2, "decoder", ""),
    Case("gpt_oss", "GptOssForCausalLM", "GptOssConfig", GPT_OSS, "decoder", ""),
    Case("gpt2", "GPT2LMHeadModel", "GPT2Config", GPT | dict(n_positions=64), "decoder", ""),
    Case("t5", "T5ForConditionalGeneration", "T5Config", T5 | dict(num_decoder_layers=2), "seq2seq", ""),
    Case("bart", "BartForConditionalGeneration", "BartConfig", BART, "seq2seq", ""),
    Case("whisper", "WhisperForConditionalGeneration", "WhisperConfig", WHISPER, "speech", ""),
]
BY_ID = {case.id: case for case in CASES}
DECODERS = ("llama", "mistral", "gemma2", "gpt_oss")


@functools.cache
def model_of(case_id: str, implementation: str, seed: int, **changes: Any) -> Any:
    case = BY_ID[case_id]
    built = build(case, seed)
    model = type(built)._from_config(built.config, attn_implementation=implementation).eval()
    model.load_state_dict(built.state_dict())
    # An end of sequence would leave little to compare.
    model.generation_config.eos_token_id = model.generation_config.forced_eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def inputs_of(case_id: str, seed: int) -> dict[str, Tensor]:
    """Left-padded prompts, or what an encoder reads."""
    generator = torch.Generator().manual_seed(seed)
    if BY_ID[case_id].inputs == "speech":
        return {"input_features": torch.randn(3, 7, 22, generator=generator)}
    keep = padding_mask(PROMPTS, "left" if BY_ID[case_id].inputs == "decoder" else "right")
    ids = torch.randint(4, VOCAB, keep.shape, generator=generator).masked_fill(~keep, 0)
    return {"input_ids": ids, "attention_mask": keep.long()}


def generate(case_id: str, implementation: str, seed: int, **options: Any) -> tuple[Tensor, Tensor]:
    """Ids and the scores they were chosen by."""
    options = dict(do_sample=False, max_new_tokens=NEW_TOKENS) | options
    out = model_of(case_id, implementation, seed).generate(
        **inputs_of(case_id, seed), **options, output_scores=True, return_dict_in_generate=True
    )
    return out.sequences, torch.stack(out.scores)


def assert_same(ours: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor]) -> None:
    assert torch.equal(ours[0], theirs[0])
    finite = theirs[1].isfinite()
    assert torch.equal(ours[1].isfinite(), finite)
    assert (ours[1] - theirs[1])[finite].abs().max() <= PROMISED * theirs[1][finite].abs().max()


@pytest.mark.parametrize("case_id", list(BY_ID))
@pytest.mark.parametrize("beams", [1, 3], ids=["greedy", "beams"])
def test_same_ids_as_eager(case_id: str, beams: int, seed: int) -> None:
    """With the cache that each model takes by default; the prompts are left-padded."""
    ours, theirs = (generate(case_id, name, seed, num_beams=beams) for name in (NAME, "eager"))
    assert_same(ours, theirs)


@pytest.mark.parametrize("case_id", [*DECODERS, "gpt2", "t5", "whisper"])
@pytest.mark.parametrize("beams", [1, 2], ids=["greedy", "beams"])
def test_static_cache(case_id: str, beams: int, seed: int) -> None:
    """Longer than what is in it, with sliding layers where the model has them."""
    ours = generate(case_id, NAME, seed, num_beams=beams, cache_implementation="static")
    assert_same(ours, generate(case_id, "eager", seed, num_beams=beams))


@pytest.mark.parametrize("case_id", DECODERS)
def test_prefill_in_chunks(case_id: str, seed: int) -> None:
    """Several rows at once against a cache that is not empty."""
    ours = generate(case_id, NAME, seed, prefill_chunk_size=3)
    assert_same(ours, generate(case_id, "eager", seed))


@pytest.mark.parametrize("case_id", DECODERS)
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_a_conversation_goes_on_in_its_cache(case_id: str, cache: str, seed: int) -> None:
    """Ten more tokens at once, with a cache that has tokens in it, a window of 4 passed long ago."""
    ids = torch.randint(4, VOCAB, (2, 23), generator=torch.Generator().manual_seed(seed))
    model = model_of(case_id, NAME, seed)
    if cache == "static":
        past = transformers.StaticCache(config=model.config, max_cache_len=30)
    else:
        past = transformers.DynamicCache(config=model.config)
    with torch.no_grad():
        parts = [model(ids[:, a:b], past_key_values=past).logits for a, b in ((0, 9), (9, 10), (10, 20), (20, 23))]
        expected = model_of(case_id, "eager", seed)(ids).logits
    assert (torch.cat(parts, dim=1) - expected).abs().max() <= PROMISED * expected.abs().max()


@pytest.mark.parametrize("case_id", ["llama", "gpt2"])
def test_assisted_decoding(case_id: str, seed: int) -> None:
    """A draft model proposes; its own attention is ours too."""
    prompt = torch.randint(4, VOCAB, (1, 6), generator=torch.Generator().manual_seed(seed))
    ids = []
    for name in (NAME, "eager"):
        model, draft = model_of(case_id, name, seed), model_of(case_id, name, seed + 1)
        ids.append(model.generate(prompt, do_sample=False, max_new_tokens=NEW_TOKENS, assistant_model=draft))
    plain = model_of(case_id, "eager", seed).generate(prompt, do_sample=False, max_new_tokens=NEW_TOKENS)
    assert torch.equal(ids[0], ids[1]) and torch.equal(ids[0], plain)


@pytest.mark.parametrize("case_id", ["llama", "gemma2"])
def test_compiled_static_decode(case_id: str, seed: int) -> None:
    """One graph, no breaks, no recompilation from step to step."""
    from torch._dynamo.testing import CompileCounter

    model = model_of(case_id, NAME, seed)
    counter = CompileCounter()
    torch._dynamo.reset()
    ids = torch.randint(4, VOCAB, (2, 12), generator=torch.Generator().manual_seed(seed))
    past = transformers.StaticCache(config=model.config, max_cache_len=16)
    step = torch.compile(model, fullgraph=True, backend=counter)
    with torch.no_grad():
        logits = [model(ids[:, :6], past_key_values=past).logits]
        compiled_for = []
        for i in range(6, 12):
            keep = torch.ones(2, i + 1, dtype=torch.long)
            inputs = model.prepare_inputs_for_generation(
                ids[:, : i + 1], next_sequence_length=1, past_key_values=past, attention_mask=keep
            )
            logits.append(step(**inputs).logits)
            compiled_for.append(counter.frame_count)
        expected = model_of(case_id, "eager", seed)(ids).logits
    assert (torch.cat(logits, dim=1) - expected).abs().max() <= PROMISED * expected.abs().max()
    assert compiled_for[1:] == compiled_for[1:2] * 5 and compiled_for[1] <= 2  # a sliding cache fills up once
    torch._dynamo.reset()


@pytest.mark.parametrize("case_id", DECODERS)
def test_continuous_batching(case_id: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests of unlike lengths share batches, blocks of 4 and few of them, prompts longer than the window."""
    handler = "transformers.generation.continuous_batching.cache.PagedAttentionMemoryHandler.get_available_memory"
    monkeypatch.setattr(handler, lambda self: 2**30)  # it would ask psutil, which need not be there
    generator = torch.Generator().manual_seed(seed)
    prompts = [torch.randint(4, VOCAB, (n,), generator=generator).tolist() for n in (3, 11, 1, 6)]
    eager = model_of(case_id, "eager", seed)
    expected = [
        eager.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=NEW_TOKENS)[0, len(prompt) :].tolist()
        for prompt in prompts
    ]
    model = model_of(case_id, NAME, seed)
    config = transformers.GenerationConfig(do_sample=False, max_new_tokens=NEW_TOKENS, eos_token_id=-1, pad_token_id=0)
    batching = transformers.ContinuousBatchingConfig(block_size=4, num_blocks=64, max_batch_tokens=12)
    outputs = model.generate_batch(prompts, generation_config=config, continuous_batching_config=batching)
    found = sorted(outputs.values(), key=lambda output: int(output.request_id.rpartition("_")[2]))
    assert [output.generated_tokens for output in found] == expected
