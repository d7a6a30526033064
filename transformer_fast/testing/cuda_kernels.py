"""What the C++ kernels are compiled to: taken from a build's objects, or compiled for the purpose where there is none.

The table of kernels, csrc/cuda/instances.py, belongs to the checkout; an installed package has the machine code alone.
"""

from __future__ import annotations

import hashlib
import importlib.util
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from transformer_fast.testing.cuda_objects import Promise, read_object
from transformer_fast.testing.kernel_gate import Kernel, UnavailableError
from transformer_fast.testing.machine_code import LIMITS, find_tool
from transformer_fast.testing.pool import Progress, in_processes

#: Compute capabilities, and how csrc/cuda/instances.py names the machine code for them.
TARGETS = {80: "80", 90: "90a"}
CAPABILITIES = tuple(TARGETS)
ROOT = Path(__file__).resolve().parents[2]
#: Where a build has the object of a kernel, under build/temp.*.
OBJECTS = "transformer_fast._C_cuda/instances"
#: Phases that multiply matrices; the others stream.
_PRODUCTS = ("forward", "forward_full", "forward_fallback", "decode", "dkdv", "dq", "backward")


@cache
def source_module(name: str) -> ModuleType:
    """A module of csrc/cuda, which no package holds."""
    path = ROOT / "csrc" / "cuda" / f"{name}.py"
    if not path.exists():
        raise UnavailableError("this package is installed without its sources")
    spec = importlib.util.spec_from_file_location(f"_csrc_cuda_{name}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def baseline_path() -> Path:
    """Where the committed baseline lies: beside the kernels."""
    return ROOT / "csrc" / "cuda" / "baseline.json"


def nvcc_version() -> str:
    """nvcc's version.

    Raises:
        UnavailableError: nvcc, the sources or the tools that read machine code are not here.
    """
    toolkit = source_module("toolkit")
    if reason := toolkit.why_no_nvcc():
        raise UnavailableError(reason)
    for tool in ("cuobjdump", "nvdisasm"):
        if find_tool(tool) is None:
            raise UnavailableError(f"{tool} is neither in Triton nor in a CUDA toolkit here; try: pip install triton")
    return ".".join(map(str, toolkit.version_of(toolkit.find_nvcc())))


# ------------------------------------------------------------------------------------------------------------- objects


@dataclass(frozen=True)
class Job:
    """One kernel for one machine, in words that another process understands."""

    name: str
    capability: int
    object: Path
    command: tuple[str, ...] = ()  # that compiles the source beside the object; empty where a build has done it


def _build() -> Path | None:
    """The folder of a build that has every kernel for all machines, brought up to date; None if there is none."""
    table = source_module("instances")
    flags = [f"-gencode {table.TARGETS[name]}" for name in TARGETS.values()]
    for plan in sorted(ROOT.glob("build/temp.*/build.ninja")):
        text, folder = plan.read_text(encoding="utf-8"), plan.parent
        objects = [f"{OBJECTS}/{instance.name}.o" for instance in table.INSTANCES]
        if all(f"build {name}:" in text for name in objects) and all(flag in text for flag in flags):
            if ninja := _ninja():
                subprocess.run([ninja, "-C", folder, "-k", "0", *objects], capture_output=True, check=False)
            return folder
    return None


def _ninja() -> str | None:
    if importlib.util.find_spec("ninja"):
        import ninja

        return str(Path(ninja.BIN_DIR, "ninja"))
    return shutil.which("ninja")


def _jobs(capabilities: Sequence[int]) -> list[tuple[Job, Kernel]]:
    """Each kernel for each machine that it is compiled for."""
    table, build, jobs = source_module("instances"), _build(), []
    for capability in capabilities:
        target = TARGETS.get(capability)
        for instance in [i for i in table.INSTANCES if target in i.targets]:
            if build is None:
                folder = ROOT / "build" / "kernels" / f"sm_{capability}"
                job = Job(instance.name, capability, folder / f"{instance.name}.o", _command(instance, capability))
            else:
                job = Job(instance.name, capability, build / OBJECTS / f"{instance.name}.o")
            jobs.append((job, _kernel(instance, capability)))
    return jobs


def _command(instance: Any, capability: int) -> tuple[str, ...]:
    """nvcc's, but for the source and the object."""
    table, toolkit = source_module("instances"), source_module("toolkit")
    machine = table.target_flags(instance, [TARGETS[capability]])
    compiler = shutil.which("g++") or "c++"
    return (str(toolkit.find_nvcc()), *toolkit.compile_flags(compiler), f"-I{ROOT / 'csrc'}", *machine)


def _kernel(instance: Any, capability: int) -> Kernel:
    """The row of a kernel; its sizes stand in the object."""
    kind = {None: "", False: " plain", True: " modified"}[instance.modified]
    computes, is_hopper = instance.phase in _PRODUCTS, instance.family == 90
    return Kernel(
        phase=instance.phase,
        variant=f"{instance.dtype} {instance.head_dim}{kind} sm_{instance.family}" if instance.dtype else "any",
        capability=capability,
        tile=(0, 0),
        num_warps=0,
        num_stages=0,
        promised_ctas=1,
        needs_tensor_cores=computes,
        needs_tma=computes and is_hopper,
        needs_overlap=is_hopper and instance.phase in ("forward", "forward_full"),
        family=instance.family,
    )


def _bring_up_to_date(job: Job) -> None:
    """Compiles, unless nothing has changed since it last was."""
    (instance,) = (i for i in source_module("instances").INSTANCES if i.name == job.name)
    text, source = source_module("instances").source_of(instance), job.object.with_suffix(".cu")
    key_path, log = job.object.with_suffix(".key"), job.object.with_name(f"{job.object.name}.log")
    key = hashlib.sha256("\0".join([text, *job.command, _headers()]).encode()).hexdigest()
    if key_path.exists() and key_path.read_text() == key and job.object.exists() and log.exists():
        return
    job.object.parent.mkdir(parents=True, exist_ok=True)
    source.write_text(text, encoding="utf-8")
    done = subprocess.run(
        [*job.command, "-c", source, "-o", job.object], capture_output=True, text=True, check=False, encoding="utf-8"
    )
    log.write_text(done.stdout + done.stderr, encoding="utf-8")
    key_path.write_text(key if done.returncode == 0 else "")


@cache
def _headers() -> str:
    folders = [ROOT / "csrc" / name for name in ("core", "cuda")]
    paths = [path for folder in folders for path in folder.rglob("*") if path.suffix in (".h", ".cuh")]
    return hashlib.sha256(b"\0".join(path.read_bytes() for path in sorted(paths))).hexdigest()


def _read(job: Job) -> dict[str, Any]:
    """What is found out about a kernel, or why nothing was; runs in a process of its own."""
    log = job.object.with_name(f"{job.object.name}.log")
    try:
        if job.command:
            _bring_up_to_date(job)
        said = log.read_text(encoding="utf-8") if log.exists() else ""
        if errors := re.findall(r"^.*\b(?:error|fatal)\b.*$", said, re.MULTILINE):
            return {"error": errors[0].strip()}
        promise, code = read_object(job.object, job.capability)
    except Exception as error:  # the other kernels are still to be reported
        return {"error": f"{type(error).__name__}: {error}"}
    return {
        "code": code,
        "tile": (promise.block_m, promise.block_n),
        "num_warps": promise.threads // 32,
        "promised_ctas": _promised_ctas(promise, job.capability),
    }


def _promised_ctas(promise: Promise, capability: int) -> int:
    """What a kernel's registers are limited for; its tiles fill the shared memory of 9.0, of which others have less."""
    room = LIMITS[capability].shared_kib * 1024 // (promise.shared + 1024)
    return promise.min_blocks if capability == 90 else min(promise.min_blocks, room)


def compile_kernels(
    capabilities: Sequence[int] = CAPABILITIES, *, workers: int | None = None, progress: Progress | None = None
) -> list[Kernel]:
    """Reads every kernel, compiling those that no build has.

    Args:
        capabilities: 90 for compute capability 9.0; those that nothing is compiled for give no kernels.
        workers: processes; as many as there are cores by default, and with 1 all is done in this one.
        progress: called after each kernel with (number done, number in all, which).
    """
    jobs = _jobs(capabilities)
    done: dict[int, Kernel] = {}
    for number, result in in_processes(_read, [job for job, _ in jobs], workers):
        done[number] = replace(jobs[number][1], **result)
        if progress:
            progress(len(done), len(jobs), done[number].where)
    return [done[number] for number in range(len(jobs))]
