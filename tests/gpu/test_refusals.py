"""What the GPU script refuses: a wrong result has no speed, ours or a peer's."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformer_fast.benchmarks.gpu import check, jobs, peers, timing, work
from transformer_fast.benchmarks.gpu.device import DryDevice
from transformer_fast.benchmarks.gpu.shapes import SHAPES, Shape
from transformer_fast.benchmarks.gpu.work import Contestant, make_step, make_work, ours

from transformer_fast import attention

CPU = torch.device("cpu")


def small(name: str) -> Shape:
    return SHAPES[name].shrunk()


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
