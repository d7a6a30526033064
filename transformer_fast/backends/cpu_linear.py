"""The native linear layers: tensors into pointers, strides and sizes.

Arguments are checked by ``dropin/linears.py``: tensors of one type of ``TYPES`` on the CPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .cpu import _C_cpu
from .fields import DTYPES

TYPES = frozenset(() if _C_cpu is None else (torch.float32, torch.bfloat16, torch.float16))
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


def multiply(
    x: Tensor, rows: int, stride: int, laid_out: Tensor, out_features: int, bias: Tensor | None,
    value_bias: Tensor | None, activation: str | None, residual: Tensor | None, residual_stride: int,
) -> Tensor:  # fmt: skip
    """``activation(x W^T + bias) + residual``; of x and the residual, rows are dense and a stride apart."""
    out = torch.empty((*x.shape[:-1], out_features), dtype=x.dtype, device="cpu")
    number, gated = ACTIVATIONS[activation]
    _C_cpu.linear(
        number, gated, DTYPES[x.dtype], rows, x.shape[-1], out_features, x.data_ptr(), stride, laid_out.data_ptr(),
        0 if bias is None else bias.data_ptr(), 0 if value_bias is None else value_bias.data_ptr(),
        0 if residual is None else residual.data_ptr(), residual_stride, out.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return out
