"""The reference back end: eager PyTorch, does everything, differentiates to any order."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..spec import AttentionSpec, Operands, check_values
from .base import Backend, Gradients, Info, Results, Runner

DIFFERENTIABLE = ("query", "key", "value", "bias", "sinks")


def _autograd_keys() -> Any:
    """Inside an op PyTorch has switched recording for autograd off at the dispatcher; this switches it on again."""
    exclude = torch._C._dispatch_tls_local_exclude_set()
    for key in ("AutogradCPU", "AutogradCUDA", "AutogradOther", "ADInplaceOrView"):
        exclude = exclude.remove(getattr(torch._C.DispatchKey, key))
    return torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), exclude)


class ReferenceRunner(Runner):
    """Runs ``transformer_fast.reference``."""

    is_differentiable = True

    def forward(self, operands: Operands, *, need_lse: bool, need_stats: bool) -> Results:
        check_values(operands, self.spec)
        out, lse = reference.attention(operands, self.spec)
        if not self.spec.is_packed and operands.query.stride(1) < operands.query.stride(2):  # as layout.new_output
            out = out.transpose(1, 2).contiguous().transpose(1, 2)
        return Results(out, lse, lse.new_zeros((2, *lse.shape), dtype=torch.float32) if need_stats else None)

    def backward(
        self, operands: Operands, results: Results, dout: Tensor, dlse: Tensor | None, *, dbias: bool, dsinks: bool
    ) -> Gradients:
        """Gradients by autograd through the definition, computed again from the operands."""
        leaves = {
            name: tensor.detach().requires_grad_()
            for name in DIFFERENTIABLE
            if (tensor := getattr(operands, name)) is not None and tensor.is_floating_point()
        }
        with torch.enable_grad(), _autograd_keys():
            out, lse = reference.attention(operands._replace(**leaves), self.spec)
            pairs = [(out, dout)] if dlse is None else [(out, dout), (lse, dlse)]
            pairs = [(output, grad) for output, grad in pairs if output.requires_grad]
            grads: dict[str, Tensor | None] = dict.fromkeys(DIFFERENTIABLE)
            if pairs:
                outputs, output_grads = zip(*pairs, strict=True)
                values = torch.autograd.grad(outputs, list(leaves.values()), output_grads, allow_unused=True)
                grads.update(zip(leaves, values, strict=True))
        for name, leaf in leaves.items():
            if grads[name] is None:
                grads[name] = torch.zeros_like(leaf)
        return Gradients(**grads)


class ReferenceBackend(Backend):
    """``transformer_fast.reference`` as a back end."""

    name = "reference"

    def info(self) -> Info:
        return Info(self.name, True, None, torch.__version__, {"computes in": "float32, or float64 for float64 inputs"})

    def supports(self, spec: AttentionSpec) -> str | None:
        return None

    def path(self, spec: AttentionSpec) -> str:
        return "eager PyTorch, the whole score matrix in memory"

    def prepare(self, spec: AttentionSpec) -> Runner:
        return ReferenceRunner(spec)
