"""Speed of one model with different attention inside, and of attention alone."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from transformer_fast.benchmarks import run_cases
from transformer_fast.benchmarks.measure import interleaved, summarise

# The benchmark cases that tell the story, of those with a goal of their own.
VARIANTS = (
    "full",
    "causal",
    "window",
    "window_dense",
    "decode",
    "bert",
    "bert_packed",
    "full_backward",
    "causal_backward",
)
QUICK_VARIANTS = ("causal", "window")


@dataclass(frozen=True)
class Speed:
    """One way to run a model; ``ratio`` is the time of the way it is compared to over this one's."""

    name: str
    milliseconds: float
    ratio: float


@dataclass(frozen=True)
class VariantSpeed:
    """One kind of attention alone: milliseconds of ours and of PyTorch SDPA, and theirs over ours."""

    variant: str
    sizes: str
    dtype: str
    ours: float
    sdpa: float
    ratio: float


def compare(ways: Mapping[str, Callable[[], object]], base: str, repeats: int, seconds: float = 20.0) -> list[Speed]:
    """Run the ways in turns; medians, and the median of the way called ``base`` over each.

    A machine on which ``repeats`` samples would take more than about ``seconds`` takes fewer, 3 at least.
    """
    started = time.perf_counter()
    for way in ways.values():
        way()
    once = time.perf_counter() - started
    # Each sample is two runs, one of them off the clock.
    samples = interleaved(dict(ways), max(min(3, repeats), min(repeats, int(seconds / (2 * once)))))
    medians = {name: summarise(own).ms for name, own in samples.items()}
    return [Speed(name, milliseconds, medians[base] / milliseconds) for name, milliseconds in medians.items()]


def variants(quick: bool, on_case: Callable[[int, int, str], None]) -> list[VariantSpeed]:
    """The benchmark's own cases against PyTorch SDPA; ``on_case`` hears (done, in all, what comes next).

    A case is not timed unless its result is right; one that SDPA cannot do is left out.
    """
    rows = run_cases(
        QUICK_VARIANTS if quick else VARIANTS,
        dtypes=("float32",) if quick else ("float32", "bfloat16"),
        peers=("sdpa",),
        quick=quick,
        repeats=2 if quick else 5,
        progress=on_case,
    )
    return [
        VariantSpeed(row.title, row.description, row.dtype, row.ours_ms, sdpa.ms, sdpa.ratio)
        for row in rows
        if (sdpa := row.peers.get("sdpa")) is not None
    ]
