"""accelerate(): what is left to PyTorch, handles and nesting, reports."""

from __future__ import annotations

import os
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from dropin.accelerated import DOORS, by_name, each_door, flash, pytorch_state, taken_of
from dropin.sdpa_calls import BUILTIN, Call
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from transformer_fast import accelerate
from transformer_fast.testing import judge


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    """Each test leaves PyTorch as it was."""
    torch._dynamo.reset()
    state = pytorch_state()
    yield
    torch._dynamo.reset()
    assert pytorch_state() == state


# ----------------------------------------------------------------------------------------------- left to PyTorch


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64], ids=str)
@each_door
def test_other_dtypes(door: str, dtype: torch.dtype) -> None:
    query = torch.ones(2, 4, 9, 16, dtype=dtype)
    context = nullcontext() if dtype.is_floating_point else pytest.raises(RuntimeError, match=r"Long|long int")
    with accelerate(explain=True) as handle, context:
        assert torch.equal(DOORS[door](query, query, query), BUILTIN(query, query, query))
    assert str(dtype)[6:] in str(handle.report()[0].reason)


@each_door
def test_wrong_arguments_get_pytorchs_errors(door: str) -> None:
    query, key = torch.randn(2, 4, 9, 16), torch.randn(2, 3, 9, 16)
    with accelerate(explain=True) as handle, pytest.raises(RuntimeError, match="must match the size of tensor b"):
        DOORS[door](query, key, key)
    assert "do not broadcast" in str(handle.report()[0].reason)


@each_door
def test_chosen_kernels(door: str) -> None:
    """Who asks for the plain formula wants it: it can be differentiated twice."""
    query = torch.randn(2, 4, 9, 16, requires_grad=True)
    with accelerate(explain=True) as handle, sdpa_kernel(SDPBackend.MATH):
        (grad,) = torch.autograd.grad(DOORS[door](query, query, query).square().sum(), query, create_graph=True)
        grad.sum().backward()
    assert query.grad is not None and "chose" in str(handle.report()[0].reason)


@each_door
def test_transforms_and_tangents(door: str) -> None:
    queries = torch.randn(3, 2, 4, 9, 16)
    function = DOORS[door]
    with accelerate(explain=True) as handle:
        mapped = torch.func.vmap(function)(queries, queries, queries)
        with forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH):
            dual = function(forward_ad.make_dual(queries, queries), queries, queries)
            assert forward_ad.unpack_dual(dual).tangent is not None
    verdict = judge(mapped, BUILTIN(*[queries.double()] * 3), BUILTIN(queries, queries, queries))
    assert verdict.passed, str(verdict)
    # But by our name PyTorch's own rules see the call first, and end in its flash attention operator, which is ours.
    assert taken_of(handle.report()) == [door != "by_name", False]


def test_tangents_without_a_chosen_kernel() -> None:
    """PyTorch's error, since its fused kernel has none either."""
    query = torch.randn(2, 4, 9, 16)
    with accelerate(explain=True) as handle, forward_ad.dual_level(), pytest.raises(NotImplementedError):
        by_name(forward_ad.make_dual(query, query), query, query)
    assert [site.reason for site in handle.report()] == ["forward-mode derivatives"]


def test_second_derivative_is_no_silent_zero() -> None:
    query = torch.randn(2, 4, 9, 16, requires_grad=True)
    with accelerate():
        for function in (by_name, flash):
            out = function(query, query, query)
            (grad,) = torch.autograd.grad(out.square().sum(), query, create_graph=True)
            with pytest.raises(RuntimeError, match=r"differentiated twice|derivative .* not implemented"):
                grad.sum().backward()


def test_subclasses_that_dispatch_for_themselves() -> None:
    class Wrapped(Tensor):
        @classmethod
        def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(function))
            return super().__torch_dispatch__(function, types, args, kwargs or {})

    seen: list[str] = []
    query = torch.randn(2, 4, 9, 16)
    wrapped = query.as_subclass(Wrapped)
    with accelerate(explain=True) as handle:
        by_name(wrapped, wrapped, wrapped)
    assert any("scaled_dot_product" in name for name in seen)
    assert not any("transformer_fast" in name for name in seen)
    assert [site.reason for site in handle.report()] == ["Wrapped dispatches for itself"]


def test_nested_tensors() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a prototype
        rows = torch.nested.nested_tensor([torch.randn(4, 5, 8), torch.randn(4, 9, 8)])
    with accelerate(explain=True) as handle:
        assert by_name(rows, rows, rows).is_nested
    assert [site.reason for site in handle.report()] == ["nested tensors"]


def test_meta_tensors() -> None:
    query = torch.empty(2, 4, 9, 16, device="meta")
    with accelerate(explain=True) as handle:
        assert by_name(query, query, query).is_meta
    assert taken_of(handle.report()) == [False]


def test_exported_programs_are_pytorchs() -> None:
    class Model(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return by_name(x, x, x)

    query = torch.randn(2, 4, 9, 16)
    with accelerate(explain=True) as handle:
        program = torch.export.export(Model(), (query,))
        traced = torch.jit.trace(Model(), (query,), check_trace=False)
    # torch.jit.trace computes an example: by ours, but what it has noted before is PyTorch's operator.
    assert {str(site.reason).split(":")[0] for site in handle.report()} == {"torch.export", "None"}
    for graph in (program.graph, program.run_decompositions().graph):
        assert not any("transformer_fast" in str(node.target) for node in graph.nodes)
    assert "aten::scaled_dot_product_attention" in {node.kind() for node in traced.graph.nodes()}


def test_scripted_models() -> None:
    """torch.jit.script takes the name for what it stands for."""
    with warnings.catch_warnings(), accelerate():
        warnings.simplefilter("ignore")  # deprecated
        scripted = torch.jit.script(Scripted())
    query = torch.randn(2, 4, 9, 16)
    assert torch.equal(scripted(query), BUILTIN(query, query, query))


class Scripted(torch.nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x)


def test_no_kernels_for_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the native module PyTorch is faster than the definition."""
    from transformer_fast.backends import cpu

    monkeypatch.setattr(cpu, "_C_cpu", None)
    monkeypatch.setattr(cpu, "_WHY_NOT", "it was not built")
    query = torch.randn(2, 4, 9, 16)
    with accelerate(explain=True) as handle:
        assert torch.equal(by_name(query, query, query), BUILTIN(query, query, query))
    assert handle.report()[0].reason == "no kernels for the CPU: it was not built"


def test_named_backend() -> None:
    query = torch.randn(2, 4, 9, 16, dtype=torch.float64)
    with accelerate(explain=True, backend="reference") as handle:
        by_name(query, query, query)
    assert taken_of(handle.report()) == [True]
    with accelerate(explain=True, backend="cpu") as handle:
        by_name(query, query, query)
    assert "float64; it computes float32" in str(handle.report()[0].reason)


# ------------------------------------------------------------------------------------------ handles and nesting


def is_active() -> bool:
    """Is the override of the operator in place?"""
    return "AutogradCPU" in torch._C._dispatch_dump("aten::scaled_dot_product_attention")


def test_one_handle_entered_twice_ends_with_the_outer_block() -> None:
    before = pytorch_state()
    with accelerate() as handle:
        with handle:
            pass
        assert pytorch_state() != before
    assert pytorch_state() == before


def test_call_and_restore() -> None:
    handle = accelerate()
    assert is_active()
    handle.restore()
    assert not is_active()
    handle.restore()  # a second time does nothing


def test_caches_on_disk_are_apart() -> None:
    """A graph that a compiler has stored while active is not found afterwards, nor the other way round."""
    before = torch.compiler.config.cache_key_tag
    with accelerate():
        assert torch.compiler.config.cache_key_tag == f"{before}+transformer_fast"


def test_entered_again() -> None:
    handle = accelerate()
    handle.restore()
    with handle:
        assert is_active()
    assert not is_active()


def test_nesting_in_any_order() -> None:
    outer, inner = accelerate(), accelerate()
    outer.restore()
    assert is_active()
    with inner:
        assert is_active()
    assert not is_active()


def test_restored_by_an_error() -> None:
    with pytest.raises(KeyError), accelerate():
        raise KeyError
    assert not is_active()


def test_innermost_options_hold() -> None:
    query = torch.randn(1, 2, 3, 4, dtype=torch.float64)
    with accelerate(explain=True, backend="reference") as outer:
        with accelerate(explain=True) as inner:
            by_name(query, query, query)
        by_name(query, query, query)
    assert taken_of(inner.report()) == [False]
    assert taken_of(outer.report()) == [False, True]


def test_a_name_patched_by_others_stays_theirs() -> None:
    """Theirs calls ours, which passes on to PyTorch's, or takes the call again while active again."""
    handle = accelerate()
    ours = F.scaled_dot_product_attention
    theirs = partial(ours)
    F.scaled_dot_product_attention = theirs
    query = torch.randn(1, 2, 3, 4)
    try:
        handle.restore()
        assert F.scaled_dot_product_attention is theirs
        assert torch.equal(by_name(query, query, query), BUILTIN(query, query, query))
        with accelerate(explain=True) as again:
            by_name(query, query, query)
            by_name(query.double(), query.double(), query.double())
        assert taken_of(again.report()) == [True, False]
        assert F.scaled_dot_product_attention is theirs
    finally:
        F.scaled_dot_product_attention = ours
    with accelerate(explain=True) as again:
        by_name(query, query, query)
    assert taken_of(again.report()) == [True]
    assert F.scaled_dot_product_attention is BUILTIN


def test_over_a_name_patched_by_others() -> None:
    """What is not taken goes to theirs, and so it is again afterwards."""
    seen: list[torch.dtype] = []

    def theirs(query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        seen.append(query.dtype)
        return BUILTIN(query, *args, **kwargs)

    F.scaled_dot_product_attention = theirs
    query = torch.randn(1, 2, 3, 4)
    try:
        with accelerate():
            by_name(query, query, query)
            by_name(query.double(), query.double(), query.double())
        assert seen == [torch.float64] and F.scaled_dot_product_attention is theirs
    finally:
        F.scaled_dot_product_attention = BUILTIN


def test_other_threads() -> None:
    """It holds for the process."""
    tensors = Call().tensors(torch.float32)
    with accelerate(explain=True) as handle:
        threads = [threading.Thread(target=by_name, kwargs=tensors) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sum(site.calls for site in handle.report()) == 3 and all(taken_of(handle.report()))


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        (dict(explain=1), TypeError, "explain is 1 of type int; allowed: True or False"),
        (dict(backend="gpu"), ValueError, "backend is 'gpu'; allowed: auto, reference, cpu"),
        (dict(backend=None), TypeError, "backend is None"),
    ],
)
def test_errors(options: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        accelerate(**options)


# ------------------------------------------------------------------------------------------------------- reports


def test_report() -> None:
    query, key = torch.randn(2, 4, 9, 16), torch.randn(2, 4, 13, 16)
    with accelerate(explain=True) as handle:
        for _ in range(3):
            line = sys._getframe().f_lineno + 1
            F.scaled_dot_product_attention(query, key, key)
        F.scaled_dot_product_attention(query.double(), key.double(), key.double())
    taken, left = handle.report()
    assert taken.calls == 3 and taken.taken and taken.site == f"{__file__}:{line}"
    assert taken.shapes == ((2, 4, 9, 16), (2, 4, 13, 16), (2, 4, 13, 16)) and taken.dtype == torch.float32
    assert left.calls == 1 and not left.taken and "float64" in left.outcome
    text = str(handle.report())
    assert f"{os.path.basename(__file__)}:{line} (test_report)" in text and "1 of 2 call sites taken" in text


def test_report_of_growing_lengths() -> None:
    with accelerate(explain=True) as handle:
        for length in (7, 5, 9):
            for rows in (length, 1):
                by_name(torch.randn(2, 4, rows, 8), *torch.randn(2, 2, 4, length, 8))
    prefill, decode = handle.report()
    assert prefill.shapes == ((2, 4, "5..9", 8),) * 3 and decode.shapes[:2] == ((2, 4, 1, 8), (2, 4, "5..9", 8))
    assert prefill.calls == decode.calls == 3 and "2x4x1x8 2x4x5..9x8" in str(handle.report())


def test_report_of_a_layer_says_which() -> None:
    layer = torch.nn.TransformerDecoderLayer(16, 2, 32, batch_first=True).eval()
    x = torch.randn(1, 3, 16)
    with accelerate(explain=True) as handle:
        layer(x, x)
    assert ["_sa_block" in str(s.callers) for s in handle.report()] == [True, False]
    assert ["_mha_block" in str(s.callers) for s in handle.report()] == [False, True]


def test_no_report_without_explain() -> None:
    with accelerate() as handle, pytest.raises(ValueError, match="explain is False"):
        handle.report()


def test_empty_report() -> None:
    with accelerate(explain=True) as handle:
        pass
    assert handle.report() == [] and "no call" in str(handle.report())
