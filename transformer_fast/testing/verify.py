"""The equivalence suite as a function: every back end of this machine against the oracle, with a report.

For anybody's CI::

    from transformer_fast.testing import verify
    report = verify(quick=True)
    report.write("verify-report")
    assert report.passed, report.summary()
"""

from __future__ import annotations

import json
import math
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from transformer_fast.testing.cases import Case, select
from transformer_fast.testing.environment import environment
from transformer_fast.testing.runner import Outcome, Target, available_targets, check
from transformer_fast.testing.suite import standard_cases

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
#: Called after each outcome with (number done, number in all, outcome).
Progress = Callable[[int, int, Outcome], None]


@dataclass(frozen=True)
class Report:
    """What `verify` found."""

    outcomes: tuple[Outcome, ...]
    seed: int
    quick: bool
    seconds: float
    environment: dict[str, Any]

    @property
    def passed(self) -> bool:
        """Nothing failed, and every target showed at least one right result."""
        counts = self.counts()
        proven = {o.target for o in self.outcomes if o.passed}
        return (
            bool(self.outcomes)
            and counts["failed"] == counts["error"] == 0
            and proven == {o.target for o in self.outcomes}
        )

    def counts(self) -> Counter[str]:
        """How many outcomes passed, failed, were unsupported, or ended in an error."""
        return Counter(o.status for o in self.outcomes)

    def failures(self) -> list[Outcome]:
        """The outcomes that failed or ended in an error."""
        return [o for o in self.outcomes if o.status in ("failed", "error")]

    def summary(self) -> str:
        """One line, and one block for each of the first failures."""
        counts = self.counts()
        parts = [f"{counts[s]} {s}" for s in ("passed", "failed", "error", "unsupported") if counts[s]]
        lines = [f"{'passed' if self.passed else 'FAILED'}: {', '.join(parts) or 'nothing was run'}, seed {self.seed}"]
        return "\n".join(lines + [str(o) for o in self.failures()[:10]])

    def as_dict(self) -> dict[str, Any]:
        """Everything, as plain data for JSON."""
        return {
            "passed": self.passed,
            "counts": dict(self.counts()),
            "seed": self.seed,
            "quick": self.quick,
            "seconds": round(self.seconds, 1),
            "environment": self.environment,
            "outcomes": [outcome_as_dict(o) for o in self.outcomes],
        }

    def write(self, directory: str | Path) -> tuple[Path, Path]:
        """Writes `verify.json` and `verify.html` into a directory, which is made if need be; returns both paths."""
        from transformer_fast.testing.report import render

        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        json_path, html_path = directory / "verify.json", directory / "verify.html"
        data = self.as_dict()
        json_path.write_text(json.dumps(data, allow_nan=False) + "\n", encoding="utf-8")
        html_path.write_text(render(data), encoding="utf-8")
        return json_path, html_path


def verify(
    *,
    backends: Sequence[str] | None = None,
    dtypes: Sequence[str] | None = None,
    quick: bool = False,
    seed: int = 0,
    cases: Sequence[Case] | None = None,
    progress: Progress | None = None,
) -> Report:
    """Runs the equivalence suite: forward, lse and all gradients by the one tolerance rule.

    Args:
        backends: names of back ends ("cpu") or of one instruction set of them ("cpu/avx2"); all that this machine
            has by default.
        dtypes: of "float32", "bfloat16", "float16"; all by default.
        quick: only the core cases.
        seed: of the inputs; the same seed draws the same on every machine.
        cases: other cases than the standard ones.
        progress: called after each outcome with (number done, number in all, outcome).

    Raises:
        ValueError: unknown names, or a back end that is not available here.
    """
    targets = available_targets(None if backends is None else list(backends))
    for name in dtypes or ():
        if name not in DTYPES:
            raise ValueError(f"dtypes has {name!r}; allowed: {', '.join(DTYPES)}")
    chosen = [DTYPES[name] for name in dtypes or DTYPES]
    chosen_cases = select(standard_cases() if cases is None else cases, core=quick)

    start = time.perf_counter()
    total = len(chosen_cases) * len(chosen) * len(targets)
    outcomes: list[Outcome] = []
    for case in chosen_cases:
        for dtype in chosen:
            for target in targets:  # innermost: the oracle of a problem is computed once for all targets
                outcomes.append(_outcome(case, dtype, target, seed))
                if progress:
                    progress(len(outcomes), total, outcomes[-1])
    return Report(tuple(outcomes), seed, quick, time.perf_counter() - start, environment())


def _outcome(case: Case, dtype: torch.dtype, target: Target, seed: int) -> Outcome:
    """Like `check`, with exceptions noted instead of raised: a report shows all that is wrong, not only the first."""
    try:
        return check(case, dtype, target, seed)
    except Exception:
        return Outcome(case, dtype, target, seed, error=traceback.format_exc(limit=-3))


def outcome_as_dict(outcome: Outcome) -> dict[str, Any]:
    """An outcome as plain data: four digits, and None for numbers that JSON has no word for."""

    def number(value: Any) -> Any:
        if not isinstance(value, float):
            return value
        return float(f"{value:.4g}") if math.isfinite(value) else None

    return {
        "variant": outcome.case.variant,
        "case": outcome.case.name,
        "description": outcome.case.describe(),
        "target": outcome.target.name,
        "dtype": str(outcome.dtype).removeprefix("torch."),
        "status": outcome.status,
        "message": outcome.error or outcome.unsupported or "",
        "verdicts": [
            {key: number(value) for key, value in (asdict(v) | {"used": v.used}).items()} for v in outcome.verdicts
        ],
    }
