"""BERT encoders, as Hugging Face's ``BertModel`` saves them (MiniLM sentence encoders among them)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformer_fast.checkpoints import KeyMap
from transformer_fast.models.config import ModelConfig
from transformer_fast.models.families.family import Family
from transformer_fast.models.stack import Encoder

# Ours, theirs: linear layers and norms, which both have a weight and a bias.
_EMBEDDINGS = {"embeddings.norm": "embeddings.LayerNorm"}
_LAYER = {
    "attention.out": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "mlp.up": "intermediate.dense",
    "mlp.down": "output.dense",
    "mlp_norm": "output.LayerNorm",
}
_TABLES = {
    "embeddings.tokens.weight": "embeddings.word_embeddings.weight",
    "embeddings.positions.weight": "embeddings.position_embeddings.weight",
    "embeddings.types.weight": "embeddings.token_type_embeddings.weight",
}


def read_config(values: Mapping[str, Any]) -> ModelConfig:
    """From a BERT config.json."""
    _require(values, "hidden_act", "gelu", default="gelu")
    _require(values, "position_embedding_type", "absolute", default="absolute")
    _require(values, "is_decoder", False, default=False)
    return ModelConfig(
        vocab_size=values["vocab_size"],
        hidden_size=values["hidden_size"],
        num_layers=values["num_hidden_layers"],
        num_heads=values["num_attention_heads"],
        intermediate_size=values["intermediate_size"],
        max_positions=values["max_position_embeddings"],
        norm="layernorm",
        norm_placement="post",
        norm_eps=values.get("layer_norm_eps", 1e-12),
        activation="gelu",
        positions="learned",
        token_types=values["type_vocab_size"],
        embedding_norm=True,
        initializer_range=values.get("initializer_range", 0.02),
    )


def key_map(config: ModelConfig) -> KeyMap:
    """Our encoder's parameter names to those of ``BertModel``; query, key and value are one matrix here."""
    names: dict[str, tuple[str, ...]] = {ours: (theirs,) for ours, theirs in _TABLES.items()}
    modules: dict[str, tuple[str, ...]] = {ours: (theirs,) for ours, theirs in _EMBEDDINGS.items()}
    for i in range(config.num_layers):
        theirs_at = f"encoder.layer.{i}."
        modules |= {f"blocks.{i}.{ours}": (theirs_at + theirs,) for ours, theirs in _LAYER.items()}
        modules[f"blocks.{i}.attention.qkv"] = tuple(
            f"{theirs_at}attention.self.{part}" for part in ("query", "key", "value")
        )
    for kind in ("weight", "bias"):
        names |= {f"{ours}.{kind}": tuple(f"{t}.{kind}" for t in theirs) for ours, theirs in modules.items()}
    return names


def _require(values: Mapping[str, Any], name: str, supported: object, default: object) -> None:
    given = values.get(name, default)
    if given != supported:
        raise ValueError(f"BERT checkpoints with {name}={given!r} are not supported; only {supported!r}")


BERT = Family(
    model_type="bert",
    read_config=read_config,
    build=Encoder,
    key_map=key_map,
    unused_keys=(
        # 0, 1, 2, ...: older files hold the index that newer ones compute.
        r"embeddings\.position_ids",
        # The first token's output for next-sentence prediction; hidden states do not go through it.
        r"pooler\.dense\.(weight|bias)",
    ),
)
