"""The processes at the device, seen from the process that hands out the jobs.

Each worker is fed by a thread of its own. A worker that dies, or takes longer than its job may, costs the job's row
and is replaced; a kernel that hangs is ended with its process.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from .worker import AT, MARK

Job = dict[str, Any]
Row = dict[str, Any]
#: How much of a dead worker's last words is kept.
LAST_WORDS = 3000


class WorkerLostError(Exception):
    """A worker died or was ended; ``status`` is "crashed" or "timeout"."""

    def __init__(self, status: str, text: str) -> None:
        super().__init__(text)
        self.status = status


class Worker:
    """One process. What it prints beside its answers is kept for the record."""

    def __init__(self, command: Sequence[str], environment: dict[str, str]) -> None:
        self._errors = tempfile.TemporaryFile(mode="w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        self._process = subprocess.Popen(
            list(command),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env={**os.environ, **environment},
            text=True,
            errors="replace",
            start_new_session=True,  # Ctrl-C is for the process that keeps the record
        )
        self._answers: queue.Queue[str | None] = queue.Queue()
        self.printed: deque[str] = deque(maxlen=400)
        self.at = ""  # whose code runs there
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(MARK):
                self._answers.put(line.removeprefix(MARK))
            elif line.startswith(AT):
                self.at = line.removeprefix(AT).strip()
            else:
                self.printed.append(line.rstrip("\n"))
        self._answers.put(None)

    def ask(self, job: Job, timeout: float) -> Row:
        """The row of a job.

        Raises:
            WorkerLostError: the process died, or had to be ended after ``timeout`` seconds.
        """
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it died before; the empty pipe says so below
            self._process.stdin.write(json.dumps(job) + "\n")
            self._process.stdin.flush()
        try:
            answer = self._answers.get(timeout=max(timeout, 0.0))
        except queue.Empty:
            self.kill()
            raise WorkerLostError("timeout", f"no answer within {timeout:.0f} s\n{self.last_words()}") from None
        if answer is None:
            code = self._process.wait()
            raise WorkerLostError("crashed", f"the process ended with status {code}\n{self.last_words()}")
        row: Row = json.loads(answer)
        return row

    def last_words(self) -> str:
        """The end of what it wrote beside its answers."""
        self._errors.flush()
        self._errors.seek(0)
        printed = "\n".join(self.printed)
        return f"{self._errors.read()[-LAST_WORDS:]}\n{printed[-LAST_WORDS:]}".strip()

    def close(self, timeout: float) -> int | None:
        """Lets it end by itself; its exit status, None if it had to be killed."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            return self._process.wait(max(timeout, 0.0))
        except subprocess.TimeoutExpired:
            self.kill()
            return None

    def kill(self) -> None:
        """Ends the process at once, and those that it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


class Crew:
    """Workers that are kept from job to job, and the hands that feed them."""

    def __init__(self, spawn: Callable[[], Worker], stop: threading.Event) -> None:
        self._spawn, self._stop = spawn, stop
        self._idle: list[Worker] = []
        self._busy: set[Worker] = set()
        self._lock = threading.Lock()

    def run(
        self,
        jobs: Sequence[Job],
        on_row: Callable[[Row], Job | None],
        *,
        workers: int,
        deadline: float,
        job_seconds: float,
        last_call: float,
    ) -> list[Job]:
        """Runs jobs in order; returns those that were not begun.

        Args:
            on_row: called with each row, by one thread at a time. Where the worker was lost, or cannot use its
                device again, the row says at whose code: "at". A job that it returns is the next to run.
            workers: how many jobs at a time. Workers beyond it are ended first: a timing wants the device to itself.
            deadline: no job begins after it (``time.monotonic``).
            job_seconds: the most a job may take.
            last_call: no job goes on after it.
        """
        while len(self._idle) > workers:
            self._idle.pop().kill()
        waiting = deque(jobs)

        def feed() -> None:
            while not self._stop.is_set() and time.monotonic() < deadline:
                with self._lock:
                    if not waiting:
                        return
                    job = waiting.popleft()
                row = self._row(job, min(job_seconds, last_call - time.monotonic()))
                if row is None:
                    return
                with self._lock:
                    again = on_row(row)
                    if again is not None:
                        waiting.appendleft(again)

        hands = [threading.Thread(target=feed, daemon=True) for _ in range(min(workers, len(jobs)))]
        for hand in hands:
            hand.start()
        while any(hand.is_alive() for hand in hands):
            time.sleep(0.02)
            if self._stop.is_set():
                self.kill()
        return list(waiting)

    def _row(self, job: Job, timeout: float) -> Row | None:
        """A job's row, whatever happens to its worker; None if the run was stopped under it."""
        start = time.monotonic()
        with self._lock:
            worker = self._idle.pop() if self._idle else None
        try:
            worker = worker or self._spawn()
        except OSError as error:
            return job | {"status": "error", "text": f"no process could be started: {error}"}
        with self._lock:
            self._busy.add(worker)
        try:
            row = worker.ask(job, timeout)
        except WorkerLostError as lost:
            if self._stop.is_set():
                return None
            took = round(time.monotonic() - start, 2)
            return job | {"status": lost.status, "text": str(lost), "at": worker.at, "took": took}
        finally:
            with self._lock:
                self._busy.discard(worker)
        if row.get("fatal"):
            worker.close(5.0)
            row["text"] = f"{row.get('text', '')}\n{worker.last_words()}"
            row["at"] = worker.at
        else:
            with self._lock:
                self._idle.append(worker)
        return row

    def dismiss(self, timeout: float) -> list[tuple[int | None, list[str]]]:
        """Lets the workers end by themselves: exit status, and what they printed beside their answers."""
        with self._lock:
            workers, self._idle = self._idle, []
        return [(worker.close(timeout), list(worker.printed)) for worker in workers]

    def kill(self) -> None:
        """Ends all workers."""
        with self._lock:
            for worker in (*self._idle, *self._busy):
                worker.kill()
            self._idle.clear()
