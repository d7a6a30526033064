"""Which of two ways is quicker on this machine, by trying both."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from time import perf_counter

import torch
from torch import Tensor

#: Pairs of calls that are timed, and the seconds after which no other pair is begun.
_PAIRS, _PATIENCE = 5, 0.1
#: Up to so many rows the weight's way from memory is what takes the time, and a weight met again would be in a cache:
#: as many bytes are written in between as push it out.
_FEW_ROWS, _CACHE = 32, 2**24


def is_quicker(plain: Callable[[], Tensor], other: Callable[[], Tensor], rows: int, worth_it: float) -> bool:
    """Does ``other``, a product of so many rows, take less than ``worth_it`` of the plain one's time? In turns."""
    other()  # its memory is new
    between = torch.empty(_CACHE if rows <= _FEW_ROWS else 0, dtype=torch.uint8, device="cpu")

    def seconds(product: Callable[[], Tensor]) -> float:
        between.fill_(1)
        start = perf_counter()
        product()
        return perf_counter() - start

    times: list[float] = []
    begin = perf_counter()
    while len(times) < _PAIRS and (not times or perf_counter() - begin < _PATIENCE):
        before = seconds(plain)
        times.append(seconds(other) / before)
    return statistics.median(times) < worth_it
