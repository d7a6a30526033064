"""The CPU back end as a piece of machinery: instruction sets, threads, memory, and what it must never touch.

What needs a process of its own (environment variables, peak memory, pages that must not be read) runs a small program
in one and reads what it prints.
"""

from __future__ import annotations

import ctypes
import json
import math
import mmap
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from transformer_fast import _C_cpu, attention, attention_varlen, backends, ops
from transformer_fast.backends.cpu import force_isa
from transformer_fast.testing import Case, Target, available_targets, check, make_problem
from transformer_fast.testing.runner import expected, run_target
from transformer_fast.testing.tolerance import Yardstick

ROOT = Path(__file__).resolve().parents[1]
ISAS = _C_cpu.available_isas()
VARIABLE = "TRANSFORMER_FAST_CPU_ISA"
DTYPES = [torch.float32, torch.bfloat16]  # float16 takes the road of float32, conversion apart: conformance has it

each_isa = pytest.mark.parametrize("isa", ISAS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
CPU_TARGETS = [t for t in available_targets() if t.backend == "cpu"]
each_cpu_target = pytest.mark.parametrize("target", CPU_TARGETS, ids=lambda t: t.name)


def run_program(program: str, *, status: int = 0, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a Python program in a process of its own."""
    clean = {k: v for k, v in os.environ.items() if k != VARIABLE}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=clean | environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == status, f"status {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done


@pytest.fixture(autouse=True)
def _threads_are_put_back() -> Any:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


# ------------------------------------------------------------------------------------------------ instruction sets


@each_isa
def test_an_instruction_set_can_be_forced(isa: str) -> None:
    before = _C_cpu.current_isa()
    with force_isa(isa):
        assert _C_cpu.current_isa() == isa
        assert backends()["cpu"].details["isa"] == isa
        with force_isa("portable"):
            assert _C_cpu.current_isa() == "portable"
        assert _C_cpu.current_isa() == isa
    assert _C_cpu.current_isa() == before


def test_a_forced_instruction_set_is_given_back_after_an_error() -> None:
    before = _C_cpu.current_isa()
    with pytest.raises(KeyError), force_isa("portable"):
        raise KeyError
    assert _C_cpu.current_isa() == before


def test_an_unknown_instruction_set_is_an_error_that_names_the_known() -> None:
    before = _C_cpu.current_isa()
    with pytest.raises(ValueError, match="avx1024") as error, force_isa("avx1024"):
        pass
    assert all(isa in str(error.value) for isa in ISAS)
    assert _C_cpu.current_isa() == before


def test_the_portable_one_is_always_there() -> None:
    assert ISAS[-1] == "portable"
    assert len(set(ISAS)) == len(ISAS)


PRINT_ISA = """
import torch, transformer_fast
q = torch.randn(1, 2, 9, 8)
out = transformer_fast.attention(q, q, q, backend="cpu")
assert out.isfinite().all()
print(transformer_fast.backends()["cpu"].details["isa"])
"""


@pytest.mark.parametrize("value", ["portable", ""], ids=["portable", "empty"])
def test_the_environment_variable_chooses(value: str) -> None:
    """An empty value is none: the best that the machine has. (The guard pages below are run with each other name.)"""
    assert run_program(PRINT_ISA, **{VARIABLE: value}).stdout.strip() == (value or ISAS[0])


def test_a_wrong_name_in_the_environment_is_told() -> None:
    """Not ignored, and not only when it is too late: by the call, naming variable, value and what is allowed."""
    done = run_program(PRINT_ISA, status=1, **{VARIABLE: "avx1024"})
    last = done.stderr.strip().splitlines()[-1]
    assert "ValueError" in last
    for part in (VARIABLE, "avx1024", *ISAS):
        assert part in last


def test_objects_of_the_higher_instruction_sets_keep_their_code_to_themselves() -> None:
    """An inline function with a name of its own (a std:: template) compiled for AVX-512 could be the copy that the
    linker keeps for everybody, and crash older machines. So these objects export the names of their namespace only.
    """
    if not shutil.which("nm"):
        pytest.skip("nm is not installed")
    builds = sorted(ROOT.glob("build/temp.*/build.ninja"))
    objects = [
        build.parent / name
        for build in builds
        if "sanitize" not in build.parent.name
        for name in re.findall(r"^build (\S+\.o):", build.read_text(encoding="utf-8"), re.MULTILINE)
    ]
    foreign, looked_at = [], 0
    for path in objects:
        isa = path.name.split(".")[-2]
        if isa not in ("avx2", "avx512", "avx512_bf16") or not path.exists():
            continue
        looked_at += 1
        names = subprocess.run(["nm", "-C", "-g", "--defined-only", path], capture_output=True, text=True, check=True)
        for line in names.stdout.splitlines():
            _, kind, name = line.split(maxsplit=2)
            if f"tf::{isa}::" not in name:
                foreign.append(f"{path.name}: {kind} {name}")
    if not looked_at:
        pytest.skip("the module was not built in this tree")
    assert not foreign


# --------------------------------------------------------------------------------------------------------- threads

SHARED_POOL = """
import json, os, torch

def threads():
    return len(os.listdir("/proc/self/task"))

torch.set_num_threads({threads})
(torch.rand(1 << 20) + 1).sum()  # torch has started what it needs
torch.rand(300, 300) @ torch.rand(300, 300)
torch.rand(4, requires_grad=True).sum().backward()
before = threads()
import transformer_fast
q = torch.randn(2, 8, 300, 32, requires_grad=True)
counts = []
for _ in range(3):
    transformer_fast.attention(q, q, q, causal=True, backend="cpu").sum().backward()
    transformer_fast.attention(q[:, :, :1], q, q, backend="cpu")
    (torch.rand(1 << 20) + 1).sum()
    counts.append(threads())
with open("/proc/self/maps") as maps:
    openmp = sorted({{line.split()[-1] for line in maps if "libgomp" in line or "libiomp" in line or "libomp" in line}})
print(json.dumps({{"before": before, "counts": counts, "openmp": openmp}}))
"""


@pytest.mark.parametrize(
    ("threads", "first"), [(1, ""), (2, "import transformer_fast\n")], ids=["1-torch-first", "2-package-first"]
)
def test_one_thread_pool_is_shared_with_torch(threads: int, first: str) -> None:
    """One libgomp in the process, whoever is imported first, and no thread beside those that torch has started."""
    found = json.loads(run_program(first + SHARED_POOL.format(threads=threads)).stdout)
    assert len(found["openmp"]) == 1, found["openmp"]
    assert Path(found["openmp"][0]).name == "libgomp.so.1"
    assert set(found["counts"]) == {found["before"]}


FORWARD_CASES = {
    "causal": Case("threads", "threads_causal", num_heads=4, num_kv_heads=2, seqlen_q=300, causal=True),
    "lengths": Case("threads", "threads_lengths", batch=3, seqlen_q=70, seqlen_k=200, seqlens_k=(200, 0, 31)),
    "packed": Case("threads", "threads_packed", seqlens_q=(70, 1, 200), seqlens_k=(70, 9, 200), causal=True),
    "mask": Case("threads", "threads_mask", seqlen_q=300, bias="bool_window", bias_form="qk"),
}


@each_dtype
@pytest.mark.parametrize("case", FORWARD_CASES.values(), ids=FORWARD_CASES)
def test_forward_has_the_same_bits_with_any_number_of_threads(case: Case, dtype: torch.dtype, seed: int) -> None:
    problem = make_problem(case, dtype, seed)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        with torch.no_grad():
            results.append(problem.call(problem.inputs, "cpu"))
    for out, lse in results[1:]:
        assert torch.equal(out, results[0][0])
        assert torch.equal(lse, results[0][1])


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize(
    "case",
    [
        Case("threads", "threads_decode", num_heads=4, num_kv_heads=2, seqlen_q=1, seqlen_k=3000, head_dim=64),
        Case("threads", "threads_backward", num_heads=4, num_kv_heads=2, seqlen_q=300, causal=True, sinks="finite"),
        Case("threads", "threads_bias", num_heads=4, seqlen_q=150, bias="float", bias_form="1hqk"),
        Case("threads", "threads_bias_of_keys", num_heads=4, seqlen_q=150, bias="float", bias_form="b11k"),
    ],
    ids=lambda c: c.name,
)
def test_any_number_of_threads_is_right(case: Case, threads: int, seed: int) -> None:
    """Where the work is split by the number of threads (chunks of keys, runs of backward) the bits may differ."""
    torch.set_num_threads(threads)
    outcome = check(case, torch.float32, CPU_TARGETS[0], seed)
    assert outcome.passed, f"\n{outcome}"


@each_cpu_target
@each_dtype
@pytest.mark.parametrize("bias_form", ["bhqk", "1hqk", "b11k", "bhq1"])
def test_gradients_have_the_same_bits_in_every_run(
    target: Target, dtype: torch.dtype, bias_form: str, seed: int
) -> None:
    """Threads that end in another order must not add in another order; sums over a broadcast bias too."""
    case = Case(
        "threads", f"threads_{bias_form}", batch=3, num_heads=4, num_kv_heads=2, seqlen_q=150, deterministic=True,
        causal=True, sinks="finite", bias="float", bias_form=bias_form, lse_gradient=True,
    )  # fmt: skip
    problem = make_problem(case, dtype, seed)
    torch.set_num_threads(2)
    with target.forced():
        first, *others = [run_target(problem, "cpu") for _ in range(4)]
    for other in others:
        for name, result in first.items():
            assert torch.equal(result, other[name]), name


def test_calls_from_several_python_threads_at_once(seed: int) -> None:
    """The interpreter lock is released in the kernel: scratch memory must not be shared between callers."""
    problems = [
        make_problem(Case("threads", f"threads_{n}", num_heads=2, seqlen_q=n, causal=True), torch.float32, seed)
        for n in (1, 17, 130, 257)
    ]
    alone = [run_target(problem, "cpu") for problem in problems]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda problem: [run_target(problem, "cpu") for _ in range(5)], problems))
    for results, wanted in zip(together, alone, strict=True):
        for result in results:
            for name, tensor in result.items():
                assert torch.equal(tensor, wanted[name]), name


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


# --------------------------------------------------------------------------------------------- sizes and accuracy


@pytest.mark.sanitize
@each_cpu_target
@each_dtype
@pytest.mark.parametrize(
    ("head_dim", "head_dim_v"), [(512, 512), (512, 40), (8, 513), (300, 257), (1, 2)], ids=lambda d: str(d)
)
@pytest.mark.parametrize("rows", [1, 40], ids=["decode", "tiles"])
def test_any_pair_of_head_dims(
    target: Target, dtype: torch.dtype, head_dim: int, head_dim_v: int, rows: int, seed: int
) -> None:
    """The value's head_dim need not be the query's, and neither ends at 256."""
    case = Case(
        "head_dim", f"native_{head_dim}_{head_dim_v}_{rows}", batch=1, num_heads=4, num_kv_heads=2, seqlen_q=rows,
        seqlen_k=97, head_dim=head_dim, head_dim_v=head_dim_v, causal=True,
    )  # fmt: skip
    outcome = check(case, dtype, target, seed)
    assert outcome.passed, f"\n{outcome}"


@each_cpu_target
@pytest.mark.parametrize("rows", [1, 200], ids=["decode", "tiles"])
def test_float32_is_float32(target: Target, rows: int, seed: int) -> None:
    """The rule without plain PyTorch's share: units in the last place alone, about 1e-6 of the result.

    Products in bfloat16, a short exponential, or the statistics through a rounded logarithm would all be seen.
    """
    case = Case("full", f"native_float32_{rows}", num_heads=4, num_kv_heads=2, seqlen_q=rows, seqlen_k=300, head_dim=64)
    wanted = expected(case, torch.float32, seed)
    with target.forced():
        results = run_target(make_problem(case, torch.float32, seed), "cpu")
    for name in ("out", "lse", "dq", "dk", "dv"):
        yardstick = Yardstick(wanted.oracle[name], wanted.oracle[name], wanted.units[name])
        verdict = yardstick.judge(results[name], name)
        assert verdict.passed, str(verdict)


# ---------------------------------------------------------------------------------------------------------- poison

POISONED = Case("poison", "native", batch=2, num_heads=4, num_kv_heads=2, seqlen_q=150, seqlen_k=150, head_dim=24)
#: Cases in which key 70 is seen by some rows and hidden from others, and by what.
PARTLY_SEEN = {
    "window": dict(window_size=(9, 5)),
    "causal": dict(causal=True),
    "causal_decode": dict(causal=True, seqlen_q=2, seqlen_k=72),
    "mask": dict(bias="bool", bias_form="qk"),
    "mask_decode": dict(bias="bool", bias_form="bhqk", seqlen_q=2),
    "window_softcap_sinks": dict(window_size=(9, 5), softcap=3.0, sinks="finite"),
    "window_alibi": dict(window_size=(9, 5), alibi="heads"),
    "window_bias": dict(window_size=(9, 5), bias="float", bias_form="1hqk"),
}


def apart_from(place: int, visible: Tensor) -> Tensor:
    """Which keys share no row with a place: bool (seqlen_k,). Their gradients have nothing to do with it."""
    return ~(visible & visible[:, place, None]).any(0)


@each_cpu_target
@each_dtype
@pytest.mark.parametrize(
    ("operand", "bad"), [("key", math.nan), ("value", math.nan), ("value", math.inf)], ids=["key", "value", "value-inf"]
)
@pytest.mark.parametrize("name", PARTLY_SEEN)
def test_a_bad_number_reaches_those_who_see_it(
    target: Target, dtype: torch.dtype, operand: str, bad: float, name: str, seed: int
) -> None:
    """A NaN or Inf in the middle of a tile: rows that do not see it stay right, in out, lse and dq; rows that see it
    are not quietly repaired. A bad value leaves the probabilities alone, so keys apart from it keep their gradients.
    """
    case = replace(POISONED, name=f"native_{name}", **PARTLY_SEEN[name])
    problem = make_problem(case, dtype, seed)
    wanted = expected(case, dtype, seed)
    place = 70
    visible = problem.visible.expand(case.batch, case.num_heads, -1, -1)
    sees = visible[..., place]  # (batch, num_heads, seqlen_q)
    assert sees.any()
    poisoned = problem.inputs[operand].clone()
    poisoned[:, :, place, ::5] = bad
    problem = replace(problem, inputs=problem.inputs | {operand: poisoned})
    with target.forced():
        results = run_target(problem, "cpu")

    clean = ~sees
    for result in ("out", "dq", "lse"):
        # V takes no part in lse, so nobody's lse may change.
        rows = torch.ones_like(clean) if result == "lse" and operand == "value" else clean
        assert_right_where(rows, results[result], wanted, result)
    assert not results["out"][sees].isfinite().all(-1).any()
    if operand == "key":
        assert results["lse"][sees].isnan().all()
    if operand == "value" and "window" in name:
        apart = apart_from(place, visible[0, 0]).expand(case.batch, case.num_kv_heads, -1)
        for result in ("dk", "dv"):
            assert_right_where(apart, results[result], wanted, result)


def assert_right_where(where: Tensor, result: Tensor, wanted: Any, name: str) -> None:
    parts = (wanted.oracle[name], wanted.baseline[name], wanted.units[name])
    verdict = Yardstick(*[t[where] for t in parts]).judge(result[where], name)
    assert verdict.passed, str(verdict)


@each_cpu_target
@each_dtype
@pytest.mark.parametrize("rows", [1, 70], ids=["decode", "tiles"])
@pytest.mark.parametrize(
    "options",
    [
        dict(padding="left"),
        dict(padding="right"),
        dict(padding="holes"),
        dict(seqlens_k=(100, 3, 0)),
        dict(seqlens_k=(100, 3, 0), causal=True, sinks="finite"),
        dict(window_size=(5, 5), causal=True),
        dict(bias="bool", bias_form="b11k"),
        dict(bias="bool_window", bias_form="qk", padding="holes"),
        dict(padding="holes", alibi="heads", softcap=2.0),
        dict(padding="holes", bias="float", bias_form="bhqk", dropout_p=0.2),
    ],
    ids=lambda o: "-".join(f"{k}={v}" for k, v in o.items()),
)
def test_poison_that_nobody_sees_reaches_nothing(
    target: Target, dtype: torch.dtype, rows: int, options: dict, seed: int
) -> None:
    """NaN and Inf in padding: out, lse and all gradients are those of the clean problem."""
    case = Case(
        "poison", f"native_{rows}_{sorted(options)}", batch=3, num_heads=4, num_kv_heads=2, seqlen_q=rows,
        seqlen_k=100, head_dim=17, poison=True, lse_gradient=True, **options,
    )  # fmt: skip
    problem = make_problem(case, dtype, seed)
    assert problem.inputs["value"].isnan().any(), "nothing is poisoned"
    outcome = check(case, dtype, target, seed)
    assert outcome.passed, f"\n{outcome}"


@each_cpu_target
@each_dtype
@pytest.mark.parametrize("rows", [2, 40], ids=["decode", "tiles"])
def test_a_bad_query_row_stays_by_itself(target: Target, dtype: torch.dtype, rows: int) -> None:
    """A row whose every score is NaN has no maximum, like a row that sees nothing. But it is no such row: its output
    is NaN, not a zero that nobody would notice; and the other rows of its tile do not change.
    """
    query, key, value = (torch.randn(1, 2, n, 8).to(dtype) for n in (rows, 40, 40))
    bad = query.clone()
    bad[:, :, -1] = math.nan
    leaves = [t.clone().requires_grad_() for t in (bad, key, value)]
    with target.forced():
        wanted, wanted_lse = attention(query, key, value, return_lse=True, backend="cpu")
        out, lse = attention(*leaves, return_lse=True, backend="cpu")
        (dquery,) = torch.autograd.grad(out, leaves[0], torch.randn_like(out))
    assert torch.equal(out[:, :, :-1], wanted[:, :, :-1])
    assert torch.equal(lse[:, :, :-1], wanted_lse[:, :, :-1])
    assert dquery[:, :, :-1].isfinite().all()
    assert out[:, :, -1].isnan().all()
    assert lse[:, :, -1].isnan().all()


@each_cpu_target
@each_dtype
@pytest.mark.parametrize("rows", [1, 40], ids=["decode", "tiles"])
def test_keys_that_are_all_bad_are_not_hidden_keys(target: Target, dtype: torch.dtype, rows: int) -> None:
    query, value = torch.randn(1, 2, rows, 8).to(dtype), torch.randn(1, 2, 5, 8).to(dtype)
    with target.forced():
        out, lse = attention(query, torch.full_like(value, math.nan), value, return_lse=True, backend="cpu")
    assert out.isnan().all()
    assert lse.isnan().all()
