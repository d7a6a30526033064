"""Triton's interpreter for the tests of this folder alone: other tests ask what a machine without it has."""

from __future__ import annotations

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


@pytest.fixture(autouse=True)
def _interpreter(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Kernels are imported inside the tests, after this, and so belong to the interpreter."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    prepare_interpreter()
    with np.errstate(all="ignore"):
        yield


@pytest.fixture(params=[90, 80], ids=["descriptors", "pointers"])
def capability(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Both ways to load blocks: as on a machine with tensor descriptors, and as on one without."""
    monkeypatch.setenv(CAPABILITY_VARIABLE, str(request.param))
    _forget()
    yield request.param
    _forget()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "problem_number" in metafunc.fixturenames:
        metafunc.parametrize("problem_number", range(metafunc.config.getoption("--fuzz")))
