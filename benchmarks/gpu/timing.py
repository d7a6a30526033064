"""Contestants against the clock: checked first, then in turn, in an order drawn anew for every round."""

from __future__ import annotations

import random
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from transformer_fast import UnsupportedError

from ..measure import NotApplicableError, ratio, summarise
from .check import Judge
from .device import Device
from .work import Contestant, Step, Work, make_step

#: A peer is asked whether it does the same work, not whether it is as exact as ours has to be: leaving one out for
#: its rounding would leave out its speed.
PEER_LENIENCE = 4.0
#: Makes a contestant ready, or raises NotApplicableError. None: it has nothing to add to this work.
Setup = Callable[[], Contestant | None]


@dataclass
class Ready:
    """A contestant that computed the right thing, and what its first call cost."""

    step: Step
    first_call_seconds: float
    lead: float  # seconds that the host needs to launch it
    used: float  # the largest share of the allowed error; 0 where it computes something else
    note: str = ""


@dataclass
class Line:
    """Everybody who was asked: ready, or missing with the reason, or (ours) wrong with what is wrong."""

    ready: dict[str, Ready] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    wrong: dict[str, str] = field(default_factory=dict)


def line_up(
    work: Work,
    judge: Judge,
    setups: Mapping[str, Setup],
    device: Device,
    *,
    ours: set[str],
    without: Mapping[str, str],
    deadline: float,
) -> Line:
    """Runs every contestant once and judges it.

    Args:
        ours: those whose failure is ours.
        without: who is not asked, and why.
        deadline: past it peers are not set up any more: some compile.
    """
    line = Line()
    for name, setup in setups.items():
        if name in without:
            line.missing[name] = without[name]
            continue
        if time.monotonic() > deadline and name not in ours:
            line.missing[name] = "no time was left to set it up"
            continue
        device.notify(name)
        try:
            contestant = setup()
            if contestant is None:
                continue
            start = time.perf_counter()
            step = make_step(work, contestant)
            results = step()
            device.synchronize()
            first = time.perf_counter() - start
            lenience = 1.0 if name in ours else PEER_LENIENCE
            complaint, used = ("", 0.0) if contestant.note else judge.complaint(contestant, results, lenience)
        except (NotApplicableError, UnsupportedError) as reason:
            line.missing[name] = str(reason)
            continue
        except Exception as error:
            if name in ours:  # with a traceback, and only if the device can still be used for the others
                line.wrong[name] = traceback.format_exc(limit=-4)
            else:
                line.missing[name] = f"failed: {_in_short(error)}"
            if not device.is_healthy():
                raise
            continue
        if complaint:
            if name in ours:
                line.wrong[name] = complaint
            else:
                line.missing[name] = f"computes something else: {complaint.splitlines()[0]}"
            continue
        line.ready[name] = Ready(step, first, device.host_seconds(step), used, contestant.note)
    device.notify("")
    return line


def _in_short(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:240]}"


def in_rounds(device: Device, ready: Mapping[str, Ready], seconds: float) -> dict[str, list[float]]:
    """Samples in seconds a call: one of each contestant a round, as many rounds as the time allows."""
    order, shuffle = list(ready), random.Random(0)
    samples: dict[str, list[float]] = {name: [] for name in ready}
    start = time.monotonic()
    for done in range(device.most_rounds):
        if done >= device.fewest_rounds and (time.monotonic() - start) * (done + 1) / done > seconds:
            break
        shuffle.shuffle(order)
        for name in order:
            device.notify(name)
            samples[name].append(device.seconds(ready[name].step, ready[name].lead))
    device.notify("")
    return samples


def measured(device: Device, line: Line, ours: list[str], seconds: float) -> dict[str, Any]:
    """Times of all that are ready, and the ratios of the others to each of ours; plain data."""
    samples = in_rounds(device, line.ready, seconds) if any(name in line.ready for name in ours) else {}
    times = {
        name: asdict(summarise(found))
        | {"rounds": len(found), "first_call_seconds": line.ready[name].first_call_seconds}
        | {"host_us": 1e6 * line.ready[name].lead, "used": line.ready[name].used}
        for name, found in samples.items()
    }
    ratios = {
        own: {name: asdict(ratio(samples[name], samples[own])) for name in samples if name != own}
        for own in ours
        if own in samples
    }
    notes = {name: entry.note for name, entry in line.ready.items() if entry.note}
    return {"times": times, "ratios": ratios, "missing": line.missing, "wrong": line.wrong, "notes": notes}
