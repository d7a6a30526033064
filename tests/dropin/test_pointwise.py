"""Fused norms, gates, activations and loss: the same outputs and gradients, and only what computes just that."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
import transformers
from dropin.promised import PROMISED
from torch import Tensor, nn
from transformers.loss.loss_utils import ForCausalLMLoss

from transformer_fast import pointwise
from transformer_fast.backends import cpu_linear
from transformer_fast.dropin import (
    fuse_pointwise,
    pack_linears,
    skip_padding,
    unfuse_pointwise,
    unpack_linears,
)
from transformer_fast.dropin.pointwise import _is_fused, _is_rotary, _rotary, _Rotates

SMALL: dict[str, Any] = dict(
    hidden_size=40, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=10,
    intermediate_size=72, vocab_size=120, pad_token_id=0, max_position_embeddings=64,
)  # fmt: skip
GPT2: dict[str, Any] = dict(n_layer=2, n_embd=40, n_head=4, vocab_size=120, bos_token_id=1, eos_token_id=2)
#: The configuration, and how many modules of each layer, and of the model, are taken over.
MODELS: dict[str, tuple[str, dict[str, Any], int, int]] = {
    "Llama": ("LlamaConfig", SMALL, 4, 1),
    "Mistral": ("MistralConfig", SMALL | {"sliding_window": 5}, 4, 1),
    "Qwen3": ("Qwen3Config", SMALL, 6, 1),  # norms of queries and keys too
    "Gemma": ("GemmaConfig", SMALL | {"hidden_act": "gelu_pytorch_tanh"}, 4, 1),
    "Gemma 2": ("Gemma2Config", SMALL | {"query_pre_attn_scalar": 10}, 6, 1),
    "GPT-2": ("GPT2Config", GPT2, 1, 0),
}


def build(name: str, dtype: torch.dtype = torch.float32) -> Any:
    config, settings, _, _ = MODELS[name]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, config)(**settings), dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2)
    model.config.loss_type = "ForCausalLM"
    return model.eval()


def fused(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if _is_fused(module)]


def ids() -> Tensor:
    return torch.randint(1, 120, (3, 13), generator=torch.Generator().manual_seed(1))


def gradients(model: Any, labels: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss = model(ids(), labels=labels, use_cache=False).loss
    loss.backward()
    return {"loss": loss.detach()} | {name: p.grad.clone() for name, p in model.named_parameters()}


def assert_same(found: Tensor, expected: Tensor) -> None:
    assert found.dtype == expected.dtype
    assert (found - expected).abs().max() <= PROMISED * expected.abs().max()


@pytest.mark.parametrize("name", MODELS)
def test_models(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pointwise, "_FEW", 0)
    model, labels = build(name), ids()
    labels[:, -3:] = -100
    with torch.no_grad():
        expected = model(ids()).logits
    wanted = gradients(model, labels)
    assert fuse_pointwise(model) is model
    _, _, per_layer, others = MODELS[name]
    assert len(fused(model)) == 2 * per_layer + others
    with torch.no_grad():
        assert_same(model(ids()).logits, expected)
    for key, value in gradients(model, labels).items():
        assert_same(value, wanted[key])
    fuse_pointwise(model)  # again: nothing happens
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert len(fused(other)) == len(fused(model))
        with torch.no_grad():
            assert_same(other(ids()).logits, expected)
    assert unfuse_pointwise(model) is model
    assert not fused(model)
    assert model.loss_function is ForCausalLMLoss
    with torch.no_grad():
        assert torch.equal(model(ids()).logits, expected)


@torch.no_grad()
def test_bfloat16_is_no_worse(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounded once where the model rounds twice."""
    monkeypatch.setattr(pointwise, "_FEW", 0)
    model = build("Llama", torch.bfloat16)
    exact = copy.deepcopy(model).double()(ids()).logits
    theirs = (model(ids()).logits - exact).square().mean()
    assert len(fused(fuse_pointwise(model))) == 9
    assert (model(ids()).logits - exact).square().mean() <= 1.1 * theirs


@torch.no_grad()
def test_padding_may_be_skipped_too() -> None:
    model, mask = build("Llama"), torch.ones(3, 13, dtype=torch.long)
    mask[1, 9:] = 0
    expected = model(ids(), attention_mask=mask, use_cache=False).logits[mask.bool()]
    fuse_pointwise(skip_padding(model))
    assert_same(model(ids(), attention_mask=mask, use_cache=False).logits[mask.bool()], expected)


class ShiftedRMSNorm(nn.Module):
    """Has the parts of a norm, and computes something else."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(8)), 1e-6

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.rms_norm(x, (8,), self.weight, self.eps) + 0.01


class TwoInputsRMSNorm(ShiftedRMSNorm):
    def forward(self, x: Tensor, gate: Tensor) -> Tensor:  # type: ignore[override]
        return x * gate


class WithoutEpsRMSNorm(ShiftedRMSNorm):
    def __init__(self) -> None:
        super().__init__()
        del self.eps

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.rms_norm(x, (8,), self.weight)


class ZeroRMSNorm(ShiftedRMSNorm):
    """Whose gain tells nothing yet."""

    def __init__(self) -> None:
        super().__init__()
        nn.init.zeros_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.rms_norm(x, (8,), self.weight, self.eps)


class ReluMLP(nn.Module):
    activation = staticmethod(torch.relu)

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(8, 9), nn.Linear(8, 9), nn.Linear(9, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))


class QuickGeluMLP(ReluMLP):
    activation = staticmethod(lambda x: x * torch.sigmoid(1.702 * x))


class ExactGeluMLP(ReluMLP):
    activation = staticmethod(nn.functional.gelu)


class BrokenMLP(ReluMLP):
    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("not on a CPU")


class ZeroMLP(ReluMLP):
    activation = staticmethod(nn.functional.silu)

    def __init__(self) -> None:
        super().__init__()
        nn.init.zeros_(self.down_proj.weight)
        nn.init.zeros_(self.down_proj.bias)


class VAE(nn.Module):
    def loss_function(self, x: Tensor) -> Tensor:
        return x


OTHERS = (
    ShiftedRMSNorm, TwoInputsRMSNorm, WithoutEpsRMSNorm, ZeroRMSNorm, ReluMLP, QuickGeluMLP, ExactGeluMLP, BrokenMLP,
    ZeroMLP, VAE,
)  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", OTHERS)
def test_what_computes_something_else_is_left_alone(kind: type[nn.Module], dtype: torch.dtype) -> None:
    model = nn.Sequential(kind()).to(dtype)
    with pytest.warns(UserWarning, match="Sequential has nothing on a CPU that is known; nothing is fused"):
        fuse_pointwise(model)
    assert type(model[0]) is kind
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        unfuse_pointwise(model)


class DroppingMLP(ReluMLP):
    activation = staticmethod(nn.functional.silu)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(super().forward(x), 0.5, self.training)


def test_dropout_is_kept_in_training() -> None:
    model = fuse_pointwise(nn.Sequential(DroppingMLP()).eval())
    assert len(fused(model)) == 1
    x = torch.randn(50, 8)
    assert (model.train()(x) == 0).float().mean() > 0.3
    with torch.no_grad():
        assert (model(x) == 0).float().mean() > 0.3
        assert not (model.eval()(x) == 0).any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_type_of_its_own_does_not_mislead(dtype: torch.dtype) -> None:
    """Gemma's norms add one to the gain, also where the kernel does not take the model's type."""
    model = build("Gemma 2").to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.warns(UserWarning, match="nothing is fused"):
        fuse_pointwise(model.model)
    fuse_pointwise(model)
    assert len(fused(model)) == 13
    with torch.no_grad():
        assert_same(model.float()(ids()).logits, unfuse_pointwise(copy.deepcopy(model))(ids()).logits)


def test_arguments_by_name() -> None:
    model = fuse_pointwise(build("Llama"))
    x = torch.randn(3, 40)
    with torch.no_grad():
        assert torch.equal(model.model.norm(hidden_states=x), model.model.norm(x))


def test_other_devices_are_left_alone() -> None:
    with pytest.warns(UserWarning, match="nothing is fused"):
        fuse_pointwise(build("Llama").model.to("meta"))


def test_hooks_see_calls_and_no_trial() -> None:
    model, seen = build("Llama"), []
    for module in model.modules():
        if type(module).__name__ in ("LlamaRMSNorm", "LlamaMLP", "LlamaAttention"):
            module.register_forward_hook(lambda *_: seen.append(1))
    fuse_pointwise(model)
    assert not seen
    assert len(fused(model)) == 9
    model(ids())
    assert len(seen) == 9


def turned(model: nn.Module) -> list[nn.Module]:
    return [module for module in fused(model) if isinstance(module, _Rotates)]


@pytest.fixture
def rotations(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of tokens of each call of the kernel."""
    calls: list[int] = []

    def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        calls.append(len(x))
        return ROTATE(x, cos, sin)

    monkeypatch.setattr(pointwise, "rotate", rotate)
    return calls


ROTATE = pointwise.rotate


@torch.no_grad()
def test_rotary_positions(rotations: list[int]) -> None:
    """Shared by a batch, its own for each sequence, and continued behind a cache."""
    model = build("Llama")
    mask = torch.ones(3, 13, dtype=torch.long)
    mask[1, :5] = 0
    asked: dict[str, Any] = dict(attention_mask=mask, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    positions = ids() % 11
    expected = [model(ids()).logits, model(ids(), position_ids=positions).logits, model.generate(ids(), **asked)]
    assert len(turned(fuse_pointwise(model))) == 2
    assert not rotations
    assert_same(model(ids()).logits, expected[0])
    assert_same(model(ids(), position_ids=positions).logits, expected[1])
    assert rotations == [39] * 8  # queries and keys of two layers, each time
    assert torch.equal(model.generate(ids(), **asked), expected[2])
    assert rotations[-4:] == [3] * 4


@torch.no_grad()
@pytest.mark.parametrize("change", ["halves", "dtype", "interleaved", "float64"])
def test_angles_of_another_kind_stay_with_the_model(rotations: list[int], change: str) -> None:
    model = build("Llama")
    if change == "float64":
        model.double()
    inner = model.model.rotary_emb.forward

    def angles(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        cos, sin = inner(*args, **kwargs)
        if change == "halves":
            cos = cos + torch.arange(cos.shape[-1])
        if change == "dtype":
            cos, sin = cos.double(), sin.double()
        if change == "interleaved":
            cos = cos.repeat_interleave(2, dim=-1)[..., ::2][..., torch.randperm(cos.shape[-1])]
        return cos, sin

    if change != "float64":
        model.model.rotary_emb.forward = angles
    torch.manual_seed(0)
    expected = None if change == "dtype" else model(ids()).logits
    assert len(turned(fuse_pointwise(model))) == 2
    torch.manual_seed(0)
    if expected is None:
        with pytest.raises(RuntimeError):  # of the two types, as without us
            model(ids())
    else:
        assert_same(model(ids()).logits, expected)
    assert not rotations


def test_the_file_of_the_model_stays_as_it_is() -> None:
    from transformers.models.llama import modeling_llama

    before = dict(vars(modeling_llama))
    model, other = fuse_pointwise(build("Llama")), build("Llama")
    model(ids())
    assert vars(modeling_llama) == before
    assert not turned(other)


def test_rotary_of_another_form_is_left_alone() -> None:
    """GPT-J turns neighbours, GLM a part of neighbours, Cohere too: their files have functions of their own."""
    settings = dict(vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=40)
    for name in ("Cohere", "Glm"):
        config = getattr(transformers, f"{name}Config")(**settings, num_key_value_heads=2, head_dim=8, pad_token_id=0)
        assert not turned(fuse_pointwise(transformers.AutoModelForCausalLM.from_config(config))), name


def test_compiled_rotation() -> None:
    model = fuse_pointwise(build("Llama"))
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        assert_same(compiled(ids(), use_cache=False).logits, model(ids(), use_cache=False).logits)


@pytest.fixture
def products(every_product_is_packed: None, monkeypatch: pytest.MonkeyPatch) -> list[str | None]:
    """What follows each packed product; every product is packed."""
    calls: list[str | None] = []

    def multiply(x: Any, layer: Any, residual: Any) -> Tensor:
        calls.append(layer.activation)
        return MULTIPLY(x, layer, residual)

    monkeypatch.setattr(cpu_linear, "multiply", multiply)
    return calls


MULTIPLY = cpu_linear.multiply


@torch.no_grad()
@pytest.mark.parametrize("order", [(fuse_pointwise, pack_linears), (pack_linears, fuse_pointwise)])
@pytest.mark.parametrize(("name", "gate"), [("Llama", "swiglu"), ("Gemma", "geglu_tanh")])
def test_gates_of_packed_layers(name: str, gate: str, order: Any, products: list[str | None]) -> None:
    """Are one product; a hook on a layer is heard all the same."""
    model = build(name)
    expected = model(ids()).logits
    for change in order:
        change(model)
    products.clear()  # those of trials
    assert_same(model(ids()).logits, expected)
    assert products == [None, None, None, None, gate, None] * 2 + [None]
    heard: list[int] = []
    products.clear()
    model.model.layers[0].mlp.up_proj.register_forward_hook(lambda *_: heard.append(1))
    assert_same(model(ids()).logits, expected)
    assert heard == [1]
    assert products.count(gate) == 1
    model.model.layers[1].mlp.up_proj.weight.mul_(2.0)
    unpacked = unpack_linears(copy.deepcopy(model))
    assert_same(model(ids()).logits, unpacked(ids()).logits)
    assert (model(ids()).logits - expected).abs().max() > 0.01


BERTS: dict[str, str | None] = {"gelu": "gelu", "gelu_new": "gelu_tanh", "relu": "relu", "tanh": None}


@torch.no_grad()
@pytest.mark.parametrize("activation", BERTS)
def test_dense_layers_and_their_activation(activation: str, products: list[str | None]) -> None:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=40, num_hidden_layers=2, num_attention_heads=4, intermediate_size=72, vocab_size=120,
        hidden_act=activation,
    )  # fmt: skip
    model = transformers.AutoModel.from_config(config).eval()
    expected = model(ids()).last_hidden_state
    wanted = BERTS[activation]
    if wanted is None:
        with pytest.warns(UserWarning, match="nothing is fused"):
            fuse_pointwise(model)
    else:
        fuse_pointwise(model)
        assert_same(model(ids()).last_hidden_state, expected)
        assert not products
    pack_linears(model)
    assert_same(model(ids()).last_hidden_state, expected)
    assert products.count(wanted) == (2 if wanted else 13)
    with torch.enable_grad():
        products.clear()
        model.train()(ids()).last_hidden_state.sum().backward()
        assert not products
        assert all(p.grad is not None for p in model.encoder.parameters())


@torch.no_grad()
def test_a_forward_put_on_a_layer_is_called(products: list[str | None]) -> None:
    """As accelerate's hooks do, which bring weights from elsewhere first."""
    model, calls = pack_linears(fuse_pointwise(build("Llama"))), []
    expected = model(ids()).logits
    layer = model.model.layers[0].mlp.gate_proj
    inner = layer.forward
    layer.forward = lambda x: calls.append(1) or inner(x)
    assert_same(model(ids()).logits, expected)
    assert calls == [1]


@torch.no_grad()
def test_an_activation_that_was_not_tried(products: list[str | None]) -> None:
    """One that is cut off where few numbers come, one that is put there later, and one that somebody listens to."""
    config = transformers.BertConfig(
        hidden_size=40, num_hidden_layers=2, num_attention_heads=4, intermediate_size=72, vocab_size=120,
        hidden_act="gelu_10",
    )  # fmt: skip
    with pytest.warns(UserWarning, match="nothing is fused"):
        fuse_pointwise(transformers.AutoModel.from_config(config).eval())
    config.hidden_act = "gelu"
    model = transformers.AutoModel.from_config(config).eval()
    pack_linears(fuse_pointwise(model))
    heard: list[int] = []
    first, second = (layer.intermediate for layer in model.encoder.layer)
    first.intermediate_act_fn = nn.ReLU()
    second.intermediate_act_fn.register_forward_hook(lambda *_: heard.append(1))
    products.clear()
    found = model(ids()).last_hidden_state
    assert "gelu" not in products
    assert heard == [1]
    plain = unpack_linears(unfuse_pointwise(copy.deepcopy(model)))
    assert "_tried" not in vars(plain.encoder.layer[0].intermediate)
    assert_same(found, plain(ids()).last_hidden_state)


def llama_with(monkeypatch: pytest.MonkeyPatch, **names: Any) -> Any:
    """A fused model, of whose file these names are changed afterwards."""
    from transformers.models.llama import modeling_llama

    model = fuse_pointwise(build("Llama"))
    for name, value in names.items():
        monkeypatch.setattr(modeling_llama, name, value)
    return model


@torch.no_grad()
def test_later_changes_to_the_models_file_are_seen(monkeypatch: pytest.MonkeyPatch, rotations: list[int]) -> None:
    expected = build("Llama")(ids()).logits
    model = llama_with(monkeypatch, apply_rotary_pos_emb=lambda q, k, cos, sin: (q, k))
    found = model(ids()).logits
    assert (found - expected).abs().max() > 1e-3
    assert 39 not in rotations
    monkeypatch.undo()
    model = llama_with(monkeypatch, eager_attention_forward=lambda m, q, k, v, *_, **__: (0 * q.transpose(1, 2), None))
    model.set_attn_implementation("eager")
    assert (model(ids()).logits - expected).abs().max() > 1e-3


@torch.no_grad()
def test_another_forward_of_the_class(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama.modeling_llama import LlamaAttention

    model = fuse_pointwise(build("Llama"))
    monkeypatch.setattr(LlamaAttention, "forward", lambda self, hidden_states, **_: (2 * hidden_states, None))
    found = model(ids()).logits
    assert_same(found, unfuse_pointwise(copy.deepcopy(model))(ids()).logits)


@torch.no_grad()
def test_a_rotary_function_with_names_of_its_own() -> None:
    def apply_rotary_pos_emb(
        q: Tensor, key: Any = None, cos: Any = None, sin: Any = None, unsqueeze_dim: int = 1
    ) -> Any:
        cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
        turn = [torch.cat((-x.chunk(2, -1)[1], x.chunk(2, -1)[0]), -1) for x in (q,) if x is not None]
        out = q * cos + turn[0] * sin
        return (
            out if key is None else (out, key * cos + torch.cat((-key.chunk(2, -1)[1], key.chunk(2, -1)[0]), -1) * sin)
        )

    assert _is_rotary(apply_rotary_pos_emb)
    q, angles = torch.randn(1, 2, 3, 8), torch.randn(1, 3, 4).repeat(1, 1, 2)
    named = {"cos": angles.cos(), "sin": angles.sin()}
    torch.testing.assert_close(_rotary(apply_rotary_pos_emb)(q, **named), apply_rotary_pos_emb(q, **named))
    q, k = torch.randn(1, 3, 2, 8), torch.randn(1, 3, 2, 8)
    found = _rotary(apply_rotary_pos_emb)(q, key=k, **named, unsqueeze_dim=2)
    torch.testing.assert_close(found, apply_rotary_pos_emb(q, key=k, **named, unsqueeze_dim=2))


def test_the_default_type_does_not_decide() -> None:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    _is_rotary.cache_clear()
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert _is_rotary(apply_rotary_pos_emb)
    finally:
        torch.set_default_dtype(torch.float32)
        _is_rotary.cache_clear()


def test_angles_that_change_uncounted(rotations: list[int]) -> None:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    with torch.inference_mode():
        q, k, cos = torch.randn(1, 2, 3, 8), torch.randn(1, 2, 3, 8), torch.randn(1, 3, 4).repeat(1, 1, 2)
        for _ in range(2):
            found = _rotary(apply_rotary_pos_emb)(q, k, cos, cos)
            torch.testing.assert_close(found, apply_rotary_pos_emb(q, k, cos, cos))
            cos.copy_(torch.randn(1, 3, 8))
    assert len(rotations) == 2
