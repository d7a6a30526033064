"""The one-page HTML report of `verify`."""

from __future__ import annotations

import json
from collections import defaultdict
from typing import Any

#: Which results are shown together in the overview.
GROUPS = {"output": ("out", "out (no grad)"), "lse": ("lse", "lse (no grad)")}


def render(data: dict[str, Any]) -> str:
    """The report as self-contained HTML; `data` as `Report.as_dict()` gives it."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("transformer_fast.testing", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["error"] = lambda value: "-" if value is None else f"{value:.1e}"
    # "<" must not end the script element that carries the data.
    details = json.dumps(_details(data["outcomes"]), separators=(",", ":")).replace("<", "\\u003c")
    return environment.get_template("report.html.j2").render(
        report=data,
        environment=data["environment"],
        failures=[o for o in data["outcomes"] if o["status"] in ("failed", "error")],
        rows=overview(data["outcomes"]),
        targets=list(dict.fromkeys(o["target"] for o in data["outcomes"])),
        dtypes=list(dict.fromkeys(o["dtype"] for o in data["outcomes"])),
        details=details,
    )


def overview(outcomes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per variant, target and dtype, those with failures first.

    Errors are relative (root mean square of the error over that of the oracle), the largest over the row's cases.
    """
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = defaultdict(list)
    for outcome in outcomes:
        groups[outcome["variant"], outcome["target"], outcome["dtype"]].append(outcome)
    rows = [_overview_row(key, members) for key, members in groups.items()]
    return sorted(rows, key=lambda row: not row["bad"])  # stable: otherwise in the order of the suite


def _overview_row(key: tuple[str, str, str], outcomes: list[dict[str, Any]]) -> dict[str, Any]:
    relative: dict[str, dict[str, list[float]]] = {
        group: {"ours": [], "torch": []} for group in ("output", "lse", "gradients")
    }
    shares: list[float] = []
    for verdict in (v for o in outcomes for v in o["verdicts"]):
        shares.append(float("inf") if verdict["used"] is None else verdict["used"])
        group = next((g for g, names in GROUPS.items() if verdict["name"] in names), "gradients")
        if verdict["scale"] and verdict["our_rms"] is not None:
            relative[group]["ours"].append(verdict["our_rms"] / verdict["scale"])
            relative[group]["torch"].append(verdict["torch_rms"] / verdict["scale"])
    statuses = [o["status"] for o in outcomes]
    worst = max(shares, default=0.0)
    return {
        "variant": key[0],
        "target": key[1],
        "dtype": key[2],
        "cases": len(outcomes),
        "passed": statuses.count("passed"),
        "unsupported": statuses.count("unsupported"),
        "bad": statuses.count("failed") + statuses.count("error"),
        "used": worst,
        "used_text": "wrong" if worst == float("inf") else f"{worst:.0%}",
        "errors": {
            group: {who: max(values, default=None) for who, values in both.items()} for group, both in relative.items()
        },
    }


def _details(outcomes: list[dict[str, Any]]) -> list[list[Any]]:
    """The single verdicts, compactly, for the tables that open on a click."""

    def short(value: float | None) -> float | None:
        return None if value is None else float(f"{value:.2e}")

    columns = ("our_error", "torch_error", "allowed", "our_rms", "torch_rms", "allowed_rms", "used")
    return [
        [
            o["variant"],
            o["target"],
            o["dtype"],
            o["case"],
            o["description"],
            o["status"],
            o["message"],
            [[v["name"], int(v["passed"]), v["reason"], *(short(v[c]) for c in columns)] for v in o["verdicts"]],
        ]
        for o in outcomes
    ]
