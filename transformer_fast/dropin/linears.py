"""Matrix products of a built model with weights that oneDNN has laid out once, for inference on a CPU.

Beside fused attention, a model's time on a CPU is in its linear layers. PyTorch multiplies with weights as they lie,
which oneDNN, that PyTorch ships, often does quicker once it may choose the layout (the freezing of ``torch.compile``
does it too). Not everywhere: on an AMD processor it was so in float32 for any number of rows, on an Intel Xeon only for
8 to 64, and in bfloat16 up to 256. So both are timed once. The kernels are oneDNN's, none of ours.
"""

from __future__ import annotations

import contextlib
import functools
import statistics
import warnings
from time import perf_counter
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import is_plain_inference
from .swap import Swapped, is_swapped, own_class, swapped

_Module = TypeVar("_Module", bound=nn.Module)

#: Rows that the layout is chosen for; it serves other numbers of rows as well.
_ROWS = 512
#: Below so many elements of a weight oneDNN's call, about 18 us, is more than it saves.
_LEAST = {torch.float32: 2**17, torch.bfloat16: 2**16}


def packable_dtypes() -> tuple[torch.dtype, ...]:
    """The dtypes that this machine's oneDNN multiplies at full speed; none where PyTorch is built without it."""
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return ()
    is_bf16_fast = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return (torch.float32, torch.bfloat16) if is_bf16_fast else (torch.float32,)


_DTYPES = packable_dtypes()


def _may_pack(x: Tensor, weight: Tensor, bias: Tensor | None, in_features: int) -> bool:
    """Is this product inference on a CPU, which nobody traces, differentiates or casts?"""
    dtype = x.dtype
    return (
        dtype in _DTYPES
        and weight.dtype is dtype
        and is_plain_inference(x, weight, bias)
        and x.dim() >= 2
        and x.numel() > 0
        and x.shape[-1] == in_features
        and weight.numel() >= _LEAST[dtype]
        and not weight.is_inference()  # changes of which are not counted
        and weight.grad is None  # else an optimizer is about to change it, and fused ones are not counted
        and (bias is None or _is_plain_bias(bias, weight.numel() // in_features, dtype))
    )


def _is_plain_bias(bias: Tensor, out_features: int, dtype: torch.dtype) -> bool:
    """Is it what oneDNN takes without a look at its strides?"""
    return bias.dtype is dtype and bias.shape == (out_features,) and bias.is_contiguous()


class _LaidOut(NamedTuple):
    """A weight as oneDNN has laid it out, and what it was then."""

    packed: Tensor
    alias: Tensor  # keeps the memory, so that no other weight can come to lie at its address
    version: int

    def is_of(self, weight: Tensor) -> bool:
        alias = self.alias
        return (
            weight._version == self.version
            and weight.data_ptr() == alias.data_ptr()
            and weight.dtype is alias.dtype
            and weight.shape == alias.shape
            and weight.stride() == alias.stride()
        )


def _multiply(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise.default(x.contiguous(), packed, bias, "none", [], "")


def _lay_out(weight: Tensor, by_columns: bool) -> _LaidOut:
    rows = (weight.t() if by_columns else weight).detach().contiguous()
    return _LaidOut(torch.ops.mkldnn._reorder_linear_weight(rows, _ROWS), weight.detach(), weight._version)


#: What was found of products so far, by the weight's shape and order, the dtype and the magnitude of the rows.
_quicker: dict[tuple[torch.Size, bool, torch.dtype, int], bool] = {}
#: A laid-out weight is used where it takes less than so much of the other's time: it also takes memory.
_WORTH_IT = 0.95
#: Pairs of products that are timed, and the seconds after which no other pair is begun.
_PAIRS, _PATIENCE = 5, 0.03


def is_quicker_packed(x: Tensor, weight: Tensor, bias: Tensor | None, by_columns: bool) -> bool:
    """Is the product with this weight laid out quicker on this machine, by trying both in turns?

    Asked once a process for each kind of product.
    """
    packed, rows = _lay_out(weight, by_columns).packed, weight.t() if by_columns else weight
    _multiply(x, packed, bias)  # oneDNN prepares a product when it meets it first
    times: list[float] = []
    begin = perf_counter()
    while len(times) < _PAIRS and (not times or perf_counter() - begin < _PATIENCE):
        start = perf_counter()
        F.linear(x, rows, bias)
        middle = perf_counter()
        _multiply(x, packed, bias)
        times.append((perf_counter() - middle) / (middle - start))
    return statistics.median(times) < _WORTH_IT


class PackedProduct:
    """:func:`torch.nn.functional.linear` for one layer, with the weight laid out where that is quicker.

    The first time that a kind of product (the weight's shape, the dtype, the number of rows to a power of two) is met
    in a process, it is timed both ways, which takes at most five of either. A weight is laid out at its first use by a
    kind that is quicker so, and again when it changed.

    Where gradients are asked for, under autocast, a compiler, a tracer, transforms or modes, on other devices, in
    dtypes that the machine does not multiply natively, and for weights below 2**17 elements (bfloat16: 2**16), it is
    that function itself, and the laid-out weight is dropped: training may change weights in ways that are not counted.
    """

    def __init__(self) -> None:
        self.found: _LaidOut | None = None

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None = None, *, by_columns: bool = False) -> Tensor:
        """The product.

        Args:
            x: (..., in_features).
            weight: (out_features, in_features); or (in_features, out_features) ``by_columns``, as in GPT-2.
            bias: (out_features,).

        Returns:
            (..., out_features), equal to the function's up to rounding.
        """
        in_features = weight.shape[0 if by_columns else -1]
        if not _may_pack(x, weight, bias, in_features):
            self.found = None
            return F.linear(x, weight.t() if by_columns else weight, bias)
        if torch.are_deterministic_algorithms_enabled():  # what is quicker may be another one tomorrow
            return F.linear(x, weight.t() if by_columns else weight, bias)
        kind = (weight.shape, by_columns, weight.dtype, (x.numel() // in_features).bit_length())
        quicker = _quicker.get(kind)
        if quicker is None:
            quicker = _quicker[kind] = is_quicker_packed(x, weight, bias, by_columns)
        if not quicker:
            return F.linear(x, weight.t() if by_columns else weight, bias)
        found = self.found  # one look: another thread may drop it
        if found is None or not found.is_of(weight):
            self.found = found = _lay_out(weight, by_columns)
        return _multiply(x, found.packed, bias)

    def __reduce__(self) -> Any:  # a copy lays out its own
        return PackedProduct, ()


class _Packs(Swapped):
    """A linear layer with a :class:`PackedProduct`."""

    weight: Any
    bias: Any
    product: Any
    _by_columns = False

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features)."""
        return self.product(x, self.weight, self.bias, by_columns=self._by_columns)


class _PacksColumns(_Packs):
    _by_columns = True


@functools.cache
def _mixins() -> dict[Any, Any]:
    """The classes whose modules are taken over, and by what."""
    mixins: dict[Any, Any] = {nn.Linear: _Packs}
    with contextlib.suppress(ImportError):
        from transformers.pytorch_utils import Conv1D

        mixins[Conv1D] = _PacksColumns
    return mixins


def pack_linears(model: _Module) -> _Module:
    """Let a built model multiply with weights that oneDNN has laid out for it, in inference on a CPU.

    Every ``nn.Linear`` multiplies by a :class:`PackedProduct`; so do the layers ``Conv1D`` of transformers' GPT-2, and
    the products of this library's own models. The modules stay the same objects, with the same parameters; subclasses
    of ``nn.Linear`` are left alone, since they may have a ``forward`` of their own. :func:`unpack_linears` undoes it.

    Whether a laid-out weight is quicker depends on the machine, the shape and the number of rows, so each kind of
    product is timed both ways when it is first met: the first batch of a new size takes longer, and the last bits of
    results may differ from process to process. Under ``torch.use_deterministic_algorithms(True)`` nothing is packed.

    A weight is laid out when it is first multiplied without gradients (under ``torch.no_grad()`` or
    ``torch.inference_mode()``) by a product that is quicker so, which takes its size in memory once more; again after
    ``load_state_dict``, ``.to()``, an operation in place or anything else that PyTorch counts; and again after a
    product with gradients. While a weight has a ``grad`` it is multiplied as it lies. What writes through
    ``weight.data``, as some adapters do when they are merged, or through collective operations, PyTorch does not
    count: call this function again after that.

    Args:
        model: any module; changed in place.

    Returns:
        the model. A warning says so if nothing in it can be packed, or not on this machine.
    """
    mixins = _mixins()
    count = 0
    for module in model.modules():
        own: Any = type(module)
        if own in mixins:
            module.__class__ = swapped(mixins[own], own)
        if isinstance(module, _Packs) or getattr(type(module), "product", None) is F.linear:
            vars(module)["product"] = PackedProduct()
            count += 1
    if count == 0 or not _DTYPES:
        why = "has no nn.Linear" if count == 0 else "stays as it is: this PyTorch is built without oneDNN"
        warnings.warn(f"{type(model).__name__} {why}; nothing is packed", stacklevel=2)
    return model


def unpack_linears(model: _Module) -> _Module:
    """Give back what :func:`pack_linears` took, and the memory.

    Args:
        model: any module; changed in place.

    Returns:
        the model, with its own linear layers.
    """
    for module in model.modules():
        if isinstance(module, _Packs) and is_swapped(module):
            module.__class__ = own_class(module)
        if isinstance(vars(module).get("product"), PackedProduct):
            del module.product
    return model
