"""Rows as Markdown and JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformer_fast.testing.environment import environment

from .runner import Row


def write_report(rows: Sequence[Row], directory: str | Path, *, stem: str = "bench") -> tuple[Path, Path]:
    """Writes `<stem>.json` and `<stem>.md` into a directory, which is made if need be; returns both paths."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    facts = environment()
    json_path, markdown_path = directory / f"{stem}.json", directory / f"{stem}.md"
    data = {"environment": facts, "rows": [asdict(row) for row in rows]}
    json_path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    markdown_path.write_text(to_markdown(rows, facts), encoding="utf-8")
    return json_path, markdown_path


def to_markdown(rows: Sequence[Row], facts: dict[str, Any]) -> str:
    """A page with one table per dtype."""
    lines = [
        "# Attention on the CPU, measured",
        "",
        f"{facts['processor']}, {facts['threads']} threads of {facts['cores']} cores; transformer_fast "
        f"{facts['transformer_fast']} ({facts['commit'] or 'installed'}), torch {facts['torch']}; {facts['date']}.",
        "",
        "Ratios are the peer's time over ours: medians over pairs of neighbouring samples, with the 20th and 80th "
        "percentile of the ratio to SDPA. Every result was checked against the float64 oracle before it was timed. "
        "Operations count visible pairs only.",
        "",
    ]
    for dtype in dict.fromkeys(row.dtype for row in rows):
        lines += _table([row for row in rows if row.dtype == dtype], dtype)
    lines += _notes(rows)
    return "\n".join(lines) + "\n"


def _table(rows: Sequence[Row], dtype: str) -> list[str]:
    others = [name for name in dict.fromkeys(n for r in rows for n in (*r.peers, *r.missing)) if name != "sdpa"]
    head = ["case", "ours (ms)", "SDPA", "goal", *others, "rate", "of peak"]
    isas = ", ".join(dict.fromkeys(row.isa or "-" for row in rows))
    lines = [f"## {dtype} ({isas})", "", f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
    for row in rows:
        sdpa = row.peers.get("sdpa")
        cells = [
            f"{row.title}<br>{row.description}",
            f"{row.ours_ms:.3g}",
            f"**{sdpa.ratio:.2f}x** ({sdpa.p20:.2f}-{sdpa.p80:.2f})" if sdpa else "-",
            f"{row.goal:g}x {row.goal_peer}" if row.goal and row.goal_applies else "-",
            *(f"{row.peers[name].ratio:.2f}x" if name in row.peers else "-" for name in others),
            rate(row),
            f"{row.fraction_of_peak:.0%}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def rate(row: Row) -> str:
    """What a row reached, in the unit of what limits it."""
    if row.gigabytes_per_second is not None:
        return f"{row.gigabytes_per_second:.1f} GB/s"
    return f"{row.tflops * 1e3:.0f} GFLOP/s"


def _notes(rows: Sequence[Row]) -> list[str]:
    """Peaks, and why peers are missing."""
    lines = []
    peaks = {(row.bound, "" if row.bound == "memory" else row.dtype): row.peak for row in rows}
    for (bound, dtype), peak in peaks.items():
        text = f"reading memory: {peak / 1e9:.1f} GB/s" if bound == "memory" else f"{dtype}: {peak / 1e9:.0f} GFLOP/s"
        lines.append(f"- Measured peak, {text}.")
    return lines + [f"- {note}." for note in missing_notes(rows)]


def missing_notes(rows: Sequence[Row]) -> list[str]:
    """Why peers are missing, each reason once with the cases it holds for."""
    reasons: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        for name, reason in row.missing.items():
            reasons.setdefault((name, reason), []).append(row)
    notes = []
    for (name, reason), missed in reasons.items():
        places = []
        for dtype in dict.fromkeys(row.dtype for row in missed):
            cases = [row.case for row in missed if row.dtype == dtype]
            everywhere = len(cases) == sum(row.dtype == dtype for row in rows)
            places.append(f"any {dtype} case" if everywhere else f"{', '.join(cases)} ({dtype})")
        notes.append(f"no {name} in {'; '.join(places)}: {reason}")
    return notes
