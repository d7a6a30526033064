"""Clocks: interleaved timing, and what the machine can do at best."""

from __future__ import annotations

import importlib
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

#: One sample lasts at least this long: shorter calls are repeated within it.
SAMPLE_SECONDS = 0.02


class NotApplicableError(Exception):
    """A peer, or we, do not have this; the message is for the report."""


@dataclass(frozen=True)
class Timing:
    """Time of a step in milliseconds: the median and the 20th and 80th percentile of its samples."""

    ms: float
    p20: float
    p80: float


@dataclass(frozen=True)
class Ratio:
    """How many times slower a peer is: the median over pairs of neighbouring samples, and percentiles."""

    median: float
    p20: float
    p80: float


def interleaved(steps: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Samples of every step in seconds a call, taken in turn (A B C A B C ...).

    Whatever drifts (clock speed, a neighbour on the machine) then weighs on all alike.
    """
    calls = {name: _calls_per_sample(step) for name, step in steps.items()}
    samples: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(repeats):
        for name, step in steps.items():
            # One call off the clock: wakes this peer's threads while the last one's go to sleep.
            step()
            count = calls[name]
            start = time.perf_counter()
            for _ in range(count):
                step()
            samples[name].append((time.perf_counter() - start) / count)
    return samples


def _calls_per_sample(step: Callable[[], object]) -> int:
    step()
    start = time.perf_counter()
    step()
    once = max(time.perf_counter() - start, 1e-7)
    return max(1, min(10_000, round(SAMPLE_SECONDS / once)))


def summarise(samples: Sequence[float]) -> Timing:
    """Seconds -> milliseconds."""
    return Timing(*(1e3 * x for x in _median_and_percentiles(samples)))


def ratio(peer: Sequence[float], ours: Sequence[float]) -> Ratio:
    """Peer's time over ours, pair by pair."""
    return Ratio(*_median_and_percentiles([p / o for p, o in zip(peer, ours, strict=True)]))


def _median_and_percentiles(values: Sequence[float]) -> tuple[float, float, float]:
    if len(values) < 2:
        return values[0], values[0], values[0]
    fifths = statistics.quantiles(values, n=5, method="inclusive")
    return statistics.median(values), fifths[0], fifths[-1]


def peak_flops(dtype_name: str, num_threads: int, *, quick: bool = False) -> float:
    """The most floating-point operations a second that this machine shows: by a large matrix product of PyTorch's, or
    by multiply-adds on registers where the native module can measure them.
    """
    matmul = _matmul_flops(getattr(torch, dtype_name), 512 if quick else 1536)
    return max(matmul, _native_flops(dtype_name, num_threads) or 0.0)


def read_bandwidth(*, quick: bool = False) -> float:
    """Bytes a second, of reductions over a buffer larger than any cache."""
    return _read_bandwidth(64 if quick else 512)


def _best_seconds(step: Callable[[], object], repeats: int = 5) -> float:
    """The shortest of several runs: for a limit, whatever slowed a run down does not count."""
    step()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return min(times)


def _matmul_flops(dtype: torch.dtype, size: int) -> float:
    a, b = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
    return 2.0 * size**3 / _best_seconds(lambda: a @ b)


def _native_flops(dtype_name: str, num_threads: int) -> float | None:
    try:
        native = importlib.import_module("transformer_fast._C_cpu")
    except ImportError:
        return None
    try:
        return max(float(native.measure_peak(dtype_name, num_threads)) for _ in range(3))
    except (AttributeError, ValueError):  # the module has no such measurement, or not of this dtype
        return None


def _read_bandwidth(mebibytes: int) -> float:
    buffer = torch.ones(mebibytes * 2**18)  # float32
    seconds = min(_best_seconds(buffer.sum), _best_seconds(buffer.amax), _best_seconds(lambda: buffer.dot(buffer)))
    return buffer.numel() * buffer.element_size() / seconds
