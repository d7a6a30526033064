"""Where the GPU script has its back end in C++ from: it is there, it is built, or the run says that it is not."""

from __future__ import annotations

import json
import os
import sys
import threading
import types
from pathlib import Path
from typing import Any

import pytest
from transformer_fast.benchmarks.gpu import cuda_module, jobs, plan, run
from transformer_fast.benchmarks.gpu.device import DryDevice
from transformer_fast.benchmarks.gpu.plan import Settings
from transformer_fast.benchmarks.gpu.record import Record
from transformer_fast.benchmarks.gpu.report import to_markdown


@pytest.fixture
def missing(monkeypatch: pytest.MonkeyPatch) -> dict[str, str | None]:
    """Why each native back end is missing; a build of the checkout in the tests ends that."""
    reasons: dict[str, str | None] = {"cuda": "not built", "emulated": "not built"}
    monkeypatch.setattr(cuda_module, "why_missing", lambda name: reasons[name])
    return reasons


def choose(
    *asked: str, dry: bool = False, root: Path | None = None, budget: float = 100.0
) -> tuple[list[str], dict[str, str], list[str]]:
    said: list[str] = []
    chosen, left_out = cuda_module.chosen_backends(asked or None, dry=dry, root=root, budget=budget, say=said.append)
    return chosen, left_out, said


def checkout(folder: Path, program: str) -> Path:
    """A checkout whose setup.py is something else."""
    (folder / "setup.py").write_text(program)
    return folder


def test_what_is_there_takes_part(missing: dict[str, str | None]) -> None:
    missing.update(cuda=None, emulated=None)
    assert choose() == (["triton", "cuda"], {}, [])
    assert choose(dry=True) == (["triton", "emulated"], {}, [])
    assert choose("triton") == (["triton"], {}, [])


def test_what_is_not_there_is_left_out_with_a_sentence(missing: dict[str, str | None]) -> None:
    chosen, left_out, said = choose(dry=True)
    assert (chosen, left_out) == (["triton"], {"emulated": "not built"})
    assert said == ["Without the back end emulated: not built"]
    assert choose()[:2] == (["triton"], {"cuda": "not built"})  # installed: there is nothing to build from


def test_it_is_built_for_this_machine_alone(
    missing: dict[str, str | None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_module, "_ASK_CAPABILITY", "print('9.0')")
    program = (
        "import json, os, sys\nfrom pathlib import Path\n"
        "said = {k: v for k, v in os.environ.items() if k.startswith('TRANSFORMER_FAST_')}\n"
        "Path('built.json').write_text(json.dumps([sys.argv[1:], said]))\n"
    )
    monkeypatch.setattr(
        cuda_module, "why_missing", lambda name: None if (tmp_path / "built.json").exists() else "not built"
    )
    for name in list(os.environ):
        if name.startswith("TRANSFORMER_FAST_"):
            monkeypatch.delenv(name)
    chosen, left_out, said = choose(root=checkout(tmp_path, program))
    assert (chosen, left_out) == (["triton", "cuda"], {})
    assert said[0] == "building the C++ kernels for sm_90a (not built)" and said[1].startswith("built in")
    arguments, variables = json.loads((tmp_path / "built.json").read_text())
    assert arguments == ["--quiet", "build_ext", "--inplace"]
    assert variables == {
        f"TRANSFORMER_FAST_{k}": v for k, v in dict(CUDA="1", CUDA_ARCHS="90a", MODULES="cuda").items()
    }


def test_a_build_that_fails_or_takes_too_long_costs_the_back_end(
    missing: dict[str, str | None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_module, "_ASK_CAPABILITY", "print('8.0')")
    broken = checkout(tmp_path, "import sys; sys.exit('transformer_fast: TRANSFORMER_FAST_CUDA=1, but no nvcc')")
    chosen, left_out, said = choose(root=broken)
    assert chosen == ["triton"] and "no nvcc" in left_out["cuda"] and "for sm_80" in said[0]
    slow = checkout(tmp_path, "import time; time.sleep(60)")
    assert "longer than 1 s" in choose(root=slow, budget=2.5)[1]["cuda"]


# ------------------------------------------------------------------------------------------------------ instructions


def test_each_instruction_is_a_job_of_the_back_end_in_cpp() -> None:
    from transformer_fast.testing.instructions import CHECKS

    (section,) = [section for section in plan.SECTIONS if section.name == "instructions"]
    assert plan.SECTIONS.index(section) == 1, "what fails there explains the rest"
    planned = section.jobs(Settings(dry=False, backends=("triton", "cuda")))
    assert [job["name"] for job in planned] == list(CHECKS) and {job["backend"] for job in planned} == {"cuda"}
    assert section.jobs(Settings(dry=False, backends=("triton",))) == []


def test_nothing_of_it_is_compiled_at_run_time() -> None:
    (section,) = [section for section in plan.SECTIONS if section.name == "compile"]
    planned = section.jobs(Settings(dry=True, backends=("triton", "emulated")))
    assert "triton" in {job["contestant"] for job in planned}
    assert "emulated" not in {job["contestant"] for job in planned}


@pytest.mark.parametrize(("given", "status"), [(1, "passed"), (2, "failed"), (None, "not applicable")])
def test_an_instruction(given: int | None, status: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from transformer_fast.testing import instructions
    from transformer_fast.testing.instructions.bench import Comparison

    monkeypatch.setitem(
        instructions.CHECKS, "made_up", lambda bench: [Comparison("one", torch.tensor([given]), torch.tensor([1]))]
    )
    module = types.SimpleNamespace(check_names=lambda capability: [] if given is None else ["made_up"])
    monkeypatch.setattr(jobs, "native_module", lambda name: module)
    row = jobs.run_job(DryDevice(), {"kind": "instruction", "name": "made_up", "backend": "cuda"})
    assert row["status"] == status
    assert ("2 instead of 1" in row["text"]) == (status == "failed")


@pytest.mark.parametrize("left_out", [{"cuda": "building it failed: no nvcc"}, {}])
def test_a_run_without_it_says_so(left_out: dict[str, str], tmp_path: Path) -> None:
    settings = Settings(dry=True, budget=60.0, backends=("triton",), only=("instructions",))
    about: dict[str, Any] = {"budget": 60.0, "backends": ["triton"], "left_out": left_out, "seed": 0}
    record = Record(tmp_path, dry=True, stem="run", about=about)
    broken = [sys.executable, "-c", "raise SystemExit(1)"]  # its environment job fails, and nothing depends on it
    run.Run(settings, record, broken, threading.Event()).go()
    section = json.loads(record.path.read_text())["sections"]["instructions"]
    reason = "building it failed: no nvcc" if left_out else "it was not asked for"
    assert section["status"] == "skipped" and section["text"] == f"without the back end cuda: {reason}"
    page = to_markdown(json.loads(record.path.read_text()))
    assert ("Without the back end cuda: building it failed: no nvcc." in page) == bool(left_out)
