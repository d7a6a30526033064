"""Llama (Touvron et al., 2023; SmolLM2 among them), Mistral (Jiang et al., 2023) and Gemma 2 (Gemma Team, 2024)."""

from __future__ import annotations

from typing import Any

from transformer_fast.models.config import Architecture, HeadConfig, ModelConfig
from transformer_fast.models.families import family as f
from transformer_fast.models.families.family import Family, Names, Tensors, Values


def _architecture(
    values: Values, tensors: Tensors, name: str, *, tied: bool, logit_softcap: float | None = None, **facets: Any
) -> Architecture:
    """What the three share; ``tied`` is what an absent ``tie_word_embeddings`` means."""
    kind = f.head_kind(values, name, "ForCausalLM", "Model", "ForSequenceClassification")
    heads = values["num_attention_heads"]
    biases = ("q", "k", "v", "out") if values.get("attention_bias") else ()
    stack = ModelConfig(
        vocab_size=values["vocab_size"],
        hidden_size=values["hidden_size"],
        num_layers=values["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=values.get("num_key_value_heads") or heads,
        head_dim=values.get("head_dim") or values["hidden_size"] // heads,
        intermediate_size=values["intermediate_size"],
        max_positions=values["max_position_embeddings"],
        causal=True,
        padding_id=values.get("pad_token_id"),
        norm="rmsnorm",
        norm_eps=values.get("rms_norm_eps", 1e-6),
        biases=(*biases, "mlp") if values.get("mlp_bias") else biases,
        attention_dropout=values.get("attention_dropout", 0.0),
        initializer_range=values.get("initializer_range", 0.02),
        **f.rotary(values),
        **facets,
    )
    tied = kind == "language" and f.is_tied(values, tensors, "embed_tokens.weight", "lm_head.weight", default=tied)
    head = HeadConfig(kind, tied=tied, softcap=logit_softcap, pick="last", **f.classes(values))
    return Architecture(decoder=stack, head=head, values=values)


def read_llama(values: Values, tensors: Tensors) -> Architecture:
    """From a Llama config.json."""
    act = f.activation(values.get("hidden_act", "silu"), gated=True)
    values = {"max_position_embeddings": 2048, **values}
    return _architecture(values, tensors, "Llama", tied=False, activation=act)


def read_mistral(values: Values, tensors: Tensors) -> Architecture:
    """From a Mistral config.json: ``sliding_window`` counts the token itself; null is none."""
    act = f.activation(values.get("hidden_act", "silu"), gated=True)
    values = {"num_key_value_heads": 8, "max_position_embeddings": 131072, **values}
    window = values.get("sliding_window", 4096)
    return _architecture(values, tensors, "Mistral", tied=False, activation=act, sliding_window=window)


def read_gemma2(values: Values, tensors: Tensors) -> Architecture:
    """From a Gemma 2 config.json: a window on every other layer, from the first, unless ``layer_types`` says."""
    f.require(values, use_bidirectional_attention=False)
    values = {"head_dim": 256, "num_key_value_heads": 4, "max_position_embeddings": 8192, **values}
    number = values["num_hidden_layers"]
    kinds = values.get("layer_types") or ["full_attention" if i % 2 else "sliding_attention" for i in range(number)]
    act = values.get("hidden_activation") or values.get("hidden_act") or "gelu_pytorch_tanh"
    return _architecture(
        values,
        tensors,
        "Gemma2",
        tied=True,
        logit_softcap=values.get("final_logit_softcapping", 30.0),
        activation=f.activation(act, gated=True),
        norm_placement="sandwich",
        norm_plus_one=True,
        embedding_scale=values["hidden_size"] ** 0.5,
        rounded_scale=True,
        softmax_scale=values.get("query_pre_attn_scalar", 256) ** -0.5,
        softcap=values.get("attn_logit_softcapping", 50.0),
        sliding_window=values.get("sliding_window", 4096),
        sliding_layers=tuple(i for i, kind in enumerate(kinds) if kind == "sliding_attention"),
    )


_LAYER = "layers.{i}."
_NAMES: Names = {
    "decoder.embeddings.tokens": "embed_tokens",
    "decoder.final_norm": "norm",
    "decoder.blocks.{i}.attention.qkv": tuple(f"{_LAYER}self_attn.{part}_proj" for part in "qkv"),
    "decoder.blocks.{i}.attention.out": _LAYER + "self_attn.o_proj",
    "decoder.blocks.{i}.attention_norm": _LAYER + "input_layernorm",
    "decoder.blocks.{i}.mlp.up": (_LAYER + "mlp.gate_proj", _LAYER + "mlp.up_proj"),
    "decoder.blocks.{i}.mlp.down": _LAYER + "mlp.down_proj",
    "decoder.blocks.{i}.mlp_norm": _LAYER + "post_attention_layernorm",
}
_SANDWICH: Names = {
    **_NAMES,
    "decoder.blocks.{i}.attention_post_norm": _LAYER + "post_attention_layernorm",
    "decoder.blocks.{i}.mlp_norm": _LAYER + "pre_feedforward_layernorm",
    "decoder.blocks.{i}.mlp_post_norm": _LAYER + "post_feedforward_layernorm",
}
_SHARED: dict[str, Any] = {
    "heads": {"language": {"head.weight": "lm_head.weight"}, "sequence": {"head.out": "score"}},
    "prefix": "model.",
    # The rotary frequencies, which older files hold.
    "stray": (r"layers\.\d+\.self_attn\.rotary_emb\.inv_freq", r"rotary_emb\.inv_freq"),
    "others": {"decoder.embeddings.tokens.weight": ("lm_head.weight",)},
}

LLAMA = Family(model_type="llama", read=read_llama, names=_NAMES, **_SHARED)
MISTRAL = Family(model_type="mistral", read=read_mistral, names=_NAMES, **_SHARED)
GEMMA2 = Family(model_type="gemma2", read=read_gemma2, names=_SANDWICH, **_SHARED)
