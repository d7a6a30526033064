"""Block masks of every kind, and what they and plain attention give."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, and_masks, create_block_mask, noop_mask, or_masks

from transformer_fast.dropin.flex import RecognizedMask, flex_attention

BATCH, NUM_HEADS, SEQLEN = 3, 4, 17
DOCUMENTS = torch.tensor([0] * 5 + [1] * 9 + [2] * 3)
BATCH_DOCUMENTS = torch.stack([DOCUMENTS, DOCUMENTS.flip(0), torch.full((SEQLEN,), 7)])
PADDED_DOCUMENTS = torch.tensor([0] * 5 + [1] * 9 + [-1] * 3)
CODE_OF_KEYS = torch.tensor([0] * 2 + [1] * 5 + [2] * 4)  # other lengths than the queries'
LENGTHS = torch.tensor([7, 17, 0])
STARTS = torch.tensor([0, 3, 11])
NOW = torch.tensor(6)

Mod = Callable[..., Any]


def causal(b: Any, h: Any, q: Any, k: Any) -> Any:
    return q >= k


def window(left: int, right: int) -> Mod:
    return lambda b, h, q, k: (q - k <= left) & (k - q <= right)


def documents(b: Any, h: Any, q: Any, k: Any) -> Any:
    return DOCUMENTS[q] == DOCUMENTS[k]


def batch_documents(b: Any, h: Any, q: Any, k: Any) -> Any:
    return BATCH_DOCUMENTS[b, q] == BATCH_DOCUMENTS[b, k]


def padded_documents(b: Any, h: Any, q: Any, k: Any) -> Any:
    return (PADDED_DOCUMENTS[q] == PADDED_DOCUMENTS[k]) & (PADDED_DOCUMENTS[q] >= 0)


def padding(b: Any, h: Any, q: Any, k: Any) -> Any:
    return k < LENGTHS[b]


def left_padding(b: Any, h: Any, q: Any, k: Any) -> Any:
    return k >= STARTS[b]


def prefix(b: Any, h: Any, q: Any, k: Any) -> Any:
    return k < LENGTHS[b]


def cache_lengths(b: Any, h: Any, q: Any, k: Any) -> Any:
    return k <= q + LENGTHS[b] - 5


# name -> mask_mod, (seqlen_q, seqlen_k), batch and heads that the block mask is made for, what it is recognized as
CASES: dict[str, tuple[Mod, tuple[int, int], tuple[int | None, int | None], str]] = {
    "noop": (noop_mask, (17, 9), (None, None), "window"),
    "causal": (causal, (17, 17), (None, None), "window"),
    "causal_per_head_blocks": (causal, (17, 17), (BATCH, NUM_HEADS), "window"),
    "causal_more_keys": (causal, (17, 30), (None, None), "window"),
    "causal_more_queries": (causal, (30, 17), (None, None), "window"),
    "window": (and_masks(causal, window(4, 0)), (17, 17), (None, None), "window"),
    "window_both_sides": (window(4, 2), (17, 21), (None, None), "window"),
    "window_of_the_past": (window(9, -3), (17, 17), (None, None), "window"),
    "window_more_queries": (and_masks(causal, window(4, 0)), (30, 17), (None, None), "documents"),
    "decode": (lambda b, h, q, k: q + NOW >= k, (1, 17), (None, None), "window"),
    "chunk": (lambda b, h, q, k: (q + NOW >= k) & (q + NOW - k < 4), (5, 17), (None, None), "window"),
    "padding": (padding, (17, 17), (BATCH, None), "window"),
    "padding_causal": (and_masks(causal, padding), (17, 17), (BATCH, None), "window"),
    "left_padding_window": (and_masks(causal, left_padding, window(6, 0)), (17, 17), (BATCH, None), "window"),
    "cache_lengths": (cache_lengths, (5, 17), (BATCH, None), "lengths"),
    "documents": (documents, (17, 17), (None, None), "documents"),
    "documents_causal": (and_masks(documents, causal), (17, 17), (None, None), "documents"),
    "documents_window": (and_masks(documents, causal, window(2, 0)), (17, 17), (None, None), "documents"),
    "documents_padded": (and_masks(padded_documents, causal), (17, 17), (None, None), "documents"),
    "documents_of_a_batch": (and_masks(batch_documents, causal), (17, 17), (BATCH, None), "documents"),
    "documents_of_two_lengths": (
        lambda b, h, q, k: DOCUMENTS[q] == CODE_OF_KEYS[k],
        (17, 11),
        (None, None),
        "documents",
    ),
    "prefix": (or_masks(causal, prefix), (17, 17), (BATCH, None), "dense"),
    "by_head": (lambda b, h, q, k: (q >= k) & (q - k <= 2 * h), (17, 17), (None, NUM_HEADS), "dense"),
    "strided": (lambda b, h, q, k: (q - k) % 3 == 0, (17, 17), (None, None), "dense"),
    "nothing": (lambda b, h, q, k: k < 0, (17, 17), (None, None), "window"),
}
each_case = pytest.mark.parametrize("name", CASES)


def block_mask(name: str) -> BlockMask:
    mod, lengths, size, _ = CASES[name]
    return create_block_mask(mod, *size, *lengths, device="cpu", BLOCK_SIZE=8)


def inputs(lengths: tuple[int, int], dtype: torch.dtype = torch.float32, gradients: bool = False) -> list[Tensor]:
    shapes = [(NUM_HEADS, lengths[0], 8), (2, lengths[1], 8), (2, lengths[1], 8)]
    return [torch.randn(BATCH, *shape, dtype=dtype).requires_grad_(gradients) for shape in shapes]


def plain(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    key, value = (t.repeat_interleave(NUM_HEADS // 2, 1) for t in (key, value))
    scores = (query @ key.mT * query.shape[-1] ** -0.5).masked_fill(~mask, float("-inf"))
    weights = scores.softmax(-1).nan_to_num(0.0)
    return weights @ value, scores.logsumexp(-1)


def gradients_of(out: Tensor, given: list[Tensor]) -> tuple[Tensor, ...]:
    weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
    return torch.autograd.grad((out * weight).sum(), given)


def seen_through(mask: RecognizedMask | BlockMask, batch: int, num_heads: int, lengths: tuple[int, int]) -> Tensor:
    """What a row sees, as the kernels run it: with an identity for values, its weights that are not 0."""
    query, key = torch.zeros(batch, num_heads, lengths[0], 8), torch.zeros(batch, num_heads, lengths[1], 8)
    value = torch.eye(lengths[1]).expand(batch, num_heads, -1, -1)
    return flex_attention(query, key, value, block_mask=mask) > 0
