"""The functions of flash-attn 2.8 over :func:`~transformer_fast.attention` and its varlen and paged forms.

Each has flash-attn's signature (https://github.com/Dao-AILab/flash-attention) and meaning: tensors are (batch, seqlen,
num_heads, head_dim), or packed (total, num_heads, head_dim), ``window_size`` counts keys on each side with -1 for no
limit, ``causal`` and windows are aligned to the bottom right corner, ALiBi adds ``-slope * |i + seqlen_k - seqlen_q -
j|``. The tensors are read as they lie: nothing is copied but what has no contiguous last dimension.

Beyond flash-attn: any device with a back end, the CPU first; float32 (and float64 by the reference); any head_dim, and
another one for the values; gradients of all of it. One thing differs: a row that sees no key has a softmax_lse of -inf,
as the logarithm of an empty sum is, where flash-attn 2 writes +inf.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ..attention import attention_varlen
from ..ops import run
from ..spec import Operands, options_of
from .attn_probs import attention_varlen_with_probs, attention_with_probs, block_size
from .kvcache import flash_attn_with_kvcache
from .options import (
    OPEN,
    PACKED,
    PADDED,
    PAGES,
    arguments_of,
    integer_of,
    softcap_of,
    takes_gradient,
    window_of,
    with_contiguous_rows,
)
from .paged_varlen import attention_varlen_paged, packed_keys

__all__ = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
]

Result = Tensor | tuple[Tensor, Tensor, Tensor]


def _get_block_size_n(device: torch.device, head_dim: int, is_dropout: bool, is_causal: bool) -> int:
    """Keys in a block of ``S_dmask``: the maximum that its numbers are relative to is that of a block and the later."""
    return block_size(head_dim, is_dropout)


def _padded(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size: Any,
    softcap: float,
    alibi_slopes: Tensor | None,
    deterministic: bool,
    return_attn_probs: bool,
) -> Result:
    """Tensors of (batch, seqlen, num_heads, head_dim) with contiguous rows, and flash-attn's arguments, to its results.

    Not by way of :func:`attention`: the views that it would be given, and the one to be made of its output, take longer
    than everything else that is done here.
    """
    if return_attn_probs:
        arguments = arguments_of(dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic)
        return attention_with_probs(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), arguments)
    window = window_size if window_size is OPEN else window_of(window_size)
    cap = softcap_of(softcap, dropout_p) if softcap else None
    options = options_of(causal, window, softmax_scale, cap, dropout_p, deterministic, "auto")
    operands = Operands(q, k, v, None, None, None, None, None, alibi_slopes)
    return run(operands, options, False, "bshd")[0]


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = OPEN,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """Attention of a padded batch, with flash-attn's signature.

    Args:
        q: (batch, seqlen_q, num_heads, head_dim), float32, bfloat16, float16, or float64 (reference).
        k: (batch, seqlen_k, num_kv_heads, head_dim); num_kv_heads divides num_heads.
        v: (batch, seqlen_k, num_kv_heads, head_dim_v).
        dropout_p: probability of dropping an attention weight; not together with softcap.
        softmax_scale: default ``head_dim ** -0.5``.
        causal: row ``i`` sees keys up to ``i + seqlen_k - seqlen_q``.
        window_size: (left, right) keys on each side, the row's own excluded; -1 is no limit.
        softcap: scores become ``softcap * tanh(scores / softcap)``; 0 is off.
        alibi_slopes: float32 (num_heads,) or (batch, num_heads).
        deterministic: bit-identical gradients from run to run.
        return_attn_probs: also return softmax_lse and S_dmask.

    Returns:
        out (batch, seqlen_q, num_heads, head_dim_v) in q's dtype. With ``return_attn_probs`` a tuple of it,
        softmax_lse, float32 (batch, num_heads, seqlen_q), and S_dmask: without dropout an empty tensor, else (batch,
        num_heads, seqlen_q and seqlen_k rounded up to 128) in q's dtype, for tests: each probability over the largest
        one of its block of keys and the later blocks, negative where dropped.

    Raises:
        ValueError, TypeError: as :func:`transformer_fast.attention`; and for dropout with softcap.
    """
    options = (dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs)
    return _padded(_rows(q, "q"), _rows(k, "k"), _rows(v, "v"), *options)


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = OPEN,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """:func:`flash_attn_func` with keys and values in one tensor ``kv``, (batch, seqlen_k, 2, num_kv_heads, head_dim).

    They are taken as views; the gradient of ``kv`` is one tensor again. Results and errors are those of
    :func:`flash_attn_func`.
    """
    k, v = _packed(kv, "kv", 2, 5).unbind(2)
    options = (dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs)
    return _padded(_rows(q, "q"), k, v, *options)


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = OPEN,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """:func:`flash_attn_func` with all three in one tensor ``qkv``, (batch, seqlen, 3, num_heads, head_dim).

    They are taken as views; the gradient of ``qkv`` is one tensor again. Results and errors are those of
    :func:`flash_attn_func`.
    """
    q, k, v = _packed(qkv, "qkv", 3, 5).unbind(2)
    options = (dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs)
    return _padded(q, k, v, *options)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = OPEN,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Result:
    """Attention of sequences packed one after the other, with flash-attn's signature.

    Args:
        q: (total_q, num_heads, head_dim).
        k: (total_k, num_kv_heads, head_dim); with ``block_table`` pages, (num_pages, page_size, num_kv_heads,
            head_dim) of any page_size, read where they are. Where a gradient is asked for, or dropout, the keys of the
            sequences are gathered from the pages first.
        v: as k, with head_dim_v.
        cu_seqlens_q, cu_seqlens_k: int32 (batch + 1,), where each sequence begins; the last entry is the total.
        max_seqlen_q, max_seqlen_k: lengths that no sequence exceeds.
        block_table: int32 (batch, max_pages), the pages of each sequence in order.

    The other arguments are those of :func:`flash_attn_func`, for each sequence by itself.

    Returns:
        out (total_q, num_heads, head_dim_v); with ``return_attn_probs`` a tuple of it, softmax_lse, float32 (num_heads,
        total_q), and S_dmask: empty without dropout, else (batch, num_heads, max_seqlen_q and max_seqlen_k rounded up
        to 128).

    Raises:
        ValueError, TypeError: as :func:`transformer_fast.attention_varlen`; and for dropout with softcap.
    """
    arguments = arguments_of(dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic)
    keys = (3, PACKED) if block_table is None else (4, PAGES)
    q = with_contiguous_rows(q, "q", 3, PACKED)
    k, v = with_contiguous_rows(k, "k", *keys), with_contiguous_rows(v, "v", *keys)
    lengths = cu_seqlens_q, cu_seqlens_k, integer_of(max_seqlen_q), integer_of(max_seqlen_k)
    if block_table is not None:
        if dropout_p == 0.0 and not takes_gradient(q, k, v):
            out, lse = attention_varlen_paged(q, (k, v), lengths, block_table, arguments)
            return (out, lse, q.new_empty(0)) if return_attn_probs else out
        k, v = packed_keys(q, (k, v), lengths, block_table, arguments)
    if not return_attn_probs:
        return attention_varlen(q, k, v, *lengths, **arguments)  # type: ignore[return-value]
    return attention_varlen_with_probs(q, k, v, *lengths, arguments)


def _flash_attn_varlen_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    return_softmax: bool = False,
    block_table: Tensor | None = None,
    leftpad_k: Tensor | None = None,
    seqused_k: Tensor | None = None,
    zero_tensors: bool = False,
    out: Tensor | None = None,
    num_splits: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What other libraries call below :func:`flash_attn_varlen_func`: (out, softmax_lse, S_dmask, rng_state).

    Of a paged cache ``seqused_k``, int32 (batch,), says how many keys each sequence has. The last result is zeros: no
    backward pass of theirs goes with it.

    Raises:
        ValueError, TypeError: as :func:`flash_attn_varlen_func`; for ``leftpad_k``, ``zero_tensors`` or ``out``; for
            ``seqused_k`` without ``block_table``.
        RuntimeError: ``num_splits`` is above 1, as flash-attn has it.
    """
    refused = {"leftpad_k": leftpad_k, "zero_tensors": zero_tensors or None, "out": out}
    if block_table is None:
        refused["seqused_k"] = seqused_k
    for name, value in refused.items():
        if value is not None:
            raise ValueError(f"{name} is given; allowed: its default, by _flash_attn_varlen_forward")
    if num_splits > 1:
        raise RuntimeError(f"num_splits > 1 is not supported: it is {num_splits}; allowed: 0 or 1")
    if seqused_k is not None:
        cu_seqlens_k = torch.nn.functional.pad(seqused_k.cumsum(0, dtype=torch.int32), (1, 0))
    found = flash_attn_varlen_func(
        *(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal),
        window_size=(window_size_left, window_size_right),
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        return_attn_probs=True,
        block_table=block_table,
    )
    return (*found, q.new_zeros(2, dtype=torch.int64))


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = OPEN,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """:func:`flash_attn_varlen_func` with keys and values in one ``kv``, (total_k, 2, num_kv_heads, head_dim)."""
    k, v = _packed(kv, "kv", 2, 4).unbind(1)
    options = (dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs)
    return flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, *options)


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = OPEN,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """:func:`flash_attn_varlen_func` with all three in one tensor ``qkv``, (total, 3, num_heads, head_dim)."""
    q, k, v = _packed(qkv, "qkv", 3, 4).unbind(1)
    options = (dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs)
    return flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, *options)


def _rows(tensor: Tensor, name: str) -> Tensor:
    return with_contiguous_rows(tensor, name, 4, PADDED)


def _packed(tensor: Tensor, name: str, count: int, ndim: int) -> Tensor:
    """The tensor, which has ``count`` tensors along its third last dimension.

    Raises:
        ValueError, TypeError: it has not.
    """
    tensor = with_contiguous_rows(tensor, name, ndim, _packed_shape(count, ndim))
    if tensor.shape[-3] != count:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; allowed: {_packed_shape(count, ndim)}")
    return tensor


@functools.cache
def _packed_shape(count: int, ndim: int) -> str:
    return f"({'batch, seqlen' if ndim == 5 else 'total'}, {count}, num_heads, head_dim)"
