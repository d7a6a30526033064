"""Speed as ratios to peers, each result checked before it is timed. Installed as `transformer_fast.benchmarks`."""

from .cases import CASES, BenchCase
from .measure import interleaved
from .peers import PEERS
from .report import missing_notes, rate, to_markdown, write_report
from .runner import PeerTime, Row, run_case, run_cases
from .workload import WrongResultError

__all__ = [
    "CASES",
    "PEERS",
    "BenchCase",
    "PeerTime",
    "Row",
    "WrongResultError",
    "interleaved",
    "missing_notes",
    "rate",
    "run_case",
    "run_cases",
    "to_markdown",
    "write_report",
]
