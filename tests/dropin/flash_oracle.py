"""flash-attn's conventions written out, one sequence at a time, in whatever dtype is given: oracle and yardstick."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from transformer_fast.testing import judge


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    slopes: Tensor | None = None,
    softmax_scale: float | None = None,
    keep: Tensor | None = None,
    dropout_p: float = 0.0,
    start: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """(seqlen_q, heads, d), (seqlen_k, kv_heads, d) twice -> out, lse (heads, seqlen_q), scores (heads, q, k).

    ``slopes`` (heads,); ``keep`` bool (heads, seqlen_q, seqlen_k); keys before ``start`` are not there.
    """
    seqlen_q, heads, head_dim = q.shape
    seqlen_k, kv_heads = k.shape[:2]
    k, v = (t.repeat_interleave(heads // kv_heads, 1).transpose(0, 1) for t in (k, v))
    scores = q.transpose(0, 1) @ k.transpose(1, 2) * (head_dim**-0.5 if softmax_scale is None else softmax_scale)
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    row = torch.arange(seqlen_q).unsqueeze(1) + seqlen_k - seqlen_q
    column = torch.arange(seqlen_k)
    if slopes is not None:
        scores = scores - slopes.to(scores.dtype).view(-1, 1, 1) * (row - column).abs()
    left, right = window_size
    visible = column >= start
    if causal or right >= 0:
        visible = visible & (column <= row + (0 if causal else right))
    if left >= 0:
        visible = visible & (column >= row - left)
    visible = visible.expand(heads, seqlen_q, seqlen_k)
    scores = scores.masked_fill(~visible, float("-inf"))
    empty = ~visible.any(-1, keepdim=True)
    probabilities = scores.masked_fill(empty, 0.0).softmax(-1).masked_fill(empty, 0.0)
    if keep is not None:
        probabilities = probabilities * keep / (1 - dropout_p)
    out = (probabilities @ v).transpose(0, 1)
    lse = scores.masked_fill(empty, 0.0).logsumexp(-1).masked_fill(empty.squeeze(-1), float("-inf"))
    return out, lse, scores


def rotate(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, interleaved: bool) -> Tensor:
    """(seqlen, heads, d) by complex numbers, of float32 at least; ``positions`` int (seqlen,)."""
    half, wide = cos.shape[-1], torch.promote_types(x.dtype, torch.float32)
    turn = torch.complex(cos.to(wide), sin.to(wide))[positions].unsqueeze(1)
    part = x[..., : 2 * half].to(wide)
    pairs = part.unflatten(-1, (half, 2)) if interleaved else part.unflatten(-1, (2, half)).transpose(-1, -2)
    turned = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * turn)
    turned = turned.flatten(-2) if interleaved else turned.transpose(-1, -2).flatten(-2)
    return torch.cat([turned.to(x.dtype), x[..., 2 * half :]], -1)


def assert_right(ours: dict[str, Tensor], oracle: dict[str, Tensor], plain: dict[str, Tensor]) -> None:
    """The tolerance rule, on each by its name."""
    verdicts = [judge(result, oracle[name], plain[name], name=name) for name, result in ours.items()]
    assert ours.keys() == oracle.keys()
    assert all(v.passed for v in verdicts), "\n".join(map(str, verdicts))


def options_of(case: dict[str, Any]) -> dict[str, Any]:
    """The part of a case that flash-attn's functions and :func:`attend` both take."""
    return {n: v for n, v in case.items() if n in ("causal", "window_size", "softcap", "softmax_scale")}
