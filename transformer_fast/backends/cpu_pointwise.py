"""The native kernels of what stands around a model's products: tensors into pointers, strides and sizes.

Arguments are checked by ``transformer_fast/pointwise.py``: tensors of one type of ``cpu.TYPES``, whose rows are
dense and ``stride`` elements apart.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .cpu import _C_cpu
from .fields import DTYPES


def rms_norm(x: Tensor, stride: int, weight: Tensor, eps: float, gain_offset: float) -> Tensor:
    """``x`` over its root mean square, times ``weight + gain_offset``."""
    out = x.new_empty(x.shape)
    columns = x.shape[-1]
    _C_cpu.rms_norm(
        DTYPES[x.dtype], x.numel() // columns, columns, x.data_ptr(), stride, weight.data_ptr(), out.data_ptr(),
        eps, gain_offset, torch.get_num_threads(),
    )  # fmt: skip
    return out


def gate(is_silu: bool, gate: Tensor, gate_stride: int, value: Tensor, value_stride: int) -> Tensor:
    """``silu(gate) * value``, or with the tanh form of GELU."""
    out = gate.new_empty(gate.shape)
    columns = gate.shape[-1]
    _C_cpu.gate(
        is_silu, DTYPES[gate.dtype], gate.numel() // columns, columns, gate.data_ptr(), gate_stride,
        value.data_ptr(), value_stride, out.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return out


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """``x`` (tokens, heads, head_dim) turned by angles whose cosines and sines have the same strides."""
    out = x.new_empty(x.shape)
    tokens, heads, head_dim = x.shape
    _C_cpu.rotate(
        DTYPES[x.dtype], tokens, heads, head_dim, x.data_ptr(), x.stride(0), x.stride(1), cos.data_ptr(),
        sin.data_ptr(), cos.stride(0), out.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return out


def gelu_tanh(x: Tensor) -> Tensor:
    """The tanh form of GELU, of contiguous x."""
    out, columns = x.new_empty(x.shape), x.shape[-1]
    _C_cpu.gelu_tanh(
        DTYPES[x.dtype], x.numel() // columns, columns, x.data_ptr(), out.data_ptr(), torch.get_num_threads()
    )
    return out


def gelu_tanh_gradient(x: Tensor, dy: Tensor) -> Tensor:
    """What reaches x of the gradient ``dy``; both contiguous, of one shape and type."""
    out, columns = x.new_empty(x.shape), x.shape[-1]
    _C_cpu.gelu_tanh_gradient(
        DTYPES[x.dtype], x.numel() // columns, columns, x.data_ptr(), dy.data_ptr(), out.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return out


def cross_entropy(logits: Tensor, stride: int, labels: Tensor, ignore_index: int) -> Tensor:
    """float32 (3, rows): each row's loss, largest logit, and one over the sum of ``exp(logits - largest)``.

    ``labels`` is a contiguous int64 (rows,) of columns, or ``ignore_index``.
    """
    rows, columns = logits.shape
    found = torch.empty(3, rows, dtype=torch.float32, device=logits.device)
    _C_cpu.cross_entropy(
        DTYPES[logits.dtype], rows, columns, logits.data_ptr(), stride, labels.data_ptr(), ignore_index,
        found.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return found


def cross_entropy_gradient(
    logits: Tensor, stride: int, labels: Tensor, ignore_index: int, found: Tensor, scale: float
) -> Tensor:
    """``scale`` times the gradient of the sum of the losses, from what ``cross_entropy`` found."""
    rows, columns = logits.shape
    out = logits.new_empty(logits.shape)
    _C_cpu.cross_entropy_gradient(
        DTYPES[logits.dtype], rows, columns, logits.data_ptr(), stride, labels.data_ptr(), ignore_index,
        found.data_ptr(), scale, out.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return out
