"""Tile sizes, warps and stages: one table by (capability, phase, head_dim), and the sizes of a launch.

Each row is a compile that was inspected: ``transformer-fast kernels`` compiles every one of them, reads the machine
code and fails where a row spills, loses its tensor cores or has fewer programs on a multiprocessor than it says.
No row has been timed on a GPU yet.
"""

from __future__ import annotations

from typing import NamedTuple

PHASES = ("forward", "decode", "combine", "preprocess", "dkdv", "dk", "dv", "dq", "dbias")
HEAD_DIMS = (64, 128, 256, 512)
#: A split has more blocks than this: a shorter one costs more in the merge than it saves.
MIN_SPLIT_BLOCKS = 4


class Config(NamedTuple):
    """How one kernel is compiled: ``block_m`` rows, ``block_n`` keys; ``ctas_per_sm`` is what the row promises.

    ``persistent``: uneven work is taken job by job by programs that stay, which spares a program's start per tile. Left
    out where the loop around the loops costs spills; the hardware then hands out the jobs, in the same order.
    ``tma``: blocks come by tensor descriptors where the machine and the tensors allow it. Not where mma.sync takes
    from registers what stays over the loop: it spilled on 12.0.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    ctas_per_sm: int = 1
    persistent: bool = False
    tma: bool = True


class Machine(NamedTuple):
    """What the table is chosen by."""

    capability: int  # 80 for 8.0
    num_sms: int
    l2_bytes: int
    is_interpreted: bool = False

    @property
    def has_tma(self) -> bool:
        """Tensor descriptors are loaded by hardware from compute capability 9.0 on."""
        return self.capability >= 90


_C = Config
_Row = tuple[Config | None, Config | None, Config | None, Config | None]  # by HEAD_DIMS
# Two-byte types on the families of machines that differ: 8.0 (164 KB of shared memory, mma.sync), 8.6 with 8.9 and 12.x
# (100 KB, mma.sync), 9.0 (228 KB, wgmma) and 10.x (228 KB, tcgen05). Where "dkdv" has no row, "dk" and "dv" are two
# launches, since the sums of both would not fit into the registers.
_HALF: dict[int, dict[str, _Row]] = {
    80: {
        "forward": (_C(128, 64, 8, 3), _C(128, 32, 8, 3), _C(64, 32, 8, 2), _C(32, 16, 8, 2)),
        "decode": (_C(16, 128, 4, 3, 2), _C(16, 64, 4, 3), _C(16, 32, 4, 2), _C(16, 16, 4, 2, 2)),
        "dkdv": (_C(64, 128, 8, 2), _C(32, 64, 8, 2), _C(32, 32, 8, 2), _C(16, 16, 8, 2)),
        "dq": (_C(128, 64, 8, 2), _C(64, 32, 4, 2), _C(64, 32, 8, 2), _C(32, 16, 8, 2)),
        "dbias": (_C(64, 32, 4, 1), _C(64, 32, 8, 1), _C(16, 64, 8, 1), _C(16, 32, 8, 1)),
    },
    86: {
        "forward": (_C(128, 64, 4, 3, 2), _C(128, 64, 8, 3), _C(64, 32, 8, 2), _C(32, 16, 8, 2)),
        "decode": (_C(16, 128, 4, 3), _C(16, 128, 4, 2), _C(16, 32, 4, 3), _C(16, 16, 4, 2, 2)),
        "dkdv": (
            _C(32, 64, 4, 2, 2, tma=False),
            _C(64, 64, 8, 2, tma=False),
            _C(32, 32, 8, 2, tma=False),
            _C(16, 16, 8, 1, tma=False),
        ),
        "dq": (
            _C(128, 64, 8, 2, tma=False),
            _C(128, 32, 8, 2, tma=False),
            _C(32, 32, 4, 2, tma=False),
            _C(32, 16, 8, 2, tma=False),
        ),
        "dbias": (_C(64, 32, 4, 1), _C(64, 32, 8, 1), _C(16, 64, 8, 1), _C(16, 32, 8, 1)),
    },
    90: {
        "forward": (_C(128, 128, 8, 2, 1, True), _C(128, 128, 8, 2, 1, True), _C(128, 64, 8, 2), _C(64, 32, 8, 2)),
        "decode": (_C(16, 128, 4, 3, 3), _C(16, 128, 4, 2, 2), _C(16, 32, 4, 3, 3), _C(16, 32, 4, 2, 2)),
        "dkdv": (_C(64, 128, 8, 2), _C(32, 128, 8, 2), None, _C(32, 16, 8, 2, tma=False)),
        "dk": (None, None, _C(32, 128, 8, 2), None),
        "dv": (None, None, _C(64, 128, 8, 2), None),
        "dq": (_C(128, 64, 8, 2), _C(128, 64, 8, 2), _C(64, 64, 8, 2), _C(32, 16, 8, 2)),
        "dbias": (_C(64, 64, 4, 1), _C(64, 64, 8, 1), _C(64, 64, 8, 1), _C(64, 16, 8, 1)),
    },
    100: {
        "forward": (_C(128, 128, 8, 2, 1, True), _C(128, 128, 8, 2), _C(64, 64, 8, 2), _C(32, 16, 4, 2, 2)),
        "decode": (_C(16, 128, 4, 3, 3), _C(16, 128, 4, 2, 2), _C(16, 64, 4, 2, 2), _C(16, 32, 4, 2, 2)),
        "dkdv": (_C(32, 64, 4, 2), _C(32, 128, 8, 2), None, _C(16, 16, 8, 2, tma=False)),
        "dk": (None, None, _C(32, 128, 8, 2), None),
        "dv": (None, None, _C(32, 128, 8, 2), None),
        "dq": (_C(128, 64, 8, 2), _C(128, 32, 8, 2), _C(64, 64, 8, 2), _C(64, 16, 8, 2)),
        "dbias": (_C(64, 64, 4, 1), _C(64, 64, 8, 1), _C(64, 64, 8, 1), _C(16, 32, 8, 1)),
    },
}
#: float32, on every machine: multiply-adds, unless TF32 was asked for. Their operands lie in registers, so tiles are
#: small, and blocks come by pointers: what descriptors loaded spilled thousands of registers (Triton 3.6 and 3.7).
_FLOAT32: dict[str, _Row] = {
    "forward": (_C(64, 32, 8, 1), _C(32, 32, 8, 1), _C(32, 16, 8, 1), _C(16, 16, 8, 1)),
    "decode": (_C(16, 32, 4, 1, 2), _C(16, 32, 4, 1, 2), _C(16, 16, 8, 1), _C(16, 16, 8, 1)),
    "dkdv": (_C(32, 32, 4, 1, 2), _C(16, 32, 8, 1, 2), _C(16, 16, 4, 1, 2), _C(16, 16, 8, 1)),
    "dq": (_C(32, 32, 8, 1), _C(16, 16, 8, 1, 2), _C(16, 16, 8, 1, 2), _C(16, 16, 16, 1)),
    "dbias": (_C(32, 32, 8, 1), _C(16, 32, 8, 1), _C(16, 16, 8, 1, 2), _C(16, 16, 4, 1)),
}
#: Kernels that only stream rows: as many at a time as give each thread whole vectors to load, and still fit.
_STREAM: dict[str, _Row] = {
    "combine": (_C(8, 0, 4, 1), _C(8, 0, 4, 1), _C(8, 0, 4, 1), _C(8, 0, 4, 1)),
    "preprocess": (_C(16, 0, 4, 1), _C(16, 0, 4, 1), _C(8, 0, 4, 1), _C(4, 0, 4, 1)),
}
#: The interpreter pays for operations, not for elements; tiles small enough that a test has several of them, and every
#: way of the table: a queue of jobs, one launch for the gradients of keys and values and two.
_INTERPRETED: dict[str, _Row] = {
    "forward": (_C(64, 64, 4, 1, 1, True), _C(64, 64, 4, 1, 1, True), _C(64, 32, 4, 1), _C(64, 32, 4, 1)),
    "decode": (_C(16, 128, 4, 1), _C(16, 128, 4, 1), _C(16, 32, 4, 1), _C(16, 32, 4, 1)),
    "dkdv": (_C(32, 64, 4, 1), _C(32, 64, 4, 1), None, None),
    "dk": (None, None, _C(32, 32, 4, 1), _C(32, 32, 4, 1)),
    "dv": (None, None, _C(32, 32, 4, 1), _C(32, 32, 4, 1)),
    "dq": (_C(32, 64, 4, 1), _C(32, 64, 4, 1), _C(32, 32, 4, 1), _C(32, 32, 4, 1)),
    "dbias": (_C(32, 64, 4, 1), _C(32, 64, 4, 1), _C(32, 32, 4, 1), _C(32, 32, 4, 1)),
}
_NOTHING: _Row = (None, None, None, None)


def family(capability: int) -> int:
    """The row of the table that a compute capability uses.

    Raises:
        ValueError: it is below 8.0, where bfloat16 and cp.async are missing.
    """
    if capability < 80:
        raise ValueError(f"capability is {capability}; allowed: 80 (compute capability 8.0) and up")
    if capability in (80, 87):
        return 80
    if capability < 90 or capability >= 120:
        return 86
    return 90 if capability < 100 else 100


def config_for(machine: Machine, phase: str, head_dim: int, itemsize: int) -> Config:
    """The row of the table for a kernel.

    Args:
        phase: one of PHASES.
        head_dim: the larger of head_dim and value head_dim.
        itemsize: bytes of an element.
    """
    column = next(i for i, size in enumerate(HEAD_DIMS) if head_dim <= size)
    if phase in _STREAM:
        table = _STREAM
    elif machine.is_interpreted:
        table = _INTERPRETED
    else:
        table = _FLOAT32 if itemsize == 4 else _HALF[family(machine.capability)]
    config = table.get(phase, _NOTHING)[column]
    if config is None:
        raise KeyError(f"no {phase} at head_dim {head_dim} on {machine}")
    return config


def candidates(machine: Machine, phase: str, head_dim: int, itemsize: int) -> list[Config]:
    """What tuning tries for a kernel: the row of the table first, and its neighbours.

    Fewer keys a block, one stage more or less, jobs by queue or by grid: what cannot need more registers than the row
    that was inspected, except that one stage more needs more shared memory and may not fit.
    """
    row = config_for(machine, phase, head_dim, itemsize)
    found = [row]
    if row.block_n >= 32:
        found.append(row._replace(block_n=row.block_n // 2))
        found.append(row._replace(block_n=row.block_n // 2, num_stages=row.num_stages + 1))
    found += [row._replace(num_stages=stages) for stages in (row.num_stages - 1, row.num_stages + 1) if stages > 0]
    if row.persistent:
        found.append(row._replace(persistent=False))
    if row.tma and machine.has_tma:
        found.append(row._replace(tma=False))
    return found


def largest_head_dim(machine: Machine, itemsize: int) -> int:
    """Beyond 256, float32 needs more shared memory than machines of 100 KB a multiprocessor have."""
    small = family(machine.capability) == 86 and not machine.is_interpreted
    return HEAD_DIMS[-2] if small and itemsize == 4 else HEAD_DIMS[-1]


def key_phases(machine: Machine, head_dim: int, itemsize: int) -> tuple[str, ...]:
    """The launches that give the gradients of key and value: one, or two where the table has no row for both."""
    try:
        config_for(machine, "dkdv", head_dim, itemsize)
    except KeyError:
        return ("dk", "dv")
    return ("dkdv",)


def num_splits(jobs: int, slots: int, blocks: int) -> int:
    """Into how many parts the keys of a tile are divided.

    One, where the tiles fill four fifths of the machine by themselves. Otherwise the least number whose last wave of
    programs is nearly as full as the best number's (85%, as in Flash-Decoding's heuristic), never so many that a part
    has MIN_SPLIT_BLOCKS blocks or fewer.

    Args:
        jobs: tiles of rows over all heads and batch entries.
        slots: programs that run at the same time.
        blocks: blocks of keys that a tile may see.
    """
    most = min(blocks // (MIN_SPLIT_BLOCKS + 1), 128, slots)
    if jobs == 0 or jobs >= 0.8 * slots or most <= 1:
        return 1

    def share_of_waves(splits: int) -> float:
        waves = jobs * splits / slots
        return waves / -(-jobs * splits // slots)

    best = max(share_of_waves(n) for n in range(1, most + 1))
    return next(n for n in range(1, most + 1) if share_of_waves(n) >= 0.85 * best)


def section_of(machine: Machine, heads: int, bytes_a_head: int) -> int:
    """How many heads go through their tiles together: as many as keep K and V in half of the level-2 cache."""
    return max(1, min(heads, machine.l2_bytes // 2 // max(1, bytes_a_head)))
