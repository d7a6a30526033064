"""``torch.nn.functional.scaled_dot_product_attention``: its arguments and meaning, over :func:`attention`.

What differs from ``attention()`` is said here and nowhere else: any number of leading dimensions, broadcast; the
top-left corner as the origin of ``is_causal``; one ``attn_mask`` for what are two operands below.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from ..ops import run
from ..spec import Operands, options_of

PLAIN = (Tensor, Parameter)


#: query, key, value, causal, window_size, key_padding_mask, bias; and the output's leading dimensions, where they are
#: not (batch, num_heads). A plain tuple, since a named one takes half a microsecond.
Arguments = tuple[
    Tensor,
    Tensor,
    Tensor,
    bool,
    tuple[int | None, int | None] | None,
    Tensor | None,
    Tensor | None,
    tuple[int, ...] | None,
]
Sizes = tuple[int, int, int, int]


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """``torch.nn.functional.scaled_dot_product_attention`` with the kernels of this library.

    Leading dimensions broadcast, as there. K and V that broadcast over heads are not copied; a tensor whose last
    dimension is not contiguous is. Inside ``torch.use_deterministic_algorithms(True)`` gradients are deterministic.

    Args:
        query: (..., num_heads, seqlen_q, head_dim), float32, bfloat16, float16 or float64 (eager PyTorch, by
            definition). (seqlen_q, head_dim) and any number of leading dimensions will do.
        key: (..., num_kv_heads, seqlen_k, head_dim).
        value: (..., num_kv_heads, seqlen_k, head_dim_v).
        attn_mask: bool, True = keep, or added to the scores (float32 or the query's dtype; it may require grad);
            broadcastable to (..., seqlen_q, seqlen_k). A bool mask that is the same for all heads and rows,
            (batch, 1, 1, seqlen_k) or expanded from it, is taken as a padding mask. A
            ``torch.nn.attention.bias.CausalBias`` is never made a matrix.
        dropout_p: probability of dropping an attention weight, 0 to 1. It is applied whenever it is given; the
            random numbers are not those of PyTorch.
        is_causal: row ``i`` sees keys 0 to ``i``: aligned at the top left, unlike ``attention(causal=True)``.
        scale: default ``head_dim ** -0.5``.
        enable_gqa: the third dimension from the end of key and value may be a divisor of the query's.

    Returns:
        (..., num_heads, seqlen_q, head_dim_v), of the query's dtype. A row that sees no key gives 0. Differentiable
        once; float64 to any order.

    Raises:
        ValueError, TypeError: an argument is wrong; the message names it, its value and what is allowed.
        UnsupportedError: a derivative that kernels do not have: forward mode, or a second one.
    """
    return attend(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    backend: str = "auto",
) -> Tensor:
    """:func:`scaled_dot_product_attention` on the back end asked for."""
    causal, window_size, padding, bias, lead = is_causal, None, None, None, None
    sizes = _plain_sizes(query, key, value, enable_gqa)
    if sizes is not None and attn_mask is None and (not is_causal or sizes[2] == sizes[3]):
        pass  # this and the next are what arguments_of would say, in half a microsecond less
    elif sizes is not None and type(attn_mask) in PLAIN and not is_causal:
        padding, bias = _mask_operands(attn_mask, sizes, query)  # type: ignore[arg-type]
    else:
        query, key, value, causal, window_size, padding, bias, lead = arguments_of(
            query, key, value, attn_mask, is_causal, enable_gqa
        )
    drops_all = dropout_p == 1.0
    drop = 0.0 if drops_all else dropout_p
    deterministic = torch.are_deterministic_algorithms_enabled()
    options = options_of(causal, window_size, scale, None, drop, deterministic, backend)
    out, _ = run(Operands(query, key, value, None, None, None, padding, bias), options, False)
    if drops_all:  # a probability that attention() has no use for, but layers have
        out = torch.nn.functional.dropout(out, 1.0)
    return out if lead is None else out.reshape(*lead, *out.shape[-2:])


def arguments_of(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, is_causal: bool, enable_gqa: bool
) -> Arguments:
    """An SDPA call's tensors and mask in the form that :func:`attention` has for them.

    Returns:
        query, key, value, causal, window_size, key_padding_mask, bias, and the leading dimensions of the output.

    Raises:
        ValueError, TypeError: the tensors' leading dimensions or the mask do not fit.
    """
    causal, window_size, padding, bias, lead = False, None, None, None, None
    if attn_mask is not None:
        if is_causal:
            raise ValueError("is_causal=True is given with attn_mask; allowed: one of them")
        if type(attn_mask) not in PLAIN and _is_causal_bias(attn_mask):
            causal, is_causal = _corner(attn_mask, query, key)
            attn_mask = None
    sizes = _plain_sizes(query, key, value, enable_gqa)
    if sizes is None:
        query, key, value, attn_mask, lead = _with_four_dims(query, key, value, attn_mask, enable_gqa)
        sizes = (*query.shape[:3], key.shape[2])
    if attn_mask is not None:
        padding, bias = _mask_operands(attn_mask, sizes, query)
    if is_causal:
        _, _, seqlen_q, seqlen_k = sizes
        if seqlen_q > seqlen_k:  # positions are counted from the bottom right, so the top left is that far away
            window_size = (None, seqlen_q - seqlen_k)
        else:
            causal = True
            if seqlen_q < seqlen_k:  # no row sees the keys after these
                key, value = key[:, :, :seqlen_q], value[:, :, :seqlen_q]
    return query, key, value, causal, window_size, padding, bias, lead


def _plain_sizes(query: Any, key: Any, value: Any, enable_gqa: bool) -> Sizes | None:
    """(batch, num_heads, seqlen_q, seqlen_k) of what :func:`attention` can take as it is, else None. It takes 1 us."""
    if not (isinstance(query, Tensor) and isinstance(key, Tensor) and isinstance(value, Tensor)):
        return None
    if query.dim() != 4 or key.dim() != 4 or value.dim() != 4:
        return None
    batch, heads, seqlen_q, _ = query.shape
    key_batch, key_heads, seqlen_k, _ = key.shape
    value_batch, value_heads, value_seqlen, _ = value.shape
    if not (batch == key_batch == value_batch and key_heads == value_heads and seqlen_k == value_seqlen):
        return None
    if heads != key_heads and not (enable_gqa and key_heads > 0 and heads % key_heads == 0):
        return None
    if heads == 0 or query.stride()[3] != 1 or key.stride()[3] != 1 or value.stride()[3] != 1:
        return None
    return batch, heads, seqlen_q, seqlen_k


def _with_four_dims(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, enable_gqa: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, tuple[int, ...]]:
    """Leading dimensions broadcast and folded into (batch, num_heads), last dimensions contiguous.

    Returns:
        query, key, value, attn_mask of four dimensions each, and the leading dimensions that the output has.
    """
    tensors = {"query": query, "key": key, "value": value}
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} is of type {type(tensor).__name__}; allowed: a torch.Tensor")
        if tensor.dim() < (3 if enable_gqa else 2):
            dims = "(..., num_heads, seqlen, head_dim), with enable_gqa" if enable_gqa else "(..., seqlen, head_dim)"
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; allowed: {dims}")
    ndim = max(t.dim() for t in tensors.values())
    if enable_gqa:
        key, value = _same_heads(query, key, value)
    # (seqlen, head_dim) -> (1, seqlen, head_dim): every tensor has a dimension of heads
    query, key, value = (t if t.dim() > 2 else t[None] for t in (query, key, value))
    kv_heads = max(key.shape[-3], value.shape[-3])
    try:
        batch = torch.broadcast_shapes(query.shape[:-3], key.shape[:-3], value.shape[:-3])
        # One KV head stands for all query heads, as it is; so do the groups of enable_gqa.
        heads = (
            query.shape[-3] if enable_gqa else torch.broadcast_shapes(*[(t.shape[-3],) for t in (query, key, value)])[0]
        )
    except RuntimeError:
        shapes = ", ".join(f"{name} {tuple(t.shape)}" for name, t in tensors.items())
        raise ValueError(f"leading dimensions do not broadcast: {shapes}; allowed: equal, or 1") from None
    if not enable_gqa and kv_heads != 1:
        kv_heads = heads
    lead = (*batch, heads)[len(batch) + 3 - ndim :]
    size = math.prod(batch)
    if heads == 0:
        size, kv_heads = 0, 0
    folded = []
    for tensor, h in ((query, heads), (key, kv_heads), (value, kv_heads)):
        # (..., h, seqlen, d) -> (batch, h, seqlen, d)
        tensor = tensor.expand(*batch, h, *tensor.shape[-2:]).reshape(size, h or 1, *tensor.shape[-2:])
        folded.append(tensor if tensor.stride(-1) == 1 else tensor.contiguous())
    if attn_mask is not None:
        _check_mask(attn_mask, (*lead, query.shape[-2], key.shape[-2]))
        attn_mask = _folded_mask(attn_mask, batch) if heads else None
    return folded[0], folded[1], folded[2], attn_mask, lead


def _same_heads(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Key and value with one number of heads: where theirs differ, the least that groups the heads of both."""
    heads, key_heads, value_heads = query.shape[-3], key.shape[-3], value.shape[-3]
    for name, kv_heads in (("key", key_heads), ("value", value_heads)):
        if kv_heads == 0 or heads % kv_heads:
            raise ValueError(f"{name} has {kv_heads} heads for a query of {heads} heads; allowed: a divisor of {heads}")
    if key_heads != value_heads:
        common = math.lcm(key_heads, value_heads)
        key = key.repeat_interleave(common // key_heads, dim=-3)
        value = value.repeat_interleave(common // value_heads, dim=-3)
    return key, value


def _folded_mask(mask: Tensor, batch: Sequence[int]) -> Tensor:
    """The mask of folded tensors: leading dimensions as theirs, and copied only where two of them need it."""
    mask = mask[(None,) * (len(batch) + 3 - mask.dim())]  # (*batch or 1s, heads or 1, seqlen_q or 1, seqlen_k or 1)
    last = mask.shape[-3:]
    if math.prod(mask.shape[:-3]) == 1:
        return mask.reshape(1, *last)
    return mask.expand(*batch, *last).reshape(math.prod(batch), *last)


def _check_mask(mask: Any, full: tuple[int, ...]) -> None:
    if not isinstance(mask, Tensor):
        raise TypeError(f"attn_mask is of type {type(mask).__name__}; allowed: a torch.Tensor or None")
    shape = mask.shape
    fits = len(shape) <= len(full)
    for n, m in zip(reversed(shape), reversed(full), strict=False):  # a loop: any() takes three times as long
        fits = fits and (n == 1 or n == m)
    if not fits:
        raise ValueError(f"attn_mask has shape {tuple(shape)}; allowed: broadcastable to {tuple(full)}")


def _mask_operands(mask: Tensor, sizes: Sizes, query: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """An attn_mask as (key_padding_mask, bias), one of which is None. Only its shape and strides are looked at."""
    batch, heads, rows, keys = sizes
    if not isinstance(mask, Tensor) or mask.dim() != 4:
        _check_mask(mask, sizes)
        mask = mask[(None,) * (4 - mask.dim())]
    b, h, r, k = mask.shape
    if (b != batch and b != 1) or (h != heads and h != 1) or (r != rows and r != 1) or (k != keys and k != 1):
        _check_mask(mask, sizes)
    dtype = mask.dtype
    if dtype is not torch.bool:
        if dtype is not torch.float32 and dtype is not query.dtype:
            _check_cast_mask(mask, query)
        return None, mask
    if h == 1 and r == 1:
        padding = mask.view(b, k)
    elif (h == 1 or mask.stride()[1] == 0) and (r == 1 or mask.stride()[2] == 0):  # expanded: still one row for all
        padding = mask[:, 0, 0]
    else:
        return None, mask
    return padding if b == batch and k == keys else padding.expand(batch, keys), None


def _check_cast_mask(mask: Tensor, query: Tensor) -> None:
    """A float mask of a third dtype is welcome only where autocast makes the two agree."""
    device_type = query.device.type
    if not mask.is_floating_point() or device_type == "meta" or not torch.is_autocast_enabled(device_type):
        allowed = ", ".join(dict.fromkeys(str(d)[6:] for d in (torch.bool, torch.float32, query.dtype)))
        raise TypeError(f"attn_mask has dtype {str(mask.dtype)[6:]}; allowed: {allowed}")


def _is_causal_bias(mask: Any) -> bool:
    """Is it a ``torch.nn.attention.bias.CausalBias``? Whoever has one has imported that module."""
    module = sys.modules.get("torch.nn.attention.bias")
    return module is not None and isinstance(mask, module.CausalBias)


def _corner(mask: Any, query: Tensor, key: Tensor) -> tuple[bool, bool]:
    """A CausalBias as (bottom-right causal, top-left causal), one of which is True."""
    given, due = (mask.seq_len_q, mask.seq_len_kv), (query.shape[-2], key.shape[-2])
    if given != due:
        raise ValueError(f"attn_mask is a causal bias of {given}; allowed: {due}, (seqlen_q, seqlen_k)")
    is_lower_right = mask.variant.name == "LOWER_RIGHT"
    return is_lower_right, not is_lower_right
