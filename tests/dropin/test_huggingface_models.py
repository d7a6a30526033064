"""Whole models of transformers with our attention against their eager one: outputs and every gradient."""

from __future__ import annotations

import contextlib
import functools

import pytest
import torch
from dropin.promised import PROMISED
from models.checkpoints_hf import (
    BART,
    BERT,
    DISTILBERT,
    GEMMA2,
    GPT,
    LLAMA,
    ROBERTA,
    T5,
    VIT,
    VOCAB,
    WHISPER,
    Case,
    build,
)
from models.inputs_hf import make_inputs
from models.oracle_hf import RUNS, Jittered, Results, results

from transformer_fast.dropin.huggingface import register_with_transformers
from transformer_fast.testing.tolerance import FACTOR, ULPS

NAME = register_with_transformers()

GPT_OSS = LLAMA | dict(num_local_experts=3, num_experts_per_tok=2, intermediate_size=36, sliding_window=4)
#: Head sizes that no vector divides, groups of 1 to 9 heads, windows below the sequences.
CASES = [
    Case("bert", "BertForMaskedLM", "BertConfig", BERT | dict(hidden_size=96), "encoder", "tokens"),
    Case("roberta", "RobertaForMaskedLM", "RobertaConfig", ROBERTA | dict(hidden_size=80), "encoder", "tokens"),
    Case("distilbert", "DistilBertForMaskedLM", "DistilBertConfig", DISTILBERT | dict(dim=96), "encoder", "tokens"),
    Case("gpt2", "GPT2LMHeadModel", "GPT2Config", GPT | dict(n_embd=192), "decoder", "next tokens"),
    Case("llama", "LlamaForCausalLM", "LlamaConfig", LLAMA | dict(head_dim=80), "decoder", "next tokens"),
    Case(
        "smollm2",
        "LlamaForCausalLM",
        "LlamaConfig",
        LLAMA
        | dict(hidden_size=36, num_attention_heads=9, num_key_value_heads=3, head_dim=24, tie_word_embeddings=True),
        "decoder",
        "next tokens",
    ),
    Case(
        "mistral",
        "MistralForCausalLM",
        "MistralConfig",
        LLAMA | dict(sliding_window=4, num_key_value_heads=1, head_dim=40),
        "decoder",
        "next tokens",
    ),
    Case("gemma2", "Gemma2ForCausalLM", "Gemma2Config", GEMMA2 | dict(head_dim=96), "decoder", "next tokens"),
    Case("gpt_oss", "GptOssForCausalLM", "GptOssConfig", GPT_OSS | dict(head_dim=24), "decoder", "next tokens"),
    Case("t5", "T5ForConditionalGeneration", "T5Config", T5 | dict(d_kv=40), "seq2seq", "tokens"),
    Case("bart", "BartForConditionalGeneration", "BartConfig", BART | dict(d_model=96), "seq2seq", "tokens"),
    Case("whisper", "WhisperForConditionalGeneration", "WhisperConfig", WHISPER | dict(d_model=80), "speech", "tokens"),
    Case("vit", "ViTForImageClassification", "ViTConfig", VIT | dict(hidden_size=80), "image", "sequence"),
]
each_batch = pytest.mark.parametrize(
    ("case", "kind"), [pytest.param(case, kind, id=f"{case.id}, {kind}") for case in CASES for kind in case.kinds]
)


@functools.cache
def results_of(case: Case, kind: str, implementation: str, seed: int, jitter: int = 0) -> Results:
    """Hidden states, logits and loss at the real tokens, and the gradient of each parameter.

    With ``jitter``, the seed of another run, last digits on the way are random, which tells what they are worth.
    """
    built = build(case, seed)
    model = type(built)._from_config(built.config, attn_implementation=implementation).eval()
    model.load_state_dict(built.state_dict())
    torch.manual_seed(jitter)
    with Jittered() if jitter else contextlib.nullcontext():
        return results(
            model,
            make_inputs(case, kind, seed),
            lambda: {name: p.grad for name, p in model.named_parameters() if p.grad is not None},
        )


@each_batch
def test_outputs(case: Case, kind: str, seed: int) -> None:
    ours, eager = (results_of(case, kind, name, seed) for name in (NAME, "eager"))
    for name, expected in eager.items():
        if not name.startswith("gradient of"):
            error = (ours[name] - expected).abs().max() / expected.abs().max()
            assert error <= PROMISED, f"{name}: a relative error of {float(error):.3g}"


@each_batch
def test_gradients(case: Case, kind: str, seed: int) -> None:
    """Element by element. What is all cancellation, as the gradient of a key's bias, has the rounding of the rest, and
    T5's embeddings move further than promised by eager's own last digits.
    """
    ours, eager = (results_of(case, kind, name, seed) for name in (NAME, "eager"))
    names = [name for name in eager if name.startswith("gradient of")]
    assert names and names == [name for name in ours if name.startswith("gradient of")]
    rounding = ULPS * torch.finfo(torch.float32).eps * max(eager[name].abs().max() for name in names)
    for name in names:
        error, allowed = (ours[name] - eager[name]).abs().max(), PROMISED * eager[name].abs().max() + rounding
        if error > allowed:
            runs = [results_of(case, kind, "eager", seed, jitter=run) for run in range(1, RUNS + 1)]
            allowed = FACTOR * max((run[name] - eager[name]).abs().max() for run in runs) + rounding
        assert error <= allowed, f"{name}: an error of {float(error):.3g}; allowed: {float(allowed):.3g}"


LLAMA4 = LLAMA | dict(attention_chunk_size=4, num_local_experts=2, intermediate_size_mlp=36, eos_token_id=2)
GEMMA3 = LLAMA | dict(num_hidden_layers=3, sliding_window=4, eos_token_id=2, query_pre_attn_scalar=17)
MIXTRAL = LLAMA | dict(num_local_experts=3, num_experts_per_tok=2, intermediate_size=36, sliding_window=4)
MODERN_BERT = dict(vocab_size=VOCAB, hidden_size=24, num_hidden_layers=3, num_attention_heads=2, intermediate_size=37,
                   local_attention=4, global_attn_every_n_layers=2, pad_token_id=0)  # fmt: skip
OPT = dict(vocab_size=VOCAB, hidden_size=24, word_embed_proj_dim=24, num_hidden_layers=2, num_attention_heads=3,
           ffn_dim=37, max_position_embeddings=32)  # fmt: skip
MPT = dict(vocab_size=VOCAB, d_model=24, n_heads=3, n_layers=2, max_seq_len=32, pad_token_id=0)
BLOOM = dict(vocab_size=VOCAB, hidden_size=24, n_head=3, n_layer=2, pad_token_id=0)
AIMV2 = dict(vocab_size=VOCAB, hidden_size=24, intermediate_size=37, num_hidden_layers=2, num_attention_heads=3,
             max_position_embeddings=32, eos_token_id=2, pad_token_id=0)  # fmt: skip
CANINE = BERT | dict(hidden_size=24, num_attention_heads=3, downsampling_rate=2, local_transformer_stride=8)
#: Other ways to a mask: chunks, windows on both sides, layers of several kinds; forward only.
MORE = [
    Case("qwen2", "Qwen2ForCausalLM", "Qwen2Config", LLAMA | dict(use_sliding_window=True, sliding_window=4,
         max_window_layers=1), "decoder", ""),
    Case("qwen3", "Qwen3ForCausalLM", "Qwen3Config", LLAMA, "decoder", ""),
    Case("phi3", "Phi3ForCausalLM", "Phi3Config", LLAMA | dict(sliding_window=4), "decoder", ""),
    Case("mixtral", "MixtralForCausalLM", "MixtralConfig", MIXTRAL, "decoder", ""),
    Case("gemma3", "Gemma3ForCausalLM", "Gemma3TextConfig", GEMMA3, "decoder", ""),
    Case("llama4", "Llama4ForCausalLM", "Llama4TextConfig", LLAMA4, "decoder", ""),
    Case("olmo2", "Olmo2ForCausalLM", "Olmo2Config", LLAMA, "decoder", ""),
    Case("opt", "OPTForCausalLM", "OPTConfig", OPT, "decoder", ""),
    Case("modernbert", "ModernBertModel", "ModernBertConfig", MODERN_BERT, "encoder", ""),
    Case("electra", "ElectraModel", "ElectraConfig", BERT, "encoder", ""),
    # These pass is_causal=False beside a causal mask.
    Case("aimv2", "Aimv2TextModel", "Aimv2TextConfig", AIMV2, "encoder", ""),
    # The attention of these does not call the interface, and is the same under any name.
    Case("mpt", "MptForCausalLM", "MptConfig", MPT, "decoder", ""),
    Case("bloom", "BloomForCausalLM", "BloomConfig", BLOOM, "decoder", ""),
    Case("longformer", "LongformerModel", "LongformerConfig", BERT | dict(attention_window=4), "encoder", ""),
    Case("visual_bert", "VisualBertModel", "VisualBertConfig", BERT | dict(visual_embedding_dim=7), "encoder", ""),
    Case("canine", "CanineModel", "CanineConfig", CANINE, "encoder", ""),
]  # fmt: skip


@pytest.mark.parametrize("case", MORE, ids=lambda case: case.id)
@pytest.mark.parametrize("side", ["full", "right", "left"])
def test_further_models(case: Case, side: str, seed: int) -> None:
    inputs, built, logits = make_inputs(case, side, seed), build(case, seed), []
    for name in (NAME, "eager"):
        model = type(built)._from_config(built.config, attn_implementation=name).eval()
        model.load_state_dict(built.state_dict())
        with torch.no_grad():
            logits.append(model(**inputs.arguments)[0][inputs.keep])
    assert (logits[0] - logits[1]).abs().max() <= PROMISED * logits[1].abs().max()
