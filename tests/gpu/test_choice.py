"""From a run's results to what "auto" takes: the fastest of ours on that machine, and nobody who was wrong there."""

from __future__ import annotations

import dataclasses
import json
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from transformer_fast.benchmarks.gpu import choice as derived
from transformer_fast.benchmarks.gpu.main import main

from transformer_fast import backends as registry
from transformer_fast.backends import choice
from transformer_fast.spec import AttentionSpec, Operands, make_spec, parse_options


def row(name: str, status: str = "ok", wrong: dict[str, str] | None = None, **ms: float) -> dict[str, Any]:
    times = {who: {"ms": time} for who, time in ms.items()}
    return {"kind": "timing", "name": name, "status": status, "times": times, "wrong": wrong or {}}


def results(*rows: dict[str, Any], capability: str = "9.0", **changes: Any) -> dict[str, Any]:
    """What a run writes, as far as it matters here."""
    return {
        "dry_run": False,
        "backends": ["triton", "cuda"],
        "environment": {"capability": capability, "device": "made up"},
        "sections": {"timings": {"rows": list(rows)}},
    } | changes


ROWS = (
    row("forward_causal_hd128_8k", triton=2.0, cuda=1.0, flex=0.1),
    row("forward_full_hd128_8k", triton=2.0, cuda=1.1),
    row("backward_causal_hd128_8k", triton=1.0, cuda=1.9),
    row("forward_causal_hd64_8k", triton=1.0, cuda=1.1),
    row("decode_b16_8k", triton=1.0, cuda=1.5),
)


def order(data: dict[str, Any]) -> dict[tuple[str, int], tuple[str, ...]]:
    return {(entry.phase, entry.head_dim): entry.backends for entry in derived.entries_of(data, "made-up.json")}


def test_the_fastest_comes_first() -> None:
    assert order(results(*ROWS)) == {
        ("forward", 128): ("cuda", "triton"),  # 2, 1.8 and 1/1.9 times as fast
        ("forward", 64): ("triton", "cuda"),
        ("decode", 128): ("triton", "cuda"),
    }


@pytest.mark.parametrize(
    "failure",
    [
        row("forward_full_hd64_4k", "wrong", {"cuda": "out of entry 0: FAIL"}, triton=1.0),
        {"kind": "conformance", "case": "causal_17", "backend": "cuda", "status": "failed"},
        {"kind": "graph", "name": "decode_graph", "backend": "cuda", "status": "crashed"},
        {"kind": "timing", "name": "forward_full_hd64_4k", "status": "timeout", "at": "cuda"},
    ],
    ids=["timing", "conformance", "graph", "hang"],
)
def test_who_is_wrong_is_not_taken(failure: dict[str, Any]) -> None:
    found = order(results(*ROWS, failure))
    assert set(found.values()) == {("triton",)}


def test_a_peer_that_fails_takes_nobody_with_it() -> None:
    failure = {"kind": "compile", "name": "forward_causal_hd128_8k", "contestant": "flex", "status": "crashed"}
    assert order(results(*ROWS, failure)) == order(results(*ROWS))


def test_a_dry_run_and_a_run_without_timings_say_nothing() -> None:
    with pytest.raises(ValueError, match="dry run"):
        derived.entries_of(results(*ROWS, dry_run=True), "dry-run.json")
    with pytest.raises(ValueError, match="no timings"):
        derived.entries_of(results(row("decode_b16_8k", flex=1.0)), "made-up.json")


def test_a_later_run_takes_the_place_of_an_earlier_one_on_its_machine(tmp_path: Path) -> None:
    path = tmp_path / "choice.json"
    derived.choose(results(*ROWS, capability="8.0"), "old.json", path)
    derived.choose(results(*ROWS), "first.json", path)
    derived.choose(results(row("decode_b16_8k", triton=2.0, cuda=1.0)), "second.json", path)
    found = choice.read(path)
    assert [(e.capability, e.phase, e.results) for e in found] == [
        ("8.0", "decode", "old.json"),
        ("8.0", "forward", "old.json"),
        ("8.0", "forward", "old.json"),
        ("9.0", "decode", "second.json"),
    ]
    assert found[-1].backends == ("cuda", "triton")


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "choice.json"
    monkeypatch.setattr(derived, "PATH", path)
    (tmp_path / "2030-01-01-h100.json").write_text(json.dumps(results(*ROWS)))
    assert main(["--choose", str(tmp_path / "2030-01-01-h100.json")], ["on_gpu.py"], None) == 0
    assert "forward, head_dim up to 128: cuda, then triton" in capsys.readouterr().out
    assert {entry.results for entry in choice.read(path)} == {"2030-01-01-h100.json"}
    assert main(["--choose", str(tmp_path / "no such")], ["on_gpu.py"], None) == 2


# ----------------------------------------------------------------------------------------------------- what "auto" does


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """A device of compute capability 9.0 on which every back end can do everything, and a table."""
    path = tmp_path / "choice.json"
    derived.choose(results(*ROWS), "made-up.json", path)
    monkeypatch.setattr(choice, "PATH", path)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    choice._capability.cache_clear()
    yield monkeypatch
    choice._capability.cache_clear()


def spec_of(
    head_dim: int, seqlen_q: int = 100, dtype: torch.dtype = torch.bfloat16, device: str = "cuda"
) -> AttentionSpec:
    """The spec of a problem on a device that is not there."""
    query, key = (torch.empty(1, 2, n, head_dim, dtype=dtype, device="meta") for n in (seqlen_q, 100))
    spec = make_spec(Operands(query, key, key), parse_options())
    return dataclasses.replace(spec, device=torch.device(device))


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (spec_of(128), ("cuda", "triton")),
        (spec_of(96), ("cuda", "triton")),  # as the next larger one that was measured
        (spec_of(64), ("triton", "cuda")),
        (spec_of(17), ("triton", "cuda")),
        (spec_of(256), ()),
        (spec_of(128, seqlen_q=1), ("triton", "cuda")),
        (spec_of(128, dtype=torch.float32), ()),
        (spec_of(128, device="cpu"), ()),
    ],
)
def test_which_entry_holds(machine: Any, spec: AttentionSpec, expected: tuple[str, ...]) -> None:
    assert choice.fastest(spec) == expected


def test_another_machine_has_no_entry(machine: pytest.MonkeyPatch) -> None:
    machine.setattr(torch.cuda, "get_device_capability", lambda device: (10, 0))
    assert choice.fastest(spec_of(128)) == ()


@pytest.mark.parametrize(
    ("refuses", "expected"), [((), "cuda"), (("cuda",), "triton"), (("cuda", "triton"), "reference")]
)
def test_auto_takes_the_fastest_that_can(machine: pytest.MonkeyPatch, refuses: tuple[str, ...], expected: str) -> None:
    answers = {name: "no" if name in refuses else None for name in ("reference", "triton", "cuda")}
    machine.setattr(registry, "reasons", lambda spec: answers)
    able = types.SimpleNamespace(info=lambda: registry.Info("", True, None, None))
    for name in answers:
        machine.setitem(registry.REGISTRY, name, types.SimpleNamespace(name=name, info=able.info))
    assert registry.select_backend(spec_of(128)).name == expected


def test_auto_is_as_before_where_nothing_was_measured(machine: pytest.MonkeyPatch) -> None:
    machine.setattr(registry, "reasons", lambda spec: dict.fromkeys(("reference", "triton", "cuda")))
    assert registry.select_backend(spec_of(256)).name == "reference"


def test_the_committed_table_names_results_that_are_there() -> None:
    root = Path(__file__).resolve().parents[2]
    for entry in choice.read(choice.PATH):
        assert (root / "benchmarks" / "results" / entry.results).exists(), entry
