"""Random problems for the CUDA kernels in the emulator: `pytest tests/cuda/test_random.py --fuzz 500`."""

from __future__ import annotations

from random import Random

import torch

from transformer_fast.testing import Target, check
from transformer_fast.testing.random_cases import random_case


def test_random_problem(problem_number: int, seed: int, capability: int) -> None:
    """Each under a schedule of its own."""
    rng = Random(seed * 1_000_003 + problem_number)
    case, dtype = random_case(rng, max_head_dim=256), rng.choice((torch.bfloat16, torch.float16))
    outcome = check(case, dtype, Target("emulated"), problem_number)
    assert outcome.passed, f"\n{outcome}"
