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

#: Imported when first used: who only calls attention() does not wait for them.
_LATER = {"accelerate": ".dropin.accelerate", "register_with_transformers": ".dropin.huggingface"}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LATER[name], __name__), name)
