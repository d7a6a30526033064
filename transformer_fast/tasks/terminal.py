"""What the commands say and ask: results on stdout, all else on stderr, so that results can be piped."""

from __future__ import annotations

import json
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from transformer_fast.spec import UnsupportedError

console = Console()
errors = Console(stderr=True)

# What would move the cursor or change the terminal's state: a model may write anything.
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def say_error(message: str) -> None:
    """One line on stderr."""
    errors.print(f"[bold red]error:[/] {escape(message)}", highlight=False, soft_wrap=True)


@contextmanager
def usage_errors() -> Iterator[None]:
    """Wrong arguments, missing packages and files that cannot be read: one line and exit status 2, no traceback.

    Warnings are told in a line too.
    """

    def tell(message: Warning | str, *_: Any, **__: Any) -> None:
        errors.print(f"[yellow]warning:[/] {escape(str(message))}", highlight=False, soft_wrap=True)

    try:
        with warnings.catch_warnings():
            warnings.showwarning = tell
            yield
    except (ValueError, OSError, ImportError, UnsupportedError) as error:
        say_error(" ".join(str(error).split()))
        raise typer.Exit(2) from error


@contextmanager
def progress(what: str, total: int | None, unit: str) -> Iterator[Callable[..., None]]:
    """A progress bar on stderr; gives the function that is told how many more are done, and perhaps of how many in all.

    Without a unit there is nothing to count: the bar only moves.
    """
    counted = (MofNCompleteColumn(), TextColumn(unit)) if unit else ()
    columns = (TextColumn("{task.description}"), BarColumn(), *counted, TimeElapsedColumn())
    with Progress(*columns, console=errors, transient=True, disable=not errors.is_terminal) as bar:
        task = bar.add_task(what, total=total)

        def advance(done: int, total: int | None = None) -> None:
            bar.update(task, advance=done, total=total)  # None leaves the total as it is

        yield advance


def say(text: str, *, end: str = "\n", style: str | None = None) -> None:
    """Text as it is, at once: without markup and line breaks of our own, and on a terminal without its controls."""
    if console.is_terminal:
        console.out(_CONTROLS.sub("\ufffd", text), end=end, style=style, highlight=False)
    else:
        sys.stdout.write(text + end)
    console.file.flush()


def say_json(**values: Any) -> None:
    """One line of JSON."""
    say(json.dumps(values, ensure_ascii=False))


def say_rows(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """A table on a terminal; elsewhere one line a row, tabs between."""
    shown = [[f"{cell:.4f}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
    if not console.is_terminal:
        for row in shown:
            say("\t".join(" ".join(cell.split()) for cell in row))
        return
    table = Table(*columns, box=None, pad_edge=False, header_style="bold")
    for row in shown:
        table.add_row(*(escape(_CONTROLS.sub("\ufffd", cell)) for cell in row))
    console.print(table)


def read_texts(given: Sequence[str] | None, file: Path | None, *, whole: bool = False) -> list[str]:
    """Texts from arguments, from a file, or from stdin: one a line, or all of it as one."""
    if given and file is not None:
        raise ValueError(f"both texts and --file {file} are given; allowed: one of them")
    if given:
        return list(given)
    if file is not None:
        content = file.read_text(encoding="utf-8")
    elif sys.stdin.isatty():
        raise ValueError("there is no text; allowed: as arguments, by --file, or on stdin")
    else:
        content = sys.stdin.read()
    texts = [content.strip()] if whole else content.splitlines()
    found = [text for text in texts if text.strip()]
    if not found:
        raise ValueError(f"{file or 'stdin'} is empty; allowed: a text as an argument, by --file, or on stdin")
    return found


def parse_options(given: Sequence[str] | None) -> dict[str, Any]:
    """``name=value`` of each; values are JSON, or text where they are none."""
    found = {}
    for option in given or ():
        name, sign, value = option.partition("=")
        if not sign or not name:
            raise ValueError(f"--option {option!r}; allowed: name=value, as in no_repeat_ngram_size=3")
        try:
            found[name.strip().replace("-", "_")] = json.loads(value)
        except ValueError:
            found[name.strip().replace("-", "_")] = value
    return found
