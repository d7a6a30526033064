"""Matrix products of a built model with weights that oneDNN has laid out once, for inference on a CPU.

Beside fused attention, a model's time on a CPU is in its linear layers. PyTorch multiplies with weights as they lie,
which oneDNN, that PyTorch ships, does quicker once it may choose the layout (the freezing of ``torch.compile`` does it
too). The kernels are oneDNN's, none of ours.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

_Module = TypeVar("_Module", bound=nn.Module)

#: Rows that the layout is chosen for; it serves other numbers of rows as well.
_ROWS = 512
#: Below so many elements of a weight oneDNN's call, about 18 us, is more than it saves.
_LEAST = {torch.float32: 2**17, torch.bfloat16: 2**16}


class _Packed(NamedTuple):
    """A weight laid out by oneDNN, and what the weight was then: the storage's address, its version."""

    weight: Tensor
    state: tuple[Any, ...]


_packed: WeakIdKeyDictionary = WeakIdKeyDictionary()  # weights that are packed, as long as they live


def _state(weight: Tensor) -> tuple[Any, ...]:
    """What differs once an operation that PyTorch counts has changed the weight."""
    version = 0 if weight.is_inference() else weight._version
    return version, weight.data_ptr(), weight.shape, weight.stride()


def packable_dtypes() -> tuple[torch.dtype, ...]:
    """The dtypes that this machine's oneDNN multiplies at full speed; none where PyTorch is built without it."""
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return ()
    is_bf16_fast = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return (torch.float32, torch.bfloat16) if is_bf16_fast else (torch.float32,)


_DTYPES = packable_dtypes()


def _may_pack(x: Tensor, weight: Tensor, bias: Tensor | None, in_features: int) -> bool:
    """Is this product inference on a CPU, which nobody traces, differentiates or casts?"""
    if torch.compiler.is_compiling() or type(x) is not Tensor or not x.is_cpu or not weight.is_cpu:
        return False
    dtype = x.dtype
    same = dtype in _DTYPES and weight.dtype is dtype and (bias is None or bias.dtype is dtype)
    return (
        same
        and x.dim() >= 2
        and x.numel() > 0
        and weight.numel() >= _LEAST[dtype]
        and x.shape[-1] == in_features
        and not (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias)))
        and not torch.is_autocast_enabled("cpu")
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
    )


def packed_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, by_columns: bool = False) -> Tensor:
    """:func:`torch.nn.functional.linear`, with the weight laid out at its first use and again when it has changed.

    Where gradients are asked for, under autocast, a compiler, transforms or modes, on other devices and in dtypes that
    the machine does not multiply natively, it is that function itself.

    Args:
        x: (..., in_features).
        weight: (out_features, in_features); or (in_features, out_features) ``by_columns``, as in GPT-2.
        bias: (out_features,).

    Returns:
        (..., out_features), equal to the function's up to rounding.
    """
    if not _may_pack(x, weight, bias, weight.shape[0 if by_columns else -1]):
        return F.linear(x, weight.t() if by_columns else weight, bias)
    state, found = _state(weight), _packed.get(weight)
    if found is None or found.state != state:
        rows = (weight.t() if by_columns else weight).detach().contiguous()
        found = _Packed(torch.ops.mkldnn._reorder_linear_weight(rows, _ROWS), state)
        _packed[weight] = found
    return torch.ops.mkldnn._linear_pointwise.default(x.contiguous(), found.weight, bias, "none", [], "")


class _Packs(nn.Module):
    """A linear layer whose product is :func:`packed_linear`."""

    weight: Any
    bias: Any
    by_columns = False

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features)."""
        return packed_linear(x, self.weight, self.bias, by_columns=self.by_columns)

    def train(self, mode: bool = True) -> Any:
        """As of every module; training changes weights, by ways that may not be seen."""
        if mode:
            _forget(self)
        return super().train(mode)


class PackedLinear(_Packs, nn.Linear):
    """:class:`torch.nn.Linear` by :func:`packed_linear`."""


@functools.cache
def _packed_classes() -> dict[type[nn.Module], type[nn.Module]]:
    """The classes whose modules are taken over, and what they become."""
    classes: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: PackedLinear}
    with contextlib.suppress(ImportError):
        from transformers.pytorch_utils import Conv1D

        classes[Conv1D] = type("PackedConv1D", (_Packs, Conv1D), {"by_columns": True, "__module__": __name__})
    return classes


def pack_linears(model: _Module) -> _Module:
    """Let a built model multiply with weights that oneDNN has laid out for it, in inference on a CPU.

    Every ``nn.Linear`` becomes a :class:`PackedLinear`; so do the layers ``Conv1D`` of transformers' GPT-2, and the
    products of this library's own models. The modules stay the same objects, with the same parameters; subclasses of
    ``nn.Linear`` are left alone, since they may have a ``forward`` of their own. :func:`unpack_linears` undoes it.

    A weight is laid out when it is first multiplied without gradients (under ``torch.no_grad()`` or
    ``torch.inference_mode()``), which takes its size in memory once more, and again after it has changed: by an
    optimizer, ``load_state_dict``, ``.to(...)`` or any other operation that PyTorch counts. What writes through
    ``weight.data`` it does not count: call this function again after that.

    Args:
        model: any module; changed in place.

    Returns:
        the model. A warning says so if nothing in it can be packed, or not on this machine.
    """
    classes = _packed_classes()
    count = 0
    for module in model.modules():
        module.__class__ = classes.get(type(module), type(module))
        is_own = hasattr(module, "product")
        if is_own:
            module.product = packed_linear  # type: ignore[assignment]
        if is_own or isinstance(module, _Packs):
            count += 1
            _forget(module)
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
    plain = {packed: own for own, packed in _packed_classes().items()}
    for module in model.modules():
        if isinstance(module, _Packs) or vars(module).pop("product", None) is not None:
            _forget(module)
        module.__class__ = plain.get(type(module), type(module))
    return model


def _forget(module: nn.Module) -> None:
    """Drop the laid-out weight of a module; the next product lays it out again."""
    weight = getattr(module, "weight", None)
    if isinstance(weight, Tensor):
        _packed.pop(weight, None)


def __getattr__(name: str) -> Any:  # pickle looks for classes by their names
    for packed in _packed_classes().values():
        if packed.__name__ == name:
            return packed
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
