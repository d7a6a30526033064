"""Every wrong argument, as a table: the error names the argument, the value it had, and what is allowed.

A row changes one thing of a call that is right. What needs the data of a tensor (key lengths, packed offsets) is
checked on each back end; everything else is checked before a back end is chosen, for fake tensors too.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import transformer_fast
from transformer_fast import UnsupportedError, attention, attention_varlen, backends, explain, ops
from transformer_fast.backends import cpu as cpu_backend

BATCH, HEADS, KV_HEADS, ROWS, KEYS, DIM, DIM_V = 2, 4, 2, 5, 7, 8, 6
LENGTHS_Q, LENGTHS_K = (2, 3), (3, 4)
BEYOND_FLOAT = 10**400  # an int that no float holds
BEYOND_INT64 = 2**70


def ints(*values: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor(values, dtype=dtype)


def padded_call() -> dict[str, Any]:
    return {
        "query": torch.randn(BATCH, HEADS, ROWS, DIM),
        "key": torch.randn(BATCH, KV_HEADS, KEYS, DIM),
        "value": torch.randn(BATCH, KV_HEADS, KEYS, DIM_V),
    }


def packed_call() -> dict[str, Any]:
    return {
        "query": torch.randn(sum(LENGTHS_Q), HEADS, DIM),
        "key": torch.randn(sum(LENGTHS_K), KV_HEADS, DIM),
        "value": torch.randn(sum(LENGTHS_K), KV_HEADS, DIM_V),
        "cu_seqlens_q": ints(0, 2, 5),
        "cu_seqlens_k": ints(0, 3, 7),
        "max_seqlen_q": max(LENGTHS_Q),
        "max_seqlen_k": max(LENGTHS_K),
    }


class Row(NamedTuple):
    """One wrong argument. `shown` is how the message tells the value; where `value` is a function it is given the
    right value and returns the wrong one.
    """

    argument: str
    value: Any
    error: type[Exception]
    shown: str
    label: str = ""


def last_dim_strided(t: Tensor) -> Tensor:
    """The same values with a stride in the last dimension."""
    return t.transpose(-1, -2).contiguous().transpose(-1, -2)


def with_dim(t: Tensor, dim: int, size: int) -> Tensor:
    shape = list(t.shape)
    shape[dim] = size
    return torch.zeros(shape, dtype=t.dtype)


def on_meta(t: Tensor) -> Tensor:
    return t.to("meta")


def as_list(t: Tensor) -> list[Any]:
    return t.tolist()


def tensor_rows() -> list[Row]:
    """Query, key and value, padded or packed."""
    rows = []
    for name in ("query", "key", "value"):
        rows += [
            Row(name, None, TypeError, "NoneType"),
            Row(name, as_list, TypeError, "list"),
            Row(name, lambda t: t.numpy(), TypeError, "ndarray", "numpy"),
            Row(name, 3.0, TypeError, "float"),
            Row(name, lambda t: t.to(torch.int32), TypeError, "int32", "int32"),
            Row(name, lambda t: t.to(torch.bool), TypeError, "bool", "bool"),
            Row(name, lambda t: t.to(torch.complex64), TypeError, "complex64", "complex64"),
            Row(name, lambda t: t.to_sparse(), ValueError, "torch.sparse_coo", "sparse"),
            Row(name, lambda t: t[0], ValueError, "shape", "one-dimension-less"),
            Row(name, lambda t: t[None], ValueError, "(1, ", "one-dimension-more"),
            Row(name, lambda t: t.flatten()[0], ValueError, "()", "scalar"),
            Row(name, last_dim_strided, ValueError, "strides", "strided-columns"),
            Row(name, lambda t: torch.zeros(*t.shape[:-1], 1).expand(t.shape), ValueError, "0)", "expanded-columns"),
        ]
    rows += [
        Row("key", lambda t: t.double(), TypeError, "float64", "unlike-the-query"),
        Row("value", lambda t: t.bfloat16(), TypeError, "bfloat16", "unlike-the-query"),
        Row("key", on_meta, ValueError, "meta"),
        Row("value", on_meta, ValueError, "meta"),
        Row("query", lambda t: with_dim(t, -1, 0), ValueError, "0", "head_dim-0"),
        Row("key", lambda t: with_dim(t, -1, 0), ValueError, "0", "head_dim-0"),
        Row("value", lambda t: with_dim(t, -1, 0), ValueError, "0", "head_dim-0"),
        Row("key", lambda t: with_dim(t, -1, DIM + 1), ValueError, str(DIM + 1), "head_dim"),
    ]
    return rows


def option_rows() -> list[Row]:
    """What both functions take beside tensors."""
    rows = [
        Row("causal", 1, TypeError, "1"),
        Row("causal", None, TypeError, "None"),
        Row("causal", "yes", TypeError, "'yes'"),
        Row("window_size", 5, TypeError, "5"),
        Row("window_size", "ab", TypeError, "'ab'"),
        Row("window_size", (3,), ValueError, "(3,)"),
        Row("window_size", (1, 2, 3), ValueError, "(1, 2, 3)"),
        Row("window_size", (-2, 0), ValueError, "(-2, 0)"),
        Row("window_size", (0, -2), ValueError, "(0, -2)"),
        Row("window_size", (1.5, 0), TypeError, "1.5"),
        Row("window_size", (0, "1"), TypeError, "'1'"),
        Row("window_size", (True, 0), TypeError, "True"),
        Row("window_size", [0, math.inf], TypeError, "inf"),
        Row("softmax_scale", "1", TypeError, "'1'"),
        Row("softmax_scale", True, TypeError, "True"),
        Row("softmax_scale", 1j, TypeError, "1j"),
        Row("softmax_scale", math.nan, ValueError, "nan"),
        Row("softmax_scale", math.inf, ValueError, "inf"),
        Row("softmax_scale", -math.inf, ValueError, "-inf"),
        Row("softmax_scale", BEYOND_FLOAT, ValueError, "", "beyond-float"),
        Row("softmax_scale", 1e39, ValueError, "1e+39", "beyond-float32"),
        Row("softcap", "1", TypeError, "'1'"),
        Row("softcap", True, TypeError, "True"),
        Row("softcap", 0, ValueError, "0"),
        Row("softcap", 0.0, ValueError, "0.0"),
        Row("softcap", -1.0, ValueError, "-1.0"),
        Row("softcap", math.nan, ValueError, "nan"),
        Row("softcap", math.inf, ValueError, "inf"),
        Row("softcap", BEYOND_FLOAT, ValueError, "", "beyond-float"),
        Row("softcap", 1e39, ValueError, "1e+39", "beyond-float32"),
        Row("softcap", 1e-46, ValueError, "1e-46", "below-float32"),
        Row("dropout_p", "0.1", TypeError, "'0.1'"),
        Row("dropout_p", None, TypeError, "None"),
        Row("dropout_p", True, TypeError, "True"),
        Row("dropout_p", -0.1, ValueError, "-0.1"),
        Row("dropout_p", 1, ValueError, "1"),
        Row("dropout_p", 1.5, ValueError, "1.5"),
        Row("dropout_p", math.nan, ValueError, "nan"),
        Row("deterministic", 0, TypeError, "0"),
        Row("deterministic", None, TypeError, "None"),
        Row("backend", None, TypeError, "None"),
        Row("backend", ["cpu"], TypeError, "['cpu']"),
        Row("backend", "", ValueError, "''"),
        Row("backend", "gpu", ValueError, "'gpu'"),
        Row("backend", "CPU", ValueError, "'CPU'"),
        Row("return_lse", 1, TypeError, "1"),
        Row("return_lse", None, TypeError, "None"),
        Row("return_lse", "no", TypeError, "'no'"),
    ]  # fmt: skip
    for name, right in (("softmax_scale", 1.0), ("softcap", 1.0), ("dropout_p", 0.1)):
        rows.append(Row(name, torch.tensor(right), TypeError, "Tensor", "a-tensor"))
    return rows


def per_head_rows(one: Callable[..., Tensor] = torch.ones) -> list[Row]:
    """ALiBi slopes and sinks, padded or packed."""
    return [
        Row("alibi_slopes", [0.5] * HEADS, TypeError, "list"),
        Row("alibi_slopes", one(HEADS).double(), TypeError, "float64"),
        Row("alibi_slopes", one(HEADS).bfloat16(), TypeError, "bfloat16"),
        Row("alibi_slopes", one(HEADS + 1), ValueError, f"({HEADS + 1},)"),
        Row("alibi_slopes", one(BATCH + 1, HEADS), ValueError, f"({BATCH + 1}, {HEADS})"),
        Row("alibi_slopes", one(HEADS, BATCH), ValueError, f"({HEADS}, {BATCH})"),
        Row("alibi_slopes", one(()), ValueError, "()", "scalar"),
        Row("alibi_slopes", one(HEADS).to("meta"), ValueError, "meta", "meta"),
        Row("alibi_slopes", one(HEADS).requires_grad_(), ValueError, "requires grad", "requires-grad"),
        Row("sinks", [0.5] * HEADS, TypeError, "list"),
        Row("sinks", one(HEADS).double(), TypeError, "float64"),
        Row("sinks", one(HEADS).int(), TypeError, "int32"),
        Row("sinks", one(KV_HEADS), ValueError, f"({KV_HEADS},)"),
        Row("sinks", one(1), ValueError, "(1,)"),
        Row("sinks", one(BATCH, HEADS), ValueError, f"({BATCH}, {HEADS})"),
        Row("sinks", one(HEADS).to("meta"), ValueError, "meta", "meta"),
        Row("sinks", one(HEADS).to_sparse(), ValueError, "sparse_coo", "sparse"),
    ]


def padded_rows() -> list[Row]:
    """What only attention() takes, and how query, key and value go together there."""
    mask = torch.ones(BATCH, KEYS, dtype=torch.bool)
    return [
        Row("key", lambda t: with_dim(t, 0, BATCH + 1), ValueError, str(BATCH + 1), "batch"),
        Row("key", lambda t: with_dim(t, 1, 3), ValueError, "3", "heads-do-not-divide"),
        Row("key", lambda t: with_dim(t, 1, 2 * HEADS), ValueError, str(2 * HEADS), "more-heads-than-the-query"),
        Row("key", lambda t: with_dim(t, 1, 0), ValueError, "0", "no-heads"),
        Row("query", lambda t: with_dim(t, 1, 0), ValueError, "(2, 0, 5, 8)", "no-heads"),
        Row("value", lambda t: with_dim(t, 0, 1), ValueError, f"(1, {KV_HEADS}, {KEYS}, {DIM_V})", "batch"),
        Row("value", lambda t: with_dim(t, 1, 1), ValueError, f"({BATCH}, 1, {KEYS}, {DIM_V})", "heads"),
        Row("value", lambda t: with_dim(t, 2, 9), ValueError, f"({BATCH}, {KV_HEADS}, 9, {DIM_V})", "seqlen"),
        Row("seqlens_k", [3, 4], TypeError, "list"),
        Row("seqlens_k", 3, TypeError, "int"),
        Row("seqlens_k", ints(3, 4, dtype=torch.int64), TypeError, "int64"),
        Row("seqlens_k", torch.tensor([3.0, 4.0]), TypeError, "float32"),
        Row("seqlens_k", torch.tensor([True, False]), TypeError, "bool"),
        Row("seqlens_k", ints(3, 4, 5), ValueError, "(3,)"),
        Row("seqlens_k", ints(3, 4)[:, None], ValueError, "(2, 1)", "matrix"),
        Row("seqlens_k", ints(3)[0], ValueError, "()", "scalar"),
        Row("seqlens_k", ints(3, 4).to("meta"), ValueError, "meta", "meta"),
        Row("key_padding_mask", mask.tolist(), TypeError, "list"),
        Row("key_padding_mask", mask.float(), TypeError, "float32"),
        Row("key_padding_mask", mask.to(torch.uint8), TypeError, "uint8"),
        Row("key_padding_mask", mask[:1], ValueError, f"(1, {KEYS})"),
        Row("key_padding_mask", mask[:, :-1], ValueError, f"({BATCH}, {KEYS - 1})"),
        Row("key_padding_mask", mask[0], ValueError, f"({KEYS},)"),
        Row("key_padding_mask", mask.T, ValueError, f"({KEYS}, {BATCH})"),
        Row("key_padding_mask", mask[:, None, None], ValueError, f"({BATCH}, 1, 1, {KEYS})"),
        Row("key_padding_mask", mask.to("meta"), ValueError, "meta", "meta"),
        Row("bias", [[0.0] * KEYS], TypeError, "list"),
        Row("bias", 0.0, TypeError, "float"),
        Row("bias", torch.zeros(ROWS, KEYS, dtype=torch.int32), TypeError, "int32"),
        Row("bias", torch.zeros(ROWS, KEYS, dtype=torch.uint8), TypeError, "uint8"),
        Row("bias", torch.zeros(ROWS, KEYS, dtype=torch.float64), TypeError, "float64"),
        Row("bias", torch.zeros(ROWS, KEYS, dtype=torch.bfloat16), TypeError, "bfloat16"),
        Row("bias", torch.zeros(ROWS, KEYS + 1), ValueError, f"{ROWS}, {KEYS + 1})"),
        Row("bias", torch.zeros(ROWS - 1, KEYS), ValueError, f"{ROWS - 1}, {KEYS})"),
        Row("bias", torch.zeros(KV_HEADS, ROWS, KEYS), ValueError, f"{KV_HEADS}, {ROWS}, {KEYS})"),
        Row("bias", torch.zeros(BATCH + 1, 1, 1, KEYS), ValueError, f"({BATCH + 1}, 1, 1, {KEYS})"),
        Row("bias", torch.zeros(1, BATCH, HEADS, ROWS, KEYS), ValueError, f"(1, {BATCH}, {HEADS}, {ROWS}, {KEYS})"),
        Row("bias", torch.zeros(0, 1, ROWS, KEYS), ValueError, f"(0, 1, {ROWS}, {KEYS})"),
        Row("bias", torch.zeros(ROWS, KEYS, device="meta"), ValueError, "meta", "meta"),
        Row("bias", torch.zeros(1, 1, ROWS, KEYS).to_sparse(), ValueError, "sparse_coo", "sparse"),
    ]  # fmt: skip


def packed_rows() -> list[Row]:
    """What only attention_varlen() takes, and how query, key and value go together there."""
    rows = [
        Row("key", lambda t: with_dim(t, 1, 3), ValueError, "3", "heads-do-not-divide"),
        Row("key", lambda t: with_dim(t, 1, 0), ValueError, "0", "no-heads"),
        Row("query", lambda t: with_dim(t, 1, 0), ValueError, "(5, 0, 8)", "no-heads"),
        Row("value", lambda t: with_dim(t, 0, 6), ValueError, f"(6, {KV_HEADS}, {DIM_V})", "total"),
        Row("value", lambda t: with_dim(t, 1, 1), ValueError, f"(7, 1, {DIM_V})", "heads"),
        Row("cu_seqlens_k", ints(0, 3, 5, 7), ValueError, "(4,)", "another-batch"),
    ]  # fmt: skip
    for name in ("cu_seqlens_q", "cu_seqlens_k"):
        rows += [
            Row(name, None, TypeError, "NoneType"),
            Row(name, as_list, TypeError, "list"),
            Row(name, lambda t: t.to(torch.int64), TypeError, "int64", "int64"),
            Row(name, lambda t: t.to(torch.float32), TypeError, "float32", "float32"),
            Row(name, on_meta, ValueError, "meta"),
            Row(name, lambda t: t[:0], ValueError, "(0,)", "empty"),
            Row(name, lambda t: t[None], ValueError, "(1, 3)", "matrix"),
            Row(name, lambda t: t.repeat_interleave(2)[::2], ValueError, "(2,)", "strided"),
        ]
    for name in ("max_seqlen_q", "max_seqlen_k"):
        rows += [
            Row(name, None, TypeError, "None"),
            Row(name, 5.0, TypeError, "5.0"),
            Row(name, "5", TypeError, "'5'"),
            Row(name, True, TypeError, "True"),
            Row(name, ints(5), TypeError, "tensor"),
            Row(name, -1, ValueError, "-1"),
            Row(name, BEYOND_INT64, ValueError, str(BEYOND_INT64)),
        ]
    return rows


def table(rows: list[Row]) -> list[Any]:
    def label(row: Row) -> str:
        what = row.label or getattr(row.value, "__name__", None) or row.shown
        return f"{row.argument}-{what}"

    return [pytest.param(row, id=label(row)) for row in rows]


PADDED = table(tensor_rows() + padded_rows() + per_head_rows() + option_rows())
PACKED = table(tensor_rows() + packed_rows() + per_head_rows() + option_rows())


def with_wrong(call: dict[str, Any], row: Row) -> dict[str, Any]:
    value = row.value(call[row.argument]) if callable(row.value) else row.value
    return call | {row.argument: value}


def assert_helpful(error: pytest.ExceptionInfo[Exception], row: Row) -> None:
    message = str(error.value)
    assert type(error.value) is row.error, f"{type(error.value).__name__}: {message}"
    assert row.argument in message, f"the argument {row.argument!r} is not named: {message}"
    assert row.shown in message, f"the value is not shown as {row.shown!r}: {message}"
    assert "allowed:" in message, f"what is allowed is not said: {message}"


# ----------------------------------------------------------------------------------------------------- the table


@pytest.mark.parametrize("window", [(True, 0), (1.0, 0), (1, False)])
def test_what_equals_a_right_window_is_not_taken_for_it(window: Any) -> None:
    """Options are remembered, and 1 == True."""
    call = padded_call()
    attention(**call | {"window_size": (1, 0)})
    with pytest.raises(TypeError, match="window_size is"):
        attention(**call | {"window_size": window})


@pytest.mark.parametrize("row", PADDED)
def test_attention_rejects(row: Row) -> None:
    """Twice: what was wrong once must not be remembered as right."""
    wrong = with_wrong(padded_call(), row)
    for _ in range(2):
        with pytest.raises(Exception) as error:
            attention(**wrong)
        assert_helpful(error, row)


@pytest.mark.parametrize("row", PACKED)
def test_attention_varlen_rejects(row: Row) -> None:
    wrong = with_wrong(packed_call(), row)
    for _ in range(2):
        with pytest.raises(Exception) as error:
            attention_varlen(**wrong)
        assert_helpful(error, row)


@pytest.mark.parametrize("row", PADDED)
def test_explain_rejects_what_attention_rejects(row: Row) -> None:
    with pytest.raises(Exception) as error:
        explain(**with_wrong(padded_call(), row))
    assert_helpful(error, row)


@pytest.mark.parametrize("row", PACKED)
def test_explain_rejects_what_attention_varlen_rejects(row: Row) -> None:
    with pytest.raises(Exception) as error:
        explain(**with_wrong(packed_call(), row))
    assert_helpful(error, row)


@pytest.mark.parametrize("row", [p for p in PADDED if "sparse" not in p.id])  # there are no fake sparse tensors
def test_fake_tensors_are_checked_too(row: Row) -> None:
    """A compiler finds the mistake while it traces, in the same words."""
    wrong = with_wrong(padded_call(), row)
    mode = FakeTensorMode()
    fake = {k: mode.from_tensor(v) if isinstance(v, Tensor) else v for k, v in wrong.items()}
    with mode, pytest.raises(Exception) as error:
        attention(**fake)
    assert_helpful(error, row)


def test_the_calls_that_the_rows_change_are_right() -> None:
    """Else every row above would pass for the wrong reason."""
    assert attention(**padded_call()).shape == (BATCH, HEADS, ROWS, DIM_V)
    assert attention_varlen(**packed_call()).shape == (sum(LENGTHS_Q), HEADS, DIM_V)
    assert explain(**padded_call()).backend is not None
    assert explain(**packed_call()).backend is not None


def test_arguments_that_look_odd_but_are_right() -> None:
    call = padded_call()
    plain = attention(**call)
    for same in (
        dict(window_size=None),
        dict(window_size=(None, None)),
        dict(window_size=(-1, -1)),
        dict(window_size=[KEYS, KEYS]),
        dict(window_size=(BEYOND_INT64, BEYOND_INT64)),
        dict(softmax_scale=DIM**-0.5),
        dict(dropout_p=0),
        dict(bias=torch.ones(KEYS, dtype=torch.bool)),
        dict(bias=torch.ones((), dtype=torch.bool)),
        dict(seqlens_k=ints(KEYS).expand(BATCH)),
        dict(key_padding_mask=torch.ones(KEYS, BATCH, dtype=torch.bool).T),
    ):
        assert torch.equal(attention(**call, **same), plain), same
    assert attention(**call, softmax_scale=0).isfinite().all()
    assert attention(**call, softmax_scale=1, softcap=3).isfinite().all()
    assert attention(**call, alibi_slopes=torch.ones(HEADS, BATCH).T).isfinite().all()
    query_of_one_column = torch.zeros(BATCH, HEADS, 1, ROWS).transpose(-1, -2)  # its stride is nobody's business
    key = torch.zeros(BATCH, KV_HEADS, KEYS, 1)
    assert attention(query_of_one_column, key, key).isfinite().all()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("largest", [2**31 - 1, 2**40, 2**62, sys.maxsize], ids=["int32", "2**40", "2**62", "int64"])
def test_the_largest_windows_are_no_windows(backend: str, largest: int) -> None:
    """People write "no limit" as sys.maxsize; position + right + 1 must not wrap around."""
    call = padded_call() | {"backend": backend}
    for causal in (False, True):
        wanted = attention(**call, causal=causal)
        for window in ((largest, largest), (largest, None), (None, largest)):
            assert torch.equal(attention(**call, causal=causal, window_size=window), wanted), window


def test_slopes_that_begin_to_require_grad_are_still_rejected() -> None:
    """The checks are remembered by shape; whether a tensor requires grad is not a matter of shape."""
    call, slopes = padded_call(), torch.rand(HEADS)
    attention(**call, alibi_slopes=slopes)
    slopes.requires_grad_()
    with pytest.raises(ValueError, match="alibi_slopes requires grad"):
        attention(**call, alibi_slopes=slopes)
    with torch.no_grad():
        attention(**call, alibi_slopes=slopes)


def test_an_unknown_keyword_is_named() -> None:
    for function, call in ((attention, padded_call()), (attention_varlen, packed_call()), (explain, padded_call())):
        with pytest.raises(TypeError, match="is_causal"):
            function(**call, is_causal=True)


# ------------------------------------------------------------------------------------- what only the data can tell

BY_DATA = [
    pytest.param("seqlens_k", ints(KEYS + 1, 0), "seqlens_k[0]", str(KEYS + 1), id="seqlens_k-beyond"),
    pytest.param("seqlens_k", ints(0, -1), "seqlens_k[1]", "-1", id="seqlens_k-negative"),
    pytest.param("seqlens_k", ints(0, 2**31 - 1), "seqlens_k[1]", str(2**31 - 1), id="seqlens_k-huge"),
    pytest.param("cu_seqlens_q", ints(1, 2, 5), "cu_seqlens_q[0]", "1", id="cu_seqlens_q-start"),
    pytest.param("cu_seqlens_k", ints(-1, 3, 7), "cu_seqlens_k[0]", "-1", id="cu_seqlens_k-start"),
    pytest.param("cu_seqlens_q", ints(0, 3, 4), "cu_seqlens_q[-1]", "4", id="cu_seqlens_q-total-short"),
    pytest.param("cu_seqlens_k", ints(0, 4, 8), "cu_seqlens_k[-1]", "8", id="cu_seqlens_k-total-long"),
    pytest.param("cu_seqlens_q", ints(0, -1, 5), "cu_seqlens_q[1]", "-1", id="cu_seqlens_q-decreasing"),
    pytest.param("cu_seqlens_k", ints(0, 8, 7), "cu_seqlens_k[", "8", id="cu_seqlens_k-decreasing"),
    pytest.param("cu_seqlens_q", ints(0, 4, 5), "cu_seqlens_q[1]", "4", id="cu_seqlens_q-exceeds-max"),
    pytest.param("cu_seqlens_k", ints(0, 2, 7), "cu_seqlens_k[2]", "5", id="cu_seqlens_k-exceeds-max"),
    pytest.param("cu_seqlens_k", ints(0, 3, -(2**31)), "cu_seqlens_k[", "-21474836", id="cu_seqlens_k-wraps"),
]


@pytest.mark.parametrize("backend", ["cpu", "reference", "auto"])
@pytest.mark.parametrize(("argument", "value", "named", "shown"), BY_DATA)
def test_data_out_of_range(argument: str, value: Tensor, named: str, shown: str, backend: str) -> None:
    function, call = (attention, padded_call()) if argument == "seqlens_k" else (attention_varlen, packed_call())
    function(**call, backend=backend)  # the same shapes with right data go first: their checks are remembered
    with pytest.raises(ValueError) as error:
        function(**call | {argument: value}, backend=backend)
    for part in (named, shown, "allowed:"):
        assert part in str(error.value)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(("argument", "value", "named", "shown"), BY_DATA)
def test_data_out_of_range_in_training_and_compiled(
    argument: str, value: Tensor, named: str, shown: str, backend: str
) -> None:
    """By the road of autograd, and by the op that a compiler calls."""
    function, call = (attention, padded_call()) if argument == "seqlens_k" else (attention_varlen, packed_call())
    wrong = call | {argument: value}
    with pytest.raises(ValueError, match="allowed:") as error:
        function(**wrong | {"query": call["query"].requires_grad_()}, backend=backend)
    assert named in str(error.value)
    names = ("query", "key", "value", "cu_seqlens_q", "cu_seqlens_k", "seqlens_k")
    operands = [wrong.get(name) for name in names] + [None] * (len(ops.Operands._fields) - len(names))
    sizes = ops.Options(wrong.get("max_seqlen_q", 0), wrong.get("max_seqlen_k", 0), backend=backend)
    with torch.no_grad(), pytest.raises(ValueError, match="allowed:") as error:
        ops.attention_op(*operands, *sizes)
    assert named in str(error.value)


# ---------------------------------------------------------------------------------------------------- unsupported


def test_a_named_back_end_that_cannot_says_why() -> None:
    call = {name: t.double() for name, t in padded_call().items()}
    with pytest.raises(UnsupportedError, match=r"'cpu'.*float64"):
        attention(**call, backend="cpu")
    packed = {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in packed_call().items()}
    with pytest.raises(UnsupportedError, match=r"'cpu'.*float64"):
        attention_varlen(**packed, backend="cpu")
    assert attention(**call, backend="reference").dtype == torch.float64
    assert attention(**call).dtype == torch.float64


def test_a_named_back_end_that_cannot_says_why_to_a_compiler_too() -> None:
    """No graph with a call in it that will fail when it runs."""
    mode = FakeTensorMode()
    fake = {name: mode.from_tensor(t.double()) for name, t in padded_call().items()}
    with mode, pytest.raises(UnsupportedError, match=r"'cpu'.*float64"):
        attention(**fake, backend="cpu")


def test_a_device_that_a_named_back_end_does_not_know() -> None:
    call = {name: t.to("meta") for name, t in padded_call().items()}
    with pytest.raises(UnsupportedError, match=r"'cpu'.*meta"):
        attention(**call, backend="cpu")


def test_unsupported_is_no_argument_error() -> None:
    """Who catches wrong arguments must not swallow a missing feature, and the other way round."""
    assert issubclass(UnsupportedError, RuntimeError)
    assert not issubclass(UnsupportedError, ValueError | TypeError)


# ------------------------------------------------------------------------------------------- explain and backends


def test_backends_says_what_this_machine_has() -> None:
    found = backends()
    assert set(found) == set(transformer_fast.spec.BACKENDS) - {"auto"}
    for name, info in found.items():
        assert info.name == name
        assert info.available == (info.reason is None)
        assert info.version is not None or not info.available  # what is installed but cannot run has a version too
    assert found["reference"].available
    assert found["reference"].version == torch.__version__
    assert found["cpu"].version == transformer_fast.__version__
    assert found["cpu"].details["isa"] in found["cpu"].details["isas"]


def test_explain_names_the_choice_and_a_reason_for_each_other() -> None:
    call = padded_call()
    found = explain(**call)
    assert found.backend == "cpu"
    assert set(found.reasons) == set(backends()) - {"cpu"}
    assert all(found.reasons.values())
    assert "cpu" in found.reasons["reference"]
    asked = explain(**call, backend="reference")
    assert asked.backend == "reference"
    assert "asked for" in asked.reasons["cpu"]
    wide = explain(**{name: t.double() for name, t in call.items()})
    assert wide.backend == "reference"
    assert "float64" in wide.reasons["cpu"]
    for text in (str(found), str(asked), str(wide)):
        assert all(name in text for name in backends())


def test_explain_of_a_forced_back_end_that_cannot() -> None:
    found = explain(**{name: t.double() for name, t in padded_call().items()}, backend="cpu")
    assert found.backend is None
    assert "float64" in found.path
    assert "float64" in found.reasons["cpu"]
    assert "reference" not in found.reasons or "asked for" in found.reasons["reference"]


def test_explain_names_the_path() -> None:
    """Decoding and instruction sets are visible from outside."""
    key = torch.randn(1, 2, 600, DIM)
    assert "decode" in explain(torch.randn(1, 4, 1, DIM), key, key).path
    assert "decode" not in explain(torch.randn(1, 4, 300, DIM), key, key).path
    for isa in backends()["cpu"].details["isas"]:
        with cpu_backend.force_isa(isa):
            words = explain(torch.randn(1, 4, 1, DIM), key, key).path.replace(",", " ").split()
            assert isa in words


def test_explain_knows_packed_problems() -> None:
    # One row each: how many more still count as decoding depends on the instruction set.
    one = {"query": torch.randn(2, HEADS, DIM), "cu_seqlens_q": ints(0, 1, 2), "max_seqlen_q": 1}
    found = explain(**packed_call() | one, causal=True, dropout_p=0.1)
    assert found.backend == "cpu"
    assert "decode" in found.path
    long = packed_call() | {"max_seqlen_q": 300, "max_seqlen_k": 300}
    assert "decode" not in explain(**long).path


@pytest.mark.parametrize("missing", ["cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"])
def test_explain_wants_a_packed_problem_whole(missing: str) -> None:
    """attention_varlen cannot be called without them, and explain() must not guess."""
    call = packed_call()
    del call[missing]
    with pytest.raises((TypeError, ValueError), match=missing):
        explain(**call)


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("seqlens_k", ints(1, 2)),
        ("key_padding_mask", torch.ones(BATCH, KEYS, dtype=torch.bool)),
        ("bias", torch.zeros(1)),
    ],
)
def test_explain_wants_of_a_packed_problem_what_attention_varlen_takes(argument: str, value: Tensor) -> None:
    """Ignoring it would explain another problem than the one that was meant."""
    with pytest.raises((TypeError, ValueError), match=argument):
        explain(**packed_call(), **{argument: value})


def test_explain_runs_nothing() -> None:
    """Data that would be rejected when it is read is not read."""
    call = padded_call()
    state = torch.get_rng_state()
    assert explain(**call, seqlens_k=ints(100, 100), dropout_p=0.5).backend == "cpu"
    assert torch.equal(state, torch.get_rng_state())


def test_without_the_native_module_the_reason_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Installed without a compiler: "auto" takes the reference, and the name "cpu" raises with the reason."""
    monkeypatch.setattr(cpu_backend, "_C_cpu", None)
    monkeypatch.setattr(cpu_backend, "_WHY_NOT", "built without a compiler")
    monkeypatch.setattr(ops, "_runners", {})
    info = backends()["cpu"]
    assert not info.available
    assert info.reason == "built without a compiler"
    call = padded_call()
    found = explain(**call)
    assert found.backend == "reference"
    assert found.reasons["cpu"] == "built without a compiler"
    assert torch.equal(attention(**call), attention(**call, backend="reference"))
    with pytest.raises(UnsupportedError, match="built without a compiler"):
        attention(**call, backend="cpu")
