"""The demo's picture: the loss falling, and how many times faster than PyTorch each variant is."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

from transformer_fast.demo.results import DecoderResults, DemoResults

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_OURS = "#3b6fd4"
_COLOURS = {"float32": "#3b6fd4", "bfloat16": "#e08a2e", "float16": "#4f9d69"}
_SOFT = "#667085"


def draw(results: DemoResults) -> bytes:
    """The picture as PNG."""
    # Figure without pyplot: no window system is asked for, and no global state is left behind.
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(row.variant for row in results.variants))
    figure = Figure(figsize=(13, max(4.8, 1.6 + 0.52 * len(names))), dpi=130, layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.15))
    _draw_losses(left, results.decoder)
    _draw_ratios(right, results, names)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    image = io.BytesIO()
    figure.savefig(image, format="png", facecolor="white")
    return image.getvalue()


def _draw_losses(axes: Axes, decoder: DecoderResults) -> None:
    training = decoder.training
    axes.plot(range(1, len(training.losses) + 1), training.losses, color=_OURS, alpha=0.25, linewidth=0.8)
    smooth = running_mean(training.losses, max(1, len(training.losses) // 40))
    axes.plot(range(1, len(smooth) + 1), smooth, color=_OURS, label="training (running mean)")
    steps, losses = zip(*training.validation, strict=True)
    axes.plot(steps, losses, "o-", color="#1d2330", markersize=4, linewidth=1, label="validation")
    axes.axhline(decoder.trigram, color="#c0281f", linestyle="--", linewidth=1.2, label="byte 3-gram, validation")
    axes.set_xlabel("training step")
    axes.set_ylabel("loss, nats a byte")
    axes.set_ylim(bottom=0)
    axes.set_title(f"A byte-level decoder, trained for {training.wall_seconds:.0f} s", loc="left", fontsize=11)
    axes.legend(frameon=False)


def _draw_ratios(axes: Axes, results: DemoResults, names: Sequence[str]) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    dtypes = list(dict.fromkeys(row.dtype for row in results.variants))
    height = 0.8 / max(1, len(dtypes))
    for k, dtype in enumerate(dtypes):
        rows = {row.variant: row.ratio for row in results.variants if row.dtype == dtype}
        places = [i + (k - (len(dtypes) - 1) / 2) * height for i, name in enumerate(names) if name in rows]
        values = [rows[name] for name in names if name in rows]
        # A bar starts at 1, where ours and PyTorch's take the same time: on this scale there is no zero.
        widths = [value - 1 for value in values]
        axes.barh(places, widths, height=height * 0.9, left=1, color=_COLOURS.get(dtype, _SOFT), label=dtype)
        for place, value in zip(places, values, strict=True):
            axes.annotate(
                f"{value:.1f}x", (max(value, 1.0), place), (4, 0), textcoords="offset points", va="center", fontsize=8.5
            )
    ratios = [row.ratio for row in results.variants] or [1.0]
    axes.set_xscale("log")
    axes.set_xlim(min(0.9, 0.9 * min(ratios)), 1.5 * max(2.0, *ratios))
    axes.xaxis.set_major_locator(FixedLocator([0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x"))
    axes.axvline(1, color=_SOFT, linewidth=1)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlabel("PyTorch SDPA's time over ours (log scale; 1x is as fast)")
    axes.set_title("Attention alone, against PyTorch SDPA doing the same work", loc="left", fontsize=11)
    if dtypes:
        axes.legend(frameon=False, loc="lower right")


def running_mean(values: Sequence[float], width: int) -> list[float]:
    """The mean of each value and up to ``width - 1`` before it."""
    total, means = 0.0, []
    for i, value in enumerate(values):
        total += value - (values[i - width] if i >= width else 0.0)
        means.append(total / min(i + 1, width))
    return means
