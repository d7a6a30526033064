"""``accelerate()``: models that call scaled_dot_product_attention run on :func:`attention`, unchanged.

Three doors lead to SDPA, and each has its keeper while ``accelerate()`` is active:

1. ``torch.nn.functional.scaled_dot_product_attention``, looked up when it is called: the name is ours. This is the
   short way (the dispatcher's costs 5 us a call more), and only for eager calls with plain CPU tensors.
2. The operator ``aten::scaled_dot_product_attention``, for everything else: a name that was imported before, modes,
   tensor subclasses, and compilers, whose graphs get the op ``transformer_fast::attention``.
3. The flash attention operators below it: graphs that were compiled before, and callers by name (``aten.py``). On
   CUDA this is the only one, installed where PyTorch has a registry of flash attention implementations.

What cannot be taken goes on to what was there before, which computes it or raises its own error.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..backends import REGISTRY
from ..spec import BACKENDS
from .aten import REFUSALS, FlashForCpu, FlashForCuda
from .report import Recorder, Report
from .sdpa import PLAIN, attend

_SDPA = "scaled_dot_product_attention"
_BUILTIN = torch._C._nn.scaled_dot_product_attention
_is_exporting = getattr(torch.compiler, "is_exporting", lambda: False)  # from PyTorch 2.7 on
_COMPILERS = "torch._subclasses."  # the module of the tensors that compilers trace with
_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
#: Under this name PyTorch's registry of flash attention implementations has ours.
IMPLEMENTATION = "transformer_fast"


class Accelerated:
    """What :func:`accelerate` returns: undoes it, and reports what it did."""

    def __init__(self, recorder: Recorder | None, backend: str) -> None:
        self._recorder, self._backend, self._entered = recorder, backend, 0

    def restore(self) -> None:
        """Undo this ``accelerate()``; a second time does nothing. Others that are still active stay so."""
        with _lock:
            if self in _active:
                _active.remove(self)
                _settle()

    def report(self) -> Report:
        """The call sites seen so far, each with "taken" or the reason why not; ``str()`` of it is a table.

        Raises:
            ValueError: ``explain`` was not asked for.
        """
        if self._recorder is None:
            raise ValueError("explain is False, so nothing was recorded; allowed: accelerate(explain=True)")
        return self._recorder.report()

    def __enter__(self) -> Accelerated:
        with _lock:
            self._entered += 1
            if self not in _active:  # it was restored before
                _active.append(self)
                _settle()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with _lock:
            self._entered -= 1
            if not self._entered:
                self.restore()


def accelerate(*, explain: bool = False, backend: str = "auto") -> Accelerated:
    """Every ``scaled_dot_product_attention`` of unmodified models runs here, forward and backward, until restored.

    ::

        with transformer_fast.accelerate():
            model(x).sum().backward()

        handle = transformer_fast.accelerate()
        ...
        handle.restore()

    In eager mode and under ``torch.compile``: enter first, then compile or call for the first time. A graph that was
    traced while active keeps our operator; one traced before has PyTorch's flash attention operator answered.

    Left to PyTorch: float64, ``torch.func`` transforms, forward-mode derivatives, what ``torch.export`` and
    ``torch.jit`` make (programs of PyTorch's operators), nested tensors, tensor subclasses that dispatch for
    themselves, kernels that the caller chose with ``torch.nn.attention.sdpa_kernel``, and what this machine has no
    back end for. Gradients are differentiable once. Dropout draws other random numbers than PyTorch's. torch.nn's
    inference fast path, which bypasses SDPA, is switched off while active. Under activation checkpointing, restore
    after backward, which runs forward again.

    On CUDA PyTorch chooses the kernel, and its flash attention is ours where it has a registry for that (2.11 on). That
    part has run on no GPU yet.

    All this holds for the whole process, and any thread: enter and restore while no other thread computes attention.
    May be nested: the innermost's options hold, and the last one restored restores PyTorch.

    Args:
        explain: record each call site, for :meth:`Accelerated.report`.
        backend: of :func:`attention`. A call that a back end asked for by name cannot do is left to PyTorch.

    Returns:
        a context manager, already active, with ``restore()`` and ``report()``.

    Raises:
        ValueError, TypeError: an argument is wrong.
    """
    if not isinstance(explain, bool):
        raise TypeError(f"explain is {explain!r} of type {type(explain).__name__}; allowed: True or False")
    if not isinstance(backend, str):
        raise TypeError(f"backend is {backend!r} of type {type(backend).__name__}; allowed: {', '.join(BACKENDS)}")
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}; allowed: {', '.join(BACKENDS)}")
    handle = Accelerated(Recorder() if explain else None, backend)
    with _lock:
        _active.append(handle)
        _settle()
    return handle


# ------------------------------------------------------------------------------------------- what is in force

_lock = threading.RLock()
_active: list[Accelerated] = []
_patches: list[Callable[[], None]] = []  # each undoes one, the last one first
_thread = threading.local()

# Read at every call, so plain globals: those of the innermost that is active.
_backend = "auto"
_missing: str | None = None  # why the CPU has no kernels
_takes_cuda = False
_recorders: tuple[Recorder, ...] = ()


def _settle() -> None:
    """Bring PyTorch into the state that the active handles ask for."""
    global _backend, _missing, _recorders
    if _active:
        _backend = _active[-1]._backend
        _missing = REGISTRY["cpu"].info().reason if _backend == "auto" else None
        if _missing is not None:
            _missing = f"no kernels for the CPU: {_missing}"
    _recorders = tuple(handle._recorder for handle in _active if handle._recorder is not None)
    if _active and not _patches:
        try:
            for install in (_patch_name, _patch_operator, _patch_flash, _patch_fast_path, _patch_cache_key):
                _patches.extend(install())
        except BaseException:
            _active.clear()
            _unpatch()
            raise
    elif not _active:
        _unpatch()


def _unpatch() -> None:
    while _patches:
        _patches.pop()()


# ------------------------------------------------------------------------------------------------ the decision


def _why_not(query: Tensor, key: Tensor, value: Tensor, mask: Any) -> str | None:
    """Why a call is left to PyTorch, as far as it shows before it is tried."""
    if query.is_nested or key.is_nested:
        return "nested tensors"
    if not query.is_cpu:
        flash = ": PyTorch chooses the kernel, and its flash attention is ours" if query.is_cuda and _takes_cuda else ""
        return f"tensors on {query.device.type}{flash}"
    if query.dtype not in _KERNEL_DTYPES and _backend == "auto":
        return f"{str(query.dtype).removeprefix('torch.')}: the kernels compute float32, bfloat16 and float16"
    if _missing is not None:
        return _missing
    if not torch._C._get_flash_sdp_enabled():
        return "the caller chose another kernel (sdpa_kernel, or enable_flash_sdp(False))"
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "inside a torch.func transform"
    if forward_ad._current_level >= 0:
        return "forward-mode derivatives"
    return None


def _why_not_operator(*tensors: Any) -> str | None:
    """Why a call that came through the dispatcher is left to PyTorch."""
    for tensor in tensors:
        if tensor is not None and type(tensor) not in PLAIN and not _may_dispatch(tensor):
            return f"{type(tensor).__name__} dispatches for itself"
    if torch.compiler.is_compiling() and _is_exporting():
        return "torch.export: the program stays one of PyTorch's own operators"
    return _why_not(*tensors)


def _may_dispatch(tensor: Tensor) -> bool:
    """A subclass that adds no dispatch of its own, or one of the compiler's."""
    kind = type(tensor)
    return kind.__torch_dispatch__ is Tensor.__torch_dispatch__ or kind.__module__.startswith(_COMPILERS)


def _record(query: Tensor, key: Tensor, value: Tensor, mask: Any, reason: str | None) -> None:
    if _recorders and not getattr(_thread, "quiet", False):
        traced = type(query).__module__.startswith(_COMPILERS)
        for recorder in _recorders:
            recorder.add(query, key, value, mask, reason, traced=traced)


@contextmanager
def _quiet() -> Iterator[None]:
    """What PyTorch makes of a call that is on record is no call of its own."""
    before = getattr(_thread, "quiet", False)
    _thread.quiet = True
    try:
        yield
    finally:
        _thread.quiet = before


# ------------------------------------------------------------------------------------------------- the doors


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
    """What ``torch.nn.functional`` has under this name while :func:`accelerate` is active."""
    if torch.compiler.is_compiling():  # to a compiler it is the function that it knows
        return _BUILTIN(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    if (
        type(query) in PLAIN
        and type(key) in PLAIN
        and type(value) in PLAIN
        and (attn_mask is None or type(attn_mask) in PLAIN or type(attn_mask).__name__ == "CausalBias")
        and _active
        and torch._C._len_torch_function_stack() == 0
        and torch._C._get_tracing_state() is None  # torch.jit.trace notes PyTorch's operator, and then computes by ours
    ):
        reason = _why_not(query, key, value, attn_mask)
        if reason is None:
            try:
                out = attend(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, _backend)
            except REFUSALS as error:
                reason = str(error)
            else:
                if _recorders:
                    _record(query, key, value, attn_mask, None)
                return out
        _record(query, key, value, attn_mask, reason)
        with _quiet():
            return _previous(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    return _previous(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)


_previous: Callable[..., Tensor] = _BUILTIN  # what stood under the name before
_is_buried = False  # somebody put theirs over ours and calls it, active or not


def _patch_name() -> list[Callable[[], None]]:
    global _previous
    functional = torch.nn.functional
    standing = getattr(functional, _SDPA)
    if standing is _BUILTIN or not (_is_buried or standing is scaled_dot_product_attention):
        _previous = standing
        setattr(functional, _SDPA, scaled_dot_product_attention)
    # torch.jit.script, which would compile our Python, knows functions by their identity.
    torch.jit._builtins._register_builtin(scaled_dot_product_attention, f"aten::{_SDPA}")

    def undo() -> None:
        global _is_buried
        _is_buried = getattr(functional, _SDPA) is not scaled_dot_product_attention
        if not _is_buried:
            setattr(functional, _SDPA, _previous)

    return [undo]


def _operator(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """The kernel of ``aten::scaled_dot_product_attention`` while active."""
    reason = _why_not_operator(query, key, value, attn_mask)
    if reason is None:
        try:
            out = attend(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, _backend)
        except REFUSALS as error:
            reason = str(error)
        else:
            _record(query, key, value, attn_mask, None)
            return out
    _record(query, key, value, attn_mask, reason)
    composite = torch._C.DispatchKey.CompositeImplicitAutograd
    with _quiet():
        return torch.ops.aten.scaled_dot_product_attention.default._op_dk(
            composite, query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )


def _override(library: torch.library.Library, name: str, function: Callable[..., Any], key: str, **how: Any) -> None:
    with warnings.catch_warnings():  # PyTorch warns of every override
        warnings.filterwarnings("ignore", message=".*overrid.*", category=UserWarning)
        library.impl(name, function, key, **how)


def _patch_operator() -> list[Callable[[], None]]:
    """For tensors with autograd, and for those of inference mode, which have none."""
    library = torch.library.Library("aten", "IMPL")
    for key in ("AutogradCPU", "CPU"):
        _override(library, _SDPA, _operator, key)
    overload = torch.ops.aten.scaled_dot_product_attention.default
    overload._dispatch_cache.clear()  # where Python remembers which kernel a compiler's tensors go to

    def undo() -> None:
        library._destroy()
        overload._dispatch_cache.clear()

    return [undo]


def _flash_refuses(query: Tensor, dropout_p: float) -> str | None:
    if dropout_p != 0.0:
        return "dropout in PyTorch's flash attention operator"
    if query.dtype not in _KERNEL_DTYPES and _backend == "auto":
        return f"{str(query.dtype).removeprefix('torch.')}: the kernels compute float32, bfloat16 and float16"
    return _missing if query.is_cpu else None


def _install_flash(kind: type[FlashForCpu] | type[FlashForCuda], key: str) -> torch.library.Library:
    """Override both operators, keeping PyTorch's kernels at hand."""
    originals = tuple(torch.library.get_kernel(f"aten::{name}", key).call_boxed for name in kind.NAMES)
    ours = kind(originals, lambda: _backend, _flash_refuses, _record)  # type: ignore[arg-type]
    library = torch.library.Library("aten", "IMPL")
    for name, function in zip(kind.NAMES, (ours.forward, ours.backward), strict=True):
        _override(library, name, function, key, with_keyset=True)
    return library


class _FlashHandle:
    """What PyTorch's registry of implementations keeps of ours."""

    def __init__(self, library: torch.library.Library) -> None:
        self._library = library

    def remove(self) -> None:
        self._library._destroy()


def _patch_flash() -> list[Callable[[], None]]:
    if not hasattr(torch.library, "get_kernel"):  # before 2.9 an override loses the kernel that was there
        return []
    undo = [_install_flash(FlashForCpu, "CPU")._destroy]
    from torch.nn import attention as registry

    if torch.cuda.is_available() and hasattr(registry, "register_flash_attention_impl"):
        undo.append(_activate_for_cuda(registry))
    return undo


def _activate_for_cuda(registry: Any) -> Callable[[], None]:
    """By PyTorch's registry, so that it and whoever asks it know which implementation is in force."""
    global _takes_cuda
    before = registry.current_flash_attention_impl()
    registry.register_flash_attention_impl(
        IMPLEMENTATION, register_fn=lambda: _FlashHandle(_install_flash(FlashForCuda, "CUDA"))
    )
    registry.activate_flash_attention_impl(IMPLEMENTATION)
    _takes_cuda = True

    def undo() -> None:
        global _takes_cuda
        _takes_cuda = False
        if registry.current_flash_attention_impl() != IMPLEMENTATION:  # somebody activated theirs, which removed ours
            return
        registry.restore_flash_attention_impl()
        if before is not None:
            registry.activate_flash_attention_impl(before)

    return undo


def _patch_fast_path() -> list[Callable[[], None]]:
    """In eval mode torch.nn's encoder layers bypass SDPA by a kernel of their own."""
    mha = torch.backends.mha
    before = mha.get_fastpath_enabled()
    mha.set_fastpath_enabled(False)
    return [lambda: mha.set_fastpath_enabled(before)]


def _patch_cache_key() -> list[Callable[[], None]]:
    """A compiler's cache on disk must not give a graph of the one state to the other."""
    config: Any = getattr(torch.compiler, "config", None)
    before = getattr(config, "cache_key_tag", None)
    if before is None:
        return []
    config.cache_key_tag = f"{before}+transformer_fast"
    return [lambda: setattr(config, "cache_key_tag", before)]
