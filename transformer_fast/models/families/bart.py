"""BART (Lewis et al., 2020) and Marian (Junczys-Dowmunt et al., 2018): post-norm encoder-decoders."""

from __future__ import annotations

from typing import Any

from transformer_fast.models.config import Architecture, HeadConfig, HeadKind, ModelConfig
from transformer_fast.models.families import family as f
from transformer_fast.models.families.family import Family, Names, Tensors, Values


def stack(values: Values, side: str, **facets: Any) -> ModelConfig:
    """The encoder or the decoder of a config.json in BART's spelling."""
    size = values["d_model"]
    return ModelConfig(
        hidden_size=size,
        num_layers=values[f"{side}_layers"],
        num_heads=values[f"{side}_attention_heads"],
        intermediate_size=values[f"{side}_ffn_dim"],
        causal=side == "decoder",
        cross_attention=side == "decoder",
        activation=f.activation(values.get("activation_function", "gelu")),
        padding_id=values.get("pad_token_id"),
        dropout=values.get("dropout", 0.1) or 0.0,
        activation_dropout=values.get("activation_dropout") or 0.0,
        attention_dropout=values.get("attention_dropout") or 0.0,
        initializer_range=values.get("init_std", 0.02),
        **facets,
    )


def scale(values: Values) -> dict[str, Any]:
    """What token vectors are multiplied by; Whisper has the setting too, and its code no use for it."""
    return {"embedding_scale": values["d_model"] ** 0.5 if values.get("scale_embedding", False) else 1.0}


def read_bart(values: Values, tensors: Tensors) -> Architecture:
    """From a BART config.json: positions begin at row 2 of their table."""
    kind = f.head_kind(values, "Bart", "ForConditionalGeneration", "Model", "ForSequenceClassification")
    facets = {
        **scale(values),
        "vocab_size": values["vocab_size"],
        "max_positions": values["max_position_embeddings"],
        "norm_placement": "post",
        "position_offset": 2,
        "embedding_norm": True,
    }
    head = HeadConfig(
        kind,
        tied=kind == "language" and f.is_tied(values, tensors, "shared.weight", "lm_head.weight", default=True),
        bias=True,
        bias_trained=False,
        pick="eos",
        dense="tanh" if kind == "sequence" else None,
        dropout=values.get("classifier_dropout") or 0.0,
        dropout_first=True,
        **{"num_labels": 3, **f.classes({"id2label": range(3), **values})},
    )
    return Architecture(
        encoder=stack(values, "encoder", **facets), decoder=stack(values, "decoder", **facets), head=head, values=values
    )


def read_marian(values: Values, tensors: Tensors) -> Architecture:
    """From a Marian config.json: sinusoidal positions, which no file needs to hold."""
    kind = f.head_kind(values, "Marian", "MTModel", "Model")
    shared = values.get("share_encoder_decoder_embeddings", True)
    facets = {
        **scale(values),
        "max_positions": values["max_position_embeddings"],
        "norm_placement": "post",
        "positions": "sinusoidal",
    }
    table = "shared.weight" if shared else "decoder.embed_tokens.weight"
    tied = kind == "language" and f.is_tied(values, tensors, table, "lm_head.weight", default=True)
    sizes = (values["vocab_size"], values.get("decoder_vocab_size") or values["vocab_size"])
    return Architecture(
        encoder=stack(values, "encoder", vocab_size=sizes[0], **facets),
        decoder=stack(values, "decoder", vocab_size=sizes[0] if shared else sizes[1], **facets),
        head=HeadConfig(kind, tied=tied, bias=True, bias_trained=False),
        shared_tokens=shared,
        values=values,
    )


def layer_names(side: str) -> Names:
    """A stack's blocks in BART's names; Whisper has the same."""
    ours, theirs = f"{side}.blocks.{{i}}.", f"{side}.layers.{{i}}."
    return {
        ours + "attention.qkv": tuple(f"{theirs}self_attn.{part}_proj" for part in "qkv"),
        ours + "attention.out": theirs + "self_attn.out_proj",
        ours + "attention_norm": theirs + "self_attn_layer_norm",
        ours + "cross.q": theirs + "encoder_attn.q_proj",
        ours + "cross.kv": tuple(f"{theirs}encoder_attn.{part}_proj" for part in "kv"),
        ours + "cross.out": theirs + "encoder_attn.out_proj",
        ours + "cross_norm": theirs + "encoder_attn_layer_norm",
        ours + "mlp.up": theirs + "fc1",
        ours + "mlp.down": theirs + "fc2",
        ours + "mlp_norm": theirs + "final_layer_norm",
        f"{side}.embeddings.positions": f"{side}.embed_positions",
        f"{side}.embeddings.norm": f"{side}.layernorm_embedding",
    }


_NAMES = {**layer_names("encoder"), **layer_names("decoder")}
_HEADS: dict[HeadKind, Names] = {
    "language": {"head.weight": "lm_head.weight", "head.bias": "final_logits_bias"},
    "sequence": {"head.dense": "classification_head.dense", "head.out": "classification_head.out_proj"},
}
_TABLES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight")

BART = Family(
    model_type="bart",
    read=read_bart,
    names={**_NAMES, "encoder.embeddings.tokens": "shared"},
    heads=_HEADS,
    prefix="model.",
    stray=(r"(encoder|decoder)\.version",),
    others={"encoder.embeddings.tokens.weight": _TABLES},
    rows=("head.bias",),
    optional=("head.bias",),
)

MARIAN = Family(
    model_type="marian",
    read=read_marian,
    names={
        **_NAMES,
        "encoder.embeddings.tokens": "shared",
        "decoder.embeddings.tokens": "decoder.embed_tokens",
    },
    heads=_HEADS,
    prefix="model.",
    stray=(r"(encoder|decoder)\.embed_positions\.weight",),
    rows=("head.bias",),
    optional=("head.bias",),
    others={"encoder.embeddings.tokens.weight": _TABLES, "decoder.embeddings.tokens.weight": _TABLES[1:]},
)
