"""Drop-ins: the functions and modules of other libraries, over :func:`transformer_fast.attention`.

Each name is imported when it is first used, so that none costs anything, nor needs its library, before that.
"""

from __future__ import annotations

import importlib
from typing import Any

#: Where each public name lives. (``accelerate`` here is the module; the function is ``transformer_fast.accelerate``.)
_HOMES = {
    "MultiheadAttention": "torch_nn",
    "TransformerDecoderLayer": "torch_nn",
    "TransformerEncoderLayer": "torch_nn",
    "causal_lm_loss": "loss",
    "flex_attention": "flex",
    "fuse_pointwise": "pointwise",
    "memory_efficient_attention": "xformers",
    "pack_linears": "linears",
    "replace_modules": "torch_nn",
    "restore_modules": "torch_nn",
    "restore_padding": "huggingface_padding",
    "scaled_dot_product_attention": "sdpa",
    "skip_padding": "huggingface_padding",
    "unfuse_pointwise": "pointwise",
    "unpack_linears": "linears",
    "varlen_attn": "varlen",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = found  # the next look-up is a plain one
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
