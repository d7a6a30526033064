"""The native linear layers: tensors into pointers, strides and sizes.

Arguments are checked by ``dropin/linears.py``: tensors of one type of ``cpu.TYPES``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .cpu import _C_cpu
from .fields import DTYPES

#: The numbers of tf::Linear::Activation, and whether it is gated.
ACTIVATIONS: dict[str | None, tuple[int, bool]] = {
    None: (0, False),
    "relu": (1, False),
    "gelu": (2, False),
    "gelu_tanh": (3, False),
    "silu": (4, False),
    "reglu": (1, True),
    "geglu": (2, True),
    "geglu_tanh": (3, True),
    "swiglu": (4, True),
}


def instruction_set() -> str:
    """Which one is in use: a weight is laid out for one."""
    name: str = _C_cpu.current_isa()
    return name


def lay_out(weight: Tensor, value_weight: Tensor | None) -> Tensor:
    """Weights (out_features, in_features) as ``multiply`` reads them: one, or two of the same strides for a gate."""
    (out_features, in_features), dtype = weight.shape, DTYPES[weight.dtype]
    size = _C_cpu.linear_bytes(dtype, in_features, out_features, value_weight is not None)
    laid_out = torch.empty(size, dtype=torch.uint8, device="cpu")
    _C_cpu.lay_out_linear(
        dtype, in_features, out_features, weight.data_ptr(), 0 if value_weight is None else value_weight.data_ptr(),
        weight.stride(0), weight.stride(1), laid_out.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return laid_out


class Rows(NamedTuple):
    """A tensor (..., columns) as ``rows`` rows of dense columns, ``stride`` elements apart."""

    tensor: Tensor
    rows: int
    stride: int


class Layer(NamedTuple):
    """A weight that is laid out, and what follows the product."""

    laid_out: Tensor
    out_features: int
    bias: Tensor | None
    value_bias: Tensor | None
    activation: str | None


def _linear(x: Rows, in_features: int, layer: Layer, residual: Rows | None, out: int) -> Any:
    number, gated = ACTIVATIONS[layer.activation]
    return _C_cpu.Linear(
        number, gated, DTYPES[x.tensor.dtype], x.rows, in_features, layer.out_features, x.tensor.data_ptr(), x.stride,
        layer.laid_out.data_ptr(), 0 if layer.bias is None else layer.bias.data_ptr(),
        0 if layer.value_bias is None else layer.value_bias.data_ptr(),
        0 if residual is None else residual.tensor.data_ptr(), 0 if residual is None else residual.stride, out,
    )  # fmt: skip


def _out(x: Rows, out_features: int) -> Tensor:
    return x.tensor.new_empty((*x.tensor.shape[:-1], out_features))  # in half the time of torch.empty


def multiply(x: Rows, layer: Layer, residual: Rows | None) -> Tensor:
    """``activation(x W^T + bias) + residual``."""
    out = _out(x, layer.out_features)
    _linear(x, x.tensor.shape[-1], layer, residual, out.data_ptr()).run(torch.get_num_threads())
    return out


def matrix_product(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    """``a @ b + bias`` of float32 matrices as they lie, (rows, depth) and (depth, columns), one of a's strides being 1.

    Nothing of their sizes is allocated but the result.
    """
    (rows, depth), columns = a.shape, b.shape[1]
    out = torch.empty(rows, columns, dtype=a.dtype, device="cpu")
    _C_cpu.matrix_product(
        rows, depth, columns, a.data_ptr(), *a.stride(), b.data_ptr(), *b.stride(),
        0 if bias is None else bias.data_ptr(), out.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return out


def multiply_twice(x: Rows, first: Layer, second: Layer, residual: Rows | None) -> Tensor:
    """``multiply`` by one layer and what it gives by another; for many rows, of which a thread has a part."""
    out = _out(x, second.out_features)
    _C_cpu.linear_pair(
        _linear(x, x.tensor.shape[-1], first, None, 0),
        _linear(x, first.out_features, second, residual, out.data_ptr()),
        torch.get_num_threads(),
    )
    return out
