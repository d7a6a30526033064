"""The tour: real text through a real pretrained encoder and a decoder trained on the spot, with our kernels."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["run"]


def run(output_dir: Path, quick: bool = False, console: Console | None = None) -> dict[str, Any]:
    """Run the demo and write its picture, its report and its figures.

    Encodes real sentences with the pretrained MiniLM and compares with the reference and with PyTorch;
    trains a byte-level decoder for about a minute and lets it write; times attention alone against
    PyTorch SDPA. Everything shown was measured in this run.

    Args:
        output_dir: made if needed; gets ``demo.png``, ``demo.html`` (one page that needs nothing
            beside itself), ``demo.json`` and the trained decoder's checkpoint in ``decoder/``.
        quick: a few seconds of everything, for tests; the figures mean little.
        console: where to print; a fresh one on standard output if not given.

    Returns:
        all results as plain values (what ``demo.json`` holds), and ``paths``: the files by name.

    Raises:
        ImportError: packages of the ``demo`` extra are missing; the message names them.
        RuntimeError: this Python has no text to read.
    """
    # The rest imports packages of the `demo` extra: checked, and said clearly, before anything runs.
    from transformer_fast.demo import tour

    return tour.run(Path(output_dir), quick, console)
