"""accelerate(): every door to SDPA is taken, what cannot be is left to PyTorch, and nothing of it stays behind."""

from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from dropin.sdpa_calls import BUILTIN, CALLS, Call, assert_right, run
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right, causal_upper_left
from torch.nn.functional import scaled_dot_product_attention as imported_before
from torch.utils.checkpoint import checkpoint

from transformer_fast import accelerate
from transformer_fast.dropin import accelerate as module
from transformer_fast.dropin.aten import FlashForCuda
from transformer_fast.dropin.report import Report
from transformer_fast.testing import judge

FLASH = "aten::_scaled_dot_product_flash_attention_for_cpu"
needs_kernels_back = pytest.mark.skipif(not hasattr(torch.library, "get_kernel"), reason="torch.library.get_kernel")


def by_name(*args: Any, **kwargs: Any) -> Tensor:
    """As nearly all models call it."""
    return F.scaled_dot_product_attention(*args, **kwargs)


DOORS: dict[str, Callable[..., Tensor]] = {
    "by_name": by_name,
    "imported_before": imported_before,
    "operator": torch.ops.aten.scaled_dot_product_attention,
}
each_door = pytest.mark.parametrize("door", DOORS)


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    """Each test leaves PyTorch as it was."""
    torch._dynamo.reset()
    state = pytorch_state()
    yield
    torch._dynamo.reset()
    assert pytorch_state() == state


def pytorch_state() -> dict[str, Any]:
    ops = (FLASH, f"{FLASH}_backward", "aten::scaled_dot_product_attention")
    return {
        "name": F.scaled_dot_product_attention,
        "fast path": torch.backends.mha.get_fastpath_enabled(),
        "cache": torch.compiler.config.cache_key_tag,
        **{op: torch._C._dispatch_dump(op) for op in ops},
    }


def taken_of(report: Report) -> list[bool]:
    return [site.taken for site in report]


# -------------------------------------------------------------------------------------------------- every door


@pytest.mark.parametrize("name", CALLS)
@each_door
def test_call(door: str, name: str) -> None:
    """Each kind of call is taken at each door, with gradients."""
    call = CALLS[name]
    function = DOORS[door]
    with accelerate(explain=True) as handle:
        tensors = call.tensors(torch.float32)
        results = run(function, tensors, torch.ones_like(function(**tensors, **call.options)), **call.options)
    assert_right(results, tensors, torch.ones_like(results["out"]), **call.options)
    assert taken_of(handle.report()), "no call was seen"
    assert all(taken_of(handle.report())), str(handle.report())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@each_door
def test_half_precision(door: str, dtype: torch.dtype) -> None:
    tensors = CALLS["causal"].tensors(dtype)
    dout = torch.randn(2, 4, 9, 16, dtype=dtype)
    with accelerate(explain=True) as handle:
        results = run(DOORS[door], tensors, dout, is_causal=True)
    assert all(taken_of(handle.report()))
    assert_right(results, tensors, dout, is_causal=True)


@each_door
def test_inference_mode(door: str) -> None:
    with torch.inference_mode(), accelerate(explain=True) as handle:
        query = torch.randn(2, 4, 9, 16)
        DOORS[door](query, query, query)
    assert taken_of(handle.report()) == [True]


@each_door
def test_dropout_is_ours(door: str) -> None:
    """As the function gives it for the same seed."""
    tensors = Call().tensors(torch.float32)
    with accelerate():
        torch.manual_seed(5)
        out = DOORS[door](**tensors, dropout_p=0.3)
    from transformer_fast.dropin import scaled_dot_product_attention as ours

    torch.manual_seed(5)
    assert torch.equal(out, ours(**tensors, dropout_p=0.3))


@each_door
def test_autocast(door: str) -> None:
    tensors = CALLS["mask_float_2d"].tensors(torch.float32)
    oracle = BUILTIN(**{n: t.double() for n, t in tensors.items()})
    with torch.autocast("cpu", torch.bfloat16):
        baseline = BUILTIN(**tensors)
        with accelerate(explain=True) as handle:
            out = DOORS[door](**tensors)
    assert taken_of(handle.report()) == [True] and out.dtype == torch.bfloat16
    verdict = judge(out, oracle, baseline)
    assert verdict.passed, str(verdict)


@pytest.mark.parametrize("corner", [causal_upper_left, causal_lower_right], ids=lambda f: f.__name__)
def test_causal_bias(corner: Any) -> None:
    """A mask that PyTorch handles in its own protocol for functions."""
    tensors = Call().tensors(torch.float32)
    bias = corner(9, 13)
    due = BUILTIN(**tensors, attn_mask=bias)
    oracle = BUILTIN(**{n: t.double() for n, t in tensors.items()}, attn_mask=bias._materialize())
    with accelerate(explain=True) as handle:
        for function in (by_name, imported_before):
            out = function(**tensors, attn_mask=bias)
            verdict = judge(torch.Tensor.as_subclass(out, Tensor), oracle, due)
            assert verdict.passed, str(verdict)
    assert all(taken_of(handle.report())), str(handle.report())


def test_modes_and_devices() -> None:
    """torch.set_default_device is a mode that looks at every function."""
    tensors = Call().tensors(torch.float32)
    with accelerate(explain=True) as handle, torch.device("cpu"):
        by_name(**tensors)
    assert taken_of(handle.report()) == [True]


def test_checkpointed() -> None:
    tensors = CALLS["causal"].tensors(torch.float32)
    dout = torch.randn(2, 4, 9, 16)

    def again(query: Tensor, key: Tensor, value: Tensor) -> Any:
        return checkpoint(partial(by_name, is_causal=True), query, key, value, use_reentrant=False)

    with accelerate():
        results = run(again, tensors, dout)
    assert_right(results, tensors, dout, is_causal=True)


def test_backward_after_restore() -> None:
    """What was taken forward stays ours backward."""
    tensors = CALLS["causal"].tensors(torch.float32)
    dout = torch.randn(2, 4, 9, 16)

    def restored_between(**given: Any) -> Tensor:
        with accelerate():
            return by_name(**given)

    assert_right(run(restored_between, tensors, dout, is_causal=True), tensors, dout, is_causal=True)


# ------------------------------------------------------------------------------------------------------ compiled

COMPILED = ("4d", "causal_more_keys", "gqa", "mask_padding", "mask_float_2d", "strides_last", "head_dim_v")


@pytest.mark.parametrize("name", COMPILED)
@pytest.mark.parametrize("door", ["by_name", "imported_before"])
def test_compiled(door: str, name: str) -> None:
    call = CALLS[name]
    compiled = torch.compile(lambda **given: DOORS[door](**given), backend="aot_eager", fullgraph=True)
    tensors = call.tensors(torch.float32)
    dout = torch.randn(BUILTIN(**tensors, **call.options).shape)
    with accelerate(explain=True) as handle:
        results = run(compiled, tensors, dout, **call.options)
    assert_right(results, tensors, dout, **call.options)
    assert any(site.compiled for site in handle.report())
    assert all(taken_of(handle.report())), str(handle.report())


def test_compiled_with_any_length() -> None:
    compiled = torch.compile(partial(by_name, is_causal=True), backend="aot_eager", fullgraph=True, dynamic=True)
    calls = [Call((2, 4, n, 16), (2, 4, n, 16)).tensors(torch.float32) for n in (5, 9, 17)]
    with accelerate(explain=True) as handle:
        found = [run(compiled, tensors, torch.ones_like(tensors["query"])) for tensors in calls]
    for results, tensors in zip(found, calls, strict=True):
        assert_right(results, tensors, torch.ones_like(tensors["query"]), is_causal=True)
    assert taken_of(handle.report()) == [True], str(handle.report())


@pytest.mark.parametrize("name", ["4d", "head_dim_v", "strides_last"])
def test_compiled_in_inference_mode(name: str) -> None:
    tensors = CALLS[name].tensors(torch.float32)
    with torch.inference_mode(), accelerate(explain=True) as handle:
        out = torch.compile(imported_before, backend="aot_eager", fullgraph=True)(**tensors)
    assert taken_of(handle.report()) == [True]
    verdict = judge(out, BUILTIN(**{n: t.double() for n, t in tensors.items()}), BUILTIN(**tensors))
    assert verdict.passed, str(verdict)


def graph_of(function: Callable[..., Any], *args: Any) -> list[str]:
    """The operators that a compiler is handed for the forward pass."""
    from torch._dynamo.backends.common import aot_autograd

    targets: list[str] = []

    def keep(module: torch.fx.GraphModule, inputs: Any) -> Any:
        from functorch.compile import make_boxed_func

        targets.extend(str(node.target) for node in module.graph.nodes if node.op == "call_function")
        return make_boxed_func(module.forward)

    torch._dynamo.reset()
    torch.compile(function, backend=aot_autograd(fw_compiler=keep), fullgraph=True)(*args)
    return targets


@pytest.mark.parametrize("grad", [False, True])
def test_compiled_graph_has_our_operator(grad: bool) -> None:
    query = torch.randn(2, 4, 9, 16, requires_grad=grad)
    with accelerate():
        inside = graph_of(lambda q: by_name(q, q, q, dropout_p=0.1) * 2, query)
    outside = graph_of(lambda q: by_name(q, q, q) * 2, query)
    assert "transformer_fast.attention.default" in inside
    assert not any("transformer_fast" in target for target in outside)


def test_compiled_dropout() -> None:
    tensors = CALLS["4d"].tensors(torch.float32)
    compiled = torch.compile(partial(by_name, dropout_p=0.5), backend="aot_eager", fullgraph=True)
    with accelerate(explain=True) as handle:
        first, second = compiled(**tensors), compiled(**tensors)
    assert all(taken_of(handle.report())) and not torch.equal(first, second)


@needs_kernels_back
def test_compiled_before() -> None:
    """A graph that has PyTorch's operator in it; the name imported before, since for ours a compiler looks again."""
    tensors = CALLS["causal"].tensors(torch.float32)
    dout = torch.randn(2, 4, 9, 16)
    compiled = torch.compile(imported_before, backend="aot_eager", fullgraph=True)
    run(compiled, tensors, dout, is_causal=True)
    with accelerate(explain=True) as handle:
        results = run(compiled, tensors, dout, is_causal=True)
    assert_right(results, tensors, dout, is_causal=True)
    assert taken_of(handle.report()) == [True], str(handle.report())


@pytest.mark.slow
def test_compiled_by_inductor() -> None:
    tensors = CALLS["causal"].tensors(torch.float32)
    dout = torch.randn(2, 4, 9, 16)
    compiled = torch.compile(lambda query, key, value: by_name(query, key, value, is_causal=True), fullgraph=True)
    with accelerate(explain=True) as handle:
        results = run(compiled, tensors, dout)
    assert_right(results, tensors, dout, is_causal=True)
    assert all(taken_of(handle.report()))
    assert_right(run(compiled, tensors, dout), tensors, dout, is_causal=True)  # after restoring, too


# --------------------------------------------------------------------------------- PyTorch's operators by name


def flash(query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, is_causal: bool = False) -> Tensor:
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, is_causal=is_causal, attn_mask=attn_mask
    )[0]


@needs_kernels_back
@pytest.mark.parametrize(
    "name",
    ["4d", "causal", "causal_more_keys", "causal_more_rows", "strides_bshd", "mask_float", "mask_float_padding"],
)
def test_flash_operator(name: str) -> None:
    """It and its backward, and what they promise to a compiler: shapes, dtypes, strides."""
    call = CALLS[name]
    tensors = call.tensors(torch.float32)
    dout = torch.randn(call.query)
    ops = torch.ops.aten
    mask = tensors.pop("attn_mask", None)  # without gradient: PyTorch gives none here
    others = dict(is_causal=call.options.get("is_causal", False), attn_mask=mask)

    def results() -> tuple[Tensor, ...]:
        out, lse = ops._scaled_dot_product_flash_attention_for_cpu(*tensors.values(), **others)
        backward = ops._scaled_dot_product_flash_attention_for_cpu_backward
        causal = others["is_causal"]
        return out, lse, *backward(dout, *tensors.values(), out, lse, 0.0, causal, attn_mask=mask)

    with accelerate(explain=True) as handle:
        found = run(partial(flash, **others), tensors, dout)
        ours = results()
    assert all(taken_of(handle.report()))
    assert_right(found, tensors, dout, **others)
    plain = results()
    for result, promise in zip(ours, plain, strict=True):
        assert (result.shape, result.stride(), result.dtype) == (promise.shape, promise.stride(), promise.dtype)
    finite = plain[1].isfinite()  # of a row that sees nothing PyTorch's lse is a number, ours minus infinity
    verdict = judge(ours[1][finite], plain[1][finite].double(), plain[1][finite])
    assert verdict.passed, str(verdict)


@needs_kernels_back
def test_flash_operator_in_float64_is_pytorchs() -> None:
    tensors = CALLS["causal"].tensors(torch.float64)
    dout = torch.randn(2, 4, 9, 16, dtype=torch.float64)
    due = run(flash, tensors, dout, is_causal=True)
    with accelerate(explain=True) as handle:
        results = run(flash, tensors, dout, is_causal=True)
    assert taken_of(handle.report()) == [False]
    for name, result in results.items():
        assert torch.equal(result, due[name])


@pytest.mark.parametrize("causal", [False, True])
def test_cuda_operator_on_the_cpu(causal: bool) -> None:
    """The functions that CUDA's operators would get, called with CPU tensors: numbers and promises."""
    ours = FlashForCuda((refused, refused), lambda: "auto", lambda query, dropout_p: None, lambda *a: None)
    call = Call((2, 4, 9, 16), (2, 4, 13, 16), strided=CALLS["strides_bshd"].strided)
    tensors, dout = call.tensors(torch.float32), torch.randn(call.query)
    query, key, value = tensors.values()
    results = ours.forward(None, query, key, value, 0.0, causal)
    meta = [t.to("meta") for t in tensors.values()]
    promised = torch.ops.aten._scaled_dot_product_flash_attention(*meta, 0.0, causal)
    for result, promise in zip(results, promised, strict=True):
        if isinstance(promise, Tensor):
            assert (result.shape, result.dtype, result.stride()) == (promise.shape, promise.dtype, promise.stride())
        else:
            assert result == promise
    out, lse, _, _, max_q, max_k, seed, offset, _ = results
    grads = ours.backward(None, dout, query, key, value, out, lse, None, None, max_q, max_k, 0.0, causal, seed, offset)
    for grad, tensor in zip(grads, tensors.values(), strict=True):
        assert grad.stride() == torch.empty_like(tensor).stride()
    found = {"out": out, **dict(zip(("dquery", "dkey", "dvalue"), grads, strict=True))}
    mask = torch.ones(9, 13, dtype=torch.bool).tril(4) if causal else None  # bottom right, as flash attention has it
    assert_right(found, tensors, dout, **({} if mask is None else {"attn_mask": mask}))


def test_cuda_operator_passes_on_what_it_cannot() -> None:
    ours = FlashForCuda((given_back, given_back), lambda: "auto", lambda query, dropout_p: "no", lambda *a: None)
    query = torch.randn(2, 4, 9, 16)
    assert ours.forward(None, query, query, query, 0.5, True, True, scale=2.0)[1:] == (
        *(query,) * 3, 0.5, True, True, 2.0,
    )  # fmt: skip
    tensors = (query,) * 6
    rest = (None, None, 9, 9, 0.5, True, query, query)
    assert ours.backward(None, *tensors, *rest, scale=2.0)[1:] == (*tensors, *rest, 2.0)


def test_cuda_implementation_is_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """By PyTorch's registry, beside those that it has; with a stand-in for the operators, which a GPU would need."""
    registry = pytest.importorskip("torch.nn.attention._registry")
    removed: list[str] = []
    install = module._install_flash

    class Library:
        def _destroy(self) -> None:
            removed.append("ours")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(module, "_install_flash", lambda kind, key: Library() if key == "CUDA" else install(kind, key))
    monkeypatch.setattr(registry, "_FLASH_ATTENTION_IMPLS", dict(registry._FLASH_ATTENTION_IMPLS))
    registry.register_flash_attention_impl("theirs", register_fn=Library)
    with accelerate():
        assert registry.current_flash_attention_impl() == "transformer_fast" and module._takes_cuda
    assert registry.current_flash_attention_impl() is None and removed == ["ours"] and not module._takes_cuda
    with accelerate():
        registry._FLASH_ATTENTION_ACTIVE = ("theirs", None)
    assert registry.current_flash_attention_impl() == "theirs"
    registry._FLASH_ATTENTION_ACTIVE = None


def refused(*args: Any, **kwargs: Any) -> Any:
    raise AssertionError("PyTorch's kernel was called")


def given_back(*args: Any, scale: float) -> Any:
    return (*args, scale)


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
    with accelerate():
        program = torch.export.export(Model(), (query,))
        traced = torch.jit.trace(Model(), (query,), check_trace=False)
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


def test_call_and_restore() -> None:
    handle = accelerate()
    assert is_active()
    handle.restore()
    assert not is_active()
    handle.restore()  # a second time does nothing


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
    assert f"test_accelerate.py:{line} (test_report)" in text and "1 of 2 call sites taken" in text


def test_report_of_growing_lengths() -> None:
    with accelerate(explain=True) as handle:
        for length in (7, 5, 9):
            by_name(torch.randn(2, 4, length, 8), *torch.randn(2, 2, 4, length, 8))
            by_name(torch.randn(2, 4, 1, 8), *torch.randn(2, 2, 4, length, 8))
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
