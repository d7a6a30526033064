"""The C++ back end of a run: its module as it is there, or built on the spot; in a dry run the emulator instead."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformer_fast.backends import REGISTRY, cuda

#: The back ends that it may be.
NATIVE = ("cuda", "emulated")
BUILD = ("setup.py", "--quiet", "build_ext", "--inplace")
#: Of a run's budget, what a build may take.
BUILD_SHARE = 0.4
#: Asked of a process of its own: this one must not open the device.
_ASK_CAPABILITY = "import torch; print('%d.%d' % torch.cuda.get_device_capability())"


def native_module(backend: str) -> Any:
    """The native module of a back end; None where it does not import."""
    found: Any = REGISTRY[backend]
    return found.module


def why_missing(backend: str) -> str | None:
    """None if the back end's module can be imported, else why not."""
    found: Any = REGISTRY[backend]
    return cuda.native_module(found.module_name)[1]


def chosen_backends(
    asked: Sequence[str] | None, *, dry: bool, root: Path | None, budget: float, say: Callable[[str], None]
) -> tuple[list[str], dict[str, str]]:
    """Back ends of ours for a run, and those that it goes without, with the reason.

    Args:
        asked: by the user; by default Triton's and the one in C++.
        dry: a dry run, in which the emulator stands for CUDA.
        root: the checkout, to build from; None where the package is installed.
        budget: seconds of the run.
        say: tells whoever watches.
    """
    native = "emulated" if dry else "cuda"
    chosen = list(asked or ("triton", native))
    if native not in chosen:
        return chosen, {}
    reason = why_missing(native) if dry else built(root, budget * BUILD_SHARE, say)
    if reason is None:
        return chosen, {}
    say(f"Without the back end {native}: {reason}")
    return [name for name in chosen if name != native], {native: reason}


def built(root: Path | None, seconds: float, say: Callable[[str], None]) -> str | None:
    """Sees to it that the module for CUDA is there, by a build of that alone if need be; None, or why it is not."""
    reason = why_missing("cuda")
    if reason is None or root is None or not (root / "setup.py").exists():
        return reason
    start = time.monotonic()
    asked = subprocess.run([sys.executable, "-c", _ASK_CAPABILITY], capture_output=True, text=True, check=False)
    architecture = "90a" if asked.stdout.startswith("9.") else "80"
    say(f"building the C++ kernels for sm_{architecture} ({reason})")
    choices = {"CUDA": "1", "CUDA_ARCHS": architecture, "MODULES": "cuda"}
    environment = os.environ | {f"TRANSFORMER_FAST_{name}": value for name, value in choices.items()}
    try:
        done = subprocess.run(
            [sys.executable, *BUILD], cwd=root, env=environment, capture_output=True, text=True, timeout=seconds,
            check=False, stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"building it took longer than {seconds:.0f} s"
    if done.returncode:
        return f"building it failed: {_last_words(done.stderr) or _last_words(done.stdout)}"
    say(f"built in {time.monotonic() - start:.0f} s")
    importlib.invalidate_caches()
    cuda.native_module.cache_clear()
    return why_missing("cuda")


def _last_words(text: str) -> str:
    return " ".join(text.strip()[-400:].split())
