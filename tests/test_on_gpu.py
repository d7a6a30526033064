"""The GPU script without a GPU: its dry run from end to end, what it refuses, and what is left when it is cut short."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import threading
import time
import types
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformer_fast.benchmarks.gpu import check, crew, figures, jobs, peers, plan, report, run, timing, work
from transformer_fast.benchmarks.gpu.crew import Crew, Worker
from transformer_fast.benchmarks.gpu.device import CudaDevice, DryDevice
from transformer_fast.benchmarks.gpu.plan import Section, Settings
from transformer_fast.benchmarks.gpu.record import Record, slug
from transformer_fast.benchmarks.gpu.shapes import SHAPES, Shape
from transformer_fast.benchmarks.gpu.work import Contestant, make_step, make_work, ours

from transformer_fast import attention, attention_varlen

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "benchmarks" / "on_gpu.py"
CPU = torch.device("cpu")

needs_sources = pytest.mark.skipif(not SCRIPT.exists(), reason="not running from a source tree")


def small(name: str) -> Shape:
    return SHAPES[name].shrunk()


# ------------------------------------------------------------------------------------------------------ the dry run


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
            assert row["times"]["triton"]["used"] > 0, "it was not judged"
            assert "sdpa" in row["times"] or "sdpa" in row["missing"]
            assert row["figures"]["triton"]["tflops"] > 0
        assert all("flex" in rows[name]["times"] for name in ("window_1024_16k", "varlen_causal", "decode_ragged_b16"))
        assert all(goal["met"] is None for row in rows.values() for goal in row.get("goals", [])), (
            "a verdict without a device"
        )

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


# ------------------------------------------------------------------------------------------------------- the shapes


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
        full = section.jobs(Settings(dry=False))
        assert full and len(section.jobs(Settings(dry=True))) <= len(full)
        assert json.loads(json.dumps(full)) == full, "jobs travel as JSON"


# ---------------------------------------------------------------------------------------------- what is refused


def time_it(name: str, backends: tuple[str, ...] = ("reference",)) -> dict[str, Any]:
    job = {"kind": "timing", "name": name, "backends": list(backends), "seconds": 0.0, "setup_seconds": 60.0}
    return jobs.run_job(DryDevice(), job)


def spoil(monkeypatch: pytest.MonkeyPatch, change: Any) -> None:
    """Ours, with something done to its result."""
    right = work.ours

    def wrong(problem: work.Work, backend: str) -> Contestant:
        contestant = right(problem, backend)
        return replace(contestant, forward=lambda *qkv: change(contestant.forward(*qkv)))

    monkeypatch.setattr(jobs, "ours", wrong)


@pytest.mark.parametrize("name", ["forward_causal_hd128_8k", "backward_causal_hd128_8k", "varlen_causal_backward"])
def test_a_right_result_is_timed(name: str) -> None:
    row = time_it(name)
    assert row["status"] == "ok", row["text"]
    assert {"reference", "sdpa", "sdpa_math"} <= set(row["times"])
    assert 0 < row["times"]["reference"]["used"] <= 1
    assert row["ratios"]["reference"]["sdpa"]["p20"] <= row["ratios"]["reference"]["sdpa"]["p80"]


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda out: out * 1.05, "out of entry 0: FAIL"),
        (lambda out: torch.cat([out[:, :, :-1], out[:, :, :1]], dim=2), "out of entry 0: FAIL"),
        (lambda out: torch.cat([out[:, :1], out[:, :1]], dim=1), "out of entry 0: FAIL"),
        (lambda out: out.index_fill(2, torch.tensor([7]), float("nan")), "out has NaN"),
    ],
    ids=["scaled", "last_row", "second_head", "nan"],
)
def test_a_wrong_result_has_no_speed(change: Any, complaint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch, change)
    monkeypatch.setattr(timing, "in_rounds", lambda *_: pytest.fail("it was timed"))
    row = time_it("forward_causal_hd128_8k")
    assert row["status"] == "wrong"
    assert complaint in row["text"]
    assert not row["times"]


@pytest.mark.parametrize("which", range(3))
def test_wrong_gradients_have_no_speed(which: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One gradient is lost, the others and the output are right."""
    right = work.ours

    def wrong(problem: work.Work, backend: str) -> Contestant:
        contestant = right(problem, backend)

        def forward(*qkv: torch.Tensor) -> torch.Tensor:
            return contestant.forward(*(0 * t + t.detach() if i == which else t for i, t in enumerate(qkv)))

        return replace(contestant, forward=forward)

    monkeypatch.setattr(jobs, "ours", wrong)
    row = time_it("backward_causal_hd128_8k")
    assert row["status"] == "wrong"
    assert ("dq", "dk", "dv")[which] in row["text"]


def test_a_lost_block_of_keys_shows_in_the_slice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only some rows and keys of a long problem are looked at; each row sees all keys."""
    monkeypatch.setattr(check, "SLICE", 8)
    monkeypatch.setattr(check, "CHUNK_SCORES", 500)
    shape = replace(small("backward_full_hd128_8k"), seqlen_q=97, seqlen_k=97, batch=1)
    problem = make_work(shape, CPU)
    judge = check.Judge(problem)
    assert {len(judge._rows(0)), len(judge._keys(0))} == {8}

    def forget(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        keep = torch.ones(1, 97, dtype=torch.bool).index_fill(1, torch.arange(40, 43), False)
        out = attention(q, k, v, key_padding_mask=keep, backend="reference")
        assert isinstance(out, torch.Tensor)
        return out

    right, wrong = ours(problem, "reference"), Contestant("forgetful", forget)
    assert judge.complaint(right, make_step(problem, right)())[0] == ""
    assert "out of entry 0" in judge.complaint(wrong, make_step(problem, wrong)())[0]


def test_slices_hold_both_ends() -> None:
    for n in (1, 5, check.SLICE, check.SLICE + 1, 16384):
        places = check.slice_of(n, CPU).tolist()
        assert places[0] == 0 and places[-1] == n - 1
        assert len(places) == len(set(places)) == min(n, check.SLICE)


def test_a_wrong_model_has_no_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformer_fast.benchmarks.gpu import model

    name = next(iter(model.MODELS))
    job = {"kind": "model", "name": name, "backends": ["reference"], "seconds": 0.0}
    assert set(jobs.run_job(DryDevice(), job)["times"]) == {"sdpa", "reference"}
    monkeypatch.setattr("transformer_fast.models.layers.attention", lambda *a, **k: 1.1 * attention(*a, **k))
    row = jobs.run_job(DryDevice(), job)
    assert row["status"] == "wrong" and "reference" not in row["times"]


def test_a_graph_that_does_not_follow_its_inputs_is_refused() -> None:
    class Frozen(DryDevice):
        def capture(self, step: Any) -> Any:
            return (lambda: None), step()

    job = {"kind": "graph", "name": "decode_graph", "backend": "reference"}
    assert jobs.run_job(DryDevice(), job)["status"] == "ok"
    row = jobs.run_job(Frozen(), job)
    assert row["status"] == "failed" and "a replay on new data" in row["text"]


def test_peers_that_fail_or_compute_something_else_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(problem: work.Work, device: Any) -> Contestant:
        raise RuntimeError("no such kernel\nand more")

    def other(problem: work.Work, device: Any) -> Contestant:
        return Contestant("other", lambda q, k, v: q * 2)

    both = (peers.Peer("broken", "sdpa", broken), peers.Peer("other", "sdpa", other))
    monkeypatch.setattr(jobs, "peers_of", lambda device: both)
    row = time_it("forward_full_hd64_4k")
    assert row["status"] == "ok"
    assert row["missing"]["broken"] == "failed: RuntimeError: no such kernel and more"
    assert row["missing"]["other"].startswith("computes something else: out of entry 0")
    assert set(row["times"]) == {"reference"}


def test_what_a_back_end_cannot_do_is_not_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    row = time_it("forward_full_hd64_4k", ("triton",))
    assert row["status"] == "not applicable"
    assert "triton" in row["missing"]


# ----------------------------------------------------------------------------------------- peers that are not here


def _window(options: dict[str, Any]) -> dict[str, Any]:
    left, right = options.pop("window_size", (-1, -1))
    return options | {"window_size": (left, right), "backend": "reference"}


def _fake_flash_attn() -> types.ModuleType:
    """flash-attn's calls, as its documentation has them, computed by the reference."""
    module: Any = types.ModuleType("flash_attn")

    def flash_attn_func(q: Any, k: Any, v: Any, causal: bool = False, window_size: Any = (-1, -1)) -> Any:
        heads_first = [t.transpose(1, 2) for t in (q, k, v)]
        return attention(*heads_first, **_window({"causal": causal, "window_size": window_size})).transpose(1, 2)

    def flash_attn_varlen_func(
        q: Any,
        k: Any,
        v: Any,
        cu_q: Any,
        cu_k: Any,
        max_q: int,
        max_k: int,
        causal: bool = False,
        window_size: Any = (),
    ) -> Any:
        window_size = window_size or (-1, -1)
        options = _window({"causal": causal, "window_size": window_size})
        return attention_varlen(q, k, v, cu_q, cu_k, max_q, max_k, **options), "the log-sum-exp"

    def flash_attn_with_kvcache(
        q: Any, k_cache: Any, v_cache: Any, cache_seqlens: Any = None, causal: bool = False
    ) -> Any:
        q, k, v = (t.transpose(1, 2) for t in (q, k_cache, v_cache))
        return attention(q, k, v, seqlens_k=cache_seqlens, causal=causal, backend="reference").transpose(1, 2)

    for function in (flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache):
        setattr(module, function.__name__, function)
    return module


@pytest.mark.parametrize("name", [n for n, s in SHAPES.items() if s.group != "forward" or s.goals])
def test_flash_attn_would_do_the_same_work(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn", _fake_flash_attn())
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: name if name == "flash_attn" else None)
    problem = make_work(small(name), CPU)
    peer = next(p for p in peers.PEERS if p.name == "flash_attn")
    if problem.lengths is not None and not problem.shape.is_decode:
        with pytest.raises(work.NotApplicableError, match="key lengths"):
            peer.setup(problem, DryDevice())
        return
    contestant = peer.setup(problem, DryDevice())
    assert contestant is not None
    assert check.Judge(problem).complaint(contestant, make_step(problem, contestant)())[0] == ""


@pytest.mark.parametrize("version", ["2.10", "2.12"])
@pytest.mark.parametrize("name", ["varlen_causal", "varlen_full", "varlen_causal_backward"])
def test_pytorchs_packed_call_would_do_the_same_work(name: str, version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def old(q: Any, k: Any, v: Any, cu_q: Any, cu_k: Any, max_q: int, max_k: int, is_causal: bool = False) -> Any:
        return attention_varlen(q, k, v, cu_q, cu_k, max_q, max_k, causal=is_causal, backend="reference")

    def new(
        q: Any, k: Any, v: Any, cu_q: Any, cu_k: Any, max_q: int, max_k: int, *, window_size: Any = (-1, -1)
    ) -> Any:
        return old(q, k, v, cu_q, cu_k, max_q, max_k, window_size == (-1, 0))

    module: Any = types.ModuleType("torch.nn.attention.varlen")
    module.varlen_attn = old if version == "2.10" else new
    module.__spec__ = object()
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", module)
    problem = make_work(small(name), CPU)
    contestant = peers._sdpa_varlen(problem, DryDevice())
    assert contestant is not None
    assert check.Judge(problem).complaint(contestant, make_step(problem, contestant)())[0] == ""


class _Event:
    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.time = time.perf_counter()

    def synchronize(self) -> None:
        assert self.time

    def elapsed_time(self, end: _Event) -> float:
        return 1e3 * (end.time - self.time)


class _Graph:
    def replay(self) -> None: ...


def test_the_cuda_device_line_by_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every line of it, with a stand-in for each call into CUDA: names and arguments, not behaviour."""
    found = types.SimpleNamespace(
        name="NVIDIA H100 80GB HBM3",
        major=9,
        minor=0,
        multi_processor_count=132,
        total_memory=2**24,
        L2_cache_size=2**16,
    )
    stream = types.SimpleNamespace(wait_stream=lambda other: None)
    slept = []
    stand_ins: dict[str, Any] = {
        "get_device_properties": lambda index: found,
        "synchronize": lambda: None,
        "Event": _Event,
        "_sleep": slept.append,
        "Stream": lambda: stream,
        "current_stream": lambda: stream,
        "stream": lambda s: contextlib.nullcontext(),
        "CUDAGraph": _Graph,
        "graph": lambda g: contextlib.nullcontext(),
        "empty_cache": lambda: None,
        "max_memory_allocated": lambda: 5,
        "reset_peak_memory_stats": lambda: None,
    }
    for name, stand_in in stand_ins.items():
        assert hasattr(torch.cuda, name), f"torch.cuda has no {name}"
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(CudaDevice, "matmul_size", 16)
    monkeypatch.setattr(CudaDevice, "most_rounds", 2)
    device = CudaDevice("cpu")
    assert device.is_healthy() and device.peak_bytes() == 5
    device.release()
    assert device.seconds(lambda: None, lead=1e-4) > 0
    assert slept and all(isinstance(cycles, int) and cycles > 0 for cycles in slept)
    replay, results = device.capture(lambda: {"out": 3})
    replay()
    assert results == {"out": 3}
    limits = device.limits()
    assert limits["matmul_flops"] > 0 and limits["copy_bytes_per_second"] > 0
    facts = device.facts()
    assert facts["capability"] == "9.0" and facts["multiprocessors"] == 132
    assert callable(device.compiled(lambda x: x))
    row = jobs.run_job(device, {"kind": "timing", "name": "decode_b16_8k", "backends": []})
    assert row["status"] == "error" and "fatal" not in row, "the full shape has no place in a test, its failure has"

    def lost() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    assert jobs.run_job(device, {"kind": "launch", "name": "no such"})["fatal"]


def test_nvidia_smi_is_read_where_there_is_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho '580.1, 1980 MHz, 2619 MHz, 1980 MHz, 600 W, 700 W, 50'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: types.SimpleNamespace(total_memory=2**24))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(CudaDevice, "matmul_size", 4)
    facts = CudaDevice("cpu")._under_load()
    assert facts["driver"] == "580.1"
    assert facts["clocks"]["clocks.sm"] == "1980 MHz" and facts["clocks"]["power.limit"] == "700 W"
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    assert CudaDevice("cpu")._under_load() == {}


def test_dropout_is_seeded_on_the_cpu_for_other_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or a device's own generator would draw another mask than the oracle's."""
    from transformer_fast.testing import cases

    torch.manual_seed(3)
    due = torch.randint(2**60, (1,))
    torch.manual_seed(3)
    real = torch.randint
    monkeypatch.setattr(
        torch, "randint", lambda *a, **k: pytest.fail("drawn there") if "device" in k else real(*a, **k)
    )
    with cases.seeds_of_the_cpu():
        assert torch.equal(torch.randint(2**60, (1,), device="cpu"), due)


# ------------------------------------------------------------------------------------------- processes and the record

#: A worker without PyTorch: does what the job's name says.
WORKER = """
import json, os, sys, time
print("a library's chatter", flush=True)
for line in sys.stdin:
    job = json.loads(line)
    if job["name"] == "dies":
        sys.stderr.write("last words\\n"); sys.stderr.flush(); os._exit(9)
    if job["kind"] == "timing":
        for who in (*job["backends"], "sdpa", "flex"):
            if who not in job.get("without", {}):
                print("@at " + who, flush=True)
                if who in job["name"].split("_"):
                    os._exit(3)
    if job["name"] == "hangs":
        time.sleep(600)
    row = dict(job, status="ok", pid=os.getpid())
    if job["name"] == "fatal":
        row.update(status="error", fatal=True, text="broken")
    print("@row " + json.dumps(row), flush=True)
    if job["name"] == "fatal":
        break
"""


def spawn() -> Worker:
    return Worker([sys.executable, "-c", WORKER], {})


def named(*names: str) -> list[dict[str, Any]]:
    return [{"kind": "launch", "name": name} for name in names]


@pytest.fixture
def a_crew() -> Iterator[Crew]:
    made = Crew(spawn, threading.Event())
    yield made
    made.kill()


def run_crew(a_crew: Crew, *names: str, workers: int = 1, **options: float) -> tuple[dict[str, Any], list[Any]]:
    rows: dict[str, Any] = {}
    now = time.monotonic()
    limits = {"deadline": now + 60, "job_seconds": 60.0, "last_call": now + 90} | options
    left = a_crew.run(named(*names), lambda row: rows.update({row["name"]: row}), workers=workers, **limits)
    return rows, left


def test_a_worker_that_dies_costs_one_row(a_crew: Crew) -> None:
    rows, left = run_crew(a_crew, "a", "dies", "b", "fatal", "c")
    assert not left
    assert {name: row["status"] for name, row in rows.items()} == {
        "a": "ok",
        "dies": "crashed",
        "b": "ok",
        "fatal": "error",
        "c": "ok",
    }
    assert "last words" in rows["dies"]["text"] and "status 9" in rows["dies"]["text"]
    assert "a library's chatter" in rows["dies"]["text"]
    assert len({rows[name]["pid"] for name in "abc"}) == 3


def test_a_worker_that_hangs_is_ended(a_crew: Crew) -> None:
    rows, _ = run_crew(a_crew, "hangs", "a", job_seconds=1.5)
    assert rows["hangs"]["status"] == "timeout"
    assert rows["a"]["status"] == "ok"


def test_workers_are_kept_and_jobs_shared(a_crew: Crew) -> None:
    rows, _ = run_crew(a_crew, *"abcdef", workers=2)
    assert len({row["pid"] for row in rows.values()}) <= 2
    again, _ = run_crew(a_crew, "g")
    assert again["g"]["pid"] in {row["pid"] for row in rows.values()}


def test_no_job_begins_past_the_deadline(a_crew: Crew) -> None:
    rows, left = run_crew(a_crew, "a", "b", deadline=time.monotonic() - 1)
    assert not rows and [job["name"] for job in left] == ["a", "b"]


def test_stopping_ends_a_worker_that_hangs(a_crew: Crew) -> None:
    threading.Timer(1.0, a_crew._stop.set).start()
    start = time.monotonic()
    rows, left = run_crew(a_crew, "a", "hangs", "b")
    assert time.monotonic() - start < 30
    assert set(rows) == {"a"} and [job["name"] for job in left] == ["b"]


def make_record(folder: Path) -> Record:
    return Record(folder, dry=False, stem=None, about={"budget": 60.0}, hidden=["/some/home"])


def make_run(folder: Path, budget: float = 60.0) -> run.Run:
    return run.Run(
        Settings(dry=False, budget=budget), make_record(folder), [sys.executable, "-c", WORKER], threading.Event()
    )


def test_a_section_that_throws_is_recorded_and_the_next_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(settings: Settings) -> list[Any]:
        raise KeyError("no such table")

    sections = (
        Section("first", "", 0.3, broken),
        Section("second", "", 0.3, lambda _: named("a", "dies", "b")),
        Section("third", "", 0.4, lambda _: named("c")),
    )
    monkeypatch.setattr(run, "SECTIONS", sections)
    a_run = make_run(tmp_path)
    assert a_run.go() == 1
    data = json.loads(a_run.record.path.read_text())
    assert data["complete"] and not data["passed"]
    assert data["sections"]["first"]["status"] == "failed"
    assert "KeyError: 'no such table'" in data["sections"]["first"]["text"]
    assert [row["status"] for row in data["sections"]["second"]["rows"]] == ["ok", "crashed", "ok"]
    assert data["sections"]["third"]["status"] == "done"
    text = report.to_markdown(data)
    assert "no such table" in text and "| third | done |" in text


def test_a_peer_that_takes_the_process_with_it_takes_no_part_any_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does it cost a row of ours; ours that does the same costs its own."""
    names = ("first", "flex_dies", "triton_dies", "flex_would_die_too", "last")
    timings = [{"kind": "timing", "name": name, "backends": ["triton"]} for name in names]
    monkeypatch.setattr(run, "SECTIONS", (Section("timings", "", 1.0, lambda _: timings),))
    a_run = make_run(tmp_path)
    assert a_run.go() == 1
    rows = json.loads(a_run.record.path.read_text())["sections"]["timings"]["rows"]
    assert [(row["name"], row["status"]) for row in rows] == [
        ("first", "ok"),
        ("flex_dies", "ok"),
        ("triton_dies", "crashed"),
        ("flex_would_die_too", "ok"),
        ("last", "ok"),
    ]
    assert rows[2]["at"] == "triton"
    assert rows[3]["without"] == {"flex": "left out: it took the process with it (crashed) at flex_dies"}


def test_who_is_left_out_is_missing_with_the_reason() -> None:
    job = {"kind": "timing", "name": "forward_full_hd64_4k", "backends": ["reference"], "seconds": 0.0}
    row = jobs.run_job(DryDevice(), job | {"setup_seconds": 60.0, "without": {"sdpa": "left out: it crashed"}})
    assert row["missing"]["sdpa"] == "left out: it crashed" and "sdpa" not in row["times"]
    late = jobs.run_job(DryDevice(), job | {"setup_seconds": -1.0})
    assert set(late["times"]) == {"reference"}
    assert late["missing"]["sdpa"] == "no time was left to set it up"


def test_time_that_is_used_up_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "SECTIONS", (Section("only", "", 1.0, lambda _: named("a", "b")),))
    a_run = make_run(tmp_path, budget=-1.0)
    assert a_run.go() == 0
    data = json.loads(a_run.record.path.read_text())
    assert data["sections"]["only"]["status"] == "cut short"
    assert data["sections"]["only"]["not_run"] == ["a", "b"]
    assert "only, not run: a, b." in report.to_markdown(data)


def test_the_record_is_whole_after_every_row(tmp_path: Path) -> None:
    record = make_record(tmp_path)
    record.begin("timings", "speed")
    for place in range(3):
        text = 'File "/some/home/code/file.py"\nError'
        record.add("timings", {"kind": "launch", "name": str(place), "status": "error", "text": text})
        data = json.loads(record.path.read_text())
        assert [row["name"] for row in data["sections"]["timings"]["rows"]] == [str(n) for n in range(place + 1)]
        assert not data["complete"]
    assert data["sections"]["timings"]["rows"][0]["text"] == 'File "code/file.py"\nError'
    assert record.bad == 3
    assert [path.name for path in tmp_path.iterdir()] == [record.path.name]
    record.learn({"device": "NVIDIA H100 80GB HBM3"})
    assert record.path.name.endswith("-h100-80gb-hbm3.json")
    assert [path.name for path in tmp_path.iterdir()] == [record.path.name]


def test_a_peers_compilation_is_not_our_failure(tmp_path: Path) -> None:
    record = make_record(tmp_path)
    record.begin("compile", "")
    for who, bad in (("flex", 0), ("triton", 1)):
        record.add("compile", {"kind": "compile", "name": "a", "contestant": who, "status": "timeout", "text": ""})
        assert record.bad == bad


def test_names_of_devices() -> None:
    assert slug("NVIDIA H100 80GB HBM3") == "h100-80gb-hbm3"
    assert slug("NVIDIA GeForce RTX 4090") == "geforce-rtx-4090"
    assert slug("") == "unknown-device"


def timed_row(name: str, **times: float) -> dict[str, Any]:
    """A row of times in milliseconds, the first of them ours."""
    shape, (own, *others) = SHAPES[name], times
    stats = {who: {"ms": ms, "p20": ms, "p80": ms} for who, ms in times.items()}
    ratios = {who: dict.fromkeys(("median", "p20", "p80"), times[who] / times[own]) for who in others}
    return {
        "kind": "timing", "name": name, "status": "ok", "times": stats, "ratios": {own: ratios}, "flops": shape.flops,
        "bytes_read": shape.bytes_read, "is_decode": shape.is_decode,
    }  # fmt: skip


def test_goals_are_judged_on_their_device_only() -> None:
    limits = {"matmul_flops": 8e14, "copy_bytes_per_second": 3e12}
    row = timed_row("forward_causal_hd128_8k", triton=1.0, sdpa_flash=1.2, sdpa_cudnn=0.9, flex=1.5)
    found = figures.completed(row, {"device": "NVIDIA H100 80GB HBM3", "limits": limits})
    mine = found["figures"]["triton"]
    assert mine["tflops"] == pytest.approx(549.8, abs=0.1)
    assert mine["share_of_matmul"] == pytest.approx(0.687, abs=0.001)
    assert (mine["best_torch"], mine["over_torch"]) == ("sdpa_cudnn", 0.9)
    assert (mine["best_sdpa"], mine["best_flex"], mine["over_flex"]) == ("sdpa_cudnn", "flex", 1.5)
    assert [goal["met"] for goal in found["goals"]] == [True]
    assert figures.completed(row, {"device": "NVIDIA H200", "limits": limits})["goals"][0]["met"] is None
    slow = timed_row("forward_causal_hd128_8k", triton=2.0)
    assert figures.completed(slow, {"device": "an H100", "limits": limits})["goals"][0]["met"] is False


def test_figures_of_decoding_and_padding() -> None:
    facts = {"device": "H100", "limits": {"matmul_flops": 8e14, "copy_bytes_per_second": 3e12}}
    decode = figures.completed(timed_row("decode_b16_8k", triton=0.2, sdpa_flash=0.3, flex=0.19), facts)
    assert decode["figures"]["triton"]["gigabytes_per_second"] == pytest.approx(2684, abs=1)
    assert {g["figure"]: g["met"] for g in decode["goals"]} == {
        "share_of_copy": True,
        "over_sdpa": True,
        "over_flex": False,
    }
    padded = figures.completed(timed_row("padded_half", triton=1.0, triton_unpadded=1.9), facts)
    assert [(g["reached"], g["met"]) for g in padded["goals"]] == [(1.9, True)]
    window = timed_row("window_1024_16k", triton=1.0, sdpa_efficient=7.0, sdpa_flash_no_window=2.0)
    assert figures.completed(window, facts)["figures"]["triton"]["over_sdpa"] == 7.0, "not the one without a window"


@pytest.mark.parametrize("tool", run.SANITIZER_TOOLS)
def test_what_the_sanitizer_says(tool: str) -> None:
    rows = [{"case": "smoke_packed", "status": "passed"}]
    summary = run.SANITIZER_TOOLS[tool]
    clean = f"========= {summary}: 0 hazards displayed (0 errors, 0 warnings)"
    found = f"========= {summary}: 3 errors"
    row = run._sanitized(tool, summary, rows, [(0, ["chatter", clean])])
    assert (row["status"], row["summary"]) == ("ok", clean.strip("= "))
    row = run._sanitized(tool, summary, rows, [(0, ["========= Invalid __global__ read of size 2", found])])
    assert row["status"] == "failed" and "Invalid __global__ read" in row["text"]
    assert run._sanitized(tool, summary, rows, [(run.FOUND, [])])["status"] == "failed"
    slow = [{"case": "smoke_packed", "status": "timeout"}]
    row = run._sanitized(tool, summary, slow, [])
    assert row["status"] == "not run" and "no answer in time: smoke_packed" in row["text"]
    crashed = [{"case": "smoke_packed", "status": "crashed", "text": "the process ended with status -11"}]
    assert run._sanitized(tool, summary, crashed, [])["status"] == "failed"


def test_last_words_are_kept_short() -> None:
    worker = Worker([sys.executable, "-c", "import sys; sys.stderr.write('x' * 10**6)"], {})
    with pytest.raises(crew.WorkerLostError) as lost:
        worker.ask({"name": "a"}, 60.0)
    assert lost.value.status == "crashed"
    assert len(str(lost.value)) < 2 * crew.LAST_WORDS + 200
