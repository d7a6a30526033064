"""What the tests of the CPU back end share: its instruction sets as targets, and programs in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from transformer_fast import _C_cpu
from transformer_fast.testing import available_targets

ROOT = Path(__file__).resolve().parents[1]
ISAS = _C_cpu.available_isas()
VARIABLE = "TRANSFORMER_FAST_CPU_ISA"
DTYPES = [torch.float32, torch.bfloat16]  # float16 takes the road of float32, conversion apart: conformance has it

each_isa = pytest.mark.parametrize("isa", ISAS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
CPU_TARGETS = [t for t in available_targets() if t.backend == "cpu"]
each_cpu_target = pytest.mark.parametrize("target", CPU_TARGETS, ids=lambda t: t.name)


def run_program(program: str, *, status: int = 0, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a Python program in a process of its own."""
    clean = {k: v for k, v in os.environ.items() if k != VARIABLE}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=clean | environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == status, f"status {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done
