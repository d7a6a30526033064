"""Runs benchmark cases: the check first, then the clock, then one row a case and dtype."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from transformer_fast.testing.runner import Target, available_targets

from . import measure, peers
from .cases import DTYPES, BenchCase, choose
from .workload import Piece, Step, Workload, check_ours, judge_step, make_pieces, make_workload, our_step

#: Called with (number done, number in all, what comes next).
Progress = Callable[[int, int, str], None]
OURS = "transformer_fast"


@dataclass(frozen=True)
class PeerTime:
    """A peer on a case: time of a call in milliseconds, and its ratio to ours with the 20th and 80th percentile."""

    ms: float
    ratio: float
    p20: float
    p80: float


@dataclass(frozen=True)
class Row:
    """One case in one dtype. Times in milliseconds; `missing` says why a peer is not there."""

    case: str
    title: str
    description: str
    dtype: str
    isa: str | None
    passed: bool
    used: float  # the largest share of the allowed error
    ours_ms: float
    ours_p20: float
    ours_p80: float
    peers: dict[str, PeerTime]
    missing: dict[str, str]
    tflops: float  # visible pairs only
    gigabytes_per_second: float | None  # of K and V, for decoding
    fraction_of_peak: float  # of the bandwidth for decoding, of the arithmetic peak otherwise
    peak: float  # FLOP/s or bytes/s
    bound: str  # "compute" or "memory"
    goal: float | None  # ratio to goal_peer
    goal_peer: str
    goal_applies: bool = field(default=True)  # not on the shortened cases of a quick run


def run_cases(
    names: Sequence[str] | None = None,
    *,
    dtypes: Sequence[str] = ("float32", "bfloat16"),
    peers: Sequence[str] | None = None,
    quick: bool = False,
    repeats: int | None = None,
    isa: str | None = None,
    progress: Progress | None = None,
) -> list[Row]:
    """Measures cases against peers.

    Args:
        names: cases, all by default; see `benchmarks.CASES`.
        dtypes: of "float32", "bfloat16", "float16".
        peers: of `benchmarks.PEERS`, all by default.
        quick: a quarter of the sequence lengths, few repeats: to see that it runs, not for figures.
        repeats: samples of each step.
        isa: instruction set to force on the CPU back end.
        progress: called before each case with (number done, number in all, what comes next).

    Raises:
        ValueError: an unknown name.
        WrongResultError: our result on a case is wrong; nothing is timed.
    """
    chosen, peer_names = choose(None if names is None else list(names)), _choose_peers(peers)
    for name in dtypes:
        if name not in DTYPES:
            raise ValueError(f"dtypes has {name!r}; allowed: {', '.join(DTYPES)}")
    if isa:
        available_targets([f"cpu/{isa}"])  # raises where the machine does not have it
    repeats = repeats or (5 if quick else 15)
    jobs = [(case.shortened() if quick else case, dtype) for case in chosen for dtype in dtypes]
    rows = []
    with Target("cpu", isa).forced() if isa else contextlib.nullcontext():
        for done, (case, dtype) in enumerate(jobs):
            if progress:
                progress(done, len(jobs), f"{case.title}, {dtype}")
            rows.append(run_case(case, dtype, peer_names, repeats=repeats, quick=quick, isa=isa))
    if progress:
        progress(len(jobs), len(jobs), "done")
    return _same_peaks(rows)


def _choose_peers(names: Sequence[str] | None) -> list[str]:
    return peers.choose(None if names is None else list(names))


def run_case(
    case: BenchCase, dtype: str, peer_names: Sequence[str], *, repeats: int, quick: bool = False, isa: str | None = None
) -> Row:
    """One case in one dtype; see `run_cases`."""
    work = make_workload(case, DTYPES[dtype])
    pieces = make_pieces(work)
    ours = our_step(work)
    verdicts = check_ours(work, pieces, ours)
    steps, missing = _set_up_peers(work, pieces, peer_names)
    work.rewind()
    samples = measure.interleaved({OURS: ours} | steps, repeats)
    timing = measure.summarise(samples[OURS])
    limit = (
        measure.read_bandwidth(quick=quick)
        if case.cold
        else measure.peak_flops(dtype, torch.get_num_threads(), quick=quick)
    )
    return Row(
        case=case.name,
        title=case.title,
        description=case.describe(),
        dtype=dtype,
        isa=isa or current_isa(),
        passed=all(v.passed for v in verdicts),
        used=max(v.used for v in verdicts),
        ours_ms=timing.ms,
        ours_p20=timing.p20,
        ours_p80=timing.p80,
        peers={name: _peer_time(samples[name], samples[OURS]) for name in steps},
        missing=missing,
        goal=case.goal.get(dtype),
        goal_peer=case.goal_peer,
        goal_applies=not quick,
        **_efficiency(case, work, timing.ms / 1e3, limit),
    )


def _set_up_peers(work: Workload, pieces: list[Piece], names: Sequence[str]) -> tuple[dict[str, Step], dict[str, str]]:
    """The peers that can do the case and do compute it, and for the others the reason why not.

    A peer has to be right to the precision of bfloat16, which is enough to see that it does the same work.
    """
    steps: dict[str, Step] = {}
    missing: dict[str, str] = {}
    for name in names:
        try:
            step = peers.PEERS[name](work)
            work.rewind()
            wrong = [v for v in judge_step(work, pieces, step(), precision=torch.bfloat16) if not v.passed]
        except measure.NotApplicableError as reason:
            missing[name] = str(reason)
            continue
        except Exception as error:  # somebody else's library: one that fails must not end the run
            missing[name] = f"failed: {type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"
            continue
        if wrong:
            missing[name] = f"computes something else: {wrong[0]}"
        else:
            steps[name] = step
    return steps, missing


def _peer_time(peer: Sequence[float], ours: Sequence[float]) -> PeerTime:
    r = measure.ratio(peer, ours)
    return PeerTime(measure.summarise(peer).ms, r.median, r.p20, r.p80)


def _efficiency(case: BenchCase, work: Workload, seconds: float, limit: float) -> dict[str, Any]:
    """What was reached, and what share of the machine's limit (FLOP/s, or for cold cases bytes/s) that is."""
    operations = case.flops / seconds
    bytes_read = case.bytes_read(work.dtype.itemsize) / seconds
    return dict(
        tflops=operations / 1e12,
        gigabytes_per_second=bytes_read / 1e9 if case.cold else None,
        fraction_of_peak=(bytes_read if case.cold else operations) / limit,
        peak=limit,
        bound="memory" if case.cold else "compute",
    )


def _same_peaks(rows: list[Row]) -> list[Row]:
    """Every row against the highest limit of the run: a peak measured in a bad moment would flatter."""
    highest: dict[tuple[str, str], float] = {}

    def key(row: Row) -> tuple[str, str]:
        return row.bound, "" if row.bound == "memory" else row.dtype  # bytes are bytes

    for row in rows:
        highest[key(row)] = max(highest.get(key(row), 0.0), row.peak)
    return [
        replace(row, peak=highest[key(row)], fraction_of_peak=row.fraction_of_peak * row.peak / highest[key(row)])
        for row in rows
    ]


def current_isa() -> str | None:
    """The instruction set in force on the CPU back end."""
    from transformer_fast import backends

    info = backends().get("cpu")  # type: ignore[operator]  # a module that can be called
    return info.details.get("isa") if info and info.available else None
