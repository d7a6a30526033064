"""The Triton back end: ``transformer_fast.kernels`` on NVIDIA GPUs, or on CPU tensors in Triton's interpreter.

Forward only so far; gradients are the reference's. Nothing here has run on a GPU yet, so "auto" does not choose it.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..layout import broadcast_strides, output_layout, row_strides
from ..spec import AttentionSpec, Layout, Operands
from .base import Backend, Gradients, Info, Results, Runner
from .reference import ReferenceRunner

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MAX_HEAD_DIM = 512


@cache
def _version() -> str | None:
    """Triton's version; asked of its metadata, since importing Triton takes longer than importing this package."""
    return importlib.metadata.version("triton") if importlib.util.find_spec("triton") else None


def _is_interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def _power_of_2(n: int, least: int) -> int:
    return max(least, 1 << (n - 1).bit_length())


def _strides(layout: Layout | None, count: int) -> tuple[int, ...]:
    """Strides with 0 where a dimension of one element broadcasts; zeros for an operand that is not there."""
    if layout is None:
        return (0,) * count
    return broadcast_strides(layout.shape, layout.stride)


class TritonRunner(Runner):
    """One spec's launch: everything but the tensors."""

    def __init__(self, spec: AttentionSpec) -> None:
        super().__init__(spec)
        from ..kernels.masks import UNBOUNDED

        query, slopes = spec.layout("query"), spec.layout("alibi_slopes")
        assert query is not None
        self.out_shape, self.out_stride = output_layout(query.shape, query.stride, spec.head_dim_v)
        packed = spec.is_packed
        self.lse_shape = spec.lse_shape
        options, bias = spec.options, spec.layout("bias")
        sinks, seqlens_k = spec.layout("sinks"), spec.layout("seqlens_k")
        rows = spec.seqlen_q * spec.group_size
        block_m = 16 if rows <= 16 else 32 if rows <= 32 else 64
        self.grid = (max(1, -(-rows // block_m)), spec.num_kv_heads, spec.batch)
        softcap, dropout_p = options.softcap, options.dropout_p
        has_float_bias = bias is not None and bias.dtype != torch.bool
        modified = (
            softcap is not None
            or has_float_bias
            or slopes is not None
            or sinks is not None
            or spec.softmax_scale < 1e-30
        )
        operands = [row_strides(o.stride, packed) for o in spec.layouts[:3] if o is not None]
        self.numbers: tuple[Any, ...] = (
            *(stride for strides in operands for stride in strides),
            *row_strides(self.out_stride, packed),
            1 if seqlens_k is None else seqlens_k.stride[0],
            *_strides(spec.layout("key_padding_mask"), 2),
            *_strides(bias, 4),
            *(0, *_strides(slopes, 2))[-2:],
            0 if sinks is None else sinks.stride[0],
            spec.seqlen_q,
            spec.seqlen_k,
            *((0, spec.total_q) if packed else (spec.num_heads * spec.seqlen_q, spec.seqlen_q)),
            spec.num_heads * spec.total_q,
            UNBOUNDED if options.window_left < 0 else min(options.window_left, UNBOUNDED),
            UNBOUNDED if options.window_right < 0 else min(options.window_right, UNBOUNDED),
            spec.softmax_scale,
            0.0 if softcap is None else softcap,
        )
        self.dropout = (min(int(dropout_p * 2.0**32), 2**32 - 1), 1.0 / (1.0 - dropout_p))
        self.constants = dict(
            GROUP=spec.group_size,
            HEAD_DIM=spec.head_dim,
            HEAD_DIM_V=spec.head_dim_v,
            BLOCK_M=block_m,
            BLOCK_N=32 if max(spec.head_dim, spec.head_dim_v) > 128 else 64,
            BLOCK_D=_power_of_2(spec.head_dim, 16),
            BLOCK_DV=_power_of_2(spec.head_dim_v, 16),
            PACKED=packed,
            HAS_SEQLENS_K=seqlens_k is not None,
            HAS_KEY_MASK=spec.layout("key_padding_mask") is not None,
            BIAS="none" if bias is None else "float" if has_float_bias else "bool",
            HAS_ALIBI=slopes is not None,
            HAS_SOFTCAP=softcap is not None,
            HAS_SINKS=sinks is not None,
            HAS_DROPOUT=dropout_p > 0.0,
            MODIFIED=modified,
            PRECISION="ieee",
        )

    def forward(self, operands: Operands, *, need_lse: bool, need_stats: bool) -> Results:
        from ..kernels.forward import attention_forward_kernel

        query, key, value, cu_q, cu_k, seqlens_k, key_mask, bias, slopes, sinks, seed = operands
        device = self.spec.device
        out = torch.empty_strided(self.out_shape, self.out_stride, dtype=self.spec.dtype, device=device)
        need_lse |= need_stats
        lse = torch.empty(self.lse_shape, dtype=torch.float32, device=device) if need_lse else None
        stats = torch.empty((2, *self.lse_shape), dtype=torch.float32, device=device) if need_stats else None
        if out.numel() == 0 or 0 in self.lse_shape:
            return Results(out, lse, stats)

        def given(tensor: Tensor | None) -> Tensor:
            """A pointer that is never read stands for what is absent."""
            return query if tensor is None else tensor

        attention_forward_kernel[self.grid](
            query,
            key,
            value,
            out,
            *map(given, (lse, stats, cu_q, cu_k, seqlens_k)),
            given(None if key_mask is None else key_mask.view(torch.uint8)),
            given(bias.view(torch.uint8) if bias is not None and bias.dtype == torch.bool else bias),
            *map(given, (slopes, sinks, seed)),
            *self.numbers,
            *self.dropout,
            **self.constants,
            NEED_LSE=need_lse,
            NEED_STATS=need_stats,
        )
        return Results(out, lse, stats)

    def backward(
        self, operands: Operands, results: Results, dout: Tensor, dlse: Tensor | None, *, dbias: bool, dsinks: bool
    ) -> Gradients:
        """The reference's gradients: the kernels have no backward pass yet."""
        return ReferenceRunner(self.spec).backward(operands, results, dout, dlse, dbias=dbias, dsinks=dsinks)


class TritonBackend(Backend):
    """``kernels/`` as a back end."""

    name = "triton"

    def info(self) -> Info:
        if _version() is None:
            return Info(self.name, False, "triton is not installed", None)
        if not torch.cuda.is_available() and not _is_interpreted():
            reason = "there is no CUDA device (TRITON_INTERPRET=1 runs the kernels in Triton's interpreter, for tests)"
            return Info(self.name, False, reason, _version())
        way = "interpreter" if _is_interpreted() else torch.cuda.get_device_name()
        return Info(self.name, True, None, _version(), {"runs on": way, "gradients": "by the reference"})

    def supports(self, spec: AttentionSpec) -> str | None:
        wanted = "cpu" if _is_interpreted() else "cuda"
        if spec.device.type != wanted:
            return f"the tensors are on {spec.device}, this back end computes on {wanted}"
        if spec.dtype not in _DTYPES:
            return f"dtype {str(spec.dtype).removeprefix('torch.')}; it computes float32, bfloat16 and float16"
        if max(spec.head_dim, spec.head_dim_v) > _MAX_HEAD_DIM:
            return f"head_dim {max(spec.head_dim, spec.head_dim_v)}; it computes up to {_MAX_HEAD_DIM}"
        if max(spec.total_q, spec.total_k, spec.seqlen_q, spec.seqlen_k) >= 2**30:
            return "2**30 or more tokens; its positions are 32-bit"
        return None

    def path(self, spec: AttentionSpec) -> str:
        return "tiled forward in Triton, gradients by the reference" + (" (interpreted)" if _is_interpreted() else "")

    def prepare(self, spec: AttentionSpec) -> Runner:
        return TritonRunner(spec)
