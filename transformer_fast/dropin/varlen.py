"""``torch.nn.attention.varlen``: attention over packed sequences, on the CPU too."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..attention import attention_paged, attention_varlen


class AuxRequest(NamedTuple):
    """Which further results to return. ``torch.nn.attention.varlen.AuxRequest`` will do as well."""

    lse: bool = False


def varlen_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    is_causal: bool = False,
    return_aux: Any = None,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
    seqused_k: Tensor | None = None,
    block_table: Tensor | None = None,
    num_splits: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """``torch.nn.attention.varlen.varlen_attn`` by :func:`transformer_fast.attention_varlen`, differentiable.

    Masks are aligned at the bottom right, as those of flash-attention, which ``torch`` calls: a sequence's last query
    row stands at its last key. With ``seqused_k`` the call is :func:`transformer_fast.attention_paged`, over the keys
    where they are.

    Args:
        query: (total_q, num_heads, head_dim), float32, bfloat16, float16 or float64.
        key: (total_k, num_kv_heads, head_dim), or with ``block_table`` (num_pages, page_size, num_kv_heads, head_dim).
        value: as the key; its head_dim may differ.
        cu_seq_q: int32 (batch + 1,), where each sequence begins; the last entry is total_q.
        cu_seq_k: the same for the keys; not used with ``block_table``.
        max_q, max_k: lengths that no sequence exceeds.
        is_causal: how PyTorch 2.10 said it; ``window_size=(-1, 0)`` since.
        return_aux: with a true ``lse``, the log-sum-exp is returned too.
        scale: of the scores; default ``head_dim ** -0.5``.
        window_size: (left, right) keys beside a row's position, -1 for all: (-1, 0) is causal.
        enable_gqa: key and value may have fewer heads, a divisor of num_heads.
        seqused_k: int32 (batch,): only so many first keys of each sequence are there, and they alone align the mask.
            Without gradients, as in ``torch``.
        block_table: int32 (batch, max_pages), the pages of each sequence; needs ``seqused_k``.
        num_splits: None, or a number >= 1, which changes nothing: how work is divided is decided here. Results of one
            sequence in different batches may differ by rounding, with 1 too.

    Returns:
        (total_q, num_heads, head_dim_v); if asked for, also lse, float32 (num_heads, total_q), in the shape that
        ``torch`` gives it. A row that sees no key gives 0 and -inf.

    Raises:
        ValueError, TypeError: an argument is wrong; the message names it, its value and what is allowed.
    """
    _check_heads(query, key, enable_gqa, block_table)
    if num_splits is not None and (not isinstance(num_splits, int) or num_splits < 1):
        raise ValueError(f"num_splits is {num_splits!r}; allowed: None or an integer >= 1")
    want_lse = return_aux is not None and bool(return_aux.lse)
    options: dict[str, Any] = dict(causal=is_causal, window_size=window_size, softmax_scale=scale, return_lse=want_lse)
    if seqused_k is None:
        if block_table is not None:
            raise ValueError("block_table is given without seqused_k; allowed: both")
        return attention_varlen(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, **options)  # type: ignore[arg-type]
    if block_table is None:
        if cu_seq_k is None:
            raise ValueError("cu_seq_k is None without block_table; allowed: an int32 torch.Tensor (batch + 1,)")
        _check_used(seqused_k, cu_seq_k)
        # Every key is a page of one: nothing is copied, nor read on the host, and it costs no time (measured on a CPU).
        key, value = key[:, None], value[:, None]
        block_table = cu_seq_k[:-1, None] + torch.arange(max_k, dtype=torch.int32, device=cu_seq_k.device)
    return packed_over_pages(query, key, value, cu_seq_q, max_q, block_table, seqused_k, **options)


def _check_heads(query: Tensor, key: Tensor, enable_gqa: bool, block_table: Tensor | None) -> None:
    """Shapes as far as heads are concerned; :func:`attention_varlen` checks the rest."""
    dims = 3 if block_table is None else 4
    shape = "(total_k, num_kv_heads, head_dim)" if dims == 3 else "(num_pages, page_size, num_kv_heads, head_dim)"
    if query.dim() != 3:
        raise ValueError(f"query has shape {tuple(query.shape)}; allowed: (total_q, num_heads, head_dim)")
    if key.dim() != dims:
        raise ValueError(f"key has shape {tuple(key.shape)}; allowed: {shape}")
    if query.shape[1] != key.shape[-2] and not enable_gqa:
        raise ValueError(
            f"key has {key.shape[-2]} heads for a query of {query.shape[1]} heads; allowed: {query.shape[1]}, or a "
            "divisor with enable_gqa=True"
        )


def _check_used(seqused_k: Tensor, cu_seq_k: Tensor) -> None:
    """No sequence uses keys of the next one. Reads both, so only where that waits for nothing."""
    if seqused_k.device.type != "cpu" or torch.compiler.is_compiling() or seqused_k.shape != cu_seq_k[1:].shape:
        return
    for b, (used, length) in enumerate(zip(seqused_k.tolist(), cu_seq_k.diff().tolist(), strict=True)):
        if used > length:
            raise ValueError(f"seqused_k[{b}] is {used}; allowed: 0 to {length}, the sequence's part of cu_seq_k")


def packed_over_pages(
    query: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    cu_seqlens_q: Tensor,
    max_seqlen_q: int,
    block_table: Tensor,
    seqlens_k: Tensor,
    *,
    return_lse: bool = False,
    **options: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`transformer_fast.attention_paged` for packed queries.

    Queries of different numbers are laid in a batch, at its right end, where the alignment has them; rows before them
    are computed for nothing. Keys and values stay where they are.

    Args:
        query: (total_q, num_heads, head_dim).
        k_pages, v_pages: (num_pages, page_size, num_kv_heads, head_dim).
        cu_seqlens_q: int32 (batch + 1,).

    Returns:
        (total_q, num_heads, head_dim_v); with ``return_lse`` also lse (num_heads, total_q).
    """
    batch, total_q = block_table.shape[0], query.shape[0]
    if cu_seqlens_q.shape != (batch + 1,):
        raise ValueError(f"cu_seq_q has shape {tuple(cu_seqlens_q.shape)}; allowed: ({batch + 1},), batch + 1")
    rows = None
    if batch * max_seqlen_q == total_q:  # all have the same number
        padded = query.unflatten(0, (batch, max_seqlen_q))
    else:
        place = torch.arange(max_seqlen_q, device=query.device) - max_seqlen_q
        source = cu_seqlens_q[1:, None] + place  # (batch, max_seqlen_q), the last one of each row is its last query
        padded = query[source.clamp(min=0)]
        lengths = cu_seqlens_q.diff()
        entry = torch.arange(batch, device=query.device).repeat_interleave(lengths, output_size=total_q)
        begin = (entry + 1) * max_seqlen_q - cu_seqlens_q[1:][entry]
        rows = begin + torch.arange(total_q, device=query.device)  # where each query lies in the flattened batch
    out, lse = attention_paged(
        padded.transpose(1, 2),
        k_pages.transpose(1, 2),
        v_pages.transpose(1, 2),
        block_table,
        seqlens_k,
        return_lse=True,
        **options,
    )
    # (batch, num_heads, max_seqlen_q, head_dim_v) -> (total_q, num_heads, head_dim_v)
    out, lse = out.transpose(1, 2).flatten(0, 1), lse.transpose(1, 2).flatten(0, 1)
    if rows is not None:
        out, lse = out[rows], lse[rows]
    return (out, lse.transpose(0, 1).contiguous()) if return_lse else out
