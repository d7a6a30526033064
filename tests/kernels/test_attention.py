"""The Triton kernels on CPU tensors, in Triton's interpreter: the whole conformance suite, by the one rule."""

from __future__ import annotations

import threading

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
    """The same seed keeps the same elements, in packed sequences too: with unit vectors as values, out shows which."""
    query, key = torch.randn(2, 4, 70, 16), torch.randn(2, 2, 90, 16)
    unit = torch.eye(90).expand(2, 2, 90, 90)
    packed, lengths = torch.randn(100, 2, 16), torch.tensor([0, 30, 100], dtype=torch.int32)
    packed_unit = torch.cat([torch.eye(70)[:30], torch.eye(70)])[:, None].expand(100, 2, 70)
    for function, arguments in (
        (attention, (query, key, unit)),
        (attention_varlen, (packed, packed, packed_unit, lengths, lengths, 70, 70)),
    ):
        kept = []
        for backend in ("triton", "reference"):
            torch.manual_seed(11)
            kept.append(function(*arguments, dropout_p=0.6, backend=backend) > 0)
        assert torch.equal(*kept)
        assert kept[0].any() and not kept[0].all()


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
    assert all(grad.any() for grad in runs[0])
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))


def test_tf32_on_request() -> None:
    """PyTorch's own switches; the interpreter computes both alike, so what is seen is what the kernel is told."""
    from transformer_fast.backends.triton import _precision
    from transformer_fast.backends.triton_plan import plan_launches
    from transformer_fast.spec import Operands, make_spec, parse_options

    before = torch.get_float32_matmul_precision()
    try:
        assert _precision(torch.float32) == "ieee"
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        assert _precision(torch.float32) == "tf32"
        torch.backends.cuda.matmul.fp32_precision = "ieee"
        assert _precision(torch.float32) == "ieee"
        torch.set_float32_matmul_precision("high")
        assert _precision(torch.float32) == "tf32"
        assert _precision(torch.bfloat16) == "ieee"
        x = torch.randn(1, 2, 20, 16)
        launches = plan_launches(make_spec(Operands(x, x, x), parse_options()), 90, precision="tf32")
        told = [launch.constants["PRECISION"] for launch in launches if "PRECISION" in launch.constants]
        assert told == ["tf32"] * 3 and all(launch.tma for launch in launches if "PRECISION" in launch.constants)
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("shape", [(2, 4, 0, 64), (0, 4, 1, 64)], ids=["rows", "batch"])
def test_nothing_to_do_against_many_keys(shape: tuple[int, ...]) -> None:
    query, key = torch.randn(shape), torch.randn(shape[0], 4, 2048, 64)
    assert attention(query, key, key, backend="triton").shape == shape


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_a_bias_of_the_lowest_number(dtype: torch.dtype, seed: int) -> None:
    """How Hugging Face hides keys, whole rows too: scores near -FLT_MAX, of which the differences are what counts."""
    case = Case("bias", "bias_lowest", num_heads=2, seqlen_q=20, seqlen_k=70, head_dim=32, bias="float_lowest")
    outcome = check(case, dtype, TRITON, seed)
    assert outcome.passed, f"\n{outcome}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_a_bias_of_the_lowest_number_everywhere(dtype: torch.dtype) -> None:
    """Every score of every row is the same number: each value has the same weight, whatever its size."""
    query = torch.randn(1, 1, 8, 16).to(dtype)
    value = torch.full((1, 1, 40, 16), 3.0, dtype=dtype)
    key = torch.randn(1, 1, 40, 16).to(dtype)
    bias = torch.full((1, 1, 8, 40), torch.finfo(torch.float32).min)
    assert torch.equal(attention(query, key, value, bias=bias, backend="triton"), torch.full_like(query, 3.0))


def test_a_gradient_that_is_lazily_negated() -> None:
    query, key = torch.randn(1, 2, 9, 16, requires_grad=True), torch.randn(1, 2, 20, 16)
    dout = torch.randn(1, 2, 9, 16)
    for backend in ("triton", "cpu"):
        out = attention(query, key, key, backend=backend)
        (lazy,) = torch.autograd.grad(out, query, torch._neg_view(dout), retain_graph=True)
        (plain,) = torch.autograd.grad(out, query, -dout)
        assert torch.equal(lazy, plain), backend


def test_every_thread_has_an_allocator(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton keeps it a thread, and on a GPU the backward pass runs in autograd's."""
    from triton.runtime import _allocation

    x, seen = torch.randn(1, 2, 9, 16), []

    def call() -> None:
        attention(x, x, x, backend="triton")
        seen.append(_allocation._allocator.get())

    for _ in range(2):
        thread = threading.Thread(target=call)
        thread.start()
        thread.join()
    assert [allocator.__name__ for allocator in seen] == ["_allocate"] * 2


def test_what_does_not_fit_is_made_smaller() -> None:
    """A stage less, then smaller blocks, and what was found is kept; a kernel of which nothing fits is refused."""
    from transformer_fast.kernels.configs import Config

    from transformer_fast.backends.triton_launch import Launch

    class OutOfResources(Exception):  # noqa: N818 - Triton's name
        pass

    tried = []

    class Kernel:
        def __init__(self, fits: int) -> None:
            self.fits = fits

        def __getitem__(self, grid: tuple[int, ...]) -> object:
            def launch(*arguments: object, BLOCK_N: int, num_warps: int, num_stages: int) -> str:
                tried.append((BLOCK_N, num_stages))
                if BLOCK_N * num_stages > self.fits:
                    raise OutOfResources
                return "compiled"

            return launch

    launch = Launch("forward", Kernel(fits=64), (1,), {}, dict(BLOCK_N=128), Config(64, 128, 4, 3))
    assert launch.run() == "compiled"
    assert tried == [(128, 3), (128, 2), (128, 1), (64, 1)]
    assert launch.run() == "compiled" and tried[4:] == [(64, 1)]
    with pytest.raises(UnsupportedError, match="no tile of the Triton forward kernel fits"):
        Launch("forward", Kernel(fits=8), (1,), {}, dict(BLOCK_N=32), Config(64, 32, 4, 1)).run()


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
    ops._runners.clear()  # who asked before was told otherwise
    x = torch.randn(1, 2, 9, 8)
    with pytest.raises(UnsupportedError, match="no CUDA device"):
        attention(x, x, x, backend="triton")
