"""Problems that the tests of the ops share, and how their results are judged."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from transformer_fast import attention, attention_varlen, ops
from transformer_fast.spec import Operands, parse_options
from transformer_fast.testing import Case, Problem
from transformer_fast.testing.runner import compute, expected, judge_all

SMALL: dict[str, Any] = dict(batch=2, num_heads=4, num_kv_heads=2, seqlen_q=19, seqlen_k=33, head_dim=8)
#: Each operand and option that an op has, at least once.
VARIANTS = {
    name: Case("ops", f"ops_{name}", **SMALL | options)
    for name, options in {
        "full": dict(),
        "causal": dict(causal=True),
        "window": dict(window_size=(7, 2), layout="heads_last", dout="heads_last"),
        "bias": dict(bias="float", bias_form="1hqk"),
        "bias_of_keys": dict(bias="float", bias_form="b11k", dout="ones_expanded"),
        "mask": dict(bias="bool", bias_form="bhqk", layout="gaps", dout="gaps"),
        "sinks": dict(sinks="finite", causal=True, head_dim_v=5),
        "lengths": dict(seqlens_k=(33, 7), causal=True),
        "padding": dict(padding="holes"),
        "alibi_softcap": dict(alibi="batch_heads", softcap=3.0, softmax_scale=0.5),
        "lse_gradient": dict(lse_gradient=True, sinks="finite", layout="heads_last"),
        "decode": dict(seqlen_q=1, seqlen_k=600, causal=True),
        "packed": dict(seqlens_q=(3, 0, 16), seqlens_k=(5, 2, 20), causal=True),
    }.items()
}
PACKED = VARIANTS["packed"]
DROPOUT = Case("ops", "ops_dropout", **SMALL, dropout_p=0.3)

each_variant = pytest.mark.parametrize("case", VARIANTS.values(), ids=VARIANTS)
each_backend = pytest.mark.parametrize("backend", ["cpu", "reference"])


def op_arguments(problem: Problem, backend: str = "cpu", *, gradients: bool = False) -> tuple[Any, ...]:
    """The arguments of the forward op for a problem."""
    given = {n: t.detach().clone().requires_grad_(gradients) for n, t in problem.inputs.items()}
    given = {n: t.as_strided(t.shape, problem.inputs[n].stride()) if t.numel() == 0 else t for n, t in given.items()}
    given |= problem.options
    operands = {name: given.pop(name, None) for name in Operands._fields}
    if problem.case.dropout_p:
        operands["rng_seed"] = torch.tensor([1234567890123])
    return (*Operands(**operands), *parse_options(**given, backend=backend))


def backward_arguments(problem: Problem, backend: str = "cpu", dlse: Tensor | None = None) -> tuple[Any, ...]:
    arguments = op_arguments(problem, backend)
    results = ops.attention_op(*arguments)
    wants = ("bias" in problem.inputs, "sinks" in problem.inputs)
    return (*arguments, *results, problem.dout, problem.dlse if dlse is None else dlse, *wants)


def results_of(function: Callable[..., Any], problem: Problem, **options: Any) -> dict[str, Tensor]:
    """out, lse and all gradients of a function that is called like the public ones."""

    def forward(leaves: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        torch.manual_seed(problem.seed)
        return function(**leaves, **problem.options, **options, return_lse=True)

    return compute(forward, problem.inputs, problem.dout, problem.dlse)


def public(case: Case) -> Callable[..., Any]:
    return attention_varlen if case.packed else attention


def assert_right(results: dict[str, Tensor], case: Case, seed: int) -> None:
    verdicts = judge_all(results, expected(case, torch.float32, seed))
    assert all(v.passed for v in verdicts), "\n".join(map(str, verdicts))


def assert_same(results: dict[str, Tensor], others: dict[str, Tensor]) -> None:
    assert results.keys() == others.keys()
    for name, result in results.items():
        assert torch.equal(result, others[name]), name
