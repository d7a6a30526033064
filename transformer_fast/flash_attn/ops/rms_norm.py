"""RMS normalisation under flash-attn's name."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """``x / sqrt(mean(x**2) + epsilon) * weight`` over the last dimension (Zhang and Sennrich, 2019)."""
    return F.rms_norm(x, list(weight.shape), weight.to(x.dtype), epsilon)
