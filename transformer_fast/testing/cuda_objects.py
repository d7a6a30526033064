"""A C++ kernel as nvcc leaves it: an object file, and beside it what ptxas said.

The object has one kernel, for one machine or several, and the numbers that its launch goes by in a section of its own.
"""

from __future__ import annotations

import re
import struct
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from transformer_fast.testing.machine_code import MachineCode, read_cubin, run_tool

#: Where the numbers stand; see csrc/cuda/instances.py.
FACTS_SECTION = "tf_facts"
_SERIALIZED = re.compile(r"wgmma.*serialized")
_COMPLAINT = re.compile(r"\(C\d+\)|Potential Performance Loss|\bwarning\b|setmaxnreg.*ignored")
_SPILL_WARNING = "Registers are spilled"  # the code itself says so too
_FUNCTION = re.compile(r"Function (\S+):\s+REG:")


class Promise(NamedTuple):
    """What a kernel's struct says of itself."""

    threads: int
    min_blocks: int
    block_m: int
    block_n: int
    shared: int


@dataclass(frozen=True)
class Log:
    """What ptxas said."""

    serialized: int
    complaints: tuple[str, ...]


def read_object(path: Path, capability: int) -> tuple[Promise, MachineCode]:
    """The kernel of an object for a machine; `<object>.log` has to lie beside it.

    Raises:
        RuntimeError: something of it is missing.
    """
    promise = Promise(*struct.unpack("<5i", read_section(path, FACTS_SECTION)))
    log = read_log(path.with_name(f"{path.name}.log"))
    with tempfile.TemporaryDirectory() as directory:
        run_tool("cuobjdump", "-xelf", "all", path.resolve(), directory=directory)
        cubins = [c for c in Path(directory).glob("*.cubin") if re.search(rf"\.sm_{capability}a?\.", c.name)]
        if len(cubins) != 1:
            raise RuntimeError(f"{path} has {len(cubins)} binaries for sm_{capability}; allowed: 1")
        names = _FUNCTION.findall(run_tool("cuobjdump", "-res-usage", cubins[0]))
        if len(names) != 1:
            raise RuntimeError(f"{path} has {len(names)} kernels ({', '.join(names)}); allowed: 1")
        code = read_cubin(
            cubins[0].read_bytes(),
            names[0],
            capability,
            threads=promise.threads,
            shared=promise.shared,
            serialized=log.serialized,
            complaints=log.complaints,
        )
    return promise, code


def read_log(path: Path) -> Log:
    """What ptxas complains of. It speaks of every kernel (`-Xptxas -v`), so silence is no good sign."""
    if not path.exists():
        raise RuntimeError(f"{path} is missing: what ptxas said about the kernel is not known")
    lines = path.read_text(encoding="utf-8").splitlines()
    if not any("Used " in line and " registers" in line for line in lines):
        raise RuntimeError(f"{path} has no word about registers: it is not what ptxas says with -v")
    found = [line.strip() for line in lines if _COMPLAINT.search(line) and _SPILL_WARNING not in line]
    others = tuple(line for line in found if not _SERIALIZED.search(line))
    return Log(len(found) - len(others), others)


def read_section(path: Path, name: str) -> bytes:
    """A section of an object file, by the format's own tables (ELF64, little-endian)."""
    data = path.read_bytes()
    if data[:6] != b"\x7fELF\x02\x01":
        raise RuntimeError(f"{path} is not a 64-bit object file")
    (table,) = struct.unpack_from("<Q", data, 0x28)
    size, count, names_index = struct.unpack_from("<3H", data, 0x3A)
    headers = [struct.unpack_from("<IIQQQQ", data, table + size * i) for i in range(count)]
    names = headers[names_index][4]
    for name_at, _, _, _, offset, length in headers:
        begin = names + name_at
        if data[begin : data.index(b"\0", begin)].decode() == name:
            return data[offset : offset + length]
    raise RuntimeError(f"{path} has no section {name}: it is no kernel of ours, or an old build's")
