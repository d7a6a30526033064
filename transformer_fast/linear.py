"""Linear layers, and what follows their product: an activation or a gate, and the residual stream."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as _modules

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
    return followed(F.linear(x, weight, bias), activation, residual)


def followed(y: Tensor, activation: str | None, residual: Tensor | None) -> Tensor:
    """What follows a product ``y``; see :func:`linear`."""
    if activation in GATES:
        y = GATES[activation](*y.chunk(2, dim=-1))
    elif activation is not None:
        y = ACTIVATIONS[activation](y)
    return y if residual is None else residual + y


def is_heard(module: nn.Module) -> bool:
    """Does anybody listen to this module's calls, or has taken its place?"""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or "forward" in vars(module)
        or _modules._global_forward_hooks
        or _modules._global_forward_pre_hooks
    )


def packed_product(layer: nn.Module) -> Any:
    """What ``dropin.pack_linears`` gave a layer to multiply by, if nobody listens to the layer; else None."""
    product = vars(layer).get("product")
    return product if getattr(product, "takes_what_follows", False) and not is_heard(layer) else None


def layer_followed(layer: Any, x: Tensor, activation: str | None = None, residual: Tensor | None = None) -> Tensor:
    """A linear layer and what follows it; in one call where the layer is packed. See :func:`linear`."""
    product = packed_product(layer)
    if product is None:
        return followed(layer(x), activation, residual)
    out: Tensor = product(x, layer.weight, _bias(layer, x), activation, residual)
    return out


def _bias(layer: Any, x: Tensor) -> Tensor | None:
    bias: Tensor | None = layer.full_bias(x) if hasattr(layer, "full_bias") else layer.bias
    return bias


def layers_followed(
    first: Any, activation: str | None, second: Any, x: Tensor, residual: Tensor | None = None
) -> Tensor:
    """A linear layer, its activation and another layer, added to ``residual``; packed ones in one call."""
    product, other = packed_product(first), packed_product(second)
    if product is None or other is None:
        return layer_followed(second, layer_followed(first, x, activation), residual=residual)
    up = product.of(first.weight, _bias(first, x), activation)
    down = other.of(second.weight, _bias(second, x), None, residual)
    out: Tensor = product.then(x, up, other, down)
    return out
