"""What the adapters of kernels do alike around a backward kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import Results


def backward_inputs(
    results: Results, dout: Tensor, dlse: Tensor | None, out_stride: tuple[int, ...], dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """(out, lse, stats, dout, dlse) as kernels take them: negation done, in forward's own order and type.

    Saved-tensor hooks compress and move what forward left, and autograd brings gradients as they come.
    """
    out, lse, stats = results
    assert lse is not None and stats is not None
    if out.stride() != out_stride or out.dtype != dtype:
        out = torch.empty_strided(out.shape, out_stride, dtype=dtype, device=out.device).copy_(out)
    dout = dout.to(dtype).resolve_neg()
    if dout._is_zerotensor():  # which has no memory
        dout = dout.clone()
    if dout.stride(-1) != 1 and dout.shape[-1] > 1:  # expanded, from out.sum() for one
        dout = dout.contiguous()
    lse, stats = _numbers(lse), _numbers(stats)
    return out.resolve_neg(), lse, stats, dout, None if dlse is None else _numbers(dlse)


def _numbers(tensor: Tensor) -> Tensor:
    return tensor.to(torch.float32).resolve_neg().contiguous()


def sinks_gradient(sinks: Tensor, lse: Tensor, delta: Tensor, *, packed: bool) -> Tensor:
    """The sink is a key with value 0: d(loss)/d(sink) = -p_sink * delta, where delta carries -dlse already."""
    head_dim = 0 if packed else 1
    heads = sinks.to(torch.float32).view(-1, *[1] * (lse.dim() - head_dim - 1))
    share = torch.where(lse == float("-inf"), 0.0, torch.exp(heads - lse))
    return -(share * delta).transpose(0, head_dim).flatten(1).sum(1).to(sinks.dtype)
