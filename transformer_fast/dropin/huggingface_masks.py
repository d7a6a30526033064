"""Masks of Hugging Face transformers as intervals: what its models pass from layer to layer instead of a dense mask.

transformers describes a mask by a function of indices, lengths, offsets and a padding mask, and asks each attention
implementation for the object it wants of them. Ours is an :class:`IntervalMask`. A function that is no interval is
evaluated to a dense boolean mask, as for ``sdpa``.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Interval(NamedTuple):
    """What a mask function is: the window, -1 for unbounded, and the sequence each token belongs to where packed."""

    left: int = -1
    right: int = -1
    sequence_ids: Tensor | None = None  # (batch, seqlen), never falling along a row


class IntervalMask:
    """A mask (batch, 1, seqlen_q, seqlen_k) that is known by its interval, and is dense only when someone looks.

    Decoder layers pass it on as they pass a tensor. Code that computes with it (slices, casts, combines) gets the
    dense boolean mask, True = attend, so that what it does stays right. Added to scores, as attention does that some
    models have outside of the interface, it is what such code expects: 0, or the least finite number.

    Args:
        window: (left, right) keys on each side, itself excluded; -1 is unbounded.
        seqlens_k: int32 (batch,), where the last query row does not stand at the last key: where it stands, plus 1.
        key_padding_mask: bool (batch, seqlen_k), True = keep.
        cu_seqlens: int32 (sequences + 1,), of the flattened (batch * seqlen) tokens, where sequences are packed.
        max_seqlen: the longest of them.
        arguments: of transformers' mask function, which makes the dense mask.
    """

    ndim = 4
    dtype = torch.bool
    packing: Any = None  # of the batch it was made for, once huggingface_padding.py has looked

    def __init__(
        self,
        window: tuple[int, int],
        seqlens_k: Tensor | None,
        key_padding_mask: Tensor | None,
        cu_seqlens: Tensor | None,
        max_seqlen: int,
        arguments: dict[str, Any],
    ) -> None:
        self.window = window
        self.seqlens_k = seqlens_k
        self.key_padding_mask = key_padding_mask
        self.cu_seqlens = cu_seqlens
        self.max_seqlen = max_seqlen
        self.arguments = arguments
        self.lengths = (arguments["q_length"], arguments["kv_length"])
        self.device = torch.device(arguments["device"])

    @property
    def shape(self) -> torch.Size:
        return torch.Size((self.arguments["batch_size"], 1, *self.lengths))

    def fits(self, query: Tensor, key: Tensor) -> bool:
        """Whether it was made for rows and keys of these numbers."""
        return self.lengths == (query.shape[2], key.shape[2])

    def is_window(self, query: Tensor, key: Tensor) -> bool:
        """Whether it is made for them, and is not of packed sequences."""
        return self.cu_seqlens is None and self.fits(query, key)

    def dim(self) -> int:
        return self.ndim

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def dense(self) -> Tensor:
        """Bool (batch, 1, seqlen_q, seqlen_k), True = attend."""
        return dense_mask(self.arguments).to(self.device)

    def to(self, *args: Any, **kwargs: Any) -> IntervalMask | Tensor:
        """As of a tensor: an interval again if only the device changes."""
        device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
        if dtype not in (None, torch.bool):
            return self.dense().to(*args, **kwargs)
        if device is None or device == self.device:
            return self
        tensors = (self.seqlens_k, self.key_padding_mask, self.cu_seqlens)
        seqlens_k, padding, cu_seqlens = (t if t is None else t.to(device) for t in tensors)
        moved = IntervalMask(self.window, seqlens_k, padding, cu_seqlens, self.max_seqlen, self.arguments)
        moved.device = device
        return moved

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "arguments" not in self.__dict__:  # copying and pickling ask for methods
            raise AttributeError(f"IntervalMask has no attribute {name!r}")
        return getattr(self.dense(), name)

    def added_to(self, scores: Tensor) -> Tensor:
        """What attention that is no part of the interface adds to its scores: 0 or the least finite number."""
        hidden = torch.finfo(scores.dtype).min
        return torch.zeros((), dtype=scores.dtype, device=scores.device).where(self.dense(), hidden)

    @classmethod
    def __torch_function__(cls, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        from torch.utils._pytree import tree_map_only

        if function in _ADDITIONS and isinstance(args[0], Tensor) and args[0].is_floating_point():
            return function(*(a.added_to(args[0]) if isinstance(a, cls) else a for a in args), **(kwargs or {}))
        return function(*tree_map_only(cls, cls.dense, args), **tree_map_only(cls, cls.dense, kwargs or {}))

    def __add__(self, scores: Any) -> Any:
        return scores + self  # which asks __torch_function__

    __radd__ = __add__


_ADDITIONS = (torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__iadd__)


def _answered_by_dense(name: str) -> Callable:
    def method(self: IntervalMask, *args: Any) -> Any:
        return getattr(self.dense(), name)(*(a.dense() if isinstance(a, IntervalMask) else a for a in args))

    return method


# Python looks operators up on the class, past __getattr__.
for _name in ("getitem", "and", "rand", "or", "ror", "xor", "invert", "sub", "rsub", "mul", "rmul",
              "eq", "ne", "lt", "le", "gt", "ge", "len", "iter"):  # fmt: skip
    setattr(IntervalMask, f"__{_name}__", _answered_by_dense(f"__{_name}__"))
IntervalMask.__hash__ = object.__hash__  # type: ignore[method-assign]


def dense_mask(arguments: dict[str, Any]) -> Tensor:
    """What transformers' own function makes of the arguments where it may leave nothing out: always a bool mask."""
    from transformers.masking_utils import sdpa_mask

    mask = sdpa_mask(**arguments, allow_is_causal_skip=False, allow_is_bidirectional_skip=False)
    assert mask is not None
    return mask


# ------------------------------------------------------------------------------------------------- recognition


@functools.cache
def _makers() -> dict[Any, Callable[..., Interval]]:
    """The code of transformers' mask functions, each with the interval that its captured values make.

    Functions made anew at each call are told apart by their code, which they share, and not by their names.
    """
    from transformers import masking_utils as theirs

    nothing = torch.empty(0)
    makers: dict[Any, Callable[..., Interval]] = {
        theirs.causal_mask_function: lambda: Interval(right=0),
        theirs.bidirectional_mask_function: lambda: Interval(),
        theirs.sliding_window_overlay(1): lambda sliding_window: Interval(left=sliding_window - 1),  # it counts itself
        theirs.packed_sequence_mask_function(nothing): lambda packed_sequence_mask: Interval(
            sequence_ids=packed_sequence_mask
        ),
    }
    if hasattr(theirs, "sliding_window_bidirectional_overlay"):  # so many on each side, and itself
        bidirectional = theirs.sliding_window_bidirectional_overlay(1)
        makers[bidirectional] = lambda sliding_window: Interval(sliding_window, sliding_window)
    return {function.__code__: maker for function, maker in makers.items()}


@functools.cache
def _and_code() -> Any:
    from transformers.masking_utils import and_masks

    return and_masks().__code__


def recognize(mask_function: Any) -> Interval | None:
    """The interval that a mask function is, or None if it is none that we know."""
    from transformers import masking_utils as theirs

    if mask_function is theirs.causal_mask_function:
        return Interval(right=0)
    if mask_function is theirs.bidirectional_mask_function:
        return Interval()
    if torch.compiler.is_compiling():  # which cannot look into what a function has captured
        return None
    code = getattr(mask_function, "__code__", None)
    if code is None:
        return None
    captured = {
        name: cell.cell_contents for name, cell in zip(code.co_freevars, mask_function.__closure__ or (), strict=True)
    }
    if code is _and_code():
        return _intersection([recognize(function) for function in captured["mask_functions"]])
    try:
        interval = _makers()[code](**captured)
    except (KeyError, TypeError):  # another function, or one of a transformers that has changed
        return None
    sizes = (interval.left, interval.right)
    return interval if all(isinstance(size, int) and size >= -1 for size in sizes) else None


def _intersection(intervals: list[Interval | None]) -> Interval | None:
    known = [interval for interval in intervals if interval is not None]
    ids = [interval.sequence_ids for interval in known if interval.sequence_ids is not None]
    if len(known) < len(intervals) or len(ids) > 1:
        return None
    left, right = (
        min((size for size in sizes if size >= 0), default=-1)
        for sizes in ([interval.left for interval in known], [interval.right for interval in known])
    )
    return Interval(left, right, ids[0] if ids else None)


# ------------------------------------------------------------------------------------------- the mask function


def interval_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable | None = None,
    attention_mask: Tensor | IntervalMask | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    config: Any = None,
    **_: Any,
) -> IntervalMask | Tensor:
    """The mask function of transformers' ``AttentionMaskInterface``; its arguments are those of ``sdpa_mask`` there.

    Returns:
        an :class:`IntervalMask`; or, where the function is no interval, or the caller asks for a mask that it can
        compute with, or one row decodes in a compiled graph or a static cache, bool (batch, 1, q_length, kv_length).
        Never None, which would leave open how queries and keys are aligned. For a model whose code does not call the
        attention interface, the floating mask that its own attention adds to the scores.
    """
    from transformers.masking_utils import causal_mask_function, eager_mask

    if isinstance(attention_mask, IntervalMask):  # generate() made it before the model's forward
        return attention_mask
    if isinstance(q_offset, Tensor):
        q_offset = q_offset.clone()  # the live counter of a static cache, which its layers move on
    if attention_mask is not None and attention_mask.dtype != torch.bool:
        attention_mask = attention_mask.to(torch.bool)
    mask_function = causal_mask_function if mask_function is None else mask_function
    arguments = dict(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        use_vmap=use_vmap,
        device=device,
    )
    if config is not None and not _calls_the_interface(type(config).__module__):
        return eager_mask(**arguments, dtype=dtype)
    # One row's dense mask is no larger than a padding mask, and a tensor is what compiled graphs take best.
    row = q_length == 1 and (isinstance(q_offset, Tensor) or torch.compiler.is_compiling())
    interval = None if row else recognize(mask_function)
    if interval is None:
        return dense_mask(arguments)
    if interval.sequence_ids is not None:
        packed = _packed(interval, arguments)
        return dense_mask(arguments) if packed is None else packed
    if not (allow_is_causal_skip or allow_is_bidirectional_skip):
        return dense_mask(arguments)
    padding = _key_padding_mask(attention_mask, kv_length, kv_offset)
    seqlens_k = None
    if interval != Interval():
        # The last row stands at key q_offset + q_length - 1 - kv_offset, of which seqlens_k is the next.
        end = q_offset + q_length - kv_offset
        if isinstance(end, Tensor) or end != kv_length:
            fits = isinstance(end, Tensor) or 0 <= end <= kv_length
            if not fits or interval.right != 0:  # what lies past the last row's key must be hidden anyway
                return dense_mask(arguments)
            end = torch.as_tensor(end, dtype=torch.int32, device=device)
            seqlens_k = end.reshape(-1).expand(batch_size)
    return IntervalMask(interval[:2], seqlens_k, padding, None, 0, arguments)


@functools.cache
def _calls_the_interface(configuration: str) -> bool:
    """Whether a model of transformers, by the module of its configuration, asks the interface for its attention.

    MPT, Longformer, Canine and others take any name for their own eager attention, and its kind of mask.
    """
    code = sys.modules.get(configuration.replace(".configuration_", ".modeling_"))
    is_theirs = configuration.startswith("transformers.models.")
    return code is None or not is_theirs or hasattr(code, "ALL_ATTENTION_FUNCTIONS")


def _key_padding_mask(attention_mask: Tensor | None, kv_length: int, kv_offset: int) -> Tensor | None:
    """Of the keys [kv_offset, kv_offset + kv_length); what a shorter mask does not reach is hidden."""
    if attention_mask is None:
        return None
    # The look costs a CPU less than the padding would in each layer; a GPU would be waited for.
    missing = kv_offset + kv_length - attention_mask.shape[-1]
    may_look = attention_mask.device.type == "cpu" and not torch.compiler.is_compiling()
    if may_look and missing <= 0 and bool(attention_mask.all()):
        return None
    if missing > 0:
        attention_mask = torch.nn.functional.pad(attention_mask, (0, missing))
    return attention_mask[:, kv_offset : kv_offset + kv_length]


def _packed(interval: Interval, arguments: dict[str, Any]) -> IntervalMask | None:
    """Sequences one after the other in each row of the batch, or None if these are not just that."""
    ids, attention_mask = interval.sequence_ids, arguments["attention_mask"]
    assert ids is not None
    shape = (arguments["batch_size"], arguments["q_length"])
    offsets = (arguments["q_offset"], arguments["kv_offset"])
    if attention_mask is not None or arguments["kv_length"] != shape[1] or offsets != (0, 0) or ids.shape != shape:
        return None
    first = torch.ones_like(ids, dtype=torch.bool)  # of its sequence; every row of the batch begins one
    torch.ne(ids[:, 1:], ids[:, :-1], out=first[:, 1:])
    starts = first.flatten().nonzero().flatten()
    cu_seqlens = torch.nn.functional.pad(starts, (0, 1), value=math.prod(shape)).to(torch.int32)
    return IntervalMask(interval[:2], None, None, cu_seqlens, int(cu_seqlens.diff().max()), arguments)
