"""How the rows of 2-D activations ``(tokens, hidden_size)`` are divided into sequences.

Every linear layer and norm of the model works on rows and needs to know nothing more. Only positions,
attention and pooling care which row belongs to which sequence, and they all ask this one record.

There are two kinds. A **packed** layout has a row for each real token and none for padding, and
attention runs on ``cu_seqlens``. A **dense** layout has ``batch * seqlen`` rows, padding included,
and attention runs on four dimensions with a ``key_padding_mask`` or, behind a cache, ``seqlens_k``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from transformer_fast.masks import cu_seqlens_from_mask, repad, unpad


@dataclass(frozen=True)
class TokenLayout:
    """Where each row of the activations stands.

    Attributes:
        batch: number of sequences.
        seqlen: length of the grid ``(batch, seqlen)`` that the rows were taken from.
        positions: ``(tokens,)`` int64, the position that embeddings and rotations use.
        rows: ``(tokens,)`` int64 places in the flattened grid; None in a dense layout, where all are taken.
        cu_seqlens: ``(batch + 1,)`` int32 boundaries of a packed layout, else None.
        max_seqlen: the longest sequence; ``seqlen`` in a dense layout.
        key_padding_mask: ``(batch, seqlen)`` bool, True = keep; dense layouts with padding only.
        seqlens_k: ``(batch,)`` int32 keys of each sequence when a cache holds earlier ones, else None.
    """

    batch: int
    seqlen: int
    positions: Tensor
    rows: Tensor | None = None
    cu_seqlens: Tensor | None = None
    max_seqlen: int = 0
    key_padding_mask: Tensor | None = None
    seqlens_k: Tensor | None = None

    @classmethod
    def dense(
        cls,
        batch: int,
        seqlen: int,
        *,
        device: torch.device,
        cached: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> TokenLayout:
        """``seqlen`` tokens in each of ``batch`` sequences, after the ``cached`` ``(batch,)`` tokens of each.

        ``position_ids`` (batch or 1, seqlen) are the positions where they are not those.
        """
        positions = torch.arange(seqlen, device=device) if position_ids is None else position_ids
        if cached is None:
            return cls(batch, seqlen, positions.expand(batch, seqlen).reshape(-1), max_seqlen=seqlen)
        if position_ids is None:
            positions = positions + cached[:, None]
        flat = positions.expand(batch, seqlen).reshape(-1)
        return cls(batch, seqlen, flat, max_seqlen=seqlen, seqlens_k=cached + seqlen)

    @classmethod
    def from_mask(
        cls,
        attention_mask: Tensor,
        *,
        packed: bool = True,
        position_ids: Tensor | None = None,
    ) -> TokenLayout:
        """The layout of a padded batch; any pattern of padding, left, right or holes.

        Args:
            attention_mask: ``(batch, seqlen)``, nonzero = a real token.
            packed: leave the padding out, or keep it and mask it.
            position_ids: ``(batch or 1, seqlen)``; default the columns, which padding on the left shifts, as in BERT.
        """
        keep = attention_mask.bool()
        batch, seqlen = keep.shape
        columns = torch.arange(seqlen, device=keep.device) if position_ids is None else position_ids
        positions = columns.expand(batch, seqlen)
        if not packed:
            return cls(batch, seqlen, positions.reshape(-1), max_seqlen=seqlen, key_padding_mask=keep)
        rows, cu_seqlens, max_seqlen = cu_seqlens_from_mask(keep)
        return cls(batch, seqlen, positions.reshape(-1)[rows], rows, cu_seqlens, max_seqlen)

    @property
    def boundaries(self) -> Tensor:
        """``(batch + 1,)`` int32: where each sequence's rows begin, in a dense layout too."""
        if self.cu_seqlens is not None:
            return self.cu_seqlens
        return torch.arange(self.batch + 1, dtype=torch.int32, device=self.positions.device) * self.seqlen

    @property
    def mask(self) -> Tensor | None:
        """``(batch, seqlen)`` bool, True = a real token; None where all are."""
        if self.rows is None:
            return self.key_padding_mask
        keep = torch.zeros(self.batch * self.seqlen, dtype=torch.bool, device=self.rows.device)
        return keep.index_fill_(0, self.rows, True).view(self.batch, self.seqlen)

    @property
    def grid_positions(self) -> Tensor:
        """``(batch or 1, seqlen)``: the place of each token among its sequence's keys, which relative biases go by."""
        columns = torch.arange(self.seqlen, device=self.positions.device)[None]
        return columns if self.seqlens_k is None else columns + (self.seqlens_k - self.seqlen)[:, None]

    @property
    def lengths(self) -> Tensor:
        """``(batch,)`` int32: real tokens of each sequence in this layout."""
        if self.cu_seqlens is not None:
            return self.cu_seqlens.diff()
        if self.key_padding_mask is not None:
            return self.key_padding_mask.sum(1, dtype=torch.int32)
        return torch.full((self.batch,), self.seqlen, dtype=torch.int32, device=self.positions.device)

    @property
    def sequence_ids(self) -> Tensor:
        """``(tokens,)`` int64: the sequence of each row."""
        if self.rows is not None:
            return self.rows // self.seqlen
        return torch.arange(self.batch, device=self.positions.device).repeat_interleave(self.seqlen)

    def take_rows(self, grid: Tensor) -> Tensor:
        """``(batch, seqlen, ...)`` to the ``(tokens, ...)`` of this layout."""
        return grid.flatten(0, 1) if self.rows is None else unpad(grid, self.rows)

    def to_grid(self, rows: Tensor) -> Tensor:
        """``(tokens, ...)`` back to ``(batch, seqlen, ...)``, zeros where there was padding."""
        if self.rows is not None:
            return repad(rows, self.rows, self.batch, self.seqlen)
        return self._without_padding(rows).unflatten(0, (self.batch, self.seqlen))

    def heads_first(self, x: Tensor) -> Tensor:
        """``(tokens, heads, head_dim)`` as ``(batch, heads, seqlen, head_dim)``: a view, unless packed."""
        grid = x.unflatten(0, (self.batch, self.seqlen)) if self.rows is None else self.to_grid(x)
        return grid.transpose(1, 2)

    def rows_at(self, columns: Tensor) -> Tensor:
        """The rows ``(batch,)`` of the token in column ``columns[b]`` of each sequence, or the last real one before."""
        places = torch.arange(self.batch, device=columns.device) * self.seqlen + columns
        return places if self.rows is None else torch.searchsorted(self.rows, places, right=True) - 1

    def mean(self, rows: Tensor) -> Tensor:
        """The mean over each sequence's real tokens, ``(tokens, d)`` to ``(batch, d)``; zero for an empty one."""
        total = rows.new_zeros(self.batch, rows.shape[1])
        total = total.index_add(0, self.sequence_ids, self._without_padding(rows))
        return total / self.lengths.clamp(min=1)[:, None]

    def first_rows(self, rows: Tensor) -> Tensor:
        """The row of each sequence's first column or, in a packed layout without it, of the token before."""
        return rows[self.rows_at(torch.zeros(self.batch, dtype=torch.int64, device=rows.device))]

    def last_rows(self, rows: Tensor) -> Tensor:
        """The row of each sequence's last token, ``(tokens, d)`` to ``(batch, d)``."""
        if self.cu_seqlens is not None:
            return rows[self.cu_seqlens[1:].long() - 1]
        if self.key_padding_mask is not None:
            raise ValueError("the last token of a padded batch is found in its packed layout only")
        return rows.view(self.batch, self.seqlen, -1)[:, -1]

    def _without_padding(self, rows: Tensor) -> Tensor:
        """Zeros in the padding rows of a dense layout. Not a product: NaN in padding must not come through."""
        if self.key_padding_mask is None:
            return rows
        keep = self.key_padding_mask.reshape(-1, *[1] * (rows.dim() - 1))
        return torch.where(keep, rows, rows.new_zeros(()))
