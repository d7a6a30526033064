"""flash_attn_varlen_func with a block table: packed queries of any lengths, keys in pages."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..dropin.varlen import check_cu_seqlens, check_packed_over_pages, check_places, is_readable, packed_over_pages
from ..spec import check_starts, parse_options
from .attn_probs import places


def attention_varlen_paged(
    query: Tensor,
    pages: tuple[Tensor, Tensor],
    lengths: tuple[Any, ...],
    block_table: Tensor,
    arguments: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    """Packed queries and pages to (out, lse), without dropout or gradients; ``lengths`` are the four arguments.

    Raises:
        ValueError, TypeError: an argument is wrong.
    """
    call, options = _parts(query, pages, lengths, block_table, arguments)
    return packed_over_pages(*call, **options, return_lse=True)  # type: ignore[return-value]


def packed_keys(
    query: Tensor,
    pages: tuple[Tensor, Tensor],
    lengths: tuple[Any, ...],
    block_table: Tensor,
    arguments: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    """The keys and values of the sequences, one after the other: a copy, through which gradients go to the pages.

    Raises:
        ValueError, TypeError: as :func:`attention_varlen_paged`.
    """
    call, options = _parts(query, pages, lengths, block_table, arguments)
    check_packed_over_pages(*call, **options)
    check_places(pages[0], *call[-2:])
    return gathered(*pages, lengths[1], block_table)


def gathered(k_pages: Tensor, v_pages: Tensor, cu_seqlens_k: Tensor, block_table: Tensor) -> tuple[Tensor, Tensor]:
    """Of pages (num_pages, page_size, ...) what the sequences hold, (total_k, ...)."""
    sequence, place = places(cu_seqlens_k)
    page_size = k_pages.shape[1]
    page = block_table[sequence, place // page_size].long()
    return k_pages[page, place % page_size], v_pages[page, place % page_size]


def _parts(
    query: Tensor,
    pages: tuple[Tensor, Tensor],
    lengths: tuple[Any, ...],
    block_table: Tensor,
    arguments: dict[str, Any],
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The call of :func:`packed_over_pages`: its arguments and options. What it does not see, ``*_k``, is checked."""
    cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k = lengths
    check_cu_seqlens(cu_seqlens_q, cu_seqlens_k)
    parse_options(max_seqlen_k=max_seqlen_k)
    if is_readable(cu_seqlens_k):
        check_starts(cu_seqlens_k, "k", max_seqlen_k)
    options = {name: value for name, value in arguments.items() if name not in ("dropout_p", "deterministic")}
    return (query, *pages, cu_seqlens_q, max_seqlen_q, block_table, cu_seqlens_k.diff()), options
