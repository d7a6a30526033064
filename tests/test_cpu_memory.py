"""The memory of the CPU back end: what a call takes, what it must never touch, and views."""

from __future__ import annotations

import ctypes
import json
import math
import mmap
from typing import Any

import pytest
import torch
from cpu_targets import VARIABLE, each_cpu_target, each_dtype, each_isa, run_program
from torch import Tensor

from transformer_fast import attention, attention_varlen, ops
from transformer_fast.testing import Target

# ---------------------------------------------------------------------------------------------------------- memory

PEAK_MEMORY = """
import json, resource, torch, transformer_fast
torch.set_num_threads(2)

def step(n, backward, **options):
    q = torch.randn(1, 1, n, 16, requires_grad=backward)
    k, v = (torch.randn(1, 1, n, 16, requires_grad=backward) for _ in range(2))
    out = transformer_fast.attention(q, k, v, backend="cpu", **options)
    if backward:
        out.sum().backward()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

grown = {}
before = step(300, True, causal=True)  # everything is loaded and warm
grown["full backward", 8192] = step(8192, True)
grown["full", 16384] = step(16384, False)
n = 32768
grown["window", n] = step(n, True, window_size=(64, 0), causal=True)
grown["lengths", n] = step(n, True, seqlens_k=torch.tensor([100], dtype=torch.int32))
grown["bias of keys", n] = step(n, True, window_size=(64, 0), bias=torch.randn(n, requires_grad=True))
grown["padding", n] = step(n, True, window_size=(64, 0), key_padding_mask=torch.rand(1, n) < 0.5)
print(json.dumps([[name, n, peak - before] for (name, n), peak in grown.items()]))
"""


def test_no_memory_for_the_score_matrix() -> None:
    """Peak memory grows by less than a sixteenth of what the float32 scores alone would take.

    A peak never falls, so the steps come in the order of what they allow.
    """
    for name, n, grown in json.loads(run_program(PEAK_MEMORY).stdout):
        assert grown < n * n * 4 / 16, name


def test_the_memory_of_shapes_seen_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server with ever new lengths keeps a plan for each, but not without end; and forgotten ones come back."""
    monkeypatch.setattr(ops, "_runners", {})
    monkeypatch.setattr(ops, "_MAX_RUNNERS", 5)
    query = torch.randn(1, 1, 40, 8)
    wanted = attention(query, query[:, :, :3], query[:, :, :3])
    for keys in range(1, 30):
        attention(query, query[:, :, :keys], query[:, :, :keys])
        assert len(ops._runners) <= 5
    assert torch.equal(attention(query, query[:, :, :3], query[:, :, :3]), wanted)


# ------------------------------------------------------------------------------------------------------ guard pages

GUARDED = """
import ctypes, mmap, sys
import torch
import transformer_fast
from transformer_fast.backends.cpu import force_isa
from transformer_fast.testing import Case, make_problem

libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
PAGE = mmap.PAGESIZE
at_end = True
guarded_count = 0


def guarded_memory(count, dtype):
    # A region between two pages that may not be touched; the data begins at one of them or ends at the other.
    global guarded_count
    guarded_count += 1
    if count == 0:
        return torch.zeros(0, dtype=dtype)
    size = count * dtype.itemsize
    pages = -(-size // PAGE)
    protection, flags = mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    whole = libc.mmap(None, (pages + 2) * PAGE, protection, flags, -1, 0)
    assert whole not in (None, ctypes.c_void_p(-1).value)
    for edge in (whole, whole + (pages + 1) * PAGE):
        assert libc.mprotect(edge, PAGE, 0) == 0
    start = whole + PAGE + (pages * PAGE - size if at_end else 0)
    return torch.frombuffer((ctypes.c_char * size).from_address(start), dtype=dtype)


def guarded_strided(shape, stride, dtype):
    span = 0 if 0 in shape else 1 + sum((n - 1) * s for n, s in zip(shape, stride))
    return guarded_memory(span, dtype).as_strided(shape, stride)


def guarded(tensor):
    copy = guarded_strided(tensor.shape, tensor.stride(), tensor.dtype)
    return copy.copy_(tensor)
"""

GUARDED_RUN = (
    GUARDED
    + """
class GuardedTorch:
    # torch as the back end sees it: what it allocates (out, lse, statistics, gradients) is guarded too.
    def __getattr__(self, name):
        return getattr(torch, name)

    def empty(self, *shape, dtype=torch.float32, device="cpu"):
        return self.empty_like(torch.empty(*shape, dtype=dtype))

    def empty_like(self, tensor):
        like = torch.empty_like(tensor)
        return like if like.is_meta else guarded_strided(like.shape, like.stride(), like.dtype)

    def empty_strided(self, shape, stride, dtype=torch.float32, device="cpu"):
        return self.empty_like(torch.empty_strided(shape, stride, dtype=dtype, device=device))


transformer_fast.backends.cpu.torch = GuardedTorch()
small = dict(batch=2, num_heads=4, num_kv_heads=2)
several = dict(alibi="batch_heads", softcap=2.0, sinks="finite", dropout_p=0.2)
lengths = dict(seqlens_q=(3, 0, 40), seqlens_k=(5, 2, 71))
cases = [
    Case("guard", "full", **small, seqlen_q=17, seqlen_k=33, head_dim=17),
    Case("guard", "causal", **small, seqlen_q=65, seqlen_k=97, head_dim=63, causal=True, lse_gradient=True),
    Case("guard", "even", **small, seqlen_q=64, seqlen_k=96, head_dim=64),
    Case("guard", "one", batch=1, num_heads=1, seqlen_q=1, seqlen_k=1, head_dim=1),
    Case("guard", "narrow", **small, seqlen_q=20, seqlen_k=5, head_dim=1, head_dim_v=3),
    Case("guard", "wide", **small, seqlen_q=9, seqlen_k=31, head_dim=129, head_dim_v=80, window_size=(4, 2)),
    Case("guard", "heads_last", **small, seqlen_q=19, seqlen_k=19, head_dim=40, layout="heads_last", dout="heads_last"),
    Case("guard", "decode", **small, seqlen_q=1, seqlen_k=301, head_dim=63, causal=True),
    Case("guard", "decode_even", **small, seqlen_q=2, seqlen_k=77, head_dim=64, seqlens_k=(77, 3), head_dim_v=17),
    Case("guard", "decode_narrow", **small, seqlen_q=1, seqlen_k=7, head_dim=3),
    Case("guard", "bias", **small, seqlen_q=17, seqlen_k=35, bias="float", bias_form="bhqk"),
    Case("guard", "bias_of_keys", **small, seqlen_q=17, seqlen_k=35, bias="float", bias_form="b11k"),
    Case("guard", "bias_of_rows", **small, seqlen_q=17, seqlen_k=35, bias="float", bias_form="bhq1"),
    Case("guard", "mask", **small, seqlen_q=17, seqlen_k=101, bias="bool", bias_form="bhqk"),
    Case("guard", "mask_decode", **small, seqlen_q=1, seqlen_k=101, bias="bool_window", bias_form="qk"),
    Case("guard", "padding", **small, seqlen_q=17, seqlen_k=99, padding="holes"),
    Case("guard", "options", **small, seqlen_q=33, seqlen_k=50, **several),
    Case("guard", "packed", num_heads=4, num_kv_heads=2, **lengths, head_dim=23, causal=True),
    Case("guard", "paged", **small, seqlen_q=19, seqlen_k=60, seqlens_k=(60, 3), page_size=7, head_dim=23, causal=True),
    Case("guard", "paged_decode", **small, seqlen_q=1, seqlen_k=60, seqlens_k=(7, 60), page_size=7, layout="gaps"),
]
for at_end in (True, False):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for case in cases:
            print("at its end" if at_end else "at its beginning", dtype, case.name, flush=True)
            problem = make_problem(case, dtype)
            inputs = {n: guarded(t).requires_grad_(not case.paged) for n, t in problem.inputs.items()}
            if case.paged:
                problem.block_table = guarded(problem.block_table)
            problem.options = {n: guarded(t) if isinstance(t, torch.Tensor) else t for n, t in problem.options.items()}
            dout = guarded(problem.dout)
            out, lse = problem.call(inputs, "cpu")
            outputs, incoming = [out], [dout]
            if problem.dlse is not None:
                outputs, incoming = [out, lse], [dout, guarded(problem.dlse)]
            if not case.paged:
                torch.autograd.grad(outputs, list(inputs.values()), incoming)
            with torch.no_grad():
                problem.call(inputs, "cpu", return_lse=False)
assert guarded_count > 10 * len(cases)
print(transformer_fast.backends()["cpu"].details["isa"], "all done")
"""
)


@each_isa
def test_nothing_is_touched_outside_the_operands(isa: str) -> None:
    """Every operand and every result lies against a page that may not be touched: a stray load or store is a crash.

    Odd sizes, all types, forward, backward and decode. The last line printed before a crash names the case.
    """
    done = run_program(GUARDED_RUN, **{VARIABLE: isa})
    assert done.stdout.splitlines()[-1] == f"{isa} all done"


GUARD_TRIED = (
    GUARDED
    + """
import os, signal
for at_end, outside in ((True, 5), (False, -1)):
    inside = guarded_memory(5, torch.float32)
    print(float(inside.sum()), flush=True)
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGSEGV, signal.SIG_DFL)
        ctypes.c_float.from_address(inside.data_ptr() + 4 * outside).value
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGSEGV, status
"""
)


def test_a_guard_page_does_guard() -> None:
    """One element too far, at either end, is noticed: else the test above could not fail."""
    run_program(GUARD_TRIED)


def test_offsets_beyond_32_bits() -> None:
    """Strides that take the last elements more than 2**31 elements away from the first (address space, not memory)."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
    strides, shape = (2**31 + 64, 2**30 + 32, 2**28, 1), (2, 2, 5, 8)
    count = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # MAP_NORESERVE

    def far_apart(t: Tensor) -> Tensor:
        size = count * t.dtype.itemsize
        start = libc.mmap(None, size, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0)
        if start in (None, ctypes.c_void_p(-1).value):
            pytest.skip("the system lends no such address space")
        regions.append((start, size))
        view = torch.frombuffer((ctypes.c_char * size).from_address(start), dtype=t.dtype).as_strided(shape, strides)
        return view.copy_(t)

    regions: list[tuple[int, int]] = []
    near = [torch.randn(shape).bfloat16() for _ in range(4)]
    far = [far_apart(t) for t in near]

    def results(tensors: list[Tensor]) -> tuple[Tensor, ...]:
        q, k, v, dout = (t.detach().requires_grad_() for t in tensors)
        out = attention(q, k, v, causal=True, backend="cpu")
        decoded = attention(q[:, :, :1], k, v, backend="cpu")
        return (out, decoded, *torch.autograd.grad(out, (q, k, v), dout))

    for ours, wanted in zip(results(far), results(near), strict=True):
        assert torch.equal(ours, wanted)
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    for start, size in regions:
        libc.munmap(start, size)


# --------------------------------------------------------------------------------------------- strides and mutation


@pytest.mark.sanitize
@each_cpu_target
@each_dtype
@pytest.mark.parametrize("rows", [1, 50], ids=["decode", "tiles"])
@pytest.mark.parametrize(
    ("name", "view"),
    [
        ("batch", lambda t: t[:1].expand(3, -1, -1, -1)),
        ("heads", lambda t: t[:, :1].expand(-1, 4, -1, -1)),
        ("sequence", lambda t: t[:, :, :1].expand(-1, -1, t.shape[2], -1)),
        ("everything", lambda t: t[:1, :1, :1].expand(3, 4, t.shape[2], -1)),
        ("every_other_row", lambda t: torch.cat([t, t], 2)[:, :, ::2]),
        ("reversed_dims", lambda t: t.permute(2, 1, 0, 3).contiguous().permute(2, 1, 0, 3)),
        ("inside_a_larger_one", lambda t: torch.nn.functional.pad(t, (3, 2, 1, 1), value=math.nan)[:, :, 1:-1, 3:-2]),
    ],
)
def test_views_are_what_they_show(name: str, view: Any, rows: int, dtype: torch.dtype, target: Target) -> None:
    """Stride 0 in batch and heads, gaps, any order of dimensions: the bits of the contiguous copy, gradients too."""
    tensors = [torch.randn(3, 4, n, 24).to(dtype) for n in (rows, 70, 70)]
    viewed = [view(t) for t in tensors]
    assert any(not t.is_contiguous() for t in viewed)

    def results(given: list[Tensor]) -> tuple[Tensor, ...]:
        leaves = [t.detach().requires_grad_() for t in given]
        out, lse = attention(*leaves, causal=True, window_size=(40, None), return_lse=True, backend="cpu")
        return out, lse, *torch.autograd.grad((out * out).sum() + lse.sum(), leaves)

    with target.forced():
        for ours, wanted in zip(results(viewed), results([t.contiguous() for t in viewed]), strict=True):
            assert torch.equal(ours, wanted), name


def test_key_and_value_are_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel gets the caller's addresses and strides, whatever they are (as long as rows are contiguous)."""
    key, value = torch.randn(2, 2, 40, 3, 24).transpose(2, 3)[..., 4:20]
    query = torch.randn(2, 3, 9, 16)
    seen = []

    class Spy:
        def __init__(self, plan: Any) -> None:
            self.plan = plan

        def forward(self, *arguments: Any) -> Any:
            seen.append(arguments)
            return self.plan.forward(*arguments)

    monkeypatch.setattr(ops, "_runners", {})
    with torch.no_grad():
        attention(query, key, value, backend="cpu")
        (runner,) = ops._runners.values()
        runner.plan = Spy(runner.plan)
        attention(query, key, value, backend="cpu")
    assert seen[0][:3] == (query.data_ptr(), key.data_ptr(), value.data_ptr())


@pytest.mark.parametrize(
    "name", ["query", "key", "value", "bias", "sinks", "key_padding_mask", "alibi_slopes", "out", "lse"]
)
def test_what_backward_needs_must_not_be_overwritten(name: str) -> None:
    """Backward computes again from the inputs: an in-place change would give wrong gradients without a word."""
    given = {
        "query": torch.randn(2, 4, 9, 8),
        "key": torch.randn(2, 2, 12, 8),
        "value": torch.randn(2, 2, 12, 8),
        "bias": torch.randn(1, 4, 9, 12),
        "sinks": torch.randn(4),
        "key_padding_mask": torch.rand(2, 12) < 0.8,
        "alibi_slopes": torch.rand(4),
    }
    leaves = {n: t.requires_grad_() for n, t in given.items() if n in ("query", "key", "value", "bias", "sinks")}
    out, lse = attention(**given, return_lse=True, backend="cpu")
    changed = given | {"out": out, "lse": lse}
    loss = out.sum() + lse.sum()
    with torch.no_grad():
        changed[name].zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    assert all(t.grad is None for t in leaves.values())


@pytest.mark.parametrize("name", ["seqlens_k", "cu_seqlens_q", "cu_seqlens_k"])
def test_lengths_must_not_be_overwritten_before_backward(name: str) -> None:
    """A buffer of lengths that is filled anew for the next batch, as in serving and packing code."""
    query = torch.randn(1, 2, 8, 4, requires_grad=True)
    if name == "seqlens_k":
        lengths = torch.tensor([5], dtype=torch.int32)
        out = attention(query, query, query, seqlens_k=lengths, backend="cpu")
    else:
        given = {n: torch.tensor([0, 3, 8], dtype=torch.int32) for n in ("cu_seqlens_q", "cu_seqlens_k")}
        lengths = given[name]
        packed = query[0].transpose(0, 1)
        out = attention_varlen(packed, packed, packed, **given, max_seqlen_q=8, max_seqlen_k=8, backend="cpu")
    lengths[0 if name == "seqlens_k" else 1] = 4
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()
