"""The JSON of a run as Markdown; it can be made again at any time with ``--render``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .figures import FIGURE_WORDS, GOAL_DEVICE
from .record import BAD
from .shapes import SHAPES

Row = Mapping[str, Any]

_PHRASES = {"forward": "Forward", "backward": "Backward (alone)", "variants": "Variants", "decode": "Decoding"}


def write_markdown(data: Mapping[str, Any], path: Path) -> Path:
    """Writes the page of a run; returns its path."""
    path.write_text(to_markdown(data), encoding="utf-8")
    return path


def to_markdown(data: Mapping[str, Any]) -> str:
    """Everything that was found, and what was not run."""
    lines = [*_head(data), *_goals(data), *_speed(data), *_models(data), *_launch(data), *_instructions(data)]
    lines += [*_conformance(data), *_sanitizer(data), *_compilation(data), *_missing(data), *_sections(data)]
    return "\n".join(lines) + "\n"


def rows_of(data: Mapping[str, Any], kind: str) -> list[Row]:
    """All rows of a kind, in the order of the run."""
    return [row for section in data["sections"].values() for row in section["rows"] if row["kind"] == kind]


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A table with a blank line after it; nothing without rows."""
    body = [f"| {' | '.join(row)} |" for row in rows]
    return [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}", *body, ""] if body else []


def one_line(row: Row) -> str:
    """A row for whoever watches the run."""
    words = [row.get("name") or f"{row['case']} {row['dtype']}", row.get("backend", "")]
    name = " ".join(word for word in words if word)
    parts = [f"{row['status']}"] if row["status"] != "ok" else []
    for own, found in row.get("figures", {}).items():
        rate = f"{found['gigabytes_per_second']:.0f} GB/s" if row["is_decode"] else f"{found['tflops']:.3g} TFLOP/s"
        parts.append(f"{own} {_ms(row['times'][own]['ms'])}, {rate}")
        parts += [f"{found['over_torch']:.2f}x {found['best_torch']}"] if "over_torch" in found else []
    if row["status"] in BAD and row.get("text"):
        parts.append(str(row["text"]).strip().splitlines()[-1][:200])
    if "first_call_seconds" in row:
        parts.append(f"{row.get('contestant', '')} {row['first_call_seconds']:.1f} s")
    parts += [f"{who} {us:.1f} us" for who, us in row.get("host_us", {}).items()]
    parts += [row["summary"]] if row.get("summary") else []
    return f"{name}{': ' if parts else ''}{', '.join(parts)} ({row.get('took', 0):.1f} s)"


def _ms(ms: float) -> str:
    return f"{ms:.3f} ms" if ms < 1 else f"{ms:.2f} ms"


# ------------------------------------------------------------------------------------------------------------ parts


def _head(data: Mapping[str, Any]) -> list[str]:
    facts = data["environment"]
    limits = facts.get("limits", {})
    lines = [f"# Attention on {facts.get('device', 'an unknown device')}, checked and measured", ""]
    if data["dry_run"]:
        where = "in Triton's interpreter and our emulator"
        lines += [f"**A dry run: tiny shapes on a CPU, {where}. No figure here means anything.**", ""]
    if not data["complete"]:
        why = data["ended"] or "still running, or ended from outside"
        lines += [f"**Cut short ({why}): this is what it has.**", ""]
    versions = [f"{name} {facts[name]}" for name in ("torch", "triton", "cuda", "cudnn", "driver") if facts.get(name)]
    commit = facts.get("commit") or "installed"
    dirty = " with uncommitted changes" if facts.get("dirty") else ""
    lines.append(
        f"transformer_fast {facts.get('transformer_fast', '?')} (commit {commit}{dirty}); {', '.join(versions)}; "
        f"{data['started']}, {data['seconds']:.0f} s."
    )
    for name, reason in data.get("left_out", {}).items():
        lines.append(f"Without the back end {name}: {reason}.")
    if limits:
        lines.append(
            f"Limits measured in this run: a bfloat16 product {limits['matmul_flops'] / 1e12:.3g} TFLOP/s, a copy "
            f"{limits['copy_bytes_per_second'] / 1e9:.4g} GB/s, read and written."
        )
    if facts.get("clocks"):
        lines.append("Clocks: " + ", ".join(f"{name} {value}" for name, value in facts["clocks"].items()) + ".")
    text = (
        "Every time is the median of calls with a cold cache, ours and the peers in turn in one run; p20 to p80 in "
        "brackets. Ratios are the peer's time over ours, round by round. Operations count visible pairs only (4 a pair "
        "and column forward, 10 backward). A result that the float64 check refuses has no time."
    )
    return [*lines, "", text, ""]


def _goals(data: Mapping[str, Any]) -> list[str]:
    if "timings" not in data["planned"]:
        return []
    timed = {row["name"]: row for row in rows_of(data, "timing")}
    rows = []
    for shape in SHAPES.values():
        row: Row = timed.get(shape.name, {"status": "not run"})
        title = f"{shape.title}, head_dim {shape.head_dim}, {shape.seqlen_k // 1024}k"
        for goal in row.get("goals", []):
            words = FIGURE_WORDS[goal["figure"]]
            reached = "-" if goal["reached"] is None else words.format(goal["reached"])
            verdict = {True: "met", False: "**not met**", None: "-"}[goal["met"]]
            rows.append([title, goal["backend"], words.format(goal["at_least"]), reached, verdict])
        for aim in () if row.get("goals") else shape.goals:
            rows.append([title, "", FIGURE_WORDS[aim.figure].format(aim.at_least), "-", f"**{row['status']}**"])
    note = f"Set for an {GOAL_DEVICE}; on other devices the figure stands without a verdict."
    return ["## Goals", "", note, "", *table(["case", "back end", "goal", "reached", ""], rows)]


def _speed(data: Mapping[str, Any]) -> list[str]:
    timed, lines = rows_of(data, "timing"), []
    for group in dict.fromkeys(row["group"] for row in timed if "group" in row):
        mine = [row for row in timed if row.get("group") == group]
        peers = list(dict.fromkeys(n for row in mine for n in row["times"] if n not in row["ratios"]))
        head = ["case", "back end", "ms", "rate", "of the limit", "best of PyTorch", *peers]
        rows = [cells for row in sorted(mine, key=_size) for cells in _speed_cells(row, peers)]
        lines += [f"## {_PHRASES.get(group, group)}", "", *table(head, rows)]
        notes = {f"{name}: {note}" for row in mine for name, note in row.get("notes", {}).items()}
        lines += [f"- {note}." for note in sorted(notes)] + ([""] if notes else [])
    lost = [row for row in timed if "group" not in row]
    return lines + table(["not timed", "why"], [[row["name"], _cell(row)] for row in lost])


def _size(row: Row) -> tuple[Any, ...]:
    """The sweep by mask, head_dim and length; other groups as they were run."""
    parts = row["name"].split("_")
    if row["group"] not in ("forward", "backward") or len(parts) != 4:
        return ()
    return (parts[1], int(parts[2].removeprefix("hd")), int(parts[3].removesuffix("k")))


def _speed_cells(row: Row, peers: Sequence[str]) -> Iterable[list[str]]:
    case = f"{row['title']}<br>{row['description']}"
    if not row.get("figures"):
        yield [case, "", f"**{row['status']}**", "", "", "", *("" for _ in peers)]
        return
    for name, found in row["figures"].items():
        time = row["times"][name]
        if row["is_decode"]:
            rate, share = f"{found['gigabytes_per_second']:.0f} GB/s", found.get("share_of_copy")
        else:
            rate, share = f"{found['tflops']:.3g} TFLOP/s", found.get("share_of_matmul")
        best = f"**{found['over_torch']:.2f}x** {found['best_torch']}" if "over_torch" in found else "-"
        ratios = [_ratio(row["ratios"][name].get(peer)) for peer in peers]
        yield [
            case,
            name,
            f"{time['ms']:.4g} ({time['p20']:.4g}-{time['p80']:.4g})",
            rate,
            "-" if share is None else f"{share:.0%}",
            best,
            *ratios,
        ]


def _ratio(ratio: Mapping[str, float] | None) -> str:
    return "-" if ratio is None else f"{ratio['median']:.2f}x ({ratio['p20']:.2f}-{ratio['p80']:.2f})"


def _models(data: Mapping[str, Any]) -> list[str]:
    rows = []
    for row in rows_of(data, "model"):
        for name, time in row.get("times", {}).items():
            ratio = _ratio(row["ratios"].get(name, {}).get("sdpa"))
            speed = f"{row['tokens'] / time['ms']:.0f}"
            peak = f"{row['peaks'].get(name, 0) / 2**30:.1f}"
            rows.append([f"{row['title']}<br>{row['description']}", name, f"{time['ms']:.4g}", speed, ratio, peak])
        if not row.get("times"):
            rows.append([row["name"], "", f"**{row['status']}**", "", _cell(row), ""])
    head = ["model", "attention", "ms", "thousand tokens/s", "SDPA's time over ours", "peak GiB"]
    return ["## A model's step", "", *table(head, rows)] if rows else []


def _launch(data: Mapping[str, Any]) -> list[str]:
    calls = [
        [row["title"], ", ".join(f"{who} {us:.1f} us" for who, us in row.get("host_us", {}).items()) or _cell(row)]
        for row in rows_of(data, "launch")
        if "title" in row
    ]
    rows = list(calls)
    for row in rows_of(data, "graph"):
        result = f"{row['replay_us']:.1f} us a replay" if row["status"] == "ok" else f"**{row['status']}** {_cell(row)}"
        rows.append([f"CUDA graph, {row['backend']}", result])
    return ["## What a call costs on the host", "", *table(["call", "time"], rows)] if rows else []


def _instructions(data: Mapping[str, Any]) -> list[str]:
    """Each instruction by itself; only those that are wrong are named."""
    rows = rows_of(data, "instruction")
    if not rows:
        return []
    lines = ["## Instructions", ""]
    for backend in dict.fromkeys(row["backend"] for row in rows):
        mine = [row for row in rows if row["backend"] == backend]
        counts = Counter("failed" if row["status"] in BAD else row["status"] for row in mine)
        lines += [f"{backend}: " + ", ".join(f"{count} {status}" for status, count in counts.items()) + ".", ""]
    wrong = [[row["name"], row["status"], _cell(row)] for row in rows if row["status"] in BAD]
    return lines + table(["instruction", "", ""], wrong)


def _conformance(data: Mapping[str, Any]) -> list[str]:
    rows = rows_of(data, "conformance")
    if not rows:
        return []
    lines = ["## Conformance", "", "Against the float64 oracle by the tolerance rule: forward, lse, all gradients.", ""]
    cells = []
    for backend in dict.fromkeys(row["backend"] for row in rows):
        for dtype in dict.fromkeys(row["dtype"] for row in rows):
            mine = [row for row in rows if (row["backend"], row["dtype"]) == (backend, dtype)]
            counts = Counter("failed" if row["status"] in BAD else row["status"] for row in mine)
            worst = max((row.get("used") or 0.0 for row in mine), default=0.0)
            shown = [str(counts[status]) for status in ("passed", "failed", "unsupported")]
            cells.append([backend, dtype, *shown, f"{worst:.0%}"])
    lines += table(["back end", "dtype", "passed", "failed", "unsupported", "most of the allowance used"], cells)
    not_run = sum(len(s.get("not_run", [])) for n, s in data["sections"].items() if n.startswith("conformance"))
    lines += [f"{not_run} more were not run: the time was used up.", ""] if not_run else []
    bad = [row for row in rows if row["status"] in BAD]
    for row in bad[:20]:
        lines += ["```text", str(row.get("text", row["status"])).strip()[-2500:], "```", ""]
    return lines + ([f"... and {len(bad) - 20} more, in the JSON.", ""] if len(bad) > 20 else [])


def _sanitizer(data: Mapping[str, Any]) -> list[str]:
    rows = rows_of(data, "sanitizer")
    section = data["sections"].get("sanitizer", {})
    if section.get("status") == "skipped":
        return ["## Memory and races", "", f"Not checked: {section['text']}.", ""]
    cells = [[row["name"], row["status"], row.get("summary", ""), _cell(row)] for row in rows]
    return ["## Memory and races", "", *table(["tool", "", "summary", ""], cells)] if rows else []


def _compilation(data: Mapping[str, Any]) -> list[str]:
    rows = [row for row in rows_of(data, "compile") if "first_call_seconds" in row]
    if not rows:
        return []
    cells = []
    for who in dict.fromkeys(row["contestant"] for row in rows):
        times = [row["first_call_seconds"] for row in rows if row["contestant"] == who]
        cells.append([who, str(len(times)), f"{sum(times) / len(times):.1f}", f"{max(times):.1f}"])
    return ["## First calls, with compilation", "", *table(["", "programs", "mean s", "longest s"], cells)]


def _missing(data: Mapping[str, Any]) -> list[str]:
    """Why peers are missing, each reason once with the cases it holds for; and what of ours was refused."""
    reasons: dict[tuple[str, str], list[str]] = {}
    timed = [row for row in rows_of(data, "timing") if "missing" in row]
    for row in timed:
        for name, reason in row["missing"].items():
            reasons.setdefault((name, reason), []).append(row["name"])
    notes = [f"- no {name} in {_places(cases, len(timed))}: {reason}" for (name, reason), cases in reasons.items()]
    refused = [row for row in (*timed, *rows_of(data, "model")) if row["status"] in BAD]
    wrong = [f"- **{row['name']} is {row['status']}, so it has no speed**: {_cell(row)}" for row in refused]
    return ["## Who is missing, and why", "", *wrong, *notes, ""] if notes or wrong else []


def _places(cases: Sequence[str], of_all: int) -> str:
    if len(cases) == of_all:
        return "any case"
    return ", ".join(cases) if len(cases) <= 6 else f"{len(cases)} of {of_all} cases, {cases[0]} among them"


def _sections(data: Mapping[str, Any]) -> list[str]:
    cells, details = [], []
    for name, section in data["sections"].items():
        left = section.get("not_run", [])
        cells.append([name, section["status"], f"{section['seconds']:.0f}", str(len(section["rows"])), str(len(left))])
        if section["status"] == "failed":
            details += [f"{name} failed:", "", "```text", section["text"].strip()[-3000:], "```", ""]
        if left and not name.startswith("conformance"):
            details += [f"{name}, not run: {', '.join(left)}.", ""]
    never = [name for name in data["planned"] if name not in data["sections"]]
    details += [f"Not begun: {', '.join(never)}.", ""] if never else []
    return ["## Sections", "", *table(["section", "status", "s", "rows", "not run"], cells), *details]


def _cell(row: Row) -> str:
    """A row's text as one cell of a table."""
    text = str(row.get("text", "")).strip().replace("|", "\\|")
    return "<br>".join(text.splitlines()[-6:])[:800]
