"""``xformers.ops``: memory_efficient_attention and its mask classes, with no xformers installed.

``import transformer_fast.dropin.xformers as xops`` stands in for ``import xformers.ops as xops``: ``xops.fmha`` and
``xops.fmha.attn_bias`` are this module too. Masks may be those below or xformers' own: they are known by the name of
their class and read by their attributes.
"""

from __future__ import annotations

import itertools
import sys
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..attention import attention_varlen, four_dims
from ..ops import run
from ..spec import Operands, options_of
from .varlen import packed_over_pages
from .xformers_bias import (
    AttentionBias,
    BlockDiagonalCausalFromBottomRightMask,
    BlockDiagonalCausalLocalAttentionFromBottomRightMask,
    BlockDiagonalCausalLocalAttentionMask,
    BlockDiagonalCausalMask,
    BlockDiagonalMask,
    LocalAttentionFromBottomRightMask,
    LowerTriangularFromBottomRightLocalAttentionMask,
    LowerTriangularFromBottomRightMask,
    LowerTriangularMask,
    LowerTriangularMaskWithTensorBias,
)
from .xformers_cache import (
    BlockDiagonalCausalLocalAttentionPaddedKeysMask,
    BlockDiagonalCausalWithOffsetGappyKeysMask,
    BlockDiagonalCausalWithOffsetPaddedKeysMask,
    BlockDiagonalGappyKeysMask,
    BlockDiagonalLocalAttentionPaddedKeysMask,
    BlockDiagonalPaddedKeysMask,
    PagedBlockDiagonalCausalWithOffsetGappyKeysMask,
    PagedBlockDiagonalCausalWithOffsetPaddedKeysMask,
    PagedBlockDiagonalGappyKeysMask,
    PagedBlockDiagonalPaddedKeysMask,
)

__all__ = [
    "AttentionBias",
    "AttentionMask",
    "BlockDiagonalCausalFromBottomRightMask",
    "BlockDiagonalCausalLocalAttentionFromBottomRightMask",
    "BlockDiagonalCausalLocalAttentionMask",
    "BlockDiagonalCausalLocalAttentionPaddedKeysMask",
    "BlockDiagonalCausalMask",
    "BlockDiagonalCausalWithOffsetGappyKeysMask",
    "BlockDiagonalCausalWithOffsetPaddedKeysMask",
    "BlockDiagonalGappyKeysMask",
    "BlockDiagonalLocalAttentionPaddedKeysMask",
    "BlockDiagonalMask",
    "BlockDiagonalPaddedKeysMask",
    "LocalAttentionFromBottomRightMask",
    "LowerTriangularFromBottomRightLocalAttentionMask",
    "LowerTriangularFromBottomRightMask",
    "LowerTriangularMask",
    "LowerTriangularMaskWithTensorBias",
    "PagedBlockDiagonalCausalWithOffsetGappyKeysMask",
    "PagedBlockDiagonalCausalWithOffsetPaddedKeysMask",
    "PagedBlockDiagonalGappyKeysMask",
    "PagedBlockDiagonalPaddedKeysMask",
    "attn_bias",
    "fmha",
    "memory_efficient_attention",
    "memory_efficient_attention_forward",
    "memory_efficient_attention_forward_requires_grad",
]

AttentionMask = AttentionBias
fmha = attn_bias = sys.modules[__name__]


_Found = tuple[Tensor, Tensor | None]  # the result, and lse where it is needed


class _Kind(NamedTuple):
    """What the name of a class means."""

    keys: str  # where a sequence's keys are: "dense" tensors, or for each sequence "packed", "padded", "gappy", "paged"
    window: str = "all"  # which of them a query sees: see _window
    top_left: bool = False  # the first query stands at the first key, not the last at the last


_KINDS = {
    "LowerTriangularMask": _Kind("dense", "causal", top_left=True),
    "LowerTriangularMaskWithTensorBias": _Kind("dense", "causal", top_left=True),
    "LowerTriangularFromBottomRightMask": _Kind("dense", "causal"),
    "LowerTriangularFromBottomRightLocalAttentionMask": _Kind("dense", "causal_local"),
    "LocalAttentionFromBottomRightMask": _Kind("dense", "local"),
    "BlockDiagonalMask": _Kind("packed"),
    "BlockDiagonalCausalMask": _Kind("packed", "causal", top_left=True),
    "BlockDiagonalCausalFromBottomRightMask": _Kind("packed", "causal"),
    "BlockDiagonalCausalLocalAttentionMask": _Kind("packed", "causal_local", top_left=True),
    "BlockDiagonalCausalLocalAttentionFromBottomRightMask": _Kind("packed", "causal_local"),
    "BlockDiagonalPaddedKeysMask": _Kind("padded"),
    "BlockDiagonalCausalWithOffsetPaddedKeysMask": _Kind("padded", "causal"),
    "BlockDiagonalLocalAttentionPaddedKeysMask": _Kind("padded", "local"),
    "BlockDiagonalCausalLocalAttentionPaddedKeysMask": _Kind("padded", "causal_local"),
    "BlockDiagonalGappyKeysMask": _Kind("gappy"),
    "BlockDiagonalCausalWithOffsetGappyKeysMask": _Kind("gappy", "causal"),
    "PagedBlockDiagonalPaddedKeysMask": _Kind("paged"),
    "PagedBlockDiagonalCausalWithOffsetPaddedKeysMask": _Kind("paged", "causal"),
    "PagedBlockDiagonalGappyKeysMask": _Kind("paged_gappy"),
    "PagedBlockDiagonalCausalWithOffsetGappyKeysMask": _Kind("paged_gappy", "causal"),
}
#: What a class of that name defines, and a subclass that changes it is another mask.
_MEANING = ("materialize", "_create_block_mask")


def memory_efficient_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Any = None,
    p: float = 0.0,
    scale: float | None = None,
    *,
    op: Any = None,
    output_dtype: torch.dtype | None = None,
) -> Tensor:
    """``xformers.ops.memory_efficient_attention`` on any device, differentiable.

    Args:
        query: (batch, seqlen_q, num_heads, head_dim), (batch, seqlen_q, head_dim), or in groups of heads
            (batch, seqlen_q, groups, heads, head_dim); float32, bfloat16, float16 or float64.
        key: the same with seqlen_k. Heads that share keys and values may be ``expand``-ed ones, as xformers has it,
            which are read once, or left out: (batch, seqlen_k, num_kv_heads, head_dim), or 1 in place of heads.
        value: as the key; its head_dim may differ.
        attn_bias: None; a floating tensor that is added to the scores, broadcastable to (batch, num_heads, seqlen_q,
            seqlen_k), without heads for three dimensions and with groups for five; or one of the mask classes here or
            in xformers. Those for a cache (padded, gappy and paged keys) are for inference: no gradient, no dropout.
        p: probability of dropping an attention weight.
        scale: of the scores; default ``head_dim ** -0.5``.
        op: None: which kernel runs is chosen here.
        output_dtype: of the result; default the query's.

    Returns:
        shaped as the query, with the value's head_dim. A query that sees no key gives 0.

    Raises:
        ValueError, TypeError: an argument is wrong; the message names it, its value and what is allowed.
    """
    return _attend(query, key, value, attn_bias, p, scale, op, output_dtype)[0]


def memory_efficient_attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Any = None,
    p: float = 0.0,
    scale: float | None = None,
    *,
    op: Any = None,
    output_dtype: torch.dtype | None = None,
) -> Tensor:
    """:func:`memory_efficient_attention` without gradients."""
    with torch.no_grad():
        return _attend(query, key, value, attn_bias, p, scale, op, output_dtype)[0]


def memory_efficient_attention_forward_requires_grad(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Any = None,
    p: float = 0.0,
    scale: float | None = None,
    *,
    op: Any = None,
    output_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`memory_efficient_attention` and the log-sum-exp of each query's scores, both without gradients.

    Returns:
        the result, and lse, float32, (batch, num_heads, seqlen_q), with groups (batch, groups, heads, seqlen_q), for
        one row of sequences (1, num_heads, total_q).
    """
    if p != 0.0:
        raise ValueError(f"p is {p}; allowed: 0.0, since what was dropped is not returned")
    with torch.no_grad():
        out, lse = _attend(query, key, value, attn_bias, p, scale, op, output_dtype, need_lse=True)
    assert lse is not None
    return out, lse


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Any,
    p: float,
    scale: float | None,
    op: Any,
    output_dtype: torch.dtype | None,
    need_lse: bool = False,
) -> _Found:
    """The result and, if needed, the lse in the caller's shapes."""
    if op is not None:
        raise ValueError(f"op is {op!r}; allowed: None (which kernel runs is chosen here)")
    for name, t in (("query", query), ("key", key), ("value", value)):
        if not isinstance(t, Tensor):
            raise TypeError(f"{name} is of type {type(t).__name__}; allowed: a torch.Tensor")
    if not (output_dtype is None or isinstance(output_dtype, torch.dtype)):
        raise TypeError(f"output_dtype is {output_dtype!r}; allowed: None or a torch.dtype")
    kind = None if attn_bias is None or isinstance(attn_bias, Tensor) else _kind_of(attn_bias)
    bias = attn_bias if isinstance(attn_bias, Tensor) else getattr(attn_bias, "_bias", None)
    shape = query.shape
    q, k, v = _with_heads(query, key, value)
    if kind is None or kind.keys == "dense":
        out, lse = _dense(q, k, v, _window(attn_bias, kind), kind, _bias_with_heads(bias, query), scale, p, need_lse)
    else:
        if not q.shape[0] == k.shape[0] == v.shape[0] == 1:
            raise ValueError(
                f"query, key and value have batch {q.shape[0]}, {k.shape[0]} and {v.shape[0]} with "
                f"{type(attn_bias).__name__}; allowed: 1, all sequences in one row"
            )
        _check_totals(q, k, attn_bias, kind)
        attend = _packed if kind.keys == "packed" else _cached
        out, lse = attend(q, k, v, attn_bias, kind, scale, p, need_lse)
    if len(shape) != 4:
        out = out.reshape(*shape[:-1], value.shape[-1])
    if len(shape) == 5 and lse is not None:
        lse = lse.unflatten(1, shape[2:4])  # (batch, groups * heads, seqlen_q) -> (batch, groups, heads, seqlen_q)
    return out if output_dtype is None else out.to(output_dtype), lse


def _kind_of(bias: Any) -> _Kind:
    """What a mask object means, by the names of its class and that one's bases."""
    own = type(bias)
    for cls in own.__mro__:
        kind = _KINDS.get(cls.__name__)
        if kind is not None:
            if all(getattr(own, name, None) is getattr(cls, name, None) for name in _MEANING):
                return kind
            break
    name, known = f"{own.__module__}.{own.__qualname__}", ", ".join(_KINDS)
    raise TypeError(f"attn_bias is of type {name}; allowed: None, a torch.Tensor, or {known}")


def _window(bias: Any, kind: _Kind | None) -> tuple[int, int]:
    """(left, right) keys beside a query's own, -1 for all."""
    if kind is None or kind.window == "all":
        return -1, -1
    if kind.window == "causal":
        return -1, 0
    if kind.window == "local":
        return bias.window_left, bias.window_right
    return bias._window_size - 1, 0  # xformers counts the query's own key


def _check_totals(q: Tensor, k: Tensor, bias: Any, kind: _Kind) -> None:
    """The row holds as many queries and keys as the mask counts; a cache may hold more keys."""
    rows, keys = bias.q_seqinfo.seqstart_py[-1], bias.k_seqinfo.seqstart_py[-1]
    if q.shape[1] != rows or (kind.keys == "packed" and k.shape[1] != keys):
        raise ValueError(
            f"attn_bias is for {rows} queries and {keys} keys in all, query and key have {q.shape[1]} and "
            f"{k.shape[1]}; allowed: the same totals"
        )


def _with_heads(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(batch, seqlen, num_heads, head_dim) each, without the copies that expanded KV heads are."""
    dims = query.dim()
    if dims not in (3, 4, 5) or key.dim() != dims or value.dim() != dims:
        shapes = ", ".join(str(tuple(t.shape)) for t in (query, key, value))
        raise ValueError(
            f"query, key and value have shapes {shapes}; allowed: (batch, seqlen, num_heads, head_dim) each, or "
            "without heads, or (batch, seqlen, groups, heads, head_dim)"
        )
    if key.shape[1] != value.shape[1]:
        raise ValueError(f"value has seqlen {value.shape[1]}; allowed: {key.shape[1]}, as the key")
    if dims == 3:
        return query[:, :, None], key[:, :, None], value[:, :, None]
    are_one = all(t.shape[-2] == 1 or (t.stride(-2) == 0 and t.shape[-2] == query.shape[-2]) for t in (key, value))
    if dims == 4:
        return (query, key[:, :, :1], value[:, :, :1]) if are_one else (query, key, value)
    if key.shape[2] != query.shape[2] or (not are_one and key.shape[3] != query.shape[3]):
        raise ValueError(
            f"key has {tuple(key.shape[2:4])} groups and heads; allowed: {tuple(query.shape[2:4])}, as the query, or "
            "1 head a group"
        )
    # Query head g * heads + h uses KV head g: heads in groups are next to each other in both.
    k, v = (t[:, :, :, 0] if are_one else t.flatten(2, 3) for t in (key, value))
    return query.flatten(2, 3), k, v


def _bias_with_heads(bias: Tensor | None, query: Tensor) -> Tensor | None:
    """A bias for (batch, num_heads, seqlen_q, seqlen_k)."""
    if bias is None:
        return None
    if not bias.is_floating_point():
        dtype = str(bias.dtype).removeprefix("torch.")
        raise TypeError(f"attn_bias has dtype {dtype}; allowed: a floating one, which is added to the scores")
    if bias.dim() != query.dim():
        raise ValueError(f"attn_bias has {bias.dim()} dimensions; allowed: {query.dim()}, as the query")
    if bias.dim() == 3:
        return bias[:, None]
    return bias if bias.dim() == 4 else bias.expand(-1, *query.shape[2:4], -1, -1).flatten(1, 2)


def _dense(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: tuple[int, int],
    kind: _Kind | None,
    bias: Tensor | None,
    scale: float | None,
    p: float,
    need_lse: bool,
) -> _Found:
    """(batch, seqlen_q, num_heads, head_dim_v) and lse (batch, num_heads, seqlen_q)."""
    if kind is not None and kind.top_left:
        (left, right), rows, keys = window, q.shape[1], k.shape[1]
        if left >= 0 and rows > keys + left:  # the rows from there on see no key
            out, lse = _dense(q[:, : keys + left], k, v, window, kind, bias, scale, p, need_lse)
            unseen = rows - keys - left
            lse = None if lse is None else F.pad(lse, (0, unseen), value=float("-inf"))
            return F.pad(out, (0, 0, 0, 0, 0, unseen)), lse
        if bias is not None and bias.shape[-1] not in (1, keys):
            raise ValueError(f"attn_bias has shape {tuple(bias.shape)}; allowed: {keys} keys, or 1")
        # Positions are counted from the last key: keys that no query reaches are left out; each missing one moves the
        # window by one to the right.
        if keys > rows:
            k, v = k[:, :rows], v[:, :rows]
        if bias is not None and bias.shape[-1] > rows:
            bias = bias[..., :rows]
        missing = rows - k.shape[1]
        window = (left - missing if left >= 0 else -1, right + missing)
    # Not by attention(), for which the views to and from its order would take longer than all of this.
    options = options_of(False, window, scale, None, p, False, "auto")
    return run(Operands(q, k, v, bias=four_dims(bias)), options, need_lse, "bshd")


def _packed(
    q: Tensor, k: Tensor, v: Tensor, bias: Any, kind: _Kind, scale: float | None, p: float, need_lse: bool
) -> _Found:
    """One row of sequences, (1, total, num_heads, head_dim): the result, and lse (1, num_heads, total_q)."""
    queries, keys, window = bias.q_seqinfo, bias.k_seqinfo, _window(bias, kind)
    if kind.top_left and queries.seqstart_py != keys.seqstart_py:
        # Where a sequence has other numbers of queries and keys, the two alignments differ, by another amount in each.
        q_starts, k_starts = queries.seqstart_py, keys.seqstart_py
        q_parts, k_parts, v_parts = (
            [t[:, begin:end] for begin, end in itertools.pairwise(starts)]
            for t, starts in ((q, q_starts), (k, k_starts), (v, k_starts))
        )
        parts = zip(q_parts, k_parts, v_parts, strict=True)
        outs, lses = zip(*(_dense(*part, window, kind, None, scale, p, need_lse) for part in parts), strict=True)
        return torch.cat(outs, dim=1), torch.cat(lses, dim=2) if need_lse else None
    found = attention_varlen(
        q[0],
        k[0],
        v[0],
        queries.seqstart,
        keys.seqstart,
        max(queries.max_seqlen, 0),
        max(keys.max_seqlen, 0),
        window_size=window,
        softmax_scale=scale,
        dropout_p=p,
        return_lse=need_lse,
    )
    return _one_row(found)


def _one_row(found: Tensor | tuple[Tensor, Tensor]) -> _Found:
    """The result of packed sequences, and lse where there is one, as a batch of one."""
    if isinstance(found, Tensor):
        return found[None], None
    out, lse = found
    return out[None], lse[None]


def _cached(
    q: Tensor, k: Tensor, v: Tensor, bias: Any, kind: _Kind, scale: float | None, p: float, need_lse: bool
) -> _Found:
    """One row of sequences whose keys lie in a cache: the result, and lse (1, num_heads, total_q)."""
    if p != 0.0:
        raise ValueError(f"p is {p} with {type(bias).__name__}; allowed: 0.0")
    info = bias.k_seqinfo
    batch, page_size, lengths = len(info.seqlen_py), 1, info.seqlen
    if kind.keys == "padded":  # the room of each sequence is a page
        page_size = info.padding
        table = torch.arange(batch, dtype=torch.int32, device=lengths.device)[:, None]
    elif kind.keys == "paged":
        page_size, table = bias.page_size, bias.block_tables
    else:  # each key is a page
        starts = info.seqstart[:batch]
        place = starts[:, None] + torch.arange(info.max_seqlen, dtype=torch.int32, device=lengths.device)
        if kind.keys == "paged_gappy":
            lengths = lengths - starts
            page = (place // bias.page_size).clamp(max=bias.block_tables.shape[1] - 1)
            table = bias.block_tables.gather(1, page.long()) * bias.page_size + place % bias.page_size
        else:
            table = place
    if k.shape[1] % page_size:
        raise ValueError(f"key has {k.shape[1]} rows; allowed: a multiple of {page_size}, the room of a page")
    k, v = (t[0].unflatten(0, (t.shape[1] // page_size, page_size)) for t in (k, v))
    found = packed_over_pages(
        q[0],
        k,
        v,
        bias.q_seqinfo.seqstart,
        max(bias.q_seqinfo.max_seqlen, 0),
        table,
        lengths,
        window_size=_window(bias, kind),
        softmax_scale=scale,
        return_lse=need_lse,
    )
    return _one_row(found)
