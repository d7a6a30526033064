"""Models trained here, saved under our own names with our own configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformer_fast.models.config import ModelConfig
from transformer_fast.models.families.family import Family
from transformer_fast.models.heads import CausalLM

MODEL_TYPE = "transformer_fast"


def read_config(values: Mapping[str, Any]) -> ModelConfig:
    """From what :func:`write_config` wrote."""
    return ModelConfig.from_dict({name: value for name, value in values.items() if name != "model_type"})


def write_config(config: ModelConfig) -> dict[str, Any]:
    """What goes into config.json."""
    return {"model_type": MODEL_TYPE, **config.to_dict()}


NATIVE = Family(model_type=MODEL_TYPE, read_config=read_config, build=CausalLM)
