"""``torch.nn``'s attention modules over the fused kernels: the same constructors, parameters and outputs.

Each class is a subclass of its original without state of its own. A module that exists is therefore taken over by a
change of its class, which :func:`replace_modules` does in a whole model, and given back by the opposite change.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attention import attention, attention_varlen
from ..ops import is_watched

MINUS_INF = float("-inf")
_Module = TypeVar("_Module", bound=nn.Module)


class _Masks(NamedTuple):
    """What hides keys, in the words of :func:`transformer_fast.attention`."""

    keep: Tensor | None  # bool (batch, seqlen_k), True = keep
    bias: Tensor | None  # bool (True = keep) or float, broadcastable to (batch, num_heads, seqlen_q, seqlen_k)
    causal: bool  # row i sees keys 0 to i


class MultiheadAttention(nn.MultiheadAttention):
    """:class:`torch.nn.MultiheadAttention`, computed by :func:`transformer_fast.attention`.

    Constructor, parameters, ``state_dict``, arguments and outputs are those of ``torch.nn``, which documents them.
    What to know beyond:

    - ``need_weights=False`` is the fast way. Attention weights (asked for by default, as in ``torch.nn``) are a matrix
      of seqlen_q x seqlen_k that the fused kernels never make; then the definition is computed instead. Weights come
      after dropout, as in ``torch.nn``.
    - ``is_causal=True`` says that ``attn_mask`` is the causal mask. Without ``need_weights`` that is believed and the
      mask not read, beside a ``key_padding_mask`` too (where ``torch.nn`` reads it). ``is_causal`` without a mask is
      an error, in eval mode too.
    - A row that sees no key gives 0 before the output projection, and weights of 0, where ``torch.nn`` gives NaN.
    - Nested tensors run as packed sequences, without padding. What ``torch.nn`` asks of them in eval mode (no masks)
      holds in training too; with ``need_weights`` they are left to ``torch.nn``.

    Raises:
        ValueError, TypeError: shapes or masks are wrong; the message names the argument, its value, what is allowed.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of ``query`` over ``key`` and ``value``, and the attention weights.

        Args:
            query, key, value: (seqlen, batch, features), with ``batch_first`` (batch, seqlen, features), or without a
                batch (seqlen, features); features are embed_dim, kdim and vdim.
            key_padding_mask: ([batch,] seqlen_k), bool (True = ignore) or float, added to the scores.
            need_weights: return the weights as well.
            attn_mask: (seqlen_q, seqlen_k) or ([batch *] num_heads, seqlen_q, seqlen_k), bool (True = ignore) or float.
            average_attn_weights: of the weights return the mean over heads.
            is_causal: ``attn_mask`` is the causal mask.

        Returns:
            the output, shaped as the query, and the weights ([batch,] seqlen_q, seqlen_k), or for each head
            ([batch,] num_heads, seqlen_q, seqlen_k), or None.
        """
        if is_causal and attn_mask is None:
            raise ValueError("is_causal is True and attn_mask None; allowed: is_causal beside the causal attn_mask")
        if query.is_nested or key.is_nested or value.is_nested:
            if need_weights or key_padding_mask is not None or attn_mask is not None or not self._is_plain:
                return super().forward(
                    query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
                )
            return self._nested(query, key, value), None

        batched = query.dim() == 3
        batch_first = self.batch_first or not batched
        query, key, value = _with_batch(query, key, value)
        # As in torch.nn: beside a padding mask the keys of _extend are seen, by the hint alone they come too late.
        causal = is_causal and not need_weights and (self._is_plain or key_padding_mask is None)
        key_padding_mask, attn_mask = self._checked(query, key, value, key_padding_mask, attn_mask, batched, causal)
        masks = _merged(key_padding_mask, None if causal else attn_mask, causal)
        # (batch, seqlen, num_heads, head_dim) or (seqlen, batch, ...) -> (batch, num_heads, seqlen, head_dim)
        order = (0, 2, 1, 3) if batch_first else (1, 2, 0, 3)
        q, k, v = (t.permute(order) for t in self._project(query, key, value))
        k, v, masks = self._extend(k, v, masks)
        dropout_p = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            out, weights = _by_definition(q, k, v, masks, dropout_p)
        else:
            out = _fused(q, k, v, masks, dropout_p)
        # (batch, num_heads, seqlen_q, head_dim) -> (batch, seqlen_q, embed_dim) or (seqlen_q, batch, embed_dim)
        out = self.out_proj(out.permute(0, 2, 1, 3).flatten(2) if batch_first else out.permute(2, 0, 1, 3).flatten(2))
        if weights is not None and average_attn_weights:
            weights = weights.mean(dim=1)
        if batched:
            return out, weights
        return out.squeeze(0), None if weights is None else weights.squeeze(0)

    @property
    def _is_plain(self) -> bool:
        """No key beside those given."""
        return self.bias_k is None and self.bias_v is None and not self.add_zero_attn

    def _checked(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        attn_mask: Tensor | None,
        batched: bool,
        causal: bool,
    ) -> tuple[Tensor | None, Tensor | None]:
        """All shapes are checked; the masks come back as (batch, seqlen_k) and with 4 dimensions, as a bias has.

        With ``causal`` the ``attn_mask`` is not read, and as in ``torch.nn`` may have any floating dtype.
        """
        for name, t, features in (
            ("query", query, self.embed_dim),
            ("key", key, self.kdim),
            ("value", value, self.vdim),
        ):
            if t.shape[-1] != features:
                raise ValueError(f"{name} has shape {tuple(t.shape)}; allowed: a last dimension of {features}")
        batch, seqlen = (0, 1) if self.batch_first or not batched else (1, 0)
        if key.shape[:2] != value.shape[:2] or key.shape[batch] != query.shape[batch]:
            raise ValueError(
                f"query, key and value have shapes {tuple(query.shape)}, {tuple(key.shape)}, {tuple(value.shape)}; "
                "allowed: one batch size, and as many values as keys"
            )
        n, rows, keys = query.shape[batch], query.shape[seqlen], key.shape[seqlen]
        device = query.device.type
        # Any dtype under autocast, which casts the mask as the projected query; it leaves float64 alone.
        casts = device != "meta" and torch.is_autocast_enabled(device) and query.dtype != torch.float64
        dtype = None if casts else query.dtype
        if key_padding_mask is not None:
            _check_mask(key_padding_mask, "key_padding_mask", dtype, (n, keys) if batched else (keys,))
            key_padding_mask = key_padding_mask.reshape(n, keys)
        if attn_mask is not None:
            dtype = None if causal else dtype
            _check_mask(attn_mask, "attn_mask", dtype, (rows, keys), (n * self.num_heads, rows, keys))
            attn_mask = attn_mask.reshape(-1, self.num_heads if attn_mask.dim() == 3 else 1, rows, keys)
        return key_padding_mask, attn_mask

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value of each head, (..., num_heads, head_dim), as views of one product for each input."""
        d, weight, bias = self.embed_dim, self.in_proj_weight, self.in_proj_bias
        if self._qkv_same_embed_dim and query is key and key is value:
            q, k, v = self._heads(F.linear(query, weight, bias), 3)
        elif self._qkv_same_embed_dim and key is value:
            (q,) = self._heads(F.linear(query, weight[:d], None if bias is None else bias[:d]), 1)
            k, v = self._heads(F.linear(key, weight[d:], None if bias is None else bias[d:]), 2)
        else:
            weights = (
                (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight) if weight is None else weight.chunk(3)
            )
            biases = (None, None, None) if bias is None else bias.chunk(3)
            parts = zip((query, key, value), weights, biases, strict=True)
            q, k, v = (self._heads(F.linear(t, w, b), 1)[0] for t, w, b in parts)
        return q, k, v

    def _heads(self, projected: Tensor, parts: int) -> tuple[Tensor, ...]:
        """(..., parts * embed_dim) -> so many (..., num_heads, head_dim)."""
        return projected.view(*projected.shape[:-1], parts, self.num_heads, self.head_dim).unbind(-3)

    def _extend(self, k: Tensor, v: Tensor, masks: _Masks) -> tuple[Tensor, Tensor, _Masks]:
        """Keys beside those given: the learnt one of ``add_bias_kv``, then the zero of ``add_zero_attn``."""
        if self._is_plain:
            return k, v, masks
        batch = k.shape[0]
        if self.bias_k is not None and self.bias_v is not None:
            # (1, 1, embed_dim) -> (batch, num_heads, 1, head_dim)
            one_k, one_v = (
                t.view(1, self.num_heads, 1, self.head_dim).expand(batch, -1, -1, -1).to(k.dtype)
                for t in (self.bias_k, self.bias_v)
            )
            k, v = torch.cat([k, one_k], dim=2), torch.cat([v, one_v], dim=2)
            masks = _padded(masks)
        if self.add_zero_attn:
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
            masks = _padded(masks)
        return k, v, masks

    def _nested(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Nested tensors: their sequences packed one after the other, each attending to its own."""
        if not (query.is_nested and key.is_nested and value.is_nested):
            raise ValueError("one of query, key and value is not a nested tensor; allowed: all or none")
        packed = {id(t): _packed(t) for t in (query, key, value)}  # what is one tensor stays one
        (rows, cu_q, max_q), (keys, cu_k, max_k), (values, _, _) = (packed[id(t)] for t in (query, key, value))
        q, k, v = self._project(rows, keys, values)  # (total, num_heads, head_dim)
        dropout_p = self.dropout if self.training else 0.0
        out = attention_varlen(q, k, v, cu_q, cu_k, max_q, max_k, dropout_p=dropout_p)
        return _nested_like(query, self.out_proj(out.flatten(1)))  # type: ignore[union-attr]


def _with_batch(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A batch of one before tensors without a batch; what is one tensor stays one."""
    dims = query.dim()
    if dims not in (2, 3) or key.dim() != dims or value.dim() != dims:
        raise ValueError(
            f"query, key and value have {dims}, {key.dim()} and {value.dim()} dimensions; allowed: 3 each, or 2 each "
            "without a batch"
        )
    if dims == 3:
        return query, key, value
    first = query[None]
    second = first if key is query else key[None]
    return first, second, second if value is key else value[None]


def _check_mask(mask: Tensor, name: str, dtype: torch.dtype | None, *shapes: tuple[int, ...]) -> None:
    """A mask is bool, float32 or of the dtype, None for any floating one, and has one of the shapes."""
    if not isinstance(mask, Tensor):
        raise TypeError(f"{name} is of type {type(mask).__name__}; allowed: a torch.Tensor")
    allowed = (torch.bool, torch.float32, dtype)
    if mask.dtype not in allowed and not (dtype is None and mask.is_floating_point()):
        names = [str(d).removeprefix("torch.") for d in dict.fromkeys((mask.dtype, *allowed))]
        raise TypeError(f"{name} has dtype {names[0]}; allowed: {', '.join(names[1:]).replace('None', 'floating')}")
    if all(tuple(mask.shape) != shape for shape in shapes):
        raise ValueError(f"{name} has shape {tuple(mask.shape)}; allowed: {' or '.join(map(str, shapes))}")


def _merged(padding: Tensor | None, mask: Tensor | None, causal: bool) -> _Masks:
    """Torch's masks, in which True hides, in ours.

    Args:
        padding: (batch, seqlen_k), bool or float.
        mask: (1 or batch, 1 or num_heads, seqlen_q, seqlen_k), bool or float.
    """
    keep = bias = None
    if padding is not None and padding.dtype == torch.bool:
        keep = ~padding
    elif padding is not None:
        keep = padding != MINUS_INF  # so that the keys it hides are not even visited
        bias = None if _only_hides(padding, keep) else padding[:, None, None]
    if mask is not None and mask.dtype == torch.bool:
        bias = ~mask if bias is None else bias.masked_fill(mask, MINUS_INF)
    elif mask is not None:
        bias = mask if bias is None else bias + mask
    return _Masks(keep, bias, causal)


def _only_hides(padding: Tensor, keep: Tensor) -> bool:
    """Does a float mask, which is -inf where not ``keep``, hold but 0 elsewhere?

    ``nn.TransformerEncoder`` makes such masks of bool ones. A bias costs the kernel more than this look, which is
    taken where it waits for nothing: not at a tensor on a device, nor at one that is traced or transformed.
    """
    known = type(padding) is Tensor and padding.device.type == "cpu" and not padding.requires_grad and not is_watched()
    return known and torch.equal(padding == 0, keep)


def _padded(masks: _Masks) -> _Masks:
    """The masks with one more key at the end, which every row sees."""
    keep, bias = masks.keep, masks.bias
    if keep is not None:
        keep = F.pad(keep, (0, 1), value=True)
    if bias is not None:
        bias = F.pad(bias, (0, 1), value=bias.dtype == torch.bool)
    return masks._replace(keep=keep, bias=bias)


def _fused(q: Tensor, k: Tensor, v: Tensor, masks: _Masks, dropout_p: float) -> Tensor:
    """(batch, num_heads, seqlen_q, head_dim) by the fused kernels."""
    keep, bias, window = masks.keep, masks.bias, None
    if masks.causal:
        # Row i stands at key i, not at i + seqlen_k - seqlen_q: keys that no row reaches are left out, missing ones
        # make the window wider.
        rows = q.shape[2]
        k, v = k[:, :, :rows], v[:, :, :rows]
        keep, bias = (None if t is None else t[..., :rows] for t in (keep, bias))
        window = (None, rows - k.shape[2])
    return attention(  # type: ignore[return-value]
        q, k, v, window_size=window, key_padding_mask=keep, bias=bias, dropout_p=dropout_p
    )


def _by_definition(q: Tensor, k: Tensor, v: Tensor, masks: _Masks, dropout_p: float) -> tuple[Tensor, Tensor]:
    """The output and the attention weights, (batch, num_heads, seqlen_q, seqlen_k)."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if masks.keep is not None:
        scores = scores.masked_fill(~masks.keep[:, None, None], MINUS_INF)
    if masks.bias is not None and masks.bias.dtype == torch.bool:
        scores = scores.masked_fill(~masks.bias, MINUS_INF)
    elif masks.bias is not None:
        scores = scores + masks.bias.to(scores.dtype)
    # A row that sees nothing: 0, in value and in gradient, where the softmax of nothing is NaN.
    empty = (scores == MINUS_INF).all(-1, keepdim=True)
    weights = scores.masked_fill(empty, 0.0).softmax(-1).masked_fill(empty, 0.0)
    weights = F.dropout(weights, dropout_p)
    return weights @ v, weights


def _packed(nested: Tensor) -> tuple[Tensor, Tensor, int]:
    """A nested tensor's rows (total, features), where its sequences begin, int32 (batch + 1,), and the longest."""
    sequences = nested.unbind()
    lengths = torch.tensor([0, *(t.shape[0] for t in sequences)], dtype=torch.int32)
    rows = torch.cat(sequences)
    return rows, lengths.cumsum(0, dtype=torch.int32).to(rows.device), int(lengths.max())


def _nested_like(nested: Tensor, rows: Tensor) -> Tensor:
    """The reverse: rows (total, features) in the sequences of a nested tensor."""
    if nested.layout == torch.jagged:
        return torch.nested.nested_tensor_from_jagged(rows, nested.offsets())  # type: ignore[attr-defined]
    return torch.nested.as_nested_tensor(list(rows.split([t.shape[0] for t in nested.unbind()])))


class TransformerEncoderLayer(nn.TransformerEncoderLayer):
    """:class:`torch.nn.TransformerEncoderLayer` over :class:`MultiheadAttention`.

    Constructor, parameters, ``state_dict``, arguments and outputs are those of ``torch.nn``. In eval mode ``torch.nn``
    takes a way past its own attention module, without hooks; here there is one way, in training and in eval mode.
    Inside ``nn.TransformerEncoder`` with ``enable_nested_tensor`` padded batches arrive as nested tensors in eval mode,
    and all of the layer runs without padding.
    """

    @functools.wraps(nn.TransformerEncoderLayer.__init__)  # type: ignore[misc]
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _take_over(self.self_attn)

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """Self-attention and feedforward over ``src``, shaped and masked as for :class:`MultiheadAttention`."""
        masks = (src_mask, src_key_padding_mask, is_causal)
        if self.norm_first:
            src = src + self._sa_block(self.norm1(src), *masks)
            return src + self._ff_block(self.norm2(src))
        src = self.norm1(src + self._sa_block(src, *masks))
        return self.norm2(src + self._ff_block(src))


class TransformerDecoderLayer(nn.TransformerDecoderLayer):
    """:class:`torch.nn.TransformerDecoderLayer` over :class:`MultiheadAttention`.

    Constructor, parameters, ``state_dict``, arguments and outputs are those of ``torch.nn``.
    """

    @functools.wraps(nn.TransformerDecoderLayer.__init__)  # type: ignore[misc]
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for attention_module in (self.self_attn, self.multihead_attn):
            _take_over(attention_module)


_OURS: dict[type[nn.Module], type[nn.Module]] = {
    nn.MultiheadAttention: MultiheadAttention,
    nn.TransformerEncoderLayer: TransformerEncoderLayer,
    nn.TransformerDecoderLayer: TransformerDecoderLayer,
}
_THEIRS = {ours: theirs for theirs, ours in _OURS.items()}


def _take_over(module: nn.Module, classes: Mapping[type[nn.Module], type[nn.Module]] = _OURS) -> None:
    """Change the class of a module of exactly one of the classes; it keeps all else."""
    module.__class__ = classes.get(type(module), type(module))


def replace_modules(model: _Module) -> _Module:
    """Let a built model compute attention by the fused kernels, wherever it has one of ``torch.nn``'s modules.

    ``nn.MultiheadAttention``, ``nn.TransformerEncoderLayer`` and ``nn.TransformerDecoderLayer``, also those inside
    ``nn.Transformer`` and the like, become the classes of this file. The modules stay the same objects: parameters
    (tied ones too), hooks, mode, device, dtype and whoever refers to them are not touched, and an optimizer keeps its
    state. Subclasses are left alone, since they may have a ``forward`` of their own; modules within them are not.
    :func:`restore_modules` undoes it.

    Args:
        model: any module; changed in place.

    Returns:
        the model. A warning says so if there was nothing to replace in it.
    """
    kinds = {type(module) for module in model.modules()}
    if not kinds & (_OURS.keys() | _THEIRS.keys()):
        warnings.warn(
            f"{type(model).__name__} has none of {', '.join(f'nn.{c.__name__}' for c in _OURS)}: nothing is replaced",
            stacklevel=2,
        )
    for module in model.modules():
        _take_over(module)
    return model


def restore_modules(model: _Module) -> _Module:
    """Give back what :func:`replace_modules` took, and what was built as one of this file's classes.

    Args:
        model: any module; changed in place.

    Returns:
        the model, with ``torch.nn``'s own classes.
    """
    for module in model.modules():
        _take_over(module, _THEIRS)
    return model
