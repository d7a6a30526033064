"""Cross entropy of an output projection without its logits, which in training are often the largest tensor of all."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

#: What the logits of one chunk take. Larger chunks hardly save time: the matrix products are long enough already.
CHUNK_BYTES = 64 * 2**20


def linear_cross_entropy(
    rows: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    chunk_size: int | None = None,
) -> Tensor:
    """Cross entropy of the logits ``scale * rows @ weight.T + bias``, of which one chunk of rows exists at a time.

    The matrix products are done in the dtype of the rows (under autocast, in autocast's), all else in float32.

    Args:
        rows: (tokens, d), any float dtype.
        weight: (vocab_size, d), of the same dtype; it may be the token embedding's (tied weights).
        labels: int64 (tokens,), from 0 to vocab_size - 1, or ``ignore_index``: such rows are not computed at all.
        bias: (vocab_size,).
        scale: multiplies the products, before the bias.
        softcap: logits become ``softcap * tanh(logits / softcap)`` (Gemma 2).
        reduction: "mean" over the labels that count, or "sum". Without any such label both are 0 with zero gradients,
            where PyTorch's mean is NaN: one batch of padding should not end a training run.
        chunk_size: rows in a chunk; by default as many as give 64 MiB of logits.

    Returns:
        a scalar, float32 (float64 for float64 rows), which can be differentiated once.
    """
    autocast = torch.is_autocast_enabled(rows.device.type) and rows.dtype != torch.float64
    dtype = torch.get_autocast_dtype(rows.device.type) if autocast else rows.dtype
    sum_dtype = torch.promote_types(dtype, torch.float32)
    _require(rows.dim() == 2 and rows.is_floating_point(), "rows", rows, "float (tokens, d)")
    right = weight.shape[1:] == rows.shape[1:] and (autocast or weight.dtype == rows.dtype)
    _require(right, "weight", weight, f"{rows.dtype} (vocab_size, {rows.shape[1]})")
    right = labels.dtype == torch.int64 and labels.shape == rows.shape[:1]
    _require(right, "labels", labels, f"torch.int64 ({len(rows)},)")
    _require(bias is None or bias.shape == weight.shape[:1], "bias", bias, f"None or ({len(weight)},)")
    _require(softcap is None or softcap > 0, "softcap", softcap, "None or above 0")
    _require(reduction in ("mean", "sum"), "reduction", reduction, "mean or sum")
    _require(chunk_size is None or chunk_size > 0, "chunk_size", chunk_size, "None or at least 1")
    kept = (labels != ignore_index).nonzero().squeeze(1)
    for i in kept[(labels[kept] < 0) | (labels[kept] >= len(weight))][:1].tolist():
        _require(False, f"labels[{i}]", int(labels[i]), f"0 to {len(weight) - 1}, or ignore_index={ignore_index}")

    if chunk_size is None:
        bytes_of_logit = sum_dtype.itemsize + (0 if dtype == sum_dtype else dtype.itemsize)
        chunk_size = max(1, CHUNK_BYTES // (len(weight) * bytes_of_logit))
    # Asked here, as inside of the function gradients are always off.
    wanted = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in (rows, weight, bias)]
    chunks = kept.split(chunk_size)
    total: Tensor = _SumOfLosses.apply(rows, weight, bias, labels, chunks, scale, softcap, dtype, sum_dtype, wanted)
    return total / max(1, len(kept)) if reduction == "mean" else total


class _SumOfLosses(torch.autograd.Function):
    """The losses of all rows in the chunks, and their gradients.

    The gradients are made in forward, as Liger-Kernel does (Hsu et al., 2024), while a chunk's logits are there.
    Recomputing these in backward takes four large matrix products instead of three: measured on a CPU, for 2048
    tokens, d 576 and a vocabulary of 49152, 1.4 times as long. The gradient of the weight is held either way.
    """

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        chunks: tuple[Tensor, ...],
        scale: float,
        softcap: float | None,
        dtype: torch.dtype,
        sum_dtype: torch.dtype,
        wanted: list[bool],
    ) -> Tensor:
        # Of the sum, before any scaling: those of a mean over many tokens may be too small for float16.
        drows, dweight, dbias = gradients = [
            torch.zeros_like(t, dtype=sum_dtype) if t is not None and needed else None
            for t, needed in zip((rows, weight, bias), wanted, strict=True)
        ]
        matrix = weight.to(dtype)

        def chunk_loss(index: Tensor) -> Tensor:  # a function: its logits are gone before the next are made
            chunk, label = rows[index].to(dtype), labels[index, None]
            logits = (chunk @ matrix.t()).to(sum_dtype)
            if scale != 1.0:
                logits *= scale
            if bias is not None:
                logits += bias
            if softcap is not None:
                logits.div_(softcap).tanh_()
                slope = logits.square().neg_().add_(1)
                logits.mul_(softcap)
            right = logits.sub_(logits.amax(1, keepdim=True)).gather(1, label)
            total = logits.exp_().sum(1, keepdim=True)
            if any(wanted):
                dlogits = logits.div_(total).scatter_add_(1, label, -torch.ones_like(right))
                dlogits = dlogits if softcap is None else dlogits.mul_(slope)
                if dbias is not None:
                    dbias.add_(dlogits.sum(0))
                dlogits = dlogits.to(dtype)
                if drows is not None:
                    drows[index] = (dlogits @ matrix).to(sum_dtype)
                if dweight is not None:
                    same = dtype == sum_dtype
                    dweight.addmm_(dlogits.t(), chunk) if same else dweight.add_(dlogits.t() @ chunk)
            return (total.log() - right).sum()

        loss = torch.stack([chunk_loss(index) for index in chunks]).sum()
        ctx.save_for_backward(*gradients)
        ctx.dtypes_and_factors = [
            (t.dtype, f) for t, f in ((rows, scale), (weight, scale), (bias, 1.0)) if t is not None
        ]
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        scaled = [
            # Not in place: the graph may be retained.
            None if t is None else torch.mul(t, dloss * factor, out=torch.empty_like(t, dtype=dtype))
            for t, (dtype, factor) in zip(ctx.saved_tensors, ctx.dtypes_and_factors, strict=False)
        ]
        return (*scaled, *[None] * (10 - len(scaled)))


def _require(right: bool, name: str, value: object, allowed: str) -> None:
    if not right:
        value = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else value
        raise ValueError(f"{name}={value}; allowed: {allowed}")
