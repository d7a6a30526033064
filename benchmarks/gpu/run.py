"""One run: the sections one after the other, in processes of their own, every row on disk as soon as it is there."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .crew import Crew, Worker
from .plan import SECTIONS, Section, Settings, most_workers
from .record import BAD, Record
from .report import one_line, write_markdown

Row = dict[str, Any]
#: What a job that has begun may take beyond the budget before it is ended.
GRACE = 15.0
#: compute-sanitizer's exit status where it has found something.
FOUND = 86
#: Kinds of jobs of which there are many, and nobody wants to read of each that it went well.
QUIET = ("conformance", "instruction")
#: The quickest of the smoke cases.
DRY_SMOKE_CASE = "smoke_packed"
SANITIZER_TOOLS = {"memcheck": "ERROR SUMMARY", "racecheck": "RACECHECK SUMMARY"}


def say(text: str) -> None:
    """A line for whoever watches."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


class Run:
    """Sections, a clock, and the record.

    Args:
        command: starts a worker; see ``worker.serve``.
        stop: set by whoever wants the run to end; it then ends with what it has.
        start: when the budget began to run (``time.monotonic``); now by default.
    """

    def __init__(
        self,
        settings: Settings,
        record: Record,
        command: Sequence[str],
        stop: threading.Event,
        start: float | None = None,
    ) -> None:
        self.settings, self.record, self.stop = settings, record, stop
        self._command = list(command)
        self._start = time.monotonic() if start is None else start
        self._last_call = self._start + settings.budget + GRACE
        self._crew = Crew(self._spawn, stop)
        self._wanted = [s for s in SECTIONS if not settings.only or s.name in ("environment", *settings.only)]
        self.ended = ""

    def _spawn(self, prefix: Sequence[str] = (), **environment: str) -> Worker:
        # Many processes at a time, each with little to do on the host: threads and Inductor's own pool of processes
        # would stand in each other's way.
        environment = {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1", **environment}
        if self.settings.dry:
            environment["TRITON_INTERPRET"] = "1"
        return Worker([*prefix, *self._command], environment)

    def go(self) -> int:
        """Runs everything; the exit status: 1 if anything of ours is wrong."""
        self.record.about["planned"] = [section.name for section in self._wanted]
        try:
            share, whole, begin = 0.0, sum(section.share for section in self._wanted), time.monotonic()
            left = self._start + self.settings.budget - begin
            for section in self._wanted:
                share += section.share / whole
                if not self.stop.is_set():
                    self._section(section, begin + share * left)
        finally:
            self._crew.kill()
            self.record.finish(self.ended, time.monotonic() - self._start)
        return 1 if self.record.bad else 0

    def _section(self, section: Section, deadline: float) -> None:
        """One section; what it throws is kept, and the next one goes on."""
        start = time.monotonic()
        self.record.begin(section.name, section.title)
        try:
            jobs = section.jobs(self.settings)
            how = SPECIAL.get(section.name, Run.run_jobs)
            left, more = how(self, section, jobs, deadline)
        except Exception:
            text = traceback.format_exc()
            self.record.end(section.name, "failed", text=text, seconds=round(time.monotonic() - start, 1))
            say(f"{section.name}: failed\n{text}")
            return
        status = "done" if not left else "cut short"
        left_names = [job.get("name") or "/".join(job[k] for k in ("case", "dtype", "backend")) for job in left]
        seconds = round(time.monotonic() - start, 1)
        self.record.end(section.name, more.pop("status", status), not_run=left_names, seconds=seconds, **more)
        say(f"{section.name}: {seconds:.0f} s" + (f", {len(left)} of {len(jobs)} not run" if left else ""))

    def run_jobs(
        self,
        section: Section,
        jobs: list[Row],
        deadline: float,
        add: Callable[[str, Row], Row] | None = None,
    ) -> tuple[list[Row], dict[str, Any]]:
        """The jobs of a section by the crew, each row to ``add``; those that were not begun."""
        add, done = add or self.record.add, 0

        def keep(row: Row) -> Row | None:
            nonlocal done
            again = without_a_peer(row, jobs)
            if again is not None:
                say(f"{section.name}: {again['name']} once more, without {row['at']}")
                return again
            done += 1
            kept = add(section.name, row)
            if kept["kind"] not in QUIET or kept["status"] in BAD:
                say(f"{section.name} {done}/{len(jobs)} {one_line(kept)}")
            return None

        left = self._crew.run(
            jobs,
            keep,
            workers=section.workers or most_workers(self.settings),
            deadline=deadline,
            job_seconds=section.job_seconds,
            last_call=self._last_call,
        )
        return left, {}

    # -------------------------------------------------------------------------------------------- special sections

    def instructions(self, section: Section, jobs: list[Row], deadline: float) -> tuple[list[Row], dict[str, Any]]:
        """One row an instruction, where the back end in C++ is there."""
        if not jobs:
            reasons = self.record.about.get("left_out") or {"cuda": "it was not asked for"}
            text = "; ".join(f"without the back end {name}: {reason}" for name, reason in reasons.items())
            return [], {"status": "skipped", "text": text}
        return self.run_jobs(section, jobs, deadline)

    def environment(self, section: Section, jobs: list[Row], deadline: float) -> tuple[list[Row], dict[str, Any]]:
        """The device's facts go where every later row finds them."""

        def learn(name: str, row: Row) -> Row:
            self.record.learn(row.pop("facts", {}))
            return self.record.add(name, row)

        return self.run_jobs(section, jobs, deadline, learn)

    def sanitizer(self, section: Section, jobs: list[Row], deadline: float) -> tuple[list[Row], dict[str, Any]]:
        """The smoke cases under each tool of compute-sanitizer, one row a tool. A dry run has a stand-in: the same
        processes, without anybody watching.
        """
        program = find_sanitizer()
        if program is None and not self.settings.dry:
            return [], {"status": "skipped", "text": "compute-sanitizer is not on this machine"}
        left: list[Row] = []
        if self.settings.dry:
            jobs = [job for job in jobs if job["case"] == DRY_SMOKE_CASE]
        for place, (tool, summary) in enumerate(SANITIZER_TOOLS.items()):
            part = time.monotonic() + (deadline - time.monotonic()) / (len(SANITIZER_TOOLS) - place)
            prefix = [program or "", "--tool", tool, "--error-exitcode", str(FOUND), "--print-limit", "20"]
            if self.settings.dry:
                prefix = ["env"]
            # PyTorch's cache of memory would hide what is read past the end of a tensor.
            spawn: Callable[[], Worker] = lambda prefix=prefix: self._spawn(prefix, PYTORCH_NO_CUDA_MEMORY_CACHING="1")  # type: ignore[misc]  # noqa: E731
            crew = Crew(spawn, self.stop)
            rows: list[Row] = []

            def keep(row: Row, rows: list[Row] = rows) -> None:
                rows.append(row)

            tool_left = crew.run(
                jobs,
                keep,
                workers=1,
                deadline=part,
                job_seconds=section.job_seconds,
                last_call=min(part + 30.0, self._last_call),
            )
            left += [job | {"name": f"{tool} {job['case']}"} for job in tool_left]
            endings = crew.dismiss(20.0)
            if not self.stop.is_set():
                say(one_line(self.record.add(section.name, _sanitized(tool, summary, rows, endings))))
        return left, {}


def without_a_peer(row: Row, jobs: list[Row]) -> Row | None:
    """The job again where a peer took the process with it: that peer takes no part any more, in no job of these."""
    at = row.get("at", "")
    is_peer = row["kind"] == "timing" and at and at.removesuffix("_unpadded") not in row["backends"]
    if not is_peer or at in row.get("without", {}):
        return None
    reason = f"left out: it took the process with it ({row['status']}) at {row['name']}"
    for job in jobs:
        job["without"] = {**job.get("without", {}), at: reason}
    return next(job for job in jobs if job["name"] == row["name"])


def find_sanitizer() -> str | None:
    """compute-sanitizer, on the path or in a CUDA toolkit that is not."""
    toolkit = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    places = os.pathsep.join(f"{toolkit}/{folder}" for folder in ("bin", "compute-sanitizer"))
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=places)


def _sanitized(tool: str, summary: str, rows: list[Row], endings: list[tuple[int | None, list[str]]]) -> Row:
    """What a tool found. A case that took too long under it says nothing about the case."""
    printed = [line for _, lines in endings for line in lines]
    lines = [line for line in printed if line.startswith("=========")]
    found = any(status == FOUND for status, _ in endings)
    found = found or any(re.search(rf"{summary}: [1-9]", line) for line in lines)
    lost = [row for row in rows if row["status"] in ("crashed", "error", "failed")]
    slow = [row["case"] for row in rows if row["status"] == "timeout"]
    text = "\n".join(lines[-60:]) if found else "\n".join(str(row.get("text", "")) for row in lost)
    return {
        "kind": "sanitizer",
        "name": tool,
        "status": "failed" if found or lost else "ok" if any(r["status"] == "passed" for r in rows) else "not run",
        "summary": next((line.strip("= ") for line in reversed(lines) if summary in line), ""),
        "cases": {row["case"]: row["status"] for row in rows},
        "text": text + (f"\nno answer in time: {', '.join(slow)}" if slow else ""),
    }


SPECIAL: dict[str, Callable[[Run, Section, list[Row], float], tuple[list[Row], dict[str, Any]]]] = {
    "environment": Run.environment,
    "instructions": Run.instructions,
    "sanitizer": Run.sanitizer,
}


def finished(record: Record) -> Path:
    """Markdown and plots of what was recorded; neither may cost the JSON."""
    data = json.loads(record.path.read_text(encoding="utf-8"))
    markdown = write_markdown(data, record.path.with_suffix(".md"))
    try:
        from .plots import write_plots

        for path in write_plots(data, record.path):
            say(f"wrote {os.path.relpath(path)}")
    except ImportError as error:
        say(f"no plots: {error}")
    except Exception:
        say(f"no plots:\n{traceback.format_exc()}")
    return markdown
