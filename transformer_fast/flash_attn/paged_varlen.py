"""flash_attn_varlen_func with a block table: packed queries of any lengths, keys in pages."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from ..attention import attention_paged
from .attn_probs import places


def attention_varlen_paged(
    query: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    block_table: Tensor,
    arguments: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    """Packed queries (total_q, heads, head_dim) and pages (num_pages, page_size, heads, head_dim) to (out, lse).

    attention_paged takes queries of one length, so there is one call for each length that occurs: one for all decoding
    sequences, and none computes a padded row.
    """
    starts = _checked(cu_seqlens_q, "cu_seqlens_q", max_seqlen_q, query.shape[0])
    _checked(cu_seqlens_k, "cu_seqlens_k", max_seqlen_k)
    if cu_seqlens_k.shape != cu_seqlens_q.shape:
        raise ValueError(
            f"cu_seqlens_k has shape {tuple(cu_seqlens_k.shape)}; allowed: {tuple(cu_seqlens_q.shape)}, as cu_seqlens_q"
        )
    options = {name: value for name, value in arguments.items() if name not in ("dropout_p", "deterministic")}
    slopes = options.pop("alibi_slopes")
    sequences: dict[int, list[int]] = {}
    for b, (begin, end) in enumerate(itertools.pairwise(starts)):
        if end > begin:
            sequences.setdefault(end - begin, []).append(b)
    if slopes is not None and slopes.dim() == 1:
        slopes = slopes.expand(len(starts) - 1, -1)
    keys, values, seqlens_k = k_pages.transpose(1, 2), v_pages.transpose(1, 2), cu_seqlens_k.diff()

    out = query.new_empty(*query.shape[:2], v_pages.shape[-1])
    lse = query.new_empty(query.shape[1::-1], dtype=torch.promote_types(query.dtype, torch.float32))
    for length, chosen in sequences.items():
        entries = torch.tensor(chosen, device=query.device)
        rows = cu_seqlens_q[entries].unsqueeze(1) + torch.arange(length, device=query.device)  # (sequences, length)
        part, part_lse = attention_paged(
            query[rows].transpose(1, 2),
            keys,
            values,
            block_table[entries],
            seqlens_k[entries],
            alibi_slopes=None if slopes is None else slopes[entries],
            return_lse=True,
            **options,
        )
        out[rows] = part.transpose(1, 2)
        lse[:, rows] = part_lse.transpose(0, 1)
    return out, lse


def packed_keys(k_pages: Tensor, v_pages: Tensor, cu_seqlens_k: Tensor, block_table: Tensor) -> tuple[Tensor, Tensor]:
    """The keys and values of the sequences, one after the other: a copy, through which gradients go to the pages."""
    sequence, place = places(cu_seqlens_k)
    page_size = k_pages.shape[1]
    pages = block_table[sequence, place // page_size].long()
    return k_pages[pages, place % page_size], v_pages[pages, place % page_size]


def _checked(cu_seqlens: Tensor, name: str, longest: int, total: int | None = None) -> list[int]:
    """The entries, which begin at 0, do not fall, and end at ``total``.

    Raises:
        ValueError, TypeError: they do not.
    """
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dtype != torch.int32 or cu_seqlens.dim() != 1:
        raise TypeError(f"{name} is {cu_seqlens!r}; allowed: an int32 torch.Tensor (batch + 1,)")
    entries: list[int] = cu_seqlens.tolist()
    if not entries or entries[0] != 0:
        raise ValueError(f"{name} is {entries}; allowed: entries that begin with 0")
    for b, (begin, end) in enumerate(itertools.pairwise(entries)):
        if not 0 <= end - begin <= longest:
            raise ValueError(f"{name}[{b + 1}] - {name}[{b}] is {end - begin}; allowed: 0 to {longest}, the max_seqlen")
    if total is not None and entries[-1] != total:
        raise ValueError(f"{name}[-1] is {entries[-1]}; allowed: {total}, the packed length")
    return entries
