"""flash-attn's interface: its conventions, against their definition in float64, forward and gradients."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from dropin.flash_oracle import assert_right, attend, options_of
from torch import Tensor

from transformer_fast import attention, ops
from transformer_fast.dropin import varlen
from transformer_fast.flash_attn import (
    flash_attn_func,
    flash_attn_interface,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    paged_varlen,
)
from transformer_fast.spec import Operands

BATCH, HEADS, KV_HEADS, DIM = 2, 4, 2, 24

#: seqlen_q, seqlen_k, and everything that differs from the usual.
CASES: dict[str, dict[str, Any]] = {
    "plain": dict(size=(17, 33)),
    "causal": dict(size=(9, 33), causal=True),
    "causal_rows_that_see_nothing": dict(size=(21, 8), causal=True),
    "window": dict(size=(17, 33), window_size=(5, 2)),
    "window_open_left": dict(size=(17, 29), window_size=(-1, 3)),
    "window_open_right": dict(size=(17, 29), window_size=(4, -1)),
    "window_and_causal": dict(size=(33, 33), window_size=(7, 7), causal=True),
    "alibi": dict(size=(9, 33), alibi=(HEADS,)),
    "alibi_per_entry": dict(size=(33, 20), alibi=(BATCH, HEADS), causal=True),
    "softcap": dict(size=(17, 33), softcap=1.5, softmax_scale=0.7, causal=True),
    "heads_of_their_own": dict(size=(17, 33), kv_heads=HEADS),
    "one_kv_head": dict(size=(17, 33), kv_heads=1, causal=True),
    "wide_heads": dict(size=(9, 17), dim=320, dim_v=320),
    "other_values": dict(size=(9, 17), dim_v=40, causal=True),
    "odd_heads": dict(size=(9, 17), dim=19, dim_v=19),
}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])

Definition = Callable[..., tuple[Tensor, Tensor]]


def draw(case: dict[str, Any], dtype: torch.dtype) -> tuple[list[Tensor], Tensor | None]:
    (seqlen_q, seqlen_k), dim = case["size"], case.get("dim", DIM)
    kv_heads, dim_v = case.get("kv_heads", KV_HEADS), case.get("dim_v", dim)
    shapes = (BATCH, seqlen_q, HEADS, dim), (BATCH, seqlen_k, kv_heads, dim), (BATCH, seqlen_k, kv_heads, dim_v)
    slopes = torch.rand(case["alibi"]) if "alibi" in case else None
    return [torch.randn(shape).to(dtype) for shape in shapes], slopes


def padded(case: dict[str, Any], slopes: Tensor | None, **more: Any) -> Definition:
    """The definition of a padded batch, entry by entry."""

    def call(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        results = []
        for b in range(q.shape[0]):
            own = slopes[b] if slopes is not None and slopes.dim() == 2 else slopes
            rest = {n: x[b] if isinstance(x, Tensor) else x for n, x in more.items()}
            results.append(attend(q[b], k[b], v[b], slopes=own, **options_of(case), **rest)[:2])
        outs, lses = zip(*results, strict=True)
        return torch.stack(outs), torch.stack(lses)

    return call


def packed(case: dict[str, Any], slopes: Tensor | None, lengths: list[tuple[int, int]], **more: Any) -> Definition:
    """The definition of packed sequences, one by one."""

    def call(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        outs, lses, row, key = [], [], 0, 0
        for b, (rows, keys) in enumerate(lengths):
            own = slopes[b] if slopes is not None and slopes.dim() == 2 else slopes
            tensors = q[row : row + rows], k[key : key + keys], v[key : key + keys]
            rest = {n: x[b][..., :rows, :keys] if isinstance(x, Tensor) else x for n, x in more.items()}
            out, lse, _ = attend(*tensors, slopes=own, **options_of(case), **rest)
            outs, lses, row, key = [*outs, out], [*lses, lse], row + rows, key + keys
        return torch.cat(outs), torch.cat(lses, 1)

    return call


def results_of(function: Definition, tensors: list[Tensor], dout: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """out, lse and the gradients of the tensors, in a dtype."""
    leaves = [t.detach().to(dtype).requires_grad_() for t in tensors]
    out, lse = function(*leaves)
    grads = torch.autograd.grad(out, leaves, dout.to(dtype))
    names = [f"grad_{i}" for i in range(len(leaves))]
    return {"out": out, "lse": lse, **dict(zip(names, grads, strict=True))}


def check(ours: Callable[..., Any], definition: Definition, tensors: list[Tensor]) -> None:
    """Ours, out and lse and gradients, by the tolerance rule."""
    with torch.no_grad():
        dout = torch.randn_like(ours(*tensors)[0])
    dtype = tensors[0].dtype
    results = results_of(lambda *t: ours(*t)[:2], tensors, dout, dtype)
    oracle = results_of(definition, tensors, dout, torch.float64)
    assert results["out"].dtype == dtype and results["lse"].dtype == torch.float32
    assert_right(results, oracle, results_of(definition, tensors, dout, dtype))


# ----------------------------------------------------------------------------------------------------- padded batches


@each_dtype
@each_case
def test_padded(case: dict[str, Any], dtype: torch.dtype) -> None:
    tensors, slopes = draw(case, dtype)
    options = options_of(case) | {"alibi_slopes": slopes, "return_attn_probs": True}
    check(lambda q, k, v: flash_attn_func(q, k, v, **options), padded(case, slopes), tensors)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.get("dim_v") == case.get("dim")])
def test_packed_tensors_are_the_same_call(name: str) -> None:
    """Bit for bit, gradients too: they are the same views."""
    case = CASES[name]
    (q, k, v), slopes = draw(case, torch.float32)
    options = options_of(case) | {"alibi_slopes": slopes, "deterministic": True}
    q.requires_grad_()
    kv = torch.stack([k, v], 2).requires_grad_()
    out = flash_attn_kvpacked_func(q, kv, **options)
    expected = flash_attn_func(q, kv[:, :, 0], kv[:, :, 1], **options)
    assert torch.equal(out, expected)
    dout = torch.randn_like(out)
    grads = torch.autograd.grad(out, (q, kv), dout)
    assert all(map(torch.equal, grads, torch.autograd.grad(expected, (q, kv), dout)))

    qkv = torch.randn(BATCH, q.shape[1], 3, HEADS, q.shape[-1], requires_grad=True)
    out, expected = flash_attn_qkvpacked_func(qkv, **options), flash_attn_func(*qkv.unbind(2), **options)
    assert torch.equal(out, expected)
    dout = torch.randn_like(out)
    assert torch.equal(*(torch.autograd.grad(o, qkv, dout)[0] for o in (out, expected)))


def test_defaults_and_results() -> None:
    q, k, v = torch.randn(3, BATCH, 9, HEADS, DIM).unbind(0)
    out, lse, s_dmask = flash_attn_func(q, k, v, return_attn_probs=True)
    assert out.shape == q.shape and out.is_contiguous()
    assert lse.shape == (BATCH, HEADS, 9) and s_dmask.numel() == 0
    assert torch.equal(out, flash_attn_func(q, k, v))
    assert torch.equal(out, attention(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2))


def test_rows_that_see_nothing() -> None:
    q, k = torch.randn(1, 5, 1, 8), torch.randn(1, 2, 1, 8)
    out, lse, _ = flash_attn_func(q, k, k, causal=True, return_attn_probs=True)
    assert torch.equal(out[0, :3], torch.zeros(3, 1, 8)) and bool((lse[0, 0, :3] == float("-inf")).all())
    assert bool(lse[0, 0, 3:].isfinite().all())


def test_keys_and_values_are_views(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is computed from lies where the caller's tensors lie, strides and all."""
    seen: list[Tensor] = []

    def watch(operands: Operands, *rest: Any) -> Any:
        seen.extend(operands[:3])
        return ops.run(operands, *rest)

    monkeypatch.setattr(flash_attn_interface, "run", watch)
    q, kv, qkv = torch.randn(2, 7, 4, 8), torch.randn(2, 9, 2, 4, 8)[:, ::2], torch.randn(2, 7, 3, 4, 8)
    flash_attn_func(q, kv[:, :, 0], kv[:, :, 1])
    flash_attn_kvpacked_func(q, kv)
    flash_attn_qkvpacked_func(qkv)
    bases = [q, kv, kv, q, kv, kv, qkv, qkv, qkv]
    assert [t.untyped_storage().data_ptr() for t in seen] == [t.untyped_storage().data_ptr() for t in bases]
    seen.clear()
    transposed = torch.randn(2, 7, 8, 4).transpose(2, 3)  # the one case that is copied, as flash-attn does
    assert torch.equal(flash_attn_func(q, transposed, transposed), flash_attn_func(q, *[transposed.contiguous()] * 2))


def test_numbers_in_tensors() -> None:
    """Windows and lengths as tensors of integers, which flash-attn's own tests and transformers hand over."""
    q, k, v = torch.randn(3, 1, 9, 2, 8).unbind(0)
    expected = flash_attn_func(q, k, v, window_size=(3, 1))
    for window in (torch.tensor([3, 1]), [3, 1], (torch.tensor(3), 1)):
        assert torch.equal(flash_attn_func(q, k, v, window_size=window), expected)
    cu = torch.tensor([0, 9], dtype=torch.int32)
    longest = cu.diff().max()
    assert torch.equal(
        flash_attn_varlen_func(q[0], k[0], v[0], cu, cu, longest, longest, window_size=torch.tensor([3, 1])),
        flash_attn_varlen_func(q[0], k[0], v[0], cu, cu, 9, 9, window_size=(3, 1)),
    )


@pytest.mark.parametrize("softcap", [0.0, 0, -1.0, None])
def test_softcap_off(softcap: Any) -> None:
    q = torch.randn(1, 5, 2, 8)
    assert torch.equal(flash_attn_func(q, q, q, softcap=softcap, dropout_p=0.0), flash_attn_func(q, q, q))


def test_compiles_in_one_graph() -> None:
    q, k, v = torch.randn(3, 1, 9, 2, 8).unbind(0)

    def model(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return flash_attn_func(q, k, v, causal=True, window_size=(3, 0), softcap=2.0)

    torch._dynamo.reset()
    out = torch.compile(model, backend="eager", fullgraph=True)(q, k, v)
    torch._dynamo.reset()
    assert torch.equal(out, model(q, k, v))  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------------------- packed sequences

LENGTHS = [(17, 33), (0, 5), (1, 20), (9, 9), (4, 0)]
VARLEN_CASES = {
    "plain": dict(),
    "causal": dict(causal=True),
    "window": dict(window_size=(5, 2)),
    "alibi": dict(alibi=(HEADS,), causal=True),
    "alibi_per_entry": dict(alibi=(len(LENGTHS), HEADS)),
    "softcap": dict(softcap=1.5, softmax_scale=0.7),
    "other_values": dict(dim_v=40, causal=True),
}
each_varlen_case = pytest.mark.parametrize("case", VARLEN_CASES.values(), ids=VARLEN_CASES)


def cu_seqlens(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)


def lengths_of(lengths: list[tuple[int, int]]) -> tuple[Tensor, Tensor, int, int]:
    rows, keys = zip(*lengths, strict=True)
    return cu_seqlens(list(rows)), cu_seqlens(list(keys)), max(rows), max(keys)


def draw_packed(case: dict[str, Any], dtype: torch.dtype, kv_heads: int = KV_HEADS) -> tuple[list[Tensor], Any]:
    rows, keys = (sum(side) for side in zip(*LENGTHS, strict=True))
    shapes = (rows, HEADS, DIM), (keys, kv_heads, DIM), (keys, kv_heads, case.get("dim_v", DIM))
    slopes = torch.rand(case["alibi"]) if "alibi" in case else None
    return [torch.randn(shape).to(dtype) for shape in shapes], slopes


@each_dtype
@each_varlen_case
def test_varlen(case: dict[str, Any], dtype: torch.dtype) -> None:
    tensors, slopes = draw_packed(case, dtype)
    options = options_of(case) | {"alibi_slopes": slopes, "return_attn_probs": True}
    lengths = lengths_of(LENGTHS)
    check(lambda q, k, v: flash_attn_varlen_func(q, k, v, *lengths, **options), packed(case, slopes, LENGTHS), tensors)


def test_varlen_results_and_packed_tensors() -> None:
    (q, k, v), _ = draw_packed({}, torch.float32)
    lengths = lengths_of(LENGTHS)
    out, lse, s_dmask = flash_attn_varlen_func(q, k, v, *lengths, causal=True, return_attn_probs=True)
    assert out.shape == q.shape and lse.shape == (HEADS, q.shape[0]) and s_dmask.numel() == 0
    assert torch.equal(out, flash_attn_varlen_func(q, k, v, *lengths, causal=True))
    kv = torch.stack([k, v], 1).requires_grad_()
    packed_out = flash_attn_varlen_kvpacked_func(q, kv, *lengths, causal=True)
    assert torch.equal(out, packed_out)
    assert torch.autograd.grad(packed_out.sum(), kv)[0].shape == kv.shape
    qkv = torch.randn(q.shape[0], 3, HEADS, DIM)
    cu, longest = lengths[0], lengths[2]
    assert torch.equal(
        flash_attn_varlen_qkvpacked_func(qkv, cu, longest, causal=True),
        flash_attn_varlen_func(*qkv.unbind(1), cu, cu, longest, longest, causal=True),
    )


# -------------------------------------------------------------------------------------------------------------- pages


def in_pages(k: Tensor, v: Tensor, keys: list[int], page_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Packed keys laid into pages in a random order, NaN in what no sequence owns."""
    counts = [-(-n // page_size) for n in keys]
    pages = torch.randperm(sum(counts) + 2, dtype=torch.int32)
    table = torch.full((len(keys), max(counts)), 2**30, dtype=torch.int32)
    caches = [torch.full((len(pages), page_size, *t.shape[1:]), float("nan"), dtype=t.dtype) for t in (k, v)]
    page = begin = 0
    for b, (n, count) in enumerate(zip(keys, counts, strict=True)):
        table[b, :count] = pages[page : page + count]
        for j in range(n):
            for cache, t in zip(caches, (k, v), strict=True):
                cache[table[b, j // page_size], j % page_size] = t[begin + j]
        page, begin = page + count, begin + n
    return caches[0], caches[1], table


@pytest.mark.parametrize("page_size", [1, 3, 16])
@each_varlen_case
def test_varlen_paged(case: dict[str, Any], page_size: int) -> None:
    (q, k, v), slopes = draw_packed(case, torch.float32)
    lengths = lengths_of(LENGTHS)
    k_pages, v_pages, table = in_pages(k, v, [keys for _, keys in LENGTHS], page_size)
    out, lse, _ = flash_attn_varlen_func(
        q,
        k_pages,
        v_pages,
        *lengths,
        **options_of(case),
        alibi_slopes=slopes,
        block_table=table,
        return_attn_probs=True,
    )
    definition = packed(case, slopes, LENGTHS)
    oracle, plain = ({"out": o, "lse": e} for o, e in (definition(*(t.to(d) for t in (q, k, v))) for d in DTYPES))
    assert_right({"out": out, "lse": lse}, oracle, plain)


DTYPES = (torch.float64, torch.float32)


def test_varlen_paged_gradients() -> None:
    """With a gradient the keys are gathered; it reaches the pages."""
    (q, k, v), _ = draw_packed({}, torch.float32)
    lengths = lengths_of(LENGTHS)
    k_pages, v_pages, table = (t.nan_to_num(0.0) for t in in_pages(k, v, [keys for _, keys in LENGTHS], 4))
    leaves = [t.requires_grad_() for t in (q, k_pages, v_pages)]
    out = flash_attn_varlen_func(*leaves, *lengths, causal=True, block_table=table)
    grads = torch.autograd.grad(out.sum(), leaves)
    straight = [t.clone().requires_grad_() for t in (q.detach(), k, v)]
    expected_out = flash_attn_varlen_func(*straight, *lengths, causal=True)
    expected = torch.autograd.grad(expected_out.sum(), straight)
    assert torch.equal(out, expected_out) and torch.equal(grads[0], expected[0])
    gathered = paged_varlen.gathered(grads[1], grads[2], lengths[1], table)
    assert torch.equal(gathered[0], expected[1]) and torch.equal(gathered[1], expected[2])
    assert grads[1].count_nonzero() == expected[1].count_nonzero()  # and nowhere else


def test_varlen_paged_computes_no_padded_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """One call a length: a long prefill beside many decoding sequences does not make them long."""
    shapes: list[tuple[int, ...]] = []

    def watch(query: Tensor, *rest: Any, **options: Any) -> Any:
        shapes.append(tuple(query.shape))
        return attention_paged(query, *rest, **options)

    attention_paged = varlen.attention_paged
    monkeypatch.setattr(varlen, "attention_paged", watch)
    lengths = [(30, 40)] + [(1, 20)] * 5
    q, k = torch.randn(35, HEADS, DIM), torch.randn(140, KV_HEADS, DIM)
    k_pages, v_pages, table = in_pages(k, k, [n for _, n in lengths], 8)
    flash_attn_varlen_func(q, k_pages, v_pages, *lengths_of(lengths), block_table=table)
    assert sorted(shapes) == [(1, HEADS, 30, DIM), (5, HEADS, 1, DIM)]


def test_varlen_forward_below_the_function() -> None:
    """What other libraries import from flash-attn's module, with the keys that each sequence uses of its pages."""
    (q, k, v), _ = draw_packed({}, torch.float32)
    cu_seqlens_q, cu_seqlens_k, *longest = lengths_of(LENGTHS)
    k_pages, v_pages, table = in_pages(k, v, [keys for _, keys in LENGTHS], 4)
    nowhere, call = torch.zeros_like(cu_seqlens_k), flash_attn_interface._flash_attn_varlen_forward
    arguments = (q, k_pages, v_pages, cu_seqlens_q, nowhere, *longest, 0.0, None, False)
    given = {
        "window_size_left": 3,
        "window_size_right": 0,
        "block_table": table,
        "seqused_k": cu_seqlens_k.diff().int(),
    }
    out, lse, s_dmask, _ = call(*arguments, **given, num_splits=0)
    options = {"window_size": (3, 0), "return_attn_probs": True}
    expected = flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, *longest, **options)
    torch.testing.assert_close((out, lse), expected[:2])
    assert s_dmask.numel() == 0
    with pytest.raises(RuntimeError, match="num_splits > 1 is not supported: it is 2"):
        call(*arguments, **given, num_splits=2)
    for refused in ({"out": out}, {"zero_tensors": True}, {"block_table": None}):
        with pytest.raises(ValueError, match="is given; allowed: its default"):
            call(*arguments, **given | refused)


# ------------------------------------------------------------------------------------------------------------- dropout


def keep_of(s_dmask: Tensor, seqlen_q: int, seqlen_k: int) -> Tensor:
    return s_dmask[..., :seqlen_q, :seqlen_k] >= 0


@pytest.mark.parametrize("name", ["plain", "causal_rows_that_see_nothing", "window", "alibi_per_entry", "wide_heads"])
@each_dtype
def test_dropout(name: str, dtype: torch.dtype) -> None:
    """S_dmask says which probabilities were dropped: with those the definition gives our outputs and gradients."""
    case, dropout_p = CASES[name], 0.3
    tensors, slopes = draw(case, dtype)
    options = options_of(case) | {"alibi_slopes": slopes, "dropout_p": dropout_p, "return_attn_probs": True}

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Any:
        torch.manual_seed(7)
        return flash_attn_func(q, k, v, **options)

    keep = keep_of(ours(*tensors)[2], *case["size"])
    check(ours, padded(case, slopes, keep=keep, dropout_p=dropout_p), tensors)


def test_dropout_varlen() -> None:
    tensors, _ = draw_packed({}, torch.float32)
    lengths = lengths_of(LENGTHS)

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Any:
        torch.manual_seed(7)
        return flash_attn_varlen_func(q, k, v, *lengths, dropout_p=0.3, causal=True, return_attn_probs=True)

    s_dmask = ours(*tensors)[2]
    assert s_dmask.shape == (len(LENGTHS), HEADS, 128, 128)
    keep = keep_of(s_dmask, 17, 33)
    check(ours, packed(dict(causal=True), None, LENGTHS, keep=keep, dropout_p=0.3), tensors)


@pytest.mark.parametrize(("head_dim", "block"), [(16, 128), (64, 64), (128, 32), (160, 32), (256, 64), (320, 64)])
def test_s_dmask(head_dim: int, block: int) -> None:
    """Each number times exp(largest score of its block and the later ones - lse) is the probability."""
    seqlen_q, seqlen_k, p = 40, 150, 0.25
    q, k, v = torch.randn(1, seqlen_q, 2, head_dim), *torch.randn(2, 1, seqlen_k, 1, head_dim).unbind(0)
    _, lse, s_dmask = flash_attn_func(q, k, v, p, causal=True, return_attn_probs=True)
    assert flash_attn_interface._get_block_size_n(q.device, head_dim, True, True) == block
    assert s_dmask.shape == (1, 2, 128, 256) and s_dmask.dtype == q.dtype
    assert s_dmask[..., seqlen_q:, :].count_nonzero() == 0 and s_dmask[..., seqlen_k:].count_nonzero() == 0
    s_dmask = s_dmask[0, :, :seqlen_q, :seqlen_k]

    def expected(dtype: torch.dtype) -> Tensor:
        scores = attend(q[0].to(dtype), k[0].to(dtype), v[0].to(dtype), causal=True)[2]
        largest = torch.stack([scores[..., begin:].amax(-1) for begin in range(0, seqlen_k, block)], -1)
        return (scores - largest.repeat_interleave(block, -1)[..., :seqlen_k]).exp().nan_to_num(0.0)

    assert_right({"s": s_dmask.abs()}, {"s": expected(torch.float64)}, {"s": expected(torch.float32)})
    visible = expected(torch.float64) > 0
    dropped = (s_dmask < 0)[visible].double().mean()
    sigma = (p * (1 - p) / int(visible.sum())) ** 0.5
    assert abs(float(dropped) - p) < 5 * sigma and not bool((s_dmask < 0)[~visible].any())
    assert bool(lse.isfinite().all())


def test_s_dmask_disturbs_nothing() -> None:
    """The same random numbers are drawn with it and without, and the result is the same."""
    q, k, v = torch.randn(3, 1, 9, 2, 8).unbind(0)
    outcomes = []
    for asked in (False, True):
        torch.manual_seed(3)
        result = flash_attn_func(q, k, v, 0.2, return_attn_probs=asked)
        outcomes.append((result[0] if asked else result, torch.rand(3)))
    assert all(map(torch.equal, *outcomes))


def test_dropout_varlen_paged() -> None:
    (q, k, v), _ = draw_packed({}, torch.float32)
    lengths = lengths_of(LENGTHS)
    k_pages, v_pages, table = in_pages(k, v, [keys for _, keys in LENGTHS], 4)
    torch.manual_seed(3)
    out = flash_attn_varlen_func(q, k_pages, v_pages, *lengths, dropout_p=0.3, block_table=table)
    torch.manual_seed(3)
    assert torch.equal(out, flash_attn_varlen_func(q, k, v, *lengths, dropout_p=0.3))


# -------------------------------------------------------------------------------------------------------------- errors

Q, KV, QKV = torch.zeros(2, 5, 4, 8), torch.zeros(2, 6, 2, 2, 8), torch.zeros(2, 5, 3, 4, 8)
CU = cu_seqlens([2, 3])


@pytest.mark.parametrize(
    ("error", "words", "call"),
    [
        (ValueError, r"dropout_p is 0.1 with softcap=2.0", lambda: flash_attn_func(Q, Q, Q, 0.1, softcap=2.0)),
        (ValueError, r"dropout_p is 1.0; allowed", lambda: flash_attn_func(Q, Q, Q, 1.0)),
        (TypeError, r"k is of type NoneType; allowed", lambda: flash_attn_func(Q, None, Q)),
        (ValueError, r"q has shape \(5, 4, 8\); allowed: \(batch", lambda: flash_attn_func(Q[0], Q, Q)),
        (ValueError, r"kv has shape .*; allowed: \(batch, seqlen, 2,", lambda: flash_attn_kvpacked_func(Q, QKV)),
        (ValueError, r"qkv has shape .*; allowed: \(batch, seqlen, 3,", lambda: flash_attn_qkvpacked_func(KV)),
        (ValueError, r"qkv has shape .*; allowed: \(total, 3,", lambda: flash_attn_varlen_qkvpacked_func(QKV, CU, 3)),
        (ValueError, r"window_size", lambda: flash_attn_func(Q, Q, Q, window_size=(-2, 0))),
        (ValueError, r"window_size", lambda: flash_attn_func(Q, Q, Q, window_size=(1, 2, 3))),
        (TypeError, r"window_size", lambda: flash_attn_func(Q, Q, Q, window_size=4)),
        (TypeError, r"causal", lambda: flash_attn_func(Q, Q, Q, causal=1)),
        (ValueError, r"heads", lambda: flash_attn_func(Q, Q[:, :, :3], Q[:, :, :3])),
        (ValueError, r"q has shape .*; allowed: \(total", lambda: flash_attn_varlen_func(Q, Q, Q, CU, CU, 3, 3)),
        (ValueError, r"cu_seqlens_q\[2\] - ", lambda: flash_attn_varlen_func(*[Q[0]] * 3, CU, CU, 2, 3)),
        (ValueError, r"k has shape .*as block_table", lambda: paged_call(Q[0], CU, CU, pages=Q[0])),
        (ValueError, r"cu_seqlens_q\[-1\] is 5; allowed: 4", lambda: paged_call(Q[0][:4], CU, CU)),
        (ValueError, r"cu_seqlens_k\[0\] is 1; allowed: 0", lambda: paged_call(Q[0], CU, CU + 1)),
        (ValueError, r"cu_seqlens_k\[1\] - .*allowed: 0 to 6", lambda: paged_call(Q[0], CU, cu_seqlens([7, 1]))),
        (ValueError, r"cu_seqlens_k has shape \(2,\)", lambda: paged_call(Q[0], CU, cu_seqlens([4]))),
        (TypeError, r"cu_seqlens_q is of type torch.int64; allowed: an int32", lambda: paged_call(Q[0], CU.long(), CU)),
    ],
)
def test_errors_name_the_argument(error: type[Exception], words: str, call: Callable[[], Any]) -> None:
    with pytest.raises(error, match=words):
        call()


def paged_call(q: Tensor, cu_q: Tensor, cu_k: Tensor, pages: Tensor = torch.zeros(4, 4, 2, 8)) -> Any:  # noqa: B008
    table = torch.zeros(2, 2, dtype=torch.int32)
    return flash_attn_varlen_func(q, pages, pages, cu_q, cu_k, 6, 6, block_table=table)


def table_of(*pages: int) -> Tensor:
    return torch.tensor(pages, dtype=torch.int32).view(2, 2)


@pytest.mark.parametrize("way", ["plain", "gradient", "dropout"])
@pytest.mark.parametrize(
    ("error", "words", "change"),
    [
        (ValueError, r"block_table\[1, 1\] is -1; allowed: 0 to 3", dict(block_table=table_of(0, 1, 2, -1))),
        (ValueError, r"block_table\[0, 0\] is 4; allowed: 0 to 3", dict(block_table=table_of(4, 1, 2, 0))),
        (TypeError, r"block_table has dtype float32", dict(block_table=torch.zeros(2, 2))),
        (TypeError, r"block_table has dtype int64", dict(block_table=torch.zeros(2, 2).long())),
        (ValueError, r"block_table has shape \(4, 2\)", dict(block_table=torch.zeros(4, 2).int())),
        (ValueError, r"block_table has shape \(2,\)", dict(block_table=torch.zeros(2).int())),
        (ValueError, r"seqlens_k\[1\] is 5; allowed: 0 to 4", dict(block_table=torch.zeros(2, 1).int())),
        (ValueError, r"cu_seqlens_k\[0\] is 1; allowed: 0", dict(cu_seqlens_k=CU + 1)),
        (ValueError, r"cu_seqlens_k\[2\] - .* is -1", dict(cu_seqlens_k=torch.tensor([0, 3, 2]).int())),
        (ValueError, r"cu_seqlens_k\[1\] - .*allowed: 0 to 6", dict(cu_seqlens_k=cu_seqlens([7, 1]))),
        (ValueError, r"cu_seqlens_k has shape \(2,\)", dict(cu_seqlens_k=cu_seqlens([4]))),
        (TypeError, r"cu_seqlens_k is of type list", dict(cu_seqlens_k=[0, 1])),
        (TypeError, r"max_seqlen_k is 6.0", dict(max_seqlen_k=6.0)),
        (ValueError, r"v_pages has shape", dict(v=torch.zeros(4, 3, 2, 8))),
        (ValueError, r"alibi_slopes has shape \(3, 4\)", dict(alibi_slopes=torch.rand(3, 4))),
    ],
)  # fmt: skip
def test_errors_of_pages(error: type[Exception], words: str, change: dict[str, Any], way: str) -> None:
    """Whichever way the pages are read."""
    pages = torch.zeros(4, 4, 2, 8)
    call: dict[str, Any] = dict(
        q=Q[0].clone().requires_grad_(way == "gradient"), k=pages, v=pages, cu_seqlens_q=CU,
        cu_seqlens_k=cu_seqlens([2, 5]), max_seqlen_q=6, max_seqlen_k=6, dropout_p=0.1 if way == "dropout" else 0.0,
        block_table=torch.zeros(2, 2, dtype=torch.int32),
    )  # fmt: skip
    flash_attn_varlen_func(**call)
    with pytest.raises(error, match=words):
        flash_attn_varlen_func(**call | change)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "f32"])
def test_varlen_paged_under_autocast(dtype: torch.dtype) -> None:
    """The queries take the pages' dtype."""
    pages, table = torch.randn(4, 4, 2, 8).to(dtype), torch.tensor([[0, 1], [2, 3]], dtype=torch.int32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = flash_attn_varlen_func(torch.randn(5, 4, 8), pages, pages, CU, CU, 3, 3, block_table=table)
    assert out.dtype == dtype


_COMMON = "dropout_p=0.0 softmax_scale=None causal=False window_size=(-1,-1) softcap=0.0 alibi_slopes=None"
_COMMON += " deterministic=False return_attn_probs=False"
_LENGTHS = "cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k"
SIGNATURES = {
    "flash_attn_func": f"q k v {_COMMON}",
    "flash_attn_kvpacked_func": f"q kv {_COMMON}",
    "flash_attn_qkvpacked_func": f"qkv {_COMMON}",
    "flash_attn_varlen_func": f"q k v {_LENGTHS} {_COMMON} block_table=None",
    "flash_attn_varlen_kvpacked_func": f"q kv {_LENGTHS} {_COMMON}",
    "flash_attn_varlen_qkvpacked_func": f"qkv cu_seqlens max_seqlen {_COMMON}",
    "flash_attn_with_kvcache": "q k_cache v_cache k=None v=None rotary_cos=None rotary_sin=None cache_seqlens=None "
    "cache_batch_idx=None cache_leftpad=None block_table=None softmax_scale=None causal=False window_size=(-1,-1) "
    "softcap=0.0 rotary_interleaved=True alibi_slopes=None num_splits=0 return_softmax_lse=False",
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures(name: str) -> None:
    """Names, order and defaults are those of flash-attn 2.8, so that positional calls mean the same."""
    parameters = inspect.signature(getattr(flash_attn_interface, name)).parameters.values()
    found = [p.name if p.default is p.empty else f"{p.name}={p.default}".replace(", ", ",") for p in parameters]
    assert " ".join(found) == SIGNATURES[name]
    assert {p.kind for p in parameters} == {inspect.Parameter.POSITIONAL_OR_KEYWORD}


def test_the_output_lies_alike_in_a_compiled_graph() -> None:
    """Contiguous, as flash-attn's, whatever the query's memory."""
    q = torch.randn(2, 4, 7, 16).transpose(1, 2)
    compiled = torch.compile(flash_attn_func, backend="aot_eager")
    outs = flash_attn_func(q, q, q), compiled(q, q, q)
    assert all(out.is_contiguous() for out in outs)
    torch.testing.assert_close(outs[1], outs[0])
