"""Linear layers of a built model by kernels of ours on a CPU, in inference with weights that are laid out once.

Beside fused attention, a model's time on a CPU is in its linear layers. PyTorch multiplies with weights as they lie and
goes over the result again for what follows. Here a weight is laid out as the kernel reads it, and bias, activation,
gate and residual are done before the sums leave the cache. Where that is quicker depends on the machine and the
product, so both are timed once.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..backends import cpu_linear
from ..backends.cpu import TYPES
from ..linear import GATES, followed
from ..ops import is_plain_inference
from ..pointwise import row_stride
from . import training
from .swap import Swapped, is_swapped, own_class, swapped
from .trial import is_quicker

_Module = TypeVar("_Module", bound=nn.Module)

#: Below so many elements of a weight there is little to gain.
_LEAST = 2**14


class Product(NamedTuple):
    """What is multiplied: one weight or, of a gate whose value has its own, two, each (out_features, in_features).

    ``by_columns``: they are (in_features, out_features).
    """

    weights: tuple[Tensor, ...]
    biases: tuple[Tensor | None, ...]
    activation: str | None
    residual: Tensor | None
    by_columns: bool

    @property
    def rows(self) -> list[Tensor]:
        """The weights (out_features, in_features)."""
        return [w.t() for w in self.weights] if self.by_columns else list(self.weights)

    @property
    def is_gated(self) -> bool:
        return self.activation in GATES

    @property
    def out_features(self) -> int:
        """Of the result: half a weight's where one holds both parts of a gate."""
        size = self.weights[0].shape[1 if self.by_columns else 0]
        return size // 2 if self.is_gated and len(self.weights) == 1 else size

    def plain(self, x: Tensor, multiply: Callable[..., Tensor] | None = None) -> Tensor:
        """By PyTorch's operators, or by another product and them."""
        multiply = multiply or F.linear
        if len(self.weights) == 1:
            return followed(multiply(x, self.rows[0], self.biases[0]), self.activation, self.residual)
        assert self.activation is not None
        y = GATES[self.activation](*map(multiply, (x, x), self.rows, self.biases))
        return y if self.residual is None else self.residual + y

    def packed(self, x: Tensor, found: _LaidOut) -> Tensor:
        """By the kernel."""
        residual = _residual(x, self)
        out = cpu_linear.multiply(_rows(x), found.layer(self), residual)
        return out if residual is not None or self.residual is None else self.residual + out


def _rows(x: Tensor) -> cpu_linear.Rows:
    stride = row_stride(x)
    if stride is None:
        x = x.contiguous()
        stride = x.shape[-1]
    return cpu_linear.Rows(x, x.numel() // x.shape[-1], stride)


def _residual(x: Tensor, product: Product) -> cpu_linear.Rows | None:
    """The residual as the kernel adds it to a product with ``x``, None where it cannot."""
    residual = product.residual
    if residual is None or residual.dtype is not x.dtype or residual.shape != (*x.shape[:-1], product.out_features):
        return None
    stride = row_stride(residual) if is_plain_inference(residual) else None
    return None if stride is None else cpu_linear.Rows(residual, x.numel() // x.shape[-1], stride)


class _LaidOut:
    """Weights as the kernel reads them, and what they were then."""

    def __init__(self, product: Product) -> None:
        rows = [w.detach() for w in product.rows]
        self.is_gated = product.is_gated
        self.isa = cpu_linear.instruction_set()
        self.sources = product.weights
        self.versions = [w._version for w in product.weights]
        #: They keep the memory, so that no other weight can come to lie at their addresses.
        self.aliases = [w.detach() for w in product.weights]
        self.packed = cpu_linear.lay_out(*_halves(tuple(rows), self.is_gated))

    def layer(self, product: Product) -> cpu_linear.Layer:
        """With what follows."""
        biases = product.biases
        gate, value = _halves(biases, True) if self.is_gated else (biases[0], None)
        return cpu_linear.Layer(self.packed, product.out_features, gate, value, product.activation)

    def is_of(self, product: Product) -> bool:
        """Are these its weights, unchanged, and not about to be changed?"""
        if (
            len(product.weights) != len(self.sources)
            or product.is_gated != self.is_gated
            or cpu_linear.instruction_set() != self.isa
        ):
            return False
        for weight, source, version, alias in zip(
            product.weights, self.sources, self.versions, self.aliases, strict=True
        ):
            if (
                weight is not source
                or weight._version != version
                or weight.data_ptr() != alias.data_ptr()
                or weight.grad is not None
                or weight.dtype is not alias.dtype
                or weight.shape != alias.shape
                or weight.stride() != alias.stride()
            ):
                return False
        return True


def _may_lay_out(product: Product) -> bool:
    """Are these weights that the kernel takes, whose changes are seen?"""
    first = product.weights[0]
    return (
        first.dtype in TYPES
        and first.dim() == 2
        and first.numel() >= _LEAST
        and all(
            w.dtype is first.dtype
            and w.shape == first.shape
            and w.stride() == first.stride()
            and not w.is_inference()  # changes of which are not counted
            and w.grad is None  # else an optimizer is about to change it, and fused ones are not counted
            for w in product.weights
        )
    )


def _takes(x: Tensor, product: Product) -> bool:
    """Are these rows for its weights, and biases that the kernel takes without a look at their strides?"""
    weight = product.weights[0]
    out_features, in_features = weight.shape
    if product.by_columns:
        out_features, in_features = in_features, out_features
    if not (x.dtype is weight.dtype and x.dim() >= 2 and x.shape[-1] == in_features and x.numel() > 0):
        return False
    for bias in product.biases:
        if bias is not None and not (
            bias.dtype is x.dtype and bias.dim() == 1 and len(bias) == out_features and bias.is_contiguous()
        ):
            return False
    return True


def _halves(parts: tuple[Any, ...], is_gated: bool) -> tuple[Any, Any]:
    """The gate's and the value's, of two tensors or of one that holds both."""
    if len(parts) == 2:
        return parts[0], parts[1]
    whole = parts[0]
    if not is_gated or whole is None:
        return whole, None
    half = len(whole) // 2
    return whole[:half], whole[half:]


#: What was found of products so far, by the weights' shape and order, the dtype, what follows, the magnitude of the
#: rows, and what multiplies.
_quicker: dict[Any, bool] = {}
#: A laid-out weight is used where it takes less than so much of the other's time: it also takes memory.
_WORTH_IT = 0.9
#: Rows of a thread from which two layers are done as one call: fewer are not worth a weight's way for each block.
_ROWS_OF_PAIRS = 256


def product_of(
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None = None,
    residual: Tensor | None = None,
    *,
    by_columns: bool = False,
    value: tuple[Tensor, Tensor | None] | None = None,
) -> Product:
    """As :class:`PackedProduct` is given it."""
    weights, biases = ((weight,), (bias,)) if value is None else ((weight, value[0]), (bias, value[1]))
    return Product(weights, biases, activation, residual, by_columns)


def _kind(x: Tensor, product: Product) -> tuple[Any, ...]:
    """What the choice depends on; see ``_quicker``."""
    weight, rows = product.weights[0], x.numel() // x.shape[-1]
    follows = product.activation, product.residual is not None
    how = torch.get_num_threads(), cpu_linear.instruction_set()
    return (weight.shape, product.by_columns, len(product.weights), x.dtype, rows.bit_length(), *follows, *how)


class PackedProduct:
    """:func:`transformer_fast.linear.linear` for one layer, with the weight laid out where that is quicker.

    The first time that a kind of product (the weight's shape, the dtype, what follows, the number of rows to a power
    of two) is met in a process, it is timed both ways, which takes at most five of either. A weight is laid out at its
    first use by a kind that is quicker so, and again when it changed.

    Where gradients are asked for it multiplies as training.py does. Under autocast, a compiler, a tracer, transforms or
    modes, on other devices, in float64, and for weights below 2**14 elements, it is that function itself. In all of
    these cases the laid-out weight is dropped: training may change weights in ways that are not counted.
    """

    takes_what_follows = True  # the activation and the residual, see transformer_fast/linear.py
    of = staticmethod(product_of)

    def __init__(self) -> None:
        self.found: _LaidOut | None = None

    def __call__(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        activation: str | None = None,
        residual: Tensor | None = None,
        *,
        by_columns: bool = False,
        value: tuple[Tensor, Tensor | None] | None = None,
    ) -> Tensor:
        """The product.

        Args:
            x: (..., in_features).
            weight: (out_features, in_features); or (in_features, out_features) ``by_columns``, as in GPT-2.
            bias: (out_features,).
            activation, residual: as in :func:`transformer_fast.linear.linear`.
            value: the weight and the bias of a gate's value, where they are not in the second half of these.

        Returns:
            (..., out_features), equal to the function's up to rounding.
        """
        return self.run(x, product_of(weight, bias, activation, residual, by_columns=by_columns, value=value))

    def run(self, x: Tensor, product: Product) -> Tensor:
        """The same, of a product."""
        may, found = self._may(x, product)
        if not may:
            return product.plain(x, training.linear)
        kind = _kind(x, product)
        quicker = _quicker.get(kind)
        if quicker is False:
            return product.plain(x)
        if found is None:
            found = _LaidOut(product)
        if quicker is None:
            rows = x.numel() // x.shape[-1]
            quicker = is_quicker(lambda: product.plain(x), lambda: product.packed(x, found), rows, _WORTH_IT)
            _quicker[kind] = quicker
            if not quicker:
                return product.plain(x)
        self.found = found
        return product.packed(x, found)

    def then(self, x: Tensor, product: Product, other: PackedProduct, second: Product) -> Tensor:
        """``other.run(self.run(x, product), second)``; many rows block by block: what is between stays in a cache."""
        rows = x.numel() // max(x.shape[-1], 1)
        if rows < _ROWS_OF_PAIRS * torch.get_num_threads():
            return other.run(self.run(x, product), second)
        may, found = self._may(x, product)
        if not may:
            return other.run(self.run(x, product), second)
        between = torch.empty((*x.shape[:-1], product.out_features), dtype=x.dtype, device="cpu")  # never written
        kind, residual = (*_kind(x, product), *_kind(between, second)), _residual(between, second)
        quicker, adds = _quicker.get(kind), residual is not None or second.residual is None
        may, after = other._may(between, second)
        if quicker is False or not adds or not may:
            return other.run(self.run(x, product), second)
        found, after = found or _LaidOut(product), after or _LaidOut(second)

        def packed() -> Tensor:
            return cpu_linear.multiply_twice(_rows(x), found.layer(product), after.layer(second), residual)

        if quicker is None:
            quicker = is_quicker(lambda: second.plain(product.plain(x)), packed, rows, _WORTH_IT)
            _quicker[kind] = quicker
            if not quicker:
                return other.run(self.run(x, product), second)
        self.found, other.found = found, after
        return packed()

    def _may(self, x: Tensor, product: Product) -> tuple[bool, _LaidOut | None]:
        """Is this inference that the kernel takes, and what is laid out for it? A weight that may change unseen is
        dropped.
        """
        found = self.found  # one look: another thread may drop it
        named = product.activation in cpu_linear.ACTIVATIONS
        if not named or not is_plain_inference(x, *product.weights, *product.biases):
            self.found = None
            return False, None
        if found is None or not found.is_of(product):
            self.found = found = None
            if not _may_lay_out(product):
                return False, None
        # Without them what is quicker may be another one tomorrow.
        return _takes(x, product) and not torch.are_deterministic_algorithms_enabled(), found

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
    """Let a built model multiply by kernels of ours on a CPU, in inference with weights that are laid out for them.

    Every ``nn.Linear`` multiplies by a :class:`PackedProduct`; so do the layers ``Conv1D`` of transformers' GPT-2, and
    the products of this library's own models. The modules stay the same objects, with the same parameters; subclasses
    of ``nn.Linear`` are left alone, since they may have a ``forward`` of their own. :func:`unpack_linears` undoes it.

    Whether a laid-out weight is quicker depends on the machine, the shape and the number of rows, so each kind of
    product is timed both ways when it is first met: the first batch of a new size takes longer, and the last bits of
    results may differ from process to process. Under ``torch.use_deterministic_algorithms(True)`` nothing is packed.

    A weight is laid out when it is first multiplied without gradients (under ``torch.no_grad()`` or
    ``torch.inference_mode()``) by a product that is quicker so, which takes its size in memory once more; again after
    ``load_state_dict``, ``.to()``, an operation in place or anything else that PyTorch counts; and again after a
    product with gradients. While a weight has a ``grad`` it is multiplied as it lies. With gradients, in float32,
    weights are laid out in passing, a few MiB at a time, forward and backward. What writes through
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
    if count == 0 or not TYPES:
        why = "has no nn.Linear" if count == 0 else "stays as it is: this installation has no native module for CPUs"
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
