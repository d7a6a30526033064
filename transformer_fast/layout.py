"""The memory order of what the library allocates; fake tensors ask here too, so promise and result agree."""

from __future__ import annotations

from torch import Tensor


def new_output(query: Tensor, head_dim_v: int) -> Tensor:
    """An uninitialised output in the memory order of the query: a (b, s, h, d) model gets (b, s, h, d) back.

    Args:
        query: (batch, num_heads, seqlen_q, head_dim) or packed (total_q, num_heads, head_dim).
    """
    if query.dim() == 3:
        return query.new_empty((*query.shape[:2], head_dim_v))
    batch, num_heads, seqlen_q, _ = query.shape
    if query.stride(1) < query.stride(2):
        return query.new_empty((batch, seqlen_q, num_heads, head_dim_v)).transpose(1, 2)
    return query.new_empty((batch, num_heads, seqlen_q, head_dim_v))
