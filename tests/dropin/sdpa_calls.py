"""Calls of scaled_dot_product_attention of every kind, and how a result is judged: PyTorch in float64 is the oracle."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from transformer_fast.testing import judge
from transformer_fast.testing.baseline import rounding_units

#: PyTorch's function, whatever stands under its name in torch.nn.functional.
BUILTIN = torch._C._nn.scaled_dot_product_attention
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MINUS_INF = float("-inf")
Results = dict[str, Tensor]


@dataclass(frozen=True)
class Call:
    """Shapes, what makes the tensors of other strides, and the remaining arguments."""

    query: tuple[int, ...] = (2, 4, 9, 16)
    key: tuple[int, ...] = (2, 4, 13, 16)
    value: tuple[int, ...] | None = None  # as the key
    mask: Callable[[], Tensor] | None = None
    strided: Callable[[Tensor], Tensor] = lambda t: t
    options: dict[str, Any] = field(default_factory=dict)

    def tensors(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Fresh inputs in one dtype; a float mask is one too, and like all of them it takes a gradient."""
        found = {"query": torch.randn(self.query), "key": torch.randn(self.key)}
        found["value"] = torch.randn(self.value or self.key)
        found = {name: self.strided(t.to(dtype)) for name, t in found.items()}
        if self.mask is not None:
            mask = self.mask()
            found["attn_mask"] = mask.to(dtype) if mask.is_floating_point() else mask
        return found


def _bool(*shape: int) -> Tensor:
    return torch.rand(shape) < 0.6


def _empty_rows() -> Tensor:
    mask = _bool(2, 1, 9, 13)
    mask[0, 0, 2:5] = False
    mask[1, 0, -1] = False
    return mask


def _minus_infinity() -> Tensor:
    mask = torch.randn(2, 4, 9, 13).masked_fill(_bool(2, 4, 9, 13), MINUS_INF)
    mask[0, 1, 3] = MINUS_INF
    return mask


def _padding() -> Tensor:
    mask = _bool(2, 1, 1, 13)
    mask[0] = False  # a sequence of nothing but padding
    return mask


def _gaps(t: Tensor) -> Tensor:
    wide = t.new_full((*t.shape[:-2], 2 * t.shape[-2] + 1, t.shape[-1] + 3), float("nan"))
    wide[..., 1::2, : t.shape[-1]] = t
    return wide[..., 1::2, : t.shape[-1]]


SQUARE = dict(query=(2, 4, 9, 16), key=(2, 4, 9, 16))
CALLS: dict[str, Call] = {
    "4d": Call(),
    "3d": Call((3, 9, 8), (3, 13, 8)),
    "2d": Call((9, 8), (13, 8)),
    "5d": Call((2, 3, 4, 9, 8), (2, 3, 4, 13, 8)),
    "broadcast": Call((4, 9, 8), (2, 4, 13, 8)),
    "broadcast_kv_head": Call((2, 4, 9, 8), (1, 1, 13, 8)),
    "broadcast_query_head": Call((2, 1, 9, 8), (2, 4, 13, 8), (2, 1, 13, 8)),
    "broadcast_2d_key": Call((2, 3, 4, 9, 8), (13, 8)),
    "one_row": Call((2, 4, 1, 16), (2, 4, 33, 16)),
    "odd": Call((1, 3, 17, 5), (1, 3, 63, 5), (1, 3, 63, 7)),
    "head_dim_v": Call(value=(2, 4, 13, 24)),
    "causal": Call(**SQUARE, options=dict(is_causal=True)),
    "causal_more_keys": Call(options=dict(is_causal=True)),
    "causal_more_rows": Call((2, 4, 15, 16), (2, 4, 6, 16), options=dict(is_causal=True)),
    "causal_one_row": Call((2, 4, 1, 16), options=dict(is_causal=True)),
    "causal_3d": Call((3, 5, 8), (3, 11, 8), (3, 11, 4), options=dict(is_causal=True)),
    "gqa": Call((2, 6, 9, 16), (2, 2, 13, 16), options=dict(enable_gqa=True)),
    "gqa_causal": Call((2, 6, 15, 16), (2, 3, 9, 16), options=dict(enable_gqa=True, is_causal=True)),
    "gqa_two_ways": Call((2, 6, 9, 16), (2, 3, 13, 16), (2, 2, 13, 16), options=dict(enable_gqa=True)),
    "gqa_equal": Call(options=dict(enable_gqa=True)),
    "gqa_3d": Call((6, 9, 16), (2, 13, 16), options=dict(enable_gqa=True)),
    "scale": Call(options=dict(scale=0.7)),
    "scale_negative": Call(options=dict(scale=-0.3)),
    "scale_zero": Call(**SQUARE, options=dict(scale=0.0, is_causal=True)),
    "mask_bool": Call(mask=lambda: _bool(2, 4, 9, 13)),
    "mask_bool_2d": Call(mask=lambda: _bool(9, 13)),
    "mask_bool_3d": Call(mask=lambda: _bool(4, 1, 13)),
    "mask_bool_per_row": Call(mask=lambda: _bool(2, 1, 9, 1)),
    "mask_padding": Call(mask=_padding),
    "mask_padding_expanded": Call(mask=lambda: _padding().expand(2, 4, 9, 13)),
    "mask_padding_shared": Call(mask=lambda: _bool(1, 1, 1, 13)),
    "mask_padding_one_row": Call((2, 4, 1, 16), mask=_padding),
    "mask_empty_rows": Call(mask=_empty_rows),
    "mask_float": Call(mask=lambda: torch.randn(2, 4, 9, 13)),
    "mask_float_2d": Call(mask=lambda: torch.randn(9, 13)),
    "mask_float_per_head": Call(mask=lambda: torch.randn(1, 4, 9, 13)),
    "mask_float_padding": Call(mask=lambda: torch.randn(2, 1, 1, 13)),
    "mask_float_empty_rows": Call(mask=_minus_infinity),
    "mask_strided": Call(mask=lambda: torch.randn(2, 4, 13, 9).mT),
    "mask_3d_inputs": Call((3, 9, 8), (3, 13, 8), mask=lambda: torch.randn(3, 9, 13)),
    "mask_2d_inputs": Call((9, 8), (13, 8), mask=lambda: _bool(9, 13)),
    "mask_5d": Call((2, 3, 4, 9, 8), (2, 3, 4, 13, 8), mask=lambda: torch.randn(2, 1, 4, 1, 13)),
    "mask_5d_shared": Call((2, 3, 4, 9, 8), (3, 1, 13, 8), mask=lambda: _bool(1, 1, 1, 1, 13)),
    "mask_gqa": Call((2, 6, 9, 8), (2, 2, 13, 8), mask=lambda: torch.randn(2, 6, 9, 13), options=dict(enable_gqa=True)),
    "strides_bshd": Call(strided=lambda t: t.transpose(1, 2).contiguous().transpose(1, 2)),
    "strides_gaps": Call(strided=_gaps),
    "strides_last": Call(strided=lambda t: t.mT.contiguous().mT),
    "strides_last_causal": Call(strided=lambda t: t.mT.contiguous().mT, options=dict(is_causal=True)),
    "strides_expanded": Call(strided=lambda t: t[:1].expand(t.shape)),
}  # fmt: skip


def run(function: Callable[..., Tensor], tensors: dict[str, Tensor], dout: Tensor, **options: Any) -> Results:
    """Output and gradients of all that can have one."""
    leaves = {n: t.detach().requires_grad_(t.is_floating_point()) for n, t in tensors.items()}
    out = function(**leaves, **options)
    names = [name for name, leaf in leaves.items() if leaf.requires_grad]
    grads = torch.autograd.grad(out, [leaves[name] for name in names], dout.to(out.dtype))
    return {"out": out.detach(), **{f"d{name}": grad for name, grad in zip(names, grads, strict=True)}}


def plain(tensors: dict[str, Tensor], dout: Tensor, **options: Any) -> Results:
    """PyTorch's own, by its plain formula."""
    with sdpa_kernel(SDPBackend.MATH):
        return run(BUILTIN, tensors, dout, **options)


def doubled(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: t.double() if t.is_floating_point() else t for n, t in tensors.items()}


def units_of(tensors: dict[str, Tensor], dout: Tensor, dtype: torch.dtype, **options: Any) -> Results:
    """Size of a unit in the last place of the output and of each gradient, by the rule's own account.

    Args:
        tensors, dout: in float64.
        dtype: that of the problem.
    """
    query, key, value = (tensors[name] for name in ("query", "key", "value"))
    if options.get("enable_gqa"):
        key, value = (t.repeat_interleave(query.shape[-3] // t.shape[-3], dim=-3) for t in (key, value))
    lead = dout.shape[:-2]

    def alone(t: Tensor) -> Tensor:  # (..., rows, d) -> (-1, 1, rows, d): each head a batch entry
        return t.expand(*lead, *t.shape[-2:]).reshape(-1, 1, *t.shape[-2:])

    rows, keys = query.shape[-2], key.shape[-2]
    visible, bias = torch.ones(rows, keys, dtype=torch.bool), None
    visible = visible.tril() if options.get("is_causal") else visible
    mask = tensors.get("attn_mask", options.get("attn_mask"))
    if mask is not None:
        mask = alone(mask.expand(*lead, rows, keys))
        visible, bias = (mask, None) if mask.dtype == torch.bool else (visible, mask.double())
    scale = options.get("scale")
    found = rounding_units(
        *(alone(t) for t in (query, key, value, dout)),
        None,
        dtype=dtype,
        sinks=None,
        bias=bias,
        visible=visible,
        softmax_scale=query.shape[-1] ** -0.5 if scale is None else scale,
        dropout_p=options.get("dropout_p", 0.0),
    )
    exact = torch.finfo(dtype).eps / torch.finfo(torch.float32).eps if dtype == torch.float64 else 1.0
    units = {"out": found["out"].reshape(dout.shape)}
    for name, tensor in tensors.items():
        unit = found["bias" if name == "attn_mask" else name] if tensor.is_floating_point() else None
        if unit is not None:
            unit = unit.square().reshape(*lead, *unit.shape[-2:])
            if unit.dim() > 2 and tensor.dim() > 2 and unit.shape[-3] != tensor.shape[-3] > 1:  # heads of a group
                unit = unit.unflatten(-3, (tensor.shape[-3], -1)).sum(-3)
            units[f"d{name}"] = unit.sum_to_size(tensor.shape).sqrt()
    return {name: unit.abs() * exact for name, unit in units.items()}


def assert_right(ours: Results, tensors: dict[str, Tensor], dout: Tensor, **options: Any) -> None:
    """The tolerance rule on the output and each gradient."""
    dtype = tensors["query"].dtype
    oracle = plain(doubled(tensors), dout.double(), **options)
    baseline = plain(tensors, dout, **options)
    units = units_of(doubled(tensors), dout.double(), dtype, **options)
    assert ours.keys() == oracle.keys()
    for name, result in ours.items():
        assert result.dtype == baseline[name].dtype, name
        verdict = judge(result, oracle[name], baseline[name], name=name, unit=units[name])
        assert verdict.passed, str(verdict)


def check(function: Callable[..., Tensor], call: Call, dtype: torch.dtype) -> None:
    """One call of a function with SDPA's signature."""
    tensors = call.tensors(dtype)
    dout = torch.randn(BUILTIN(**tensors, **call.options).shape, dtype=dtype)
    assert_right(run(function, tensors, dout, **call.options), tensors, dout, **call.options)
