"""The conformance matrix: every case, in every dtype, on every back end and instruction set of this machine.

The cases are data, in `transformer_fast.testing.suite`; the rule that judges them is `transformer_fast.testing.judge`.
A failure prints the case, the seed and one line per tensor.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import transformer_fast
from transformer_fast.testing import Case, Target, available_targets, check, judge, make_problem, standard_cases
from transformer_fast.testing.runner import Tensors, expected, judge_all, plain_float64, run_target
from transformer_fast.testing.verify import DTYPES

CASES = standard_cases()
TARGETS = available_targets()
#: Beyond this a fast back end may say that it cannot; up to here it must.
REQUIRED_HEAD_DIM = 256


def must_support(case: Case) -> bool:
    return max(case.head_dim, case.head_dim_v) <= REQUIRED_HEAD_DIM


@pytest.mark.parametrize("target", TARGETS, ids=lambda t: t.name)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(
    "case", [pytest.param(c, id=c.name, marks=[pytest.mark.sanitize] if c.core else []) for c in CASES]
)
def test_matches_the_oracle(case: Case, dtype: torch.dtype, target: Target, seed: int) -> None:
    outcome = check(case, dtype, target, seed)
    if outcome.unsupported and not must_support(case):
        pytest.skip(outcome.unsupported)
    assert outcome.passed, f"\n{outcome}"


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_the_oracle_matches_the_plain_computation(case: Case, seed: int) -> None:
    """Two texts of the definition, both in float64, agree to better than float32 can show."""
    wanted = expected(case, torch.float32, seed)
    plain = plain_float64(case, torch.float32, seed)
    # Judged without PyTorch's error, by the units of float32 alone.
    for verdict in judge_all(wanted.oracle, replace(wanted, oracle=plain, baseline=plain)):
        assert verdict.passed, f"{case.describe()}\n{verdict}"


def test_the_cpu_back_end_is_here() -> None:
    """Without it most of the matrix would be missing, and nobody would notice."""
    info = transformer_fast.backends()["cpu"]
    assert info.available, info.reason
    assert {t.isa for t in TARGETS if t.backend == "cpu"} == set(info.details["isas"])


# ---------------------------------------------------------------------------------- can these tests fail at all?


def _results(case: Case, seed: int) -> Tensors:
    return run_target(make_problem(case, torch.float32, seed), "reference")


def _rejected(results: Tensors, case: Case, seed: int) -> set[str]:
    verdicts = judge_all(results, expected(case, torch.float32, seed))
    return {v.name for v in verdicts if not v.passed}


BASIC = Case("full", "sabotage", num_heads=4, num_kv_heads=2, seqlen_q=129, seqlen_k=200)


@pytest.mark.parametrize("name", ["out", "lse", "dq", "dk", "dv"])
def test_zeros_are_rejected(name: str, seed: int) -> None:
    results = _results(BASIC, seed)
    results[name] = torch.zeros_like(results[name])
    assert _rejected(results, BASIC, seed) == {name}


@pytest.mark.parametrize("name", ["out", "lse", "dq", "dk", "dv"])
def test_one_row_never_written_is_rejected(name: str, seed: int) -> None:
    results = _results(BASIC, seed)
    results[name][-1, -1, -1] = float("nan")
    assert _rejected(results, BASIC, seed) == {name}


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        pytest.param(dict(window_size=(20, 20)), dict(window_size=(21, 20)), id="window-left"),
        pytest.param(dict(window_size=(20, 20)), dict(window_size=(20, 19)), id="window-right"),
        pytest.param(dict(causal=True), dict(window_size=(None, 1)), id="causal-off-by-one"),
        pytest.param(dict(causal=True), dict(), id="causal-ignored"),
        pytest.param(dict(softcap=30.0), dict(softcap=None), id="softcap-ignored"),
        pytest.param(dict(softmax_scale=0.2), dict(softmax_scale=0.201), id="scale"),
        pytest.param(dict(seqlens_k=(200, 150)), dict(seqlens_k=(200, 149)), id="length-off-by-one"),
    ],
)
def test_a_slightly_different_problem_is_rejected(right: dict, wrong: dict, seed: int) -> None:
    """The smallest slips in a mask or an option stand out of the tolerance, in out, lse and every gradient."""
    right_case = replace(BASIC, **right)
    # The same name, so that both draw the same tensors.
    wrong_case = replace(right_case, **({"causal": False} | wrong))
    assert {"out", "lse", "dq", "dk", "dv"} <= _rejected(_results(wrong_case, seed), right_case, seed)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_shifted_window_is_rejected_in_half_precision_too(dtype: torch.dtype, seed: int) -> None:
    right_case = replace(BASIC, window_size=(20, 20))
    results = run_target(make_problem(replace(right_case, window_size=(21, 20)), dtype, seed), "reference")
    verdicts = judge_all(results, expected(right_case, dtype, seed))
    assert {"out", "lse", "dq", "dk", "dv"} <= {v.name for v in verdicts if not v.passed}


def test_heads_mapped_in_the_wrong_order_are_rejected(seed: int) -> None:
    """Grouped queries: head h uses KV head h // group_size, not h % num_kv_heads."""
    problem = make_problem(BASIC, torch.float32, seed)
    interleaved = problem.inputs["query"].unflatten(1, (2, 2)).transpose(1, 2).flatten(1, 2)
    out, _ = problem.call(problem.inputs | {"query": interleaved}, "reference")
    wanted = expected(BASIC, torch.float32, seed)
    restored = out.unflatten(1, (2, 2)).transpose(1, 2).flatten(1, 2)
    assert not judge(restored, wanted.oracle["out"], wanted.baseline["out"]).passed


def test_poison_that_leaks_is_rejected(seed: int) -> None:
    """The poisoned cases do hold NaN: read without the mask, it is everywhere."""
    case = next(c for c in CASES if c.name == "poison_lengths")
    problem = make_problem(case, torch.float32, seed)
    problem.options.pop("seqlens_k")
    out, _ = problem.call(problem.inputs, "reference")
    wanted = expected(case, torch.float32, seed)
    assert "nan" in judge(out, wanted.oracle["out"], wanted.baseline["out"]).reason


def test_uninitialised_memory_is_poisoned() -> None:
    """What the configuration of the tests promises, and what all of the above leans on."""
    x = torch.ones(2, 3)
    for fresh in (
        torch.empty(4),
        torch.empty_like(x),
        torch.empty_strided((2, 2), (2, 1)),
        x.new_empty(5),
        torch.empty(3, dtype=torch.bfloat16),
    ):
        assert fresh.isnan().all()
    assert (torch.empty(3, dtype=torch.int64) < 0).all()


@pytest.mark.parametrize("target", [t for t in TARGETS if t.backend != "reference"], ids=lambda t: t.name)
def test_the_poison_reaches_what_a_back_end_allocates(target: Target, seed: int, monkeypatch) -> None:
    """Outputs come out of the patched functions: were they allocated otherwise, the poison would be in vain."""
    from conftest import ALLOCATORS, poisoned

    allocated: set[int] = set()

    def recording(allocate):
        def record(*args, **kwargs):
            tensor = allocate(*args, **kwargs)
            allocated.add(tensor.untyped_storage().data_ptr())
            return tensor

        return record

    for owner, name in ALLOCATORS:
        monkeypatch.setattr(owner, name, recording(poisoned(getattr(owner, name))))
    problem = make_problem(BASIC, torch.float32, seed).to(target.device)
    with target.forced():
        results = run_target(problem, target.backend)
    written = {n: t.untyped_storage().data_ptr() in allocated for n, t in results.items()}
    assert all(written.values()), written
