"""The process at the device: takes jobs as lines of JSON, answers each with one line."""

from __future__ import annotations

import json
import os
import sys
from typing import TextIO

#: Begins a line that is an answer; whatever else comes out of the pipe (a sanitizer's report, say) is not one.
MARK = "@row "
#: Begins a line that says whose code runs next.
AT = "@at "


def serve(*, dry: bool) -> None:
    """Answers jobs from stdin until it ends, or until the device cannot be used any more."""
    # Libraries print to stdout; the pipe is for answers alone, and what they print goes where errors go.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    from .device import open_device
    from .jobs import run_job

    device = open_device(dry=dry)
    device.notify = lambda name: _write(answers, AT + name)
    for line in sys.stdin:
        row = run_job(device, json.loads(line))
        _write(answers, MARK + json.dumps(row, allow_nan=False))
        if row.get("fatal"):
            break


def _write(answers: TextIO, text: str) -> None:
    answers.write(text + "\n")
    answers.flush()
