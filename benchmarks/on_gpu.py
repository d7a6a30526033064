"""Correctness and speed on the CUDA device of this machine, in under ten minutes; a dry run where there is none.

    python benchmarks/on_gpu.py --output DIR [--budget SECONDS] [--only SECTION ...] [--dry-run]

Runs from a checkout that is neither installed nor built, with PyTorch and Triton alone; installed, it is
``python -m transformer_fast.benchmarks.on_gpu``.
"""

from __future__ import annotations

import sys
from pathlib import Path


def _use_checkout() -> Path:
    """Makes the checkout that this file stands in importable.

    ``kernels/`` and ``benchmarks/`` stand beside the package and are installed inside it; here the package's own
    search path is told to look for them where they stand.
    """
    root = Path(__file__).resolve().parents[1]
    here = str(root / "benchmarks")  # where Python looks first for a script, but these are no top-level modules
    sys.path[:] = [str(root), *(path for path in sys.path if path != here)]
    import transformer_fast

    transformer_fast.__path__.append(str(root))
    return root


def _run() -> int:
    if __package__:
        root, command = None, [sys.executable, "-m", f"{__package__}.on_gpu"]
    else:
        root, command = _use_checkout(), [sys.executable, str(Path(__file__).resolve())]
    from transformer_fast.benchmarks.gpu.main import main

    return main(sys.argv[1:], command, root)


if __name__ == "__main__":
    sys.exit(_run())
