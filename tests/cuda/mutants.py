"""Takes the synchronisations out of the CUDA kernels, one line at a time, and tells what shows that it is missing.

    python tests/cuda/mutants.py                            # both families of kernels; exit status 1 if any survives
    python tests/cuda/mutants.py --capability 80 --only forward_sm80
    python tests/cuda/mutants.py --table reports/cuda-mutants.md

The kernels run in the emulator, whose synchronisations can be told to do nothing. A fault is caught when a result
breaks the tolerance rule, or when the emulator reports an error, under one of a few schedules; or when the process
crashes or does not end, which a fault in a loop's bounds may well do. Each fault therefore gets a process of its own.
"""

# ruff: noqa: T201 - a program that prints its table
from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from transformer_fast.backends.cuda import EMULATED_CAPABILITY_VARIABLE, native_module
from transformer_fast.testing.cases import Case, make_problem
from transformer_fast.testing.runner import Expected, expected_of, judge_all, run_target

CSRC = Path(__file__).resolve().parents[2] / "csrc"
SECONDS = 30  # that one problem may take; a fault may well make a loop endless
SEEDS = 12
FIRST_SEED = 45  # so that the rarest fault, which 3 of 20 schedules show, is among those that these show

sys.path.insert(0, str(Path(__file__).resolve().parent))

from mutant_cases import CASES, SURVIVORS, spoil_idle_queries  # noqa: E402 - from tests/cuda/


@dataclass(frozen=True, order=True)
class Site:
    """A line of a kernel that synchronises."""

    file: str  # under csrc/
    line: int
    operation: str


@dataclass(frozen=True)
class Outcome:
    """What became of one fault; `caught_by` is None where nothing showed it."""

    site: Site
    text: str  # of the line
    capability: int
    caught_by: str | None
    attempts: int
    seconds: float

    def excuse(self) -> str | None:
        """Why the survival of the fault is no gap of the tests, where that is known."""
        for survivor in SURVIVORS:
            if survivor.matches(self.site.file, self.site.operation, self.text):
                return survivor.reason
        return None


class Prepared:
    """A problem, what it should give, and the sites that it comes through."""

    def __init__(self, case: Case, dtype: torch.dtype) -> None:
        self.case, self.problem = case, make_problem(case, dtype, 0)
        if case.poison:
            spoil_idle_queries(self.problem)
        self.expected: Expected = expected_of(self.problem)
        self.bits: dict[str, torch.Tensor] | None = None  # of a deterministic problem's results
        self.sites: set[Site] = set()
        self.seconds = 0.0

    def fault(self) -> str | None:
        """What is wrong with the results, None where nothing is."""
        try:
            results = run_target(self.problem, "emulated")
        except RuntimeError as error:
            return "error: " + re.sub(r"\s*\n\s*", "; ", str(error))
        wrong = [v.name for v in judge_all(results, self.expected) if not v.passed]
        if wrong:
            return f"wrong {', '.join(wrong)}"
        if self.case.deterministic:
            self.bits = self.bits or results
            unlike = [name for name, bits in self.bits.items() if not torch.equal(bits, results[name])]
            return f"other bits in {', '.join(unlike)}" if unlike else None
        return None


def configure(module: Any, seed: int) -> None:
    """By turns one block at a time and a few, and every third time leaders of warps far ahead of their lanes."""
    lanes = "leader_first" if seed % 3 == 2 else "drawn"
    module.configure(seed, blocks_at_once=1 if seed % 2 == 0 else 3, lanes=lanes)


def calls(module: Any) -> dict[Site, int]:
    """How often each synchronisation was called since the process began."""
    found = {}
    for operation, file, line, count in module.synchronisations():
        relative = file[file.rindex("/csrc/") + len("/csrc/") :] if "/csrc/" in file else file
        if not relative.startswith("cuda/checks"):
            found[Site(relative, line, operation)] = count
    return found


def prepare(module: Any, seeds: int) -> list[Prepared]:
    """All problems that the module has kernels for, each seen to be right without a fault."""
    all_prepared = []
    for case, dtype in CASES:
        prepared = Prepared(case, dtype)
        for seed in range(FIRST_SEED, FIRST_SEED + seeds):
            configure(module, seed)
            before, began = calls(module), time.perf_counter()
            if fault := prepared.fault():
                raise SystemExit(f"{case.name} is wrong without any fault, seed {seed}: {fault}")
            prepared.seconds += time.perf_counter() - began
            prepared.sites |= {site for site, count in calls(module).items() if count > before.get(site, 0)}
        all_prepared.append(prepared)
    print(*(f"{p.seconds / seeds:.2f}s {p.case.name};" for p in all_prepared), file=sys.stderr)
    return sorted(all_prepared, key=lambda p: p.seconds)


def sources() -> dict[str, list[str]]:
    """The lines of the kernels, as they are now: the checkout may change while this runs."""
    files = sorted((CSRC / "cuda").glob("*.cuh"))
    return {f"cuda/{f.name}": ["", *f.read_text(encoding="utf-8").splitlines()] for f in files}


def in_a_process(work: Callable[[], dict[str, Any]]) -> dict[str, Any] | int:
    """What `work` gives in a fork of this process, or the signal that ended it."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.close(reading)
            with os.fdopen(writing, "w") as pipe:
                json.dump(work(), pipe)
            status = 0
        finally:
            os._exit(status)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        text = pipe.read()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return os.WTERMSIG(status)
    result: dict[str, Any] = json.loads(text)
    return result


def try_without(module: Any, site: Site, text: str, problems: list[Prepared], seeds: int, capability: int) -> Outcome:
    """Run the problems that come through a site without it, until something shows."""

    def work() -> dict[str, Any]:
        module.disable(site.file, site.line)
        attempts = 0
        for seed in range(FIRST_SEED, FIRST_SEED + seeds):
            configure(module, seed)
            for prepared in problems:
                attempts += 1
                signal.alarm(SECONDS)
                if fault := prepared.fault():
                    return {"caught_by": f"{fault} ({prepared.case.name}, seed {seed})", "attempts": attempts}
        return {"caught_by": None, "attempts": attempts}

    began = time.perf_counter()
    result = in_a_process(work)
    if isinstance(result, int):
        caught_by = "does not end" if result == signal.SIGALRM else f"a crash (signal {result})"
        result = {"caught_by": caught_by, "attempts": 0}
    return Outcome(site, text, capability, **result, seconds=time.perf_counter() - began)


def run(capability: int, only: str, seeds: int) -> list[Outcome]:
    """All faults of the kernels that a GPU of this compute capability runs. Prints each as it is there."""
    os.environ[EMULATED_CAPABILITY_VARIABLE] = str(capability)
    module, why_not = native_module("_C_emulated")
    if module is None:
        raise SystemExit(why_not)
    torch.set_num_threads(1)  # a fork has one thread
    lines, problems = sources(), prepare(module, seeds)
    sites = sorted({site for p in problems for site in p.sites if only in site.file})
    outcomes = []
    for site in sites:
        text = lines[site.file][site.line].strip()
        outcome = try_without(module, site, text, [p for p in problems if site in p.sites], seeds, capability)
        outcomes.append(outcome)
        words = outcome.caught_by or f"SURVIVES {outcome.attempts} attempts: {outcome.excuse() or 'why?'}"
        print(f"{capability} {site.file}:{site.line} {site.operation}: {words}", file=sys.stderr, flush=True)
    return outcomes


def run_apart(arguments: argparse.Namespace, capability: int) -> list[Outcome]:
    """The same in a process of its own: the emulator is one machine for the life of a process."""
    command = [sys.executable, __file__, "--capability", str(capability), "--json"]
    command += ["--only", arguments.only, "--seeds", str(arguments.seeds)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.returncode)
    return [Outcome(Site(**row.pop("site")), **row) for row in json.loads(done.stdout)]


def merged(outcomes: list[Outcome]) -> list[Outcome]:
    """One for each site: a kernel that both machines run is caught where either of them catches it."""
    by_site: dict[Site, Outcome] = {}
    for outcome in outcomes:
        before = by_site.get(outcome.site)
        if before is None or before.caught_by is None:
            by_site[outcome.site] = outcome
    return [by_site[site] for site in sorted(by_site)]


def table(outcomes: list[Outcome]) -> str:
    """All faults as Markdown."""
    caught = [o for o in outcomes if o.caught_by]
    survivors = [o for o in outcomes if not o.caught_by]
    lines = [
        "# Synchronisations of the CUDA kernels, taken out one at a time",
        "",
        f"{len(caught)} of {len(outcomes)} are missed by a test in the emulator"
        f" ({len(caught) / max(1, len(outcomes)):.0%}). Made by `python tests/cuda/mutants.py --table FILE`;"
        " the emulator shows no data race of the memory model and no miscompilation.",
        "",
    ]
    if survivors:
        lines += ["## Not caught", "", "| operation | where | line | why |", "| --- | --- | --- | --- |"]
        lines += [f"| {o.site.operation} | {_where(o)} | `{o.text}` | {o.excuse() or '?'} |" for o in survivors]
        lines += [""]
    lines += ["## Caught", "", "| operation | where | by |", "| --- | --- | --- |"]
    lines += [f"| {o.site.operation} | {_where(o)} | {_short(o.caught_by or '')} |" for o in caught]
    return "\n".join([*lines, ""])


def _where(outcome: Outcome) -> str:
    return f"{outcome.site.file.removeprefix('cuda/')}:{outcome.site.line}"


def _short(text: str) -> str:
    text = text.replace("|", "\\|")
    return text if len(text) <= 160 else text[:100] + " ... " + text[-50:]


def main() -> int:
    """The program."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--capability", type=int, choices=(80, 90), help="only the kernels of one machine")
    parser.add_argument("--only", default="", help="only sites in files whose name has this part")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="schedules to try each problem under")
    parser.add_argument("--table", type=Path, help="write the table as Markdown")
    parser.add_argument("--json", action="store_true", help="print the outcomes as JSON")
    arguments = parser.parse_args()
    if arguments.json:
        print(json.dumps([asdict(o) for o in run(arguments.capability, arguments.only, arguments.seeds)]))
        return 0
    capabilities = [arguments.capability] if arguments.capability else [80, 90]
    with ThreadPoolExecutor() as pool:
        of_each = pool.map(partial(run_apart, arguments), capabilities)
        outcomes = merged([outcome for outcomes in of_each for outcome in outcomes])
    if arguments.table:
        arguments.table.write_text(table(outcomes), encoding="utf-8")
    survivors = [o for o in outcomes if not o.caught_by]
    print(f"{len(outcomes) - len(survivors)} of {len(outcomes)} caught")
    return 1 if any(o.excuse() is None for o in survivors) else 0


if __name__ == "__main__":
    sys.exit(main())
