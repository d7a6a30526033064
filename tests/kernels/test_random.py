"""Random problems for the Triton kernels in the interpreter: `pytest tests/kernels/test_random.py --fuzz 500`."""

from __future__ import annotations

from random import Random

from transformer_fast.testing import Target, check
from transformer_fast.testing.random_cases import random_case
from transformer_fast.testing.verify import DTYPES


def test_random_problem(problem_number: int, seed: int) -> None:
    rng = Random(seed * 1_000_003 + problem_number)
    case, dtype = random_case(rng, max_head_dim=288), rng.choice(list(DTYPES.values()))
    outcome = check(case, dtype, Target("triton"), problem_number)
    assert outcome.passed, f"\n{outcome}"
