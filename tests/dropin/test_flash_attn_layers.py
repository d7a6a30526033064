"""What models import from flash-attn beside attention: bert_padding, the rotary embedding, rms_norm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from dropin.flash_oracle import assert_right, rotate
from torch import Tensor

from transformer_fast.flash_attn import bert_padding
from transformer_fast.flash_attn.layers import rotary
from transformer_fast.flash_attn.ops.rms_norm import rms_norm

DTYPES = (torch.float64, torch.float32)


def cu_seqlens(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)


# -------------------------------------------------------------------------------------------------------- bert_padding

MASK = torch.tensor([[1, 0, 1, 1], [0, 0, 0, 0], [0, 1, 0, 0]])


@pytest.mark.parametrize("mask", [MASK, MASK.bool(), MASK.float()], ids=["int", "bool", "float"])
def test_unpad_and_pad(mask: Tensor) -> None:
    hidden = torch.randn(3, 4, 2, 5, requires_grad=True)
    packed_tokens, indices, cu, longest, used = bert_padding.unpad_input(hidden, mask)
    assert torch.equal(indices, torch.tensor([0, 2, 3, 9])) and torch.equal(
        packed_tokens, hidden.flatten(0, 1)[indices]
    )
    assert torch.equal(cu, torch.tensor([0, 3, 3, 4], dtype=torch.int32)) and cu.dtype == torch.int32
    assert longest == 3 and type(longest) is int
    assert torch.equal(used, torch.tensor([3, 0, 1])) and used.dtype == torch.int32
    for places in (indices, indices.int()):
        padded_again = bert_padding.pad_input(packed_tokens, places, 3, 4)
        assert torch.equal(padded_again, hidden * MASK[..., None, None])
    (grad,) = torch.autograd.grad((padded_again * 2).sum(), hidden)
    assert torch.equal(grad, 2.0 * MASK[..., None, None].expand_as(hidden))


def test_unpad_with_unused_places() -> None:
    hidden = torch.randn(3, 4, 5)
    unused = torch.tensor([[0, 1, 0, 0], [1, 0, 0, 0], [0, 1, 0, 0]])
    packed_tokens, indices, cu, longest, used = bert_padding.unpad_input(hidden, MASK, unused)
    assert torch.equal(indices, torch.tensor([0, 1, 2, 3, 4, 9])) and packed_tokens.shape == (6, 5)
    assert cu.tolist() == [0, 4, 5, 6] and longest == 4 and used.tolist() == [3, 0, 1]


def test_unpad_rows_of_several_sequences() -> None:
    hidden = torch.randn(3, 6, 5)
    lengths = torch.tensor([[2, 3, 0, 0, 0, 0], [3, 2, 0, 0, 0, 0], [6, 0, 0, 0, 0, 0]])
    packed_tokens, indices, cu, longest = bert_padding.unpad_input_for_concatenated_sequences(hidden, lengths)
    assert indices.tolist() == [0, 1, 2, 3, 4, 6, 7, 8, 9, 10, 12, 13, 14, 15, 16, 17]
    assert torch.equal(packed_tokens, hidden.flatten(0, 1)[indices])
    assert cu.tolist() == [0, 2, 5, 8, 10, 16] and cu.dtype == torch.int32 and longest == 6


@pytest.mark.parametrize(
    ("words", "call"),
    [
        (
            r"attention_mask has shape \(1, 4\); allowed: \(2, 4\)",
            lambda x: bert_padding.unpad_input(x, torch.ones(1, 4)),
        ),
        (r"attention_mask has shape \(2, 4, 1\)", lambda x: bert_padding.unpad_input(x, torch.ones(2, 4, 1))),
        (
            r"unused_mask has shape \(1, 4\)",
            lambda x: bert_padding.unpad_input(x, torch.ones(2, 4), torch.zeros(1, 4)),
        ),
        (
            r"attention_mask_in_length has shape \(1, 4\)",
            lambda x: bert_padding.unpad_input_for_concatenated_sequences(x, torch.ones(1, 4, dtype=torch.int64)),
        ),
        (
            r"rows of \[5, 1\] tokens; allowed: 0 to 4",
            lambda x: bert_padding.unpad_input_for_concatenated_sequences(
                x, torch.tensor([[2, 3, 0, 0], [1, 0, 0, 0]])
            ),
        ),
    ],
)
def test_masks_of_another_batch(words: str, call: Callable[[Tensor], Any]) -> None:
    with pytest.raises(ValueError, match=words):
        call(torch.zeros(2, 4, 3))


def test_indexing_and_its_gradients() -> None:
    rows, indices = torch.randn(5, 3, 2, requires_grad=True), torch.tensor([4, 0, 4])
    taken = bert_padding.index_first_axis(rows, indices)
    assert torch.equal(taken, rows[indices])
    (grad,) = torch.autograd.grad(taken.sum(), rows)
    assert grad[:, 0, 0].tolist() == [1, 0, 0, 0, 2]
    values = torch.randn(2, 3, requires_grad=True)
    put = bert_padding.index_put_first_axis(values, torch.tensor([3, 1]), 4)
    assert torch.equal(put[[3, 1]], values) and put[[0, 2]].count_nonzero() == 0
    weights = torch.randn(4, 3)
    assert torch.equal(torch.autograd.grad((put * weights).sum(), values)[0], weights[[3, 1]])


# -------------------------------------------------------------------------------------------------------------- rotary


def tables(seqlen: int, half: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    angle = torch.rand(seqlen, half) * 6.3
    return angle.cos().to(dtype), angle.sin().to(dtype)


def each_sequence(x: Tensor, cos: Tensor, sin: Tensor, offsets: list[int], interleaved: bool) -> Tensor:
    rows = [rotate(x[b], cos, sin, o + torch.arange(x.shape[1]), interleaved) for b, o in enumerate(offsets)]
    return torch.stack(rows)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("half", "offsets"), [(8, 0), (4, 3), (3, torch.tensor([5, 0], dtype=torch.int32))])
def test_rotary(half: int, offsets: int | Tensor, interleaved: bool, inplace: bool) -> None:
    x, dout = torch.randn(2, 7, 3, 16), torch.randn(2, 7, 3, 16)
    cos, sin = tables(12, half)
    starts = offsets.tolist() if isinstance(offsets, Tensor) else [offsets] * 2

    def definition(dtype: torch.dtype) -> dict[str, Tensor]:
        leaf = x.to(dtype).requires_grad_()
        out = each_sequence(leaf, cos.to(dtype), sin.to(dtype), starts, interleaved)
        return {"out": out, "dx": torch.autograd.grad(out, leaf, dout.to(dtype))[0]}

    oracle, plain = definition(torch.float64), definition(torch.float32)
    leaf = x.clone().requires_grad_()
    given = leaf * 1 if inplace else leaf
    out = rotary.apply_rotary_emb(given, cos, sin, interleaved, inplace, offsets)
    (dx,) = torch.autograd.grad(out, leaf, dout)
    assert_right({"out": out, "dx": dx}, oracle, plain)
    assert (given.data_ptr() == out.data_ptr()) == inplace
    assert torch.equal(given.detach(), out.detach() if inplace else x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rotary_is_computed_in_float32(dtype: torch.dtype) -> None:
    x, (cos, sin) = torch.randn(1, 9, 2, 16).to(dtype), tables(9, 8, dtype)
    wide = rotary.apply_rotary_emb(x.float(), cos.float(), sin.float())
    assert torch.equal(rotary.apply_rotary_emb(x, cos, sin), wide.to(dtype))


def test_rotary_of_packed_sequences() -> None:
    x, (cos, sin) = torch.randn(9, 3, 16), tables(12, 8)
    cu, offsets = cu_seqlens([4, 0, 5]), torch.tensor([2, 1, 6])
    out = rotary.apply_rotary_emb(x, cos, sin, seqlen_offsets=offsets, cu_seqlens=cu, max_seqlen=5)
    first = rotary.apply_rotary_emb(x[None, :4], cos, sin, seqlen_offsets=2)[0]
    second = rotary.apply_rotary_emb(x[None, 4:], cos, sin, seqlen_offsets=6)[0]
    assert torch.equal(out, torch.cat([first, second]))


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_of_packed_tensors(interleaved: bool) -> None:
    (cos, sin), (cos_k, sin_k) = tables(9, 4), tables(9, 4)
    qkv, dout = torch.randn(2, 5, 3, 4, 16), torch.randn(2, 5, 3, 4, 16)
    turn = {"interleaved": interleaved, "seqlen_offsets": 4}
    leaf = qkv.clone().requires_grad_()
    parts = leaf.unbind(2)
    expected = torch.stack(
        [
            rotary.apply_rotary_emb(parts[0], cos, sin, **turn),
            rotary.apply_rotary_emb(parts[1], cos_k, sin_k, **turn),
            parts[2],
        ],
        2,
    )
    given = leaf * 1
    out = rotary.apply_rotary_emb_qkv_(given, cos, sin, cos_k, sin_k, **turn)
    assert torch.equal(out, expected) and out.data_ptr() == given.data_ptr()
    assert torch.equal(*(torch.autograd.grad(o, leaf, dout)[0] for o in (out, expected)))

    flat = torch.cat([expected[:, :, 0], expected[:, :, 1, :2], expected[:, :, 2, :2]], 2)  # 4 query and 2 KV heads
    grouped = torch.cat([qkv[:, :, 0], qkv[:, :, 1, :2], qkv[:, :, 2, :2]], 2)
    assert torch.equal(rotary.apply_rotary_emb_qkv_(grouped, cos, sin, cos_k, sin_k, num_heads_q=4, **turn), flat)
    kv = torch.stack([qkv[:, :, 1], qkv[:, :, 2]], 2)
    assert torch.equal(rotary.apply_rotary_emb_kv_(kv, cos_k, sin_k, **turn), expected[:, :, 1:])


@pytest.mark.parametrize("scale_base", [None, 512.0])
def test_rotary_module(scale_base: float | None) -> None:
    """Scores depend on the distance alone, and tables that grow say the same; XPos decays with the distance."""
    module = rotary.RotaryEmbedding(16, base=100.0, scale_base=scale_base)
    one = torch.randn(1, 1, 3, 1, 16).expand(1, 12, 3, 1, 16)
    out = module(one.clone())
    scores = torch.einsum("bihd,bjhd->ij", out[:, :, 0], out[:, :, 1]).double()
    apart = scores.diagonal(-3)
    assert float((apart - apart[0]).abs().max()) < 100 * torch.finfo(torch.float32).eps * float(scores.abs().max())
    if scale_base is None:
        inv_freq = 100.0 ** (-torch.arange(0, 16, 2).double() / 16)
        angle = torch.outer(torch.arange(12).double(), inv_freq)
        oracle = each_sequence(one[:, :, 0].double(), angle.cos(), angle.sin(), [0], False)
        plain = each_sequence(one[:, :, 0], angle.float().cos(), angle.float().sin(), [0], False)
        assert_right({"q": out[:, :, 0]}, {"q": oracle}, {"q": plain})
        queries, kv = module(one[:, :, 0].clone(), one[:, :, 1:].clone(), seqlen_offset=torch.tensor([0]))
        assert torch.equal(queries, out[:, :, 0]) and torch.equal(kv, out[:, :, 1:])


X, (COS, SIN) = torch.zeros(2, 5, 2, 8), tables(6, 4)


@pytest.mark.parametrize(
    ("words", "call"),
    [
        (r"positions are 2 to 6; allowed: 0 to 5", lambda: rotary.apply_rotary_emb(X, COS, SIN, seqlen_offsets=2)),
        (r"positions are 0 to 6; ", lambda: rotary.apply_rotary_emb(X, COS, SIN, seqlen_offsets=torch.tensor([0, 2]))),
        (
            r"seqlen_offsets has shape \(3,\)",
            lambda: rotary.apply_rotary_emb(X, COS, SIN, seqlen_offsets=torch.zeros(3)),
        ),
        (r"cos has shape \(6, 8\)", lambda: rotary.apply_rotary_emb(X, *tables(6, 8))),
        (r"sin has shape \(6, 3\)", lambda: rotary.apply_rotary_emb(X, COS, SIN[:, :3])),
        (r"x has shape \(5, 2, 8\)", lambda: rotary.apply_rotary_emb(X[0], COS, SIN)),
        (r"x has shape .* packed", lambda: rotary.apply_rotary_emb(X, COS, SIN, cu_seqlens=cu_seqlens([2, 3]))),
        (r"num_heads_q is 1; allowed: 2 heads", lambda: rotary.apply_rotary_emb_qkv_(X, COS, SIN, num_heads_q=1)),
        (r"qkv has shape", lambda: rotary.apply_rotary_emb_qkv_(X[0], COS, SIN)),
        (r"kv has shape", lambda: rotary.apply_rotary_emb_kv_(X[:, :, None], COS, SIN)),
    ],
)
def test_rotary_errors(words: str, call: Callable[[], Any]) -> None:
    with pytest.raises(ValueError, match=words):
        call()


def test_rms_norm() -> None:
    x, weight = torch.randn(3, 7, 16), torch.randn(16)
    oracle, plain = (
        {"y": x.to(d) * (x.to(d).square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight.to(d)} for d in DTYPES
    )
    assert_right({"y": rms_norm(x, weight, 1e-6)}, oracle, plain)
