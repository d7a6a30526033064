"""Makes Triton's interpreter fit to judge kernels: repaired where it computes wrongly, quicker where it idles."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np


def prepare_interpreter() -> None:
    """Both of the below; once is enough."""
    repair_bfloat16()
    _make_quicker()


def repair_bfloat16() -> None:
    """Makes bfloat16 mean bfloat16 in Triton's interpreter.

    It holds such numbers as uint16 (seen in 3.6 and 3.7): a product multiplies the bit patterns, and float32 is cut
    off instead of rounded to nearest. Only loads, stores, casts and products need to be right: kernels compute in
    float32.
    """
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    if getattr(InterpreterBuilder, "_bfloat16_is_repaired", False):
        return
    create_dot, cast_impl = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl

    def widened(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def dot(self: Any, a: Any, b: Any, d: Any, *precision: Any) -> Any:
        return create_dot(self, widened(a), widened(b), d, *precision)

    def cast(self: Any, source: Any, target: Any) -> Any:
        from_type, to_type = source.dtype.scalar, target.scalar
        if from_type == tl.bfloat16 and to_type.is_floating() and to_type != tl.bfloat16:
            return cast_impl(self, widened(source), target) if to_type != tl.float32 else widened(source)
        if from_type == tl.float32 and to_type == tl.bfloat16:
            bits = np.ascontiguousarray(source.data).view(np.uint32)
            rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
            quiet = (bits >> 16) | 0x40
            return TensorHandle(np.where(np.isnan(source.data), quiet, rounded).astype(np.uint16), tl.bfloat16)
        return cast_impl(self, source, target)

    InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl = dot, cast
    for name in ("create_fp_ext", "create_fp_trunc"):
        setattr(InterpreterBuilder, name, cast)
    InterpreterBuilder._bfloat16_is_repaired = True


def _make_quicker() -> None:
    """Leaves out what takes three fourths of a test's time and changes no result (Triton 3.7).

    A kernel's run patches the functions of ``tl`` once, not once more for each device function that it calls.
    """
    from triton.runtime import interpreter

    if getattr(interpreter, "_is_quicker", False):
        return
    run, patch_lang = interpreter.GridExecutor.__call__, interpreter._patch_lang
    patched: set[tuple[int, ...]] = set()

    @cache
    def modules_of(function: Any) -> tuple[int, ...]:
        return tuple(sorted(id(m) for m in function.__globals__.values() if m in (interpreter.tl, interpreter.tl.core)))

    class Nothing:
        def restore(self) -> None:
            pass

    def patch_once(function: Any) -> Any:
        modules = modules_of(function)
        if modules in patched:
            return Nothing()
        patched.add(modules)
        return patch_lang(function)

    def run_anew(self: Any, *args: Any, **kwargs: Any) -> None:
        patched.clear()
        run(self, *args, **kwargs)

    interpreter.GridExecutor.__call__, interpreter._patch_lang = run_anew, patch_once
    by_name: dict[str, np.dtype[Any]] = {}
    ask = interpreter._get_np_dtype

    def numpy_type(kind: Any) -> np.dtype[Any]:
        name = str(kind.scalar)
        if name not in by_name:
            by_name[name] = ask(kind)
        return by_name[name]

    interpreter._get_np_dtype = numpy_type
    # The checks for integer overflow are computed and then asserted only in debug mode, which it is not in.
    builder = interpreter.interpreter_builder
    builder.options = replace(builder.options, sanitize_overflow=False)
    interpreter._is_quicker = True
