"""GPT (Radford et al., 2018) and GPT-2 (Radford et al., 2019), whose linear layers are stored as (in, out)."""

from __future__ import annotations

from typing import Any

from transformer_fast.models.config import Architecture, HeadConfig, HeadKind, ModelConfig
from transformer_fast.models.families import family as f
from transformer_fast.models.families.family import Family, Names, Tensors, Values


def _stack(values: Values, **facets: Any) -> ModelConfig:
    size = values["n_embd"]
    return ModelConfig(
        vocab_size=values["vocab_size"],
        hidden_size=size,
        num_layers=values["n_layer"],
        num_heads=values["n_head"],
        intermediate_size=values.get("n_inner") or 4 * size,
        max_positions=values["n_positions"],
        causal=True,
        norm_eps=values.get("layer_norm_epsilon", 1e-5),
        types_are_tokens=True,
        dropout=values.get("resid_pdrop", 0.1),
        embedding_dropout=values.get("embd_pdrop", 0.1),
        attention_dropout=values.get("attn_pdrop", 0.1),
        initializer_range=values.get("initializer_range", 0.02),
        **facets,
    )


def _head(values: Values, tensors: Tensors, prefix: str, table: str) -> HeadConfig:
    kind = f.head_kind(values, prefix, "LMHeadModel", "Model", "ForSequenceClassification")
    tied = kind == "language" and f.is_tied(values, tensors, table, "lm_head.weight", default=True)
    return HeadConfig(kind, tied=tied, pick="last", **f.classes(values))


def read_gpt(values: Values, tensors: Tensors) -> Architecture:
    """From an OpenAI GPT config.json: its "gelu" is the tanh form."""
    name = values.get("afn", "gelu")
    act = "gelu_tanh" if name == "gelu" else f.activation(name)
    stack = _stack(values, activation=act, norm_placement="post")
    head = _head(values, tensors, "OpenAIGPT", "tokens_embed.weight")
    return Architecture(decoder=stack, head=head, values=values)


def read_gpt2(values: Values, tensors: Tensors) -> Architecture:
    """From a GPT-2 config.json."""
    f.require(values, add_cross_attention=False)
    stack = _stack(
        values,
        activation=f.activation(values.get("activation_function", "gelu_new")),
        softmax_scale=None if values.get("scale_attn_weights", True) else 1.0,
        scale_by_layer=values.get("scale_attn_by_inverse_layer_idx", False),
    )
    return Architecture(decoder=stack, head=_head(values, tensors, "GPT2", "wte.weight"), values=values)


_HEADS: dict[HeadKind, Names] = {
    "language": {"head.weight": "lm_head.weight"},
    "sequence": {"head.out": "score"},
}
_LAYERS: Names = {
    "decoder.blocks.{i}.attention.qkv": "h.{i}.attn.c_attn",
    "decoder.blocks.{i}.attention.out": "h.{i}.attn.c_proj",
    "decoder.blocks.{i}.attention_norm": "h.{i}.ln_1",
    "decoder.blocks.{i}.mlp.up": "h.{i}.mlp.c_fc",
    "decoder.blocks.{i}.mlp.down": "h.{i}.mlp.c_proj",
    "decoder.blocks.{i}.mlp_norm": "h.{i}.ln_2",
}
_TRANSPOSED = r"decoder\.blocks\..*\.(qkv|out|up|down)"
#: The causal mask, which older files hold as a table.
_STRAY = (r"h\.\d+\.attn\.(bias|masked_bias)",)

GPT = Family(
    model_type="openai-gpt",
    read=read_gpt,
    names={
        "decoder.embeddings.tokens": "tokens_embed",
        "decoder.embeddings.positions": "positions_embed",
        **_LAYERS,
    },
    heads=_HEADS,
    prefix="transformer.",
    transposed=_TRANSPOSED,
    stray=(*_STRAY, "position_ids"),
    others={"decoder.embeddings.tokens.weight": ("lm_head.weight",)},
)

GPT2 = Family(
    model_type="gpt2",
    read=read_gpt2,
    names={
        "decoder.embeddings.tokens": "wte",
        "decoder.embeddings.positions": "wpe",
        "decoder.final_norm": "ln_f",
        **_LAYERS,
    },
    heads=_HEADS,
    prefix="transformer.",
    transposed=_TRANSPOSED,
    stray=_STRAY,
    others={"decoder.embeddings.tokens.weight": ("lm_head.weight",)},
)
