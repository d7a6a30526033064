"""accelerate(): every door to SDPA is taken, in eager mode and compiled, forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from dropin.accelerated import DOORS, by_name, each_door, flash, imported_before, pytorch_state, taken_of
from dropin.sdpa_calls import BUILTIN, CALLS, Call, assert_right, run
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right, causal_upper_left
from torch.utils.checkpoint import checkpoint

from transformer_fast import accelerate
from transformer_fast.dropin import accelerate as module
from transformer_fast.dropin.aten import FlashForCuda
from transformer_fast.testing import judge

needs_kernels_back = pytest.mark.skipif(not hasattr(torch.library, "get_kernel"), reason="torch.library.get_kernel")


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    """Each test leaves PyTorch as it was."""
    torch._dynamo.reset()
    state = pytorch_state()
    yield
    torch._dynamo.reset()
    assert pytorch_state() == state


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


@pytest.mark.parametrize("head_dim_v", [16, 24])  # PyTorch's fused kernel cannot have two
@each_door
def test_inference_mode(door: str, head_dim_v: int) -> None:
    with torch.inference_mode(), accelerate(explain=True) as handle:
        query = torch.randn(2, 4, 9, 16)
        DOORS[door](query, query, torch.randn(2, 4, 9, head_dim_v))
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
    assert [site.compiled for site in handle.report()] == [True]
    if door == "by_name":  # the code that is compiled, not the one that calls it
        assert "(by_name)" in handle.report()[0].callers[0]
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
