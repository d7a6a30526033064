"""The CPU back end as a piece of machinery: instruction sets, threads, sizes.

What needs a process of its own (environment variables) runs a small program in one and reads what it prints.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from cpu_targets import CPU_TARGETS, ISAS, ROOT, VARIABLE, each_cpu_target, each_dtype, each_isa, run_program

import transformer_fast
from transformer_fast import _C_cpu, backends
from transformer_fast.backends.cpu import force_isa
from transformer_fast.testing import Case, Target, check, judge, make_problem
from transformer_fast.testing.runner import expected, run_target
from transformer_fast.testing.tolerance import Yardstick


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
        if isa not in ("avx2", "avx512", "avx512_bf16", "amx_bf16") or not path.exists():
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


@pytest.mark.parametrize("threads", [1, 2])
def test_tiles_are_shared_with_pytorch(threads: int) -> None:
    """On a processor with AMX, PyTorch's products use the same registers, whose shapes belong to the thread."""
    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(0)
    left, right, query = (
        torch.randn(shape, generator=generator).bfloat16() for shape in ((300, 200), (200, 136), (1, 4, 300, 40))
    )
    product, attended = left @ right, transformer_fast.attention(query, query, query, causal=True, backend="cpu")
    for _ in range(3):
        assert torch.equal(transformer_fast.attention(query, query, query, causal=True, backend="cpu"), attended)
        assert torch.equal(left @ right, product)
    exact = torch.nn.functional.scaled_dot_product_attention(*[query.double()] * 3, is_causal=True)
    verdict = judge(attended, exact, torch.nn.functional.scaled_dot_product_attention(*[query] * 3, is_causal=True))
    assert verdict.passed, verdict


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
    "window": Case("threads", "threads_window", num_heads=4, num_kv_heads=2, seqlen_q=300, window_size=(75, 10)),
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
