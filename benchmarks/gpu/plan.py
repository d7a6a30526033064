"""The sections of a run in order of importance, their share of the time, and their jobs."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformer_fast.testing.suite import standard_cases

from .cuda_module import NATIVE
from .jobs import LAUNCH_SHAPES, SMOKE_CASES
from .model import MODELS
from .shapes import SHAPES, Shape

Job = dict[str, Any]

#: A run that takes longer than ten minutes may be ended from outside.
DEFAULT_BUDGET = 540.0
#: The types of the conformance matrix, the one that is timed first.
DTYPES = ("bfloat16", "float16", "float32")


@dataclass(frozen=True)
class Settings:
    """What a run was asked for."""

    dry: bool
    budget: float = DEFAULT_BUDGET
    backends: tuple[str, ...] = ("triton",)
    only: tuple[str, ...] = ()
    seed: int = 0


@dataclass(frozen=True)
class Section:
    """A part of a run. It may go on until the shares before it and its own are used up: what one leaves, the next
    has. ``workers``: how many of its jobs run at a time, None as many as the machine can hold.
    """

    name: str
    title: str
    share: float
    jobs: Callable[[Settings], list[Job]]
    job_seconds: float = 90.0
    workers: int | None = 1


def most_workers(settings: Settings) -> int:
    """Compiling is what takes the time, on the host; each process holds its own copy of PyTorch, 3 GiB with all."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // (3 * 2**30)
    return 1 if settings.dry else max(1, min(12, cores - 2, memory))


# ----------------------------------------------------------------------------------------------------------- jobs


def _environment(settings: Settings) -> list[Job]:
    return [{"kind": "environment", "name": "environment"}]


def _instructions(settings: Settings) -> list[Job]:
    """Each instruction of the back end in C++ by itself: what fails there explains all else that does."""
    from transformer_fast.testing.instructions import CHECKS

    checks = list(CHECKS)[:: 10 if settings.dry else 1]  # all of them are in the test suite
    return [
        {"kind": "instruction", "name": check, "backend": backend, "seed": settings.seed}
        for backend in settings.backends
        if backend in NATIVE
        for check in checks
    ]


def smoke_jobs(settings: Settings) -> list[Job]:
    """The small problems that come first, and that the sanitizer watches."""
    return [_case_job(settings, name, "bfloat16", backend) for name in SMOKE_CASES for backend in settings.backends]


def _case_job(settings: Settings, case: str, dtype: str, backend: str) -> Job:
    return {"kind": "conformance", "case": case, "dtype": dtype, "backend": backend, "seed": settings.seed}


def _conformance(*, core: bool) -> Callable[[Settings], list[Job]]:
    def jobs(settings: Settings) -> list[Job]:
        names = [case.name for case in standard_cases() if case.core == core]
        if settings.dry:  # a taste: the interpreter takes minutes for all, and the test suite runs them anyway
            names = ["causal_17", "gqa_causal", "dropout"] if core else ["empty_keys", "packed_one"]
        found = [
            _case_job(settings, name, dtype, backend)
            for dtype in DTYPES
            for name in names
            for backend in settings.backends
        ]
        return found[:4] if settings.dry else found

    return jobs


def _timed(settings: Settings) -> list[Shape]:
    """All shapes; in a dry run the headlines, and of the sweep one of each phase and head_dim."""
    if not settings.dry:
        return list(SHAPES.values())
    chosen: dict[Any, Shape] = {}
    for shape in SHAPES.values():
        is_sweep = shape.group in ("forward", "backward") and not shape.goals
        key = (shape.phase, shape.head_dim) if is_sweep else shape.name
        chosen.setdefault(key, shape)
    return list(chosen.values())


def _compile(settings: Settings) -> list[Job]:
    """One shape for each program that the compilers make; sizes are not part of ours, of flex's they are."""
    seen: dict[tuple[Any, ...], Job] = {}
    for shape in _timed(settings)[: 3 if settings.dry else None]:
        masks = (shape.causal, shape.window_left is None, shape.lengths is None, shape.is_decode)
        for who in settings.backends:
            if who in NATIVE:  # compiled long ago
                continue
            key = (who, shape.phase, shape.form, shape.head_dim, shape.group_size, *masks)
            seen.setdefault(key, {"kind": "compile", "name": shape.name, "contestant": who})
        if shape.flex:
            seen["flex", shape.name] = {"kind": "compile", "name": shape.name, "contestant": "flex"}
    return list(seen.values())


def _timings(settings: Settings) -> list[Job]:
    jobs = []
    for shape in _timed(settings):
        seconds = 0.2 if settings.dry else 0.8 if shape.group in ("forward", "backward") and not shape.goals else 1.5
        job = {"kind": "timing", "name": shape.name, "backends": list(settings.backends)}
        jobs.append(job | {"seconds": seconds, "setup_seconds": 30.0})
    return jobs


def _models(settings: Settings) -> list[Job]:
    return [
        {"kind": "model", "name": name, "backends": list(settings.backends), "seconds": 4.0}
        for name in list(MODELS)[: 1 if settings.dry else None]
    ]


def _launch(settings: Settings) -> list[Job]:
    calls = [{"kind": "launch", "name": name, "backends": list(settings.backends)} for name in LAUNCH_SHAPES]
    return calls + [{"kind": "graph", "name": "decode_graph", "backend": name} for name in settings.backends]


SECTIONS: tuple[Section, ...] = (
    Section("environment", "the device and its limits", 0.06, _environment),
    Section("instructions", "each instruction of the C++ kernels by itself", 0.04, _instructions, 30.0),
    Section("smoke", "a few small problems against the oracle", 0.06, smoke_jobs),
    Section("conformance", "conformance, core cases", 0.19, _conformance(core=True), 60.0, None),
    Section("compile", "compilation of what will be timed", 0.09, _compile, 120.0, None),
    Section("timings", "speed", 0.34, _timings, 75.0),
    Section("models", "a model's step", 0.05, _models, 60.0),
    Section("launch", "what a call costs on the host, CUDA graphs", 0.04, _launch, 45.0),
    Section("sanitizer", "memory and races, by compute-sanitizer", 0.10, smoke_jobs, 60.0),
    Section("conformance_rest", "conformance, the other cases", 0.03, _conformance(core=False), 60.0, None),
)
