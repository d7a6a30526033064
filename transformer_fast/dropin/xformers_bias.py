"""The ``attn_bias`` classes of xformers as plain data: names, constructors and attributes are theirs.

A class says which keys each query sees by its name; ``xformers.py`` beside this file holds the table of what a name
means, and reads instances of xformers' own classes by the same attributes. Top left and bottom right say where a query
stands: the first one at the first key, or the last one at the last key.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

_Bias = TypeVar("_Bias", bound="AttentionBias")


def _device(device: torch.device | str | None) -> torch.device:
    """Where lengths are put: as in xformers, on a GPU if there is one."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(device)


def _int32(numbers: Sequence[int], device: torch.device | str | None) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32, device=_device(device))


def _moved(value: Any, device: torch.device | str) -> Any:
    return value.to(device) if isinstance(value, (Tensor, SeqLenInfo)) else value


# ----------------------------------------------------------------------------------------------------- lengths


@dataclass
class SeqLenInfo:
    """Sequences one after the other: where each begins, and at last where the last one ends."""

    seqstart: Tensor  # int32 (batch + 1,)
    max_seqlen: int
    min_seqlen: int
    seqstart_py: list[int]

    @classmethod
    def from_seqlens(cls, seqlens: Sequence[int], *, device: torch.device | str | None = None) -> SeqLenInfo:
        """Of the sequences' lengths."""
        if any(n < 0 for n in seqlens):
            raise ValueError(f"seqlens is {list(seqlens)}; allowed: >= 0 each")
        starts = list(itertools.accumulate(seqlens, initial=0))
        return SeqLenInfo(_int32(starts, device), max(seqlens, default=0), min(seqlens, default=0), starts)

    def to(self: Any, device: torch.device | str) -> Any:
        """The same with its tensors on a device."""
        fields = {f.name: _moved(getattr(self, f.name), device) for f in dataclasses.fields(self)}
        return type(self)(**fields)

    def intervals(self) -> Iterator[tuple[int, int]]:
        """(begin, end) of each sequence."""
        yield from itertools.pairwise(self.seqstart_py)

    def split(self, x: Tensor, batch_sizes: Sequence[int] | None = None) -> list[Tensor]:
        """(1, total, ...) -> a tensor (1, seqlen, ...) a sequence, or (batch, seqlen, ...) where some came together."""
        if x.shape[:2] != (1, self.seqstart_py[-1]):
            raise ValueError(f"x has shape {tuple(x.shape)}; allowed: (1, {self.seqstart_py[-1]}, ...)")
        sizes = [1] * (len(self.seqstart_py) - 1) if batch_sizes is None else list(batch_sizes)
        bounds = [self.seqstart_py[n] for n in itertools.accumulate(sizes, initial=0)]
        parts = x.split([end - begin for begin, end in itertools.pairwise(bounds)], dim=1)
        return [part.unflatten(1, (n, part.shape[1] // n)).squeeze(0) for n, part in zip(sizes, parts, strict=True)]


@dataclass
class PaddedSeqLenInfo(SeqLenInfo):
    """Sequences that each have room for ``padding`` keys, of which the first ``seqlen`` are there."""

    seqlen: Tensor  # int32 (batch,)
    seqlen_py: list[int]
    padding: int

    @classmethod
    def from_seqlens_padded(
        cls, seqlens: Sequence[int], padding: int, *, device: torch.device | str | None = None
    ) -> PaddedSeqLenInfo:
        """Of the sequences' lengths and the room that each has."""
        if any(not 0 <= n <= padding for n in seqlens):
            raise ValueError(f"seqlens is {list(seqlens)}; allowed: 0 to {padding} (padding) each")
        starts = [padding * b for b in range(len(seqlens) + 1)]
        return cls(
            _int32(starts, device),
            max(seqlens, default=0),
            min(seqlens, default=0),
            starts,
            _int32(seqlens, device),
            list(seqlens),
            padding,
        )

    def intervals(self) -> Iterator[tuple[int, int]]:
        """(begin, end) of the keys that are there."""
        yield from ((begin, begin + n) for begin, n in zip(self.seqstart_py, self.seqlen_py, strict=False))


@dataclass
class GappySeqInfo(SeqLenInfo):
    """Sequences that begin anywhere. With pages, begin and ``seqlen`` (then the end) count in each one's own pages."""

    seqlen: Tensor  # int32 (batch,)
    seqlen_py: list[int]

    @classmethod
    def from_seqlens_gappy(
        cls,
        seqstarts: Sequence[int],
        seqlens: Sequence[int],
        paged: bool,
        *,
        device: torch.device | str | None = None,
    ) -> GappySeqInfo:
        """Of beginnings and lengths; without pages a last beginning is the total length."""
        wanted = len(seqlens) + (0 if paged else 1)
        if len(seqstarts) != wanted:
            raise ValueError(f"seqstarts has {len(seqstarts)} entries; allowed: {wanted}")
        starts = [*seqstarts, -1] if paged else list(seqstarts)
        ends = [begin + n for begin, n in zip(starts, seqlens, strict=False)] if paged else list(seqlens)
        return cls(
            _int32(starts, device),
            max(seqlens, default=0),
            min(seqlens, default=0),
            starts,
            _int32(ends, device),
            ends,
        )


# ------------------------------------------------------------------------------------------------- one sequence


class AttentionBias:
    """Base of all: what may be given as ``attn_bias``."""

    def to(self: _Bias, device: torch.device | str) -> _Bias:
        """The same with its tensors on a device."""
        names = getattr(self, "__dataclass_fields__", ())
        return type(self)(**{name: _moved(getattr(self, name), device) for name in names})


class LowerTriangularMask(AttentionBias):
    """Causal, aligned at the top left."""

    def __init__(self, device: torch.device | str | None = None) -> None:
        pass

    def add_bias(self, bias: Tensor) -> LowerTriangularMaskWithTensorBias:
        """The same with a bias that is added to the scores."""
        return LowerTriangularMaskWithTensorBias(bias)


class LowerTriangularMaskWithTensorBias(LowerTriangularMask):
    """Causal, aligned at the top left, with a bias that is added to the scores."""

    def __init__(self, bias: Tensor) -> None:
        self._bias = bias

    def to(self, device: torch.device | str) -> LowerTriangularMaskWithTensorBias:
        return type(self)(self._bias.to(device))


class LowerTriangularFromBottomRightMask(AttentionBias):
    """Causal, aligned at the bottom right."""

    def make_local_attention(self, window_size: int) -> LowerTriangularFromBottomRightLocalAttentionMask:
        """The same with a window of so many keys, a query's own included."""
        return LowerTriangularFromBottomRightLocalAttentionMask(window_size)


def _check_positive(window_size: int) -> None:
    if window_size <= 0:
        raise ValueError(f"window_size is {window_size}; allowed: >= 1")


@dataclass
class LowerTriangularFromBottomRightLocalAttentionMask(LowerTriangularFromBottomRightMask):
    """Causal, aligned at the bottom right, with a window of so many keys, a query's own included."""

    _window_size: int

    def __post_init__(self) -> None:
        _check_positive(self._window_size)


@dataclass
class LocalAttentionFromBottomRightMask(AttentionBias):
    """So many keys to the left and to the right of a query's own, aligned at the bottom right."""

    window_left: int
    window_right: int

    def __post_init__(self) -> None:
        for name in ("window_left", "window_right"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; allowed: >= 0")


# --------------------------------------------------------------------------------- sequences one after the other


def _in_one_row(tensors: Sequence[Tensor]) -> Tensor:
    """(batch, seqlen, ...) each -> (1, total, ...)."""
    return torch.cat([t.flatten(0, 1)[None] for t in tensors], dim=1)


@dataclass
class BlockDiagonalMask(AttentionBias):
    """Queries see all keys of their sequence."""

    q_seqinfo: SeqLenInfo
    k_seqinfo: SeqLenInfo
    _batch_sizes: Sequence[int] | None = None

    @classmethod
    def from_seqlens(
        cls: type[Any],
        q_seqlen: Sequence[int],
        kv_seqlen: Sequence[int] | None = None,
        *,
        device: torch.device | str | None = None,
    ) -> Any:
        """Of the lengths of each sequence's queries and, if they differ, keys."""
        queries = SeqLenInfo.from_seqlens(q_seqlen, device=device)
        if kv_seqlen is None or list(kv_seqlen) == list(q_seqlen):
            return cls(queries, queries)
        if len(kv_seqlen) != len(q_seqlen):
            raise ValueError(f"kv_seqlen has {len(kv_seqlen)} entries; allowed: {len(q_seqlen)}, as q_seqlen")
        return cls(queries, SeqLenInfo.from_seqlens(kv_seqlen, device=device))

    @classmethod
    def from_tensor_list(cls: type[Any], tensors: Sequence[Tensor]) -> tuple[Any, Tensor]:
        """Of (batch, seqlen, ...) tensors: the mask, and all sequences in one row (1, total, ...)."""
        mask, row, _, _ = cls.from_tensor_lists_qkv(tensors, tensors)
        return mask, row

    @classmethod
    def from_tensor_lists_qkv(
        cls: type[Any],
        tensors_q: Sequence[Tensor],
        tensors_k: Sequence[Tensor],
        tensors_v: Sequence[Tensor] | None = None,
    ) -> tuple[Any, Tensor, Tensor, Tensor | None]:
        """Of (batch, seqlen, ...) tensors: the mask, and queries, keys and values in one row (1, total, ...) each."""
        values = tensors_k if tensors_v is None else tensors_v
        for q, k, v in zip(tensors_q, tensors_k, values, strict=True):
            if q.shape[0] != k.shape[0] or v.shape[:2] != k.shape[:2]:
                raise ValueError(
                    f"query, key and value have shapes {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}; allowed: "
                    "one batch size, and as many values as keys"
                )
        lengths = [[t.shape[1] for t in tensors for _ in range(t.shape[0])] for tensors in (tensors_q, tensors_k)]
        mask = cls.from_seqlens(*lengths, device=tensors_q[0].device)
        mask._batch_sizes = [t.shape[0] for t in tensors_q]
        rows = [_in_one_row(tensors) for tensors in (tensors_q, tensors_k)]
        return mask, rows[0], rows[1], None if tensors_v is None else _in_one_row(tensors_v)

    def split_queries(self, tensor: Tensor) -> list[Tensor]:
        """(1, total_q, ...) -> the tensors that came in."""
        return self.q_seqinfo.split(tensor, self._batch_sizes)

    def split_kv(self, tensor: Tensor) -> list[Tensor]:
        """(1, total_k, ...) -> the tensors that came in."""
        return self.k_seqinfo.split(tensor, self._batch_sizes)

    def split(self, tensor: Tensor) -> list[Tensor]:
        """(1, total, ...) -> the tensors that came in, where queries and keys have the same lengths."""
        if self.q_seqinfo.seqstart_py != self.k_seqinfo.seqstart_py:
            raise ValueError("split is asked of queries and keys of other lengths; allowed: split_queries or split_kv")
        return self.split_queries(tensor)

    def _as(self, kind: type[Any], **more: int) -> Any:
        return kind(self.q_seqinfo, self.k_seqinfo, _batch_sizes=self._batch_sizes, **more)

    def make_causal(self) -> BlockDiagonalCausalMask:
        """Causal, aligned at the top left of each sequence."""
        return self._as(BlockDiagonalCausalMask)

    def make_causal_from_bottomright(self) -> BlockDiagonalCausalFromBottomRightMask:
        """Causal, aligned at the bottom right of each sequence."""
        return self._as(BlockDiagonalCausalFromBottomRightMask)

    def make_local_attention(self, window_size: int) -> BlockDiagonalCausalLocalAttentionMask:
        """Causal with a window, aligned at the top left."""
        return self._as(BlockDiagonalCausalLocalAttentionMask, _window_size=window_size)

    def make_local_attention_from_bottomright(
        self, window_size: int
    ) -> BlockDiagonalCausalLocalAttentionFromBottomRightMask:
        """Causal with a window, aligned at the bottom right."""
        return self._as(BlockDiagonalCausalLocalAttentionFromBottomRightMask, _window_size=window_size)


@dataclass
class BlockDiagonalCausalMask(BlockDiagonalMask):
    """Causal in each sequence, aligned at the top left."""


@dataclass
class BlockDiagonalCausalFromBottomRightMask(BlockDiagonalMask):
    """Causal in each sequence, aligned at the bottom right."""


@dataclass
class BlockDiagonalCausalLocalAttentionMask(BlockDiagonalCausalMask):
    """Causal in each sequence with a window of so many keys, a query's own included; aligned at the top left."""

    _window_size: int = 0

    def __post_init__(self) -> None:
        _check_positive(self._window_size)


@dataclass
class BlockDiagonalCausalLocalAttentionFromBottomRightMask(BlockDiagonalCausalFromBottomRightMask):
    """Causal in each sequence with a window of so many keys, a query's own included; aligned at the bottom right."""

    _window_size: int = 0

    def __post_init__(self) -> None:
        _check_positive(self._window_size)
