"""What a compiled kernel is made of, read from its machine code: no GPU is needed, and nothing runs.

The tools are those that Triton ships, or a CUDA toolkit's. They say what a kernel costs before a device ever does:
registers, spills, shared memory, how many thread blocks fit on a multiprocessor, which tensor-core instructions are
used, how many instructions one turn of the inner loops takes, and what runs beside the products.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from transformer_fast.testing.control_flow import Instruction, Loop, natural_loops, parse_sass
from transformer_fast.testing.overlap import beside_products


class Limits(NamedTuple):
    """What one streaming multiprocessor holds at a time."""

    threads: int
    blocks: int
    shared_kib: int


#: CUDA Programming Guide, "Compute Capabilities", technical specifications. Every one has 64 Ki registers.
LIMITS = {
    80: Limits(2048, 32, 164),
    86: Limits(1536, 16, 100),
    87: Limits(1536, 16, 164),
    89: Limits(1536, 24, 100),
    90: Limits(2048, 32, 228),
    100: Limits(2048, 32, 228),
    103: Limits(2048, 32, 228),
    120: Limits(1536, 24, 100),
}
_PARTITIONS = 4  # of a multiprocessor; a warp's registers lie in one of them
_PARTITION_REGISTERS = 16384
_TENSOR_MEMORY_COLUMNS = 512

_TENSOR_CORE = re.compile(r"[HIQDO]MMA|[HIQO]GMMA|UTC\w*MMA")
_ARITHMETIC = re.compile(r"FFMA|FMUL|FADD|HFMA2|DFMA|HADD2|HMUL2")
_SPILLS = ("STL", "LDL")
_TMA = ("UTMALDG",)
#: Loops of so few instructions only ask again whether something has come.
_POLL = 4
#: Instructions that stop a warp until others are done, by the name they have in the report.
_WAITS = {"WARPGROUP.DEPBAR": "wgmma", "SYNCS.PHASECHK": "mbarrier", "BAR.": "barrier", "DEPBAR": "cp.async"}


@dataclass(frozen=True)
class InnerLoop:
    """One turn of an innermost loop."""

    instructions: int
    tensor_cores: int
    tma_loads: int
    spills: int
    waits: dict[str, int]
    exponentials: int = 0
    overlapped: int = 0  # exponentials that run while a warpgroup's products are under way


@dataclass(frozen=True)
class MachineCode:
    """The facts about one compiled kernel."""

    registers: int
    local_bytes: int  # stack and local memory
    spills: int  # stores to and loads from local memory
    shared: int
    tensor_memory: int  # columns of it, on machines that have any
    ctas_per_sm: int
    tensor_cores: dict[str, int]
    tma_loads: int
    serialized: int  # complaints of ptxas that wgmma instructions cannot overlap
    instructions: int
    loops: tuple[InnerLoop, ...]  # those that compute
    producers: tuple[InnerLoop, ...] = ()  # those that only load by TMA, for other warps
    complaints: tuple[str, ...] = ()  # what else ptxas says against it
    given_up: int | None = None  # registers a thread that setmaxnreg leaves a producer
    taken: int | None = None  # and that it gives a consumer

    @property
    def full(self) -> InnerLoop | None:
        """The loop over blocks that need no mask: the one between two that do; elsewhere the shortest."""
        if len(self.loops) == 3:
            return self.loops[1]
        return min(self.loops, key=lambda loop: loop.instructions, default=None)

    @property
    def masked(self) -> InnerLoop | None:
        """The costliest of the other loops."""
        others = [loop for loop in self.loops if loop is not self.full]
        return max(others, key=lambda loop: loop.instructions, default=None)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def inspect(compiled: Any, capability: int) -> MachineCode:
    """The facts about a kernel as ``triton.compile`` returns it."""
    metadata = compiled.metadata
    return read_cubin(
        compiled.asm["cubin"],
        metadata.name,
        capability,
        threads=metadata.num_warps * 32,
        shared=metadata.shared,
        tensor_memory=getattr(metadata, "tmem_size", 0),
        serialized=_serialized(compiled, capability),
    )


def read_cubin(
    cubin: bytes,
    kernel: str,
    capability: int,
    *,
    threads: int,
    shared: int,
    tensor_memory: int = 0,
    serialized: int = 0,
    complaints: Sequence[str] = (),
) -> MachineCode:
    """The facts about a kernel of a binary.

    Args:
        cubin: the binary.
        kernel: its (mangled) name there.
        capability: of LIMITS.
        threads: of a block.
        shared: bytes of shared memory that a block is launched with.
        tensor_memory: columns of it.
        serialized, complaints: what ptxas said.
    """
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "kernel.cubin")
        path.write_bytes(cubin)
        registers, local_bytes = _resources(run_tool("cuobjdump", "-res-usage", path), kernel)
        blocks = parse_sass(run_tool("nvdisasm", "-c", path), kernel)
    everything = [i for block in blocks for i in block.instructions]
    loops, overlapped = natural_loops(blocks), beside_products(blocks)
    return MachineCode(
        registers=registers,
        local_bytes=local_bytes,
        spills=_count(everything, _SPILLS),
        shared=shared,
        tensor_memory=tensor_memory,
        ctas_per_sm=ctas_per_sm(capability, registers, threads, shared, tensor_memory),
        tensor_cores=_tensor_cores(everything),
        tma_loads=_count(everything, _TMA),
        serialized=serialized,
        instructions=len(everything),
        loops=tuple(inner_loops(loops, overlapped)),
        producers=tuple(producer_loops(loops)),
        complaints=tuple(complaints),
        given_up=_register_target(everything, "DEALLOC"),
        taken=_register_target(everything, "TRY_ALLOC"),
    )


def ctas_per_sm(capability: int, registers: int, threads: int, shared: int, tensor_memory: int = 0) -> int:
    """How many thread blocks a multiprocessor holds at a time; 0 where not even one fits."""
    limits = LIMITS[capability]
    warps = -(-threads // 32)
    # A warp takes registers in units of 256, all from one partition.
    warps_that_fit = _PARTITIONS * (_PARTITION_REGISTERS // (-(-registers * 32 // 256) * 256))
    fits = [
        limits.blocks,
        limits.threads // (warps * 32),
        warps_that_fit // warps,
        # The system takes 1 KiB a block, and memory is handed out in units of 128 bytes.
        limits.shared_kib * 1024 // (1024 + -(-shared // 128) * 128),
    ]
    if tensor_memory:
        columns = max(32, 1 << (tensor_memory - 1).bit_length())
        fits.append(_TENSOR_MEMORY_COLUMNS // columns)
    return min(fits)


# ------------------------------------------------------------------------------------------------------- the tools


@functools.cache
def find_tool(name: str) -> str | None:
    """cuobjdump or nvdisasm: Triton's own, or a CUDA toolkit's."""
    with contextlib.suppress(ImportError, AttributeError):
        from triton import knobs

        path = str(getattr(knobs.nvidia, name).path)
        if Path(path).exists():
            return path
    toolkit = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which(name) or shutil.which(name, path=f"{toolkit}/bin")


def run_tool(name: str, *arguments: str | Path, directory: str | Path | None = None) -> str:
    """What a tool prints. On the other stream nvdisasm warns of cubins of another CUDA version, which does no harm."""
    tool = find_tool(name)
    if tool is None:
        raise RuntimeError(f"{name} is neither in Triton nor in a CUDA toolkit here")
    done = subprocess.run([tool, *map(str, arguments)], capture_output=True, text=True, check=False, cwd=directory)
    if done.returncode:
        raise RuntimeError(f"{name} failed with exit status {done.returncode}: {done.stderr.strip()[-2000:]}")
    return done.stdout


def _resources(text: str, kernel: str) -> tuple[int, int]:
    """Registers a thread, and bytes of stack and local memory, from `cuobjdump -res-usage`."""
    found = re.search(rf"Function {re.escape(kernel)}:\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    if found is None:
        raise RuntimeError(f"cuobjdump says nothing about the registers of {kernel}: {text.strip()[-500:]}")
    registers, stack, local = map(int, found.groups())
    return registers, stack + local


def _serialized(compiled: Any, capability: int) -> int:
    """How often ptxas says that wgmma instructions are serialized.

    Triton hears it and throws it away unless told to print it, so the last step of its compilation runs once more.
    """
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend

    if "wgmma.mma_async" not in compiled.asm["ptx"]:
        return 0
    backend = make_backend(GPUTarget("cuda", capability, 32))
    options = backend.parse_options(compiled.metadata._asdict())
    log = io.StringIO()
    with knobs.nvidia.scope(), contextlib.redirect_stdout(log):
        knobs.nvidia.dump_ptxas_log = True
        backend.make_cubin(compiled.asm["ptx"], {}, options, capability)
    lines = log.getvalue().splitlines()
    if not any("Used " in line for line in lines):
        raise RuntimeError("Triton did not print what ptxas said, so that nothing is known about serialized wgmma")
    return sum("wgmma" in line and "serialized" in line for line in lines)


# -------------------------------------------------------------------------------------------- reading instructions


def _count(instructions: Iterable[Instruction], opcodes: tuple[str, ...]) -> int:
    return sum(i.opcode.startswith(opcodes) for i in instructions)


def _tensor_cores(instructions: Iterable[Instruction]) -> dict[str, int]:
    """Counts by kind: HMMA, HGMMA, UTCHMMA."""
    kinds = (i.opcode.partition(".")[0] for i in instructions)
    return dict(sorted(Counter(kind for kind in kinds if _TENSOR_CORE.fullmatch(kind)).items()))


def _waits(instructions: Iterable[Instruction]) -> dict[str, int]:
    found = Counter(_wait(i.opcode) for i in instructions)
    return {kind: found[kind] for kind in _WAITS.values() if found[kind]}


def _wait(opcode: str) -> str | None:
    return next((kind for start, kind in _WAITS.items() if opcode.startswith(start)), None)


def _register_target(instructions: Iterable[Instruction], which: str) -> int | None:
    """The number of registers in `setmaxnreg`."""
    found = [i.operands.split(",")[-1] for i in instructions if i.opcode.startswith(f"USETMAXREG.{which}")]
    return max((int(number, 0) for number in found), default=None)


def inner_loops(loops: list[Loop], overlapped: Sequence[int] = ()) -> list[InnerLoop]:
    """The innermost loops that compute: by tensor cores where the kernel has any in loops, else by the plain units.

    Args:
        loops: all of the kernel's.
        overlapped: for each block how many of its exponentials run beside products.
    """
    for works in (_TENSOR_CORE, _ARITHMETIC):
        working = [loop for loop in loops if any(works.match(i.opcode) for i in loop.instructions)]
        if working:
            return [_inner_loop(loop, loops, overlapped) for loop in _innermost(working)]
    return []


def producer_loops(loops: list[Loop]) -> list[InnerLoop]:
    """The innermost loops that wait for a free place and load by TMA what other warps compute with.

    A copy whose operands only the programmer knows to be the same in all lanes stands in a little loop of its own, over
    the different ones: that waits for nothing.
    """

    def loads(loop: Loop) -> bool:
        found = loop.instructions
        return bool(_count(found, _TMA) and _waits(found).get("mbarrier")) and not _tensor_cores(found)

    return [_inner_loop(loop, loops, ()) for loop in _innermost([loop for loop in loops if loads(loop)])]


def _innermost(loops: list[Loop]) -> list[Loop]:
    return [loop for loop in loops if not any(inner.blocks < loop.blocks for inner in loops)]


def _inner_loop(loop: Loop, loops: list[Loop], overlapped: Sequence[int]) -> InnerLoop:
    """Facts about one turn. A wait that is over at once does not turn: the loops that poll again are left out."""
    inside = [inner for inner in loops if inner.blocks < loop.blocks and not _count(inner.instructions, _TMA)]
    polls = {block for inner in inside if len(inner.instructions) <= _POLL for block in inner.blocks}
    blocks = sorted(loop.blocks - polls)
    instructions = [i for block in blocks for i in loop.graph[block].instructions]
    return InnerLoop(
        instructions=len(instructions),
        tensor_cores=sum(_tensor_cores(instructions).values()),
        tma_loads=_count(instructions, _TMA),
        spills=_count(instructions, _SPILLS),
        waits=_waits(instructions),
        exponentials=_count(instructions, ("MUFU.EX2",)),
        overlapped=sum(overlapped[block] for block in blocks) if overlapped else 0,
    )
