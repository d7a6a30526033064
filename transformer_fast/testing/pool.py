"""Jobs in processes of their own, as many at a time as there are cores."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import TypeVar

J = TypeVar("J")
R = TypeVar("R")
#: Called after each job with (number done, number in all, which).
Progress = Callable[[int, int, str], None]


def in_processes(function: Callable[[J], R], jobs: Sequence[J], workers: int | None = None) -> Iterator[tuple[int, R]]:
    """(number of the job, its result) as they come.

    Args:
        function: of a module, so that another process finds it.
        jobs: in words that another process understands.
        workers: processes; as many as there are cores by default, and with 1 all is done in this one.
    """
    workers = min(workers or cores(), len(jobs))
    if workers <= 1:
        yield from enumerate(map(function, jobs))
        return
    # Not forked: torch has threads by now.
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = {pool.submit(function, job): number for number, job in enumerate(jobs)}
        for future in as_completed(futures):
            yield futures[future], future.result()


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
