"""The GPU script's processes and record: what dies or hangs costs one row, and what there is, is kept."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformer_fast.benchmarks.gpu import crew, figures, jobs, report, run
from transformer_fast.benchmarks.gpu.crew import Crew, Worker
from transformer_fast.benchmarks.gpu.device import DryDevice
from transformer_fast.benchmarks.gpu.plan import Section, Settings
from transformer_fast.benchmarks.gpu.record import Record, slug
from transformer_fast.benchmarks.gpu.shapes import SHAPES

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
