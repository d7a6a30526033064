"""From arguments to an :class:`AttentionSpec`: every argument is checked here, once, and nowhere else.

A spec is what a back end is asked about (``supports(spec)``) and what it runs from. It holds no tensor data, so
equal calls share one spec, and the checks cost nothing after the first call of a shape.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_compiling

from .layout import Order
from .masks import UNBOUNDED

BACKENDS = ("auto", "reference", "cpu", "triton", "cuda", "emulated")
_FLOAT32 = torch.finfo(torch.float32)
COMPUTE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class UnsupportedError(RuntimeError):
    """A back end that was asked for by name cannot do the problem; the message says why."""


class Operands(NamedTuple):
    """The tensors of one problem. Packed problems carry ``cu_seqlens_*`` and have no batch dimension.

    Paged problems carry ``block_table``; ``key`` and ``value`` are then a cache of pages, (num_pages, num_kv_heads,
    page_size, head_dim), and key ``j`` of batch entry ``b`` is row ``j % page_size`` of page
    ``block_table[b, j // page_size]``.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    seqlens_k: Tensor | None = None
    key_padding_mask: Tensor | None = None
    bias: Tensor | None = None
    alibi_slopes: Tensor | None = None
    sinks: Tensor | None = None
    rng_seed: Tensor | None = None
    block_table: Tensor | None = None

    def to_bhsd(self, order: Order) -> Operands:
        """Those of this order as views in the library's own."""
        if order != "bshd":
            return self
        query, key, value, *others = self
        return Operands(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), *others)


class Options(NamedTuple):
    """Everything about a problem that is not a tensor. Windows: -1 is unbounded, causal is ``window_right = 0``."""

    max_seqlen_q: int = 0
    max_seqlen_k: int = 0
    softmax_scale: float | None = None
    window_left: int = -1
    window_right: int = -1
    softcap: float | None = None
    dropout_p: float = 0.0
    deterministic: bool = False
    backend: str = "auto"


class Layout(NamedTuple):
    """What is known of an optional operand without reading it."""

    dtype: torch.dtype
    device: torch.device
    shape: torch.Size
    stride: tuple[int, ...]


@dataclass(frozen=True)
class AttentionSpec:
    """One attention problem, validated: shapes, strides, dtypes and options, but no data.

    Sizes are those of design names: for packed problems ``seqlen_q`` / ``seqlen_k`` are the longest sequences and
    ``total_q`` / ``total_k`` the packed lengths; for paged ones ``seqlen_k`` is what a row of the table has room for.
    """

    batch: int
    num_heads: int
    num_kv_heads: int
    seqlen_q: int
    seqlen_k: int
    head_dim: int
    head_dim_v: int
    total_q: int
    total_k: int
    is_packed: bool
    dtype: torch.dtype
    device: torch.device
    softmax_scale: float
    options: Options
    layouts: tuple[Layout | None, ...]  # one an operand, in the order of Operands
    page_size: int = 0  # keys of a page, 0 where the cache has none

    @property
    def group_size(self) -> int:
        """Query heads that share one KV head."""
        return self.num_heads // self.num_kv_heads

    @property
    def is_paged(self) -> bool:
        """Keys and values lie in pages, found through ``block_table``."""
        return self.page_size > 0

    @property
    def lse_shape(self) -> tuple[int, ...]:
        """Of one number a row: (batch, num_heads, seqlen_q), or packed (num_heads, total_q)."""
        return (self.num_heads, self.total_q) if self.is_packed else (self.batch, self.num_heads, self.seqlen_q)

    def layout(self, name: str) -> Layout | None:
        """The layout of an operand by name, None where it was not given."""
        return self.layouts[Operands._fields.index(name)]


def layout_of(tensor: Tensor | None) -> Layout | None:
    """Shape, strides, dtype and device of an operand."""
    return None if tensor is None else Layout(tensor.dtype, tensor.device, tensor.shape, tensor.stride())


# ---------------------------------------------------------------------------------------------- plain options


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _require_type(value: Any, kinds: type | tuple[type, ...], name: str, allowed: str) -> None:
    # bool is an int to Python, but a window of True or a scale of False is a slip.
    wrong_bool = isinstance(value, bool) and kinds is not bool
    if wrong_bool or not isinstance(value, kinds):
        raise TypeError(f"{name} is {value!r} of type {type(value).__name__}; allowed: {allowed}")


# Messages are formed only where they are raised: a compiler traces these lines with symbolic numbers, which it
# cannot format.


def _require_float32(value: Any, name: str, allowed: str, *, positive: bool = False) -> None:
    """A real number that float32, in which scores are computed, can hold."""
    _require_type(value, (int, float, torch.SymFloat, torch.SymInt), name, allowed)
    fits = abs(value) <= _FLOAT32.max and (not positive or value >= _FLOAT32.tiny)  # NaN is not <= anything
    if not fits:
        raise ValueError(f"{name} is {value}; allowed: {allowed}")


def parse_window(window_size: Any, causal: Any) -> tuple[int, int]:
    """``window_size`` and ``causal`` as (left, right), -1 for unbounded."""
    _require_type(causal, bool, "causal", "True or False")
    if window_size is None:
        return -1, (0 if causal else -1)
    _require_type(window_size, (tuple, list), "window_size", "None or a pair (left, right)")
    if len(window_size) != 2:
        raise ValueError(f"window_size is {window_size!r}; allowed: a pair (left, right), each side None or >= -1")
    sides = []
    for side in window_size:
        if side is None:
            sides.append(-1)
            continue
        _require_type(side, (int, torch.SymInt), "window_size", "a pair (left, right) of integers or None")
        if side < -1:
            raise ValueError(f"window_size is {window_size!r}; allowed: each side None, -1 (unbounded) or >= 0")
        sides.append(-1 if side >= UNBOUNDED else side)  # "no limit" is often written sys.maxsize
    return sides[0], (0 if causal else sides[1])


def parse_flag(value: Any, name: str) -> None:
    """Raise unless it is True or False."""
    _require_type(value, bool, name, "True or False")


def parse_options(
    causal: Any = False,
    window_size: Any = None,
    softmax_scale: Any = None,
    softcap: Any = None,
    dropout_p: Any = 0.0,
    deterministic: Any = False,
    backend: Any = "auto",
    max_seqlen_q: Any = 0,
    max_seqlen_k: Any = 0,
) -> Options:
    """The arguments that are not tensors, checked and in normal form."""
    left, right = parse_window(window_size, causal)
    if softmax_scale is not None:
        _require_float32(softmax_scale, "softmax_scale", "None or a finite number that float32 can hold")
    if softcap is not None:
        _require_float32(softcap, "softcap", "None or a finite number > 0 that float32 can hold", positive=True)
    _require_type(dropout_p, (int, float), "dropout_p", "a number in [0, 1)")
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p is {dropout_p}; allowed: 0 <= dropout_p < 1")
    _require_type(deterministic, bool, "deterministic", "True or False")
    _require_type(backend, str, "backend", f"one of {', '.join(BACKENDS)}")
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}; allowed: {', '.join(BACKENDS)}")
    for name, length in (("max_seqlen_q", max_seqlen_q), ("max_seqlen_k", max_seqlen_k)):
        _require_type(length, (int, torch.SymInt), name, "an integer in int32")
        if not 0 <= length < 2**31:
            raise ValueError(f"{name} is {length}; allowed: 0 to {2**31 - 1}")
    return Options(
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
        softmax_scale=None if softmax_scale is None else float(softmax_scale),
        window_left=left,
        window_right=right,
        softcap=None if softcap is None else float(softcap),
        dropout_p=float(dropout_p),
        deterministic=deterministic,
        backend=backend,
    )


_remembered_options = functools.lru_cache(maxsize=1024, typed=True)(parse_options)
_SIDES = frozenset((int, type(None)))  # of a window that may be remembered: True and 1.0 are equal to 1, and wrong


def options_of(*arguments: Any) -> Options:
    """:func:`parse_options`, remembered: the same few choices come again and again."""
    window = arguments[1] if len(arguments) > 1 else None
    if is_compiling() or (type(window) is tuple and not _SIDES.issuperset(map(type, window))):
        return parse_options(*arguments)
    try:
        return _remembered_options(*arguments)
    except TypeError:  # a window given as a list cannot be remembered; what is truly wrong raises again here
        return parse_options(*arguments)


# ---------------------------------------------------------------------------------------------------- tensors


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(str(d).removeprefix("torch.") for d in dtypes)


def _check_tensor(tensor: Any, name: str, query: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    """It is a strided tensor on the query's device with one of the dtypes."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} is of type {type(tensor).__name__}; allowed: a torch.Tensor")
    if tensor.dtype not in dtypes:
        raise TypeError(f"{name} has dtype {_names((tensor.dtype,))}; allowed: {_names(dtypes)}")
    _require(not tensor.is_nested, f"{name} is a nested tensor; allowed: a plain one, or packed with attention_varlen")
    _require(tensor.layout == torch.strided, f"{name} has layout {tensor.layout}; allowed: torch.strided")
    _require(
        tensor.device == query.device, f"{name} is on device {tensor.device}; allowed: {query.device}, as the query"
    )


def _check_shape(tensor: Tensor, name: str, *allowed: tuple[int, ...]) -> None:
    _require(
        tuple(tensor.shape) in allowed,
        f"{name} has shape {tuple(tensor.shape)}; allowed: {' or '.join(str(shape) for shape in allowed)}",
    )


_NAMES = ("query", "key", "value")
_PAGED_NAMES = ("query", "k_pages", "v_pages")


def _check_qkv(operands: Operands, ndim: int, shapes: str, names: tuple[str, str, str] = _NAMES) -> None:
    query = operands.query
    _check_tensor(query, "query", query, COMPUTE_DTYPES)
    for name, tensor in zip(names, operands[:3], strict=True):
        _check_tensor(tensor, name, query, (query.dtype,))
        _require(tensor.dim() == ndim, f"{name} has shape {tuple(tensor.shape)}; allowed: {ndim} dimensions {shapes}")
        _require(
            tensor.stride(-1) == 1 or tensor.shape[-1] <= 1 or tensor.numel() == 0,
            f"{name} has strides {tensor.stride()}; allowed: a contiguous last dimension (call .contiguous())",
        )


def _check_sizes(operands: Operands, num_heads: int, num_kv_heads: int, names: tuple[str, str, str] = _NAMES) -> None:
    """What all kinds of problems have in common: heads and head dims."""
    query, key, value = operands.query, operands.key, operands.value
    _, key_name, value_name = names
    _require(num_heads > 0, f"query has shape {tuple(query.shape)}; allowed: at least one head")
    _require(
        num_kv_heads > 0 and num_heads % num_kv_heads == 0,
        f"{key_name} has {num_kv_heads} heads for a query of {num_heads} heads; allowed: a divisor of {num_heads}",
    )
    for name, tensor in (("query", query), (value_name, value)):
        _require(tensor.shape[-1] > 0, f"{name} has head_dim 0; allowed: at least 1")
    _require(
        key.shape[-1] == query.shape[-1],
        f"{key_name} has head_dim {key.shape[-1]}; allowed: {query.shape[-1]}, as the query",
    )
    _require(
        value.shape[:-1] == key.shape[:-1],
        f"{value_name} has shape {tuple(value.shape)}; allowed: {tuple(key.shape[:-1])} + (head_dim_v,), as {key_name}",
    )


def _check_per_head(operands: Operands, batch: int, num_heads: int) -> None:
    """ALiBi slopes and sinks."""
    query, slopes, sinks = operands.query, operands.alibi_slopes, operands.sinks
    if slopes is not None:
        _check_tensor(slopes, "alibi_slopes", query, (torch.float32,))
        _check_shape(slopes, "alibi_slopes", (num_heads,), (batch, num_heads))
        _require(
            not (slopes.requires_grad and torch.is_grad_enabled()),
            "alibi_slopes requires grad; allowed: slopes without gradient (call .detach())",
        )
    if sinks is not None:
        _check_tensor(sinks, "sinks", query, tuple({torch.float32, query.dtype}))
        _check_shape(sinks, "sinks", (num_heads,))


def _check_lengths(operands: Operands, batch: int) -> None:
    _check_tensor(operands.seqlens_k, "seqlens_k", operands.query, (torch.int32,))
    assert operands.seqlens_k is not None
    _check_shape(operands.seqlens_k, "seqlens_k", (batch,))


def _check_dense(operands: Operands) -> None:
    query, key = operands.query, operands.key
    _check_qkv(operands, 4, "(batch, num_heads, seqlen, head_dim)")
    batch, num_heads, seqlen_q, _ = query.shape
    _require(key.shape[0] == batch, f"key has batch {key.shape[0]}; allowed: {batch}, as the query")
    _check_sizes(operands, num_heads, key.shape[1])
    seqlen_k = key.shape[2]
    if operands.seqlens_k is not None:
        _check_lengths(operands, batch)
    if operands.key_padding_mask is not None:
        _check_tensor(operands.key_padding_mask, "key_padding_mask", query, (torch.bool,))
        _check_shape(operands.key_padding_mask, "key_padding_mask", (batch, seqlen_k))
    if operands.bias is not None:
        full = (batch, num_heads, seqlen_q, seqlen_k)
        _check_tensor(operands.bias, "bias", query, tuple(dict.fromkeys((torch.bool, torch.float32, query.dtype))))
        fits = operands.bias.dim() == 4 and all(n in (1, m) for n, m in zip(operands.bias.shape, full, strict=True))
        _require(fits, f"bias has shape {tuple(operands.bias.shape)}; allowed: broadcastable to {full}")
    _check_per_head(operands, batch, num_heads)


def _check_paged(operands: Operands) -> None:
    query, k_pages, table = operands.query, operands.key, operands.block_table
    assert table is not None
    _check_qkv(operands, 4, "(batch, num_heads, seqlen_q, head_dim), in pages (num_pages, ...)", _PAGED_NAMES)
    batch, num_heads, _, _ = query.shape
    _check_sizes(operands, num_heads, k_pages.shape[1], _PAGED_NAMES)
    _require(k_pages.shape[2] > 0, f"k_pages has shape {tuple(k_pages.shape)}; allowed: at least one key in a page")
    _check_tensor(table, "block_table", query, (torch.int32,))
    _require(
        table.dim() == 2 and table.shape[0] == batch,
        f"block_table has shape {tuple(table.shape)}; allowed: ({batch}, max_pages_per_sequence)",
    )
    _check_lengths(operands, batch)
    for name in ("cu_seqlens_q", "cu_seqlens_k", "key_padding_mask", "bias", "rng_seed"):
        _require(getattr(operands, name) is None, f"{name} is given with a paged cache; allowed: None")
    _check_per_head(operands, batch, num_heads)
    for name, tensor in (*zip(_PAGED_NAMES, operands[:3], strict=True), ("sinks", operands.sinks)):
        _require(
            tensor is None or not (torch.is_grad_enabled() and tensor.requires_grad),
            f"{name} requires grad, which a paged cache does not give; allowed: a tensor without gradient (inference: "
            "call under torch.no_grad(), or .detach())",
        )


def _check_packed(operands: Operands, options: Options) -> None:
    query, key, cu_q, cu_k = operands.query, operands.key, operands.cu_seqlens_q, operands.cu_seqlens_k
    _check_qkv(operands, 3, "(total, num_heads, head_dim)")
    _check_sizes(operands, query.shape[1], key.shape[1])
    for name in ("seqlens_k", "key_padding_mask", "bias"):
        _require(getattr(operands, name) is None, f"{name} is given with packed sequences; allowed: None")
    for name, cu in (("cu_seqlens_q", cu_q), ("cu_seqlens_k", cu_k)):
        _check_tensor(cu, name, query, (torch.int32,))
        assert cu is not None
        _require(
            cu.dim() == 1 and cu.shape[0] >= 1 and (cu.stride(0) == 1 or cu.shape[0] == 1),
            f"{name} has shape {tuple(cu.shape)} and strides {cu.stride()}; allowed: contiguous (batch + 1,)",
        )
    assert cu_q is not None and cu_k is not None
    _require(
        cu_q.shape == cu_k.shape,
        f"cu_seqlens_k has shape {tuple(cu_k.shape)}; allowed: {tuple(cu_q.shape)}, as cu_seqlens_q",
    )
    _check_per_head(operands, cu_q.shape[0] - 1, query.shape[1])


def check(operands: Operands, options: Options) -> None:
    """Raise ValueError or TypeError if the operands do not make a problem. Works on fake tensors too."""
    if operands.block_table is not None:
        _check_paged(operands)
    elif operands.cu_seqlens_q is None and operands.cu_seqlens_k is None:
        _check_dense(operands)
    else:
        _check_packed(operands, options)


def make_spec(operands: Operands, options: Options) -> AttentionSpec:
    """Check the operands and write down everything about them except their data."""
    check(operands, options)
    query, value = operands.query, operands.value
    is_packed, page_size = operands.cu_seqlens_q is not None, 0
    if is_packed:
        assert operands.cu_seqlens_q is not None
        batch = operands.cu_seqlens_q.shape[0] - 1
        total_q, num_heads, head_dim = query.shape
        total_k, num_kv_heads, head_dim_v = value.shape
        seqlen_q, seqlen_k = options.max_seqlen_q, options.max_seqlen_k
    else:
        batch, num_heads, seqlen_q, head_dim = query.shape
        _, num_kv_heads, seqlen_k, head_dim_v = value.shape
        if operands.block_table is not None:
            page_size = seqlen_k
            seqlen_k = operands.block_table.shape[1] * page_size
        total_q, total_k = batch * seqlen_q, batch * seqlen_k
    return AttentionSpec(
        batch=batch,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        seqlen_q=seqlen_q,
        seqlen_k=seqlen_k,
        head_dim=head_dim,
        head_dim_v=head_dim_v,
        total_q=total_q,
        total_k=total_k,
        is_packed=is_packed,
        dtype=query.dtype,
        device=query.device,
        softmax_scale=head_dim**-0.5 if options.softmax_scale is None else options.softmax_scale,
        options=options,
        layouts=tuple(layout_of(t) for t in operands),
        page_size=page_size,
    )


def check_values(operands: Operands, spec: AttentionSpec) -> None:
    """Raise ValueError for lengths and pages out of range.

    Reads the tensors, so only where that does not stall a device.
    """
    if operands.seqlens_k is not None:
        for b, length in enumerate(operands.seqlens_k.tolist()):
            _require(
                0 <= length <= spec.seqlen_k, f"seqlens_k[{b}] is {length}; allowed: 0 to {spec.seqlen_k} (seqlen_k)"
            )
    if operands.block_table is not None:
        assert operands.seqlens_k is not None
        check_pages(operands.block_table, operands.seqlens_k, operands.key.shape[0], spec.page_size)
    for side, total, longest in (("q", spec.total_q, spec.seqlen_q), ("k", spec.total_k, spec.seqlen_k)):
        cu = getattr(operands, f"cu_seqlens_{side}")
        if cu is not None:
            check_starts(cu, side, longest, total)


def check_pages(block_table: Tensor, seqlens_k: Tensor, num_pages: int, page_size: int) -> None:
    """Raise ValueError for a page out of range among those that hold a sequence's keys."""
    rows = zip(block_table.tolist(), seqlens_k.tolist(), strict=True)
    for b, (pages, length) in enumerate(rows):
        for i, page in enumerate(pages[: -(-length // page_size)]):
            _require(
                0 <= page < num_pages, f"block_table[{b}, {i}] is {page}; allowed: 0 to {num_pages - 1} (num_pages)"
            )


def check_starts(cu_seqlens: Tensor, side: str, longest: int, total: int | None = None) -> list[int]:
    """The entries of ``cu_seqlens_q`` or ``cu_seqlens_k``; ``total`` is None where nothing is packed, as in pages.

    Raises:
        ValueError: they do not begin with 0, or rise by less than 0 or more than ``longest``, or end elsewhere.
    """
    name = f"cu_seqlens_{side}"
    values: list[int] = cu_seqlens.tolist()
    _require(values[0] == 0, f"{name}[0] is {values[0]}; allowed: 0")
    _require(total in (None, values[-1]), f"{name}[-1] is {values[-1]}; allowed: {total}, the packed length")
    for b, (begin, end) in enumerate(itertools.pairwise(values)):
        _require(
            0 <= end - begin <= longest,
            f"{name}[{b + 1}] - {name}[{b}] is {end - begin}; allowed: 0 to {longest} (max_seqlen_{side})",
        )
    return values
