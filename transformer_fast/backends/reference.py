"""The reference back end: eager PyTorch, does everything, differentiates to any order."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from ..spec import AttentionSpec, Operands, check_values
from .base import Backend, Gradients, Info

DIFFERENTIABLE = ("query", "key", "value", "bias", "sinks")


class ReferenceBackend(Backend):
    """``transformer_fast.reference`` as a back end."""

    name = "reference"

    def info(self) -> Info:
        return Info(self.name, True, None, torch.__version__, {"computes in": "float32, or float64 for float64 inputs"})

    def supports(self, spec: AttentionSpec) -> str | None:
        return None

    def path(self, spec: AttentionSpec) -> str:
        return "eager PyTorch, the whole score matrix in memory"

    def forward(self, operands: Operands, spec: AttentionSpec, *, need_lse: bool) -> tuple[Tensor, Tensor]:
        check_values(operands, spec)
        return reference.attention(operands, spec)

    def backward(
        self, operands: Operands, spec: AttentionSpec, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None,
        needs: tuple[bool, bool],
    ) -> Gradients:
        """Gradients by autograd through the definition, computed again from the operands."""
        leaves = {
            name: tensor.detach().requires_grad_()
            for name in DIFFERENTIABLE
            if (tensor := getattr(operands, name)) is not None and tensor.is_floating_point()
        }
        with torch.enable_grad():
            again, lse_again = reference.attention(operands._replace(**leaves), spec)
        outputs, grads = [again], [dout]
        if dlse is not None:
            outputs, grads = [again, lse_again], [dout, dlse]
        results: dict[str, Tensor | None] = dict.fromkeys(DIFFERENTIABLE)
        if any(o.requires_grad for o in outputs):
            keep = [(o, g) for o, g in zip(outputs, grads, strict=True) if o.requires_grad]
            values = torch.autograd.grad(
                [o for o, _ in keep], list(leaves.values()), [g for _, g in keep], allow_unused=True
            )
            results.update(zip(leaves, values, strict=True))
        for name, leaf in leaves.items():
            if results[name] is None:
                results[name] = torch.zeros_like(leaf)
        return Gradients(*(results[name] for name in DIFFERENTIABLE))
