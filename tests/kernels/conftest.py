"""Triton's interpreter for the tests of this folder alone: other tests ask what a machine without it has."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import numpy as np
import pytest

from transformer_fast import ops
from transformer_fast.backends import triton as backend
from transformer_fast.testing.interpreter import prepare_interpreter

CAPABILITY_VARIABLE = "TRANSFORMER_FAST_TRITON_CAPABILITY"


def _forget() -> None:
    """What was prepared for one machine must not serve on another."""
    backend._machine.cache_clear()
    ops._runners.clear()


#: The modules with kernels in them, by name; each takes what it calls from those before it.
KERNEL_MODULES = ("masks", "schedule", "blocks", "scores", "forward", "backward", "decode")


def _forget_compiled_kernels() -> None:
    """A kernel is the interpreter's if it was defined while the variable was set: others are to be imported again.

    Tests of other folders import kernels too, and where several processes share the tests any may come first.
    """
    from triton.runtime.jit import JITFunction

    for name in KERNEL_MODULES:
        module = sys.modules.get(f"transformer_fast.kernels.{name}")
        if module and any(
            isinstance(f, JITFunction) and f.__module__ == module.__name__ for f in vars(module).values()
        ):
            break
    else:
        return
    for name in KERNEL_MODULES:
        sys.modules.pop(f"transformer_fast.kernels.{name}", None)
    _forget()


@pytest.fixture(autouse=True)
def _interpreter(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Kernels are imported inside the tests, after this, and so belong to the interpreter."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    prepare_interpreter()
    _forget_compiled_kernels()
    with np.errstate(all="ignore"):
        yield


@pytest.fixture(params=[90, 80], ids=["descriptors", "pointers"])
def capability(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Both ways to load blocks: as on a machine with tensor descriptors, and as on one without."""
    monkeypatch.setenv(CAPABILITY_VARIABLE, str(request.param))
    _forget()
    yield request.param
    _forget()
