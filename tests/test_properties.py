"""Random problems against the oracle, and laws that attention obeys whatever its numbers.

A law is tested like everything else: the result of the rearranged problem is put back in order and judged against
the oracle of the original one.
"""

from __future__ import annotations

import math
from dataclasses import replace
from random import Random

import pytest
import torch
from hypothesis import example, given, note, settings
from hypothesis import strategies as st
from torch import Tensor

from transformer_fast import attention, attention_varlen
from transformer_fast.testing import Case, Problem, Target, available_targets, check, judge, make_problem
from transformer_fast.testing.random_cases import random_case
from transformer_fast.testing.runner import Expected, expected, run_target
from transformer_fast.testing.verify import DTYPES

TARGETS = available_targets()
each_target = pytest.mark.parametrize("target", TARGETS, ids=lambda t: t.name)
each_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)


# ------------------------------------------------------------------------------------------------ random problems


@settings(max_examples=150)
@given(rng=st.randoms(use_true_random=False), dtype=st.sampled_from(list(DTYPES.values())))
@example(rng=Random(0), dtype=torch.float32)
def test_random_problems(rng: Random, dtype: torch.dtype) -> None:
    """Every target on the same problem, so that its oracle is computed once."""
    case = random_case(rng)
    note(case.describe())
    for target in TARGETS:
        outcome = check(case, dtype, target)
        assert outcome.passed, f"\n{outcome}"


def test_the_generator_reaches_every_option() -> None:
    cases = [random_case(Random(i)) for i in range(300)]
    for name in ("window_size", "seqlens_k", "seqlens_q", "padding", "bias", "alibi", "softcap", "sinks", "page_size"):
        given_count = sum(getattr(c, name) is not None for c in cases)
        assert 0 < given_count < len(cases), name
    for name in ("causal", "dropout_p", "deterministic", "lse_gradient", "poison"):
        assert 0 < sum(bool(getattr(c, name)) for c in cases) < len(cases), name
    assert random_case(Random(7)) == random_case(Random(7))


# ----------------------------------------------------------------------------------------------------------- laws

PLAIN = Case("law", "law", num_heads=4, num_kv_heads=2, seqlen_q=50, seqlen_k=77, head_dim=40, head_dim_v=24)


def setting(case: Case, dtype: torch.dtype, seed: int) -> tuple[Problem, Expected]:
    return make_problem(case, dtype, seed), expected(case, dtype, seed)


def assert_right(result: Tensor, wanted: Expected, name: str = "out", rows: Tensor | None = None) -> None:
    """Judges a result against the oracle; `rows` chooses from the sequence dimension (the one before the last)."""
    parts = [result, wanted.oracle[name], wanted.baseline[name], wanted.units[name]]
    if rows is not None:
        parts = [t[..., rows, :] for t in parts]
    verdict = judge(*parts[:3], name=name, unit=parts[3])
    assert verdict.passed, str(verdict)


@each_target
@each_dtype
def test_the_order_of_keys_does_not_matter(target: Target, dtype: torch.dtype, seed: int) -> None:
    problem, wanted = setting(PLAIN, dtype, seed)
    order = torch.randperm(PLAIN.seqlen_k)
    q, k, v = (problem.inputs[name] for name in ("query", "key", "value"))
    with target.forced():
        out, lse = attention(q, k[:, :, order], v[:, :, order], return_lse=True, backend=target.backend)
    assert_right(out, wanted)
    assert_right(lse, wanted, "lse")


@each_target
@each_dtype
def test_grouped_heads_are_repeated_heads(target: Target, dtype: torch.dtype, seed: int) -> None:
    problem, wanted = setting(replace(PLAIN, causal=True), dtype, seed)
    q, k, v = (problem.inputs[name] for name in ("query", "key", "value"))
    with target.forced():
        out = attention(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1), causal=True, backend=target.backend)
    assert_right(out, wanted)


@each_target
@each_dtype
def test_a_key_length_is_a_shorter_cache(target: Target, dtype: torch.dtype, seed: int) -> None:
    """seqlens_k moves the alignment with it: the same as cutting the keys off."""
    case = replace(PLAIN, causal=True, window_size=(20, None))
    problem, wanted = setting(case, dtype, seed)
    q, k, v = (problem.inputs[name] for name in ("query", "key", "value"))
    longer = [torch.cat([t, torch.full_like(t, math.nan)], dim=2) for t in (k, v)]
    lengths = torch.full((case.batch,), case.seqlen_k, dtype=torch.int32)
    with target.forced():
        out = attention(q, *longer, causal=True, window_size=(20, None), seqlens_k=lengths, backend=target.backend)
    assert_right(out, wanted)


@each_target
@each_dtype
def test_a_boolean_bias_is_a_window(target: Target, dtype: torch.dtype, seed: int) -> None:
    """The dense form of a mask gives what its interval form gives, in the gradients too."""
    case = replace(PLAIN, causal=True, window_size=(20, None))
    problem, wanted = setting(case, dtype, seed)
    options = {"bias": problem.visible}
    with target.forced():
        results = run_target(replace(problem, options=options), target.backend)
    for name in ("out", "lse", "dq", "dk", "dv"):
        assert_right(results[name], wanted, name)


@each_target
@each_dtype
def test_packing_changes_nothing(target: Target, dtype: torch.dtype, seed: int) -> None:
    """A right-padded batch and the same sequences packed; the padded rows of the query are nobody's business."""
    lengths = (1, 30, 50)
    case = replace(PLAIN, batch=3, seqlen_k=50, seqlens_k=lengths)
    problem, wanted = setting(case, dtype, seed)
    packed = [
        torch.cat([problem.inputs[name][b, :, :n].transpose(0, 1) for b, n in enumerate(lengths)])
        for name in ("query", "key", "value")
    ]
    cu = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    with target.forced():
        out = attention_varlen(*packed, cu, cu, 50, 50, backend=target.backend)
    for b, n in enumerate(lengths):
        here = {
            key: Expected(*[{"out": t["out"][b, :, :n]} for t in (wanted.oracle, wanted.baseline, wanted.units)])
            for key in ("out",)
        }["out"]
        assert_right(out[cu[b] : cu[b + 1]].transpose(0, 1), here)


@each_target
def test_halves_merge_by_their_lse(target: Target, seed: int) -> None:
    """What lse is for: attention over all keys from attention over two halves."""
    problem, wanted = setting(PLAIN, torch.float32, seed)
    q, k, v = (problem.inputs[name] for name in ("query", "key", "value"))
    with target.forced():
        parts = [
            attention(q, k[:, :, half], v[:, :, half], return_lse=True, backend=target.backend)
            for half in (slice(0, 30), slice(30, None))
        ]
    lse = torch.logsumexp(torch.stack([lse.double() for _, lse in parts]), dim=0)
    merged = sum(out.double() * torch.exp(part_lse.double() - lse)[..., None] for out, part_lse in parts)
    assert_right(merged.float(), wanted)
    assert_right(lse.float(), wanted, "lse")


@each_target
@each_dtype
def test_sinks_only_scale(target: Target, dtype: torch.dtype, seed: int) -> None:
    """With a sink the output is that without it, times the probability that is left."""
    case = replace(PLAIN, sinks="finite")
    problem, wanted = setting(case, dtype, seed)
    inputs = {name: problem.inputs[name] for name in ("query", "key", "value")}
    with target.forced():
        out, lse = attention(**inputs, return_lse=True, backend=target.backend)
    left = torch.sigmoid(lse.double() - problem.inputs["sinks"].double()[:, None])
    assert_right((out.double() * left[..., None]).to(dtype), wanted)


@each_target
@each_dtype
def test_an_added_constant_moves_only_lse(target: Target, dtype: torch.dtype, seed: int) -> None:
    problem, wanted = setting(PLAIN, dtype, seed)
    constant = torch.full((1, 1, 1, 1), 3.0)
    with target.forced():
        out, lse = attention(**problem.inputs, bias=constant, return_lse=True, backend=target.backend)
    assert_right(out, wanted)
    assert_right((lse.double() - 3.0).to(lse.dtype), wanted, "lse")


@each_target
@each_dtype
def test_asking_for_lse_changes_no_bit(target: Target, dtype: torch.dtype, seed: int) -> None:
    problem, _ = setting(replace(PLAIN, causal=True), dtype, seed)
    with target.forced():
        with_lse, _ = problem.call(problem.inputs, target.backend)
        without = problem.call(problem.inputs, target.backend, return_lse=False)
    assert torch.equal(with_lse, without)


@each_target
@each_dtype
@pytest.mark.parametrize("rows", [1, 50], ids=["decode", "prefill"])
@pytest.mark.parametrize("options", [dict(causal=True), dict(window_size=(9, 4))], ids=["causal", "window"])
@pytest.mark.parametrize("bad", [math.nan, math.inf], ids=["nan", "inf"])
def test_bad_numbers_reach_only_the_rows_that_see_them(
    target: Target, dtype: torch.dtype, rows: int, options: dict, bad: float, seed: int
) -> None:
    """A key that some rows of a tile see and others do not: 0 * NaN would spread it."""
    case = replace(PLAIN, seqlen_q=rows, **options)
    problem, wanted = setting(case, dtype, seed)
    place = case.seqlen_k - max(1, rows // 2)
    k, v = problem.inputs["key"].clone(), problem.inputs["value"].clone()
    k[:, :, place], v[:, :, place] = bad, bad
    with target.forced():
        out, _ = problem.call(problem.inputs | {"key": k, "value": v}, target.backend)
    sees = problem.visible[0, 0, :, place]
    assert sees.any(), "the problem shows nothing"
    assert not out[:, :, sees].isfinite().all(dim=-1).any()
    if rows > 1:
        assert_right(out, wanted, rows=~sees)


# --------------------------------------------------------------------------------- determinism, dropout, gradients


@each_target
@each_dtype
def test_deterministic_gradients_are_bit_identical(target: Target, dtype: torch.dtype, seed: int) -> None:
    case = replace(PLAIN, batch=3, causal=True, deterministic=True, bias="float", bias_form="1hqk", sinks="finite")
    problem, _ = setting(case, dtype, seed)
    with target.forced():
        first, second = (run_target(problem, target.backend) for _ in range(2))
    for name, result in first.items():
        assert torch.equal(result, second[name]), name


def kept(target: Target, p: float, seqlen: int = 300) -> Tensor:
    """Which of equal probabilities dropout keeps, `(4, seqlen, seqlen)`: the values are unit vectors."""
    q = torch.zeros(2, 2, seqlen, 8)
    unit = torch.eye(seqlen).expand(2, 2, seqlen, seqlen)
    with target.forced():
        return (attention(q, q, unit, dropout_p=p, backend=target.backend) > 0).flatten(0, 1)


@each_target
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_drops_its_share_everywhere(target: Target, p: float) -> None:
    """Overall, in each row and column: six standard deviations of the binomial distribution."""
    mask = kept(target, p).double()
    for dims in ((0, 1, 2), (0, 1), (0, 2)):
        trials = math.prod(mask.shape[d] for d in dims)
        deviation = math.sqrt(p * (1 - p) / trials)
        assert float((mask.mean(dims) - (1 - p)).abs().max()) < 6 * deviation


@each_target
def test_dropout_follows_the_generator(target: Target) -> None:
    torch.manual_seed(1)
    first, second = kept(target, 0.5), kept(target, 0.5)
    torch.manual_seed(1)
    again = kept(target, 0.5)
    assert torch.equal(first, again)
    assert not torch.equal(first, second)
    heads = first.flatten(1)
    assert all(not torch.equal(heads[i], heads[j]) for i in range(4) for j in range(i)), "heads share a mask"


@each_target
def test_without_dropout_the_generator_is_left_alone(target: Target) -> None:
    state = torch.get_rng_state()
    q = torch.randn(1, 1, 4, 8, generator=torch.Generator())
    with target.forced():
        attention(q, q, q, backend=target.backend)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(causal=True, softcap=2.0, sinks="finite"),
        dict(window_size=(2, 1), bias="float", bias_form="1hqk"),
        dict(seqlens_k=(4, 0), alibi="heads", bias="float", bias_form="b11k"),
        dict(dropout_p=0.3, sinks="some_minus_inf"),
    ],
    ids=lambda o: "-".join(o) or "plain",
)
def test_gradients_of_the_definition_by_finite_differences(options: dict) -> None:
    """The oracle's gradients, checked by no other gradient code but by moving its inputs."""
    case = Case("law", "finite_differences", num_heads=2, num_kv_heads=1, seqlen_q=3, seqlen_k=4, head_dim=3, **options)
    problem = make_problem(case, torch.float64)
    names = [n for n in problem.inputs if not (n == "sinks" and case.sinks == "some_minus_inf")]

    def function(*values: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = problem.call(problem.inputs | dict(zip(names, values, strict=True)), "reference")
        return out, lse.masked_fill(lse.isinf(), 0.0)

    leaves = [problem.inputs[name].double().detach().requires_grad_() for name in names]
    assert torch.autograd.gradcheck(function, leaves)
