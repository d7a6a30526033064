"""The report on the C++ kernels: each fault, compiled for real, breaks its rule, and a good kernel breaks none."""

from __future__ import annotations

import dataclasses
import functools
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from transformer_fast.testing import cuda_kernels
from transformer_fast.testing import kernel_gate as gate
from transformer_fast.testing.cuda_objects import Promise, read_log, read_object, read_section
from transformer_fast.testing.kernel_gate import Kernel, judge, read_baseline, write_baseline
from transformer_fast.testing.machine_code import MachineCode, find_tool

CodeOf = Callable[[str], tuple[Promise, MachineCode]]
ROOT = Path(__file__).resolve().parents[2]
TARGETS = {80: "arch=compute_80,code=sm_80", 90: "arch=compute_90a,code=sm_90a"}
#: By name: the machine that the toy is compiled for, and the switches of its fault.
TOYS: dict[str, tuple[int, list[str]]] = {
    "good": (90, []),
    "no overlap": (90, ["-DTOY_NO_OVERLAP"]),
    "serialized": (90, ["-DTOY_SERIALIZED"]),
    "no TMA": (90, ["-DTOY_NO_TMA"]),
    "two blocks": (90, ["-DTOY_MIN_BLOCKS=2"]),
    "two blocks without setmaxnreg": (90, ["-DTOY_MIN_BLOCKS=2", "-DTOY_NO_SETMAXNREG"]),
    "longer loop": (90, ["-DTOY_EXTRA=1"]),
    "good on sm_80": (80, []),
    "spills on sm_80": (80, ["-DTOY_MIN_BLOCKS=5"]),
    "local memory": (80, ["-DTOY_LOCAL_MEMORY"]),
    "no tensor cores": (80, ["-DTOY_NO_TENSOR_CORES"]),
}


def find_nvcc() -> str | None:
    toolkit = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which("nvcc") or shutil.which("nvcc", path=f"{toolkit}/bin")


pytestmark = [
    pytest.mark.skipif(find_nvcc() is None, reason="nvcc is not here"),
    pytest.mark.skipif(find_tool("nvdisasm") is None, reason="nvdisasm is not here"),
]


@pytest.fixture(scope="module")
def object_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The object of a toy, compiled when it is first asked for."""
    folder = tmp_path_factory.mktemp("toys")

    @functools.cache
    def compiled(name: str) -> Path:
        capability, switches = TOYS[name]
        target = folder / f"{name.replace(' ', '_')}.o"
        command = [find_nvcc(), "-std=c++17", "-O3", f"-I{ROOT / 'csrc'}", "-gencode", TARGETS[capability]]
        command += ["-Xptxas", "-v,-warn-spills", "-c", Path(__file__).with_name(f"toy_sm{capability}.cu"), *switches]
        done = subprocess.run([*command, "-o", target], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        Path(f"{target}.log").write_text(done.stderr)
        return target

    return compiled


@pytest.fixture(scope="module")
def code_of(object_of: Callable[[str], Path]) -> CodeOf:
    """What is read of a toy."""
    return functools.cache(lambda name: read_object(object_of(name), TOYS[name][0]))


@pytest.fixture
def kernel(code_of: CodeOf) -> Callable[..., Kernel]:
    """Makes the row of a toy, as the report makes one of a kernel."""

    def make(which: str, **changes: Any) -> Kernel:
        promise, code = code_of(which)
        family = TOYS[which][0]
        made = Kernel(
            phase="forward",
            variant="bf16 64",
            capability=family,
            tile=(promise.block_m, promise.block_n),
            num_warps=promise.threads // 32,
            num_stages=0,
            promised_ctas=promise.min_blocks,
            needs_tensor_cores=True,
            needs_tma=family == 90,
            needs_overlap=family == 90,
            family=family,
            code=code,
        )
        return dataclasses.replace(made, **changes)

    return make


def baseline_of(tmp_path: Path, *kernels: Kernel) -> dict[int, dict[str, Any]]:
    write_baseline(tmp_path / "baseline.json", "13.0", kernels)
    baseline = read_baseline(tmp_path / "baseline.json", "13.0")
    assert baseline is not None
    return baseline


def test_good_kernels_pass(kernel: Callable[..., Kernel], tmp_path: Path) -> None:
    kernels = [kernel("good"), kernel("good on sm_80")]
    assert judge(kernels, None) == []
    assert judge(kernels, baseline_of(tmp_path, *kernels)) == []


def test_what_is_read_of_a_good_kernel(code_of: CodeOf) -> None:
    promise, code = code_of("good")
    assert promise == Promise(threads=256, min_blocks=1, block_m=64, block_n=128, shared=8192 + 4 * 128 * 128 + 64)
    assert code.tensor_cores == {"HGMMA": 4 + 12 + 8}
    (loop,) = code.loops
    assert (loop.tensor_cores, loop.waits["wgmma"]) == (12, 2)
    assert loop.exponentials == loop.overlapped == 66
    assert code.producers and all(producer.tma_loads for producer in code.producers)
    assert (code.given_up, code.taken) == (24, 240)
    assert code.registers == 240 and code.ctas_per_sm == 1
    _, of_80 = code_of("good on sm_80")
    assert of_80.tensor_cores.keys() == {"HMMA"} and not of_80.producers and of_80.taken is None


@pytest.mark.parametrize(
    ("rule", "toy", "words"),
    [
        (gate.spills, "two blocks without setmaxnreg", "spilled registers"),
        (gate.spills, "spills on sm_80", "spilled registers"),
        (gate.spills, "local memory", "bytes of local memory"),
        (gate.tensor_cores, "no tensor cores", "none; allowed: HMMA alone"),
        (gate.serialization, "serialized", "serialized its wgmma"),
        (gate.serialization, "two blocks without setmaxnreg", "serialized its wgmma"),
        (gate.tma, "no TMA", "a producer's loop"),
        (gate.register_pool, "two blocks", "its 2 warpgroups want 264 registers a lane"),
        (gate.overlap, "no overlap", "0 of 66 exponentials"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_fault_breaks_its_rule(kernel: Callable[..., Kernel], rule: gate.Rule, toy: str, words: str) -> None:
    faulty = kernel(toy)
    (sentence,) = rule(faulty, faulty.code, {})
    assert words in sentence
    assert f"{faulty.where}: {sentence}" in judge([faulty], None)


def test_a_promise_that_is_not_kept(kernel: Callable[..., Kernel]) -> None:
    """Of registers ptxas keeps it by itself; of shared memory nobody does."""
    (failure,) = judge([kernel("good on sm_80", promised_ctas=3)], None)
    assert "2 CTAs fit on a multiprocessor" in failure


def test_instructions_of_another_family(kernel: Callable[..., Kernel]) -> None:
    assert any("HMMA; allowed: HGMMA alone" in failure for failure in judge([kernel("good on sm_80", family=90)], None))
    assert judge([kernel("good on sm_80", capability=90)], None) == []  # on a later machine than it was written for


def test_a_longer_loop(kernel: Callable[..., Kernel], tmp_path: Path) -> None:
    (failure,) = judge([kernel("longer loop")], baseline_of(tmp_path, kernel("good")))
    assert "instructions in a turn of its full loop" in failure


def test_a_lost_producer(kernel: Callable[..., Kernel], tmp_path: Path) -> None:
    failures = judge([kernel("no TMA", needs_tma=False)], baseline_of(tmp_path, kernel("good")))
    assert any("TMA loads in its inner loops" in failure for failure in failures)


def test_less_overlap_than_before(kernel: Callable[..., Kernel], tmp_path: Path) -> None:
    good = kernel("good")
    baseline = baseline_of(tmp_path, good)
    assert good.code is not None

    def with_overlap(count: int) -> Kernel:
        loop = dataclasses.replace(good.code.loops[0], overlapped=count)
        return dataclasses.replace(good, code=dataclasses.replace(good.code, loops=(loop,)))

    assert judge([with_overlap(65)], baseline) == []
    (failure,) = judge([with_overlap(63)], baseline)
    assert "63 of 66 exponentials of its full loop run beside products; allowed: at least 65" in failure
    assert judge([with_overlap(63)], None) == []


def test_what_else_ptxas_says(kernel: Callable[..., Kernel], tmp_path: Path) -> None:
    log = tmp_path / "x.o.log"
    used = "ptxas info    : Used 168 registers, used 16 barriers\n"
    ignored = "ptxas info    : setmaxnreg ignored to maintain minimum register requirements"
    log.write_text(f"{used}{ignored}\n")
    assert read_log(log).complaints == (ignored,)
    good = kernel("good")
    faulty = dataclasses.replace(good, code=dataclasses.replace(good.code, complaints=(ignored,)))
    (failure,) = judge([faulty], None)
    assert "setmaxnreg ignored" in failure


def test_what_cannot_be_read_is_an_error(object_of: Callable[[str], Path], tmp_path: Path) -> None:
    copy = Path(shutil.copy(object_of("good"), tmp_path))
    with pytest.raises(RuntimeError, match=r"good\.o\.log is missing"):
        read_object(copy, 90)
    Path(f"{copy}.log").write_text("nothing about it\n")
    with pytest.raises(RuntimeError, match="no word about registers"):
        read_object(copy, 90)
    shutil.copy(f"{object_of('good')}.log", tmp_path)
    with pytest.raises(RuntimeError, match="0 binaries for sm_80"):
        read_object(copy, 80)
    with pytest.raises(RuntimeError, match="no section"):
        read_section(copy, "tf_fables")
    copy.write_bytes(b"no object")
    with pytest.raises(RuntimeError, match="not a 64-bit object"):
        read_object(copy, 90)


# ---------------------------------------------------------------------------------------------------- the real kernels


def test_every_kernel_is_read_for_every_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a build that has all, or by compiling; a build that lacks something is none."""
    table, _ = (cuda_kernels.source_module(name) for name in ("instances", "toolkit"))
    wanted = [(i.name, c) for c in (80, 90) for i in table.INSTANCES if cuda_kernels.TARGETS[c] in i.targets]
    monkeypatch.setattr(cuda_kernels, "_ninja", lambda: None)
    monkeypatch.setattr(cuda_kernels, "ROOT", tmp_path)

    def found() -> list[cuda_kernels.Job]:
        return [job for job, _ in cuda_kernels._jobs((80, 90, 100))]

    assert [(job.name, job.capability) for job in found()] == wanted
    assert all(job.command and "-Xptxas" in job.command for job in found())
    build = tmp_path / "build" / "temp.linux"
    build.mkdir(parents=True)
    lines = [f"build {cuda_kernels.OBJECTS}/{i.name}.o: nvcc x.cu" for i in table.INSTANCES]
    lines += [f"  flags = -gencode {flag}" for flag in table.TARGETS.values()]
    (build / "build.ninja").write_text("\n".join(lines))
    assert [(job.name, job.capability) for job in found()] == wanted
    assert not any(job.command for job in found()) and found()[0].object.is_relative_to(build)
    (build / "build.ninja").write_text("\n".join(lines[1:]))
    assert all(job.command for job in found())


def test_the_rows_of_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_kernels, "_build", lambda: None)
    rows = [kernel for _, kernel in cuda_kernels._jobs((80, 90))]
    assert len({(row.capability, row.name) for row in rows}) == len(rows)
    kinds = {(row.phase, row.family): row.tensor_core_kind for row in rows}
    assert kinds["forward", 90] == kinds["backward", 90] == "HGMMA" and kinds["decode", 80] == "HMMA"
    assert kinds["preprocess", 80] is None
    assert {row.phase for row in rows if row.needs_overlap} == {"forward", "forward_full"}
    assert {row.phase for row in rows if row.needs_tma} == {"forward", "forward_full", "backward"}
    assert {row.family for row in rows if row.needs_tma} == {90}


def test_only_what_has_changed_is_compiled_again(
    object_of: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = cuda_kernels.source_module("instances").INSTANCES[0].name
    compiler = tmp_path / "nvcc"
    compiler.write_text(
        f"#!/bin/sh\necho once >> {tmp_path}/runs\n"
        f"for last; do :; done\ncp '{object_of('good')}' $last; cat '{object_of('good')}.log' >&2\n"
    )
    compiler.chmod(0o755)
    job = cuda_kernels.Job(name, 90, tmp_path / "out" / f"{name}.o", (str(compiler),))

    def runs() -> int:
        assert "code" in cuda_kernels._read(job)
        return len((tmp_path / "runs").read_text().split())

    assert [runs(), runs()] == [1, 1]
    monkeypatch.setattr(cuda_kernels, "_headers", lambda: "others")
    assert [runs(), runs()] == [2, 2]
    compiler.write_text("#!/bin/sh\necho 'x.cu(3): error: no such thing' >&2; exit 1\n")
    monkeypatch.setattr(cuda_kernels, "_headers", lambda: "broken ones")
    for _ in range(2):  # and the object that is still there is not taken for the new one
        assert cuda_kernels._read(job) == {"error": "x.cu(3): error: no such thing"}


def test_what_is_missing_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toolkit = cuda_kernels.source_module("toolkit")
    with monkeypatch.context() as patch:
        patch.setattr(toolkit, "find_nvcc", lambda: None)
        with pytest.raises(gate.UnavailableError, match="no nvcc in"):
            cuda_kernels.nvcc_version()
    with monkeypatch.context() as patch:
        patch.setattr(cuda_kernels, "find_tool", lambda name: None)
        with pytest.raises(gate.UnavailableError, match="cuobjdump is neither in Triton nor"):
            cuda_kernels.nvcc_version()
    monkeypatch.setattr(cuda_kernels, "ROOT", tmp_path)
    cuda_kernels.source_module.cache_clear()
    with pytest.raises(gate.UnavailableError, match="without its sources"):
        cuda_kernels.nvcc_version()
