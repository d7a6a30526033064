"""ViT (Dosovitskiy et al., 2021): an encoder of image patches behind a class token."""

from __future__ import annotations

from typing import Any

from transformer_fast.models.config import BIASES, Architecture, HeadConfig, ModelConfig
from transformer_fast.models.families import family as f
from transformer_fast.models.families.family import Family, Tensors, Values


def _pair(value: Any) -> tuple[int, int]:
    height, width = (value, value) if isinstance(value, int) else value
    return height, width


def read(values: Values, tensors: Tensors) -> Architecture:
    """From a ViT config.json."""
    kind = f.head_kind(values, "ViT", "ForImageClassification", "Model")
    f.require(values, pooler_act="tanh", pooler_output_size=values["hidden_size"])
    image, patch = _pair(values.get("image_size", 224)), _pair(values.get("patch_size", 16))
    stack = ModelConfig(
        vocab_size=0,
        hidden_size=values["hidden_size"],
        num_layers=values["num_hidden_layers"],
        num_heads=values["num_attention_heads"],
        intermediate_size=values["intermediate_size"],
        max_positions=1 + (image[0] // patch[0]) * (image[1] // patch[1]),
        norm_eps=values.get("layer_norm_eps", 1e-12),
        activation=f.activation(values.get("hidden_act", "gelu")),
        biases=BIASES if values.get("qkv_bias", True) else ("out", "mlp"),
        dropout=values.get("hidden_dropout_prob", 0.0),
        attention_dropout=values.get("attention_probs_dropout_prob", 0.0),
        initializer_range=values.get("initializer_range", 0.02),
        front_end="patches",
        channels=values.get("num_channels", 3),
        patch_size=patch,
        image_size=image,
    )
    head = HeadConfig(
        kind, pooler=kind == "none" and f.may_hold(tensors, "pooler.dense.weight"), bias=True, **f.classes(values)
    )
    return Architecture(encoder=stack, head=head, final_state_unnormed=True, values=values)


_LAYER = "encoder.layer.{i}."

VIT = Family(
    model_type="vit",
    read=read,
    names={
        "encoder.embeddings.patches": "embeddings.patch_embeddings.projection",
        "encoder.embeddings.class_token": "embeddings.cls_token",
        "encoder.embeddings.positions": "embeddings.position_embeddings",
        "encoder.blocks.{i}.attention.qkv": tuple(
            f"{_LAYER}attention.attention.{part}" for part in ("query", "key", "value")
        ),
        "encoder.blocks.{i}.attention.out": _LAYER + "attention.output.dense",
        "encoder.blocks.{i}.attention_norm": _LAYER + "layernorm_before",
        "encoder.blocks.{i}.mlp.up": _LAYER + "intermediate.dense",
        "encoder.blocks.{i}.mlp.down": _LAYER + "output.dense",
        "encoder.blocks.{i}.mlp_norm": _LAYER + "layernorm_after",
        "encoder.final_norm": "layernorm",
        "head.pooler": "pooler.dense",
    },
    heads={"sequence": {"head.out": "classifier"}},
    prefix="vit.",
    stray=(r"pooler\.dense\.(weight|bias)", r"embeddings\.mask_token"),
)
