"""A decoder stack on our attention and on SDPA: what the kernels are worth where a model spends its time."""

from __future__ import annotations

import copy
import functools
import time
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from transformer_fast.models import Architecture, DecoderModel, ModelConfig, TokenLayout, from_config
from transformer_fast.models.layers import AttentionOptions
from transformer_fast.testing.baseline import stored_ulp
from transformer_fast.testing.tolerance import Verdict, judge

from .check import slice_of
from .timing import Line, Ready, measured

if TYPE_CHECKING:
    from .device import Device

#: (batch, seqlen) and what differs from the configuration below.
MODELS: dict[str, tuple[tuple[int, int], dict[str, Any]]] = {
    "decoder_8x2048_4k": ((4, 4096), {}),
    "decoder_8x2048_16k_window": ((1, 16384), {"sliding_window": 1024}),
}


def _config(changed: dict[str, Any], *, dry: bool) -> ModelConfig:
    sizes = dict(hidden_size=2048, num_layers=8, num_heads=16, num_kv_heads=4, intermediate_size=5632)
    if dry:
        sizes = dict(hidden_size=32, num_layers=2, num_heads=2, num_kv_heads=1, intermediate_size=48)
        changed = dict.fromkeys(changed, 16)
    options = dict(vocab_size=1024, max_positions=16384, causal=True, norm="rmsnorm", activation="swiglu")
    return ModelConfig(**(sizes | options | dict(biases=(), positions="rope") | changed))  # type: ignore[arg-type]


def _sdpa(query: Tensor, key: Tensor, value: Tensor, layout: TokenLayout, options: AttentionOptions) -> Tensor:
    """PyTorch's attention as model code calls it: a window as a mask, and then K and V repeated for their groups,
    since no back end of SDPA has both a mask and groups (past them it would hold all scores in memory).
    """
    group_size = query.shape[1] // key.shape[1]
    query, key, value = (layout.heads_first(t) for t in (query, key, value))
    mask, grouped = None, options.window_size is None and query.dtype != torch.float32
    if not grouped:
        key, value = (t.repeat_interleave(group_size, dim=1) for t in (key, value))
    if options.window_size is not None:
        mask = _window_mask(layout.seqlen, options.window_size[0], query.dtype, query.device)
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped)
    return out.transpose(1, 2).flatten(0, 1)


@functools.lru_cache(maxsize=1)
def _window_mask(seqlen: int, left: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Made once, for all layers and steps."""
    place = torch.arange(seqlen, device=device)
    distance = place[:, None] - place
    mask = torch.zeros(distance.shape, dtype=dtype, device=device)
    return mask.masked_fill_((distance < 0) | (distance > left), float("-inf"))


class _Training:
    """One decoder on one attention: forward, and the gradients of all weights.

    What is judged beside the hidden states are the gradients of two projections to queries, keys and values: in a
    stack with fresh weights little of the hidden states comes from attention, but all of those gradients does.
    """

    def __init__(self, decoder: DecoderModel, ids: Tensor, dout: Tensor, backend: str | None) -> None:
        self.decoder, self.ids, self.dout = decoder, ids, dout
        if backend is None:
            decoder.set_attention(_sdpa)
        else:
            decoder.set_backend(backend)
        self.parameters = dict(decoder.named_parameters())
        last = len(decoder.decoder.blocks) - 1
        self.judged = {f"qkv of layer {i}": f"decoder.blocks.{i}.attention.qkv.weight" for i in (0, last)}

    def __call__(self) -> dict[str, Tensor]:
        out = self.decoder.decode(self.ids)[0]
        grads = torch.autograd.grad(out, list(self.parameters.values()), self.dout)
        named = dict(zip(self.parameters, grads, strict=True))
        return {"out": out.detach()} | {short: named[name] for short, name in self.judged.items()}


def model_job(device: Device, job: dict[str, Any]) -> dict[str, Any]:
    """Forward and backward of a stack with random weights, ours against SDPA; checked against the stack in float32."""
    (batch, seqlen), changed = MODELS[job["name"]]
    if device.is_dry:
        batch, seqlen = 2, 24
    where = device.torch_device
    config = _config(changed, dry=device.is_dry)
    torch.manual_seed(1)
    wide = from_config(Architecture(decoder=config), device=where)
    ids = torch.randint(config.vocab_size, (batch, seqlen), device=where)
    dout = torch.randn(batch * seqlen, config.hidden_size, device=where)
    half = copy.deepcopy(wide).to(torch.bfloat16)

    exact = _Training(wide, ids, dout, None)()
    del wide
    sdpa = _Training(copy.deepcopy(half), ids, dout.to(torch.bfloat16), None)
    plain = sdpa()
    line = Line({"sdpa": _ready(device, sdpa, 0.0)})
    peaks = {}
    for name in job["backends"]:
        training = _Training(copy.deepcopy(half), ids, dout.to(torch.bfloat16), name)
        verdicts = _verdicts(training(), exact, plain)
        wrong = [str(verdict) for verdict in verdicts if not verdict.passed]
        if wrong:
            line.wrong[name] = "\n".join(wrong)
        else:
            line.ready[name] = _ready(device, training, max(verdict.used for verdict in verdicts))
    for name, entry in line.ready.items():
        device.release()
        entry.step()
        device.synchronize()
        peaks[name] = device.peak_bytes()
    found = measured(device, line, job["backends"], job["seconds"])
    return {
        "status": "wrong" if line.wrong else "ok",
        "text": "\n".join(f"{name}: {text}" for name, text in line.wrong.items()),
        "title": "decoder stack, forward and backward",
        "description": f"{config.num_layers} layers, hidden {config.hidden_size}, {config.num_heads} heads over "
        f"{config.num_kv_heads}, batch {batch}, {seqlen} tokens"
        + (f", window {config.sliding_window}" if config.sliding_window else ""),
        "tokens": batch * seqlen,
        "peaks": peaks,
    } | found


def _ready(device: Device, step: _Training, used: float) -> Ready:
    start = time.perf_counter()
    step()
    device.synchronize()
    return Ready(step, time.perf_counter() - start, device.host_seconds(step), used)


def _verdicts(found: dict[str, Tensor], exact: dict[str, Tensor], plain: dict[str, Tensor]) -> list[Verdict]:
    """As far from float32 as SDPA in the same dtype, by the tolerance rule, on some rows."""
    verdicts = []
    for name, result in found.items():
        rows = slice_of(len(result), result.device)
        unit = exact[name][rows].double().abs() * stored_ulp(result.dtype)
        verdicts.append(judge(result[rows], exact[name][rows], plain[name][rows], name=name, unit=unit))
    return verdicts
