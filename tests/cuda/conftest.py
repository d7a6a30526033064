"""The CUDA kernels in the emulator: both machines that it plays."""

from __future__ import annotations

import zlib
from collections.abc import Iterator

import pytest

import transformer_fast
from transformer_fast import ops
from transformer_fast.backends.cuda import EMULATED_CAPABILITY_VARIABLE, native_module


@pytest.fixture(scope="session")
def emulator() -> None:
    """Skips where the emulator is not built."""
    info = transformer_fast.backends()["emulated"]
    if not info.available:
        pytest.skip(info.reason)


@pytest.fixture(params=[90, 80], ids=["sm90", "sm80"])
def capability(request: pytest.FixtureRequest, emulator: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """As on a Hopper GPU, and as on an older one; the schedule of threads and copies is each test's own."""
    module, _ = native_module("_C_emulated")
    module.configure(zlib.crc32(request.node.nodeid.encode()))
    monkeypatch.setenv(EMULATED_CAPABILITY_VARIABLE, str(request.param))
    ops._runners.clear()  # what was prepared for one machine must not serve on another
    yield request.param
    ops._runners.clear()
    module.configure()
