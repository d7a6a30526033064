"""The loss of transformers' causal language models, in one pass over the logits each way."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..backends import cpu_pointwise
from ..ops import is_plain_inference
from ..pointwise import is_native


class _CrossEntropy(torch.autograd.Function):
    """The sum of the losses. Nothing of the logits' size is kept but the logits; their gradient is made in backward."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
        found = cpu_pointwise.cross_entropy(logits, logits.stride(0), labels, ignore_index)
        ctx.save_for_backward(logits, labels, found)
        ctx.ignore_index = ignore_index
        return found[0].sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor, None, None]:
        logits, labels, found = ctx.saved_tensors
        if not is_plain_inference(dloss):  # many gradients that pass for one
            return _gradient(logits, labels, ctx.ignore_index, found, 1.0) * dloss, None, None
        return _gradient(logits, labels, ctx.ignore_index, found, float(dloss)), None, None


def _gradient(logits: Tensor, labels: Tensor, ignore_index: int, found: Tensor, scale: float) -> Tensor:
    """``scale`` times that of the sum. Saved-tensor hooks may have made anything of what forward saw."""
    is_ours = found.dtype is torch.float32 and found.shape == (3, len(logits)) and found.is_contiguous()
    if is_ours and found.is_cpu and _has_kernel(logits, labels, ignore_index):
        return cpu_pointwise.cross_entropy_gradient(logits, logits.stride(0), labels, ignore_index, found, scale)
    with torch.enable_grad():
        leaf = logits.detach().requires_grad_()
        total = F.cross_entropy(leaf.float(), labels, ignore_index=ignore_index, reduction="sum")
        return torch.autograd.grad(total * scale, leaf)[0]


@torch.no_grad()
def _has_kernel(logits: Tensor, labels: Tensor, ignore_index: int) -> bool:
    """Are these rows of logits, and labels that are columns of them, that nobody watches?"""
    if not (is_native(logits) and is_plain_inference(labels) and labels.dtype is torch.int64):
        return False
    if labels.shape != logits.shape[:1] or logits.stride(1) != 1 or not labels.is_contiguous():
        return False
    is_column = (labels >= 0) & (labels < logits.shape[1])
    return bool((is_column | (labels == ignore_index)).all())


def causal_lm_loss(
    logits: Tensor,
    labels: Tensor,
    vocab_size: int,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """transformers' ``ForCausalLMLoss``: the same arguments and result, without the log-probabilities of every token.

    Args:
        logits: (batch, seqlen, vocab_size).
        labels: int64 (batch, seqlen); token ``n`` predicts label ``n + 1``.
        vocab_size: as in the logits.
        num_items_in_batch: what the sum is divided by; None for the labels that count.
        ignore_index: the label that does not count.
        shift_labels: labels that are moved already.
        kwargs: are ignored, as there.

    Returns:
        a float32 scalar, which can be differentiated once; the logits must not change before that.
    """
    if shift_labels is None:
        shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    label = shift_labels.reshape(-1).to(logits.device)
    rows = logits.reshape(-1, vocab_size)
    count = (label != ignore_index).sum() if num_items_in_batch is None else num_items_in_batch
    if isinstance(count, Tensor):
        count = count.to(logits.device)
    if _has_kernel(rows, label, ignore_index):
        total = _CrossEntropy.apply(rows, label, ignore_index)
    else:
        total = F.cross_entropy(rows.float(), label, ignore_index=ignore_index, reduction="sum")
    loss: Tensor = total / count
    return loss
