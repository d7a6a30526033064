"""What memory_efficient_attention refuses, and in which words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from dropin.xformers_cases import CASES, DIM, HEADS, TABLE, drawn
from torch import Tensor

import transformer_fast.dropin.xformers as xops


class Renamed(xops.BlockDiagonalMask):
    """A subclass that means what its base means."""


class Other(xops.BlockDiagonalMask):
    """A subclass with a meaning of its own."""

    def materialize(self, shape: tuple[int, ...], *args: Any) -> Tensor:
        return torch.zeros(shape)


def test_a_subclass_without_a_meaning_of_its_own() -> None:
    tensors = drawn(1, 9, 9)
    bias = xops.BlockDiagonalMask.from_seqlens([4, 5])
    renamed = Renamed.from_seqlens([4, 5])
    assert type(renamed) is Renamed
    results = [xops.memory_efficient_attention(*tensors, b) for b in (bias, renamed)]
    assert torch.equal(*results)


X = torch.zeros(1, 9, HEADS, DIM)
PADDED_MASK = xops.BlockDiagonalPaddedKeysMask.from_seqlens([4, 5], 5, [3, 4])
WRONG: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "op": (
        lambda: xops.memory_efficient_attention(X, X, X, op="cutlass"),
        ValueError,
        "op is 'cutlass'; allowed: None",
    ),
    "class": (
        lambda: xops.memory_efficient_attention(X, X, X, object()),
        TypeError,
        r"attn_bias is of type builtins.object; allowed: None, a torch.Tensor, or LowerTriangularMask,",
    ),
    "subclass": (
        lambda: xops.memory_efficient_attention(X, X, X, Other.from_seqlens([4, 5])),
        TypeError,
        r"attn_bias is of type .*Other; allowed",
    ),
    "dims": (lambda: xops.memory_efficient_attention(X, X, X[0]), ValueError, "query, key and value have shapes"),
    "batch": (
        lambda: xops.memory_efficient_attention(
            *[X.expand(2, -1, -1, -1)] * 3, xops.BlockDiagonalMask.from_seqlens([4, 5])
        ),
        ValueError,
        "batch 2, 2 and 2 with BlockDiagonalMask; allowed: 1",
    ),
    "bias_bool": (
        lambda: xops.memory_efficient_attention(X, X, X, torch.ones(1, HEADS, 9, 9).bool()),
        TypeError,
        "attn_bias has dtype bool; allowed: a floating one",
    ),
    "bias_dims": (
        lambda: xops.memory_efficient_attention(X, X, X, torch.ones(9, 9)),
        ValueError,
        "attn_bias has 2 dimensions",
    ),
    "bias_shape": (
        lambda: xops.memory_efficient_attention(X, X, X, torch.ones(1, HEADS, 9, 8)),
        ValueError,
        "bias has shape",
    ),
    "groups": (
        lambda: xops.memory_efficient_attention(*[X.unflatten(2, (2, 2))] + [X.unflatten(2, (4, 1))] * 2),
        ValueError,
        r"key has \(4, 1\) groups and heads; allowed: \(2, 2\)",
    ),
    "total": (
        lambda: xops.memory_efficient_attention(X, X, X, xops.BlockDiagonalMask.from_seqlens([4, 4])),
        ValueError,
        "attn_bias is for 8 queries and 8 keys in all, query and key have 9 and 9; allowed",
    ),
    "total_keys_top_left": (
        lambda: xops.memory_efficient_attention(X, X, X, xops.BlockDiagonalCausalMask.from_seqlens([4, 5], [4, 9])),
        ValueError,
        "attn_bias is for 9 queries and 13 keys in all, query and key have 9 and 9; allowed",
    ),
    "total_queries_top_left": (
        lambda: xops.memory_efficient_attention(X, X, X, xops.BlockDiagonalCausalMask.from_seqlens([3, 3], [4, 5])),
        ValueError,
        "attn_bias is for 6 queries and 9 keys in all, query and key have 9 and 9; allowed",
    ),
    "total_queries_of_a_cache": (
        lambda: xops.memory_efficient_attention(
            X[:, :6], X, X, xops.BlockDiagonalPaddedKeysMask.from_seqlens([1, 3], 5, [3, 4])
        ),
        ValueError,
        "attn_bias is for 4 queries and 10 keys in all, query and key have 6 and 9; allowed",
    ),
    "values": (
        lambda: xops.memory_efficient_attention(X[:, :4], X[:, :5], X, xops.LowerTriangularMask()),
        ValueError,
        "value has seqlen 9; allowed: 5, as the key",
    ),
    "bias_keys_top_left": (
        lambda: xops.memory_efficient_attention(
            X[:, :4], X, X, xops.LowerTriangularMask().add_bias(torch.zeros(1, HEADS, 4, 7))
        ),
        ValueError,
        r"attn_bias has shape \(1, 4, 4, 7\); allowed: 9 keys, or 1",
    ),
    "expanded_heads": (
        lambda: xops.memory_efficient_attention(X, *[X[:, :, :1].expand(-1, -1, 3, -1)] * 2),
        ValueError,
        "key has 3 heads for a query of 4 heads",
    ),
    "query_list": (
        lambda: xops.memory_efficient_attention([1], X, X),  # type: ignore[arg-type]
        TypeError,
        "query is of type list; allowed: a torch.Tensor",
    ),
    "value_none": (
        lambda: xops.memory_efficient_attention(X, X, None),  # type: ignore[arg-type]
        TypeError,
        "value is of type NoneType; allowed: a torch.Tensor",
    ),
    "output_dtype": (
        lambda: xops.memory_efficient_attention(X, X, X, output_dtype="cpu"),  # type: ignore[arg-type]
        TypeError,
        "output_dtype is 'cpu'; allowed: None or a torch.dtype",
    ),
    "negative": (
        lambda: xops.BlockDiagonalMask.from_seqlens([-1, 4]),
        ValueError,
        r"seqlens is \[-1, 4\]; allowed: >= 0 each",
    ),
    "dropout": (
        lambda: xops.memory_efficient_attention(X, X, X, PADDED_MASK, p=0.1),
        ValueError,
        "p is 0.1 with BlockDiagonalPaddedKeysMask",
    ),
    "dropout_lse": (
        lambda: xops.memory_efficient_attention_forward_requires_grad(X, X, X, p=0.1),
        ValueError,
        "p is 0.1; allowed: 0.0",
    ),
    "gradient": (
        lambda: xops.memory_efficient_attention(
            X.clone().requires_grad_(), X.repeat(1, 2, 1, 1)[:, :10], X.repeat(1, 2, 1, 1)[:, :10], PADDED_MASK
        ),
        ValueError,
        "query requires grad",
    ),
    "room": (
        lambda: xops.memory_efficient_attention(X, X, X, PADDED_MASK),
        ValueError,
        "key has 9 rows; allowed: a multiple of 5",
    ),
    "seqlens": (
        lambda: xops.BlockDiagonalPaddedKeysMask.from_seqlens([1], 3, [4]),
        ValueError,
        r"seqlens is \[4\]; allowed: 0 to 3",
    ),
    "lengths": (
        lambda: xops.BlockDiagonalMask.from_seqlens([1], [2, 3]),
        ValueError,
        "kv_seqlen has 2 entries; allowed: 1",
    ),
    "starts": (
        lambda: xops.BlockDiagonalGappyKeysMask.from_seqlens([1], [0], [1]),
        ValueError,
        "seqstarts has 1 entries; allowed: 2",
    ),
    "padding": (
        lambda: CASES["BlockDiagonalGappyKeysMask"].make(xops).make_paged(TABLE, 4, 6, object),
        ValueError,
        r"notional_padding is 6; allowed: a multiple of 4",
    ),
    "begin": (
        lambda: CASES["BlockDiagonalGappyKeysMask"].make(xops).make_paged(TABLE, 4, 12, object),
        ValueError,
        r"sequences begin at \[1, -4, .* in their pages; allowed: 0 to 11",
    ),
    "window_size": (
        lambda: xops.LowerTriangularFromBottomRightLocalAttentionMask(0),
        ValueError,
        "window_size is 0; allowed: >= 1",
    ),
    "local": (lambda: xops.LocalAttentionFromBottomRightMask(1, -1), ValueError, "window_right is -1; allowed: >= 0"),
    "lists": (
        lambda: xops.BlockDiagonalMask.from_tensor_lists_qkv([X], [X], [X[:, :2]]),
        ValueError,
        "as many values as keys",
    ),
    "split": (lambda: xops.BlockDiagonalMask.from_seqlens([4]).split(X), ValueError, r"allowed: \(1, 4, ...\)"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments(name: str) -> None:
    call, error, message = WRONG[name]
    with pytest.raises(error, match=message):
        call()


def test_names_of_xformers() -> None:
    assert xops.fmha.attn_bias.BlockDiagonalMask is xops.BlockDiagonalMask
    assert xops.AttentionMask is xops.AttentionBias
    assert issubclass(xops.PagedBlockDiagonalGappyKeysMask, xops.AttentionBias)
    for name in xops.__all__:
        assert hasattr(xops, name)
