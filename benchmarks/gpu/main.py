"""The command line of ``on_gpu.py``."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .cuda_module import chosen_backends
from .plan import DEFAULT_BUDGET, SECTIONS, Settings
from .record import Record
from .run import Run, finished, say

#: Names the commit where the checkout was copied without its history.
COMMIT_VARIABLE = "TRANSFORMER_FAST_COMMIT"


def main(arguments: Sequence[str], command: Sequence[str], root: Path | None) -> int:
    """Runs what the arguments ask for; returns the exit status.

    Args:
        command: starts this program again.
        root: the checkout; None where the package is installed.
    """
    asked = _parser(root).parse_args(arguments)
    if asked.worker:
        from .worker import serve

        serve(dry=asked.dry_run)
        return 0
    if asked.render:
        return _render(asked.render)
    if asked.choose:
        return _choose(asked.choose)
    dry = asked.dry_run
    if not dry and not _has_device():
        say("No CUDA device here: this is a dry run, tiny shapes on the CPU; its figures mean nothing.")
        dry = True
    start = time.monotonic()
    backends, left_out = chosen_backends(asked.backend, dry=dry, root=root, budget=asked.budget, say=say)
    settings = Settings(dry, asked.budget, tuple(backends), tuple(asked.only), asked.seed)
    directory = asked.output or (root / "benchmarks" / "results" if root and not dry else Path("reports") / "gpu")
    about = {"budget": settings.budget, "backends": settings.backends, "left_out": left_out, "seed": settings.seed}
    hidden = [str(path) for path in (root, sys.prefix, sys.base_prefix, Path.home()) if path]
    record = Record(directory, dry=dry, stem=asked.stem, about=about, hidden=hidden)
    record.learn(_software(root, asked.commit))
    worker = [*command, "--worker", *(["--dry-run"] if dry else [])]
    stop = threading.Event()
    run = Run(settings, record, worker, stop, start)
    _on_signals(run, stop)
    status = run.go()
    markdown = finished(record)
    say(f"{'all right' if status == 0 else f'{record.bad} FAILED'}{', cut short' if run.ended else ''}")
    say(f"wrote {os.path.relpath(record.path)} and {os.path.relpath(markdown)}")
    return 128 + signal.Signals[run.ended].value if run.ended else status


def _parser(root: Path | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="on_gpu.py",
        description="Correctness and speed of transformer_fast on the CUDA device of this machine, in under ten "
        "minutes. Without a device it is a dry run: every line that can run on a CPU does, at tiny sizes. Exit status "
        "1 if anything of ours is wrong.",
    )
    parser.add_argument("--output", type=Path, help="directory for JSON, Markdown and plots (benchmarks/results)")
    parser.add_argument("--budget", type=float, default=DEFAULT_BUDGET, help="seconds for the whole run (%(default)s)")
    parser.add_argument("--only", nargs="+", default=[], choices=[s.name for s in SECTIONS], metavar="SECTION",
                        help=f"only these, after the environment: {', '.join(s.name for s in SECTIONS)}")  # fmt: skip
    parser.add_argument("--backend", nargs="+", help="back ends of ours (triton cuda; in a dry run triton emulated)")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU, whatever the machine has")
    parser.add_argument("--seed", type=int, default=0, help="of the conformance cases")
    parser.add_argument("--stem", help="name of the files; by default <date>-<device>")
    parser.add_argument("--commit", default=os.environ.get(COMMIT_VARIABLE),
                        help=f"name of the commit, where there is no .git (${COMMIT_VARIABLE})")  # fmt: skip
    parser.add_argument("--render", type=Path, metavar="JSON", help="make Markdown and plots again, and stop")
    parser.add_argument("--choose", type=Path, metavar="JSON",
                        help='let backend="auto" take what was the fastest in a run, and stop')  # fmt: skip
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser


def _render(path: Path) -> int:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        from .report import write_markdown

        say(f"wrote {write_markdown(data, path.with_suffix('.md'))}")
    except (OSError, ValueError, KeyError) as error:
        sys.stderr.write(f"error: --render is {path}, which is not the JSON of a run: {error!r}\n")
        return 2
    return 0


def _choose(path: Path) -> int:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        from .choice import choose

        for entry in choose(data, path.name):
            say(f"{entry.phase}, head_dim up to {entry.head_dim}: {', then '.join(entry.backends)}")
    except (OSError, ValueError, KeyError) as error:
        sys.stderr.write(f"error: --choose is {path}, from which nothing can be chosen: {error!r}\n")
        return 2
    return 0


def _has_device() -> bool:
    """Asked without making a context, which would take memory from the workers."""
    import torch

    return torch.cuda.is_available()


def _on_signals(run: Run, stop: threading.Event) -> None:
    """The first signal ends the run with what it has; the workers go with it."""

    def end(number: int, frame: Any) -> None:
        run.ended = signal.Signals(number).name
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)


def _software(root: Path | None, commit: str | None) -> dict[str, Any]:
    """What the code was; a commit that was named wins over a checkout's own."""
    if commit is None and root is not None:
        from transformer_fast.testing.environment import commit as commit_of_checkout

        commit = commit_of_checkout()
    return {"commit": commit and commit.rstrip("+"), "dirty": bool(commit) and str(commit).endswith("+")}
