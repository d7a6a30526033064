"""flash_attn_with_kvcache: what it writes and what it returns, against the definition in float64."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from dropin.flash_oracle import assert_right, attend, options_of, rotate
from torch import Tensor

from transformer_fast import ops
from transformer_fast.flash_attn import flash_attn_with_kvcache, kvcache
from transformer_fast.spec import Operands

BATCH, HEADS, KV_HEADS, DIM, SIZE = 3, 4, 2, 16, 37


@dataclass
class Step:
    """A call, and what its definition needs to know of it."""

    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    lengths: list[int]
    case: dict[str, Any]
    #: entry of the cache or pages of each sequence
    entries: list[int] | Tensor
    leftpad: list[int] = field(default_factory=lambda: [0] * BATCH)
    arguments: dict[str, Any] = field(default_factory=dict)

    def run(self, **more: Any) -> Any:
        return flash_attn_with_kvcache(self.q, self.k_cache, self.v_cache, **self.arguments | more)

    def rows(self, cache: Tensor, b: int) -> Tensor:
        """The logical cache of a sequence, a copy."""
        if isinstance(self.entries, list):
            return cache[self.entries[b]].clone()
        return cache[self.entries[b].long()].flatten(0, 1)


def make_step(case: dict[str, Any], dtype: torch.dtype = torch.float32) -> Step:
    """Random lengths, tables and numbers for a case; keys beyond the lengths and before the padding are NaN."""
    seqlen_q, new, dim_v = case.get("seqlen_q", 1), case.get("new"), case.get("dim_v", DIM)
    page_size = case.get("page_size")
    longest = SIZE - max(new or 0, seqlen_q if "rotary" in case else 0)
    lengths = [0 if new else 1, longest, random.randint(1, longest)]
    arguments: dict[str, Any] = options_of(case)
    shape: tuple[int, ...]
    entries: list[int] | Tensor
    if page_size:
        per_sequence = -(-SIZE // page_size)
        pages = torch.randperm(BATCH * per_sequence + 2, dtype=torch.int32)
        entries = arguments["block_table"] = pages[: BATCH * per_sequence].view(BATCH, per_sequence)
        shape = (len(pages), page_size)
    elif case.get("batch_idx"):
        chosen = torch.randperm(BATCH + 2, dtype=torch.int32)[:BATCH]
        arguments["cache_batch_idx"], entries, shape = chosen, chosen.tolist(), (BATCH + 2, SIZE)
    else:
        entries, shape = list(range(BATCH)), (BATCH + case.get("spare", 0), SIZE)
    caches = [torch.randn(*shape, KV_HEADS, d).to(dtype) for d in (DIM, dim_v)]
    step = Step(torch.randn(BATCH, seqlen_q, HEADS, DIM).to(dtype), *caches, lengths, case, entries)
    if case.get("leftpad"):
        step.leftpad = [0, random.randint(1, lengths[1] - 1), random.randint(0, lengths[2])]
        arguments["cache_leftpad"] = torch.tensor(step.leftpad, dtype=torch.int32)
    arguments["cache_seqlens"] = torch.tensor(lengths, dtype=torch.int32)
    if new:
        arguments |= {n: torch.randn(BATCH, new, KV_HEADS, d).to(dtype) for n, d in (("k", DIM), ("v", dim_v))}
    if "rotary" in case:
        angle = torch.rand(SIZE, case["rotary"] // 2) * 2 * math.pi
        arguments |= {"rotary_cos": angle.cos().to(dtype), "rotary_sin": angle.sin().to(dtype)}
        arguments["rotary_interleaved"] = case.get("interleaved", True)
    if "alibi" in case:
        arguments["alibi_slopes"] = torch.rand(case["alibi"])
    step.arguments = arguments
    return step


def expected(step: Step, dtype: torch.dtype) -> dict[str, Tensor]:
    """out, lse and the keys and values of each sequence after the call, in a dtype; before the call is made."""
    given, case = step.arguments, step.case
    turns = "rotary" in case
    cos, sin = (given[n].to(dtype) if turns else None for n in ("rotary_cos", "rotary_sin"))
    moves = case.get("causal", False) or case.get("window_size", (-1, -1)) != (-1, -1)
    outs, lses, keys, values = [], [], [], []
    for b, length in enumerate(step.lengths):
        q, key, value = step.q[b].to(dtype), *(step.rows(c, b).to(dtype) for c in (step.k_cache, step.v_cache))
        end = length
        if case.get("new"):
            k, v = given["k"][b].to(dtype), given["v"][b].to(dtype)
            end += k.shape[0]
            if turns:
                k = rotate(k, cos, sin, torch.arange(length, end), given["rotary_interleaved"])
                rows = torch.arange(q.shape[0]) if moves else torch.zeros(q.shape[0], dtype=torch.int64)
                q = rotate(q, cos, sin, length + rows, given["rotary_interleaved"])
            key[length:end], value[length:end] = k, v
        slopes = given.get("alibi_slopes")
        slopes = slopes[b] if slopes is not None and slopes.dim() == 2 else slopes
        out, lse, _ = attend(q, key[:end], value[:end], slopes=slopes, start=step.leftpad[b], **options_of(case))
        outs, lses, keys, values = [*outs, out], [*lses, lse], [*keys, key], [*values, value]
    names = ("out", "lse", "keys", "values")
    return dict(zip(names, map(torch.stack, (outs, lses, keys, values)), strict=True))


def check(step: Step) -> None:
    oracle, plain = expected(step, torch.float64), expected(step, step.q.dtype)
    before = [cache.clone() for cache in (step.k_cache, step.v_cache)]
    untouched = {n: t.clone() for n, t in step.arguments.items() if isinstance(t, Tensor)} | {"q": step.q.clone()}
    out, lse = step.run(return_softmax_lse=True)
    assert lse.dtype == torch.float32 and out.is_contiguous() and not out.requires_grad
    after = {"keys": step.k_cache, "values": step.v_cache}
    results = {n: torch.stack([step.rows(cache, b) for b in range(BATCH)]) for n, cache in after.items()}
    assert_right({"out": out, "lse": lse, **results}, oracle, plain)
    assert torch.equal(results["values"].double(), oracle["values"])
    # Nothing else was written: put the new keys back and the caches are what they were.
    new = step.case.get("new", 0)
    for name, old in zip(("keys", "values"), before, strict=True):
        for b, length in enumerate(step.lengths):
            for j in range(length, length + new):
                where = place(step, b, j)
                after[name][where] = old[where]
        assert torch.equal(after[name], old)
    assert all(torch.equal(t, step.q if n == "q" else step.arguments[n]) for n, t in untouched.items())


def place(step: Step, b: int, j: int) -> tuple[int, int]:
    if isinstance(step.entries, list):
        return step.entries[b], j
    page_size = step.case["page_size"]
    return int(step.entries[b, j // page_size]), j % page_size


WHERE = {
    "cache": dict(),
    "larger_cache": dict(spare=2),
    "batch_idx": dict(batch_idx=True),
    "leftpad": dict(leftpad=True),
    "leftpad_batch_idx": dict(leftpad=True, batch_idx=True),
    "pages_of_1": dict(page_size=1),
    "pages_of_7": dict(page_size=7),
    "one_page": dict(page_size=SIZE),
}
WHAT = {
    "decode": dict(),
    "decode_causal": dict(causal=True),
    "several_rows": dict(seqlen_q=5, causal=True),
    "append": dict(new=1, causal=True),
    "append_chunk": dict(seqlen_q=4, new=4, causal=True),
    "append_fewer": dict(seqlen_q=5, new=2, window_size=(9, 1)),
    "rotary": dict(seqlen_q=3, new=3, causal=True, rotary=DIM),
    "rotary_halves": dict(seqlen_q=3, new=3, causal=True, rotary=DIM, interleaved=False),
    "rotary_window": dict(seqlen_q=3, new=2, window_size=(6, -1), rotary=6),
    "rotary_not_causal": dict(seqlen_q=3, new=3, rotary=8, interleaved=False),
    "alibi": dict(seqlen_q=2, new=2, causal=True, alibi=(HEADS,)),
    "alibi_per_entry": dict(seqlen_q=2, alibi=(BATCH, HEADS)),
    "softcap": dict(new=1, softcap=1.5, softmax_scale=0.7),
    "other_values": dict(seqlen_q=3, new=3, causal=True, dim_v=24),
}


@pytest.mark.parametrize("what", WHAT.values(), ids=WHAT)
@pytest.mark.parametrize("where", WHERE.values(), ids=WHERE)
def test_step(where: dict[str, Any], what: dict[str, Any]) -> None:
    check(make_step(where | what))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("where", WHERE.values(), ids=WHERE)
def test_step_in_half_precision(where: dict[str, Any], dtype: torch.dtype) -> None:
    check(make_step(where | WHAT["rotary"], dtype))


def test_steps_are_one_attention() -> None:
    """A prompt in chunks and then tokens one by one give the rows of one call over everything."""
    q, k, v = torch.randn(3, 1, 20, HEADS, DIM).unbind(0)
    caches = [torch.full((1, 24, HEADS, DIM), float("nan")) for _ in range(2)]
    outs, length = [], 0
    for n in (7, 9, 1, 1, 1, 1):
        rows = slice(length, length + n)
        new = {"k": k[:, rows], "v": v[:, rows]}
        outs.append(flash_attn_with_kvcache(q[:, rows], *caches, **new, cache_seqlens=length, causal=True))
        length += n
    oracle, plain = (
        {"out": attend(q[0].to(d), k[0].to(d), v[0].to(d), causal=True)[0]} for d in (torch.float64, torch.float32)
    )
    assert_right({"out": torch.cat(outs, 1)[0]}, oracle, plain)


def test_length_as_an_integer_and_none() -> None:
    step = make_step(dict(seqlen_q=2, causal=True))
    as_tensor = step.run(cache_seqlens=torch.tensor([9] * BATCH, dtype=torch.int32))
    assert torch.equal(step.run(cache_seqlens=9), as_tensor)
    assert torch.equal(step.run(cache_seqlens=None), step.run(cache_seqlens=SIZE))
    for where in ("batch_idx", "leftpad_batch_idx"):
        step = make_step(WHERE[where])
        assert torch.equal(step.run(cache_seqlens=None), step.run(cache_seqlens=SIZE))
    step = make_step(dict(page_size=7))
    assert torch.equal(step.run(cache_seqlens=None), step.run(cache_seqlens=42))


@pytest.mark.parametrize("splits", [0, 1, 5])
def test_splits_change_nothing(splits: int) -> None:
    step = make_step(dict(causal=True))
    assert torch.equal(step.run(num_splits=splits), step.run())


def test_no_gradient_is_recorded() -> None:
    """As in flash-attn; a cache that took part in autograd would keep every step's graph."""
    step = make_step(dict(new=1))
    step.arguments["k"].requires_grad_()
    step.q.requires_grad_()
    assert not step.run().requires_grad and not step.k_cache.requires_grad


@pytest.mark.parametrize("where", ["cache", "pages_of_7", "leftpad_batch_idx"])
def test_under_autocast_the_cache_keeps_its_dtype(where: str) -> None:
    step = make_step(WHERE[where] | WHAT["append"])
    caches = step.k_cache.clone(), step.v_cache.clone()
    expected_out = step.run()
    step.k_cache, step.v_cache = caches
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = step.run()
    assert out.dtype == torch.float32 and torch.equal(out, expected_out)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        halves = {n: step.arguments[n].bfloat16() for n in ("k", "v")}
        assert flash_attn_with_kvcache(step.q.bfloat16(), *caches, **step.arguments | halves).dtype == torch.float32


@pytest.mark.parametrize("where", WHERE.values(), ids=WHERE)
def test_the_cache_is_not_copied(where: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """What the kernels read lies where the cache lies, whichever entries or pages."""
    step, seen = make_step(where), []

    def watch(operands: Operands, *rest: Any) -> Any:
        seen.extend(operands[1:3])
        return ops.run(operands, *rest)

    monkeypatch.setattr(kvcache, "run", watch)
    step.run()
    storages = [c.untyped_storage().data_ptr() for c in (step.k_cache, step.v_cache)]
    assert seen and {t.untyped_storage().data_ptr() for t in seen} == set(storages)


@pytest.mark.parametrize("where", WHERE.values(), ids=WHERE)
def test_what_no_row_sees_may_be_nan(where: dict[str, Any]) -> None:
    step = make_step(where | WHAT["append_chunk"])
    caches = step.k_cache, step.v_cache
    kept = [c.clone() for c in caches]
    out = step.run()
    for cache, old in zip(caches, kept, strict=True):
        cache.fill_(float("nan"))
        for b, length in enumerate(step.lengths):
            for j in range(step.leftpad[b], length):
                cache[place(step, b, j)] = old[place(step, b, j)]
    assert torch.equal(step.run(), out)


# -------------------------------------------------------------------------------------------------------------- errors


def plain_step() -> dict[str, Any]:
    cache = torch.zeros(3, 8, 2, 8)
    new = torch.zeros(2, 3, 2, 8)
    return dict(q=torch.zeros(2, 3, 4, 8), k_cache=cache, v_cache=cache, k=new, v=new, cache_seqlens=ints(1, 2))


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


TABLE, PAGE = torch.zeros(8, 4), torch.zeros(2, 1, dtype=torch.int32)


@pytest.mark.parametrize(
    ("error", "words", "change"),
    [
        (ValueError, r"cache_seqlens puts new keys at 1 to 8; allowed: 0 to 7", dict(cache_seqlens=ints(1, 6))),
        (ValueError, r"cache_seqlens puts new keys at -1 to 4", dict(cache_seqlens=ints(-1, 2))),
        (ValueError, r"cache_seqlens has shape \(3,\); allowed: \(2,\)", dict(cache_seqlens=ints(1, 1, 1))),
        (TypeError, r"cache_seqlens is of type torch.int64", dict(cache_seqlens=torch.tensor([1, 2]))),
        (TypeError, r"cache_seqlens is of type bool", dict(cache_seqlens=True)),
        (ValueError, r"cache_seqlens is None with new", dict(cache_seqlens=None)),
        (ValueError, r"k is given alone", dict(v=None)),
        (ValueError, r"v is given alone", dict(k=None)),
        (ValueError, r"k has shape \(1, 3, 2, 8\); allowed: \(2, seqlen_new, 2, 8\)", dict(k=torch.zeros(1, 3, 2, 8))),
        (ValueError, r"k has shape \(2, 3, 1, 8\)", dict(k=torch.zeros(2, 3, 1, 8))),
        (ValueError, r"v has seqlen 1; allowed: 3", dict(v=torch.zeros(2, 1, 2, 8))),
        (TypeError, r"v has dtype torch.float16; allowed: torch.float32", dict(v=torch.zeros(2, 3, 2, 8).half())),
        (ValueError, r"rotary_cos is given alone", dict(rotary_cos=TABLE)),
        (ValueError, r"rotary_sin is given alone", dict(rotary_sin=TABLE)),
        (ValueError, r"rotary_cos is given without k", dict(k=None, v=None, rotary_cos=TABLE, rotary_sin=TABLE)),
        (ValueError, r"cos has shape \(8, 5\)", dict(rotary_cos=torch.zeros(8, 5), rotary_sin=torch.zeros(8, 5))),
        (ValueError, r"positions are 1 to 2; allowed: 0 to 1", dict(rotary_cos=TABLE[:2], rotary_sin=TABLE[:2])),
        (ValueError, r"cache_batch_idx is given with block_table", dict(cache_batch_idx=ints(0, 1), block_table=PAGE)),
        (ValueError, r"cache_leftpad is given with block_table", dict(cache_leftpad=ints(0, 1), block_table=PAGE)),
        (TypeError, r"cache_batch_idx is of type torch.int64", dict(cache_batch_idx=torch.tensor([0, 1]))),
        (ValueError, r"cache_leftpad has shape", dict(cache_leftpad=ints(0))),
        (ValueError, r"k_cache has batch 1; allowed: at least 2", dict(k_cache=torch.zeros(1, 8, 2, 8))),
        (ValueError, r"num_splits is -1", dict(num_splits=-1)),
        (ValueError, r"num_splits is True", dict(num_splits=True)),
        (ValueError, r"q has shape \(3, 4, 8\)", dict(q=torch.zeros(3, 4, 8))),
        (ValueError, r"window_size", dict(window_size=(1, -3))),
    ],
)
def test_errors_name_the_argument(error: type[Exception], words: str, change: dict[str, Any]) -> None:
    call = plain_step() | change
    with pytest.raises(error, match=words):
        flash_attn_with_kvcache(**call)


@pytest.mark.parametrize(
    ("words", "change"),
    [
        (r"cache_batch_idx\[1\] is 7; allowed: 0 to 2", dict(cache_batch_idx=ints(0, 7), cache_leftpad=ints(0, 0))),
        (r"leads to 9 keys", dict(cache_batch_idx=ints(0, 1), cache_leftpad=ints(0, 0), cache_seqlens=ints(2, 9))),
        (r"is 9; allowed: 0 to 8", dict(cache_seqlens=ints(2, 9))),
        (r"cache_batch_idx\[1\] is 7; allowed: 0 to 2", dict(cache_batch_idx=ints(0, 7))),
        (r"cache_batch_idx\[0\] is -1; allowed: 0 to 2", dict(cache_batch_idx=ints(-1, 1))),
    ],
)
def test_errors_of_values(words: str, change: dict[str, Any]) -> None:
    call: dict[str, Any] = plain_step() | {"k": None, "v": None} | change
    with pytest.raises(ValueError, match=words):
        flash_attn_with_kvcache(**call)


REFUSED: dict[str, dict[str, Any]] = {
    "new": dict(k=torch.zeros(2, 3, 1, 8)),
    "seqlens": dict(cache_seqlens=ints(1, 6)),
    "alibi_shape": dict(alibi_slopes=torch.rand(3)),
    "alibi_dtype": dict(alibi_slopes=torch.rand(4).double()),
    "head_dim": dict(q=torch.zeros(2, 3, 4, 4)),
    "heads": dict(q=torch.zeros(2, 3, 3, 8)),
    "dtype": dict(q=torch.zeros(2, 3, 4, 8).bfloat16()),
    "window": dict(window_size=(-5, 0)),
    "window_and_rotary": dict(window_size=7, rotary_cos=TABLE, rotary_sin=TABLE),
    "scale": dict(softmax_scale=math.nan),
    "causal": dict(causal=1),
    "softcap": dict(softcap=math.nan),
    "softcap_type": dict(softcap="a"),
    "lse": dict(return_softmax_lse=1),
    "k_list": dict(k=[1]),
    "no_k_cache": dict(k_cache=None),
    "k_cache_dim": dict(k_cache=torch.zeros(8, 2, 8)),
    "shorter_keys": dict(k_cache=torch.zeros(3, 6, 2, 8)),
    "much_shorter_keys": dict(k_cache=torch.zeros(3, 2, 2, 8)),
    "longer_keys": dict(k_cache=torch.zeros(3, 9, 2, 8)),
    "entry_negative": dict(cache_batch_idx=ints(0, -1)),
    "entry_too_high": dict(cache_batch_idx=ints(0, 3)),
    "entry_and_padding": dict(cache_batch_idx=ints(0, -1), cache_leftpad=ints(0, 0)),
    "page_negative": dict(block_table=ints(0, -1).unsqueeze(1)),
    "page_too_high": dict(block_table=ints(0, 3).unsqueeze(1)),
    "page_before": dict(block_table=torch.stack([ints(0, 1), ints(-1, 2)]), cache_seqlens=ints(1, 9)),
    "table_dtype": dict(block_table=torch.zeros(2, 1).long()),
    "table_dim": dict(block_table=ints(0, 1)),
    "table_rows": dict(block_table=ints(0, 1, 2).unsqueeze(1)),
}


@pytest.mark.parametrize("change", REFUSED.values(), ids=REFUSED)
def test_nothing_is_written_after_an_error(change: dict[str, Any]) -> None:
    call = plain_step()
    caches = call["k_cache"], call["v_cache"] = torch.zeros(3, 8, 2, 8), torch.zeros(3, 8, 2, 8)
    call["k"], call["v"] = call["k"] + 1, call["v"] + 1
    call |= change
    with pytest.raises((ValueError, TypeError), match="allowed"):
        flash_attn_with_kvcache(**call)
    assert all(not cache.any() for cache in (*caches, call["k_cache"]) if cache is not None)
