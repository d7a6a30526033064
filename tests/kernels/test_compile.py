"""The kernels compile for real targets, by each version of Triton that is supported; that needs no GPU.

The interpreter accepts what a compiler does not. All rows of the table are compiled by `make kernels`.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from transformer_fast.testing import kernel_gate as gate
from transformer_fast.testing.kernel_gate import Kernel

pytest.importorskip("triton")
pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
CASES = ("bf16 64 causal", "bf16 64 decode", "bf16 64 bias")
COMPILE = """
import pickle, sys
import triton
from transformer_fast.testing.triton_kernels import CASES, compile_kernels

assert triton.__version__.startswith(sys.argv[2]), (triton.__version__, triton.__file__)
kernels = compile_kernels([case for case in CASES if case.name in sys.argv[3:]], workers=1)
open(sys.argv[1], "wb").write(pickle.dumps(kernels))
"""


def folder_of(version: str) -> Path | None:
    """Where another version of Triton lies, which must not come into the environment itself; None for the own one."""
    import triton

    if triton.__version__.startswith(version):
        return None
    folder = ROOT / "build" / f"triton-{version}"
    if not (ROOT / "Makefile").exists():
        pytest.skip(f"Triton {version} is not here, and there is no Makefile that fetches it")
    variables = [f"VENV={sys.prefix}"]
    done = subprocess.run(
        ["make", "-C", ROOT, *variables, f"build/triton-{version}"], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip(f"Triton {version} is not here and could not be fetched: {done.stderr.strip()[-300:]}")
    return folder


@pytest.fixture(scope="module", params=["3.6", "3.7"])
def kernels(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Sequence[Kernel]:
    """What a version of Triton makes of a few cases, in a process without the interpreter."""
    path = tmp_path_factory.mktemp("compile") / "kernels.pickle"
    environment = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "PYTHONPATH")}
    if folder := folder_of(request.param):
        environment["PYTHONPATH"] = str(folder)
    command = [sys.executable, "-c", COMPILE, path, request.param, *CASES]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return pickle.loads(path.read_bytes())


def test_all_compile(kernels: Sequence[Kernel]) -> None:
    assert {kernel.capability for kernel in kernels} == {80, 90, 100}
    assert {kernel.phase for kernel in kernels} == {"forward", "preprocess", "dkdv", "dq", "decode", "combine", "dbias"}
    assert [f"{kernel.where}: {kernel.error}" for kernel in kernels if kernel.code is None] == []


@pytest.mark.parametrize("rule", [gate.tensor_cores, gate.tma, gate.serialization, gate.occupancy])
def test_they_use_the_machine(kernels: Sequence[Kernel], rule: gate.Rule) -> None:
    codes = [(kernel, kernel.code) for kernel in kernels if kernel.code is not None]
    assert [f"{kernel.where}: {words}" for kernel, code in codes for words in rule(kernel, code, {})] == []
