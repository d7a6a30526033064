"""FlexAttention's call, run by this library's kernels where its mask is one that they know.

``from transformer_fast.dropin.flex import flex_attention`` in place of torch's: the same arguments, and the block mask
that :func:`torch.nn.attention.flex_attention.create_block_mask` made. It needs no compiler, and on a CPU it has
gradients, which torch's refuses there, and lse, which torch's has there only uncompiled.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from ..attention import attention, attention_varlen
from ..spec import UnsupportedError, parse_flag
from .flex_masks import RecognizedMask, recognize
from .flex_watch import Watch

__all__ = ["RecognizedMask", "flex_attention", "recognize"]

#: Where a block mask keeps what was recognized of it.
_CACHE = "_transformer_fast_recognized"


def flex_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_mod: Any = None,
    block_mask: Any = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    kernel_options: dict[str, Any] | None = None,
    *,
    return_aux: Any = None,
) -> Any:
    """``torch.nn.attention.flex_attention.flex_attention`` for masks, through :func:`attention`.

    A block mask is read once (:func:`recognize`) and what it says is kept on it, until something that its ``mask_mod``
    reads changes; where it reads what cannot be watched (a ``torch.nn.Module``, an array of NumPy, ``getattr``), it is
    read in each call. A write that PyTorch does not count, by ``t.data.fill_()`` or into the NumPy array behind a
    tensor, cannot be seen: then use ``recognize()``, or make a new block mask. Its block lists are honoured, which
    PyTorch's uncompiled ``flex_attention`` ignores.

    Causal, sliding-window, padding and document masks, and what ``and_masks`` makes of them, run as intervals, in time
    proportional to visible keys; documents of a batch of more than one are flattened, which copies query, key and value
    unless they lie in memory as (batch, seqlen, num_heads, head_dim). Any other mask (prefix-LM, masks that differ by
    head) runs as a dense boolean mask, exactly, with its empty tiles skipped on the CPU. Under ``torch.compile`` a
    block mask breaks the graph; give what ``recognize`` made of it instead.

    Args:
        query: (batch, num_heads, seqlen_q, head_dim), any dtype of :func:`attention`.
        key: (batch or 1, num_kv_heads, seqlen_k, head_dim).
        value: (batch or 1, num_kv_heads, seqlen_k, head_dim_v).
        score_mod: None. Arbitrary functions of scores need a compiler; softcap, ALiBi and additive biases are
            arguments of :func:`attention`.
        block_mask: None, a ``BlockMask`` for exactly these lengths, or what :func:`recognize` made of one.
        scale: default ``head_dim ** -0.5``.
        enable_gqa: must be True where num_kv_heads is not num_heads, which it then divides.
        return_lse: also return lse, natural logarithm. (Deprecated by PyTorch in favour of ``return_aux``.)
        kernel_options: tuning of PyTorch's own kernels. It changes no result, and nothing here; a ``BACKEND`` other
            than "AUTO" asks for one of those kernels and is refused.
        return_aux: an ``AuxRequest``; ``max_scores`` is refused.

    Returns:
        (batch, num_heads, seqlen_q, head_dim_v); with ``return_lse`` also lse (batch, num_heads, seqlen_q), float32;
        with ``return_aux`` also an ``AuxOutput``. A row that sees nothing gives 0 and -inf. All differentiable with
        respect to query, key and value.

    Raises:
        UnsupportedError: a ``score_mod``, a mask that is too large for a boolean mask and no interval, ``max_scores``,
            or a ``BACKEND``; the message says what does it.
        ValueError, TypeError: an argument is wrong.
    """
    try:
        (batch, num_heads, seqlen_q, _), (kv_batch, kv_heads, seqlen_k, _) = query.shape, key.shape
    except (AttributeError, ValueError):
        _refuse_shapes(query, key)
        raise
    if not enable_gqa and kv_heads != num_heads:
        raise ValueError(f"key has {kv_heads} heads and query {num_heads}; allowed: as many, or enable_gqa=True")
    if not (score_mod is None and kernel_options is None and return_aux is None and return_lse is False):
        _check(score_mod, kernel_options, return_lse, return_aux)
    if kv_batch == 1 < batch:
        key = key.expand(batch, *key.shape[1:])
        if isinstance(value, Tensor) and value.dim() == 4 and value.shape[0] == 1:  # if not, attention() says so
            value = value.expand(batch, *value.shape[1:])
    need_lse = return_lse or (return_aux is not None and bool(return_aux.lse))
    if block_mask is None:
        result = attention(query, key, value, softmax_scale=scale, return_lse=need_lse)
    else:
        mask = block_mask
        if type(mask) is not RecognizedMask:
            recognized = _recognized_apart if torch.compiler.is_compiling() else _recognized
            mask = recognized(mask, batch, num_heads)
        given, due = (batch, num_heads, seqlen_q, seqlen_k), (mask.batch, mask.num_heads, *mask.seq_lengths)
        if given != due:
            raise ValueError(
                f"block_mask is for (batch, num_heads, seqlen_q, seqlen_k) {due}; query and key have {given}; "
                "allowed: the same"
            )
        result = _run(query, key, value, mask, scale, need_lse)
    if return_aux is None:
        return result
    from torch.nn.attention.flex_attention import AuxOutput

    out, lse = result if need_lse else (result, None)
    return out, AuxOutput(lse=lse)


def _refuse_shapes(query: Any, key: Any) -> None:
    for name, tensor in (("query", query), ("key", key)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} is of type {type(tensor).__name__}; allowed: a torch.Tensor")
        if tensor.dim() != 4:
            shape = "(batch, num_heads, seqlen, head_dim)"
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; allowed: 4 dimensions {shape}")


def _check(score_mod: Any, kernel_options: Any, return_lse: Any, aux: Any) -> None:
    """What attention() has no argument for."""
    if score_mod is not None:
        raise UnsupportedError(
            f"score_mod={getattr(score_mod, '__name__', score_mod)}; allowed: None. Softcap, ALiBi and additive biases "
            "are arguments of transformer_fast.attention (softcap, alibi_slopes, bias), masks belong into block_mask; "
            "for any other function use torch.nn.attention.flex_attention.flex_attention"
        )
    parse_flag(return_lse, "return_lse")
    if aux is not None:
        if return_lse:
            raise ValueError("return_lse=True and return_aux are both given; allowed: one of them")
        if getattr(aux, "max_scores", False):
            raise UnsupportedError(
                "return_aux asks for max_scores, which no kernel here keeps; "
                "torch.nn.attention.flex_attention.flex_attention returns them, on a GPU"
            )
    if kernel_options is None:
        return
    if not isinstance(kernel_options, dict):
        raise TypeError(f"kernel_options is of type {type(kernel_options).__name__}; allowed: None or a dict")
    if kernel_options.get("BACKEND", "AUTO") != "AUTO":
        raise UnsupportedError(
            f"kernel_options['BACKEND']={kernel_options['BACKEND']!r}; allowed: 'AUTO'. It names a kernel of "
            "torch.nn.attention.flex_attention.flex_attention"
        )


class _Known:
    """What is known of a block mask, by batch and num_heads of the query, while nothing that it reads has changed."""

    def __init__(self, watch: Watch) -> None:
        self.watch, self.found = watch, dict[tuple[int, int], RecognizedMask]()

    def __reduce__(self) -> Any:
        return type(None), ()  # a copy of a block mask, in another process too, is read anew


def _recognized(block_mask: Any, batch: int, num_heads: int) -> RecognizedMask:
    """:func:`recognize`, remembered on the block mask."""
    known = getattr(block_mask, _CACHE, None)
    if known is not None and not known.watch.is_unchanged(block_mask):
        known = None
    found = None if known is None else known.found.get((batch, num_heads))
    if found is None:
        found = recognize(block_mask, batch, num_heads)
        if known is None:
            known = _Known(Watch(block_mask))
            setattr(block_mask, _CACHE, known)
        known.found[batch, num_heads] = found
    return found


_WHY = "a mask_mod is read by running it; give what transformer_fast.dropin.flex.recognize made of the block mask"
_has_reason = "reason" in inspect.signature(torch.compiler.disable).parameters  # from PyTorch 2.7 on
#: Breaks a compiler's graph. Only where one compiles: the wrapper costs some microseconds.
_recognized_apart = torch.compiler.disable(_recognized, **({"reason": _WHY} if _has_reason else {}))


def _run(query: Tensor, key: Tensor, value: Tensor, mask: RecognizedMask, scale: float | None, need_lse: bool) -> Any:
    """What attention() returns: out, or (out, lse)."""
    options: dict[str, Any] = {"softmax_scale": scale, "return_lse": need_lse}
    if mask.kind == "dense":
        return attention(query, key, value, bias=mask.mask, **options)
    options["window_size"] = mask.window_size
    if mask.kind == "lengths":
        return attention(query, key, value, seqlens_k=mask.seqlens_k, **options)
    if mask.kind == "window":
        if mask.num_keys < key.shape[2]:
            key, value = key[:, :, : mask.num_keys], value[:, :, : mask.num_keys]
        return attention(query, key, value, key_padding_mask=mask.key_padding_mask, **options)
    assert mask.cu_seqlens_q is not None and mask.cu_seqlens_k is not None
    query, key, value = (t.transpose(1, 2).flatten(0, 1) for t in (query, key, value))  # (batch * seqlen, heads, ...)
    cu_seqlens, longest = (mask.cu_seqlens_q, mask.cu_seqlens_k), (mask.max_seqlen_q, mask.max_seqlen_k)
    result: Any = attention_varlen(query, key, value, *cu_seqlens, *longest, **options)
    size = (mask.batch, mask.seq_lengths[0])
    if not need_lse:
        return result.unflatten(0, size).transpose(1, 2)
    out, lse = result  # lse: (num_heads, batch * seqlen_q)
    return out.unflatten(0, size).transpose(1, 2), lse.unflatten(1, size).transpose(0, 1)
