"""Calls of torch.nn's attention modules, and the judgement of one module by its original."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from dropin.promised import PROMISED
from torch import Tensor, nn

from transformer_fast.testing import judge

BATCH, ROWS, KEYS, DIM, HEADS = 2, 9, 9, 24, 4
MINUS_INF = float("-inf")
Results = dict[str, Tensor]


def padding(kind: str, batch: int = BATCH, keys: int = KEYS) -> Tensor:
    """True = ignore; the last keys of the first sequence and the first one of the second."""
    hidden = torch.zeros(batch, keys, dtype=torch.bool)
    hidden[0, -3:] = True
    hidden[-1, :1] = True
    if kind == "bool":
        return hidden
    mask = torch.zeros(batch, keys).masked_fill(hidden, MINUS_INF)
    return mask if kind == "float" else mask + torch.randn(batch, keys)


def mask_of(kind: str, shape: tuple[int, ...]) -> Tensor:
    """True = ignore; key 4 is seen by all, whatever the paddings above, so that no row is empty."""
    hidden = torch.rand(shape) < 0.4
    hidden[..., 4] = False
    return hidden if kind == "bool" else torch.randn(shape).masked_fill(hidden, MINUS_INF)


def causal_mask(rows: int = ROWS, keys: int = KEYS) -> Tensor:
    return torch.ones(rows, keys, dtype=torch.bool).triu(1)


SQUARE, PER_HEAD = (ROWS, KEYS), (BATCH * HEADS, ROWS, KEYS)
#: name: (constructor arguments, what the call is given (made anew, seeded), which inputs are one tensor)
CASES: dict[str, tuple[dict[str, Any], Callable[[], dict[str, Any]], str]] = {
    "self": (dict(), dict, "qkv"),
    "self_batch_first": (dict(batch_first=True), dict, "qkv"),
    "no_bias": (dict(bias=False), dict, "qkv"),
    "memory": (dict(batch_first=True), dict, "kv"),
    "three_tensors": (dict(), dict, ""),
    "three_tensors_no_bias": (dict(bias=False), dict, ""),
    "kdim_vdim": (dict(kdim=10, vdim=7, batch_first=True), dict, ""),
    "vdim_no_bias": (dict(vdim=7, bias=False), dict, ""),
    "padding": (dict(batch_first=True), lambda: dict(key_padding_mask=padding("bool")), "qkv"),
    "padding_float": (dict(), lambda: dict(key_padding_mask=padding("float")), "qkv"),
    "padding_finite": (dict(), lambda: dict(key_padding_mask=padding("finite")), "qkv"),
    "mask": (dict(), lambda: dict(attn_mask=mask_of("bool", SQUARE)), "qkv"),
    "mask_float": (dict(batch_first=True), lambda: dict(attn_mask=mask_of("float", SQUARE)), "kv"),
    "mask_per_head": (dict(batch_first=True), lambda: dict(attn_mask=mask_of("bool", PER_HEAD)), "qkv"),
    "mask_per_head_float": (dict(), lambda: dict(attn_mask=mask_of("float", PER_HEAD)), "qkv"),
    "both_bool": (
        dict(),
        lambda: dict(attn_mask=mask_of("bool", SQUARE), key_padding_mask=padding("bool")),
        "qkv",
    ),
    "both_float": (
        dict(),
        lambda: dict(attn_mask=mask_of("float", PER_HEAD), key_padding_mask=padding("finite")),
        "qkv",
    ),
    "bool_and_float": (
        dict(),
        lambda: dict(attn_mask=mask_of("bool", PER_HEAD), key_padding_mask=padding("finite")),
        "qkv",
    ),
    "float_and_bool": (
        dict(),
        lambda: dict(attn_mask=mask_of("float", SQUARE), key_padding_mask=padding("bool")),
        "qkv",
    ),
    "causal": (dict(batch_first=True), lambda: dict(attn_mask=causal_mask(), is_causal=True), "qkv"),
    "causal_padding": (
        dict(),
        lambda: dict(attn_mask=causal_mask(), is_causal=True, key_padding_mask=right_padding("bool")),
        "qkv",
    ),
    "causal_padding_finite": (
        dict(),
        lambda: dict(attn_mask=causal_mask(), is_causal=True, key_padding_mask=right_padding("finite")),
        "qkv",
    ),
    "causal_fewer_keys": (dict(), lambda: dict(attn_mask=causal_mask(9, 5), is_causal=True), "kv5"),
    "causal_more_keys": (dict(), lambda: dict(attn_mask=causal_mask(9, 14), is_causal=True), "kv14"),
    "causal_more_keys_padding": (
        dict(),
        lambda: dict(attn_mask=causal_mask(9, 14), is_causal=True, key_padding_mask=right_padding("bool", 14)),
        "kv14",
    ),
    "bias_kv": (dict(add_bias_kv=True, batch_first=True), lambda: dict(key_padding_mask=padding("bool")), "qkv"),
    "bias_kv_causal": (dict(add_bias_kv=True), lambda: dict(attn_mask=causal_mask(), is_causal=True), "qkv"),
    "bias_kv_causal_padding": (
        dict(add_bias_kv=True),
        lambda: dict(attn_mask=causal_mask(), is_causal=True, key_padding_mask=right_padding("bool")),
        "qkv",
    ),
    "zero_attn": (dict(add_zero_attn=True), lambda: dict(attn_mask=mask_of("float", SQUARE)), "qkv"),
    "all_keys": (
        dict(add_zero_attn=True, add_bias_kv=True, kdim=10),
        lambda: dict(attn_mask=mask_of("bool", PER_HEAD), key_padding_mask=padding("finite")),
        "",
    ),
}


def right_padding(kind: str, keys: int = KEYS) -> Tensor:
    """As `padding`, but no first key is hidden, which is all that a first causal row sees."""
    mask = padding(kind, keys=keys)
    mask[-1, :1] = False if kind == "bool" else 0.5
    return mask


def filled(module: nn.Module) -> nn.Module:
    """Every parameter drawn anew: torch.nn begins with biases of zero."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter) / parameter.shape[-1] ** 0.5)
    return module


def inputs_of(options: dict[str, Any], same: str) -> list[Tensor]:
    """Query, key and value, where one tensor is given once."""
    keys = int(same[2:] or KEYS) if same.startswith("kv") else KEYS
    sizes = [(ROWS, DIM), (keys, options.get("kdim", DIM)), (keys, options.get("vdim", DIM))]
    first = options.get("batch_first", False)
    tensors = [torch.randn((BATCH, n, d) if first else (n, BATCH, d)) for n, d in sizes]
    return tensors[:1] if same == "qkv" else tensors[:2] if same.startswith("kv") else tensors


def in_dtype(given: Any, dtype: torch.dtype) -> Any:
    return given.to(dtype) if isinstance(given, Tensor) and given.is_floating_point() else given


def run_module(module: nn.Module, inputs: list[Tensor], dtype: torch.dtype, **given: Any) -> Results:
    """Outputs and all gradients of a copy of the module in a dtype."""
    module = copy.deepcopy(module).to(dtype)
    leaves = [t.to(dtype, copy=True).requires_grad_() for t in inputs]
    arguments = leaves
    if isinstance(module, nn.MultiheadAttention):
        arguments = [leaves[0], leaves[min(1, len(leaves) - 1)], leaves[-1]]
    outputs = module(*arguments, **{name: in_dtype(value, dtype) for name, value in given.items()})
    outputs = [t for t in (outputs if isinstance(outputs, tuple) else (outputs,)) if t is not None]
    generator = torch.Generator().manual_seed(3)
    loss = sum((t * torch.randn(t.shape, generator=generator).to(dtype)).sum() for t in outputs)
    assert isinstance(loss, Tensor)
    loss.backward()
    results = {f"output {i}": t.detach() for i, t in enumerate(outputs)}
    results |= {f"d input {i}": t.grad for i, t in enumerate(leaves) if t.grad is not None}
    return results | {f"d {name}": p.grad for name, p in module.named_parameters() if p.grad is not None}


def assert_whole_like_torch(ours: nn.Module, theirs: nn.Module, inputs: list[Tensor], **given: Any) -> None:
    """Of many layers, in float32: at the far end of these torch's own error is one number by chance, and no measure."""
    results, oracle = (
        run_module(ours, inputs, torch.float32, **given),
        run_module(theirs, inputs, torch.float64, **given),
    )
    assert results.keys() == oracle.keys()
    for name, result in results.items():
        error, magnitude = (result - oracle[name]).abs().max(), oracle[name].abs().max()
        assert error <= PROMISED * magnitude, f"{name}: {error:.3g} of {magnitude:.3g}"


def assert_like_torch(
    ours: nn.Module, theirs: nn.Module, inputs: list[Tensor], dtype: torch.dtype, **given: Any
) -> None:
    """Held against torch.nn in float64, by the error that torch.nn itself makes in the dtype."""
    results = run_module(ours, inputs, dtype, **given)
    oracle = run_module(theirs, inputs, torch.float64, **given)
    plain = run_module(theirs, inputs, dtype, **given)
    assert results.keys() == oracle.keys()
    # In float64 torch.nn is the oracle itself, whose error says nothing: the unit is that of the largest numbers about.
    largest = max(float(t.abs().max()) for t in oracle.values())
    for name, result in results.items():
        assert result.dtype == plain[name].dtype
        unit = torch.full_like(oracle[name], largest * torch.finfo(dtype).eps) if dtype == torch.float64 else None
        verdict = judge(result, oracle[name], plain[name], name=name, unit=unit)
        assert verdict.passed, str(verdict)
