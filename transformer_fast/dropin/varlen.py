"""``torch.nn.attention.varlen``: attention over packed sequences, on the CPU too."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..attention import attention_paged, attention_varlen
from ..spec import Operands, check, check_pages, check_starts, parse_options


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
        check_cu_seqlens(cu_seq_q, cu_seq_k)
        _check_used(seqused_k, cu_seq_k, key.shape[0])
        # Every key is a page of one: no key is copied.
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


def _check_used(seqused_k: Tensor, cu_seq_k: Tensor, total_k: int) -> None:
    """No sequence uses keys of the next one. Reads both, so only where that waits for nothing."""
    if not isinstance(seqused_k, Tensor) or seqused_k.shape != cu_seq_k[1:].shape or not is_readable(seqused_k):
        return
    starts = check_starts(cu_seq_k, "k", total_k, total_k)
    for b, (used, begin, end) in enumerate(zip(seqused_k.tolist(), starts, starts[1:], strict=False)):
        if used > end - begin:
            raise ValueError(f"seqused_k[{b}] is {used}; allowed: 0 to {end - begin}, the sequence's part of cu_seq_k")


def is_readable(tensor: Tensor) -> bool:
    """Is there a value to look at, and does that wait for nothing?"""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def check_cu_seqlens(*cu_seqlens: Any) -> None:
    """Raise unless that of the queries, and that of the keys if given, are int32 (batch + 1,)."""
    for side, cu in zip("qk", cu_seqlens, strict=False):
        if not isinstance(cu, Tensor) or cu.dtype != torch.int32:
            kind = cu.dtype if isinstance(cu, Tensor) else type(cu).__name__
            raise TypeError(f"cu_seqlens_{side} is of type {kind}; allowed: an int32 torch.Tensor (batch + 1,)")
        if cu.dim() != 1 or cu.shape[0] < 1 or cu.shape != cu_seqlens[0].shape:
            allowed = "(batch + 1,)" if side == "q" else f"{tuple(cu_seqlens[0].shape)}, as cu_seqlens_q"
            raise ValueError(f"cu_seqlens_{side} has shape {tuple(cu.shape)}; allowed: {allowed}")


def check_packed_over_pages(
    query: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    cu_seqlens_q: Tensor,
    max_seqlen_q: int,
    block_table: Tensor,
    seqlens_k: Tensor,
    *,
    alibi_slopes: Tensor | None = None,
    **options: Any,
) -> None:
    """Raise for what is wrong with such a call, whichever way it is then computed; no value is looked at."""
    check_cu_seqlens(cu_seqlens_q)
    _, num_heads, head_dim = query.shape
    # The queries as a batch without rows, in the pages' dtype, which they take under autocast. Gradients are for those
    # to refuse who cannot give them.
    rows = k_pages.new_empty((cu_seqlens_q.shape[0] - 1, num_heads, 0, head_dim))
    keys, values = k_pages.detach().transpose(1, 2), v_pages.detach().transpose(1, 2)
    parsed = parse_options(**options, max_seqlen_q=max_seqlen_q)
    check(Operands(rows, keys, values, seqlens_k=seqlens_k, alibi_slopes=alibi_slopes, block_table=block_table), parsed)


def check_places(k_pages: Tensor, block_table: Tensor, seqlens_k: Tensor) -> None:
    """Raise ValueError for lengths or pages out of range, where to look waits for nothing."""
    if not is_readable(block_table):
        return
    num_pages, page_size = k_pages.shape[:2]
    capacity = block_table.shape[1] * page_size
    for b, length in enumerate(seqlens_k.tolist()):
        if not 0 <= length <= capacity:
            raise ValueError(f"seqlens_k[{b}] is {length}; allowed: 0 to {capacity}, the room of block_table")
    check_pages(block_table, seqlens_k, num_pages, page_size)


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
    alibi_slopes: Tensor | None = None,
    **options: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`transformer_fast.attention_paged` for packed queries.

    Keys and values stay where they are. Where the lengths are read (on a CPU always) there is one call for each number
    of queries that occurs, and no row is computed for nothing: a long prompt beside many decoding sequences makes none
    of them long. Elsewhere all are laid in one batch, at its right end, where the alignment has them.

    Args:
        query: (total_q, num_heads, head_dim).
        k_pages, v_pages: (num_pages, page_size, num_kv_heads, head_dim).
        cu_seqlens_q: int32 (batch + 1,).
        max_seqlen_q: a number of queries that no sequence exceeds.
        block_table: int32 (batch, max_pages).
        seqlens_k: int32 (batch,).

    Returns:
        (total_q, num_heads, head_dim_v); with ``return_lse`` also lse (num_heads, total_q).

    Raises:
        ValueError, TypeError: an argument is wrong. Lengths that are not looked at may be wrong too; a query that no
            sequence has, or only one of more than ``max_seqlen_q``, then gives NaN.
    """
    check_packed_over_pages(
        query,
        k_pages,
        v_pages,
        cu_seqlens_q,
        max_seqlen_q,
        block_table,
        seqlens_k,
        alibi_slopes=alibi_slopes,
        **options,
    )
    keys, values = k_pages.transpose(1, 2), v_pages.transpose(1, 2)

    def attend(padded: Tensor, entries: Any) -> tuple[Tensor, Tensor]:
        """(sequences, length, num_heads, head_dim) to out and lse with the dimensions in that order."""
        own = alibi_slopes if alibi_slopes is None or alibi_slopes.dim() == 1 else alibi_slopes[entries]
        table, lengths = block_table[entries], seqlens_k[entries]
        out, lse = attention_paged(
            padded.transpose(1, 2), keys, values, table, lengths, alibi_slopes=own, return_lse=True, **options
        )
        return out.transpose(1, 2), lse.transpose(1, 2)

    total_q, batch = query.shape[0], cu_seqlens_q.shape[0] - 1
    starts = _starts(cu_seqlens_q, max_seqlen_q, total_q)
    groups = _groups(starts, max_seqlen_q)
    if starts is not None and groups[0][1] is None:  # all have the same number
        parts = attend(query.unflatten(0, (batch, groups[0][0])), slice(None))
        out, lse = (part.flatten(0, 1) for part in parts)
    else:
        check_places(k_pages, block_table, seqlens_k)  # of all sequences: a part would be told of by the part's numbers
        out, lse = _scattered(query, cu_seqlens_q, groups, attend)
    return (out, lse.transpose(0, 1).contiguous()) if return_lse else out


def _scattered(
    query: Tensor,
    cu_seqlens_q: Tensor,
    groups: list[tuple[int, list[int] | None]],
    attend: Callable[[Tensor, Any], tuple[Tensor, Tensor]],
) -> tuple[Tensor, Tensor]:
    """(total_q, num_heads, head_dim_v) and lse (total_q, num_heads), one group after the other."""
    total_q = query.shape[0]
    begins, ends = cu_seqlens_q[:-1].unsqueeze(1), cu_seqlens_q[1:].unsqueeze(1)
    results: list[Tensor] = []
    for length, chosen in groups:
        entries = slice(None) if chosen is None else torch.tensor(chosen, dtype=torch.int64, device=query.device)
        rows = ends[entries] + torch.arange(-length, 0, device=query.device)  # (sequences, length)
        parts = attend(query[rows if chosen is not None else rows.clamp(min=0)], entries)
        if not results:  # with one row more, for what is computed before a sequence's first query
            results = [part.new_full((total_q + 1, *part.shape[2:]), math.nan) for part in parts]
        if chosen is None:
            rows = torch.where(rows >= begins, rows, total_q)
        rows = rows.long()
        for result, part in zip(results, parts, strict=True):
            result[rows] = part
    return results[0][:total_q], results[1][:total_q]


def _starts(cu_seqlens_q: Tensor, longest: int, total_q: int) -> list[int] | None:
    """The entries, None where they are not looked at: on a device only if rows would mostly be computed for nothing.

    Raises:
        ValueError: they are wrong.
    """
    if not is_readable(cu_seqlens_q):
        is_captured = cu_seqlens_q.is_cuda and torch.cuda.is_current_stream_capturing()
        is_dense = (cu_seqlens_q.shape[0] - 1) * longest <= 2 * total_q
        if torch.compiler.is_compiling() or is_dense or is_captured:
            return None
    return check_starts(cu_seqlens_q, "q", longest, total_q)


def _groups(starts: list[int] | None, longest: int) -> list[tuple[int, list[int] | None]]:
    """Numbers of queries, and the sequences to be computed as if they had so many; None is all."""
    if starts is None:
        return [(longest, None)]
    groups: dict[int, list[int]] = {}
    for b, (begin, end) in enumerate(itertools.pairwise(starts)):
        if end > begin:
            groups.setdefault(end - begin, []).append(b)
    if len(groups) == 1 and len(next(iter(groups.values()))) == len(starts) - 1:
        return [(length, None) for length in groups]
    return list(groups.items()) or [(0, None)]
