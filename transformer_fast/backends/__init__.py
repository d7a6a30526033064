"""The registry: which back ends there are, which can do a spec, and why the others cannot.

The package is callable: ``transformer_fast.backends()`` says what this machine has.
"""

from __future__ import annotations

import sys
import types
import warnings

from ..spec import AttentionSpec, UnsupportedError
from .base import Backend, Gradients, Info, Results, Runner
from .choice import fastest
from .cpu import CpuBackend
from .cuda import CudaBackend, EmulatedBackend
from .reference import ReferenceBackend
from .triton import TritonBackend

__all__ = ["Backend", "Gradients", "Info", "REGISTRY", "Results", "Runner", "reasons", "select_backend"]

#: In the order in which "auto" asks them. The reference can do everything, so what stands behind it has to be named:
#: neither the Triton kernels nor the CUDA kernels have run on a GPU yet, and the emulator is for tests.
REGISTRY: dict[str, Backend] = {
    backend.name: backend
    for backend in (CpuBackend(), ReferenceBackend(), TritonBackend(), CudaBackend(), EmulatedBackend())
}


def reasons(spec: AttentionSpec) -> dict[str, str | None]:
    """For each back end None if it can do the spec, else the reason why not."""
    return {name: backend.reason(spec) for name, backend in REGISTRY.items()}


def select_backend(spec: AttentionSpec) -> Backend:
    """The back end the spec names, or for "auto" the first that can do it: of those that were measured on this machine
    (``choice.json``) in the order of their speed, then of the registry.

    Where "auto" comes to the reference on CPU tensors because the CPU back end is missing, it warns: that is slow.

    Raises:
        UnsupportedError: a back end asked for by name cannot do the problem.
        ValueError: an environment variable asks a back end for what this machine does not have.
    """
    asked, answers = spec.options.backend, reasons(spec)
    measured = [name for name in fastest(spec) if name in answers]
    for name in [asked] if asked != "auto" else [*measured, *answers]:
        if answers[name] is None:
            return REGISTRY[name]
        info = REGISTRY[name].info()
        if info.is_error:
            raise ValueError(info.reason)
        if asked != "auto":
            raise UnsupportedError(f"backend {asked!r} cannot do this: {answers[name]}")
        if not info.available and spec.device.type == "cpu":
            message = f"attention takes a slow road: the {name} back end is not available ({info.reason})"
            warnings.warn(message, RuntimeWarning, stacklevel=2)
    raise AssertionError("the reference can do everything")


def backends() -> dict[str, Info]:
    """What this machine has: for each back end its version, or the reason why it is not available."""
    return {name: backend.info() for name, backend in REGISTRY.items()}


class _CallablePackage(types.ModuleType):
    """So that ``transformer_fast.backends`` is both this package and the public function."""

    def __call__(self) -> dict[str, Info]:
        return backends()


sys.modules[__name__].__class__ = _CallablePackage
