"""PyTorch's own flash attention operators, answered by :func:`attention`: what lies below SDPA.

A graph that was compiled before, and code that calls these operators by name, comes here; so does on CUDA all that
PyTorch itself would give to flash attention. Each function here has an operator's signature and gives results of the
shapes, dtypes and strides that PyTorch's compiler has been promised for it. What they cannot do they give to the
kernel that was there before.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..ops import runner_for
from ..spec import Operands, Options, UnsupportedError, options_of
from .sdpa import arguments_of

REFUSALS = (UnsupportedError, ValueError, TypeError)
#: (keyset, operator's arguments) -> its results: PyTorch's own kernel.
Original = Callable[..., Any]


def _problem(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None, causal: str, backend: str
) -> tuple[Operands, Options]:
    """What the operators have in common. ``causal``: "no", "top left" or "bottom right"."""
    is_gqa = query.shape[1] != key.shape[1]
    query, key, value, is_causal, window_size, padding, bias, _ = arguments_of(
        query, key, value, mask, causal == "top left", is_gqa
    )
    operands = Operands(query, key, value, key_padding_mask=padding, bias=bias)
    options = options_of(
        is_causal or causal == "bottom right",
        window_size,
        scale,
        None,
        0.0,
        torch.are_deterministic_algorithms_enabled(),
        backend,
    )
    return operands, options


def _in_rows_first(tensor: Tensor) -> Tensor:
    """The same numbers, in memory as (batch, seqlen, num_heads, ...)."""
    return tensor.transpose(1, 2).contiguous().transpose(1, 2)


def _like(promise: Tensor, tensor: Tensor) -> Tensor:
    return tensor if tensor.stride() == promise.stride() else torch.empty_like(promise).copy_(tensor)


def _with_unseen_keys(grad: Tensor, tensor: Tensor) -> Tensor:
    """Keys that no row sees were left out; their gradient is zero."""
    missing = tensor.shape[2] - grad.shape[2]
    return torch.nn.functional.pad(grad, (0, 0, 0, missing)) if missing else grad


class _Flash:
    """An operator and its backward.

    Args:
        originals: PyTorch's kernels of both.
        backend: gives that of :func:`attention`.
        refuses: (query, dropout_p) -> why a call is PyTorch's, or None.
        record: is told of each forward call (query, key, value, mask) and of the reason.
    """

    def __init__(
        self,
        originals: tuple[Original, Original],
        backend: Callable[[], str],
        refuses: Callable[[Tensor, float], str | None],
        record: Callable[..., None],
    ) -> None:
        self.original, self.original_backward = originals
        self.backend, self.refuses, self.record = backend, refuses, record

    def _forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        dropout_p: float,
        scale: float | None,
        causal: str,
    ) -> tuple[Tensor, Tensor] | None:
        """Output in the memory order of the query, and lse; None where it is for PyTorch."""
        reason = self.refuses(query, dropout_p)
        results = None
        if reason is None:
            try:
                operands, options = _problem(query, key, value, mask, scale, causal, self.backend())
                results = runner_for(operands, options).forward(operands, need_lse=True, need_stats=False)
            except REFUSALS as error:
                reason = str(error)
        self.record(query, key, value, mask, reason)
        if results is None:
            return None
        assert results.lse is not None
        return _like(torch.empty_like(query), results.out), results.lse

    def _backward(
        self,
        dout: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        dropout_p: float,
        scale: float | None,
        causal: str,
    ) -> list[Tensor] | None:
        """Gradients of query, key and value; None where it is for PyTorch.

        Forward runs again: these operators keep no more than lse, from which kernels cannot go back without loss.
        """
        if self.refuses(query, dropout_p) is not None:
            return None
        try:
            operands, options = _problem(query, key, value, mask, scale, causal, self.backend())
            runner = runner_for(operands, options)
        except REFUSALS:
            return None
        results = runner.forward(operands, need_lse=True, need_stats=True)
        grads = runner.backward(operands, results, dout, None, dbias=False, dsinks=False)
        assert grads.query is not None and grads.key is not None and grads.value is not None
        return [grads.query, _with_unseen_keys(grads.key, key), _with_unseen_keys(grads.value, value)]


class FlashForCpu(_Flash):
    """``aten::_scaled_dot_product_flash_attention_for_cpu`` and its backward, whose ``is_causal`` is top-left."""

    NAMES = (
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_flash_attention_for_cpu_backward",
    )

    def forward(
        self,
        keyset: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        *,
        attn_mask: Tensor | None = None,
        scale: float | None = None,
    ) -> tuple[Tensor, ...]:
        """``logsumexp`` lies in memory as (batch, seqlen_q, num_heads)."""
        causal = "top left" if is_causal else "no"
        found = self._forward(query, key, value, attn_mask, dropout_p, scale, causal)
        if found is None:
            options = {"attn_mask": attn_mask, "scale": scale}
            return tuple(self.original(keyset, query, key, value, dropout_p, is_causal, **options))
        out, lse = found
        return out, _in_rows_first(lse)

    def backward(
        self,
        keyset: Any,
        grad_out: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        logsumexp: Tensor,
        dropout_p: float,
        is_causal: bool,
        *,
        attn_mask: Tensor | None = None,
        scale: float | None = None,
    ) -> tuple[Tensor, ...]:
        """Gradients lie in memory as (batch, seqlen, num_heads, head_dim)."""
        causal = "top left" if is_causal else "no"
        grads = self._backward(grad_out, query, key, value, attn_mask, dropout_p, scale, causal)
        if grads is None:
            given = (grad_out, query, key, value, out, logsumexp, dropout_p, is_causal)
            return tuple(self.original_backward(keyset, *given, attn_mask=attn_mask, scale=scale))
        return tuple(_in_rows_first(grad) for grad in grads)


class FlashForCuda(_Flash):
    """``aten::_scaled_dot_product_flash_attention`` and its backward, whose ``is_causal`` is bottom-right.

    Written from the operators' schemas and fake rules, and tested with CPU tensors; it has run on no GPU yet.
    """

    NAMES = ("_scaled_dot_product_flash_attention", "_scaled_dot_product_flash_attention_backward")

    def forward(
        self,
        keyset: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        return_debug_mask: bool = False,
        *,
        scale: float | None = None,
    ) -> tuple[Any, ...]:
        """(out, logsumexp, cum_seq_q, cum_seq_k, max_q, max_k, seed, offset, debug_mask), as the operator has them."""
        causal = "bottom right" if is_causal else "no"
        found = None
        if not return_debug_mask:
            found = self._forward(query, key, value, None, dropout_p, scale, causal)
        if found is None:
            given = (query, key, value, dropout_p, is_causal, return_debug_mask)
            return tuple(self.original(keyset, *given, scale=scale))
        out, lse = found
        seed = torch.zeros(2, dtype=torch.uint64, device=query.device)  # of a dropout that there is not
        offset = torch.zeros((), dtype=torch.uint64, device=query.device)
        return out, lse, None, None, query.shape[2], key.shape[2], seed, offset, query.new_empty(0)

    def backward(
        self,
        keyset: Any,
        grad_out: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        logsumexp: Tensor,
        cum_seq_q: Tensor | None,
        cum_seq_k: Tensor | None,
        max_q: int,
        max_k: int,
        dropout_p: float,
        is_causal: bool,
        philox_seed: Tensor,
        philox_offset: Tensor,
        *,
        scale: float | None = None,
    ) -> tuple[Tensor, ...]:
        """Gradients in the memory order of query, key and value."""
        causal = "bottom right" if is_causal else "no"
        grads = None
        if cum_seq_q is None:
            grads = self._backward(grad_out, query, key, value, None, dropout_p, scale, causal)
        if grads is None:
            lengths = (cum_seq_q, cum_seq_k, max_q, max_k)
            given = (grad_out, query, key, value, out, logsumexp, *lengths, dropout_p, is_causal)
            return tuple(self.original_backward(keyset, *given, philox_seed, philox_offset, scale=scale))
        return tuple(_like(torch.empty_like(t), g) for g, t in zip(grads, (query, key, value), strict=True))
