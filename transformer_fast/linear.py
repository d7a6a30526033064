"""Linear layers, and what follows their product: an activation or a gate, and the residual stream."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .pointwise import gated_gelu, gated_gelu_tanh, gated_relu, gated_silu, gelu_tanh

#: Activations by name, and gated ones as functions of the gate and the value.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": gelu_tanh,
    "silu": F.silu,
    "tanh": torch.tanh,
}
GATES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "reglu": gated_relu,
    "geglu": gated_gelu,
    "geglu_tanh": gated_gelu_tanh,
    "swiglu": gated_silu,
}


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """``activation(x @ weight.T + bias) + residual``, of PyTorch's operators.

    Args:
        x: (..., in_features).
        weight: (out_features, in_features); under a gate its first half makes the gate, the second the value.
        bias: (out_features,).
        activation: a name of ``ACTIVATIONS`` or ``GATES``.
        residual: of the result's shape.

    Returns:
        (..., out_features), or half of them under a gate.
    """
    y = F.linear(x, weight, bias)
    if activation in GATES:
        y = GATES[activation](*y.chunk(2, dim=-1))
    elif activation is not None:
        y = ACTIVATIONS[activation](y)
    return y if residual is None else residual + y
