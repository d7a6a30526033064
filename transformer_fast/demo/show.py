"""The demo's results on the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table

from transformer_fast.demo.results import DecoderResults, EncoderResults
from transformer_fast.demo.speed import Speed, VariantSpeed


def show_encoder(console: Console, results: EncoderResults) -> None:
    """Nearest sentences, differences and speeds."""
    console.print(
        f"{results.sentences} sentences, {results.tokens} tokens, encoded in {results.seconds:.1f} s "
        f"({results.tokens / results.seconds:,.0f} tokens/s)"
    )
    table = Table("cosine", "nearest sentences", title="Sentences nearest to a question", title_justify="left")
    for neighbours in results.neighbours:
        table.add_row("", f"[bold]{escape(neighbours.query)}[/]")
        for score, sentence in neighbours.found:
            table.add_row(f"{score:.3f}", escape(sentence))
        table.add_section()
    console.print(table)
    table = _table("The same weights, computed in other ways", "compared", "largest difference", "1 - smallest cosine")
    for row in results.differences:
        table.add_row(row.compared, f"{row.largest:.2e}", f"{1 - row.smallest_cosine:.1e}")
    console.print(table)
    title = (
        f"Whole model, {results.speed_batch} sentences padded to {results.speed_seqlen} tokens "
        f"({results.padding_share:.0%} padding)"
    )
    table = _speed_table(title)
    _add_speeds(table, results.speeds)
    console.print(table)


def show_decoder(console: Console, results: DecoderResults) -> None:
    """Losses, a sample and speeds."""
    training = results.training
    threads = "1 thread" if training.threads == 1 else f"{training.threads} threads"
    console.print(
        f"{len(training.losses)} steps in {training.wall_seconds:.0f} s on {threads}, "
        f"{training.tokens_per_second:,.0f} bytes/s. "
        f"Validation loss [bold]{results.validation:.3f}[/] nats a byte (from {training.validation[0][1]:.3f}); "
        f"a byte 3-gram model has {results.trigram:.3f}."
    )
    sample = f"[bold]{escape(results.prompt)}[/]{escape(results.sample)}"
    console.print(Panel(sample, title=f"Written by it, {results.sampled_per_second:.0f} bytes/s", title_align="left"))
    table = _speed_table(f"The same decoder on one text of {results.speed_length} bytes")
    for task, speeds in results.speeds.items():
        table.add_row(f"[bold]{task}[/]")
        _add_speeds(table, speeds)
        table.add_section()
    console.print(table)


def show_variants(console: Console, rows: Sequence[VariantSpeed]) -> None:
    """Attention alone."""
    table = _table("Attention alone, against PyTorch SDPA", "variant, sizes", "dtype", "ours, ms", "SDPA, ms", "ratio")
    for row in rows:
        table.add_row(
            f"{row.variant}\n[dim]{row.sizes}[/]", row.dtype, f"{row.ours:.2f}", f"{row.sdpa:.2f}", f"{row.ratio:.1f}x"
        )
    console.print(table)


def _table(title: str, first: str, *others: str) -> Table:
    table = Table(first, title=title, title_justify="left")
    for name in others:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _speed_table(title: str) -> Table:
    return _table(title, "", "milliseconds", "SDPA's time over this")


def _add_speeds(table: Table, speeds: Sequence[Speed]) -> None:
    for speed in speeds:
        name = f"[green]{speed.name}[/]" if speed.name.startswith("ours") else speed.name
        table.add_row(name, f"{speed.milliseconds:.1f}", f"{speed.ratio:.2f}x")
