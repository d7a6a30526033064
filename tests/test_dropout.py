"""The dropout mask: one for all back ends, by the place alone, and the same in both passes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from transformer_fast import attention, attention_varlen
from transformer_fast.testing import available_targets, judge

# -------------------------------------------------------------------------------------------------------- dropout

TARGETS = available_targets()
each_target = pytest.mark.parametrize("target", TARGETS, ids=lambda t: t.name)


def keep_mask(
    backend: str, batch: int, heads: int, seqlen_q: int, seqlen_k: int, *, kv_heads: int | None = None, p: float = 0.4
) -> Tensor:
    """Which probabilities dropout keeps. All are equal, and the values are unit vectors: the output is the mask."""
    query = torch.zeros(batch, heads, seqlen_q, 8)
    key = torch.zeros(batch, kv_heads or heads, seqlen_k, 8)
    unit = torch.eye(seqlen_k).expand(*key.shape[:3], seqlen_k)
    torch.manual_seed(99)
    return attention(query, key, unit, dropout_p=p, backend=backend) > 0


@each_target
@pytest.mark.parametrize("seqlen_q", [1, 70])
def test_one_dropout_mask_on_every_back_end(target: Any, seqlen_q: int) -> None:
    wanted = keep_mask("reference", 2, 4, seqlen_q, 203)
    with target.forced():
        assert torch.equal(keep_mask(target.backend, 2, 4, seqlen_q, 203), wanted)
    assert wanted.any()
    assert not wanted.all()


@each_target
def test_the_dropout_mask_depends_on_the_place_alone(target: Any) -> None:
    """Not on how a problem is tiled, chunked or grouped: a smaller one has the corner of the larger one's mask."""
    with target.forced():
        whole = keep_mask(target.backend, 3, 4, 150, 210)
        for batch, heads, seqlen_q, seqlen_k, kv_heads in (
            (3, 4, 150, 97, 4),
            (2, 4, 150, 210, 1),
            (1, 2, 65, 210, 2),
            (3, 4, 1, 210, 2),
            (2, 3, 5, 1, 3),
            (1, 4, 64, 96, 2),
        ):
            part = keep_mask(target.backend, batch, heads, seqlen_q, seqlen_k, kv_heads=kv_heads)
            assert torch.equal(part, whole[:batch, :heads, :seqlen_q, :seqlen_k]), (batch, heads, seqlen_q, seqlen_k)


@each_target
def test_the_dropout_mask_of_a_packed_sequence(target: Any) -> None:
    """Sequence b of a packed batch drops what entry b of the padded batch drops."""
    lengths_q, lengths_k = (5, 0, 70), (11, 3, 101)
    cu_q, cu_k = (torch.tensor([0, *n]).cumsum(0).to(torch.int32) for n in (lengths_q, lengths_k))
    key = torch.zeros(sum(lengths_k), 2, 8)
    unit = torch.cat([torch.eye(n, max(lengths_k)) for n in lengths_k])[:, None].expand(-1, 2, -1)
    with target.forced():
        torch.manual_seed(99)
        out = attention_varlen(
            torch.zeros(sum(lengths_q), 4, 8), key, unit, cu_q, cu_k, 70, 101, dropout_p=0.4, backend=target.backend
        )
    padded = keep_mask("reference", 3, 4, 70, 101)
    for b, (rows, keys) in enumerate(zip(lengths_q, lengths_k, strict=True)):
        here = out[cu_q[b] : cu_q[b + 1], :, :keys].transpose(0, 1) > 0
        assert torch.equal(here, padded[b, :, :rows, :keys]), b


@each_target
def test_backward_drops_what_forward_dropped(target: Any) -> None:
    """With unit vectors coming in, the gradient of the values is the transposed matrix of dropped probabilities."""
    query, key = torch.zeros(2, 2, 70, 8), torch.zeros(2, 2, 110, 8)
    value = torch.zeros(2, 2, 110, 70, requires_grad=True)
    with target.forced():
        torch.manual_seed(99)
        attention(query, key, value, dropout_p=0.4, backend=target.backend).backward(torch.eye(70).expand(2, 2, 70, 70))
        assert torch.equal(value.grad.transpose(-1, -2) > 0, keep_mask(target.backend, 2, 2, 70, 110))


@each_target
def test_dropout_keeps_the_expected_value(target: Any) -> None:
    """What is kept is divided by 1 - p, exactly: all kept entries of a uniform row are equal to 1 / (n (1 - p))."""
    n, p = 128, 0.25
    query = torch.zeros(1, 2, 33, 8)
    unit = torch.eye(n).expand(1, 2, n, n)
    with target.forced():
        out = attention(query, torch.zeros(1, 2, n, 8), unit, dropout_p=p, backend=target.backend)
    kept = out[out > 0]
    plain = torch.full_like(kept, 1 / n) / (1 - p)
    verdict = judge(kept, plain.double(), plain)
    assert verdict.passed, str(verdict)


def test_each_call_draws_another_seed() -> None:
    query = torch.zeros(1, 1, 64, 8)
    unit = torch.eye(64)[None, None]
    first, second = (attention(query, query, unit, dropout_p=0.5) for _ in range(2))
    assert not torch.equal(first, second)
