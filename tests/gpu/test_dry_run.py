"""The GPU script's dry run from end to end, a run that is cut short, and the table of shapes."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformer_fast.benchmarks.gpu import figures, plan
from transformer_fast.benchmarks.gpu.plan import Settings
from transformer_fast.benchmarks.gpu.shapes import SHAPES, Shape

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "on_gpu.py"

needs_sources = pytest.mark.skipif(not SCRIPT.exists(), reason="not running from a source tree")


def small(name: str) -> Shape:
    return SHAPES[name].shrunk()


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The JSON of a whole dry run."""
    pytest.importorskip("triton")
    folder = tmp_path_factory.mktemp("dry")
    command = [sys.executable, SCRIPT, "--dry-run", "--output", folder, "--commit", "0123456"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=900, cwd=folder)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert not list(folder.glob(".*")), "a temporary file is left"
    return folder / "dry-run.json"


@pytest.fixture(scope="module")
def dry(dry_run: Path) -> dict[str, Any]:
    return json.loads(dry_run.read_text())


@needs_sources
@pytest.mark.slow
class TestDryRun:
    def test_every_section_ran_to_its_end(self, dry: dict[str, Any]) -> None:
        assert dry["dry_run"] and dry["complete"] and dry["passed"]
        assert list(dry["sections"]) == [section.name for section in plan.SECTIONS]
        for name, section in dry["sections"].items():
            if name == "instructions" and "emulated" in dry["left_out"]:
                assert section["status"] == "skipped" and dry["left_out"]["emulated"] in section["text"]
                continue
            assert section["status"] == "done" and section["rows"] and not section["not_run"], name
            assert all(row["status"] in ("ok", "passed", "not applicable") for row in section["rows"]), name

    def test_what_it_was_run_with(self, dry: dict[str, Any]) -> None:
        facts = dry["environment"]
        assert facts["torch"] == torch.__version__
        assert facts["commit"] == "0123456"
        assert facts["limits"].keys() == {"matmul_flops", "copy_bytes_per_second"}

    def test_the_shapes_with_goals_and_all_variants_are_timed(self, dry: dict[str, Any]) -> None:
        rows = {row["name"]: row for row in dry["sections"]["timings"]["rows"]}
        assert {s.name for s in SHAPES.values() if s.goals or s.group in ("variants", "decode")} <= set(rows)
        for row in rows.values():
            assert "sdpa" in row["times"] or "sdpa" in row["missing"]
            for name in dry["backends"]:
                assert row["times"][name]["used"] > 0, "it was not judged"
                assert row["figures"][name]["tflops"] > 0
        assert all("flex" in rows[name]["times"] for name in ("window_1024_16k", "varlen_causal", "decode_ragged_b16"))
        assert all(goal["met"] is None for row in rows.values() for goal in row.get("goals", [])), (
            "a verdict without a device"
        )

    def test_both_back_ends_run_side_by_side(self, dry: dict[str, Any]) -> None:
        """The emulator's in place of the one in C++, where it is built; else a sentence says that it is not there."""
        assert set(dry["backends"]) | set(dry["left_out"]) == {"triton", "emulated"}
        for section in ("smoke", "conformance", "conformance_rest"):
            rows = dry["sections"][section]["rows"]
            assert {row["backend"] for row in rows} == set(dry["backends"])
        for name in ("models", "launch"):
            rows = [row for row in dry["sections"][name]["rows"] if row["kind"] != "graph"]
            assert all(set(dry["backends"]) <= {*row.get("times", ()), *row.get("host_us", ())} for row in rows)

    def test_the_page_says_that_it_is_a_dry_run(self, dry_run: Path) -> None:
        text = dry_run.with_suffix(".md").read_text()
        assert "No figure here means anything" in text
        for heading in ("Goals", "Forward", "Backward (alone)", "Variants", "Decoding", "Conformance", "Sections"):
            assert f"## {heading}" in text
        lines = text.splitlines()
        for first, second in itertools.pairwise(lines):
            if first.startswith("|") and second.startswith("|"):
                assert first.count("|") == second.count("|"), f"rows of unlike length: {first}"

    def test_the_page_can_be_made_again(self, dry_run: Path, tmp_path: Path) -> None:
        copy = shutil.copy(dry_run, tmp_path)
        subprocess.run([sys.executable, SCRIPT, "--render", copy], check=True, cwd=tmp_path)
        assert (tmp_path / "dry-run.md").read_text() == dry_run.with_suffix(".md").read_text()

    def test_plots(self, dry_run: Path) -> None:
        pytest.importorskip("matplotlib")
        names = {path.name for path in dry_run.parent.glob("*.png")}
        assert names == {f"dry-run-{name}.png" for name in ("forward", "backward", "others")}

    def test_no_folder_of_the_machine_is_in_the_results(self, dry_run: Path) -> None:
        for path in (dry_run, dry_run.with_suffix(".md")):
            assert str(ROOT) not in path.read_text()


@needs_sources
@pytest.mark.slow
def test_it_runs_from_a_checkout_that_is_neither_installed_nor_built(tmp_path: Path) -> None:
    """As on a lent machine: sources only, no .git, and nothing beside PyTorch, Triton and NumPy."""
    pytest.importorskip("triton")
    checkout, site = tmp_path / "checkout", tmp_path / "site"
    for folder in ("transformer_fast", "kernels", "benchmarks"):
        left_out = shutil.ignore_patterns("*.so", "__pycache__", "results")
        shutil.copytree(ROOT / folder, checkout / folder, ignore=left_out)
    site.mkdir()
    hidden = re.compile(r"__editable__|transformer_fast|matplotlib|rich|typer|pytest|jinja2|.*\.pth$", re.IGNORECASE)
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if not hidden.match(entry.name):
            (site / entry.name).symlink_to(entry)
    for name in ("matplotlib", "rich", "typer", "pytest", "jinja2"):
        (site / f"{name}.py").write_text("raise ImportError('hidden by a test')")
    python = getattr(sys, "_base_executable", sys.executable)
    sections = ["smoke", "models", "launch"]
    command = [python, checkout / "benchmarks" / "on_gpu.py", "--output", tmp_path, "--only", *sections]
    command += ["--dry-run"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")} | {"PYTHONPATH": str(site)}
    done = subprocess.run(
        command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=600
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert "no plots" in done.stdout
    data = json.loads((tmp_path / "dry-run.json").read_text())
    assert data["environment"]["commit"] is None
    assert data["environment"]["backends"]["cpu"]["available"] is False, "another copy was imported"
    assert list(data["sections"]) == ["environment", *sections]
    assert all(section["rows"] for section in data["sections"].values())


@needs_sources
@pytest.mark.slow
def test_a_run_that_is_ended_keeps_its_rows(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    command = [sys.executable, SCRIPT, "--dry-run", "--output", tmp_path, "--only", "smoke", "conformance"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    path = tmp_path / "dry-run.json"

    def rows() -> list[Any]:
        sections = json.loads(path.read_text())["sections"] if path.exists() else {}
        return sections.get("smoke", {}).get("rows", [])

    deadline = time.monotonic() + 300
    while not rows() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.05)  # the file is read whole at any time: it is replaced, never rewritten
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM, output
    data = json.loads(path.read_text())
    assert data["ended"] == "SIGTERM" and not data["complete"]
    assert data["sections"]["smoke"]["rows"]
    assert "Cut short (SIGTERM)" in path.with_suffix(".md").read_text()
    assert "conformance" in data["planned"] and "conformance" not in data["sections"]


@needs_sources
def test_a_file_that_is_no_run_is_not_rendered(tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    path.write_text('{"rows": []}')
    done = subprocess.run([sys.executable, SCRIPT, "--render", path], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "which is not the JSON of a run" in done.stderr


@pytest.mark.parametrize("name", SHAPES)
def test_only_visible_pairs_count(name: str) -> None:
    shape = small(name)
    pairs = 0
    for rows, keys in shape.sequences:
        for i in range(rows):
            position = i + keys - rows
            pairs += sum(
                (not shape.causal or j <= position) and (shape.window_left is None or j >= position - shape.window_left)
                for j in range(keys)
            )
    assert shape.visible_pairs == pairs * shape.num_heads
    assert shape.flops == (10 if shape.phase == "backward" else 4) * pairs * shape.num_heads * shape.head_dim


def test_the_table_of_shapes() -> None:
    sweep = [s for s in SHAPES.values() if s.name == f"{s.phase}_{s.name.split('_', 1)[1]}"]
    assert {(s.phase, s.causal, s.head_dim, s.seqlen_q) for s in sweep} == {
        (phase, causal, head_dim, 1024 * k)
        for phase in ("forward", "backward")
        for causal in (True, False)
        for head_dim in (64, 128, 256)
        for k in (1, 2, 4, 8, 16)
    }
    assert {(s.batch * s.seqlen_q, s.num_heads * s.head_dim) for s in sweep} == {(16384, 2048)}
    assert next(iter(SHAPES.values())).goals, "headlines come first"
    padded = SHAPES["padded_half"]
    assert padded.lengths is not None and sum(padded.lengths) * 2 == max(padded.lengths) * padded.batch
    assert SHAPES["varlen_causal"].starts[-1] == 16384
    assert all(goal.figure in figures.FIGURE_WORDS for s in SHAPES.values() for goal in s.goals)
    decode = SHAPES["decode_b16_8k"]
    assert decode.bytes_read == 2 * 2 * 16 * 8192 * 8 * 128


def test_budgets_are_shares() -> None:
    assert sum(section.share for section in plan.SECTIONS) == pytest.approx(1.0)
    assert len(plan.SECTIONS) == len({section.name for section in plan.SECTIONS})
    for section in plan.SECTIONS:
        full = section.jobs(Settings(dry=False, backends=("triton", "cuda")))
        assert full and len(section.jobs(Settings(dry=True, backends=("triton", "emulated")))) <= len(full)
        assert json.loads(json.dumps(full)) == full, "jobs travel as JSON"
