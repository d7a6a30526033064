"""A spec as the native modules take it: ``tf::Problem`` without its pointers (csrc/bindings/problem.h)."""

from __future__ import annotations

from typing import Any

import torch

from .. import masks
from ..layout import broadcast_strides, row_strides
from ..spec import AttentionSpec

#: The numbers of tf::DType.
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.bool: 3}

_SIZES = (
    "batch",
    "num_heads",
    "num_kv_heads",
    "seqlen_q",
    "seqlen_k",
    "total_q",
    "total_k",
    "head_dim",
    "head_dim_v",
    "softmax_scale",
)


def _contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides, step = [], 1
    for n in reversed(shape):
        strides.append(0 if n == 1 else step)
        step *= n
    return tuple(reversed(strides))


def problem_fields(
    spec: AttentionSpec, out_stride: tuple[int, ...], dbias_shape: tuple[int, ...] | None = None
) -> dict[str, Any]:
    """Every field by name. The gradient of a bias is float32 and contiguous, in the bias's shape if not in another."""
    options, packed = spec.options, spec.is_packed
    left, right = masks.bounds(options.window_left, options.window_right)
    query, key, value, bias, slopes, sinks, key_mask, seqlens_k, block_table = map(
        spec.layout,
        ("query", "key", "value", "bias", "alibi_slopes", "sinks", "key_padding_mask", "seqlens_k", "block_table"),
    )
    assert query is not None and key is not None and value is not None
    return {
        **{name: getattr(spec, name) for name in _SIZES},
        "packed": packed,
        "dtype": DTYPES[spec.dtype],
        # So high a cap that no finite score comes near is none; its reciprocal may be too small for a GPU.
        "softcap": options.softcap if options.softcap and options.softcap < 1e30 else 0.0,
        "dropout_p": options.dropout_p,
        "left": left,
        "right": right,
        "query": row_strides(query.stride, packed),
        "key": row_strides(key.stride, packed),
        "value": row_strides(value.stride, packed),
        "out": row_strides(out_stride, packed),
        "seqlens_k_stride": 1 if seqlens_k is None else seqlens_k.stride[0],
        "page_size": spec.page_size,
        "num_pages": key.shape[0] if spec.is_paged else 0,
        "block_table": (0, 0) if block_table is None else tuple(block_table.stride),
        "key_mask": (0, 0) if key_mask is None else tuple(key_mask.stride),
        "bias_dtype": 0 if bias is None else DTYPES[bias.dtype],
        "bias": (0, 0, 0, 0) if bias is None else broadcast_strides(bias.shape, bias.stride),
        "dbias": (0, 0, 0, 0) if bias is None else _contiguous_strides(dbias_shape or tuple(bias.shape)),
        "alibi": (0, 0) if slopes is None else (0, *slopes.stride)[-2:],
        "sinks_dtype": 0 if sinks is None else DTYPES[sinks.dtype],
        "sinks_stride": 1 if sinks is None else sinks.stride[0],
    }
