"""The function with SDPA's signature: its results, gradients, transforms and errors."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from dropin.sdpa_calls import BUILTIN, CALLS, DTYPES, Call, assert_right, check, run
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention.bias import causal_lower_right, causal_upper_left
from torch.utils.checkpoint import checkpoint

from transformer_fast import UnsupportedError
from transformer_fast.dropin import scaled_dot_product_attention as sdpa
from transformer_fast.dropin import sdpa as module
from transformer_fast.spec import Operands, Options
from transformer_fast.testing import judge

each_call = pytest.mark.parametrize("name", CALLS)


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@each_call
def test_call(name: str, dtype: torch.dtype) -> None:
    """Output and every gradient, that of a float mask included."""
    check(sdpa, CALLS[name], dtype)


def test_signature() -> None:
    """Names, order and defaults as PyTorch documents them."""
    assert BUILTIN.__doc__ is not None
    documented = "".join(BUILTIN.__doc__.split("->")[0].split()).removeprefix("scaled_dot_product_attention(")
    ours = [
        p.name if p.default is inspect.Parameter.empty else f"{p.name}={p.default}"
        for p in inspect.signature(sdpa).parameters.values()
    ]
    assert documented.rstrip(":)") == ",".join(ours)


@each_call
def test_memory_order(name: str) -> None:
    """The output's strides are those that PyTorch's fused kernel gives, where it takes the call."""
    tensors = CALLS[name].tensors(torch.float32)
    shapes = {tuple(t.shape[:-2]) for n, t in tensors.items() if n != "attn_mask"}
    due = BUILTIN(**tensors, **CALLS[name].options)
    found = sdpa(**tensors, **CALLS[name].options)
    assert found.shape == due.shape
    if len(shapes) == 1 and due.dim() == 4 and tensors["query"].stride(-1) == 1:
        assert found.stride() == due.stride()


@pytest.mark.parametrize("name", ["query", "key", "value"])
def test_one_tensor_of_other_strides(name: str) -> None:
    """A last dimension that is not contiguous, of one tensor alone."""
    tensors = Call().tensors(torch.float32)
    due = sdpa(**tensors)
    tensors[name] = tensors[name].mT.contiguous().mT
    assert torch.equal(sdpa(**tensors), due)


@pytest.mark.parametrize("shape", [(2, 4, 0, 16), (0, 4, 9, 16), (2, 0, 9, 16)], ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_nothing_to_do(shape: tuple[int, ...], causal: bool) -> None:
    key = torch.randn(shape[0], shape[1], 13, 16)
    assert sdpa(torch.randn(shape), key, key, is_causal=causal).shape == shape


def test_no_keys() -> None:
    """Every row sees nothing."""
    query, key = torch.randn(2, 4, 9, 16, requires_grad=True), torch.randn(2, 4, 0, 16)
    out = sdpa(query, key, key)
    out.sum().backward()
    assert torch.equal(out, torch.zeros_like(out)) and torch.equal(query.grad, torch.zeros_like(query))


def test_half_precision_with_a_float32_mask() -> None:
    """PyTorch allows it; ours adds it in float32."""
    tensors = Call().tensors(torch.bfloat16)
    mask = torch.randn(2, 4, 9, 13)
    oracle = BUILTIN(**{n: t.double() for n, t in tensors.items()}, attn_mask=mask.double())
    verdict = judge(sdpa(**tensors, attn_mask=mask), oracle, BUILTIN(**tensors, attn_mask=mask.bfloat16()))
    assert verdict.passed, str(verdict)


# ----------------------------------------------------------------------------------------------- how it is done


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The problems that it made of calls: operands and options by name."""
    calls: list[dict[str, Any]] = []
    run = module.run

    def watched(operands: Operands, options: Options, *rest: Any) -> Any:
        calls.append(operands._asdict() | options._asdict())
        return run(operands, options, *rest)

    monkeypatch.setattr(module, "run", watched)
    return calls


@pytest.mark.parametrize(
    "name",
    ["mask_padding", "mask_padding_expanded", "mask_padding_shared", "mask_padding_one_row", "mask_5d_shared"],
)
def test_padding_is_no_matrix(name: str, given: list[dict[str, Any]]) -> None:
    sdpa(**CALLS[name].tensors(torch.float32))
    assert given[0]["bias"] is None and given[0]["key_padding_mask"].dim() == 2


@pytest.mark.parametrize("name", ["4d", "gqa", "strides_bshd", "strides_gaps", "strides_expanded", "mask_float"])
def test_nothing_is_copied(name: str, given: list[dict[str, Any]]) -> None:
    tensors = CALLS[name].tensors(torch.float32)
    sdpa(**tensors, **CALLS[name].options)
    for operand in ("query", "key", "value"):
        assert given[0][operand].data_ptr() == tensors[operand].data_ptr()
        assert given[0][operand].stride() == tensors[operand].stride()


def test_one_kv_head_stands_for_all(given: list[dict[str, Any]]) -> None:
    key = torch.randn(1, 1, 13, 8)
    sdpa(torch.randn(2, 4, 9, 8), key, key)
    assert given[0]["key"].shape == (2, 1, 13, 8) and given[0]["key"].data_ptr() == key.data_ptr()


@pytest.mark.parametrize("deterministic", [False, True])
def test_deterministic_algorithms(deterministic: bool, given: list[dict[str, Any]]) -> None:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(deterministic)
    try:
        sdpa(**Call().tensors(torch.float32))
    finally:
        torch.use_deterministic_algorithms(before)
    assert given[0]["deterministic"] is deterministic


# -------------------------------------------------------------------------------------------------- CausalBias


@pytest.mark.parametrize("lengths", [(9, 9), (9, 13), (13, 9)], ids=str)
@pytest.mark.parametrize("corner", [causal_upper_left, causal_lower_right], ids=lambda f: f.__name__)
def test_causal_bias(corner: Any, lengths: tuple[int, int], given: list[dict[str, Any]]) -> None:
    call = Call((2, 4, lengths[0], 16), (2, 4, lengths[1], 16))
    tensors = call.tensors(torch.float32)
    dout = torch.randn(call.query)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of rows that see nothing, which PyTorch has as NaN no longer
        bias = corner(*lengths)
    ours = run(partial(sdpa, attn_mask=bias), tensors, dout)
    mask = bias._materialize()
    found = {n: t for n, t in ours.items() if n != "dattn_mask"}
    assert_right(found, tensors, dout, attn_mask=mask)
    assert given[0]["bias"] is None


def test_causal_bias_of_other_lengths() -> None:
    with pytest.raises(ValueError, match=r"attn_mask is a causal bias of \(9, 9\); allowed: \(9, 13\)"):
        sdpa(**Call().tensors(torch.float32), attn_mask=causal_lower_right(9, 9))


# ------------------------------------------------------------------------------------------------------ dropout


def test_dropout_drops_weights() -> None:
    """With the identity as values the output is the weights: some are 0, the others larger by 1 / (1 - p)."""
    query = key = torch.randn(4, 3, 64, 8)
    value = torch.eye(64).expand(4, 3, 64, 64)
    weights = sdpa(query, key, value)
    dropped = sdpa(query, key, value, dropout_p=0.25)
    kept = dropped != 0
    share = kept.float().mean().item()
    deviation = (0.25 * 0.75 / kept.numel()) ** 0.5
    assert abs(share - 0.75) < 5 * deviation
    verdict = judge(dropped[kept], weights[kept].double() / 0.75, weights[kept] / 0.75)
    assert verdict.passed, str(verdict)


def test_dropout_follows_the_seed() -> None:
    tensors = Call().tensors(torch.float32)
    torch.manual_seed(1)
    first, other = sdpa(**tensors, dropout_p=0.5), sdpa(**tensors, dropout_p=0.5)
    torch.manual_seed(1)
    assert torch.equal(first, sdpa(**tensors, dropout_p=0.5))
    assert not torch.equal(first, other)


def test_all_dropped() -> None:
    tensors = Call().tensors(torch.float32)
    results = run(sdpa, tensors, torch.ones(2, 4, 9, 16), dropout_p=1.0)
    assert all(torch.equal(t, torch.zeros_like(t)) for t in results.values())


# --------------------------------------------------------------------------------------------------- transforms


@pytest.mark.parametrize("name", ["4d", "3d", "causal_more_keys", "gqa", "mask_padding", "mask_float", "strides_last"])
def test_vmap(name: str) -> None:
    """Over a further dimension of all tensors: the same as with that dimension in front."""
    call = CALLS[name]
    entries = [call.tensors(torch.float32) for _ in range(3)]
    stacked = {n: torch.stack([e[n] for e in entries]) for n in entries[0]}
    names = list(stacked)
    mapped = torch.func.vmap(lambda *ts: sdpa(**dict(zip(names, ts, strict=True)), **call.options))(*stacked.values())
    for one, entry in zip(mapped, entries, strict=True):
        oracle = BUILTIN(**{n: t.double() if t.is_floating_point() else t for n, t in entry.items()}, **call.options)
        verdict = judge(one, oracle, BUILTIN(**entry, **call.options))
        assert verdict.passed, str(verdict)


def test_per_sample_gradients() -> None:
    query, key, value = torch.randn(3, 5, 2, 4, 9, 8).unbind()

    def loss(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return sdpa(query, key, value, is_causal=True).square().sum()

    grads = torch.func.vmap(torch.func.grad(loss, argnums=(0, 1, 2)))(query, key, value)
    for i in range(5):
        leaves = [t[i].double().requires_grad_() for t in (query, key, value)]
        due = torch.autograd.grad(BUILTIN(*leaves, is_causal=True).square().sum(), leaves)
        single = [t[i].clone().requires_grad_() for t in (query, key, value)]
        plain = torch.autograd.grad(BUILTIN(*single, is_causal=True).square().sum(), single)
        for g, d, p in zip(grads, due, plain, strict=True):
            verdict = judge(g[i], d, p)
            assert verdict.passed, str(verdict)


COMPILED = ("3d", "causal_more_rows", "causal_more_keys", "gqa", "mask_padding", "mask_float_2d", "strides_last", "5d")


@pytest.mark.parametrize("name", COMPILED)
def test_compiled(name: str) -> None:
    check(torch.compile(sdpa, backend="aot_eager", fullgraph=True), CALLS[name], torch.float32)


def test_compiled_with_any_length() -> None:
    compiled = torch.compile(sdpa, backend="aot_eager", fullgraph=True, dynamic=True)
    for length in (5, 9, 17):
        check(compiled, Call((2, 4, length, 16), (2, 4, length, 16), options=dict(is_causal=True)), torch.float32)


def test_compiled_causal_bias() -> None:
    bias = causal_lower_right(9, 13)
    compiled = torch.compile(lambda **given: sdpa(**given, attn_mask=bias), backend="aot_eager", fullgraph=True)
    tensors = Call().tensors(torch.float32)
    assert torch.equal(compiled(**tensors), sdpa(**tensors, attn_mask=bias))


@pytest.mark.slow
def test_compiled_by_inductor() -> None:
    def block(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor) -> Tensor:
        return sdpa(query * 2, key, value.relu(), attn_mask) + 1

    def plain(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor) -> Tensor:
        return BUILTIN(query * 2, key, value.relu(), attn_mask) + 1

    tensors = CALLS["mask_float_padding"].tensors(torch.float32)
    dout = torch.randn(2, 4, 9, 16)
    ours = run(torch.compile(block, fullgraph=True), tensors, dout)
    oracle = run(plain, {n: t.double() for n, t in tensors.items()}, dout.double())
    for name, baseline in run(plain, tensors, dout).items():
        verdict = judge(ours[name], oracle[name], baseline, name=name)
        assert verdict.passed, str(verdict)


def test_checkpointed() -> None:
    tensors = CALLS["causal"].tensors(torch.float32)
    dout = torch.randn(2, 4, 9, 16)

    def again(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        torch_out = checkpoint(sdpa, query, key, value, None, 0.5, True, use_reentrant=False)
        assert isinstance(torch_out, Tensor)
        return torch_out

    torch.manual_seed(3)
    direct = run(sdpa, tensors, dout, dropout_p=0.5, is_causal=True)
    torch.manual_seed(3)
    for name, result in run(again, tensors, dout).items():
        assert torch.equal(result, direct[name]), name


@pytest.mark.parametrize("mask", [None, torch.float32, torch.bfloat16], ids=str)
def test_autocast(mask: torch.dtype | None) -> None:
    tensors = Call(mask=None if mask is None else lambda: torch.randn(9, 13)).tensors(torch.float32)
    if mask is not None:
        tensors["attn_mask"] = tensors["attn_mask"].to(mask)
    oracle = BUILTIN(**{n: t.double() for n, t in tensors.items()})
    with torch.autocast("cpu", torch.bfloat16):
        out, baseline = sdpa(**tensors), BUILTIN(**tensors)
    assert out.dtype == torch.bfloat16
    verdict = judge(out, oracle, baseline)
    assert verdict.passed, str(verdict)


# --------------------------------------------------------------------------------------------------- derivatives


@pytest.mark.parametrize("name", ["4d", "causal_more_rows", "gqa", "mask_float_2d", "mask_empty_rows", "3d"])
def test_float64_is_differentiable_to_any_order(name: str) -> None:
    call = CALLS[name]
    tensors = call.tensors(torch.float64)
    small = {n: t[..., :3, :] if n == "query" else t for n, t in tensors.items()}
    if "attn_mask" in small:
        small["attn_mask"] = small["attn_mask"][..., :3, :]
    names = list(small)
    leaves = [t.detach().clone().requires_grad_(t.is_floating_point()) for t in small.values()]

    def function(*given: Tensor) -> Tensor:
        return sdpa(**dict(zip(names, given, strict=True)), **call.options)

    assert torch.autograd.gradcheck(function, leaves, fast_mode=True, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


def test_second_derivative_of_a_kernel_is_refused() -> None:
    query = torch.randn(2, 4, 9, 16, requires_grad=True)
    (grad,) = torch.autograd.grad(sdpa(query, query, query).square().sum(), query, create_graph=True)
    with pytest.raises(UnsupportedError, match="cannot be differentiated twice"):
        grad.sum().backward()


def test_forward_mode_of_a_kernel_is_refused() -> None:
    query = torch.randn(2, 4, 9, 16)
    with forward_ad.dual_level(), pytest.raises(UnsupportedError, match="forward-mode"):
        sdpa(forward_ad.make_dual(query, query), query, query)


# -------------------------------------------------------------------------------------------------------- errors

Q, K = torch.randn(2, 4, 9, 16), torch.randn(2, 4, 13, 16)
ERRORS: dict[str, tuple[tuple[Any, ...], dict[str, Any], type[Exception], str]] = {
    "mask_and_causal": ((Q, K, K, torch.ones(9, 13)), dict(is_causal=True), ValueError, "is_causal=True is given with"),
    "mask_shape": ((Q, K, K, torch.ones(9, 12)), {}, ValueError, r"attn_mask has shape \(9, 12\); allowed: broad"),
    "mask_batch": ((Q, K, K, torch.ones(3, 1, 9, 13)), {}, ValueError, r"attn_mask has shape \(3, 1, 9, 13\)"),
    "mask_padding": ((Q, K, K, torch.ones(3, 1, 1, 13) > 0), {}, ValueError, r"attn_mask has shape \(3, 1, 1, 13\)"),
    "mask_larger": ((Q[0, 0], K[0, 0], K[0, 0], torch.ones(1, 9, 13)), {}, ValueError, "broadcastable to"),
    "mask_dtype": ((Q, K, K, torch.ones(9, 13).long()), {}, TypeError, "attn_mask has dtype int64; allowed: bool, fl"),
    "mask_other": ((Q, K, K, torch.ones(9, 13).double()), {}, TypeError, "attn_mask has dtype float64"),
    "mask_type": ((Q, K, K, [[True]]), {}, TypeError, "attn_mask is of type list"),
    "heads": ((Q, K[:, :2], K[:, :2]), {}, ValueError, "leading dimensions do not broadcast"),
    "gqa_heads": ((Q, K[:, :3], K[:, :3]), dict(enable_gqa=True), ValueError, "key has 3 heads for a query of 4"),
    "gqa_value_heads": ((Q, K[:, :2], K[:, :3]), dict(enable_gqa=True), ValueError, "value has 3 heads"),
    "gqa_dims": ((Q[0, 0], K[0, 0], K[0, 0]), dict(enable_gqa=True), ValueError, "query has shape"),
    "batch": ((Q, K[:1].expand(3, -1, -1, -1), K), {}, ValueError, "leading dimensions do not broadcast"),
    "one_dim": ((Q[0, 0, 0], K, K), {}, ValueError, r"query has shape \(16,\)"),
    "head_dim": ((Q, K[..., :8], K), {}, ValueError, "key has head_dim 8; allowed: 16"),
    "lengths": ((Q, K, K[:, :, :5]), {}, ValueError, "value has shape"),
    "integers": ((Q.long(), K.long(), K.long()), {}, TypeError, "query has dtype int64"),
    "complex": ((Q.cfloat(), K.cfloat(), K.cfloat()), {}, TypeError, "query has dtype complex64"),
    "two_dtypes": ((Q, K.bfloat16(), K), {}, TypeError, "key has dtype bfloat16"),
    "no_tensor": ((Q, None, K), {}, TypeError, "key is of type NoneType"),
    "dropout": ((Q, K, K), dict(dropout_p=1.5), ValueError, "dropout_p is 1.5"),
    "scale": ((Q, K, K), dict(scale=float("nan")), ValueError, "softmax_scale is nan"),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_error(name: str) -> None:
    arguments, options, error, text = ERRORS[name]
    with pytest.raises(error, match=text):
        sdpa(*arguments, **options)
