"""The benchmarks as programs: do they measure what they say, and refuse what is wrong? No test looks at a speed."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from transformer_fast.benchmarks import BenchCase, Row, WrongResultError, measure, peers, runner, workload
from transformer_fast.benchmarks.measure import peak_flops, read_bandwidth

from transformer_fast import benchmarks
from transformer_fast.testing import available_targets

ALL_CASES = list(benchmarks.CASES.values())


def tiny(case: BenchCase) -> BenchCase:
    """The same shape of work at a size that runs in a moment."""
    seqlen_k = 40 if case.seqlen_q == case.seqlen_k else 60
    return replace(
        case,
        batch=min(case.batch, 3),
        seqlen_q=min(case.seqlen_q, 40),
        seqlen_k=seqlen_k,
        window_left=None if case.window_left is None else 7,
        shortest=None if case.shortest is None else 5,
        head_dim=16,
    )


@pytest.fixture(autouse=True)
def _small_and_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small buffers, and a machine of fixed limits: what it can do is measured by a test of its own."""
    monkeypatch.setattr(workload, "COLD_BYTES", 2**20)
    monkeypatch.setattr(measure, "SAMPLE_SECONDS", 0.0)
    monkeypatch.setattr(measure, "peak_flops", lambda *_, **__: 1e12)
    monkeypatch.setattr(measure, "read_bandwidth", lambda **_: 1e11)


def run_tiny(case: BenchCase, dtype: str = "float32", names: tuple[str, ...] = ("sdpa",)) -> Row:
    return benchmarks.run_case(tiny(case), dtype, names, repeats=2)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", ALL_CASES, ids=lambda c: c.name)
def test_every_case_runs_and_is_right(case: BenchCase, dtype: str) -> None:
    row = run_tiny(case, dtype, ("sdpa", "eager"))
    assert row.passed
    assert set(row.peers) == {"sdpa", "eager"}, row.missing
    assert row.goal == case.goal.get(dtype)
    assert 0 < row.fraction_of_peak < math.inf
    assert row.bound == ("memory" if case.cold else "compute")
    for peer in row.peers.values():
        assert 0 < peer.p20 <= peer.ratio <= peer.p80


@pytest.mark.parametrize("peer", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("case", ALL_CASES, ids=lambda c: c.name)
def test_other_runtimes_do_the_same_work(case: BenchCase, peer: str) -> None:
    """They are there wherever they have the operator, and their result is that of the case."""
    pytest.importorskip(peer)
    row = run_tiny(case, "float32", (peer,))
    if case.backward:
        assert row.missing == {peer: "inference only"}
    elif peer == "openvino" and case.group_size > 1:
        assert "grouped heads" in row.missing[peer]
    else:
        assert peer in row.peers, row.missing
    assert peer in run_tiny(case, "bfloat16", (peer,)).missing


@pytest.mark.slow
@pytest.mark.parametrize("name", ["causal", "window", "decode", "bert"])
def test_flex_attention_does_the_same_work(name: str) -> None:
    case = benchmarks.CASES[name].shortened().shortened()
    case = replace(case, num_heads=case.group_size * 2, num_kv_heads=2, head_dim=16, batch=2)
    row = benchmarks.run_case(case, "float32", ["flex"], repeats=2)
    assert "flex" in row.peers, row.missing


def test_a_wrong_result_has_no_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours is off by a scale: refused before any clock starts."""
    right = workload.attention
    monkeypatch.setattr(workload, "attention", lambda *a, **k: right(*a, **k) * 1.01)
    monkeypatch.setattr(measure, "interleaved", lambda *_: pytest.fail("it was timed"))
    with pytest.raises(WrongResultError, match="its speed means nothing"):
        run_tiny(benchmarks.CASES["full"])


def test_wrong_gradients_have_no_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = workload.attention
    monkeypatch.setattr(workload, "attention", lambda q, k, v, **o: right(q, k.detach() + 0 * k, v, **o))
    with pytest.raises(WrongResultError, match="dk"):
        run_tiny(benchmarks.CASES["causal_backward"])


def test_a_peer_that_computes_something_else_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def not_causal(work: workload.Workload) -> workload.Step:
        return peers.sdpa(replace(work, case=replace(work.case, causal=False)))

    monkeypatch.setitem(peers.PEERS, "sdpa", not_causal)
    row = run_tiny(benchmarks.CASES["causal"])
    assert not row.peers
    assert "computes something else" in row.missing["sdpa"]


def test_a_peer_that_fails_does_not_end_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(work: workload.Workload) -> workload.Step:
        raise RuntimeError("no such operator")

    monkeypatch.setitem(peers.PEERS, "eager", broken)
    row = run_tiny(benchmarks.CASES["full"], names=("sdpa", "eager"))
    assert "sdpa" in row.peers
    assert "no such operator" in row.missing["eager"]


# ------------------------------------------------------------------------------------------------------ counting


@pytest.mark.parametrize("case", ALL_CASES, ids=lambda c: c.name)
def test_only_visible_pairs_count(case: BenchCase) -> None:
    case = tiny(case)
    pairs = 0
    for length in case.lengths():
        rows = length if case.padded else case.seqlen_q
        for i in range(rows):
            position = i + length - rows
            first = 0 if case.window_left is None else max(0, position - case.window_left)
            last = position if case.causal else length - 1
            pairs += last - first + 1
    assert case.visible_pair_count == pairs * case.num_heads
    products = 7 if case.backward else 2
    assert case.flops == 2 * products * case.head_dim * pairs * case.num_heads


def test_cold_cases_find_nothing_in_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """More bytes than any cache holds pass between two uses of the same K and V."""
    monkeypatch.setattr(workload, "COLD_BYTES", 3 * 2**20)
    case = replace(tiny(benchmarks.CASES["decode"]), seqlen_k=2000)
    work = workload.make_workload(case, torch.float32)
    pair_bytes = sum(t.nbytes for t in work.pairs[0])
    assert pair_bytes * len(work.pairs) >= 3 * 2**20
    taken = [work.next_pair()[0].data_ptr() for _ in range(2 * len(work.pairs))]
    assert len(set(taken)) == len(work.pairs)
    assert taken[: len(work.pairs)] == taken[len(work.pairs) :]
    work.rewind()
    seen: list[int] = []
    monkeypatch.setattr(workload, "attention", lambda q, k, v, **_: seen.append(k.data_ptr()) or q)
    step = workload.our_step(work)
    for _ in work.pairs:
        step()
    assert seen == taken[: len(work.pairs)]


def test_samples_are_taken_in_turn() -> None:
    order: list[str] = []
    steps = {name: lambda name=name: order.append(name) for name in "abc"}
    samples = measure.interleaved(steps, repeats=4)
    assert {name: len(times) for name, times in samples.items()} == {"a": 4, "b": 4, "c": 4}
    changes = [b for a, b in zip(["", *order], order, strict=False) if a != b]
    assert "".join(changes[-12:]) == "abc" * 4


def test_ratios_are_taken_pair_by_pair() -> None:
    """A machine that gets slower by the sample does not change the ratio."""
    ours = [1.0, 2.0, 4.0, 8.0, 16.0]
    peer = [3.0 * t for t in ours]
    assert measure.ratio(peer, ours) == measure.Ratio(3.0, 3.0, 3.0)
    timing = measure.summarise([0.005, 0.001, 0.003, 0.002, 0.004])
    assert timing.ms == pytest.approx(3.0)
    assert timing.p20 < timing.ms < timing.p80


def test_the_machine_is_measured() -> None:
    assert peak_flops("float32", 1, quick=True) > 0
    assert peak_flops("float16", 1, quick=True) > 0  # which the native module does not measure
    assert read_bandwidth(quick=True) > 0


def test_every_row_is_held_against_the_highest_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    """A peak measured while a neighbour was busy would flatter the row that it belongs to."""
    peaks = iter([1e12, 4e12])
    monkeypatch.setattr(measure, "peak_flops", lambda *_, **__: next(peaks))
    for name in ("full", "causal"):
        monkeypatch.setitem(benchmarks.CASES, name, tiny(benchmarks.CASES[name]))
    rows = benchmarks.run_cases(["full", "causal"], dtypes=["float32"], peers=[], repeats=2)
    for row in rows:
        assert row.peak == 4e12
        assert row.fraction_of_peak == pytest.approx(row.tflops / 4)


# ------------------------------------------------------------------------------------------------ names and reports


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(names=["nosuch"]), "no benchmark case 'nosuch'"),
        (dict(peers=["nosuch"]), "no peer 'nosuch'"),
        (dict(dtypes=["int8"]), "'int8'; allowed: float32"),
        (dict(isa="sse9"), "no back end 'cpu/sse9'"),
    ],
)
def test_unknown_names_are_told(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        benchmarks.run_cases(**arguments)


def test_run_cases_goes_through_cases_and_dtypes(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("full", "bert"):
        monkeypatch.setitem(benchmarks.CASES, name, tiny(benchmarks.CASES[name]))
    calls: list[tuple[int, int, str]] = []
    rows = benchmarks.run_cases(
        ["full", "bert"], peers=["sdpa"], quick=True, repeats=2, progress=lambda *c: calls.append(c)
    )
    assert [(r.case, r.dtype) for r in rows] == [
        (case, dtype) for case in ("full", "bert") for dtype in ("float32", "bfloat16")
    ]
    assert [c[:2] for c in calls] == [(0, 4), (1, 4), (2, 4), (3, 4), (4, 4)]


@pytest.mark.parametrize("isa", [t.isa for t in available_targets() if t.isa] or [None])
def test_an_instruction_set_can_be_forced(isa: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(benchmarks.CASES, "full", tiny(benchmarks.CASES["full"]))
    (row,) = benchmarks.run_cases(["full"], dtypes=["float32"], peers=[], repeats=2, isa=isa)
    assert row.isa == isa
    assert runner.current_isa() in {t.isa for t in available_targets()}


def test_reports_hold_every_row(tmp_path) -> None:
    rows = [run_tiny(benchmarks.CASES[name], names=("sdpa", "flex")) for name in ("full", "decode")]
    json_path, markdown_path = benchmarks.write_report(rows, tmp_path / "new")
    data = json.loads(json_path.read_text())
    assert [r["case"] for r in data["rows"]] == ["full", "decode"]
    assert data["rows"][0]["peers"]["sdpa"]["ratio"] == rows[0].peers["sdpa"].ratio
    assert data["environment"]["torch"] == torch.__version__
    text = markdown_path.read_text()
    for row in rows:
        assert f"{row.title}<br>{row.description}" in text
        assert f"**{row.peers['sdpa'].ratio:.2f}x**" in text
    assert "no flex in any float32 case: below the block size" in text
    assert "GB/s" in text
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in table}) == 1, "rows of unlike length"
