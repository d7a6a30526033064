"""Linear layers in training by kernels of ours: the product of forward, and both of backward.

Weights change with every step, so they are laid out in passing, a part that stays in a cache at a time. Whether that
is quicker than PyTorch's products depends on the processor and the sizes (on Zen 4, of a GPT-2's in float32, by up to a
third), so each kind of product is timed both ways when it is first met.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backends import cpu_linear
from ..backends.cpu import TYPES
from ..ops import is_plain_inference, is_watched
from .trial import is_quicker

#: Fewer multiplications than these have little to gain.
_LEAST = 2**22
#: Our product is used where it takes less than so much of PyTorch's time.
_WORTH_IT = 0.97
#: What was found so far, by the sizes to a power of two, the order of the operands, and what multiplies.
_quicker: dict[Any, bool] = {}


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``torch.nn.functional.linear``; in float32 with gradients on a CPU, by whichever product is quicker."""
    if not torch.is_grad_enabled() or is_watched() or not _is_ours(x, weight, bias):
        return F.linear(x, weight, bias)
    if x.dim() == 2:
        return cast(Tensor, _Linear.apply(x, weight, bias))
    out = _Linear.apply(x.reshape(-1, x.shape[-1]), weight, bias)
    # No view, as PyTorch's result is none.
    return cast(Tensor, torch.ops.aten._unsafe_view(out, (*x.shape[:-1], len(weight))))


def _is_ours(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Is this a product that the kernel takes, if it were not for gradients?"""
    with torch.no_grad():
        return (
            is_plain_inference(x, weight, bias)
            and torch.float32 in TYPES
            and all(t is None or t.dtype is torch.float32 for t in (x, weight, bias))
            and x.dim() >= 2
            and weight.dim() == 2
            and x.shape[-1] == weight.shape[1]
            and (bias is None or (bias.shape == weight.shape[:1] and bias.is_contiguous()))
            and x.numel() * len(weight) >= _LEAST
        )


class _Linear(torch.autograd.Function):
    """A linear layer of (rows, in_features). Its backward is PyTorch's operators where that is differentiated too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        needs_x, needs_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if needs_weight else None, weight if needs_x else None)
        ctx.by_columns = weight.stride(0) == 1 != weight.stride(1)
        return _product(x, weight.t(), bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        dx = dweight = None
        if needs_x:
            dx = _product(dy, weight)
        if needs_weight:  # in the weight's own order, which is by columns in GPT-2
            dweight = _product(x.t(), dy).t() if ctx.by_columns else _product(dy.t(), x)
        return dx, dweight, dy.sum(0) if needs_bias else None


def _product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """``a @ b + bias`` of matrices, by whichever is quicker. Saved-tensor hooks may have made them anything."""
    is_ours = (
        is_plain_inference(a, b, bias)
        and a.dtype is b.dtype is torch.float32
        and a.dim() == b.dim() == 2
        and a.shape[1] == b.shape[0]
        and a.numel() * b.shape[1] > 0
        and not torch.are_deterministic_algorithms_enabled()  # what is quicker may be another one tomorrow
    )
    return _by_us(a, b, bias) if is_ours and _quickly(a, b, bias) else _by_torch(a, b, bias)


def _by_torch(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    return torch.mm(a, b) if bias is None else torch.addmm(bias, a, b)


def _by_us(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    return cpu_linear.matrix_product(a if 1 in a.stride() else a.contiguous(), b, bias)


def _quickly(a: Tensor, b: Tensor, bias: Tensor | None) -> bool:
    """Is this kind of product quicker by us? Tried once a process."""
    sizes = (*a.shape, b.shape[1])
    kind = (
        *(size.bit_length() for size in sizes), a.stride(1) == 1, b.stride(1) == 1, bias is None,
        torch.get_num_threads(), cpu_linear.instruction_set(),
    )  # fmt: skip
    quicker = _quicker.get(kind)
    if quicker is None:
        quicker = is_quicker(lambda: _by_torch(a, b, bias), lambda: _by_us(a, b, bias), sizes[0], _WORTH_IT)
        _quicker[kind] = quicker
    return quicker
