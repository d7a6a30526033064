"""The ``attn_bias`` classes of xformers whose keys lie in a cache, for inference: padded, anywhere, or in pages.

All of them align at the bottom right: a sequence's last query stands at its last key.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .xformers_bias import AttentionBias, GappySeqInfo, PaddedSeqLenInfo, SeqLenInfo


@dataclass
class BlockDiagonalPaddedKeysMask(AttentionBias):
    """Queries see all keys that their sequence has, of those it has room for."""

    q_seqinfo: SeqLenInfo
    k_seqinfo: PaddedSeqLenInfo

    @classmethod
    def from_seqlens(
        cls: type[Any],
        q_seqlen: Sequence[int],
        kv_padding: int,
        kv_seqlen: Sequence[int],
        causal_diagonal: Any = None,
        *,
        device: torch.device | str | None = None,
    ) -> Any:
        """Of the numbers of queries, the room for keys, and the numbers of keys; causal_diagonal is not used."""
        return cls(*_infos(q_seqlen, kv_padding, kv_seqlen, device))

    def make_local_attention(self, window_left: int, window_right: int) -> BlockDiagonalLocalAttentionPaddedKeysMask:
        """The same with so many keys to the left and to the right."""
        return BlockDiagonalLocalAttentionPaddedKeysMask(self.q_seqinfo, self.k_seqinfo, window_left, window_right)

    def make_paged(self, block_tables: Tensor, page_size: int, paged_type: type[Any]) -> Any:
        """The same of keys in pages; paged_type is one of the classes below."""
        k_seqinfo = dataclasses.replace(self.k_seqinfo, padding=block_tables.shape[1] * page_size)
        return paged_type(self.q_seqinfo, k_seqinfo, block_tables, page_size)


def _infos(
    q_seqlen: Sequence[int], kv_padding: int, kv_seqlen: Sequence[int], device: torch.device | str | None = None
) -> tuple[SeqLenInfo, PaddedSeqLenInfo]:
    _check_same(q_seqlen, kv_seqlen)
    queries = SeqLenInfo.from_seqlens(q_seqlen, device=device)
    return queries, PaddedSeqLenInfo.from_seqlens_padded(kv_seqlen, kv_padding, device=device)


def _check_same(q_seqlen: Sequence[int], kv_seqlen: Sequence[int]) -> None:
    if len(kv_seqlen) != len(q_seqlen):
        raise ValueError(f"kv_seqlen has {len(kv_seqlen)} entries; allowed: {len(q_seqlen)}, as q_seqlen")


@dataclass
class BlockDiagonalCausalWithOffsetPaddedKeysMask(BlockDiagonalPaddedKeysMask):
    """The same, causal."""

    causal_diagonal: Any = None


@dataclass
class BlockDiagonalLocalAttentionPaddedKeysMask(BlockDiagonalPaddedKeysMask):
    """The same with so many keys to the left and to the right."""

    window_left: int
    window_right: int

    @classmethod
    def from_seqlens_local(
        cls: type[Any],
        q_seqlen: Sequence[int],
        kv_padding: int,
        kv_seqlen: Sequence[int],
        window_left: int,
        window_right: int,
    ) -> Any:
        """As ``from_seqlens``, with the window."""
        return cls(*_infos(q_seqlen, kv_padding, kv_seqlen), window_left, window_right)


@dataclass
class BlockDiagonalCausalLocalAttentionPaddedKeysMask(BlockDiagonalPaddedKeysMask):
    """The same, causal with a window of so many keys, a query's own included."""

    _window_size: int

    @classmethod
    def from_seqlens_local(
        cls: type[Any], q_seqlen: Sequence[int], kv_padding: int, kv_seqlen: Sequence[int], window_size: int
    ) -> Any:
        """As ``from_seqlens``, with the window."""
        return cls(*_infos(q_seqlen, kv_padding, kv_seqlen), window_size)


@dataclass
class PagedBlockDiagonalPaddedKeysMask(AttentionBias):
    """Queries see all keys of their sequence, which lie in pages: keys are (1, num_pages * page_size, ...)."""

    q_seqinfo: SeqLenInfo
    k_seqinfo: PaddedSeqLenInfo
    block_tables: Tensor  # int32 (batch, max_pages)
    page_size: int

    @classmethod
    def from_seqlens(
        cls: type[Any],
        q_seqlen: Sequence[int],
        kv_seqlen: Sequence[int],
        block_tables: Tensor,
        page_size: int,
        *,
        device: torch.device | str | None = None,
    ) -> Any:
        """Of the numbers of queries and keys, and the pages of each sequence."""
        return cls(*_infos(q_seqlen, block_tables.shape[1] * page_size, kv_seqlen, device), block_tables, page_size)


@dataclass
class PagedBlockDiagonalCausalWithOffsetPaddedKeysMask(PagedBlockDiagonalPaddedKeysMask):
    """The same, causal."""


@dataclass
class BlockDiagonalGappyKeysMask(AttentionBias):
    """Queries see all keys of their sequence, which begin anywhere."""

    q_seqinfo: SeqLenInfo
    k_seqinfo: GappySeqInfo

    @classmethod
    def from_seqlens(
        cls: type[Any],
        q_seqlen: Sequence[int],
        kv_seqstarts: Sequence[int],
        kv_seqlen: Sequence[int],
        *,
        device: torch.device | str | None = None,
    ) -> Any:
        """Of the numbers of queries, where keys begin (at last the total length), and the numbers of keys."""
        _check_same(q_seqlen, kv_seqlen)
        queries = SeqLenInfo.from_seqlens(q_seqlen, device=device)
        return cls(queries, GappySeqInfo.from_seqlens_gappy(kv_seqstarts, kv_seqlen, False, device=device))

    def make_paged(self, block_tables: Tensor, page_size: int, notional_padding: int, paged_type: type[Any]) -> Any:
        """The same of keys in pages, where here each sequence has room for notional_padding keys, pages' worth."""
        room, info = block_tables.shape[1] * page_size, self.k_seqinfo
        if notional_padding % page_size:
            raise ValueError(f"notional_padding is {notional_padding}; allowed: a multiple of {page_size} (page_size)")
        starts = [begin - b * notional_padding for b, begin in enumerate(info.seqstart_py[:-1])]
        if any(not 0 <= begin < room for begin in starts):
            raise ValueError(f"sequences begin at {starts} in their pages; allowed: 0 to {room - 1}")
        keys = GappySeqInfo.from_seqlens_gappy(starts, info.seqlen_py, True, device=info.seqlen.device)
        return paged_type(self.q_seqinfo, keys, block_tables, page_size)


@dataclass
class BlockDiagonalCausalWithOffsetGappyKeysMask(BlockDiagonalGappyKeysMask):
    """The same, causal."""


@dataclass
class PagedBlockDiagonalGappyKeysMask(AttentionBias):
    """Queries see the keys of their sequence from some key on, which lie in pages."""

    q_seqinfo: SeqLenInfo
    k_seqinfo: GappySeqInfo
    block_tables: Tensor  # int32 (batch, max_pages)
    page_size: int

    @classmethod
    def from_seqlens(
        cls: type[Any],
        q_seqlen: Sequence[int],
        kv_seqstarts: Sequence[int],
        kv_seqlen: Sequence[int],
        block_tables: Tensor,
        page_size: int,
        *,
        device: torch.device | str | None = None,
    ) -> Any:
        """Of the numbers of queries, the first key of each sequence, the numbers of keys, and the pages."""
        _check_same(q_seqlen, kv_seqlen)
        device = block_tables.device if device is None else device
        queries = SeqLenInfo.from_seqlens(q_seqlen, device=device)
        keys = GappySeqInfo.from_seqlens_gappy(kv_seqstarts, kv_seqlen, True, device=device)
        return cls(queries, keys, block_tables, page_size)


@dataclass
class PagedBlockDiagonalCausalWithOffsetGappyKeysMask(PagedBlockDiagonalGappyKeysMask):
    """The same, causal."""
