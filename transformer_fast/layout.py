"""The memory order of what the library allocates; fake tensors ask here too, so promise and result agree."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor

#: The dimensions of query, key and value, and after an arrow those of the output: "bhsd" is (batch, num_heads, seqlen,
#: head_dim), which the library has everywhere but where callers have another; packed problems have theirs.
Order = Literal["bhsd", "bshd", "bhsd->bshd"]


def exchanged(numbers: Sequence[int]) -> tuple[int, ...]:
    """Sizes or strides of one order in the other."""
    return (numbers[0], numbers[2], numbers[1], *numbers[3:])


def output_layout(
    shape: Sequence[int], stride: Sequence[int], head_dim_v: int, order: Order = "bhsd"
) -> tuple[tuple[int, ...], ...]:
    """Shape and strides of an output in the memory order of the query: a (b, s, h, d) model gets (b, s, h, d) back.

    Args:
        shape, stride: of the query, (batch, num_heads, seqlen_q, head_dim) or packed (total_q, num_heads, head_dim).
        order: where its output is of the other order, that is the order in memory; shape and strides are as ever.
    """
    if len(shape) == 3:
        return (*shape[:2], head_dim_v), (shape[1] * head_dim_v, head_dim_v, 1)
    batch, num_heads, seqlen_q = shape[:3]
    out = (batch, num_heads, seqlen_q, head_dim_v)
    per_batch = num_heads * seqlen_q * head_dim_v
    if order != "bhsd" or stride[1] < stride[2]:
        return out, (per_batch, head_dim_v, num_heads * head_dim_v, 1)
    return out, (per_batch, seqlen_q * head_dim_v, head_dim_v, 1)


def new_output(query: Tensor, head_dim_v: int) -> Tensor:
    """An uninitialised output for this query."""
    return query.new_empty_strided(*output_layout(query.shape, query.stride(), head_dim_v))


def row_strides(stride: Sequence[int], packed: bool) -> tuple[int, int, int]:
    """(batch, head, row) strides of a padded (b, h, s, d) or a packed (s, h, d) operand."""
    return (0, stride[1], stride[0]) if packed else (stride[0], stride[1], stride[2])


def broadcast_strides(shape: Sequence[int], stride: Sequence[int]) -> tuple[int, ...]:
    """Strides with 0 where a dimension of one element broadcasts."""
    return tuple(0 if n == 1 else s for n, s in zip(shape, stride, strict=True))
