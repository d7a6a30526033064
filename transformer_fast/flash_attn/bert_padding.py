"""From padded batches to packed ones and back, with flash-attn's names, return values and gradients."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..masks import cu_seqlens_from_mask, repad, unpad

__all__ = [
    "index_first_axis",
    "index_put_first_axis",
    "pad_input",
    "unpad_input",
    "unpad_input_for_concatenated_sequences",
]


def index_first_axis(input: Tensor, indices: Tensor) -> Tensor:  # noqa: A002
    """(rows, ...) at int ``indices`` (total,) -> (total, ...)."""
    return input.index_select(0, indices)


def index_put_first_axis(values: Tensor, indices: Tensor, first_axis_dim: int) -> Tensor:
    """(total, ...) -> (first_axis_dim, ...): zeros, and the values at the int ``indices`` (total,), all different."""
    return repad(values, indices.long(), 1, first_axis_dim)[0]


def unpad_input(
    hidden_states: Tensor, attention_mask: Tensor, unused_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    """Packs the tokens of a padded batch.

    Args:
        hidden_states: (batch, seqlen, ...).
        attention_mask: (batch, seqlen), bool or numbers; not zero is a token. Any pattern.
        unused_mask: likewise, places that are packed too but hold no token.

    Returns:
        the packed (total, ...); ``indices`` int64 (total,) of the flattened batch; ``cu_seqlens`` int32 (batch + 1,);
        the longest sequence as an int; ``seqused`` int32 (batch,), the tokens of each sequence.

    Raises:
        ValueError: a mask is of another shape.
    """
    _check_mask(hidden_states, attention_mask, "attention_mask")
    if unused_mask is not None:
        _check_mask(hidden_states, unused_mask, "unused_mask")
    tokens = attention_mask.bool()
    kept = tokens if unused_mask is None else tokens | unused_mask.bool()
    indices, cu_seqlens, max_seqlen = cu_seqlens_from_mask(kept)
    return unpad(hidden_states, indices), indices, cu_seqlens, max_seqlen, tokens.sum(-1, dtype=torch.int32)


def unpad_input_for_concatenated_sequences(
    hidden_states: Tensor, attention_mask_in_length: Tensor
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Packs a batch whose rows hold several sequences each, one after the other, then padding.

    Args:
        hidden_states: (batch, seqlen, ...).
        attention_mask_in_length: int (batch, seqlen), the lengths of a row's sequences in order, and zeros: ``[2, 3, 0,
            0, 0, 0]`` is a row of a sequence of 2, one of 3, and a place of padding.

    Returns:
        the packed (total, ...); ``indices`` int64 (total,) of the flattened batch; ``cu_seqlens`` int32 (sequences +
        1,); the longest sequence as an int.

    Raises:
        ValueError: the mask is of another shape, or the sequences of a row are longer than the row.
    """
    _check_mask(hidden_states, attention_mask_in_length, "attention_mask_in_length")
    rows, seqlen = attention_mask_in_length.sum(-1, keepdim=True), attention_mask_in_length.shape[1]
    indices, _, _ = cu_seqlens_from_mask(torch.arange(seqlen, device=rows.device) < rows)
    lengths = attention_mask_in_length[attention_mask_in_length != 0]
    cu_seqlens = F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    if int(cu_seqlens[-1]) != indices.shape[0]:
        raise ValueError(
            f"attention_mask_in_length has rows of {rows.flatten().tolist()} tokens; allowed: 0 to {seqlen}"
        )
    return unpad(hidden_states, indices), indices, cu_seqlens, int(lengths.max()) if lengths.numel() else 0


def _check_mask(hidden_states: Tensor, mask: Tensor, name: str) -> None:
    if mask.shape != hidden_states.shape[:2]:
        shape = tuple(hidden_states.shape[:2])
        raise ValueError(f"{name} has shape {tuple(mask.shape)}; allowed: {shape}, as hidden_states")


def pad_input(hidden_states: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """The way back: (total, ...) at ``indices`` of the flattened batch -> (batch, seqlen, ...), zeros elsewhere."""
    return repad(hidden_states, indices.long(), batch, seqlen)
