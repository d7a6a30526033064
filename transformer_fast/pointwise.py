"""What stands around a model's matrix products, in one pass over memory: norms, gates and rotary positions.

Inference on a CPU runs the native kernels, which compute in float32 and round once; everything else, and every
gradient but GELU's, PyTorch's own operators.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .backends import cpu_pointwise
from .backends.cpu import TYPES
from .ops import is_plain_inference, is_watched


def is_native(*tensors: Tensor) -> bool:
    """Do the kernels take them: of one type, on the CPU, not empty, and nobody differentiates or watches?"""
    dtype = tensors[0].dtype
    return (
        dtype in TYPES
        and tensors[0].numel() > 0
        and all(t.dtype is dtype for t in tensors)
        and is_plain_inference(*tensors)
    )


#: Elements below which two operators of PyTorch take less time than one call of ours.
_FEW = 8192
#: Rows shorter than this are not whole vectors for the most part.
_NARROW = 64


def row_stride(x: Tensor) -> int | None:
    """Elements from one row of the last dimension to the next, where that is one number and rows are dense."""
    if x.dim() == 0:
        return None
    if x.is_contiguous():
        return x.shape[-1]
    if x.dim() == 2 and x.stride(1) == 1:
        return x.stride(0)
    return None


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, plus_one: bool = False) -> Tensor:
    """Division by the root mean square of the last dimension (Zhang and Sennrich, 2019), times a gain.

    Args:
        x: (..., d), any floating type.
        weight: (d,); the gain, or the gain less one with ``plus_one`` (Gemma).
        eps: added to the mean square.

    Returns:
        (..., d), of x's type.
    """
    stride = row_stride(x)
    if stride is None or not (is_native(x, weight) and weight.is_contiguous() and weight.shape == x.shape[-1:]):
        return F.rms_norm(x, weight.shape, weight + 1 if plus_one else weight, eps)
    return cpu_pointwise.rms_norm(x, stride, weight, eps, float(plus_one))


def gelu_tanh(x: Tensor) -> Tensor:
    """The tanh form of GELU, which GPT calls "gelu" and others "gelu_new"; of any shape, in training too."""
    if x.numel() < _FEW or x.shape[-1] < _NARROW or not x.is_contiguous():
        return F.gelu(x, approximate="tanh")
    if is_native(x):
        return cpu_pointwise.gelu_tanh(x)
    if torch.is_grad_enabled() and x.requires_grad and not is_watched() and _is_native_data(x):
        out: Tensor = _GeluTanh.apply(x)
        return out
    return F.gelu(x, approximate="tanh")


@torch.no_grad()
def _is_native_data(*tensors: Tensor) -> bool:
    """``is_native``, if it were not for gradients."""
    return is_native(*tensors)


class _GeluTanh(torch.autograd.Function):
    """By kernels, both ways; where the gradient is differentiated too, PyTorch's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return cpu_pointwise.gelu_tanh(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        # Saved-tensor hooks may have made x another one.
        if x.is_contiguous() and x.shape == dy.shape and x.dtype is dy.dtype and is_native(x, dy):
            return cpu_pointwise.gelu_tanh_gradient(x, dy.contiguous())
        gradient: Tensor = torch.ops.aten.gelu_backward(dy, x, approximate="tanh")
        return gradient


def gated_relu(gate: Tensor, value: Tensor) -> Tensor:
    """``relu(gate) * value``, of equal shapes."""
    return F.relu(gate) * value


def gated_gelu(gate: Tensor, value: Tensor) -> Tensor:
    """``gelu(gate) * value``, of equal shapes."""
    return F.gelu(gate) * value


def gated_silu(gate: Tensor, value: Tensor) -> Tensor:
    """``silu(gate) * value``, of equal shapes (SwiGLU: Shazeer, 2020)."""
    return _gate(True, gate, value)


def gated_gelu_tanh(gate: Tensor, value: Tensor) -> Tensor:
    """``gelu_tanh(gate) * value``, of equal shapes (GEGLU: Shazeer, 2020)."""
    return _gate(False, gate, value)


def _gate(is_silu: bool, gate: Tensor, value: Tensor) -> Tensor:
    gate_stride, value_stride = row_stride(gate), row_stride(value)
    takes = gate.shape == value.shape and gate.numel() >= _FEW and is_native(gate, value)
    if gate_stride is None or value_stride is None or not takes:
        return (F.silu(gate) if is_silu else gelu_tanh(gate)) * value
    return cpu_pointwise.gate(is_silu, gate, gate_stride, value, value_stride)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions (Su et al., 2021); the pairs are dimension ``i`` and ``i + head_dim / 2``.

    Args:
        x: (tokens, heads, head_dim), with an even head_dim.
        cos, sin: (tokens, 1, head_dim / 2), of the same type and strides.

    Returns:
        (tokens, heads, head_dim), contiguous.
    """
    dense = x.stride(-1) == cos.stride(-1) == 1 and x.shape[-1] % 2 == 0 and cos.stride() == sin.stride()
    if not (dense and cos.shape == sin.shape == (len(x), 1, x.shape[-1] // 2) and is_native(x, cos, sin)):
        first, second = x.chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return cpu_pointwise.rotate(x, cos, sin)
