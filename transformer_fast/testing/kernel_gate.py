"""The rules that the kernels' machine code has to keep. Each gives one sentence for what breaks it.

A kernel that breaks one still computes the right thing, only slower; no test of results would ever notice.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformer_fast.testing.machine_code import MachineCode

#: How much longer an inner loop may become than the baseline's.
GROWTH = 0.03
#: Products of fewer rows than this are not made by the instructions of a whole warpgroup.
_WARPGROUP_ROWS = 64
_WARPGROUP_KINDS = {90: "HGMMA", 100: "UTCHMMA", 103: "UTCHMMA"}
#: Phases that multiply no matrices.
_STREAMING = ("combine", "preprocess")
#: Phases that compute the transposed product, whose rows are keys.
_TRANSPOSED = ("dkdv", "dk", "dv")


class UnavailableError(ValueError):
    """The kernels of a language cannot be judged here, and why."""


@dataclass(frozen=True)
class Kernel:
    """One row of the report: a compiled launch, and what it has to be like."""

    phase: str
    variant: str
    capability: int
    tile: tuple[int, int]  # block_m, block_n
    num_warps: int
    num_stages: int
    promised_ctas: int
    needs_tensor_cores: bool
    needs_tma: bool
    may_spill: bool = False
    needs_overlap: bool = False  # exponentials have to run beside products
    family: int | None = None  # of a kernel in C++: the machine it was written for, where it may run on later ones
    code: MachineCode | None = None
    error: str | None = None  # why there is no code

    @property
    def name(self) -> str:
        """Its key in the baseline."""
        return f"{self.phase} / {self.variant}"

    @property
    def where(self) -> str:
        """How a failure names it."""
        return f"{self.phase} ({self.variant}) for sm_{self.capability}"

    @property
    def language(self) -> str:
        """What it is written in."""
        return "Triton" if self.family is None else "C++"

    @property
    def tensor_core_kind(self) -> str | None:
        """The instruction that has to make all products; None where none has to."""
        if not self.needs_tensor_cores or self.phase in _STREAMING:
            return None
        if self.family is not None:  # its instructions are named in its source
            return _WARPGROUP_KINDS.get(self.family, "HMMA")
        rows = self.tile[1] if self.phase in _TRANSPOSED else self.tile[0]
        if rows < _WARPGROUP_ROWS or self.num_warps % 4:
            return "HMMA"
        return _WARPGROUP_KINDS.get(self.capability, "HMMA")


Facts = Mapping[str, Any]  # of one kernel in the baseline
Rule = Callable[[Kernel, MachineCode, Facts], Iterator[str]]


def spills(kernel: Kernel, code: MachineCode, known: Facts) -> Iterator[str]:
    """Registers that went to memory and back, or arrays that never had a register."""
    allowed = int(known.get("spills", code.spills) * (1 + GROWTH)) if kernel.may_spill else 0
    if code.spills > allowed or (code.local_bytes and not kernel.may_spill):
        inside = sum(loop.spills for loop in code.loops)
        yield (
            f"{code.spills} loads and stores of spilled registers ({inside} in inner loops), "
            f"{code.local_bytes} bytes of local memory; allowed: {allowed}"
        )


def tensor_cores(kernel: Kernel, code: MachineCode, known: Facts) -> Iterator[str]:
    """All products go to the best unit that the machine has."""
    wanted = kernel.tensor_core_kind
    if wanted is None:
        return
    found = " and ".join(f"{count} {kind}" for kind, count in code.tensor_cores.items()) or "none"
    if set(code.tensor_cores) != {wanted}:
        yield f"its tensor-core instructions are {found}; allowed: {wanted} alone"
    elif not all(loop.tensor_cores for loop in code.loops) or not code.loops:
        yield f"its tensor-core instructions ({found}) are in no inner loop; allowed: {wanted} in each inner loop"


def serialization(kernel: Kernel, code: MachineCode, known: Facts) -> Iterator[str]:
    """ptxas gave up on running wgmma and everything else side by side."""
    if code.serialized:
        yield f"ptxas serialized its wgmma instructions ({code.serialized} warnings); allowed: 0"


def tma(kernel: Kernel, code: MachineCode, known: Facts) -> Iterator[str]:
    """Keys and values, or what else a loop reads, come by the tensor memory accelerator."""
    if kernel.needs_tma or known.get("tma_loads", 0):
        loads = [loop.tma_loads for loop in code.loops]
        if not code.producers and (not loads or not all(loads)):
            yield f"TMA loads in its inner loops are {loads}; allowed: at least 1 in each, or a producer's loop"


def occupancy(kernel: Kernel, code: MachineCode, known: Facts) -> Iterator[str]:
    """As many thread blocks fit on a multiprocessor as the table of configurations says."""
    if code.ctas_per_sm < kernel.promised_ctas:
        cost = f"{code.registers} registers, {code.shared} bytes of shared memory"
        cost += f", {code.tensor_memory} columns of tensor memory" if code.tensor_memory else ""
        yield (
            f"{code.ctas_per_sm} CTAs fit on a multiprocessor ({cost}); "
            f"allowed: at least {kernel.promised_ctas}, as its configuration says"
        )


def register_pool(kernel: Kernel, code: MachineCode, known: Facts) -> Iterator[str]:
    """What consumers take by `setmaxnreg` is what the block was launched with and the producer gave up, or they wait
    for ever.
    """
    if code.taken is None or code.given_up is None:
        return
    groups = kernel.num_warps // 4
    wanted, there = code.given_up + (groups - 1) * code.taken, groups * code.registers
    if wanted > there:
        yield (
            f"its {groups} warpgroups want {wanted} registers a lane by setmaxnreg ({code.given_up} for a producer, "
            f"{code.taken} for others); allowed: {there}, with which a block is launched"
        )


def overlap(kernel: Kernel, code: MachineCode, known: Facts) -> Iterator[str]:
    """The exponentials of one block of keys run beside the products of another, as many as before."""
    for which, loop in (("full", code.full), ("masked", code.masked)):
        before = known.get(f"overlapped_{which}") or int(kernel.needs_overlap and which == "full")
        allowed = -int(-before * (1 - GROWTH) // 1)
        if loop is not None and loop.overlapped < allowed:
            yield (
                f"{loop.overlapped} of {loop.exponentials} exponentials of its {which} loop run beside products; "
                f"allowed: at least {allowed}"
            )


def complaints(kernel: Kernel, code: MachineCode, known: Facts) -> Iterator[str]:
    """Whatever else ptxas has to say."""
    for text in code.complaints:
        yield f"ptxas says {text!r}; allowed: nothing of the kind"


def growth(kernel: Kernel, code: MachineCode, known: Facts) -> Iterator[str]:
    """A turn of an inner loop takes no more instructions than it did."""
    for which, loop in (("full", code.full), ("masked", code.masked)):
        before = known.get(which)
        if before is None:
            continue
        allowed = int(before * (1 + GROWTH))
        if loop is None:
            yield f"its {which} loop was not found; allowed: one, as in the baseline ({before} instructions)"
        elif loop.instructions > allowed:
            yield (
                f"{loop.instructions} instructions in a turn of its {which} loop; "
                f"allowed: {allowed}, {GROWTH:.0%} more than the baseline's {before}"
            )


RULES: tuple[Rule, ...] = (
    spills, tensor_cores, serialization, tma, occupancy, register_pool, overlap, complaints, growth,
)  # fmt: skip


def judge(kernels: Sequence[Kernel], baseline: Mapping[int, Mapping[str, Facts]] | None) -> list[str]:
    """All that is wrong, a sentence each; `baseline` by capability and name, None if there is none to compare with."""
    failures = []
    for kernel in kernels:
        if kernel.code is None:
            failures.append(f"{kernel.where}: does not compile: {kernel.error}")
            continue
        known = {} if baseline is None else baseline.get(kernel.capability, {}).get(kernel.name)
        if known is None:
            failures.append(
                f"{kernel.where}: is not in the baseline; allowed: only what is (--update-baseline adds it)"
            )
        for rule in RULES:
            failures += [f"{kernel.where}: {sentence}" for sentence in rule(kernel, kernel.code, known or {})]
    return failures + _vanished(kernels, baseline or {})


def _vanished(kernels: Sequence[Kernel], baseline: Mapping[int, Mapping[str, Facts]]) -> list[str]:
    """A kernel that is no longer compiled is no longer judged either."""
    compiled = {(kernel.capability, kernel.name) for kernel in kernels}
    capabilities = {kernel.capability for kernel in kernels}
    return [
        f"{name} for sm_{capability}: is in the baseline and was not compiled (--update-baseline takes it out)"
        for capability in sorted(capabilities)
        for name in baseline.get(capability, {})
        if (capability, name) not in compiled
    ]


# -------------------------------------------------------------------------------------------------- the baseline


def baseline_path() -> Path:
    """Where the committed baseline of the Triton kernels lies: beside them."""
    from transformer_fast import kernels

    return Path(kernels.__file__).with_name("baseline.json")


def read_baseline(path: Path, version: str) -> dict[int, dict[str, Facts]] | None:
    """The figures for a minor version of the compiler ("3.7" of Triton); None if there are none."""
    if not path.exists():
        return None
    data = json.loads(path.read_text(encoding="utf-8")).get(version)
    return None if data is None else {int(capability): facts for capability, facts in data.items()}


def write_baseline(path: Path, version: str, kernels: Sequence[Kernel]) -> None:
    """Replaces a compiler version's figures for the capabilities that were compiled for, and leaves the others."""
    data = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    of_version = data.setdefault(version, {})
    for capability in sorted({kernel.capability for kernel in kernels}):
        of_version[str(capability)] = {
            kernel.name: _facts(kernel, kernel.code)
            for kernel in sorted(kernels, key=lambda kernel: kernel.name)
            if kernel.capability == capability and kernel.code is not None
        }
    data[version] = dict(sorted(of_version.items(), key=lambda item: int(item[0])))
    path.write_text(_lines(dict(sorted(data.items()))), encoding="utf-8")


def _facts(kernel: Kernel, code: MachineCode) -> Facts:
    overlapped = {"overlapped_full": code.full, "overlapped_masked": code.masked} if kernel.needs_overlap else {}
    return {
        "registers": code.registers,
        "spills": code.spills,
        "ctas_per_sm": code.ctas_per_sm,
        "tensor_cores": code.tensor_cores,
        "tma_loads": code.tma_loads,
        "full": code.full and code.full.instructions,
        "masked": code.masked and code.masked.instructions,
        **{name: loop and loop.overlapped for name, loop in overlapped.items()},
    }


def _lines(data: Mapping[str, Mapping[str, Mapping[str, Facts]]]) -> str:
    """JSON with a line for each kernel, so that a change of the baseline reads well."""
    versions = []
    for version, capabilities in data.items():
        blocks = []
        for capability, kernels in capabilities.items():
            rows = ",\n".join(f"      {json.dumps(name)}: {json.dumps(facts)}" for name, facts in kernels.items())
            blocks.append(f"    {json.dumps(capability)}: {{\n{rows}\n    }}")
        versions.append(f"  {json.dumps(version)}: {{\n" + ",\n".join(blocks) + "\n  }")
    return "{\n" + ",\n".join(versions) + "\n}\n"
