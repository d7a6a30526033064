"""Bad numbers on the CPU back end reach those who see them, and nobody else."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from cpu_targets import each_cpu_target, each_dtype
from torch import Tensor

from transformer_fast import attention
from transformer_fast.testing import Case, Target, check, make_problem
from transformer_fast.testing.runner import expected, run_target
from transformer_fast.testing.tolerance import Yardstick

# ---------------------------------------------------------------------------------------------------------- poison

POISONED = Case("poison", "native", batch=2, num_heads=4, num_kv_heads=2, seqlen_q=150, seqlen_k=150, head_dim=24)
#: Cases in which key 70 is seen by some rows and hidden from others, and by what.
PARTLY_SEEN = {
    "window": dict(window_size=(9, 5)),
    "causal": dict(causal=True),
    "causal_decode": dict(causal=True, seqlen_q=2, seqlen_k=72),
    "mask": dict(bias="bool", bias_form="qk"),
    "mask_decode": dict(bias="bool", bias_form="bhqk", seqlen_q=2),
    "window_softcap_sinks": dict(window_size=(9, 5), softcap=3.0, sinks="finite"),
    "window_alibi": dict(window_size=(9, 5), alibi="heads"),
    "window_bias": dict(window_size=(9, 5), bias="float", bias_form="1hqk"),
    # Of tiles that share a block of keys, the first sees all of it and the last only its end.
    "window_shared": dict(window_size=(163, 0), num_heads=8, num_kv_heads=8, seqlen_q=256, seqlen_k=356),
}


def apart_from(place: int, visible: Tensor) -> Tensor:
    """Which keys share no row with a place: bool (seqlen_k,). Their gradients have nothing to do with it."""
    return ~(visible & visible[:, place, None]).any(0)


@each_cpu_target
@each_dtype
@pytest.mark.parametrize(
    ("operand", "bad"), [("key", math.nan), ("value", math.nan), ("value", math.inf)], ids=["key", "value", "value-inf"]
)
@pytest.mark.parametrize("name", PARTLY_SEEN)
def test_a_bad_number_reaches_those_who_see_it(
    target: Target, dtype: torch.dtype, operand: str, bad: float, name: str, seed: int
) -> None:
    """A NaN or Inf in the middle of a tile: rows that do not see it stay right, in out, lse and dq; rows that see it
    are not quietly repaired. A bad value leaves the probabilities alone, so keys apart from it keep their gradients.
    """
    case = replace(POISONED, name=f"native_{name}", **PARTLY_SEEN[name])
    problem = make_problem(case, dtype, seed)
    wanted = expected(case, dtype, seed)
    place = 70
    visible = problem.visible.expand(case.batch, case.num_heads, -1, -1)
    sees = visible[..., place]  # (batch, num_heads, seqlen_q)
    assert sees.any()
    poisoned = problem.inputs[operand].clone()
    poisoned[:, :, place, ::5] = bad
    problem = replace(problem, inputs=problem.inputs | {operand: poisoned})
    with target.forced():
        results = run_target(problem, "cpu")

    clean = ~sees
    for result in ("out", "dq", "lse"):
        # V takes no part in lse, so nobody's lse may change.
        rows = torch.ones_like(clean) if result == "lse" and operand == "value" else clean
        assert_right_where(rows, results[result], wanted, result)
    assert not results["out"][sees].isfinite().all(-1).any()
    if operand == "key":
        assert results["lse"][sees].isnan().all()
    if operand == "value" and "window" in name:
        apart = apart_from(place, visible[0, 0]).expand(case.batch, case.num_kv_heads, -1)
        for result in ("dk", "dv"):
            assert_right_where(apart, results[result], wanted, result)


def assert_right_where(where: Tensor, result: Tensor, wanted: Any, name: str) -> None:
    parts = (wanted.oracle[name], wanted.baseline[name], wanted.units[name])
    verdict = Yardstick(*[t[where] for t in parts]).judge(result[where], name)
    assert verdict.passed, str(verdict)


@each_cpu_target
@each_dtype
@pytest.mark.parametrize("rows", [1, 70], ids=["decode", "tiles"])
@pytest.mark.parametrize(
    "options",
    [
        dict(padding="left"),
        dict(padding="right"),
        dict(padding="holes"),
        dict(seqlens_k=(100, 3, 0)),
        dict(seqlens_k=(100, 3, 0), causal=True, sinks="finite"),
        dict(window_size=(5, 5), causal=True),
        dict(bias="bool", bias_form="b11k"),
        dict(bias="bool_window", bias_form="qk", padding="holes"),
        dict(padding="holes", alibi="heads", softcap=2.0),
        dict(padding="holes", bias="float", bias_form="bhqk", dropout_p=0.2),
    ],
    ids=lambda o: "-".join(f"{k}={v}" for k, v in o.items()),
)
def test_poison_that_nobody_sees_reaches_nothing(
    target: Target, dtype: torch.dtype, rows: int, options: dict, seed: int
) -> None:
    """NaN and Inf in padding: out, lse and all gradients are those of the clean problem."""
    case = Case(
        "poison", f"native_{rows}_{sorted(options)}", batch=3, num_heads=4, num_kv_heads=2, seqlen_q=rows,
        seqlen_k=100, head_dim=17, poison=True, lse_gradient=True, **options,
    )  # fmt: skip
    problem = make_problem(case, dtype, seed)
    assert problem.inputs["value"].isnan().any(), "nothing is poisoned"
    outcome = check(case, dtype, target, seed)
    assert outcome.passed, f"\n{outcome}"


@each_cpu_target
@each_dtype
@pytest.mark.parametrize("rows", [2, 40], ids=["decode", "tiles"])
def test_a_bad_query_row_stays_by_itself(target: Target, dtype: torch.dtype, rows: int) -> None:
    """A row whose every score is NaN has no maximum, like a row that sees nothing. But it is no such row: its output
    is NaN, not a zero that nobody would notice; and the other rows of its tile do not change.
    """
    query, key, value = (torch.randn(1, 2, n, 8).to(dtype) for n in (rows, 40, 40))
    bad = query.clone()
    bad[:, :, -1] = math.nan
    leaves = [t.clone().requires_grad_() for t in (bad, key, value)]
    with target.forced():
        wanted, wanted_lse = attention(query, key, value, return_lse=True, backend="cpu")
        out, lse = attention(*leaves, return_lse=True, backend="cpu")
        (dquery,) = torch.autograd.grad(out, leaves[0], torch.randn_like(out))
    assert torch.equal(out[:, :, :-1], wanted[:, :, :-1])
    assert torch.equal(lse[:, :, :-1], wanted_lse[:, :, :-1])
    assert dquery[:, :, :-1].isfinite().all()
    assert out[:, :, -1].isnan().all()
    assert lse[:, :, -1].isnan().all()


@each_cpu_target
@each_dtype
@pytest.mark.parametrize("rows", [1, 40], ids=["decode", "tiles"])
def test_keys_that_are_all_bad_are_not_hidden_keys(target: Target, dtype: torch.dtype, rows: int) -> None:
    query, value = torch.randn(1, 2, rows, 8).to(dtype), torch.randn(1, 2, 5, 8).to(dtype)
    with target.forced():
        out, lse = attention(query, torch.full_like(value, math.nan), value, return_lse=True, backend="cpu")
    assert out.isnan().all()
    assert lse.isnan().all()
