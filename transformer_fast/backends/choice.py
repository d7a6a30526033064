"""Which of our back ends was the fastest on a machine: what "auto" goes by on CUDA tensors.

The table, ``choice.json``, is made by ``on_gpu.py --choose`` from committed results of ``make gpu``, which it names.
For a machine that has none, "auto" stays with the order of the registry.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

from ..spec import AttentionSpec

PATH = Path(__file__).with_name("choice.json")


class Entry(NamedTuple):
    """One row of the table."""

    capability: str  # "9.0"
    phase: str  # as phase_of has it
    head_dim: int  # the largest that it holds for
    backends: tuple[str, ...]  # the fastest first
    results: str  # the file that it is derived from


def phase_of(seqlen_q: int) -> str:
    """One query row is "decode", all else "forward"; backward has none of its own, since it follows its forward."""
    return "decode" if seqlen_q == 1 else "forward"


def read(path: Path) -> list[Entry]:
    """The entries of a file."""
    found = json.loads(path.read_text(encoding="utf-8"))["entries"]
    return [Entry(**entry | {"backends": tuple(entry["backends"])}) for entry in found]


def write(path: Path, entries: list[Entry]) -> None:
    """One entry a line."""
    lines = ",\n".join(f"  {json.dumps(entry._asdict())}" for entry in sorted(entries))
    path.write_text(f'{{"entries": [\n{lines}\n]}}\n' if lines else '{"entries": []}\n', encoding="utf-8")


@cache
def _entries(path: Path) -> list[Entry]:
    return read(path)


@cache
def _capability(device: torch.device) -> str:
    major, minor = torch.cuda.get_device_capability(device)
    return f"{major}.{minor}"


def fastest(spec: AttentionSpec) -> tuple[str, ...]:
    """Back ends in the order to try them in; none where nothing was measured. Two-byte types alone were."""
    if spec.device.type != "cuda" or spec.dtype.itemsize != 2 or not (entries := _entries(PATH)):
        return ()
    machine, phase, head_dim = _capability(spec.device), phase_of(spec.seqlen_q), max(spec.head_dim, spec.head_dim_v)
    fitting = [e for e in entries if (e.capability, e.phase) == (machine, phase) and e.head_dim >= head_dim]
    return min(fitting, key=lambda e: e.head_dim).backends if fitting else ()
