"""Triton's interpreter for the tests of this folder alone: other tests ask what a machine without it has."""

from __future__ import annotations

import numpy as np
import pytest

from transformer_fast.testing.interpreter import repair_bfloat16


@pytest.fixture(autouse=True)
def _interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels are imported inside the tests, after this, and so belong to the interpreter."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    repair_bfloat16()
    with np.errstate(all="ignore"):
        yield
