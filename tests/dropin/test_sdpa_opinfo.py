"""PyTorch's own samples for scaled_dot_product_attention: by the function, and by PyTorch's name under accelerate()."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from dropin.sdpa_calls import BUILTIN, DTYPES, doubled, units_of
from torch import Tensor

from transformer_fast import UnsupportedError, accelerate
from transformer_fast.dropin import scaled_dot_product_attention as sdpa
from transformer_fast.dropin.sdpa import attend
from transformer_fast.testing import judge

#: In PyTorch 2.13. They come in pairs of the same shapes and options; what takes long sees one of each.
NUM_SAMPLES = 25
each_sample = pytest.mark.parametrize("number", range(NUM_SAMPLES))
each_kind = pytest.mark.parametrize("number", range(0, NUM_SAMPLES, 2))
each_way = pytest.mark.parametrize("way", ["function", "accelerate"])


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@functools.cache
def operator_info() -> Any:
    """PyTorch's description of the operator; the module takes seconds to import."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of deprecated things in PyTorch's test utilities
        common = pytest.importorskip("torch.testing._internal.common_methods_invocations")
    (found,) = [op for op in common.op_db if op.name == "nn.functional.scaled_dot_product_attention"]
    return found


def samples(dtype: torch.dtype) -> list[Any]:
    return list(operator_info().sample_inputs("cpu", dtype))


def sample(number: int, dtype: torch.dtype) -> tuple[list[Tensor], dict[str, Any]]:
    """(query, key, value) and the other arguments."""
    found = samples(dtype)[number]
    return [found.input, *found.args], found.kwargs


def by_name(*args: Any, **kwargs: Any) -> Tensor:
    return F.scaled_dot_product_attention(*args, **kwargs)


def way_of(way: str, **options: Any) -> tuple[Callable[..., Tensor], Any]:
    """A function, and the context in which it is to be tested."""
    return (sdpa, nullcontext()) if way == "function" else (by_name, accelerate(explain=True, **options))


def in_(dtype: torch.dtype, value: Any) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def due(tensors: list[Tensor], options: dict[str, Any], dtype: torch.dtype) -> Tensor:
    """The sample's result in a dtype: PyTorch's, but with dropout the definition's, which drops the same weights."""
    given = [in_(dtype, t) for t in tensors]
    options = {name: in_(dtype, value) for name, value in options.items()}
    if not options.get("dropout_p"):
        return BUILTIN(*given, **options)
    torch.manual_seed(7)
    return attend(*given, **options, backend="reference")


def units(tensors: list[Tensor], options: dict[str, Any], dtype: torch.dtype) -> dict[str, Tensor]:
    """The samples are large: their scores reach hundreds, and so does the error of an exponent."""
    named = doubled(dict(zip(("query", "key", "value"), tensors, strict=True)))
    dout = torch.ones_like(due(tensors, options, torch.float64))
    return units_of(named, dout, dtype, **options)


def assert_result(out: Tensor, tensors: list[Tensor], options: dict[str, Any]) -> None:
    unit = units(tensors, options, out.dtype)["out"]
    verdict = judge(out, due(tensors, options, torch.float64), due(tensors, options, out.dtype), unit=unit)
    assert verdict.passed, str(verdict)


def test_all_samples_are_here() -> None:
    found = samples(torch.float32)
    assert len(found) == NUM_SAMPLES and set(operator_info().dtypes) == set(DTYPES)
    for one, other in zip(found[:-1:2], found[1::2], strict=True):
        assert one.kwargs == other.kwargs and one.input.shape == other.input.shape


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@each_sample
@each_way
def test_forward(way: str, number: int, dtype: torch.dtype) -> None:
    tensors, options = sample(number, dtype)
    function, context = way_of(way)
    with context as handle:
        torch.manual_seed(7)
        out = function(*tensors, **options)
    assert out.dtype == dtype
    if handle is not None and dtype == torch.float64:  # PyTorch's, and with it the weights that are dropped
        torch.manual_seed(7)
        assert torch.equal(out, BUILTIN(*tensors, **options))
    else:
        assert_result(out, tensors, options)
    if handle is not None:
        assert [site.taken for site in handle.report()] == [dtype != torch.float64], str(handle.report())


@each_sample
@pytest.mark.parametrize("way", ["function", "accelerate", "accelerate_reference"])
def test_gradcheck(way: str, number: int) -> None:
    """In float64; by accelerate() once as PyTorch's, once by the back end that can."""
    tensors, options = sample(number, torch.float64)
    mask = options.pop("attn_mask", None)
    leaves = [t.requires_grad_() for t in (*tensors, *([] if mask is None else [mask]))]
    function, context = way_of(way.split("_")[0], **({"backend": "reference"} if "reference" in way else {}))

    def seeded(*given: Tensor) -> Tensor:
        torch.manual_seed(7)
        return function(*given, **options)

    with context:
        assert torch.autograd.gradcheck(seeded, leaves, fast_mode=True)
        if function is sdpa:
            assert torch.autograd.gradgradcheck(seeded, leaves, fast_mode=True)


@each_kind
@each_way
def test_vmap(way: str, number: int) -> None:
    """Over new leading dimensions of each input by itself, and of all."""
    tensors, options = sample(number, torch.float32)
    entries = [[torch.randn_like(t) for t in tensors] for _ in range(2)]
    function, context = way_of(way)
    for mapped in ((0, None, None), (None, 0, 0), (0, 0, 0)):
        given = [torch.stack([e[i] for e in entries]) if d == 0 else tensors[i] for i, d in enumerate(mapped)]
        call = torch.func.vmap(lambda *t: function(*t, **options), in_dims=mapped, randomness="different")
        if options.get("dropout_p") and way == "function":
            with pytest.raises(UnsupportedError, match="vmap with dropout_p"):
                call(*given)
            continue
        with context, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyTorch has no batching rule for its own operator, and says so
            out = call(*given)
        if options.get("dropout_p"):
            assert out.shape == (2, *due(tensors, options, torch.float32).shape) and out.isfinite().all()
            continue
        for i in range(2):
            assert_result(out[i], [t[i] if d == 0 else t for t, d in zip(given, mapped, strict=True)], options)


@each_kind
@each_way
def test_compile(way: str, number: int) -> None:
    """Forward and backward, in one graph."""
    tensors, options = sample(number, torch.float32)
    function, context = way_of(way)
    compiled = torch.compile(lambda *given: function(*given, **options), backend="aot_eager", fullgraph=True)
    leaves = [t.requires_grad_() for t in tensors]
    with context as handle:
        torch.manual_seed(7)
        out = compiled(*leaves)
        grads = torch.autograd.grad(out.sum(), leaves)
    assert all(g.shape == t.shape and bool(g.isfinite().all()) for g, t in zip(grads, tensors, strict=True))
    if handle is not None:
        assert all(site.taken for site in handle.report()) and handle.report(), str(handle.report())
    detached = [t.detach() for t in tensors]
    if not options.get("dropout_p"):
        assert_result(out, detached, options)
        double = [t.double().requires_grad_() for t in detached]
        oracle = torch.autograd.grad(due(double, options, torch.float64).sum(), double)
        baseline = torch.autograd.grad(due(leaves, options, torch.float32).sum(), leaves)
        unit = units(detached, options, torch.float32)
        for name, grad, right, plain in zip(("query", "key", "value"), grads, oracle, baseline, strict=True):
            verdict = judge(grad, right, plain, name=name, unit=unit[f"d{name}"])
            assert verdict.passed, str(verdict)
