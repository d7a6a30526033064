"""BERT (Devlin et al., 2019) and RoBERTa (Liu et al., 2019), MiniLM sentence encoders among them."""

from __future__ import annotations

from typing import Any

from transformer_fast.models.config import Architecture, HeadConfig, ModelConfig
from transformer_fast.models.families import family as f
from transformer_fast.models.families.family import Family, Names, Tensors, Values

_NAMES: Names = {
    "encoder.embeddings.tokens": "embeddings.word_embeddings",
    "encoder.embeddings.positions": "embeddings.position_embeddings",
    "encoder.embeddings.types": "embeddings.token_type_embeddings",
    "encoder.embeddings.norm": "embeddings.LayerNorm",
    "encoder.blocks.{i}.attention.qkv": (
        "encoder.layer.{i}.attention.self.query",
        "encoder.layer.{i}.attention.self.key",
        "encoder.layer.{i}.attention.self.value",
    ),
    "encoder.blocks.{i}.attention.out": "encoder.layer.{i}.attention.output.dense",
    "encoder.blocks.{i}.attention_norm": "encoder.layer.{i}.attention.output.LayerNorm",
    "encoder.blocks.{i}.mlp.up": "encoder.layer.{i}.intermediate.dense",
    "encoder.blocks.{i}.mlp.down": "encoder.layer.{i}.output.dense",
    "encoder.blocks.{i}.mlp_norm": "encoder.layer.{i}.output.LayerNorm",
    "head.pooler": "pooler.dense",
}
_MASKED: Names = {
    "head.dense": "cls.predictions.transform.dense",
    "head.norm": "cls.predictions.transform.LayerNorm",
    "head.weight": "cls.predictions.decoder.weight",
    "head.bias": "cls.predictions.bias",
}
#: 0, 1, 2, ...: older files hold the index that newer ones compute.
_INDEX = r"embeddings\.position_ids"
_POOLER = r"pooler\.dense\.(weight|bias)"


def _stack(values: Values, **changes: Any) -> ModelConfig:
    f.require(values, position_embedding_type="absolute", is_decoder=False)
    settings = {
        "vocab_size": values["vocab_size"],
        "hidden_size": values["hidden_size"],
        "num_layers": values["num_hidden_layers"],
        "num_heads": values["num_attention_heads"],
        "intermediate_size": values["intermediate_size"],
        "max_positions": values["max_position_embeddings"],
        "norm_placement": "post",
        "norm_eps": values.get("layer_norm_eps", 1e-12),
        "activation": f.activation(values.get("hidden_act", "gelu")),
        "padding_id": values.get("pad_token_id", 0),
        "token_types": values.get("type_vocab_size", 2),
        "embedding_norm": True,
        "dropout": values.get("hidden_dropout_prob", 0.1),
        "attention_dropout": values.get("attention_probs_dropout_prob", 0.1),
        "initializer_range": values.get("initializer_range", 0.02),
    }
    return ModelConfig(**{**settings, **changes})


def _head(values: Values, tensors: Tensors, prefix: str) -> HeadConfig:
    kind = f.head_kind(values, prefix, *f.ENCODERS, *(["ForPreTraining"] if prefix == "Bert" else []))
    dropout, general = values.get("classifier_dropout"), values.get("hidden_dropout_prob", 0.1)
    # A base model is saved with its pooler or without.
    pooled = kind == "pretraining" or (kind == "none" and f.may_hold(tensors, "pooler.dense.weight"))
    return HeadConfig(
        kind,
        pooler=pooled,
        tied=values.get("tie_word_embeddings", True) and kind in ("masked", "pretraining"),
        transform=f.activation(values.get("hidden_act", "gelu")) if prefix == "Bert" else "gelu",
        bias=True,
        dense="tanh" if kind == "sequence" else None,
        dropout=0.0 if kind == "question" else general if dropout is None else dropout,
        dropout_first=prefix == "Roberta",
        **f.classes(values),
    )


def read_bert(values: Values, tensors: Tensors) -> Architecture:
    """From a BERT config.json."""
    return Architecture(encoder=_stack(values), head=_head(values, tensors, "Bert"), values=values)


def read_roberta(values: Values, tensors: Tensors) -> Architecture:
    """From a RoBERTa config.json: positions begin behind the pad id, and padding stays on it."""
    pad = values.get("pad_token_id", 1)
    positions = values["max_position_embeddings"] - pad - 1
    stack = _stack(values, max_positions=positions, position_offset=pad + 1, positions_from_pad=pad)
    return Architecture(encoder=stack, head=_head(values, tensors, "Roberta"), values=values)


BERT = Family(
    model_type="bert",
    read=read_bert,
    names=_NAMES,
    heads={
        "masked": _MASKED,
        "pretraining": {**_MASKED, "head.relationship": "cls.seq_relationship"},
        "sequence": {"head.dense": "bert.pooler.dense", "head.out": "classifier"},
        "token": {"head.out": "classifier"},
        "question": {"head.out": "qa_outputs"},
    },
    prefix="bert.",
    stray=(_INDEX, _POOLER, r"cls\.seq_relationship\.(weight|bias)"),
    others={
        "encoder.embeddings.tokens.weight": ("cls.predictions.decoder.weight",),
        "head.bias": ("cls.predictions.decoder.bias",),
    },
)

ROBERTA = Family(
    model_type="roberta",
    read=read_roberta,
    names=_NAMES,
    heads={
        "masked": {
            "head.dense": "lm_head.dense",
            "head.norm": "lm_head.layer_norm",
            "head.weight": "lm_head.decoder.weight",
            "head.bias": "lm_head.bias",
        },
        "sequence": {"head.dense": "classifier.dense", "head.out": "classifier.out_proj"},
        "token": {"head.out": "classifier"},
        "question": {"head.out": "qa_outputs"},
    },
    prefix="roberta.",
    stray=(_INDEX, _POOLER),
    others={
        "encoder.embeddings.tokens.weight": ("lm_head.decoder.weight",),
        "head.bias": ("lm_head.decoder.bias",),
    },
)
