"""Fused attention for PyTorch that runs anywhere and proves its own numerics."""

import importlib
from typing import TYPE_CHECKING, Any

from . import backends
from ._version import __version__
from .attention import Explanation, attention, attention_paged, attention_varlen, explain
from .spec import UnsupportedError

if TYPE_CHECKING:
    from .dropin.accelerate import accelerate
    from .dropin.huggingface import register_with_transformers

__all__ = [
    "Explanation",
    "UnsupportedError",
    "__version__",
    "accelerate",
    "attention",
    "attention_paged",
    "attention_varlen",
    "backends",
    "explain",
    "register_with_transformers",
]

#: Functions and folders that are imported when first used: who only calls attention() does not wait for them.
_FUNCTIONS = {"accelerate": ".dropin.accelerate", "register_with_transformers": ".dropin.huggingface"}
_FOLDERS = ("dropin", "flash_attn", "generation", "models", "tasks", "testing")


def __getattr__(name: str) -> Any:
    if name in _FUNCTIONS:
        return getattr(importlib.import_module(_FUNCTIONS[name], __name__), name)
    if name in _FOLDERS:
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
