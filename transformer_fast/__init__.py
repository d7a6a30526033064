"""Fused attention for PyTorch that runs anywhere and proves its own numerics."""

from . import backends
from ._version import __version__
from .attention import Explanation, attention, attention_paged, attention_varlen, explain
from .spec import UnsupportedError

__all__ = [
    "Explanation",
    "UnsupportedError",
    "__version__",
    "attention",
    "attention_paged",
    "attention_varlen",
    "backends",
    "explain",
]
