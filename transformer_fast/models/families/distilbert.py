"""DistilBERT (Sanh et al., 2019): BERT without token types and pooler."""

from __future__ import annotations

from transformer_fast.models.config import Architecture, HeadConfig, ModelConfig
from transformer_fast.models.families import family as f
from transformer_fast.models.families.family import Family, Tensors, Values


def read(values: Values, tensors: Tensors) -> Architecture:
    """From a DistilBERT config.json."""
    kind = f.head_kind(values, "DistilBert", *f.ENCODERS)
    dropout: float = values.get("dropout", 0.1)
    dropouts: dict[str, float] = {
        "sequence": values.get("seq_classif_dropout", 0.2),
        "question": values.get("qa_dropout", 0.1),
    }
    act = f.activation(values.get("activation", "gelu"))
    stack = ModelConfig(
        vocab_size=values["vocab_size"],
        hidden_size=values["dim"],
        num_layers=values["n_layers"],
        num_heads=values["n_heads"],
        intermediate_size=values["hidden_dim"],
        max_positions=values["max_position_embeddings"],
        norm_placement="post",
        norm_eps=1e-12,
        activation=act,
        embedding_norm=True,
        padding_id=values.get("pad_token_id", 0),
        dropout=dropout,
        attention_output_dropout=0.0,
        attention_dropout=values.get("attention_dropout", 0.1),
        initializer_range=values.get("initializer_range", 0.02),
    )
    head = HeadConfig(
        kind,
        tied=values.get("tie_word_embeddings", True) and kind == "masked",
        transform=act,
        bias=True,
        dense="relu" if kind == "sequence" else None,
        dropout=dropouts.get(kind, dropout),
        **f.classes(values),
    )
    return Architecture(encoder=stack, head=head, values=values)


_LAYER = "transformer.layer.{i}."

DISTILBERT = Family(
    model_type="distilbert",
    read=read,
    names={
        "encoder.embeddings.tokens": "embeddings.word_embeddings",
        "encoder.embeddings.positions": "embeddings.position_embeddings",
        "encoder.embeddings.norm": "embeddings.LayerNorm",
        "encoder.blocks.{i}.attention.qkv": tuple(f"{_LAYER}attention.{part}_lin" for part in "qkv"),
        "encoder.blocks.{i}.attention.out": _LAYER + "attention.out_lin",
        "encoder.blocks.{i}.attention_norm": _LAYER + "sa_layer_norm",
        "encoder.blocks.{i}.mlp.up": _LAYER + "ffn.lin1",
        "encoder.blocks.{i}.mlp.down": _LAYER + "ffn.lin2",
        "encoder.blocks.{i}.mlp_norm": _LAYER + "output_layer_norm",
    },
    heads={
        "masked": {
            "head.dense": "vocab_transform",
            "head.norm": "vocab_layer_norm",
            "head.weight": "vocab_projector.weight",
            "head.bias": "vocab_projector.bias",
        },
        "sequence": {"head.dense": "pre_classifier", "head.out": "classifier"},
        "token": {"head.out": "classifier"},
        "question": {"head.out": "qa_outputs"},
    },
    prefix="distilbert.",
    stray=(r"embeddings\.position_ids",),
    others={"encoder.embeddings.tokens.weight": ("vocab_projector.weight",)},
)
