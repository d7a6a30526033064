"""The attention modules of torch.nn over the fused kernels: the same outputs, gradients and state as the originals."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from dropin.torch_nn_cases import (
    BATCH,
    CASES,
    DIM,
    HEADS,
    KEYS,
    MINUS_INF,
    ROWS,
    SQUARE,
    assert_like_torch,
    assert_whole_like_torch,
    causal_mask,
    filled,
    in_dtype,
    inputs_of,
    mask_of,
    padding,
    right_padding,
)
from torch import Tensor, nn

from transformer_fast.dropin import torch_nn
from transformer_fast.dropin.torch_nn import (
    MultiheadAttention,
    TransformerDecoderLayer,
    TransformerEncoderLayer,
    replace_modules,
    restore_modules,
)
from transformer_fast.testing import judge


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """Torch's remarks: nested tensors are a prototype, masks of two types are deprecated, and the like."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*nested tensors.*")
        warnings.filterwarnings("ignore", message=".*mismatched.*")
        warnings.filterwarnings("ignore", message=".*enable_nested_tensor.*")
        yield


each_dtype = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float64], ids=["f32", "bf16", "f64"]
)


@each_dtype
@pytest.mark.parametrize("need_weights", [False, True], ids=["fast", "weights"])
@pytest.mark.parametrize("name", CASES)
def test_multihead_attention(name: str, need_weights: bool, dtype: torch.dtype) -> None:
    options, given, same = CASES[name]
    theirs = filled(nn.MultiheadAttention(DIM, HEADS, **options))
    ours = MultiheadAttention(DIM, HEADS, **options)
    ours.load_state_dict(theirs.state_dict())
    arguments = given()
    if need_weights:
        arguments["average_attn_weights"] = "mask" in name
    assert_like_torch(ours, theirs, inputs_of(options, same), dtype, need_weights=need_weights, **arguments)


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_without_a_batch(need_weights: bool, masked: bool) -> None:
    theirs = filled(nn.MultiheadAttention(DIM, HEADS))
    ours = replace_modules(copy.deepcopy(theirs))
    given: dict[str, Any] = dict(need_weights=need_weights)
    if masked:
        given |= dict(key_padding_mask=padding("bool")[0], attn_mask=mask_of("bool", (HEADS, ROWS, KEYS)))
    assert_like_torch(ours, theirs, [torch.randn(ROWS, DIM), torch.randn(KEYS, DIM)], torch.float32, **given)


@pytest.mark.parametrize("need_weights", [False, True], ids=["fast", "weights"])
@pytest.mark.parametrize("name", ["self_batch_first", "padding", "mask_per_head", "causal"])
def test_eval_mode_gives_what_torchs_inference_path_gives(name: str, need_weights: bool) -> None:
    """With no gradient wanted torch.nn computes by another path, in eval mode."""
    options, given, same = CASES[name]
    theirs = filled(nn.MultiheadAttention(DIM, HEADS, dropout=0.5, **options)).eval()
    ours = replace_modules(copy.deepcopy(theirs))
    (x,) = inputs_of(options, same)
    arguments = given() | dict(need_weights=need_weights)
    with torch.no_grad():
        results, plain = (m(x, x, x, **arguments) for m in (ours, theirs))
        oracle = theirs.double()(x.double(), x.double(), x.double(), **arguments)
    for result, wanted, peer in zip(results, oracle, plain, strict=True):
        assert (result is None) == (peer is None)
        assert result is None or judge(result, wanted, peer).passed


@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("need_weights", [False, True], ids=["fast", "weights"])
def test_a_row_that_sees_nothing_is_zero(need_weights: bool, kind: str) -> None:
    module = filled(MultiheadAttention(DIM, HEADS, batch_first=True))
    x = torch.randn(BATCH, ROWS, DIM, requires_grad=True)
    mask = torch.zeros(BATCH * HEADS, ROWS, KEYS, dtype=torch.bool)
    mask[:, 2] = True
    if kind == "float":
        mask = torch.zeros(mask.shape).masked_fill(mask, MINUS_INF)
    out, weights = module(x, x, x, attn_mask=mask, need_weights=need_weights)
    assert torch.equal(out[:, 2], module.out_proj.bias.expand(BATCH, DIM))
    assert weights is None or not weights[:, 2].any()
    out.sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_padding_holds_reaches_nothing(value: float) -> None:
    module = filled(MultiheadAttention(DIM, HEADS, batch_first=True))
    x, memory = torch.randn(BATCH, ROWS, DIM), torch.randn(BATCH, KEYS, DIM)
    hidden = padding("bool")
    out, _ = module(x, memory, memory, key_padding_mask=hidden, need_weights=False)
    memory[hidden] = value
    again, _ = module(x, memory, memory, key_padding_mask=hidden, need_weights=False)
    assert torch.equal(out, again)


def test_dropout_with_weights_is_torchs() -> None:
    theirs = filled(nn.MultiheadAttention(DIM, HEADS, dropout=0.4))
    ours = replace_modules(copy.deepcopy(theirs))
    x = torch.randn(ROWS, BATCH, DIM)
    results = []
    for module in (ours, theirs):
        torch.manual_seed(5)
        results.append(module(x, x, x, average_attn_weights=False))
    (out, weights), (other_out, other_weights) = results
    assert torch.equal(weights == 0, other_weights == 0) and 0.2 < (weights == 0).float().mean() < 0.6
    torch.testing.assert_close(weights, other_weights)
    torch.testing.assert_close(out, other_out)


def test_dropout_without_weights_drops_weights() -> None:
    """Values of one-hot rows bring the weights into the output."""
    dim, keys = 64, 64
    module = MultiheadAttention(dim, 1, dropout=0.25, batch_first=True, bias=False)
    with torch.no_grad():
        module.in_proj_weight[2 * dim :] = torch.eye(dim)
        module.out_proj.weight.copy_(torch.eye(dim))
    x, value = torch.randn(1, 200, dim), torch.eye(keys)[None]
    key = torch.randn(1, keys, dim)
    dropped, _ = module(x, key, value, need_weights=False)
    whole, _ = module.eval()(x, key, value, need_weights=False)
    kept = dropped != 0
    torch.testing.assert_close(dropped[kept], (whole / 0.75)[kept])
    assert abs(1 - kept.float().mean() - 0.25) < 0.02  # 12,800 draws: five standard deviations
    torch.testing.assert_close(whole.sum(-1), torch.ones(1, 200))


# ------------------------------------------------------------------------------------------------------- layers


LAYERS: dict[str, tuple[type[nn.Module], type[nn.Module]]] = {
    "encoder": (TransformerEncoderLayer, nn.TransformerEncoderLayer),
    "decoder": (TransformerDecoderLayer, nn.TransformerDecoderLayer),
}
#: Smooth activations: the gradient of a relu jumps where rounding moves a number past zero.
LAYER_OPTIONS = {
    "post": dict(batch_first=True, activation="gelu"),
    "pre": dict(norm_first=True, activation="gelu"),
    "own": dict(batch_first=True, activation=F.silu, bias=False, layer_norm_eps=1e-3),
}


def layers(kind: str, **options: Any) -> tuple[nn.Module, nn.Module]:
    ours_class, theirs_class = LAYERS[kind]
    options = dict(dropout=0.0, dim_feedforward=32) | options
    theirs = filled(theirs_class(DIM, HEADS, **options))
    ours = ours_class(DIM, HEADS, **options)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def layer_arguments(kind: str) -> dict[str, Any]:
    prefix = "src" if kind == "encoder" else "tgt"
    given: dict[str, Any] = {f"{prefix}_mask": causal_mask(), f"{prefix}_key_padding_mask": right_padding("bool")}
    given["is_causal" if kind == "encoder" else "tgt_is_causal"] = True
    if kind == "decoder":
        given |= dict(memory_mask=mask_of("float", SQUARE), memory_key_padding_mask=padding("float"))
    return given


@each_dtype
@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
@pytest.mark.parametrize("option", LAYER_OPTIONS)
@pytest.mark.parametrize("kind", LAYERS)
def test_layers(kind: str, option: str, masked: bool, dtype: torch.dtype) -> None:
    ours, theirs = layers(kind, **LAYER_OPTIONS[option])
    shape = (BATCH, ROWS, DIM) if LAYER_OPTIONS[option].get("batch_first") else (ROWS, BATCH, DIM)
    inputs = [torch.randn(shape) for _ in range(1 if kind == "encoder" else 2)]
    assert_like_torch(ours, theirs, inputs, dtype, **(layer_arguments(kind) if masked else {}))


@pytest.mark.parametrize("masked", [False, True], ids=["plain", "padded"])
def test_encoder_layer_in_eval_mode(masked: bool) -> None:
    """Where torch.nn goes past its own attention; at padded rows too."""
    ours, theirs = layers("encoder", batch_first=True)
    x = torch.randn(BATCH, ROWS, DIM)
    given = dict(src_key_padding_mask=padding("bool")) if masked else {}
    with torch.no_grad():
        result, plain, oracle = ours.eval()(x, **given), theirs.eval()(x, **given), theirs.double()(x.double(), **given)
    assert judge(result, oracle, plain).passed


def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the fused functions in the order of their calls."""
    calls: list[str] = []
    for name in ("attention", "attention_varlen"):
        function = getattr(torch_nn, name)

        def call(*args: Any, _function: Any = function, _name: str = name, **options: Any) -> Any:
            calls.append(_name)
            return _function(*args, **options)

        monkeypatch.setattr(torch_nn, name, call)
    return calls


@pytest.mark.parametrize(
    ("padded", "nested", "way"),
    [
        ("right", True, "attention_varlen"),
        ("holes", True, "attention"),
        ("right", False, "attention"),
        (None, True, "attention"),
    ],
)
def test_encoder_in_eval_mode(padded: str | None, nested: bool, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """nn.TransformerEncoder makes nested tensors of padded batches: our layers run them packed."""
    layer = nn.TransformerEncoderLayer(DIM, HEADS, 32, batch_first=True)
    theirs = filled(nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(DIM), enable_nested_tensor=nested)).eval()
    ours = replace_modules(copy.deepcopy(theirs))
    calls = counted(monkeypatch)
    x = torch.randn(BATCH, ROWS, DIM)
    hidden = None if padded is None else torch.zeros(BATCH, ROWS, dtype=torch.bool)
    if hidden is not None:
        hidden[0, -3:] = True
        hidden[1, 2] = padded == "holes"
    with torch.no_grad():
        result, plain = (m(x, src_key_padding_mask=hidden) for m in (ours, theirs))
        oracle = theirs.double()(x.double(), src_key_padding_mask=hidden)
    assert judge(result, oracle, plain).passed
    assert calls == [way] * 2


def test_a_causal_encoder_runs_by_the_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    """nn.TransformerEncoder sees that a mask is causal, and its float form of a padding mask needs no bias."""
    given: list[dict[str, Any]] = []
    fused = torch_nn.attention

    def call(*args: Any, **options: Any) -> Any:
        given.append(options)
        return fused(*args, **options)

    monkeypatch.setattr(torch_nn, "attention", call)
    model = nn.TransformerEncoder(TransformerEncoderLayer(DIM, HEADS, 32, batch_first=True), 1)
    mask = nn.Transformer.generate_square_subsequent_mask(ROWS)
    model(torch.randn(BATCH, ROWS, DIM), mask=mask, src_key_padding_mask=right_padding("bool"))
    (options,) = given
    assert options["bias"] is None and options["window_size"] == (None, 0)
    assert torch.equal(options["key_padding_mask"], ~right_padding("bool"))


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=["strided", "jagged"])
def test_nested_tensors_train(layout: torch.layout) -> None:
    module = filled(MultiheadAttention(DIM, HEADS, batch_first=True))
    sequences = [torch.randn(n, DIM, requires_grad=True) for n in (5, 1, 8)]
    nested = torch.nested.as_nested_tensor(sequences, layout=layout)
    out, weights = module(nested, nested, nested, need_weights=False)
    assert out.is_nested and out.layout == layout and weights is None
    sum((t * t).sum() for t in out.unbind()).backward()
    for sequence, result in zip(sequences, out.unbind(), strict=True):
        alone = sequence.detach().requires_grad_()
        wanted, _ = module(alone, alone, alone, need_weights=False)
        (wanted * wanted).sum().backward()
        torch.testing.assert_close(result, wanted)
        torch.testing.assert_close(sequence.grad, alone.grad)


def test_nested_tensors_with_weights_are_torchs() -> None:
    theirs = filled(nn.MultiheadAttention(DIM, HEADS, batch_first=True)).eval()
    ours = replace_modules(copy.deepcopy(theirs))
    nested = torch.nested.as_nested_tensor([torch.randn(n, DIM) for n in (5, 8)])
    with torch.no_grad():
        (out, weights), (other, other_weights) = (m(nested, nested, nested) for m in (ours, theirs))
    assert torch.equal(out.to_padded_tensor(0.0), other.to_padded_tensor(0.0))
    assert torch.equal(weights, other_weights)


def test_transformer() -> None:
    theirs = filled(nn.Transformer(DIM, HEADS, 2, 2, 32, dropout=0.0, batch_first=True))
    ours = replace_modules(copy.deepcopy(theirs))
    kinds = [type(m) for m in ours.modules()]
    assert [kinds.count(c) for c in (MultiheadAttention, TransformerEncoderLayer, TransformerDecoderLayer)] == [6, 2, 2]
    given = dict(
        tgt_mask=causal_mask(), tgt_is_causal=True, src_key_padding_mask=padding("bool"),
        memory_key_padding_mask=padding("bool"),
    )  # fmt: skip
    inputs = [torch.randn(BATCH, ROWS, DIM) for _ in range(2)]
    assert_whole_like_torch(ours, theirs, inputs, **given)


# ------------------------------------------------------------------------------------------- what a module is to others


class Tied(nn.Module):
    """Modules that share parameters, a subclass, and a quantity that hooks see."""

    class Custom(nn.MultiheadAttention):
        pass

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.MultiheadAttention(DIM, HEADS, dropout=0.1)
        self.second = nn.MultiheadAttention(DIM, HEADS)
        self.second.in_proj_weight = self.first.in_proj_weight
        self.again = self.first
        self.custom = Tied.Custom(DIM, HEADS)


def test_replace_modules_keeps_everything_else() -> None:
    model = Tied().eval()
    model.second.out_proj.weight.requires_grad_(False)
    seen: list[str] = []
    model.first.register_forward_hook(lambda *_: seen.append("hook"))
    before = dict(model.named_parameters(remove_duplicate=False))
    first = model.first
    assert replace_modules(model) is model
    assert model.first is first is model.again and type(first) is MultiheadAttention
    assert type(model.custom) is Tied.Custom
    after = dict(model.named_parameters(remove_duplicate=False))
    assert after.keys() == before.keys() and all(after[name] is before[name] for name in before)
    assert model.first.in_proj_weight is model.second.in_proj_weight
    assert not model.second.out_proj.weight.requires_grad and not model.first.training
    x = torch.randn(ROWS, BATCH, DIM)
    model.first(x, x, x)
    assert seen == ["hook"]

    assert restore_modules(model) is model
    assert type(model.first) is type(model.second) is nn.MultiheadAttention


def test_replace_modules_takes_the_module_itself_and_warns_of_nothing() -> None:
    module = nn.MultiheadAttention(DIM, HEADS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert replace_modules(replace_modules(module)) is module
    with pytest.warns(UserWarning, match=r"Linear has none of nn.MultiheadAttention.*nothing is replaced"):
        replace_modules(nn.Linear(2, 2))


def test_hooks_run_in_eval_mode() -> None:
    layer, _ = layers("encoder", batch_first=True)
    seen: list[str] = []
    layer.self_attn.register_forward_pre_hook(lambda *_: seen.append("hook"))
    with torch.no_grad():
        layer.eval()(torch.randn(BATCH, ROWS, DIM))
    assert seen == ["hook"]


@pytest.mark.parametrize("options", [dict(), dict(kdim=5, vdim=7, add_bias_kv=True), dict(bias=False)], ids=str)
def test_state_dict_both_ways(options: dict[str, Any]) -> None:
    ours, theirs = (c(DIM, HEADS, **options) for c in (MultiheadAttention, nn.MultiheadAttention))
    assert isinstance(ours, nn.MultiheadAttention)
    states = [{name: tuple(t.shape) for name, t in m.state_dict().items()} for m in (ours, theirs)]
    assert states[0] == states[1] and list(states[0]) == list(states[1])
    ours.load_state_dict(filled(theirs).state_dict())
    theirs.load_state_dict(filled(ours).state_dict())


@pytest.mark.parametrize("kind", LAYERS)
def test_copies_and_pickles(kind: str) -> None:
    layer, _ = layers(kind, batch_first=True)
    saved = io.BytesIO()
    torch.save(layer, saved)
    saved.seek(0)
    copies = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(saved, weights_only=False)]
    inputs = [torch.randn(BATCH, ROWS, DIM) for _ in range(1 if kind == "encoder" else 2)]
    wanted = layer(*inputs)
    for other in copies:
        assert type(other) is type(layer) and type(other.self_attn) is MultiheadAttention
        assert torch.equal(other(*inputs), wanted)


@pytest.mark.parametrize("pair", [*LAYERS.values(), (MultiheadAttention, nn.MultiheadAttention)], ids=str)
def test_constructors(pair: tuple[type[nn.Module], type[nn.Module]]) -> None:
    ours, theirs = pair
    assert issubclass(ours, theirs)
    assert inspect.signature(ours) == inspect.signature(theirs)
    module = ours(DIM, HEADS, device="meta", dtype=torch.float16)
    assert {(p.device.type, p.dtype) for p in module.parameters()} == {("meta", torch.float16)}
    assert not any(type(m) in (nn.MultiheadAttention, theirs) for m in module.modules())
    names = [list(inspect.signature(c.forward).parameters) for c in pair]
    assert names[0] == names[1]


# ------------------------------------------------------------------------------------------------ PyTorch's roads


@pytest.mark.parametrize("name", ["self_batch_first", "padding", "padding_float", "mask", "causal", "bias_kv"])
def test_compiles_in_one_graph(name: str) -> None:
    options, given, same = CASES[name]
    module = filled(MultiheadAttention(DIM, HEADS, **options))
    (x,) = inputs_of(options, same)
    arguments = given()

    def call(t: Tensor) -> Tensor:
        return module(t, t, t, need_weights=False, **arguments)[0]

    results = []
    for function in (call, torch.compile(call, backend="aot_eager", fullgraph=True)):
        leaf = x.clone().requires_grad_()
        out = function(leaf)
        (out * out).sum().backward()
        results.append((out.detach(), leaf.grad))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager)


@pytest.mark.parametrize("kind", LAYERS)
def test_layers_compile_in_one_graph(kind: str) -> None:
    layer, _ = layers(kind, batch_first=True)
    inputs = [torch.randn(BATCH, ROWS, DIM) for _ in range(1 if kind == "encoder" else 2)]
    given = layer_arguments(kind)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*inputs, **given), layer(*inputs, **given))


def test_autocast() -> None:
    theirs = filled(nn.MultiheadAttention(DIM, HEADS, batch_first=True))
    ours = replace_modules(copy.deepcopy(theirs))
    x = torch.randn(BATCH, ROWS, DIM)
    given = dict(need_weights=False, attn_mask=mask_of("float", SQUARE), key_padding_mask=padding("bool"))
    with torch.autocast("cpu", torch.bfloat16):
        (result, _), (plain, _) = (m(x, x, x, **given) for m in (ours, theirs))
    oracle, _ = theirs.double()(*[x.double()] * 3, **{n: in_dtype(t, torch.float64) for n, t in given.items()})
    assert result.dtype == plain.dtype == torch.bfloat16
    assert judge(result, oracle, plain).passed


OTHER_MASKS = {"attn_mask": torch.zeros(SQUARE), "key_padding_mask": torch.zeros(BATCH, KEYS)}


@pytest.mark.parametrize("need_weights", [False, True], ids=["fast", "weights"])
@pytest.mark.parametrize("name", OTHER_MASKS)
def test_dtypes_of_masks(name: str, need_weights: bool) -> None:
    """One rule with weights and without: bool, float32 or the query's; under autocast any floating one."""
    for own in (torch.float32, torch.bfloat16, torch.float64):
        module, x = MultiheadAttention(DIM, HEADS, dtype=own), torch.randn(ROWS, BATCH, DIM, dtype=own)
        for other in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            mask = {name: OTHER_MASKS[name].to(other)}
            if other in (own, torch.float32):
                module(x, x, x, need_weights=need_weights, **mask)
                continue
            words = [str(d).removeprefix("torch.") for d in dict.fromkeys((other, torch.bool, torch.float32, own))]
            with pytest.raises(TypeError, match=f"^{name} has dtype {words[0]}; allowed: {', '.join(words[1:])}$"):
                module(x, x, x, need_weights=need_weights, **mask)
            if own != torch.float64:  # which autocast leaves alone
                with torch.autocast("cpu", torch.bfloat16):
                    module(x, x, x, need_weights=need_weights, **mask)


def test_a_causal_mask_that_is_not_read_may_have_any_floating_dtype() -> None:
    x, mask = torch.randn(BATCH, ROWS, DIM), nn.Transformer.generate_square_subsequent_mask(ROWS, dtype=torch.float64)
    theirs = nn.MultiheadAttention(DIM, HEADS, batch_first=True)
    ours = replace_modules(copy.deepcopy(theirs))
    results = [m(x, x, x, need_weights=False, attn_mask=mask, is_causal=True)[0] for m in (ours, theirs)]
    torch.testing.assert_close(*results)


def test_vmap_over_a_batch_of_paddings() -> None:
    module = filled(MultiheadAttention(DIM, HEADS, batch_first=True)).eval()
    x, masks = torch.randn(3, BATCH, ROWS, DIM), torch.stack([padding("float"), padding("finite"), torch.zeros(2, 9)])

    def call(t: Tensor, mask: Tensor) -> Tensor:
        return module(t, t, t, key_padding_mask=mask, need_weights=False)[0]

    with torch.no_grad():
        wanted = torch.stack([call(t, m) for t, m in zip(x, masks, strict=True)])
        torch.testing.assert_close(torch.vmap(call)(x, masks), wanted)


def test_a_learnt_padding_mask_takes_gradient() -> None:
    theirs = filled(nn.MultiheadAttention(DIM, HEADS, batch_first=True))
    ours = replace_modules(copy.deepcopy(theirs))
    x, grads = torch.randn(BATCH, ROWS, DIM), []
    for module in (ours, theirs):
        mask = torch.zeros(BATCH, KEYS, requires_grad=True)
        F.mse_loss(module(x, x, x, key_padding_mask=mask, need_weights=False)[0], x).backward()
        grads.append(mask.grad)
    torch.testing.assert_close(*grads)
    assert grads[0].abs().max() > 0


# ---------------------------------------------------------------------------------------------------------- errors

X, XB = torch.zeros(ROWS, BATCH, DIM), torch.zeros(ROWS, DIM)
WRONG: dict[str, tuple[tuple[Tensor, ...], dict[str, Any], type[Exception], str]] = {
    "dims": ((X, X, XB), {}, ValueError, "3, 3 and 2 dimensions; allowed: 3 each"),
    "one_dim": ((X[0, 0],) * 3, {}, ValueError, "1, 1 and 1 dimensions"),
    "features": ((X, X[..., :7], X), {}, ValueError, r"key has shape \(9, 2, 7\); allowed: a last dimension of 24"),
    "batch": ((X, X[:, :1], X[:, :1]), {}, ValueError, "allowed: one batch size"),
    "values": ((X, X, X[:4]), {}, ValueError, "as many values as keys"),
    "padding": (
        (X, X, X), dict(key_padding_mask=torch.zeros(9, 2, dtype=torch.bool)), ValueError,
        r"key_padding_mask has shape \(9, 2\); allowed: \(2, 9\)",
    ),
    "padding_no_batch": (
        (XB, XB, XB), dict(key_padding_mask=torch.zeros(1, 9, dtype=torch.bool)), ValueError, r"allowed: \(9,\)",
    ),
    "padding_int": (
        (X, X, X), dict(key_padding_mask=torch.zeros(2, 9, dtype=torch.long)), TypeError,
        "key_padding_mask has dtype int64; allowed: bool, float32$",
    ),
    "mask": (
        (X, X, X), dict(attn_mask=torch.zeros(4, 9, 9)), ValueError,
        r"attn_mask has shape \(4, 9, 9\); allowed: \(9, 9\) or \(8, 9, 9\)",
    ),
    "mask_int": ((X, X, X), dict(attn_mask=torch.zeros(9, 9).byte()), TypeError, "attn_mask has dtype uint8"),
    "mask_int_causal": (
        (X, X, X), dict(attn_mask=torch.zeros(9, 9).byte(), is_causal=True, need_weights=False), TypeError,
        "attn_mask has dtype uint8; allowed: bool, float32, floating",
    ),
    "mask_list": ((X, X, X), dict(attn_mask=[[0.0]]), TypeError, "attn_mask is of type list; allowed: a torch.Tensor"),
    "causal": ((X, X, X), dict(is_causal=True), ValueError, "is_causal is True and attn_mask None"),
    "nested": (
        (torch.nested.as_nested_tensor([XB, XB], layout=torch.jagged), X, X), dict(need_weights=False), ValueError,
        "allowed: all or none",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments(name: str) -> None:
    tensors, given, error, message = WRONG[name]
    with pytest.raises(error, match=message):
        MultiheadAttention(DIM, HEADS)(*tensors, **given)
