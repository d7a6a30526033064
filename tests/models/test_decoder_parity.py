"""The decoder's definition, by somebody else: Hugging Face's Mistral with the same weights."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import transformers

from transformer_fast.models import CausalLM
from transformer_fast.testing import judge


def as_mistral(model: CausalLM) -> transformers.MistralForCausalLM:
    """A Mistral of the same shape and weights; all of its layers slide, or none."""
    config = model.config
    theirs = transformers.MistralForCausalLM(
        transformers.MistralConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            intermediate_size=config.intermediate_size,
            max_position_embeddings=config.max_positions,
            rms_norm_eps=config.norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            sliding_window=config.sliding_window,
            tie_word_embeddings=True,
            attn_implementation="eager",
        )
    )
    decoder = model.decoder
    names = {
        "model.embed_tokens.weight": decoder.embeddings.tokens.weight,
        "lm_head.weight": decoder.embeddings.tokens.weight,
        "model.norm.weight": decoder.final_norm.weight,
    }
    sizes = [heads * config.head_dim for heads in (config.num_heads, config.num_kv_heads, config.num_kv_heads)]
    for i, block in enumerate(decoder.blocks):
        at = f"model.layers.{i}."
        for part, weight in zip("qkv", block.attention.qkv.weight.split(sizes), strict=True):
            names[f"{at}self_attn.{part}_proj.weight"] = weight
        names[f"{at}self_attn.o_proj.weight"] = block.attention.out.weight
        gate, up = block.mlp.up.weight.chunk(2)
        names |= {f"{at}mlp.gate_proj.weight": gate, f"{at}mlp.up_proj.weight": up}
        names[f"{at}mlp.down_proj.weight"] = block.mlp.down.weight
        names[f"{at}input_layernorm.weight"] = block.attention_norm.weight
        names[f"{at}post_attention_layernorm.weight"] = block.mlp_norm.weight
    theirs.load_state_dict({name: tensor.detach() for name, tensor in names.items()})
    return theirs.eval()


@torch.no_grad()
@pytest.mark.parametrize("window", [None, 5, 1])
def test_logits_of_mistral(window, decoder_config, randomized):
    config = replace(decoder_config, sliding_window=window, sliding_window_every=1, norm_eps=1e-3, rope_theta=500.0)
    model = randomized(CausalLM(config))
    theirs = as_mistral(model)
    ids = torch.randint(50, (3, 21))
    baseline, oracle = theirs(ids).logits, theirs.double()(ids).logits
    verdict = judge(model(ids), oracle, baseline, name="logits")
    assert verdict.passed, str(verdict)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batches_give_the_logits_of_each_sequence_alone(side, decoder_config, randomized):
    model = randomized(CausalLM(replace(decoder_config, sliding_window_every=1)))
    theirs = as_mistral(model)
    ids, keep = torch.randint(50, (3, 9)), torch.arange(9) < torch.tensor([9, 2, 6])[:, None]
    keep = keep.flip(1) if side == "left" else keep
    alone = [row[kept][None] for row, kept in zip(ids, keep, strict=True)]
    baseline, oracle = (
        torch.cat([theirs.to(dtype)(sequence).logits[0] for sequence in alone])
        for dtype in (torch.float32, torch.float64)
    )
    verdict = judge(model(ids, keep)[keep], oracle, baseline, name="logits")
    assert verdict.passed, str(verdict)
