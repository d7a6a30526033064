"""From the times of a row to what is said of it: TFLOP/s, shares of the machine's limits, ratios, goals."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .peers import FAMILIES
from .shapes import SHAPES

#: The goals were set for this device; elsewhere a figure stands beside them without a verdict.
GOAL_DEVICE = "H100"


def completed(row: dict[str, Any], environment: Mapping[str, Any]) -> dict[str, Any]:
    """A timed row with the figures of each of ours, and its goals beside what was reached."""
    if row.get("kind") != "timing" or not row.get("times"):
        return row
    limits, shape = environment.get("limits", {}), SHAPES[row["name"]]
    figures = {name: _figures(row, name, limits) for name in row["ratios"]}
    on_goal_device = GOAL_DEVICE in environment.get("device", "") and not row.get("dry_run")
    goals = [
        {
            "backend": name,
            "figure": goal.figure,
            "at_least": goal.at_least,
            "reached": found.get(goal.figure),
            "met": _met(found.get(goal.figure), goal.at_least) if on_goal_device else None,
        }
        for name, found in figures.items()
        for goal in shape.goals
    ]
    return row | {"figures": figures, "goals": goals}


def _met(reached: float | None, at_least: float) -> bool | None:
    return None if reached is None else reached >= at_least


def _figures(row: Mapping[str, Any], name: str, limits: Mapping[str, float]) -> dict[str, Any]:
    """Of one of ours: tflops, share_of_matmul, gigabytes_per_second, share_of_copy, over_<peer family>."""
    seconds = row["times"][name]["ms"] / 1e3
    found: dict[str, Any] = {"tflops": row["flops"] / seconds / 1e12}
    if limits.get("matmul_flops"):
        found["share_of_matmul"] = row["flops"] / seconds / limits["matmul_flops"]
    if row["is_decode"]:
        found["gigabytes_per_second"] = row["bytes_read"] / seconds / 1e9
        if limits.get("copy_bytes_per_second"):
            found["share_of_copy"] = row["bytes_read"] / seconds / limits["copy_bytes_per_second"]
    ratios = row["ratios"][name]
    for family, members in {"sdpa": ("sdpa",), "flex": ("flex",), "torch": ("sdpa", "flex")}.items():
        best = fastest(ratios, members)
        if best is not None:
            found[f"best_{family}"], found[f"over_{family}"] = best, ratios[best]["median"]
    if f"{name}_unpadded" in ratios:
        found["over_unpadded"] = ratios[f"{name}_unpadded"]["median"]
    return found


def fastest(ratios: Mapping[str, Mapping[str, float]], families: tuple[str, ...]) -> str | None:
    """The peer of these families that is closest to ours."""
    mine = [name for name in ratios if FAMILIES.get(name) in families]
    return min(mine, key=lambda name: ratios[name]["median"]) if mine else None


FIGURE_WORDS = {
    "tflops": "{:.0f} TFLOP/s",
    "share_of_copy": "{:.0%} of the copy",
    "over_sdpa": "{:.2f}x the best SDPA",
    "over_flex": "{:.2f}x flex_attention",
    "over_unpadded": "{:.2f}x the same without lengths",
}
