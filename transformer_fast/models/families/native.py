"""Models that no public class describes, saved under our own names with our own configuration."""

from __future__ import annotations

from typing import Any

from transformer_fast.models.config import Architecture, HeadConfig, ModelConfig
from transformer_fast.models.families.family import Family, Tensors, Values

MODEL_TYPE = "transformer_fast"


def read(values: Values, tensors: Tensors) -> Architecture:
    """From what :func:`write` wrote."""
    del tensors
    stacks: Any = {n: ModelConfig.from_dict(values[n]) for n in ("encoder", "decoder") if values.get(n) is not None}
    return Architecture(
        **stacks, head=HeadConfig.from_dict(values["head"]), shared_tokens=values["shared_tokens"], values=values
    )


def write(architecture: Architecture) -> dict[str, object]:
    """What goes into config.json; special tokens are those of ``architecture.values``."""
    stacks = {"encoder": architecture.encoder, "decoder": architecture.decoder}
    return {
        **architecture.values,
        "model_type": MODEL_TYPE,
        **{name: None if stack is None else stack.to_dict() for name, stack in stacks.items()},
        "head": architecture.head.to_dict(),
        "shared_tokens": architecture.shared_tokens,
    }


NATIVE = Family(model_type=MODEL_TYPE, read=read, own_names=True)
