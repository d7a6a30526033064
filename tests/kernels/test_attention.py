"""The Triton kernels on CPU tensors, in Triton's interpreter: the whole conformance suite, by the one rule."""

from __future__ import annotations

import pytest
import torch

from transformer_fast import UnsupportedError, attention, attention_varlen, backends, explain, ops
from transformer_fast.testing import Case, Target, check, standard_cases
from transformer_fast.testing.verify import DTYPES

TRITON = Target("triton")
CASES = standard_cases()


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_matches_the_oracle(case: Case, dtype: torch.dtype, seed: int) -> None:
    outcome = check(case, dtype, TRITON, seed)
    assert outcome.passed, f"\n{outcome}"


@pytest.mark.parametrize("case", [case for case in CASES if case.core], ids=lambda case: case.name)
def test_matches_the_oracle_by_pointers(case: Case, seed: int, capability: int) -> None:
    """As on a machine without tensor descriptors (and again with them, so that the way of choosing is seen to work)."""
    outcome = check(case, torch.bfloat16, TRITON, seed)
    assert outcome.passed, f"\n{outcome}"


def test_dropout_is_that_of_every_back_end() -> None:
    """The same seed keeps the same elements, in packed sequences too."""
    query, (key, value) = torch.randn(2, 4, 70, 16), torch.randn(2, 2, 2, 90, 16)
    packed, lengths = torch.randn(100, 2, 16), torch.tensor([0, 30, 100], dtype=torch.int32)
    for function, arguments in (
        (attention, (query, key, value)),
        (attention_varlen, (packed, packed, packed, lengths, lengths, 70, 70)),
    ):
        kept = []
        for backend in ("triton", "reference"):
            torch.manual_seed(11)
            # Values of one: what comes out is the sum of the kept probabilities.
            q, k, v, *rest = arguments
            kept.append(function(q, k, torch.ones_like(v), *rest, dropout_p=0.6, backend=backend))
        assert torch.equal(kept[0] == 0, kept[1] == 0)
        torch.testing.assert_close(kept[0], kept[1])


def _results(leaves: list[torch.Tensor], *, fresh: bool) -> list[torch.Tensor]:
    """out and gradients; ``fresh``: by launches that are made for this call."""
    if fresh:
        ops._runners.clear()
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    out = attention(*leaves, causal=True, backend="triton")
    return [out, *torch.autograd.grad(out.square().sum(), leaves)]


def test_launches_are_repeated_with_the_tensors_of_the_call() -> None:
    """A launch is made once a spec: what was one tensor in two places may be two the next time."""
    a, b, c = (torch.randn(1, 2, 40, 16) for _ in range(3))
    calls = [[a, a, a], [a, b, c], [c, b, a], [a, a, b]]
    wanted = [_results(call, fresh=True) for call in calls]
    ops._runners.clear()
    for call, due in zip(calls, wanted, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(_results(call, fresh=False), due, strict=True))


def test_addresses_that_are_not_aligned() -> None:
    """A launch made for aligned tensors is not repeated for others, nor the other way round."""
    wide = torch.randn(3, 1, 2, 30, 17)
    views = [[t[..., shift : shift + 16] for t in wide] for shift in (0, 1, 0, 1)]
    wanted = [_results(view, fresh=True) for view in views]
    ops._runners.clear()
    for view, due in zip(views, wanted, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(_results(view, fresh=False), due, strict=True))


def test_gradients_are_bit_identical() -> None:
    """By construction: each sum lies in the registers of one program, deterministic=True or not."""
    leaves = [torch.randn(2, heads, 70, 32, requires_grad=True) for heads in (4, 2, 2)]
    bias = torch.randn(1, 4, 70, 70, requires_grad=True)
    runs = []
    for _ in range(2):
        out = attention(*leaves, bias=bias, causal=True, backend="triton")
        runs.append(torch.autograd.grad(out.square().sum(), [*leaves, bias]))
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))


def test_tf32_on_request() -> None:
    """PyTorch's own switch; the interpreter computes both alike, so what is seen is what the kernel is told."""
    from transformer_fast.backends.triton import _precision

    before = torch.get_float32_matmul_precision()
    try:
        assert _precision(torch.float32) == "ieee"
        torch.set_float32_matmul_precision("high")
        assert _precision(torch.float32) == "tf32"
        assert _precision(torch.bfloat16) == "ieee"
        x = torch.randn(1, 2, 20, 16)
        assert attention(x, x, x, backend="triton").isfinite().all()
    finally:
        torch.set_float32_matmul_precision(before)


def test_it_has_to_be_asked_for_by_name() -> None:
    """It has never run on a GPU: "auto" must not choose it, not even where nothing else is fast."""
    x = torch.randn(1, 2, 9, 8)
    assert backends()["triton"].available
    assert explain(x, x, x).backend == "cpu"
    assert explain(x.double(), x.double(), x.double()).backend == "reference"
    assert explain(x, x, x, backend="triton").backend == "triton"


def test_what_it_cannot_do_is_said() -> None:
    x = torch.randn(1, 1, 4, 513)
    with pytest.raises(UnsupportedError, match="head_dim 513; it computes up to 512"):
        attention(x, x, x, backend="triton")
    with pytest.raises(UnsupportedError, match="dtype float64"):
        attention(x.double(), x.double(), x.double(), backend="triton")


def test_without_a_device_it_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    x = torch.randn(1, 2, 9, 8)
    with pytest.raises(UnsupportedError, match="no CUDA device"):
        attention(x, x, x, backend="triton")
