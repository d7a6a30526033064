"""What every test gets: inputs from a seed that is told, and memory that is poisoned until it is written."""

from __future__ import annotations

import contextlib
import importlib
import os
import random
import secrets
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest

# Read by OpenMP when torch is loaded: idle threads sleep instead of spinning, which on a machine with other work
# makes these many small problems three times as fast.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch

# Triton's own functions (tl.max and the like) are its interpreter's or its compiler's from the moment that it is
# imported, whoever does that first. Here its kernels are interpreted; what is compiled is so in processes of its own.
with pytest.MonkeyPatch.context() as patch, contextlib.suppress(ImportError):
    patch.setenv("TRITON_INTERPRET", "1")
    importlib.import_module("triton")

SEED_VARIABLE = "TRANSFORMER_FAST_TEST_SEED"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--fuzz", type=int, default=100, help="how many random problems the GPU kernels are given; 100 by default"
    )
    parser.addoption(
        "--seed", help=f"seed of all random inputs (or ${SEED_VARIABLE}): a number, 0 by default, or 'fresh'"
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "problem_number" in metafunc.fixturenames:
        metafunc.parametrize("problem_number", range(metafunc.config.getoption("--fuzz")))


def pytest_configure(config: pytest.Config) -> None:
    asked = config.getoption("--seed") or os.environ.get(SEED_VARIABLE) or "0"
    if hasattr(config, "workerinput"):  # a process of pytest-xdist: the first one has drawn already
        asked = os.environ[SEED_VARIABLE]
    seed = secrets.randbelow(10**6) if asked == "fresh" else int(asked)
    os.environ[SEED_VARIABLE] = str(seed)
    _set_hypothesis_profile(config, seed)


def _set_hypothesis_profile(config: pytest.Config, seed: int) -> None:
    """Examples follow the session's seed, so that a failure is seen again with the same `--seed`."""
    import hypothesis

    hypothesis.settings.register_profile(
        "transformer_fast",
        deadline=None,  # shared machines: no test here fails for being slow
        print_blob=True,
        database=None,
        suppress_health_check=[hypothesis.HealthCheck.too_slow],
    )
    hypothesis.settings.load_profile("transformer_fast")
    if getattr(config.option, "hypothesis_seed", None) is None:
        config.option.hypothesis_seed = str(seed)


def pytest_report_header() -> str:
    return f"seed: {session_seed()} (repeat with --seed {session_seed()})"


def session_seed() -> int:
    return int(os.environ[SEED_VARIABLE])


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    outcome: Any = yield
    report = outcome.get_result()
    if report.failed:
        report.sections.append(("seed", f"repeat with --seed {session_seed()}"))


@pytest.fixture(scope="session")
def seed() -> int:
    """The session's seed, for the inputs that a test draws."""
    return session_seed()


@pytest.fixture(autouse=True)
def _seeded(request: pytest.FixtureRequest) -> None:
    """Each test has its own stream of random numbers, whatever ran before it."""
    own = zlib.crc32(f"{request.node.nodeid} {session_seed()}".encode())
    torch.manual_seed(own)
    random.seed(own)


def poisoned(allocate: Callable[..., Any]) -> Callable[..., Any]:
    """The allocating function, with NaN in what it returns (the lowest value for integers).

    Memory fresh from the system is zero, and zeros hide a result that was never written. Tensors of a compiler's
    tracing have no memory and are left alone.
    """

    def allocate_and_poison(*args: Any, **kwargs: Any) -> Any:
        tensor = allocate(*args, **kwargs)
        if torch.compiler.is_compiling() or type(tensor) is not torch.Tensor or tensor.is_meta:
            return tensor
        with torch.no_grad():
            if tensor.dtype.is_floating_point:
                tensor.fill_(float("nan"))
            elif tensor.dtype in (torch.int32, torch.int64):
                tensor.fill_(torch.iinfo(tensor.dtype).min)
        return tensor

    return allocate_and_poison


#: Every way to an uninitialised tensor, as (owner, name).
ALLOCATORS = (
    (torch, "empty"),
    (torch, "empty_like"),
    (torch, "empty_strided"),
    (torch.Tensor, "new_empty"),
    (torch.Tensor, "new_empty_strided"),
)


# PyTorch looks up once which functions ``with torch.device(...)`` is for: before they are others.
with torch.device("meta"):
    assert torch.empty(1).is_meta


@pytest.fixture(autouse=True)
def _poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uninitialised tensors are full of NaN in every test."""
    for owner, name in ALLOCATORS:
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))


@pytest.fixture
def every_product_is_quicker(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a kernel of ours, whatever this machine would find."""
    for name in ("linears", "training"):
        module = importlib.import_module(f"transformer_fast.dropin.{name}")
        monkeypatch.setattr(module, "is_quicker", lambda *_: True)
        monkeypatch.setattr(module, "_quicker", {})


@pytest.fixture
def every_product_is_packed(every_product_is_quicker: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of the small weights that tests have."""
    for name in ("linears", "training"):
        monkeypatch.setattr(f"transformer_fast.dropin.{name}._LEAST", 0)
