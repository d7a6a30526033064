"""The peers as data: one set-up function each, which gives a contestant for a work, or says why it cannot.

Every peer gets the layout and the form of mask that suit it best; both are made before the clock starts.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..measure import NotApplicableError
from .device import Device
from .work import AS_IT_IS, Contestant, Forward, Layout, Work

HEADS_LAST = Layout(lambda t: t.transpose(1, 2).contiguous(), lambda t: t.transpose(1, 2))


@dataclass(frozen=True)
class Peer:
    """Who it is, and whose: "sdpa" and "flex" are PyTorch's own, of which the best is named in reports."""

    name: str
    family: str
    setup: Callable[[Work, Device], Contestant | None]


# ------------------------------------------------------------------------------------------------------------ SDPA


def _padded_layout(work: Work) -> Layout:
    """Packed ``(total, heads, head_dim)`` to a right-padded batch, which is what a call without lengths needs."""
    shape = work.shape
    tokens = torch.cat(
        [entry * shape.seqlen_k + torch.arange(n, device=work.device) for entry, (n, _) in enumerate(shape.sequences)]
    )

    def pad(packed: Tensor) -> Tensor:
        rows = packed.new_zeros(len(shape.sequences) * shape.seqlen_k, *packed.shape[1:])
        return rows.index_copy(0, tokens, packed).unflatten(0, (-1, shape.seqlen_k)).transpose(1, 2).contiguous()

    return Layout(pad, lambda t: t.transpose(1, 2).flatten(0, 1)[tokens])


def _sdpa_mask(work: Work) -> Tensor | None:
    """0 and -inf, broadcastable to (batch, 1, seqlen_q, seqlen_k); None where is_causal says it all."""
    shape, device = work.shape, work.device
    key = torch.arange(shape.seqlen_k, device=device)
    hidden = torch.zeros(1, 1, 1, shape.seqlen_k, dtype=torch.bool, device=device)
    if shape.window_left is not None:
        position = torch.arange(shape.seqlen_q, device=device)[:, None] + (shape.seqlen_k - shape.seqlen_q)
        hidden = hidden | (key > position) | (key < position - shape.window_left)
    if shape.lengths is not None and (not shape.is_packed or not shape.causal):
        lengths = torch.tensor([keys for _, keys in shape.sequences], device=device)
        hidden = hidden | (key >= lengths[:, None])[:, None, None]
    if not bool(hidden.any()):
        return None
    return torch.zeros(hidden.shape, dtype=work.dtype, device=device).masked_fill_(hidden, float("-inf"))


def _sdpa_forward(work: Work, mask: Tensor | None, backend: Any = None) -> Forward:
    from torch.nn.attention import sdpa_kernel

    shape = work.shape
    options: dict[str, Any] = dict(
        attn_mask=mask,
        is_causal=shape.causal and mask is None and not shape.is_decode,
        enable_gqa=shape.group_size > 1,
    )
    if backend is None:
        return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, **options)

    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, **options)

    return forward


def _sdpa(backend_name: str | None) -> Callable[[Work, Device], Contestant]:
    def setup(work: Work, device: Device) -> Contestant:
        shape = work.shape
        if shape.causal and shape.lengths is not None and not (shape.is_packed or shape.is_decode):
            raise NotApplicableError("its causal mask does not move with key lengths")
        from torch.nn.attention import SDPBackend

        backend = None if backend_name is None else getattr(SDPBackend, backend_name)
        layout = _padded_layout(work) if shape.is_packed else AS_IT_IS
        name = "sdpa" if backend_name is None else f"sdpa_{_SDPA_NAMES[backend_name]}"
        return Contestant(name, _sdpa_forward(work, _sdpa_mask(work), backend), layout)

    return setup


_SDPA_NAMES = {
    "FLASH_ATTENTION": "flash",
    "CUDNN_ATTENTION": "cudnn",
    "EFFICIENT_ATTENTION": "efficient",
    "MATH": "math",
}


def _sdpa_varlen(work: Work, device: Device) -> Contestant | None:
    """PyTorch's packed call, of 2.10 and later; its arguments still change."""
    if not work.shape.is_packed:
        return None
    if importlib.util.find_spec("torch.nn.attention.varlen") is None:
        raise NotApplicableError("this PyTorch has no torch.nn.attention.varlen")
    from torch.nn.attention.varlen import varlen_attn

    function: Any = varlen_attn
    shape, known = work.shape, inspect.signature(function).parameters
    options: dict[str, Any] = {}
    if shape.causal:
        options = {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
    if "is_causal" in known:
        options = {"is_causal": shape.causal}
    how = (work.cu_seqlens, work.cu_seqlens, shape.seqlen_q, shape.seqlen_k)
    return Contestant("sdpa_varlen", lambda q, k, v: function(q, k, v, *how, **options))


def _flash_without_window(work: Work, device: Device) -> Contestant | None:
    """What one gets by leaving the window out: another function, and the price of not having windows."""
    from torch.nn.attention import SDPBackend

    if work.shape.window_left is None:
        return None
    forward = _sdpa_forward(work, None, SDPBackend.FLASH_ATTENTION)
    return Contestant("sdpa_flash_no_window", forward, note="leaves the window out: another function")


# ------------------------------------------------------------------------------------------------------------ flex

_PACKED_AS_ONE = Layout(lambda t: t.transpose(0, 1)[None].contiguous(), lambda t: t[0].transpose(0, 1))


def _flex_mask(work: Work) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] | None:
    """The visible pairs as flex_attention wants them: a function of batch, head, row and key; None if all are."""
    shape = work.shape
    shift, left = shape.seqlen_k - shape.seqlen_q, shape.window_left
    causal = shape.causal and not shape.is_decode
    lengths = work.lengths
    sequence = None
    if shape.is_packed:
        sizes = torch.tensor([n for n, _ in shape.sequences], device=work.device)
        sequence, shift = torch.arange(len(sizes), device=work.device).repeat_interleave(sizes), 0
    if causal and lengths is not None:
        raise NotApplicableError("this benchmark has no causal block mask with key lengths")
    if not causal and left is None and shape.lengths is None:
        return None

    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        seen = j >= 0
        if causal:
            seen = seen & (j <= i + shift)
        if left is not None:
            seen = seen & (j >= i + shift - left)
        if sequence is not None:
            seen = seen & (sequence[i] == sequence[j])
        return seen & (j < lengths[b]) if lengths is not None else seen

    return visible


def _flex(work: Work, device: Device) -> Contestant | None:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    shape = work.shape
    if not shape.flex:
        return None
    visible, block_mask = _flex_mask(work), None
    layout = _PACKED_AS_ONE if shape.is_packed else AS_IT_IS
    if visible is not None:
        rows, keys = (shape.starts[-1],) * 2 if shape.is_packed else (shape.seqlen_q, shape.seqlen_k)
        batch = shape.batch if work.lengths is not None else None
        block_mask = create_block_mask(visible, batch, None, rows, keys, device=work.device.type)
    compiled = device.compiled(flex_attention)
    grouped = shape.group_size > 1
    return Contestant("flex", lambda q, k, v: compiled(q, k, v, block_mask=block_mask, enable_gqa=grouped), layout)


# ------------------------------------------------------------------------------------------------------ flash-attn


def _out(result: Tensor | tuple[Tensor, ...]) -> Tensor:
    """Some versions return the log-sum-exp as well."""
    return result if isinstance(result, Tensor) else result[0]


def _flash_attn(name: str, module_name: str) -> Callable[[Work, Device], Contestant]:
    def setup(work: Work, device: Device) -> Contestant:
        if importlib.util.find_spec(module_name) is None:
            raise NotApplicableError(f"{module_name} is not installed")
        module: Any = importlib.import_module(module_name)
        shape = work.shape
        options: dict[str, Any] = {"causal": shape.causal}
        if shape.window_left is not None:
            options["window_size"] = (shape.window_left, 0)
        if shape.is_packed:
            how = (work.cu_seqlens, work.cu_seqlens, shape.seqlen_q, shape.seqlen_k)
            function = module.flash_attn_varlen_func
            return Contestant(name, lambda q, k, v: _out(function(q, k, v, *how, **options)))
        if shape.is_decode:
            # Its own split over keys is behind the call for caches only.
            cached = module.flash_attn_with_kvcache
            lengths = work.lengths
            forward: Forward = lambda q, k, v: _out(cached(q, k, v, cache_seqlens=lengths, **options))  # noqa: E731
            return Contestant(name, forward, HEADS_LAST)
        if shape.lengths is not None:
            raise NotApplicableError("no key lengths in its call for padded batches")
        dense = module.flash_attn_func
        return Contestant(name, lambda q, k, v: _out(dense(q, k, v, **options)), HEADS_LAST)

    return setup


#: Every peer, in reporting order. On a CPU, in a dry run, most say why they cannot.
PEERS: tuple[Peer, ...] = (
    *(Peer(f"sdpa_{short}", "sdpa", _sdpa(name)) for name, short in _SDPA_NAMES.items() if short != "math"),
    Peer("sdpa_varlen", "sdpa", _sdpa_varlen),
    Peer("flex", "flex", _flex),
    Peer("flash_attn", "flash_attn", _flash_attn("flash_attn", "flash_attn")),
    Peer("flash_attn_3", "flash_attn", _flash_attn("flash_attn_3", "flash_attn_interface")),
    Peer("sdpa_flash_no_window", "note", _flash_without_window),
)
#: What a dry run has in their place beside them: on the CPU the flash, cuDNN and efficient back ends are not all there.
DRY_PEERS: tuple[Peer, ...] = (
    Peer("sdpa_math", "sdpa", _sdpa("MATH")),
    Peer("sdpa", "sdpa", _sdpa(None)),
)
FAMILIES = {peer.name: peer.family for peer in (*PEERS, *DRY_PEERS)}
