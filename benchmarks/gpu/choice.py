"""From the results of a run to the table that "auto" goes by on CUDA tensors."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformer_fast.backends.choice import PATH, Entry, phase_of, read, write

from .record import BAD
from .report import rows_of
from .shapes import SHAPES


def entries_of(data: Mapping[str, Any], results: str) -> list[Entry]:
    """What a run says: for each phase and head_dim our back ends, the fastest first.

    Backward counts with its forward: a call does not say whether its gradients will be wanted, and they come from the
    same back end. Who failed at anything in the run has no place.

    Args:
        data: the JSON of a run.
        results: its name.

    Raises:
        ValueError: it is a dry run's, or has no timings.
    """
    if data["dry_run"]:
        raise ValueError(f"{results} is of a dry run, whose figures mean nothing")
    sound = [name for name in data["backends"] if not _failures(data, name)]
    slowness: dict[tuple[str, int], dict[str, list[float]]] = {}
    for row in rows_of(data, "timing"):
        times = {name: row["times"][name]["ms"] for name in sound if name in row.get("times", {})}
        shape = SHAPES.get(row["name"])
        if times and shape is not None:
            of_key = slowness.setdefault((phase_of(shape.seqlen_q), shape.head_dim), {})
            for name, ms in times.items():
                of_key.setdefault(name, []).append(math.log(ms / min(times.values())))
    if not slowness:
        raise ValueError(f"{results} has no timings of a back end of ours that failed at nothing")
    capability = data["environment"]["capability"]
    return [
        Entry(capability, phase, head_dim, tuple(sorted(found, key=lambda name: statistics.mean(found[name]))), results)
        for (phase, head_dim), found in slowness.items()
    ]


def _failures(data: Mapping[str, Any], name: str) -> list[str]:
    """The rows of a run in which a back end of ours failed."""
    found = []
    for section in data["sections"].values():
        for row in section["rows"]:
            whose = (*row.get("wrong", ()), row.get("backend"), row.get("contestant"), row.get("at"))
            if row["status"] in BAD and name in whose:
                found.append(row.get("name") or row.get("case", ""))
    return found


def choose(data: Mapping[str, Any], results: str, path: Path | None = None) -> list[Entry]:
    """Puts what a run says into the table, in place of what it says of the same machine; returns the new entries."""
    path, fresh = path or PATH, entries_of(data, results)
    kept = [entry for entry in read(path) if entry.capability != fresh[0].capability] if path.exists() else []
    write(path, kept + fresh)
    return fresh
