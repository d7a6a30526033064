"""The definition of the library: attention in eager PyTorch, every variant, any dtype, differentiable.

Read this file to know what any kernel computes. In float64 it is the oracle that the others are held against.
Order of operations, in float32 whatever the input dtype (float64 stays float64)::

    s = softmax_scale * (q . k)
    s = softcap * tanh(s / softcap)                 if softcap
    s = s + bias                                    dense bias and ALiBi
    s = -inf where not visible                      a bias of -inf hides a key too
    p = softmax(s, extra logit = sink)              the sink takes probability and gives no value
    p = dropout(p)
    out = p @ v ;  lse = logsumexp(s, sink)

A row that sees nothing gives ``out = 0``, ``lse = -inf`` and zero gradients. NaN and Inf in keys and values that a
row does not see never reach that row, nor any gradient through it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import masks
from .spec import AttentionSpec, Operands

_PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_PHILOX_WEYL = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF


def philox_4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], seed: int) -> tuple[Tensor, ...]:
    """Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).

    Args:
        counter: four int64 tensors of one broadcast shape holding 32-bit words.
        seed: the 64-bit key.

    Returns:
        four int64 tensors holding 32-bit words.
    """
    c0, c1, c2, c3 = counter
    key0, key1 = seed & _WORD, (seed >> 32) & _WORD
    for _ in range(10):
        # A 64-bit product of 32-bit words overflows int64's sign bit but keeps its bits: mask after the shift.
        product0, product1 = c0 * _PHILOX_MULTIPLIERS[0], c2 * _PHILOX_MULTIPLIERS[1]
        high0, low0 = (product0 >> 32) & _WORD, product0 & _WORD
        high1, low1 = (product1 >> 32) & _WORD, product1 & _WORD
        c0, c1, c2, c3 = high1 ^ c1 ^ key0, low1, high0 ^ c3 ^ key1, low0
        key0, key1 = (key0 + _PHILOX_WEYL[0]) & _WORD, (key1 + _PHILOX_WEYL[1]) & _WORD
    return c0, c1, c2, c3


def dropout_threshold(dropout_p: float) -> int:
    """The 32-bit words below this number drop their element."""
    return min(int(dropout_p * 2.0**32), _WORD)


def dropout_keep(
    seed: int, batch: int, num_heads: int, seqlen_q: int, seqlen_k: int, p: float, first_batch: int = 0
) -> Tensor:
    """Which probabilities are kept: bool (batch, num_heads, seqlen_q, seqlen_k).

    The Philox counter is (column // 4, row, head, batch) and the column's last two bits choose the output word, so
    the mask is a function of the seed and the element's place, whatever the back end or the order of its work.
    """
    words = (seqlen_k + 3) // 4
    column = torch.arange(words, device="cpu").view(1, 1, 1, -1)
    row = torch.arange(seqlen_q, device="cpu").view(1, 1, -1, 1)
    head = torch.arange(num_heads, device="cpu").view(1, -1, 1, 1)
    entry = torch.arange(first_batch, first_batch + batch, device="cpu").view(-1, 1, 1, 1)
    outputs = philox_4x32(tuple(torch.broadcast_tensors(column, row, head, entry)), seed)
    random = torch.stack(outputs, dim=-1).flatten(-2)[..., :seqlen_k]
    return random >= dropout_threshold(p)


def _scores(query: Tensor, key: Tensor, visible: Tensor) -> Tensor:
    """q . k where visible, -inf elsewhere; what a hidden key holds takes no part, in backward either."""
    finite = key.isfinite()
    if bool(finite.all()):
        return (query @ key.transpose(-1, -2)).masked_fill(~visible, float("-inf"))
    scores = query @ key.where(finite, 0).transpose(-1, -2)
    bad_key = ~finite.all(-1)[..., None, :]
    scores = torch.where(bad_key, (query @ key.transpose(-1, -2)).detach(), scores)
    return scores.masked_fill(~visible, float("-inf"))


def _combine(probabilities: Tensor, value: Tensor, visible: Tensor) -> Tensor:
    """p @ v, in which the values that a row does not see take no part, be they NaN or Inf."""
    finite = value.isfinite()
    if bool(finite.all()):
        return probabilities @ value
    out = probabilities @ value.where(finite, 0)
    for j in (~finite).any(-1).flatten(0, -2).any(0).nonzero().flatten().tolist():
        bad = value[..., j : j + 1, :].masked_fill(finite[..., j : j + 1, :], 0)
        part = (probabilities[..., j : j + 1] * bad).detach()
        part = part.masked_fill(finite[..., j : j + 1, :], 0)
        out = out + part.masked_fill(~visible[..., j : j + 1], 0)
    return out


def _dense(operands: Operands, spec: AttentionSpec, first_batch: int = 0) -> tuple[Tensor, Tensor]:
    """One padded problem: out (batch, num_heads, seqlen_q, head_dim_v) and lse (batch, num_heads, seqlen_q)."""
    options, dtype = spec.options, torch.promote_types(spec.dtype, torch.float32)
    query, key, value = (t.to(dtype) for t in operands[:3])
    batch, num_heads, seqlen_q, _ = query.shape
    seqlen_k = key.shape[2]
    key = key.repeat_interleave(spec.group_size, dim=1)
    value = value.repeat_interleave(spec.group_size, dim=1)

    visible = masks.visible_keys(
        seqlen_q,
        seqlen_k,
        options.window_left,
        options.window_right,
        seqlens_k=operands.seqlens_k,
        key_padding_mask=operands.key_padding_mask,
        device=query.device,
    )[:, None]  # (batch or 1, 1, seqlen_q, seqlen_k)
    bias = operands.bias
    if bias is not None and bias.dtype == torch.bool:
        visible, bias = visible & bias, None
    elif bias is not None:
        visible = visible & (bias != float("-inf"))  # which hides a key as False does

    # The visible set decides first, so that hidden keys cannot send NaN through the steps below.
    visible = visible.expand(batch, num_heads, seqlen_q, seqlen_k)
    scores = _scores(query * spec.softmax_scale, key, visible)
    if options.softcap is not None:
        scores = options.softcap * torch.tanh(scores / options.softcap)
    if bias is not None:
        scores = scores + bias.to(dtype)
    if operands.alibi_slopes is not None:
        scores = scores - _alibi_penalty(operands, seqlen_q, seqlen_k, dtype)
    scores = scores.masked_fill(~visible, float("-inf"))

    empty = (
        scores.detach().amax(-1, keepdim=True) == float("-inf") if seqlen_k else visible.new_ones(*query.shape[:3], 1)
    )
    logits = scores
    if operands.sinks is not None:
        sink = operands.sinks.to(dtype).view(1, -1, 1, 1).expand(batch, num_heads, seqlen_q, 1)
        logits = torch.cat([logits, sink], dim=-1)
    logits = logits.masked_fill(empty, 0)  # any finite number: such a row is set to nothing below
    lse = torch.logsumexp(logits, dim=-1).masked_fill(empty.squeeze(-1), float("-inf"))
    probabilities = torch.softmax(logits, dim=-1)[..., :seqlen_k].masked_fill(empty, 0)
    if options.dropout_p > 0.0:
        assert operands.rng_seed is not None
        keep = dropout_keep(
            int(operands.rng_seed), batch, num_heads, seqlen_q, seqlen_k, options.dropout_p, first_batch
        )
        probabilities = probabilities * keep.to(query.device) / (1.0 - options.dropout_p)
    out = _combine(probabilities, value, visible)
    return out.to(spec.dtype), lse


def _alibi_penalty(operands: Operands, seqlen_q: int, seqlen_k: int, dtype: torch.dtype) -> Tensor:
    """slope * |i + offset_b - j|: (batch or 1, num_heads, seqlen_q, seqlen_k)."""
    slopes = operands.alibi_slopes
    assert slopes is not None
    device = slopes.device
    end = torch.tensor([seqlen_k], device=device) if operands.seqlens_k is None else operands.seqlens_k.long()
    position = torch.arange(seqlen_q, device=device).view(1, 1, -1, 1) + (end - seqlen_q).view(-1, 1, 1, 1)
    distance = (position - torch.arange(seqlen_k, device=device)).abs().to(dtype)
    return slopes.to(dtype).view(-1, slopes.shape[-1], 1, 1) * distance


def _packed(operands: Operands, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
    """A packed problem, sequence by sequence: out (total_q, num_heads, head_dim_v), lse (num_heads, total_q)."""
    assert operands.cu_seqlens_q is not None and operands.cu_seqlens_k is not None
    cu_q, cu_k = operands.cu_seqlens_q.tolist(), operands.cu_seqlens_k.tolist()
    outs: list[Tensor] = []
    lses: list[Tensor] = []
    for b in range(spec.batch):
        rows, keys = slice(cu_q[b], cu_q[b + 1]), slice(cu_k[b], cu_k[b + 1])
        slopes = operands.alibi_slopes
        one = Operands(
            operands.query[rows].transpose(0, 1)[None],
            operands.key[keys].transpose(0, 1)[None],
            operands.value[keys].transpose(0, 1)[None],
            alibi_slopes=slopes if slopes is None or slopes.dim() == 1 else slopes[b],
            sinks=operands.sinks,
            rng_seed=operands.rng_seed,
        )
        out, lse = _dense(one, spec, first_batch=b)
        outs.append(out[0].transpose(0, 1))
        lses.append(lse[0])
    if not outs:
        dtype = torch.promote_types(spec.dtype, torch.float32)
        nothing = operands.query.sum()  # of no elements: 0, and the results stay attached to their inputs
        return (
            operands.query.new_zeros(0, spec.num_heads, spec.head_dim_v) + nothing,
            operands.query.new_zeros(spec.num_heads, 0, dtype=dtype) + nothing,
        )
    return torch.cat(outs), torch.cat(lses, dim=1)


def _paged(operands: Operands, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
    """A paged problem, with each sequence's pages laid one after the other: a padded problem with key lengths."""
    table = operands.block_table
    assert table is not None
    num_pages = operands.key.shape[0]
    # Entries that no key needs may be anything: some page stands in for theirs, and its keys are not seen.
    pages = table.long().clamp(0, max(num_pages - 1, 0))
    if num_pages == 0:
        pages = pages[:, :0]
    # (num_pages, heads, page_size, d) -> (batch, max_pages, heads, page_size, d) -> (batch, heads, seqlen_k, d)
    key, value = (t[pages].transpose(1, 2).flatten(2, 3) for t in (operands.key, operands.value))
    return _dense(operands._replace(key=key, value=value, block_table=None), spec)


def attention(operands: Operands, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
    """``out`` in the query's dtype and ``lse`` (natural logarithm) in float32, or float64 for float64 inputs."""
    if spec.is_paged:
        return _paged(operands, spec)
    return (_packed if spec.is_packed else _dense)(operands, spec)
