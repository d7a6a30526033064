"""varlen_attn: the arguments of torch.nn.attention.varlen, against a plain mask for each sequence."""

from __future__ import annotations

import inspect
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from transformer_fast.dropin import varlen
from transformer_fast.dropin.varlen import AuxRequest, varlen_attn
from transformer_fast.testing import judge
from transformer_fast.testing.baseline import plain_attention, visible_pairs

LENGTHS = ((3, 5), (1, 1), (17, 17), (0, 4), (9, 9))  # of queries and keys
HEADS, DIM = 4, 16


def starts(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)


def packed(kv_heads: int = HEADS, lengths: tuple[tuple[int, int], ...] = LENGTHS) -> tuple[Any, ...]:
    """Query, key, value and the arguments about sequences."""
    rows, keys = [q for q, _ in lengths], [k for _, k in lengths]
    tensors = [torch.randn(sum(n), h, DIM) for n, h in ((rows, HEADS), (keys, kv_heads), (keys, kv_heads))]
    return (*tensors, starts(rows), starts(keys), max(rows), max(keys))


def wanted(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    *,
    used: list[int] | None = None,
    window: tuple[int, int] = (-1, -1),
    scale: float = DIM**-0.5,
) -> tuple[Tensor, Tensor]:
    """Sequence by sequence, as it is defined."""
    outs, lses = [], []
    for b, ((q0, q1), (k0, k1)) in enumerate(zip(pairwise(cu_q.tolist()), pairwise(cu_k.tolist()), strict=True)):
        k1 = k1 if used is None else k0 + used[b]
        visible = visible_pairs(1, q1 - q0, k1 - k0, window_size=window)
        q, k, v = (t.transpose(0, 1)[None] for t in (query[q0:q1], key[k0:k1], value[k0:k1]))
        out, lse, _, _ = plain_attention(q, k, v, visible=visible, softmax_scale=scale)
        outs.append(out[0].transpose(0, 1))
        lses.append(lse[0])
    return torch.cat(outs), torch.cat(lses, dim=1)


def assert_right(result: tuple[Tensor, Tensor], tensors: tuple[Tensor, ...], *places: Tensor, **options: Any) -> None:
    oracle = wanted(*[t.double() for t in tensors], *places, **options)
    plain = wanted(*tensors, *places, **options)
    for name, *three in zip(("out", "lse"), result, oracle, plain, strict=True):
        verdict = judge(*three, name=name)
        assert verdict.passed, str(verdict)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=["f32", "bf16", "f64"])
@pytest.mark.parametrize("window", [(-1, -1), (-1, 0), (4, 0), (3, 2), (-1, 1)], ids=str)
def test_windows_and_gradients(window: tuple[int, int], dtype: torch.dtype) -> None:
    *tensors, cu_q, cu_k, max_q, max_k = packed()
    results: list[list[Tensor]] = []
    for kind in (dtype, torch.float64, dtype):
        leaves = [t.to(kind, copy=True).requires_grad_() for t in tensors]
        if results:
            out, lse = wanted(*leaves, cu_q, cu_k, window=window)
        else:
            out, lse = varlen_attn(
                *leaves, cu_q, cu_k, max_q, max_k, window_size=window, return_aux=AuxRequest(lse=True)
            )
        torch.manual_seed(0)
        (out * torch.randn(out.shape).to(kind)).sum().backward()
        results.append([out.detach(), lse.detach(), *(t.grad for t in leaves)])  # type: ignore[misc]
    for name, ours, oracle, plain in zip(("out", "lse", "dq", "dk", "dv"), *results, strict=True):
        unit = torch.full_like(oracle, torch.finfo(dtype).eps) if dtype == torch.float64 else None
        verdict = judge(ours, oracle, plain, name=name, unit=unit)
        assert verdict.passed, str(verdict)


def test_grouped_heads_and_scale() -> None:
    *tensors, cu_q, cu_k, max_q, max_k = packed(kv_heads=2)
    out, lse = varlen_attn(
        *tensors, cu_q, cu_k, max_q, max_k, scale=0.3, enable_gqa=True, return_aux=AuxRequest(lse=True)
    )
    assert_right((out, lse), tuple(tensors), cu_q, cu_k, scale=0.3)
    assert torch.equal(varlen_attn(*tensors, cu_q, cu_k, max_q, max_k, scale=0.3, enable_gqa=True, num_splits=1), out)


@pytest.mark.parametrize("window", [(-1, -1), (-1, 0), (4, 1)], ids=str)
@pytest.mark.parametrize("lengths", [LENGTHS, ((2, 6), (2, 9), (2, 3)), ((1, 300), (1, 7))], ids=["any", "same", "one"])
def test_part_of_the_keys(lengths: tuple[tuple[int, int], ...], window: tuple[int, int]) -> None:
    *tensors, cu_q, cu_k, max_q, max_k = packed(kv_heads=2, lengths=lengths)
    used = [k - b % 2 for b, (_, k) in enumerate(lengths)]
    for b, n in enumerate(used):  # what lies beyond must reach nothing
        for t in tensors[1:]:
            t[int(cu_k[b]) + n : int(cu_k[b + 1])] = float("nan")
    result = varlen_attn(
        *tensors, cu_q, cu_k, max_q, max_k, window_size=window, enable_gqa=True,
        seqused_k=torch.tensor(used, dtype=torch.int32), return_aux=AuxRequest(lse=True),
    )  # fmt: skip
    assert_right(result, tuple(tensors), cu_q, cu_k, used=used, window=window)


@pytest.mark.parametrize("lengths", [LENGTHS, ((1, 30), (1, 7))], ids=["any", "one"])
def test_pages(lengths: tuple[tuple[int, int], ...]) -> None:
    query, key, value, cu_q, cu_k, max_q, max_k = packed(lengths=lengths)
    page_size, per_sequence = 4, -(-max_k // 4)
    table = torch.randperm(len(lengths) * per_sequence).view(len(lengths), per_sequence).int()
    pages = [torch.full((table.numel(), page_size, HEADS, DIM), float("nan")) for _ in range(2)]
    for b, (begin, end) in enumerate(pairwise(cu_k.tolist())):
        for j in range(end - begin):
            for t, place in zip((key, value), pages, strict=True):
                place[table[b, j // page_size], j % page_size] = t[begin + j]
    used = torch.tensor([k for _, k in lengths], dtype=torch.int32)
    given: dict[str, Any] = dict(window_size=(-1, 0), seqused_k=used, block_table=table)
    result = varlen_attn(query, *pages, cu_q, None, max_q, max_k, return_aux=AuxRequest(lse=True), **given)
    assert_right(result, (query, key, value), cu_q, cu_k, window=(-1, 0))
    assert torch.equal(varlen_attn(query, *pages, cu_q, None, max_q, max_k, **given), result[0])


def test_numbers_that_fit_a_batch_but_differ() -> None:
    """batch * max_q == total_q says nothing of the sequences."""
    *tensors, cu_q, cu_k, _, max_k = packed(lengths=((2, 5), (8, 5)))
    used = torch.tensor([3, 4], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"cu_seqlens_q\[2\] - .* is 8; allowed: 0 to 5"):
        varlen_attn(*tensors, cu_q, cu_k, 5, max_k, seqused_k=used)


@pytest.mark.parametrize("slopes", [None, (HEADS,), (5, HEADS)], ids=str)
@pytest.mark.parametrize("lengths", [LENGTHS, LENGTHS[2:3] * 5, LENGTHS[3:4] * 5], ids=["any", "same", "none"])
def test_where_lengths_are_not_read(
    lengths: tuple[tuple[int, int], ...], slopes: tuple[int, ...] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a device, where all are laid in one batch: the same numbers."""
    query, key, value, cu_q, cu_k, max_q, max_k = packed(lengths=lengths)
    table = cu_k[:-1, None] + torch.arange(max_k, dtype=torch.int32)
    alibi = None if slopes is None else torch.rand(slopes)

    def call() -> Any:
        return varlen.packed_over_pages(
            query, key[:, None], value[:, None], cu_q, max_q, table, cu_k.diff(), alibi_slopes=alibi, return_lse=True
        )

    read = call()
    monkeypatch.setattr(varlen, "_starts", lambda *_: None)
    monkeypatch.setattr(varlen, "is_readable", lambda _: False)
    for a, b in zip(call(), read, strict=True):
        assert a.is_contiguous() and a.shape == b.shape
        torch.testing.assert_close(a, b)


def test_a_device_is_read_where_rows_would_be_computed_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(varlen, "is_readable", lambda _: False)
    assert varlen._starts(starts([3, 2, 3]), 3, 8) is None
    assert varlen._starts(starts([30, 1, 1]), 30, 32) == [0, 30, 31, 32]


def test_the_form_of_pytorch_2_10() -> None:
    arguments = packed()
    causal = varlen_attn(*arguments, True, AuxRequest(lse=True))
    for a, b in zip(causal, varlen_attn(*arguments, window_size=(-1, 0), return_aux=AuxRequest(True)), strict=True):
        assert torch.equal(a, b)


def test_signature_of_the_installed_pytorch() -> None:
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    theirs = inspect.signature(varlen.varlen_attn).parameters
    ours = inspect.signature(varlen_attn).parameters
    assert [p for p in theirs if p not in ours] == []
    assert all(ours[name].default == parameter.default for name, parameter in theirs.items())
    assert varlen_attn(*packed(), return_aux=varlen.AuxRequest(lse=True))[1].dtype == torch.float32


def test_compiles_in_one_graph() -> None:
    *tensors, cu_q, cu_k, max_q, max_k = packed()
    used = torch.tensor([k for _, k in LENGTHS], dtype=torch.int32)

    def call(seqused_k: Tensor | None) -> Tensor:
        out = varlen_attn(*tensors, cu_q, cu_k, max_q, max_k, window_size=(-1, 0), seqused_k=seqused_k)
        assert isinstance(out, Tensor)
        return out

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    for given in (None, used):
        torch.testing.assert_close(compiled(given), call(given))


SAME = packed(lengths=((2, 2), (3, 3)))
USED = torch.tensor([2, 3], dtype=torch.int32)
TABLE = torch.zeros(2, 1, dtype=torch.int32)
WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "heads": (dict(key=SAME[1][:, :2], value=SAME[2][:, :2]), ValueError, "key has 2 heads for a query of 4 heads"),
    "groups": (dict(key=SAME[1][:, :3], value=SAME[2][:, :3], enable_gqa=True), ValueError, "allowed: a divisor of 4"),
    "query": (dict(query=SAME[0][None]), ValueError, "query has shape"),
    "key": (dict(key=SAME[1][None]), ValueError, "key has shape"),
    "splits": (dict(num_splits=0), ValueError, "num_splits is 0; allowed: None or an integer >= 1"),
    "no_starts": (dict(cu_seq_k=None), TypeError, "cu_seqlens_k is of type NoneType"),
    "no_starts_used": (dict(cu_seq_k=None, seqused_k=USED), ValueError, "cu_seq_k is None without block_table"),
    "total": (dict(cu_seq_q=torch.tensor([0, 2, 4], dtype=torch.int32)), ValueError, r"cu_seqlens_q\[-1\] is 4"),
    "table": (dict(block_table=TABLE), ValueError, "key has shape"),
    "table_alone": (
        dict(key=SAME[1][None], value=SAME[2][None], block_table=TABLE), ValueError,
        "block_table is given without seqused_k",
    ),
    "used": (dict(seqused_k=USED[:1]), ValueError, r"seqlens_k has shape \(1,\)"),
    "used_too_many": (dict(seqused_k=USED + 1), ValueError, r"seqused_k\[0\] is 3; allowed: 0 to 2"),
    "rows": (dict(seqused_k=USED, cu_seq_q=SAME[3][:2]), ValueError, r"cu_seqlens_k has shape \(3,\); allowed: \(2,\)"),
    "used_max_q": (dict(seqused_k=USED, max_q=2), ValueError, r"cu_seqlens_q\[2\] - .* is 3; allowed: 0 to 2"),
    "used_total": (dict(seqused_k=USED, cu_seq_q=starts([2, 2])), ValueError, r"cu_seqlens_q\[-1\] is 4; allowed: 5"),
    "used_begin": (dict(seqused_k=USED, cu_seq_q=SAME[3] + 1), ValueError, r"cu_seqlens_q\[0\] is 1; allowed: 0"),
    "used_falls": (
        dict(seqused_k=USED, cu_seq_q=starts([6, -1]), max_q=6), ValueError, r"cu_seqlens_q\[2\] - .* is -1",
    ),
    "used_keys_fall": (dict(seqused_k=USED, cu_seq_k=starts([6, -1])), ValueError, r"cu_seqlens_k\[1\] - .* is 6"),
    "used_keys_total": (dict(seqused_k=USED, cu_seq_k=starts([2, 30])), ValueError, r"cu_seqlens_k\[-1\] is 32"),
    "used_list": (dict(seqused_k=[2, 3]), TypeError, "seqlens_k is of type list"),
    "used_int64": (dict(seqused_k=USED, cu_seq_q=SAME[3].long()), TypeError, "cu_seqlens_q is of type torch.int64"),
    "used_max_type": (dict(seqused_k=USED, max_q=3.0), TypeError, "max_seqlen_q is 3.0"),
    "gradient": (dict(seqused_k=USED, query=SAME[0].clone().requires_grad_()), ValueError, "requires grad"),
    "window": (dict(window_size=(-2, 0)), ValueError, "window_size"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments(name: str) -> None:
    changes, error, message = WRONG[name]
    names = ("query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k")
    with pytest.raises(error, match=message):
        varlen_attn(**dict(zip(names, SAME, strict=True)) | changes)
