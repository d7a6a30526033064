"""What flash-attn's arguments mean in :func:`transformer_fast.attention`'s terms, and nothing else."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

#: The default of every function's ``window_size``, which needs no look.
OPEN = (-1, -1)
PADDED = "(batch, seqlen, num_heads, head_dim)"
PACKED = "(total, num_heads, head_dim)"
PAGES = "(num_pages, page_size, num_kv_heads, head_dim), as block_table is given"


def window_of(window_size: Any) -> Any:
    """``window_size`` as a pair of integers; flash-attn takes whatever turns into them, a tensor of two too."""
    if isinstance(window_size, (tuple, list, Tensor)) and len(window_size) == 2:
        return tuple(integer_of(side) for side in window_size)
    return window_size  # attention() says what is wrong with it


def integer_of(value: Any) -> Any:
    """An integer that a tensor of one element holds; everything else as it is."""
    return int(value) if isinstance(value, Tensor) and value.numel() == 1 else value


def softcap_of(softcap: float | None, dropout_p: float = 0.0) -> float | None:
    """``softcap`` with None for off.

    Raises:
        ValueError, TypeError: it is no number, or together with dropout, which flash-attn does not have either.
    """
    if softcap is not None and not isinstance(softcap, (int, float, torch.SymInt, torch.SymFloat)):
        raise TypeError(f"softcap is of type {type(softcap).__name__}; allowed: a number, 0 for none")
    if softcap is None or softcap <= 0.0:
        return None
    if dropout_p > 0.0:
        raise ValueError(f"dropout_p is {dropout_p} with softcap={softcap}; allowed: 0 where softcap is used")
    return softcap


def arguments_of(
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size: Any,
    softcap: float | None,
    alibi_slopes: Tensor | None,
    deterministic: bool,
) -> dict[str, Any]:
    """The arguments that attention() and attention_varlen() share."""
    return {
        "dropout_p": dropout_p,
        "softmax_scale": softmax_scale,
        "causal": causal,
        "window_size": window_size if window_size is OPEN else window_of(window_size),
        "softcap": softcap_of(softcap, dropout_p) if softcap else None,
        "alibi_slopes": alibi_slopes,
        "deterministic": deterministic,
    }


def with_contiguous_rows(tensor: Tensor, name: str, ndim: int, allowed: str) -> Tensor:
    """The tensor itself, copied only where its last dimension is not contiguous (flash-attn copies it too).

    Raises:
        ValueError, TypeError: it is no tensor of ``ndim`` dimensions, which ``allowed`` names.
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} is of type {type(tensor).__name__}; allowed: a torch.Tensor {allowed}")
    if tensor.dim() != ndim:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; allowed: {allowed}")
    return tensor if tensor.is_contiguous() or tensor.stride(-1) == 1 else tensor.contiguous()


def takes_gradient(*tensors: Tensor | None) -> bool:
    """Must autograd hear of a call with these?"""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
