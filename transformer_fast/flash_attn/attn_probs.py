"""``return_attn_probs``: softmax_lse and S_dmask, by which tests learn which probabilities dropout took.

S_dmask has no kernel of its own. Attention whose values are the rows of a unit matrix returns its probabilities, so two
more calls, without dropout and with it from the same random state, say all of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..attention import attention, attention_varlen

#: head_dim up to -> keys in a block of S_dmask without and with dropout, as on sm_80 and sm_90.
_BLOCK_SIZES = ((32, 128, 128), (64, 128, 64), (96, 64, 64), (128, 64, 32), (160, 32, 32), (256, 64, 64))
#: Its sides are multiples of this.
ROUND = 128


def attention_with_probs(
    query: Tensor, key: Tensor, value: Tensor, arguments: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor]:
    """Tensors of (batch, heads, seqlen, head_dim) to (out (batch, seqlen, heads, head_dim_v), lse, S_dmask)."""
    state = _random_state(query)
    out, lse = attention(query, key, value, **arguments, return_lse=True)
    if arguments["dropout_p"] == 0.0:
        return out.transpose(1, 2), lse, query.new_empty(0)
    unit = _unit(key.shape[2], query)
    wide, keys = query.detach().to(unit.dtype), key.detach().to(unit.dtype)
    unit = unit.expand(*key.shape[:2], *unit.shape)
    plain, dropped = _twice(lambda **options: attention(wide, keys, unit, **options), state, query, arguments)
    return out.transpose(1, 2), lse, _s_dmask(plain, dropped, query)


def attention_varlen_with_probs(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    arguments: dict[str, Any],
) -> tuple[Tensor, Tensor, Tensor]:
    """Packed tensors to (out, lse (heads, total_q), S_dmask (batch, heads, ...))."""
    lengths = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
    state = _random_state(query)
    out, lse = attention_varlen(query, key, value, *lengths, **arguments, return_lse=True)
    if arguments["dropout_p"] == 0.0:
        return out, lse, query.new_empty(0)
    unit = _unit(max_seqlen_k, query)[places(cu_seqlens_k)[1]]
    wide, keys = query.detach().to(unit.dtype), key.detach().to(unit.dtype)
    unit = unit.unsqueeze(1).expand(-1, key.shape[1], -1)
    packed = _twice(lambda **options: attention_varlen(wide, keys, unit, *lengths, **options), state, query, arguments)
    rows = places(cu_seqlens_q)
    shape = (cu_seqlens_q.shape[0] - 1, max_seqlen_q, query.shape[1], max_seqlen_k)
    plain, dropped = (p.new_zeros(shape).index_put(rows, p).transpose(1, 2) for p in packed)
    return out, lse, _s_dmask(plain, dropped, query)


def places(cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """Of each packed token: the sequence that it is of, and its place in it, int64 (total,)."""
    lengths = cu_seqlens.diff().long()
    sequence = torch.repeat_interleave(torch.arange(lengths.shape[0], device=cu_seqlens.device), lengths)
    return sequence, torch.arange(sequence.shape[0], device=cu_seqlens.device) - cu_seqlens.long()[sequence]


def block_size(head_dim: int, is_dropout: bool) -> int:
    """Keys in a block: the maximum that a number of S_dmask is relative to is that of its block and the later ones."""
    row = next((row for row in _BLOCK_SIZES if head_dim <= row[0]), _BLOCK_SIZES[-1])
    return row[2] if is_dropout else row[1]


def _random_state(query: Tensor) -> Tensor:
    return torch.cuda.get_rng_state(query.device) if query.is_cuda else torch.get_rng_state()


def _unit(size: int, query: Tensor) -> Tensor:
    return torch.eye(size, dtype=torch.promote_types(query.dtype, torch.float32), device=query.device)


def _twice(
    attend: Callable[..., Any], state: Tensor, query: Tensor, arguments: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """What ``attend`` returns without dropout, and with that which ``state`` leads to.

    The random state ends where the call that began with ``state`` has left it: the same numbers are drawn again.
    """
    with torch.no_grad(), torch.autocast(query.device.type, enabled=False):
        if query.is_cuda:
            torch.cuda.set_rng_state(state, query.device)
        else:
            torch.set_rng_state(state)
        dropped = attend(**arguments)
        return attend(**arguments | {"dropout_p": 0.0}), dropped


def _s_dmask(plain: Tensor, dropped: Tensor, query: Tensor) -> Tensor:
    """Probabilities (batch, heads, seqlen_q, seqlen_k) before and after dropout to S_dmask."""
    seqlen_q, seqlen_k = plain.shape[2:]
    block = block_size(query.shape[-1], True)
    blocks = F.pad(plain, (0, -seqlen_k % block)).unflatten(-1, (-1, block))
    later = blocks.amax(-1).flip(-1).cummax(-1).values.flip(-1)  # flash-attn goes from the last block to the first
    relative = (blocks / later.unsqueeze(-1)).nan_to_num(0.0).flatten(-2)[..., :seqlen_k]
    signed = torch.where((dropped == 0) & (plain > 0), -relative, relative)
    return F.pad(signed, (0, -seqlen_k % ROUND, 0, -seqlen_q % ROUND)).to(query.dtype)
