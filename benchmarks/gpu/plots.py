"""Pictures of a run, where matplotlib is installed: rates over lengths, and times against the peers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .report import rows_of

#: Of a contestant, the same in every picture; the others take what is left.
_COLORS = {"triton": "#c0392b", "cuda": "#7d3c98", "sdpa_flash": "#2e86c1", "sdpa_cudnn": "#239b56", "flex": "#b9770e"}


def write_plots(data: Mapping[str, Any], json_path: Path) -> list[Path]:
    """Writes `<stem>-forward.png` and so on beside the JSON; returns the paths.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    written = []
    for name, draw in {"forward": _sweep, "backward": _sweep, "others": _bars}.items():
        figure = draw(plt, data, name)
        if figure is None:
            continue
        path = json_path.with_name(f"{json_path.stem}-{name}.png")
        figure.suptitle(_title(data))
        figure.savefig(path, dpi=110)
        plt.close(figure)
        written.append(path)
    return written


def _title(data: Mapping[str, Any]) -> str:
    facts = data["environment"]
    dry = "DRY RUN, no figures: " if data["dry_run"] else ""
    return f"{dry}{facts.get('device', '?')}, commit {facts.get('commit') or 'installed'}, {data['started'][:10]}"


def _sweep(plt: Any, data: Mapping[str, Any], phase: str) -> Any:
    """TFLOP/s over lengths, one panel a mask and head_dim."""
    rows = [row for row in rows_of(data, "timing") if row.get("group") == phase and row.get("times")]
    panels: dict[tuple[str, int], list[tuple[int, Mapping[str, Any]]]] = {}
    for row in rows:
        _, mask, head_dim, length = row["name"].split("_")
        panels.setdefault((mask, int(head_dim[2:])), []).append((int(length[:-1]), row))
    if not panels:
        return None
    masks, dims = {mask for mask, _ in panels}, {head_dim for _, head_dim in panels}
    figure, axes = plt.subplots(
        len(masks), len(dims), figsize=(4.2 * len(dims), 3.4 * len(masks)), squeeze=False, layout="constrained"
    )
    for i, mask in enumerate(sorted(masks)):
        for j, head_dim in enumerate(sorted(dims)):
            points = sorted(panels.get((mask, head_dim), []), key=lambda p: p[0])
            _lines(axes[i][j], points)
            axes[i][j].set_title(f"{phase}, {mask}, head_dim {head_dim}", fontsize=9)
    return figure


def _lines(axis: Any, points: list[tuple[int, Mapping[str, Any]]]) -> None:
    for name in dict.fromkeys(n for _, row in points for n in row["times"]):
        mine = [(k, row["flops"] / row["times"][name]["ms"] / 1e9) for k, row in points if name in row["times"]]
        axis.plot(*zip(*mine, strict=True), marker="o", markersize=3, label=name, color=_COLORS.get(name))
    axis.set_xscale("log", base=2)
    axis.set_xlabel("thousand tokens a sequence")
    axis.set_ylabel("TFLOP/s")
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)
    if points:
        axis.legend(fontsize=7)


def _bars(plt: Any, data: Mapping[str, Any], _: str) -> Any:
    """Times of the variants and of decoding, each as a multiple of ours, the fastest of those."""
    rows = [r for r in rows_of(data, "timing") if r.get("group") in ("variants", "decode") and r.get("ratios")]
    if not rows:
        return None
    figure, axis = plt.subplots(figsize=(10, 0.45 + 0.62 * len(rows)), layout="constrained")
    ours = [min((row["times"][name]["ms"], name) for name in row["ratios"])[1] for row in rows]
    names = list(dict.fromkeys(n for row, own in zip(rows, ours, strict=True) for n in row["ratios"][own]))
    height = 0.8 / max(1, len(names))
    for place, name in enumerate(names):
        ratios = [row["ratios"][own].get(name, {}) for row, own in zip(rows, ours, strict=True)]
        values = [ratio.get("median", 0.0) for ratio in ratios]
        heights = [i + place * height for i in range(len(rows))]
        axis.barh(heights, values, height=height, label=name, color=_COLORS.get(name))
    axis.set_yticks([i + 0.4 for i in range(len(rows))], [row["title"] for row in rows], fontsize=8)
    axis.axvline(1.0, color="black", linewidth=0.8)
    axis.set_xlabel("time over ours")
    axis.invert_yaxis()
    axis.legend(fontsize=7)
    return figure
