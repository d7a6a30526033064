"""The CUDA kernels on CPU tensors, in the emulator: the whole conformance suite, by the one rule."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from transformer_fast import UnsupportedError, attention, attention_varlen, backends, explain
from transformer_fast.backends.cuda import native_module
from transformer_fast.testing import Case, Target, check, standard_cases

EMULATED = Target("emulated")
CASES = standard_cases()
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
LARGEST_HEAD_DIM = 256


def _can(case: Case) -> bool:
    return max(case.head_dim, case.head_dim_v or 0) <= LARGEST_HEAD_DIM


def _params() -> list[Any]:
    """Of each variant a case goes under the sanitizers, which are slow; in the type that `make sanitize` builds."""
    first = {case.variant: case.name for case in reversed(CASES) if case.core}
    return [
        pytest.param(
            case,
            dtype,
            id=f"{case.name}-{name}",
            marks=pytest.mark.sanitize if first.get(case.variant) == case.name and name == "bfloat16" else (),
        )
        for case in CASES
        for name, dtype in DTYPES.items()
        if _can(case)
    ]


@pytest.mark.parametrize(("case", "dtype"), _params())
def test_matches_the_oracle(case: Case, dtype: torch.dtype, seed: int, capability: int) -> None:
    outcome = check(case, dtype, EMULATED, seed)
    assert outcome.passed, f"\n{outcome}"


def _normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape).to(torch.bfloat16)


def test_dropout_is_that_of_every_back_end(capability: int) -> None:
    """The same seed keeps the same elements, in packed sequences too: with unit vectors as values, out shows which."""
    query, key = _normal(2, 4, 70, 16), _normal(2, 2, 90, 16)
    unit = torch.eye(90).expand(2, 2, 90, 90).to(torch.bfloat16)
    packed, lengths = _normal(100, 2, 16), torch.tensor([0, 30, 100], dtype=torch.int32)
    packed_unit = torch.cat([torch.eye(70)[:30], torch.eye(70)])[:, None].expand(100, 2, 70).to(torch.bfloat16)
    for function, arguments in (
        (attention, (query, key, unit)),
        (attention_varlen, (packed, packed, packed_unit, lengths, lengths, 70, 70)),
    ):
        kept = []
        for backend in ("emulated", "reference"):
            torch.manual_seed(11)
            kept.append(function(*arguments, dropout_p=0.6, backend=backend) > 0)
        assert torch.equal(*kept)
        assert kept[0].any() and not kept[0].all()


def test_rows_that_are_not_aligned(capability: int) -> None:
    """Addresses and strides that copies of 16 bytes cannot take give the same numbers, by whatever kernel."""
    wide = [_normal(1, 2, 80, 72) for _ in range(3)]
    results = []
    for shift in (0, 1):
        leaves = []
        for tensor in wide:
            storage = torch.zeros(*tensor.shape[:-1], 73, dtype=tensor.dtype)
            view = storage[..., shift : shift + 72]
            leaves.append(view.copy_(tensor).requires_grad_())
        out = attention(*leaves, causal=True, backend="emulated")
        results.append([out, *torch.autograd.grad(out, leaves, torch.ones_like(out))])
    for aligned, shifted in zip(*results, strict=True):
        assert aligned.any() and torch.equal(aligned, shifted)


def test_deterministic_gradients_are_bit_identical(capability: int) -> None:
    """Under every order in which blocks may run, those of a bias that many rows share too."""
    emulator, _ = native_module("_C_emulated")
    for bias in (None, torch.randn(1, 2, 1, 150), torch.randn(1, 1, 150, 1)):
        seqlen = 300 if bias is None else 150
        leaves = [_normal(2, heads, seqlen, 64).requires_grad_() for heads in (2, 1, 1)]
        leaves += [] if bias is None else [bias.requires_grad_()]
        options = dict(zip(("query", "key", "value", "bias"), leaves, strict=False))
        runs = []
        for seed in range(4):
            emulator.configure(seed, shuffle_blocks=bias is not None and capability == 80)
            out = attention(**options, causal=bias is None, deterministic=True, backend="emulated")
            runs.append(torch.autograd.grad(out, leaves, torch.ones_like(out)))
        assert all(grad.any() for grad in runs[0])
        assert all(torch.equal(*pair) for run in runs[1:] for pair in zip(runs[0], run, strict=True))


@pytest.mark.parametrize("shape", [(2, 4, 0, 64), (0, 4, 1, 64)], ids=["rows", "batch"])
def test_nothing_to_do_against_many_keys(shape: tuple[int, ...], capability: int) -> None:
    query, key = _normal(*shape), _normal(shape[0], 4, 2048, 64)
    assert attention(query, key, key, backend="emulated").shape == shape


def test_no_keys_and_no_rows_leave_zeros(capability: int) -> None:
    """Gradients of what nothing looks at are written all the same."""
    for rows, keys in ((0, 40), (40, 0)):
        leaves = [_normal(1, 2, n, 32).requires_grad_() for n in (rows, keys, keys)]
        out = attention(*leaves, backend="emulated")
        for grad in (out, *torch.autograd.grad(out, leaves, torch.ones_like(out))):
            assert torch.equal(grad, torch.zeros_like(grad))


def test_the_way_is_told(capability: int) -> None:
    long, short, keys = _normal(1, 2, 300, 64), _normal(1, 2, 1, 64), _normal(1, 1, 4096, 64)
    tiled, decode = (explain(q, keys, keys, backend="emulated").path for q in (long, short))
    assert tiled.startswith("tiled forward, ") and ("wgmma and TMA" in tiled) == (capability == 90)
    assert decode.startswith("split-KV decode, ") and "decode_sm80_bf16_64_plain" in decode
    odd = explain(*(_normal(1, 2, 300, 33) for _ in range(3)), backend="emulated").path
    assert "mma.sync" in odd and ("(not forward_sm90_bf16_64_plain: TMA needs rows" in odd) == (capability == 90)


def test_what_tma_cannot_load_has_its_own_kernel_on_hopper(capability: int) -> None:
    path = explain(*(_normal(1, 2, 300, 101) for _ in range(3)), backend="emulated").path
    assert ("forward_fallback_sm80_bf16_128_plain" if capability == 90 else "forward_sm80_bf16_128_plain") in path


def test_splits_join_to_the_same_numbers(capability: int, seed: int) -> None:
    """Few rows against many keys: partial results, joined by the last block."""
    case = Case("decode", "decode_split", num_heads=2, num_kv_heads=1, seqlen_q=1, seqlen_k=1500, head_dim=64)
    assert "splits" in explain(_normal(1, 2, 1, 64), *(_normal(1, 1, 1500, 64),) * 2, backend="emulated").path
    outcome = check(case, torch.bfloat16, EMULATED, seed)
    assert outcome.passed, f"\n{outcome}"


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_a_bias_of_the_lowest_number(dtype: torch.dtype, seed: int, capability: int) -> None:
    """How Hugging Face hides keys, whole rows too: scores near -FLT_MAX, of which the differences are what counts."""
    case = Case("bias", "bias_lowest", num_heads=2, seqlen_q=20, seqlen_k=70, head_dim=32, bias="float_lowest")
    outcome = check(case, dtype, EMULATED, seed)
    assert outcome.passed, f"\n{outcome}"


@pytest.mark.parametrize(("rows", "size"), [(1, 1e5), (40, 1e3), (40, 1e5), (40, 1e8)], ids=str)
def test_huge_scores(rows: int, size: float, seed: int, capability: int) -> None:
    """One multiply-add for the product and the subtraction of the maximum is off by 2^-24 of the maximum."""
    case = Case("full", f"huge_{size}_{rows}", seqlen_q=rows, seqlen_k=40, head_dim=64, score_size=size)
    outcome = check(case, torch.bfloat16, EMULATED, seed)
    assert outcome.passed, f"\n{outcome}"


def test_gradients_of_huge_scores_keep_the_sum(capability: int) -> None:
    """Keys alike share alike, also where their scores would swallow the logarithm of their sum: as with scores of 0."""
    value, grads = _normal(1, 1, 3, 64).requires_grad_(), []
    for size in (0.0, 3e3):
        query, key = (torch.full((1, 1, rows, 64), size).bfloat16() for rows in (65, 3))
        out = attention(query, key, value, backend="emulated")
        grads += torch.autograd.grad(out, value, torch.ones_like(out))
    assert grads[0].any() and torch.equal(*grads)


@pytest.mark.parametrize("softcap", [1e3, 1e6, 1e20, 3e38])
def test_a_softcap_far_above_the_scores(softcap: float, seed: int, capability: int) -> None:
    """A tangent that is right to some part of 1 is wrong to that part of the softcap."""
    case = Case("softcap", f"softcap_{softcap}", num_heads=2, seqlen_q=17, seqlen_k=80, head_dim=64, softcap=softcap)
    outcome = check(case, torch.bfloat16, EMULATED, seed)
    assert outcome.passed, f"\n{outcome}"


def test_no_query_in_a_batch_that_may_have_some(capability: int) -> None:
    query, key = torch.empty(0, 2, 64, dtype=torch.bfloat16), _normal(6, 1, 64)
    lengths = [torch.tensor(n, dtype=torch.int32) for n in ([0, 0, 0], [0, 3, 6])]
    assert attention_varlen(query, key, key, *lengths, 100, 6, backend="emulated").shape == query.shape


def test_lengths_beyond_the_tensors_are_refused(capability: int) -> None:
    """The emulator would write beyond them."""
    packed = _normal(33, 2, 64)
    lengths = torch.tensor([0, 10, 34], dtype=torch.int32)
    with pytest.raises(ValueError, match="cu_seqlens_q"):
        attention_varlen(packed, packed, packed, lengths, lengths, 24, 24, backend="emulated")


def test_what_it_cannot_do_is_said(capability: int) -> None:
    x = torch.randn(1, 1, 4, LARGEST_HEAD_DIM + 1)
    with pytest.raises(UnsupportedError, match="head_dim 257; it computes up to 256"):
        attention(*(x.half(),) * 3, backend="emulated")
    for dtype in (torch.float32, torch.float64):
        with pytest.raises(UnsupportedError, match=f"dtype {str(dtype)[6:]}; it computes bfloat16 and float16"):
            attention(*(x.to(dtype),) * 3, backend="emulated")


def test_it_has_to_be_asked_for_by_name(capability: int) -> None:
    x = _normal(1, 2, 9, 8)
    assert backends()["emulated"].available
    assert explain(x, x, x).backend == "cpu"


def test_its_results_are_not_nan(capability: int) -> None:
    """Scratch memory is full of NaN in tests: nothing of it is read before it is written."""
    query, keys = _normal(1, 4, 3, 128), _normal(1, 2, 3000, 128)
    assert math.isfinite(attention(query, keys, keys, backend="emulated").float().sum())
