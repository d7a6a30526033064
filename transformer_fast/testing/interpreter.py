"""Repairs Triton's interpreter where it computes wrongly, so that a kernel can be judged by it."""

from __future__ import annotations

from typing import Any

import numpy as np


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
