"""What a family of checkpoints has to say: how to read its configuration, and what its tensors are called."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from transformer_fast.checkpoints import KeyMap
from transformer_fast.models.config import ModelConfig


@dataclass(frozen=True)
class Family:
    """One family: three functions and a list.

    Attributes:
        model_type: the ``model_type`` in config.json that names it.
        read_config: from config.json to our configuration; raises ValueError on what it cannot do.
        build: an empty model of that configuration.
        key_map: from the built model's names to the file's; None when they are the same.
        unused_keys: patterns of names that such files hold and the model has no use for.
    """

    model_type: str
    read_config: Callable[[Mapping[str, Any]], ModelConfig]
    build: Callable[[ModelConfig], nn.Module]
    key_map: Callable[[ModelConfig], KeyMap] | None = None
    unused_keys: tuple[str, ...] = ()
