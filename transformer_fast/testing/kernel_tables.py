"""The kernel report as tables: on the terminal, and in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from transformer_fast.testing.kernel_gate import Kernel
from transformer_fast.testing.machine_code import InnerLoop, MachineCode

if TYPE_CHECKING:
    from rich.console import Console

    from transformer_fast.testing.kernel_report import KernelReport

COLUMNS = (
    "problem", "kernel", "tile", "regs", "spills", "smem", "CTAs", "tensor", "TMA", "full", "masked", "waits", "beside",
)  # fmt: skip
LEGEND = (
    "tile: rows x keys, warps, stages. spills: loads and stores of registers. smem: KiB of shared memory. CTAs: how "
    "many fit on a multiprocessor. tensor: tensor-core instructions. TMA: loads by it. full, masked: instructions in "
    "one turn of the loop over whole blocks, and over those with a mask. waits: in a turn of the full loop, for "
    "barriers (b), mbarriers (m), wgmma (w) and cp.async (c). beside: exponentials of that turn that run beside "
    "products of a warpgroup."
)
_WIDTH = 120
_LETTERS = {"barrier": "b", "mbarrier": "m", "wgmma": "w", "cp.async": "c"}


def row(kernel: Kernel) -> list[str]:
    """The cells of one kernel."""
    stages = f" s{kernel.num_stages}" if kernel.num_stages else ""
    tile = "x".join(str(n) for n in kernel.tile if n) + f" w{kernel.num_warps}{stages}"
    cells = [kernel.variant, kernel.phase, tile]
    code = kernel.code
    if code is None:
        return [*cells, *["-"] * (len(COLUMNS) - len(cells))]
    return [
        *cells,
        str(code.registers),
        _spills(code),
        f"{code.shared / 1024:.0f}",
        str(code.ctas_per_sm),
        " ".join(f"{count} {kind}" for kind, count in code.tensor_cores.items()) or "-",
        str(code.tma_loads or "-"),
        _length(code.full),
        _length(code.masked),
        " ".join(f"{count}{_LETTERS[kind]}" for kind, count in code.full.waits.items()) if code.full else "-",
        _beside(code.full),
    ]


def _spills(code: MachineCode) -> str:
    return str(code.spills) if code.spills or code.local_bytes else "-"


def _length(loop: InnerLoop | None) -> str:
    return "-" if loop is None else str(loop.instructions)


def _beside(loop: InnerLoop | None) -> str:
    return f"{loop.overlapped}/{loop.exponentials}" if loop and loop.exponentials and loop.waits.get("wgmma") else "-"


def _tables(kernels: Iterable[Kernel]) -> Iterator[tuple[str, list[Kernel]]]:
    """A table for each machine and language: its title and its rows."""
    groups: dict[str, list[Kernel]] = {}
    for kernel in kernels:
        groups.setdefault(f"{kernel.language}, sm_{kernel.capability}", []).append(kernel)
    yield from groups.items()


def markdown(report: KernelReport) -> str:
    """The whole report."""
    lines = ["# Kernel report", "", report.summary(), ""]
    lines += [f"{note[0].upper()}{note[1:]}." for note in report.notes] + [""] * bool(report.notes)
    lines += [f"- {failure}" for failure in report.failures] + [""] * bool(report.failures)
    lines += [LEGEND, ""]
    for title, kernels in _tables(report.kernels):
        lines += [f"## {title}", "", _cells(COLUMNS), _cells(["---"] * len(COLUMNS))]
        lines += [*(_cells(row(kernel)) for kernel in kernels), ""]
    made = [f"commit {commit}"] if (commit := report.environment.get("commit")) else []
    made += [*(part.compiler for part in report.parts), f"date {report.environment['date']}"]
    lines.append(", ".join(made))
    return "\n".join(lines) + "\n"


def _cells(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def print_report(report: KernelReport, console: Console, most_failures: int = 20) -> None:
    """A table for each compute capability, what is wrong, and one line that sums up."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    if not console.is_terminal:  # a log file is as wide as its lines are long
        console = Console(file=console.file, width=max(console.width, _WIDTH))
    for title, kernels in _tables(report.kernels):
        table = Table(title=title, title_justify="left", box=None, padding=(0, 1, 0, 0), pad_edge=False)
        for number, column in enumerate(COLUMNS):
            table.add_column(column, justify="left" if number < 3 else "right", no_wrap=True)
        for kernel in kernels:
            cells = row(kernel)
            bad = kernel.code is None or cells[4] != "-"
            table.add_row(*cells, style="red" if bad else None)
        console.print(table)
        console.print()
    console.print(LEGEND, style="dim", highlight=False)
    for note in report.notes:
        console.print(escape(note), style="yellow", highlight=False)
    for failure in report.failures[:most_failures]:
        console.print(escape(failure), style="red", highlight=False)
    if len(report.failures) > most_failures:
        console.print(f"... and {len(report.failures) - most_failures} more, in the report", style="red")
    console.print(report.summary(), style="bold green" if report.passed else "bold red", highlight=False)
