"""Compiles kernel launches for GPUs that are not there, as Triton would compile them on its own when they run.

A launch's arguments decide what is compiled: an integer that 16 divides, a 1, or a None makes another kernel. Triton's
own code takes these decisions here too, so that what is inspected is what runs. The two names it goes by are private
to Triton, and the same in 3.6 and 3.7; the tests compile with both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Unit:
    """One compilation."""

    source: Any  # triton.compiler.ASTSource
    target: Any  # GPUTarget
    options: dict[str, Any]

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal for compilations that give the same machine code."""
        return (self.source.hash(), self.target.arch, *sorted(self.options.items()))

    def compile(self) -> Any:
        """The kernel as ``triton.compile`` returns it; from Triton's cache if it is there."""
        import triton

        return triton.compile(self.source, target=self.target, options=self.options)


def unit(
    kernel: Any, arguments: Mapping[str, Any], constants: Mapping[str, Any], capability: int, **options: int
) -> Unit:
    """What ``kernel[grid](**arguments, **constants, **options)`` compiles on a machine of a compute capability.

    Args:
        kernel: a ``triton.jit`` function, imported without TRITON_INTERPRET.
        arguments: tensors (on the meta device, say: only dtype and address are looked at), numbers, None, and named
            tuples of those.
        constants: the ``tl.constexpr`` parameters.
        capability: 90 for compute capability 9.0.
        options: ``num_warps`` and ``num_stages``.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend
    from triton.runtime.jit import JITFunction, create_function_from_signature

    if not isinstance(kernel, JITFunction):
        raise RuntimeError(f"{kernel} belongs to Triton's interpreter: unset TRITON_INTERPRET to compile it")
    target = GPUTarget("cuda", capability, 32)
    backend = make_backend(target)
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, _ = bind(**arguments, **constants, **options)
    _, signature, constexprs, attributes = kernel._pack_args(backend, dict(options), bound, specialization, None)
    return Unit(ASTSource(kernel, signature, constexprs, attributes), target, dict(options))
