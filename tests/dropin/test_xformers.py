"""xformers' memory_efficient_attention and its mask classes, against masks written from what the names mean.

Where xformers is installed, its own classes are held against the same definitions.
"""

from __future__ import annotations

import importlib
import types
from typing import Any

import pytest
import torch
from dropin.xformers_cases import (
    CASES,
    DENSE,
    DIM,
    FIRST,
    HEADS,
    PAGE,
    TABLE,
    VALUE_DIM,
    K,
    Q,
    assert_same,
    block,
    causal,
    dense_mask,
    drawn,
    everything,
    plain,
)
from torch import Tensor

import transformer_fast.dropin.xformers as xops
from transformer_fast.testing import judge

each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])


@each_dtype
@pytest.mark.parametrize("name", CASES)
def test_sequences_in_one_row(name: str, dtype: torch.dtype) -> None:
    case = CASES[name]
    bias, visible = case.make(xops), dense_mask(case)
    tensors = drawn(1, sum(case.rows), case.num_keys)
    assert_same(
        lambda q, k, v: xops.memory_efficient_attention(q, k, v, attn_bias=bias),
        lambda q, k, v: plain(q, k, v, visible=visible)[0],
        tensors,
        dtype,
        gradient=not case.cached,
    )


def test_keys_that_begin_in_a_page() -> None:
    """The other constructor."""
    name = "PagedBlockDiagonalCausalWithOffsetGappyKeysMask"
    bias = getattr(xops, name).from_seqlens(Q, FIRST, K, TABLE, PAGE)
    tensors = drawn(1, sum(Q), CASES[name].num_keys)
    results = [xops.memory_efficient_attention(*tensors, b) for b in (bias, CASES[name].make(xops))]
    assert torch.equal(*results)


@each_dtype
@pytest.mark.parametrize("sizes", [(9, 9), (5, 12), (12, 5)], ids=str)
@pytest.mark.parametrize("name", DENSE)
def test_dense(name: str, sizes: tuple[int, int], dtype: torch.dtype) -> None:
    make, visible = DENSE[name]
    assert_same(
        lambda q, k, v: xops.memory_efficient_attention(q, k, v, make(xops), scale=0.3),
        lambda q, k, v: plain(q, k, v, visible=block(visible, *sizes), scale=0.3)[0],
        drawn(2, *sizes),
        dtype,
    )


@pytest.mark.parametrize("sizes", [(9, 9), (5, 12), (12, 5)], ids=str)
@pytest.mark.parametrize("triangle", [False, True], ids=["tensor", "triangle"])
def test_tensor_bias(triangle: bool, sizes: tuple[int, int]) -> None:
    visible = block(causal if triangle else everything, *sizes)
    assert_same(
        lambda q, k, v, b: xops.memory_efficient_attention(
            q, k, v, xops.LowerTriangularMask().add_bias(b) if triangle else b
        ),
        lambda q, k, v, b: plain(q, k, v, visible=visible, bias=b)[0],
        [*drawn(2, *sizes), torch.randn(2, HEADS, *sizes)],
        torch.float32,
    )


@pytest.mark.parametrize("masked", [False, True])
def test_three_dimensions(masked: bool) -> None:
    q, k, v = (t[:, :, 0] for t in drawn(3, 7, 7))
    bias = torch.randn(3, 7, 7) if masked else None
    out = xops.memory_efficient_attention(q, k, v, bias)
    four = xops.memory_efficient_attention(
        q[:, :, None], k[:, :, None], v[:, :, None], None if bias is None else bias[:, None]
    )
    assert out.shape == (3, 7, VALUE_DIM) and torch.equal(out, four[:, :, 0])


@pytest.mark.parametrize("form", ["expanded", "one", "repeated"])
@pytest.mark.parametrize("masked", ["none", "bias", "packed"])
def test_groups_of_heads(masked: str, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    groups, heads, batch, n = 2, 3, 1 if masked == "packed" else 2, 9
    q = torch.randn(batch, n, groups, heads, DIM)
    k, v = (torch.randn(batch, n, groups, 1, d) for d in (DIM, VALUE_DIM))
    bias = torch.randn(batch, groups, heads, n, n) if masked == "bias" else None
    given = xops.BlockDiagonalCausalMask.from_seqlens([4, 5]) if masked == "packed" else bias
    mask = torch.block_diag(torch.ones(4, 4).tril(), torch.ones(5, 5).tril()).bool()
    seen: list[int] = []
    run, varlen = xops.run, xops.attention_varlen

    def counted_run(operands: Any, *rest: Any) -> Any:
        seen.append(operands.key.shape[2])
        return run(operands, *rest)

    def counted_varlen(q: Tensor, k: Tensor, *rest: Any, **options: Any) -> Any:
        seen.append(k.shape[1])
        return varlen(q, k, *rest, **options)

    monkeypatch.setattr(xops, "run", counted_run)
    monkeypatch.setattr(xops, "attention_varlen", counted_varlen)

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if form == "expanded":
            k, v = (t.expand(-1, -1, -1, heads, -1) for t in (k, v))
        elif form == "repeated":
            k, v = (t.repeat(1, 1, 1, heads, 1) for t in (k, v))
        out = xops.memory_efficient_attention(q, k, v, given)
        assert out.shape == (batch, n, groups, heads, VALUE_DIM)
        return out

    def definition(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = q.flatten(2, 3), k[:, :, :, 0], v[:, :, :, 0]
        visible = mask if masked == "packed" else torch.ones(n, n, dtype=torch.bool)
        out, _ = plain(q, k, v, visible=visible, bias=None if bias is None else bias.flatten(1, 2))
        return out.unflatten(2, (groups, heads))

    assert_same(ours, definition, [q, k, v], torch.float32)
    assert seen == [groups * heads if form == "repeated" else groups]


def test_one_head_for_all_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, ...]] = []
    run = xops.run

    def counted(operands: Any, *rest: Any) -> Any:
        seen.append(tuple(operands.key.shape))
        return run(operands, *rest)

    monkeypatch.setattr(xops, "run", counted)
    q, k, v = drawn(2, 6, 6)
    k, v = (t[:, :, :1] for t in (k, v))
    out = xops.memory_efficient_attention(q, k.expand(-1, -1, HEADS, -1), v.expand(-1, -1, HEADS, -1))
    assert seen == [(2, 6, 1, DIM)]
    copied = (t.repeat(1, 1, HEADS, 1) for t in (k, v))
    torch.testing.assert_close(out, xops.memory_efficient_attention(q, *copied))


@pytest.mark.parametrize("name", ["none", "LowerTriangularMask"])
def test_lse(name: str) -> None:
    make, visible = DENSE[name]
    tensors = drawn(2, 5, 9)
    results = xops.memory_efficient_attention_forward_requires_grad(*tensors, make(xops))
    oracle, peer = (
        plain(*[t.to(d) for t in tensors], visible=block(visible, 5, 9)) for d in (torch.float64, torch.float32)
    )
    for three in zip(results, oracle, peer, strict=True):
        assert judge(*three).passed


@pytest.mark.parametrize("name", [
    "BlockDiagonalMask", "BlockDiagonalCausalMask_fewer_keys", "make_paged",
    "BlockDiagonalCausalLocalAttentionMask_rows_without_keys",
])  # fmt: skip
def test_lse_of_sequences_in_one_row(name: str) -> None:
    case = CASES[name]
    tensors = drawn(1, sum(case.rows), case.num_keys)
    results = xops.memory_efficient_attention_forward_requires_grad(*tensors, case.make(xops))
    oracle, peer = (
        plain(*[t.to(d) for t in tensors], visible=dense_mask(case)) for d in (torch.float64, torch.float32)
    )
    for three in zip(results, oracle, peer, strict=True):
        assert judge(*three).passed


def test_lse_of_groups() -> None:
    q = torch.randn(2, 5, 2, 3, DIM)
    _, lse = xops.memory_efficient_attention_forward_requires_grad(q, q, q)
    assert lse.shape == (2, 2, 3, 5)


def test_forward_only() -> None:
    q, k, v = (t.requires_grad_() for t in drawn(2, 5, 9))
    out = xops.memory_efficient_attention_forward(q, k, v, output_dtype=torch.float64)
    assert out.dtype == torch.float64 and not out.requires_grad
    torch.testing.assert_close(out.float(), xops.memory_efficient_attention(q, k, v))


def test_a_window_of_a_query_s_own_key() -> None:
    q, k, v = drawn(1, 7, 4)
    bias = xops.BlockDiagonalMask.from_seqlens([7], [4]).make_local_attention(1)
    out, lse = xops.memory_efficient_attention_forward_requires_grad(q, k, v, bias)
    torch.testing.assert_close(out[:, :4], v)
    assert not out[:, 4:].any() and (lse[:, :, 4:] == float("-inf")).all() and lse[:, :, :4].isfinite().all()


def test_what_a_cache_holds_beside_its_keys_reaches_nothing() -> None:
    for case in CASES.values():
        if not case.cached:
            continue
        q, k, v = drawn(1, sum(case.rows), case.num_keys)
        out = xops.memory_efficient_attention(q, k, v, case.make(xops))
        unused = sorted(set(range(case.num_keys)) - {j for keys in case.keys for j in keys})
        k[:, unused], v[:, unused] = float("nan"), float("inf")
        assert torch.equal(xops.memory_efficient_attention(q, k, v, case.make(xops)), out)


def test_dropout() -> None:
    q, k = torch.randn(1, 300, 1, 64), torch.randn(1, 64, 1, 64)
    value = torch.eye(64)[None, :, None]
    whole = xops.memory_efficient_attention(q, k, value)
    dropped = xops.memory_efficient_attention(q, k, value, p=0.25)
    kept = dropped != 0
    torch.testing.assert_close(dropped[kept], (whole / 0.75)[kept])
    assert abs(1 - kept.float().mean() - 0.25) < 0.02  # 19,200 draws: over six standard deviations


def test_tensor_lists() -> None:
    tensors = [torch.randn(2, 3, HEADS, DIM), torch.randn(1, 6, HEADS, DIM)]
    bias, row = xops.fmha.BlockDiagonalMask.from_tensor_list(tensors)
    assert row.shape == (1, 12, HEADS, DIM) and bias.q_seqinfo.seqstart_py == [0, 3, 6, 12]
    for result, x in zip(bias.split(xops.memory_efficient_attention(row, row, row, bias)), tensors, strict=True):
        torch.testing.assert_close(result, xops.memory_efficient_attention(x, x, x))
    bias, q, k, v = xops.BlockDiagonalMask.from_tensor_lists_qkv(tensors, [t[:, 1:] for t in tensors], None)
    assert v is None and [tuple(t.shape[:2]) for t in bias.split_kv(k)] == [(2, 2), (1, 5)]
    assert [tuple(t.shape) for t in bias.split_queries(q)] == [tuple(t.shape) for t in tensors]
    with pytest.raises(ValueError, match="split_queries or split_kv"):
        bias.split(q)


@pytest.mark.parametrize("name", CASES)
def test_masks_move_to_devices(name: str) -> None:
    bias = CASES[name].make(xops).to("meta")
    tensors = [bias.q_seqinfo.seqstart, bias.k_seqinfo.seqstart]
    tensors += [getattr(bias.k_seqinfo, "seqlen", tensors[0]), getattr(bias, "block_tables", tensors[0])]
    assert {t.device.type for t in tensors} == {"meta"} and type(bias) is type(CASES[name].make(xops))


@pytest.mark.parametrize("name", ["LowerTriangularMask", "BlockDiagonalCausalMask", "make_paged"])
def test_compiles_in_one_graph(name: str) -> None:
    case = CASES.get(name)
    bias = case.make(xops) if case else DENSE[name][0](xops)
    tensors = drawn(1, 18, case.num_keys if case else 9)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return xops.memory_efficient_attention(q, k, v, bias)

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*tensors), call(*tensors))


# ------------------------------------------------------------------------------------------- the classes of xformers


@pytest.fixture(scope="module")
def theirs() -> types.ModuleType:
    pytest.importorskip("xformers")
    return importlib.import_module("xformers.ops.fmha.attn_bias")


def test_xformers_own_classes(theirs: types.ModuleType) -> None:
    for name, case in CASES.items():
        bias, visible = case.make(theirs), dense_mask(case)
        if not name.startswith("PagedBlockDiagonal") or "Gappy" not in name:  # those are not told their total length
            theirs_visible = bias.materialize((visible.shape[0], case.room or visible.shape[1])).exp().bool()
            assert torch.equal(theirs_visible[..., : visible.shape[1]], visible), name
        tensors = drawn(1, sum(case.rows), case.num_keys)
        ours = xops.memory_efficient_attention(*tensors, case.make(xops))
        assert torch.equal(xops.memory_efficient_attention(*tensors, bias), ours), name


def test_xformers_own_dense_classes(theirs: types.ModuleType) -> None:
    for name, (make, visible) in DENSE.items():
        for sizes in ((9, 9), (5, 12), (12, 5)):
            bias, tensors = make(theirs), drawn(2, *sizes)
            assert bias is None or torch.equal(bias.materialize(sizes).exp().bool(), block(visible, *sizes)), name
            ours = xops.memory_efficient_attention(*tensors, make(xops))
            assert torch.equal(xops.memory_efficient_attention(*tensors, bias), ours), name
