"""What stands around a model's matrix products, in fewer passes over memory: norms, gates, activations and the loss.

Modules are taken over by what they compute, not by their names: each kind is tried on numbers first.
"""

from __future__ import annotations

import copy
import functools
import inspect
import types
import warnings
import weakref
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .. import pointwise
from ..linear import ACTIVATIONS, is_heard, packed_product
from ..ops import is_watched
from ..spec import UnsupportedError
from .loss import causal_lm_loss
from .swap import Swapped, is_swapped, own_class, swapped

_Module = TypeVar("_Module", bound=nn.Module)


class _RMSNorm(Swapped):
    """A root mean square norm. Gradients, and what the kernel does not take, stay the module's own."""

    _plus_one = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """(..., d) to the same."""
        own: Any = self
        (x,) = (*args, *kwargs.values())
        if not pointwise.is_native(x, own.weight):
            return super().forward(x)
        return pointwise.rms_norm(x, own.weight, _eps(own), plus_one=self._plus_one)


class _RMSNormPlusOne(_RMSNorm):
    _plus_one = True


class _Gated(Swapped):
    """A feed-forward layer ``down(activation(gate(x)) * up(x))``; with gradients and in training the module's own.

    Where both layers are packed, they are one product.
    """

    _activation, _gated = "swiglu", staticmethod(pointwise.gated_silu)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """(..., d) to the same."""
        own: Any = self
        (x,) = (*args, *kwargs.values())
        if self.training or torch.is_grad_enabled():
            return super().forward(x)
        gate, up = own.gate_proj, own.up_proj
        product = packed_product(gate)
        if product is None or packed_product(up) is None:
            return own.down_proj(self._gated(gate(x), up(x)))
        gated = product.of(gate.weight, gate.bias, self._activation, value=(up.weight, up.bias))
        down = own.down_proj
        other = packed_product(down)
        if other is None:
            return down(product.run(x, gated))
        return product.then(x, gated, other, other.of(down.weight, down.bias))


class _GatedGelu(_Gated):
    _activation, _gated = "geglu_tanh", staticmethod(pointwise.gated_gelu_tanh)


class _Activated(Swapped):
    """A linear layer and its activation, of a module that has nothing else; in one pass where the layer is packed."""

    _activation = "gelu"

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """(..., d) to (..., inner size)."""
        own: Any = self
        (x,) = (*args, *kwargs.values())
        product = packed_product(own.dense)
        if product is None or self.training or torch.is_grad_enabled() or not self._is_as_tried():
            return super().forward(x)
        return product(x, own.dense.weight, own.dense.bias, self._activation)

    def _is_as_tried(self) -> bool:
        """Is the activation the one that was tried, and does nobody listen to it?"""
        activation = self.intermediate_act_fn
        is_module = isinstance(activation, nn.Module)
        return activation is vars(self).get("_tried") and not (is_module and is_heard(activation))


class _ActivatedGeluTanh(_Activated):
    _activation = "gelu_tanh"


class _ActivatedRelu(_Activated):
    _activation = "relu"


class _Rotates(Swapped):
    """An attention layer that turns queries and keys by a function of its file, ``apply_rotary_pos_emb``."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the module's own."""
        own = super().forward
        function: Any = getattr(own, "__func__", None)
        if torch.is_grad_enabled() or is_watched() or not _names_rotary(function):
            return own(*args, **kwargs)
        theirs = function.__globals__[_ROTARY]
        if not _is_rotary(theirs):  # since fuse_pointwise() another has taken its place
            return own(*args, **kwargs)
        return _with_rotary(function, theirs)(self, *args, **kwargs)


class _GeluTanh(Swapped):
    """The tanh form of GELU in one function, where it was composed of eight operators."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Of any shape, to the same."""
        (x,) = (*args, *kwargs.values())
        return pointwise.gelu_tanh(x)


_MIXINS = (_RMSNorm, _Gated, _GeluTanh, _Activated, _Rotates)
_ROTARY = "apply_rotary_pos_emb"


class _Globals(dict[str, Any]):
    """Those of a function's file as they are at each look, with another ``apply_rotary_pos_emb``."""

    def __init__(self, own: dict[str, Any], rotary: Callable[..., Any]) -> None:
        super().__init__({_ROTARY: rotary, "__builtins__": own["__builtins__"]})
        self.own = own

    def __missing__(self, name: str) -> Any:
        return self.own[name]


def _names_rotary(function: Any) -> bool:
    return (
        isinstance(function, types.FunctionType)
        and _ROTARY in function.__code__.co_names
        and callable(function.__globals__.get(_ROTARY))
    )


@functools.cache
def _with_rotary(function: Any, theirs: Callable[..., Any]) -> Any:
    """The function, for which ``theirs`` is done by the kernel; its file stays as it is."""
    globals_ = _Globals(function.__globals__, _rotary(theirs))
    changed = types.FunctionType(
        function.__code__, globals_, function.__name__, function.__defaults__, function.__closure__
    )
    changed.__kwdefaults__ = function.__kwdefaults__
    return changed


@functools.cache
def _rotary(theirs: Callable[..., Any]) -> Callable[..., Any]:
    """``theirs``, by the kernel where that takes the tensors and they are as in Llama."""

    def rotary(*args: Any, **kwargs: Any) -> Any:
        if kwargs or len(args) != 4 or not _takes_angles(*args):
            return theirs(*args, **kwargs)
        q, k, cos, sin = args
        rows, half = q.shape[0] * q.shape[2], q.shape[3] // 2
        angles = [t.expand(q.shape[0], -1, -1).reshape(rows, 1, -1)[..., :half] for t in (cos, sin)]
        turned = (pointwise.rotate(x.transpose(1, 2).flatten(0, 1), *angles) for x in (q, k))
        return tuple(x.unflatten(0, (-1, q.shape[2])).transpose(1, 2) for x in turned)

    return rotary


def _takes_angles(q: Any, k: Any, cos: Any, sin: Any) -> bool:
    """Are these (batch, heads, seqlen, d) and (batch or 1, seqlen, d), with the angles of half a head twice?"""
    return (
        all(isinstance(t, Tensor) for t in (q, k, cos, sin))
        and pointwise.is_native(q, k, cos, sin)
        and q.dim() == k.dim() == 4
        and cos.dim() == sin.dim() == 3
        and (q.shape[0], *q.shape[2:]) == (k.shape[0], *k.shape[2:])
        and cos.shape == sin.shape
        and cos.shape[0] in (1, q.shape[0])
        and cos.shape[1:] == q.shape[2:]
        and q.shape[3] % 2 == 0
        and _repeats(cos)
        and _repeats(sin)
    )


#: Angles seen last, and whether their halves are equal: all layers are given the same.
_seen_angles: dict[int, tuple[weakref.ref[Tensor], int, bool]] = {}


def _repeats(angles: Tensor) -> bool:
    if angles.is_inference():  # changes of which are not counted
        return torch.equal(*angles.chunk(2, dim=-1))
    seen = _seen_angles.get(id(angles))
    if seen is not None and seen[0]() is angles and seen[1] == angles._version:
        return seen[2]
    repeats = torch.equal(*angles.chunk(2, dim=-1))
    if len(_seen_angles) >= 8:
        _seen_angles.clear()
    _seen_angles[id(angles)] = weakref.ref(angles), angles._version, repeats
    return repeats


@functools.cache
def _is_rotary(function: Callable[..., Any]) -> bool:
    """Does this function turn queries and keys as Llama's does, tried on numbers?"""
    draw = _draw()
    q, k, angles = draw(2, 5, 3, 8).transpose(1, 2), draw(2, 5, 1, 8).transpose(1, 2), draw(2, 5, 4).repeat(1, 1, 2)
    try:
        with torch.no_grad():
            expected, found = (f(q, k, angles.cos(), angles.sin()) for f in (function, _rotary(function)))
            return all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found, expected, strict=True))
    except Exception:  # what cannot be tried is left alone
        return False


def _may_rotate(module: Any) -> bool:
    function = type(module).forward
    return (
        _names_rotary(function)
        and "forward" not in vars(module)
        and all(p.is_cpu for p in module.parameters())
        # Else the trial, of which the result is kept, proves nothing.
        and pointwise.is_native(torch.ones(1, device="cpu", dtype=torch.float32))
        and _is_rotary(function.__globals__[_ROTARY])
    )


def _eps(norm: Any) -> Any:
    return getattr(norm, "variance_epsilon", getattr(norm, "eps", None))


def _candidates(module: Any) -> list[Any]:
    """What a module may become, by its parts."""
    name, weight = type(module).__name__, getattr(module, "weight", None)
    if name.endswith(("RMSNorm", "T5LayerNorm")) and isinstance(weight, Tensor) and weight.dim() == 1:
        return [] if _eps(module) is None else [_RMSNorm, _RMSNormPlusOne]
    if all(isinstance(getattr(module, part, None), nn.Linear) for part in ("gate_proj", "up_proj", "down_proj")):
        return [_Gated, _GatedGelu]
    if name in ("NewGELUActivation", "FastGELUActivation"):
        return [_GeluTanh]
    if isinstance(getattr(module, "dense", None), nn.Linear) and hasattr(module, "intermediate_act_fn"):
        return [_Activated, _ActivatedGeluTanh, _ActivatedRelu]
    return []


def _draw() -> Callable[..., Tensor]:
    """``torch.randn`` of the same numbers each time, whatever the defaults."""
    return functools.partial(torch.randn, generator=torch.Generator().manual_seed(0), device="cpu", dtype=torch.float32)


def _input_for(module: Any) -> Tensor:
    """Numbers in float32, four rows of them, that reach all of an activation's range."""
    draw = _draw()
    layer = getattr(module, "gate_proj", getattr(module, "dense", None))
    if layer is not None:
        x = draw(4, layer.in_features)
        x *= 3.0 / layer(x).std()
        x[3] *= 8.0  # where some activations are cut off
        return x
    return 3.0 * draw(4, len(module.weight) if hasattr(module, "weight") else 64)


@torch.no_grad()
def _mixin_of(module: Any) -> Any:
    """The candidate that computes the same, tried on a copy in float32; None if there is none."""
    candidates = _candidates(module)
    if not candidates or "forward" in vars(module) or len(inspect.signature(module.forward).parameters) != 1:
        return None
    if any(not p.is_cpu or not p.is_floating_point() for p in module.parameters()):
        return None
    own: Any = type(module)
    try:
        trial = copy.deepcopy(module).float().eval()
        x = _input_for(trial)
        theirs = own.forward(trial, x)  # without the module's own hooks
        if not (theirs.abs().max() > 0 and pointwise.is_native(x, *trial.parameters())):
            return None  # the trial would prove nothing
        for mixin in candidates:
            if issubclass(mixin, _Activated):  # which alone, without a packed layer, is what it was
                ours = ACTIVATIONS[mixin._activation](trial.dense(x))
            else:
                trial.__class__ = swapped(mixin, own)
                ours = trial.forward(x)
            if ((ours - theirs).abs() <= 1e-5 * theirs.abs().amax(-1, keepdim=True)).all():
                return mixin
    except Exception:  # what cannot be tried is left alone
        return None
    return None


def _is_fused(module: nn.Module) -> bool:
    return isinstance(module, _MIXINS)


def _models(model: nn.Module) -> list[Any]:
    """Those of transformers in it that have a language model's head."""
    parts = ("loss_function", "get_output_embeddings")
    found: list[Any] = [m for m in model.modules() if all(hasattr(type(m), part) for part in parts)]
    return [module for module in found if module.get_output_embeddings() is not None]


def fuse_pointwise(model: _Module) -> _Module:
    """Let a built model run what stands around its matrix products in fewer passes over memory.

    - Root mean square norms, and the gates of feed-forward layers (``gate_proj``, ``up_proj``, ``down_proj`` with SiLU
      or the tanh form of GELU): in inference on a CPU one pass of a kernel of ours, in float32 and rounded once. With
      gradients and elsewhere they are what they were.
    - Rotary positions, where a layer's file has a function ``apply_rotary_pos_emb`` that computes what Llama's does: in
      inference on a CPU by a kernel of ours. The layer's ``forward`` sees another function under this name; the file
      itself stays as it is.
    - With :func:`pack_linears`, before or after: the gate's two layers are one product, and the layer ``dense`` of
      BERT's kind and its activation are.
    - The tanh form of GELU composed of eight operators (``NewGELUActivation``): a kernel of ours, in training too.
    - transformers' loss for causal language models on a CPU: :func:`causal_lm_loss`, which keeps no log-probabilities
      for backward.

    A module is taken over if it computes the same on a few numbers, in evaluation mode; all others are left alone. The
    activation of a gated layer is no longer called in inference, so hooks on it are not either. Outputs and gradients
    are the same up to rounding. :func:`unfuse_pointwise` undoes it.

    Args:
        model: any module, on a CPU; changed in place.

    Returns:
        the model. A warning says so if nothing in it is taken over.
    """
    count = 0
    for module in model.modules():
        mixin: Any = None
        if not _is_fused(module):
            mixin = _Rotates if _may_rotate(module) else _mixin_of(module)
        if mixin is not None:
            own: Any = type(module)
            module.__class__ = swapped(mixin, own)
            if issubclass(mixin, _Activated):
                vars(module)["_tried"] = module.intermediate_act_fn
        count += _is_fused(module)
    for module in _models(model):
        if getattr(module.loss_function, "__name__", "") == "ForCausalLMLoss":
            module.loss_function = causal_lm_loss
        count += module.loss_function is causal_lm_loss
    if count == 0:
        warnings.warn(f"{type(model).__name__} has nothing on a CPU that is known; nothing is fused", stacklevel=2)
    return model


def unfuse_pointwise(model: _Module) -> _Module:
    """Give back what :func:`fuse_pointwise` took.

    Args:
        model: any module; changed in place.

    Returns:
        the model, as it was.

    Raises:
        UnsupportedError: something else has changed the class of a module since (a parametrization, say).
    """
    fused: list[Any] = [module for module in model.modules() if _is_fused(module)]
    for module in fused:
        if not is_swapped(module):
            raise UnsupportedError(f"a module that has become a {type(module).__name__} since fuse_pointwise()")
    for module in fused:
        module.__class__ = own_class(module)
        vars(module).pop("_tried", None)
    for module in _models(model):
        if vars(module).get("_loss_function") is causal_lm_loss:
            del module._loss_function
    return model
