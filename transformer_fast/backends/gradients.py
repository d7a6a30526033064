"""What the adapters of kernels do alike around a backward kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import Results


def as_saved(results: Results, out_stride: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """What forward left, in its own order and type again: saved-tensor hooks compress and move it."""
    out, lse, stats = results
    assert lse is not None and stats is not None
    if out.stride() != out_stride or out.dtype != dtype:
        out = torch.empty_strided(out.shape, out_stride, dtype=dtype, device=out.device).copy_(out)
    lse, stats = (t.to(torch.float32).resolve_neg().contiguous() for t in (lse, stats))
    return out.resolve_neg(), lse, stats


def with_contiguous_columns(dout: Tensor) -> Tensor:
    """The gradient as kernels take it: negation done, and one that was expanded (from out.sum() for one) copied."""
    dout = dout.resolve_neg()
    return dout.contiguous() if dout.stride(-1) != 1 and dout.shape[-1] > 1 else dout


def sinks_gradient(sinks: Tensor, lse: Tensor, delta: Tensor, *, packed: bool) -> Tensor:
    """The sink is a key with value 0: d(loss)/d(sink) = -p_sink * delta, where delta carries -dlse already."""
    head_dim = 0 if packed else 1
    heads = sinks.to(torch.float32).view(-1, *[1] * (lse.dim() - head_dim - 1))
    share = torch.where(lse == float("-inf"), 0.0, torch.exp(heads - lse))
    return -(share * delta).transpose(0, head_dim).flatten(1).sum(1).to(sinks.dtype)
