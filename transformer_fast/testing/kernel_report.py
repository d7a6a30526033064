"""What the GPU kernels are compiled to, for GPUs that need not be there: `transformer-fast kernels`.

Those in Triton and those in C++ are compiled (or taken from the build), read (`machine_code`) and judged
(`kernel_gate`) alike.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformer_fast.testing import cuda_kernels, triton_kernels
from transformer_fast.testing.environment import environment
from transformer_fast.testing.kernel_gate import (
    Kernel,
    UnavailableError,
    baseline_path,
    judge,
    read_baseline,
    write_baseline,
)
from transformer_fast.testing.machine_code import LIMITS
from transformer_fast.testing.pool import Progress


@dataclass(frozen=True)
class Language:
    """What kernels are written in, and who compiles it."""

    name: str
    compiler: str
    version: Callable[[], str]  # of the compiler; UnavailableError where nothing can be judged
    capabilities: tuple[int, ...]
    kernels: Callable[..., list[Kernel]]  # of capabilities, with `workers` and `progress`
    baseline: Callable[[], Path]


LANGUAGES: dict[str, Language] = {
    "triton": Language(
        "Triton",
        "Triton",
        triton_kernels.triton_version,
        triton_kernels.CAPABILITIES,
        triton_kernels.compile_kernels,
        baseline_path,
    ),
    "cuda": Language(
        "C++",
        "nvcc",
        cuda_kernels.nvcc_version,
        cuda_kernels.CAPABILITIES,
        cuda_kernels.compile_kernels,
        cuda_kernels.baseline_path,
    ),
}


@dataclass(frozen=True)
class Part:
    """All kernels of a language, and what is wrong with them."""

    language: str
    compiler: str  # with its version
    kernels: tuple[Kernel, ...]
    failures: tuple[str, ...]
    baseline: str | None  # the version that there was one for


@dataclass(frozen=True)
class KernelReport:
    """All kernels, and what is wrong with them."""

    parts: tuple[Part, ...]
    notes: tuple[str, ...]  # what was not judged, and why
    seconds: float
    environment: dict[str, Any]

    @property
    def kernels(self) -> tuple[Kernel, ...]:
        return tuple(kernel for part in self.parts for kernel in part.kernels)

    @property
    def failures(self) -> tuple[str, ...]:
        return tuple(failure for part in self.parts for failure in part.failures)

    @property
    def passed(self) -> bool:
        return not self.failures

    def summary(self) -> str:
        """One line."""
        verdict = "passed" if self.passed else f"FAILED: {len(self.failures)} broken rules"
        counts = [
            f"{len(part.kernels)} kernels by {part.compiler}"
            + ("" if part.baseline else " (no baseline for this version, so growth was not judged)")
            for part in self.parts
        ]
        return f"{verdict}: {', '.join(counts)}"

    def as_dict(self) -> dict[str, Any]:
        """Everything, as plain data for JSON."""
        return {
            "passed": self.passed,
            "failures": list(self.failures),
            "notes": list(self.notes),
            "compilers": {part.language: part.compiler for part in self.parts},
            "baselines": {part.language: part.baseline for part in self.parts},
            "seconds": round(self.seconds, 1),
            "environment": self.environment,
            "kernels": [{"language": kernel.language} | asdict(kernel) for kernel in self.kernels],
        }

    def write(self, directory: str | Path) -> tuple[Path, Path]:
        """Writes `kernels.json` and `kernels.md` into a directory, which is made if need be; returns both paths."""
        from transformer_fast.testing.kernel_tables import markdown

        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        json_path, markdown_path = directory / "kernels.json", directory / "kernels.md"
        json_path.write_text(json.dumps(self.as_dict(), indent=1) + "\n", encoding="utf-8")
        markdown_path.write_text(markdown(self), encoding="utf-8")
        return json_path, markdown_path


def report(
    capabilities: Sequence[int] | None = None,
    only: Sequence[str] = (),
    *,
    update_baseline: bool = False,
    workers: int | None = None,
    progress: Progress | None = None,
) -> KernelReport:
    """Compiles, reads and judges the kernels.

    Args:
        capabilities: 90 for compute capability 9.0; all that a language is compiled for by default.
        only: of LANGUAGES; by default those that can be compiled here, with a note on the others.
        update_baseline: write the figures there first. What is wrong by itself, like a spill, stays wrong.
        workers: processes; as many as there are cores by default.
        progress: called after each kernel with (number done, number in all, which).

    Raises:
        ValueError: nothing can be compiled here, or not what was asked for; or a capability that nothing is known of.
    """
    start = time.perf_counter()
    for capability in capabilities or ():
        if capability not in LIMITS:
            raise ValueError(f"capability is {capability}; allowed: {', '.join(map(str, LIMITS))}")
    for name in only:
        if name not in LANGUAGES:
            raise ValueError(f"only is {name!r}; allowed: {', '.join(LANGUAGES)}")
    parts, notes = [], []
    for name, language in LANGUAGES.items():
        if only and name not in only:
            continue
        try:
            parts.append(_part(language, capabilities, update_baseline, workers, progress))
        except UnavailableError as reason:
            if only:
                raise
            notes.append(f"not judged: the kernels in {language.name}, since {reason}")
    if not any(part.kernels for part in parts):
        raise ValueError("no kernel can be compiled here" + "".join(f"; {note}" for note in notes))
    return KernelReport(tuple(parts), tuple(notes), time.perf_counter() - start, environment())


def _part(
    language: Language,
    capabilities: Sequence[int] | None,
    update_baseline: bool,
    workers: int | None,
    progress: Progress | None,
) -> Part:
    version = language.version()
    minor = ".".join(version.split(".")[:2])
    wanted = language.capabilities if capabilities is None else capabilities
    kernels = language.kernels(capabilities=wanted, workers=workers, progress=progress)
    path = language.baseline()
    if update_baseline:
        write_baseline(path, minor, kernels)
    known = read_baseline(path, minor)
    return Part(
        language.name,
        f"{language.compiler} {version}",
        tuple(kernels),
        tuple(judge(kernels, known)),
        None if known is None else minor,
    )
