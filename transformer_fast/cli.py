"""The command line: `transformer-fast info | verify | bench | kernels | demo`, and what models are for (`tasks`).

Exit status: 0 all right, 1 something is wrong (a failed check, a wrong result), 2 wrong usage.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from transformer_fast.tasks.commands import register
from transformer_fast.tasks.terminal import console, say_error

if TYPE_CHECKING:  # what is slow to import is imported by the command that needs it
    from transformer_fast.benchmarks import Row
    from transformer_fast.testing import Outcome, Report

app = typer.Typer(
    name="transformer-fast",
    help="Fused attention for PyTorch: what this machine has, whether it is right, and how fast it is.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_show_locals=False,
)

Threads = Annotated[
    int | None, typer.Option("--threads", min=1, help="Number of threads; PyTorch's default if left out.")
]


def main() -> None:
    """The entry point of the `transformer-fast` command."""
    app()


# ----------------------------------------------------------------------------------------------------------- info


@app.command()
def info(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Show back ends (or why they are missing), processor, instruction sets, threads and versions."""
    from transformer_fast.testing.environment import environment

    facts = environment()
    if as_json:
        print(json.dumps(facts, indent=2))  # noqa: T201  (plain, for other programs)
        return
    table = Table(title="This machine", show_header=False, title_justify="left")
    for key, value in facts.items():
        if key != "backends" and value is not None:
            table.add_row(key.replace("_", " "), escape(str(value)))
    console.print(table)
    table = Table(title="Back ends", title_justify="left")
    for column in ("name", "available", "version", "details"):
        table.add_column(column)
    for name, backend in facts["backends"].items():
        details = [f"{key}: {_words(value)}" for key, value in backend["details"].items()]
        text = escape(backend["reason"] or "\n".join(details))
        table.add_row(name, _yes(backend["available"]), backend["version"] or "-", text)
    console.print(table)


def _words(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _yes(value: bool) -> str:
    return "[green]yes[/]" if value else "[yellow]no[/]"


# --------------------------------------------------------------------------------------------------------- verify


@app.command()
def verify(
    backend: Annotated[
        list[str] | None,
        typer.Option(
            help="A back end (cpu), or one of its instruction sets (cpu/avx2). Repeat for more; all by default."
        ),
    ] = None,
    dtype: Annotated[
        list[str] | None, typer.Option(help="float32, bfloat16 or float16. Repeat for more; all by default.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Only the core cases: under half a minute.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of the inputs: another number draws others.")] = 0,
    output: Annotated[Path, typer.Option(help="Directory for verify.json and verify.html.", file_okay=False)] = Path(
        "reports/verify"
    ),
    threads: Threads = None,
) -> None:
    """Check every back end against the float64 oracle, forward and gradients; exit status 1 if anything fails.

    A result passes when its error is at most twice that of plain PyTorch in the same dtype, plus a few units in the
    last place.
    """
    from transformer_fast.testing import verify as run_verify

    _make_directory(output)
    _set_threads(threads)
    failed = 0
    with _progress("{task.fields[failed]}") as progress:
        task = progress.add_task("checking", total=None, failed="")

        def advance(done: int, total: int, outcome: Outcome) -> None:
            nonlocal failed
            failed += outcome.status in ("failed", "error")
            shown = f"[red]{failed} failed[/]" if failed else "[green]all right so far[/]"
            progress.update(task, completed=done, total=total, description=outcome.case.variant, failed=shown)

        with _usage_errors():
            report = run_verify(backends=backend, dtypes=dtype, quick=quick, seed=seed, progress=advance)
    _print_verify(report)
    _print_unavailable()
    _, html_path = report.write(output)
    console.print(f"Report: {html_path}", soft_wrap=True, highlight=False)
    raise typer.Exit(0 if report.passed else 1)


def _print_unavailable() -> None:
    """What was not checked, so that a missing back end is not taken for a right one."""
    from transformer_fast import backends

    for name, info in backends().items():  # type: ignore[operator]  # a module that can be called
        if not info.available:
            console.print(f"[yellow]not checked:[/] {name}: {escape(info.reason or '')}", highlight=False)


def _print_verify(report: Report) -> None:
    """Counts by target and dtype, then the failures in full."""
    from transformer_fast.testing.verify import DTYPES

    dtypes = [n for n, d in DTYPES.items() if any(o.dtype == d for o in report.outcomes)]
    table = Table(title="passed, by back end and dtype", title_justify="left")
    table.add_column("back end")
    for name in dtypes:
        table.add_column(name, justify="right")
    for target in dict.fromkeys(o.target for o in report.outcomes):
        mine = [o for o in report.outcomes if o.target == target]
        table.add_row(target.name, *(_counts([o for o in mine if o.dtype == DTYPES[n]]) for n in dtypes))
    console.print(table)
    shown = report.failures()[:5]
    for outcome in shown:
        console.print(escape(str(outcome)), style="red", highlight=False)
    if len(report.failures()) > len(shown):
        console.print(f"... and {len(report.failures()) - len(shown)} more failures, in the report", style="red")
    style = "bold green" if report.passed else "bold red"
    console.print(report.summary().splitlines()[0], style=style, highlight=False)


def _counts(outcomes: Sequence[Outcome]) -> str:
    passed = sum(o.passed for o in outcomes)
    unsupported = sum(o.unsupported is not None for o in outcomes)
    color = "green" if passed + unsupported == len(outcomes) else "red"
    extra = f" [yellow](+{unsupported} not supported)[/]" if unsupported else ""
    return f"[{color}]{passed}/{len(outcomes)}[/]{extra}"


# ---------------------------------------------------------------------------------------------------------- bench


@app.command()
def bench(
    cases: Annotated[
        list[str] | None, typer.Argument(help="Cases by name; all by default. --list shows them.", show_default=False)
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Shorter sequences, few repeats: to see that it runs, not for figures.")
    ] = False,
    dtype: Annotated[
        list[str] | None, typer.Option(help="float32, bfloat16 or float16; the first two by default.")
    ] = None,
    peers: Annotated[
        str | None, typer.Option(help="Peers, separated by commas; all by default. --list shows them.")
    ] = None,
    isa: Annotated[str | None, typer.Option(help="Force an instruction set: portable, avx2, amx_bf16...")] = None,
    repeats: Annotated[int | None, typer.Option(min=2, help="Samples of each step.")] = None,
    output: Annotated[Path, typer.Option(help="Directory for bench.json and bench.md.", file_okay=False)] = Path(
        "reports/bench"
    ),
    threads: Threads = None,
    show_list: Annotated[bool, typer.Option("--list", help="Show cases and peers, and stop.")] = False,
) -> None:
    """Measure speed as ratios to peers, interleaved; a wrong result is refused, with exit status 1."""
    from transformer_fast.benchmarks import WrongResultError, run_cases, write_report

    if show_list:
        _print_cases()
        return
    _make_directory(output)
    _set_threads(threads)
    with _progress("") as progress:
        task = progress.add_task("starting", total=None)

        def advance(done: int, total: int, what: str) -> None:
            progress.update(task, completed=done, total=total, description=what)

        try:
            with _usage_errors():
                _require_cpu_backend()
                rows = run_cases(
                    cases or None,
                    dtypes=dtype or ["float32", "bfloat16"],
                    peers=None if peers is None else [name.strip() for name in peers.split(",")],
                    quick=quick,
                    repeats=repeats,
                    isa=isa,
                    progress=advance,
                )
        except WrongResultError as error:
            _fail(str(error), status=1)
    _print_rows(rows)
    _, markdown_path = write_report(rows, output)
    console.print(f"Report: {markdown_path}", soft_wrap=True, highlight=False)


def _print_cases() -> None:
    from transformer_fast.benchmarks import CASES, PEERS

    table = Table(title="Cases", title_justify="left")
    for column in ("name", "what", "size", "goal: times as fast"):
        table.add_column(column)
    for case in CASES.values():
        goals = [f"{name} {value:g}x {case.goal_peer}" for name, value in case.goal.items()]
        table.add_row(case.name, case.title, case.describe(), "\n".join(goals) or "-")
    console.print(table)
    console.print(f"Peers: {', '.join(PEERS)}")


def _print_rows(rows: Sequence[Row]) -> None:
    """One table a dtype, and below it why peers are missing."""
    from transformer_fast.benchmarks import missing_notes

    peers = list(dict.fromkeys(name for row in rows for name in row.peers))
    for dtype in dict.fromkeys(row.dtype for row in rows):
        mine = [row for row in rows if row.dtype == dtype]
        title = f"{dtype} on {mine[0].isa or 'cpu'}: our time, peers' times over ours, share of peak"
        # Narrow: all peers have to fit into 80 columns.
        table = Table(title=title, title_justify="left", box=None, padding=(0, 1, 0, 0), pad_edge=False)
        table.add_column("case", no_wrap=True)
        for column in ("ms", *peers, "goal", "peak"):
            table.add_column(column, justify="right", no_wrap=True)
        for row in mine:
            ratios = [_ratio(row, name) for name in peers]
            table.add_row(row.case, f"{row.ours_ms:.3g}", *ratios, _goal(row), f"{row.fraction_of_peak:.0%}")
        console.print(table)
        console.print()
    for note in missing_notes(rows):
        console.print(escape(note), style="dim", highlight=False)


def _goal(row: Row) -> str:
    if row.goal is None or not row.goal_applies:
        return "-"
    return f"{row.goal:g}x" + ("" if row.goal_peer == "sdpa" else f" {row.goal_peer}")


def _ratio(row: Row, peer: str) -> str:
    if peer not in row.peers:
        return "-"
    ratio = row.peers[peer].ratio
    reached = peer != row.goal_peer or row.goal is None or not row.goal_applies or ratio >= row.goal
    color = "red" if ratio < 1 else "green" if reached else "yellow"
    return f"[{color}]{ratio:.3g}x[/]"


# -------------------------------------------------------------------------------------------------------- kernels


@app.command()
def kernels(
    capability: Annotated[
        list[int] | None, typer.Option(help="90 for compute capability 9.0. Repeat for more; 80, 90, 100 by default.")
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option(help="triton or cuda (those in C++); by default all that can be compiled here.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Only compute capability 9.0.")] = False,
    output: Annotated[Path, typer.Option(help="Directory for kernels.json and kernels.md.", file_okay=False)] = Path(
        "reports/kernels"
    ),
    update_baseline: Annotated[
        bool, typer.Option("--update-baseline", help="Make what is found the baseline that later runs compare with.")
    ] = False,
) -> None:
    """Compile the GPU kernels, in Triton and in C++, for GPUs that need not be here, and read their machine code.

    What a build has compiled is taken from there. Exit status 1 if a kernel spills, loses its tensor cores or TMA
    loads, has fewer CTAs on a multiprocessor than its configuration says, waits for products beside which it computed
    before, or has inner loops over 3% longer than the baseline's.
    """
    from transformer_fast.testing import kernel_report
    from transformer_fast.testing.kernel_tables import print_report

    _make_directory(output)
    with _progress("") as progress:
        task = progress.add_task("planning", total=None)

        def advance(done: int, total: int, what: str) -> None:
            progress.update(task, completed=done, total=total, description=what)

        with _usage_errors():
            report = kernel_report.report(
                capability or ([90] if quick else None), only or (), update_baseline=update_baseline, progress=advance
            )
    print_report(report, console)
    _, markdown_path = report.write(output)
    console.print(f"Report: {markdown_path}", soft_wrap=True, highlight=False)
    raise typer.Exit(0 if report.passed else 1)


# ----------------------------------------------------------------------------------------------------------- demo


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Directory for the report, its plots and data.", file_okay=False)] = Path(
        "reports/demo"
    ),
    quick: Annotated[bool, typer.Option("--quick", help="Smaller in everything: about a minute.")] = False,
    threads: Threads = None,
) -> None:
    """The tour: a real pretrained encoder, a decoder that learns and writes, speed by variant, a report of it all."""
    _make_directory(output)
    _set_threads(threads)
    try:
        from transformer_fast.demo import run

        with _usage_errors():
            _require_cpu_backend()
        run(output, quick=quick, console=console)
    except ImportError as error:
        _fail(f"the demo needs more than is installed ({error}); try: pip install 'transformer-fast[demo]'", status=2)


# --------------------------------------------------------------------------------------------------------- shared


@contextmanager
def _progress(extra: str) -> Iterator[Progress]:
    """A progress bar on the terminal; nothing where there is none, so that logs stay short."""
    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()]
    if extra:
        columns.append(TextColumn(extra))
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        yield progress


@contextmanager
def _usage_errors() -> Iterator[None]:
    """A ValueError in here is about what the user asked for: a message and exit status 2, no traceback."""
    try:
        yield
    except ValueError as error:
        _fail(str(error), status=2)


def _fail(message: str, *, status: int) -> NoReturn:
    say_error(message)
    raise typer.Exit(status)


def _require_cpu_backend() -> None:
    """Timings of the reference must not be shown as ours."""
    from transformer_fast import backends

    info = backends()["cpu"]  # type: ignore[operator]  # a module that can be called
    if not info.available:
        raise ValueError(f"the cpu back end is not available: {info.reason}")


def _make_directory(path: Path) -> None:
    """Before the work, not after it: a report that cannot be written is a waste of minutes."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        _fail(f"--output is {path}, which cannot be made: {error.strerror}", status=2)
    if not os.access(path, os.W_OK | os.X_OK):
        _fail(f"--output is {path}, which cannot be written to", status=2)


def _set_threads(threads: int | None) -> None:
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


register(app)  # generate, classify, tag, answer, summarize, translate, transcribe, embed

if __name__ == "__main__":
    main()
