"""Packed linear layers: the same products, whatever happens to the weights, and PyTorch's own wherever asked for."""

from __future__ import annotations

import copy
import pickle
import time
import weakref
from collections.abc import Callable
from typing import Any

import cpu_targets
import pytest
import torch
import transformers
from dropin.promised import PROMISED
from torch import Tensor, nn

from transformer_fast import models
from transformer_fast.backends import cpu_linear
from transformer_fast.backends.cpu import TYPES, force_isa
from transformer_fast.dropin import linears, pack_linears, trial, unpack_linears
from transformer_fast.linear import linear
from transformer_fast.testing import judge

IN, OUT = 384, 352  # as many elements as are worth it, neither a power of two


#: These are tests of results, whatever this machine would find. The finding is tested by itself below.
pytestmark = pytest.mark.usefixtures("every_product_is_quicker")


def packed_weight(module: nn.Module) -> Tensor | None:
    product = vars(module).get("product")
    return None if product is None or product.found is None else product.found.packed


def layer(dtype: torch.dtype = torch.float32, bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(IN, OUT, bias=bias, dtype=dtype).eval()


def rows(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, IN, generator=torch.Generator().manual_seed(1)).to(dtype)


def assert_right(module: nn.Linear, x: Tensor) -> None:
    """Against float64, no worse than PyTorch's own product in the same dtype by the tolerance rule."""
    bias = None if module.bias is None else module.bias.double()
    oracle = nn.functional.linear(x.double(), module.weight.double(), bias)
    baseline = nn.functional.linear(x, module.weight, module.bias)
    found = module(x)
    assert found.shape == baseline.shape
    assert found.dtype == baseline.dtype
    verdict = judge(found, oracle, baseline)
    assert verdict.passed, verdict


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1,), (7,), (600,), (2, 5), (1, 1, 3)])
@pytest.mark.parametrize("dtype", sorted(TYPES, key=str))
@torch.no_grad()
def test_products(dtype: torch.dtype, shape: tuple[int, ...], bias: bool) -> None:
    module = pack_linears(layer(dtype, bias))
    assert_right(module, rows(*shape, dtype=dtype))
    assert packed_weight(module) is not None


@torch.no_grad()
def test_rows_of_any_strides() -> None:
    module = pack_linears(layer())
    assert_right(module, rows(6, 4).transpose(0, 1))
    assert_right(module, rows(12)[::3])
    assert_right(module, torch.randn(IN, 5).t())
    assert_right(module, rows(1).expand(9, IN))
    assert module(rows(0)).shape == (0, OUT)
    assert module(rows()).shape == (OUT,)


def change_in_place(module: nn.Linear) -> None:
    module.weight.mul_(-2.0)


def change_bias(module: nn.Linear) -> None:
    module.bias.add_(3.0)


def load(module: nn.Linear) -> None:
    module.load_state_dict({name: t + 1.0 for name, t in module.state_dict().items()})


def assign(module: nn.Linear) -> None:
    module.load_state_dict({name: t + 1.0 for name, t in module.state_dict().items()}, assign=True)


def replace(module: nn.Linear) -> None:
    module.weight = nn.Parameter(torch.randn(OUT, IN))


def replace_data(module: nn.Linear) -> None:
    module.weight.data = torch.randn(OUT, IN)


def through_data_and_again(module: nn.Linear) -> None:
    module.weight.data.mul_(3.0)  # which PyTorch does not count
    pack_linears(module)


def through_data_in_training(module: nn.Linear) -> None:
    with torch.enable_grad():
        module(rows(2)).sum().backward()
    module.weight.data.mul_(3.0)
    module.zero_grad()


def move_away_and_back(module: nn.Linear) -> None:
    """Memory that is free may be given out again: addresses are no proof."""
    for _ in range(6):
        module.weight.data = torch.empty(OUT, IN)
        module.weight.data = torch.randn(OUT, IN)
        module(rows(5))
        module.weight.data = torch.randn(OUT, IN)


def train(module: nn.Linear) -> None:
    with torch.enable_grad():
        optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
        module(rows(4)).square().sum().backward()
        optimizer.step()


def train_uncounted(module: nn.Linear) -> None:
    """A fused optimizer's step is not counted; neither what is multiplied before it, with gradients at hand."""
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.5, fused=True)
    for _ in range(2):
        with torch.enable_grad():
            module(rows(4)).square().sum().backward()
        module(rows(5))
        optimizer.step()
        module(rows(5))
        optimizer.zero_grad()
        module(rows(5))


CHANGES = (change_in_place, change_bias, load, assign, replace, replace_data, move_away_and_back, train)


@pytest.mark.parametrize(
    "change", [*CHANGES, train_uncounted, through_data_and_again, through_data_in_training], ids=lambda f: f.__name__
)
@torch.no_grad()
def test_changed_weights_are_laid_out_again(change: Callable[[nn.Linear], None]) -> None:
    module, x = pack_linears(layer()), rows(5)
    before = module(x)
    change(module)
    assert (module(x) - before).abs().max() > 0.1
    assert_right(module, x)


@torch.no_grad()
def test_columns_that_a_fused_optimizer_changes() -> None:
    module = pack_linears(transformers.pytorch_utils.Conv1D(OUT, IN))
    optimizer, x = torch.optim.SGD(module.parameters(), lr=1.0, fused=True), rows(5)
    module(x)
    with torch.enable_grad():
        module(x).square().sum().backward()
    module(x)
    optimizer.step()
    optimizer.zero_grad()
    found, expected = module(x), x.double() @ module.weight.double() + module.bias.double()
    assert judge(found, expected, x @ module.weight + module.bias).passed


@pytest.mark.parametrize("slow", ["pair", "layers", None])
@torch.no_grad()
def test_two_layers_of_many_rows(product: linears.PackedProduct, monkeypatch: pytest.MonkeyPatch, slow: Any) -> None:
    """Are one call if that is quicker; with what it cannot add, and of few rows, they are two."""
    monkeypatch.setattr(linears, "_ROWS_OF_PAIRS", 20)
    torch.set_num_threads(1)
    pairs: list[int] = []
    twice = cpu_linear.multiply_twice
    monkeypatch.setattr(cpu_linear, "multiply_twice", lambda x, *rest: pairs.append(x.rows) or twice(x, *rest))
    if slow is not None:  # the first answer is the pair's
        answers = iter([slow == "layers", *[slow == "pair"] * 9])
        monkeypatch.setattr(linears, "is_quicker", lambda *_: next(answers))
    up, down, other = layer(), nn.Linear(OUT, IN).eval(), linears.PackedProduct()

    def run(x: Tensor, residual: Tensor | None) -> None:
        first = linears.product_of(up.weight, up.bias, "gelu")
        second = linears.product_of(down.weight, down.bias, None, residual)
        found = product.then(x, first, other, second)
        wide = [None if t is None else t.double() for t in (x, up.weight, up.bias, down.weight, down.bias, residual)]
        between = linear(*wide[:3], "gelu")
        baseline = linear(linear(x, up.weight, up.bias, "gelu"), down.weight, down.bias, None, residual)
        verdict = judge(found, linear(between, *wide[3:5], None, wide[5]), baseline)
        assert verdict.passed, verdict

    for _ in range(2):
        run(rows(4, 5), rows(4, 5))
    assert pairs == ([] if slow == "pair" else [20, 20])
    with monkeypatch.context() as once:  # whatever was found, no weight is laid out a second time
        once.setattr(cpu_linear, "lay_out", lambda *_: pytest.fail("laid out again"))
        run(rows(4, 5), rows(4, 5))
    pairs.clear()
    down.weight.mul_(-1.0)
    run(rows(4, 5), None)
    pairs.clear()
    run(rows(19), rows(19))
    run(rows(4, 5), rows(1, 5))  # is broadcast
    run(rows(4, 5), rows(4, 5).double())
    assert not pairs
    with torch.enable_grad():
        first, second = linears.product_of(up.weight, up.bias, "gelu"), linears.product_of(down.weight, down.bias)
        product.then(rows(20), first, other, second).sum().backward()
    assert up.weight.grad is not None
    assert down.weight.grad is not None
    assert not pairs


@torch.no_grad()
def test_a_gates_value_alone_is_trained(product: linears.PackedProduct) -> None:
    gate, up, x = layer().requires_grad_(False), layer(), rows(5)
    optimizer = torch.optim.SGD(up.parameters(), lr=1.0, fused=True)

    def gated() -> Tensor:
        return product(x, gate.weight, gate.bias, "swiglu", value=(up.weight, up.bias))

    gated()
    with torch.enable_grad():
        (nn.functional.silu(gate(x)) * up(x)).square().sum().backward()
    gated()
    optimizer.step()
    optimizer.zero_grad()
    both = torch.cat((gate.weight, up.weight)), torch.cat((gate.bias, up.bias))
    assert judge(gated(), exact(x, *both, "swiglu", None), linear(x, *both, "swiglu")).passed


@torch.no_grad()
def test_other_dtype() -> None:
    module = pack_linears(layer())
    module(rows(5))
    module.to(torch.bfloat16)
    assert_right(module, rows(5, dtype=torch.bfloat16))
    module.to(torch.float64)
    assert_right(module, rows(5, dtype=torch.float64))


def test_gradients_are_pytorchs() -> None:
    plain, module, x = layer(), pack_linears(layer()), rows(5).requires_grad_()
    expected = torch.autograd.grad(plain(x).square().sum(), [x, plain.weight, plain.bias])
    found = torch.autograd.grad(module(x).square().sum(), [x, module.weight, module.bias])
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert packed_weight(module) is None


def test_frozen_weights_under_a_trained_input() -> None:
    module, x = pack_linears(layer()).requires_grad_(False), rows(5).requires_grad_()
    module(x).sum().backward()
    torch.testing.assert_close(x.grad, module.weight.sum(0).expand(5, IN))
    with torch.no_grad():
        assert_right(module, x)


def test_a_trained_bias_alone_gets_its_gradient() -> None:
    module = pack_linears(layer())
    module.weight.requires_grad_(False)
    module(rows(5)).sum().backward()
    assert torch.equal(module.bias.grad, torch.full((OUT,), 5.0))


@torch.no_grad()
def test_autocast() -> None:
    plain, module, x = layer(), pack_linears(layer()), rows(5)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(module(x), plain(x))


@torch.no_grad()
def test_vmap_and_modes() -> None:
    module, x = pack_linears(layer()), rows(4, 3)
    torch.testing.assert_close(torch.func.vmap(module)(x), module(x))
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True):
        assert module(torch.empty(3, IN)).shape == (3, OUT)


@torch.no_grad()
def test_compiled() -> None:
    module = pack_linears(layer())
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(rows(5)), layer()(rows(5)))


def test_inference_mode() -> None:
    module = pack_linears(layer())
    with torch.inference_mode():
        assert_right(module, rows(5))
        assert packed_weight(module) is not None


@torch.no_grad()
def test_copies_and_pickles_are_whole() -> None:
    module, x = pack_linears(layer()), rows(5)
    expected = module(x)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert type(other) is type(module)
        assert torch.equal(other(x), expected)
        other.weight.zero_()
        assert torch.equal(module(x), expected)


@torch.no_grad()
def test_memory_is_given_back() -> None:
    module = pack_linears(layer())
    module(rows(5))
    packed = weakref.ref(packed_weight(module))
    unpack_linears(module)
    assert type(module) is nn.Linear
    assert "product" not in vars(module)
    assert packed() is None
    pack_linears(module)(rows(5))
    packed = weakref.ref(packed_weight(module))
    module.double()(rows(5, dtype=torch.float64))
    assert packed() is None


@torch.no_grad()
def test_awkward_biases() -> None:
    module = pack_linears(layer())
    for bias in (torch.randn(2 * OUT)[::2], torch.randn(1).expand(OUT), torch.randn(1)):
        module.bias = nn.Parameter(bias)
        assert_right(module, rows(5))


@torch.no_grad()
def test_weights_that_are_more_than_numbers() -> None:
    class Own(Tensor):
        pass

    x = rows(5)
    for wrap in (lambda w: w.as_subclass(Own), lambda w: w.to_sparse_csr()):
        module = layer()
        module.weight = nn.Parameter(wrap(module.weight.detach()), requires_grad=False)
        expected = module(x)
        torch.testing.assert_close(pack_linears(module)(x), expected)


@torch.no_grad()
def test_inference_tensors_change_uncounted() -> None:
    with torch.inference_mode():
        module = pack_linears(layer())
        module(rows(5))
        module.weight.mul_(2.0)
        assert_right(module, rows(5))


def test_tangents_and_tracing() -> None:
    module = pack_linears(layer()).requires_grad_(False)
    x, tangent = rows(5), rows(5).flip(0)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, tangent)
        found = torch.autograd.forward_ad.unpack_dual(module(dual)).tangent
    torch.testing.assert_close(found, tangent @ module.weight.t())
    traced = torch.jit.trace(module, x)
    torch.testing.assert_close(traced(rows(3)), module(rows(3)))


def test_what_others_call_product_is_theirs() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.other = nn.Linear(IN, OUT), nn.Module()
            self.other.product = nn.Linear(2, 2)

        def product(self, a: int, b: int) -> int:
            return a * b

    model = Own()
    pack_linears(model)
    assert model.product(3, 4) == 12
    unpack_linears(model)
    assert type(model.other.product) is nn.Linear
    number = nn.Linear(2, 2)
    number.product = 5
    assert unpack_linears(number).product == 5


@torch.no_grad()
def test_small_weights_and_subclasses_are_left_alone() -> None:
    class Own(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 1.0

    model = nn.Sequential(Own(IN, OUT), nn.Linear(OUT, 8)).eval()
    expected = model(rows(5))
    pack_linears(model)
    assert torch.equal(model(rows(5)), expected)
    assert type(model[0]) is Own
    assert all(packed_weight(module) is None for module in model)


TRY_BOTH = linears.is_quicker  # before the fixture puts its own in place


@pytest.mark.parametrize("slow", ["packed", "plain"])
@torch.no_grad()
def test_what_is_quicker_is_found_once_for_each_kind(monkeypatch: pytest.MonkeyPatch, slow: str) -> None:
    """And a weight that is quicker as it lies takes no more memory."""
    asked = []

    def slowed(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*args: Any) -> Tensor:
            time.sleep(0.005)
            return function(*args)

        return call

    def asks(plain: Callable[[], Tensor], packed: Callable[[], Tensor], rows: int, worth_it: float) -> bool:
        asked.append(rows)
        return TRY_BOTH(plain, packed, rows, worth_it)

    where, name = (cpu_linear, "multiply") if slow == "packed" else (linears.F, "linear")
    monkeypatch.setattr(where, name, slowed(getattr(where, name)))
    monkeypatch.setattr(linears, "is_quicker", asks)
    model = pack_linears(nn.Sequential(layer(), nn.Linear(OUT, IN), layer()))
    for count in (33, 40, 63, 64):
        model(rows(count))
    assert asked == [33, 33, 64, 64]
    assert all((packed_weight(module) is None) == (slow == "packed") for module in model)


@torch.no_grad()
def test_nothing_is_packed_where_bits_must_be_the_same_tomorrow() -> None:
    """Neither what was found quicker before; and what is met meanwhile is tried afterwards."""
    module, x = pack_linears(layer()), rows(5)
    module(x)
    torch.use_deterministic_algorithms(True)
    try:
        for inputs in (x, rows(20)):
            assert torch.equal(module(inputs), nn.functional.linear(inputs, module.weight, module.bias))
        assert len(linears._quicker) == 1
    finally:
        torch.use_deterministic_algorithms(False)
    module(rows(20))
    assert len(linears._quicker) == 2


@torch.no_grad()
def test_products_of_few_rows_are_tried_with_weights_from_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a model every weight is met once a step, so one that is in a cache would tell nothing."""
    pushed_out: list[int] = []
    monkeypatch.setattr(trial, "_CACHE", 2**10)
    monkeypatch.setattr(Tensor, "fill_", lambda self, value: pushed_out.append(self.numel()))
    for rows in (1, 32, 33):
        pushed_out.clear()
        TRY_BOTH(lambda: None, lambda: None, rows, 1.0)
        assert pushed_out == [2**10 if rows <= 32 else 0] * 10


@pytest.fixture
def product() -> linears.PackedProduct:
    return linears.PackedProduct()


def exact(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, residual: Tensor | None) -> Tensor:
    wide = [None if t is None else t.double() for t in (x, weight, bias, residual)]
    return linear(*wide[:3], activation, wide[3])


@pytest.mark.parametrize("dtype", sorted(TYPES, key=str))
@pytest.mark.parametrize("activation", [None, "gelu", "swiglu", "tanh"])
@torch.no_grad()
def test_what_follows_a_product(product: linears.PackedProduct, dtype: torch.dtype, activation: str | None) -> None:
    """The kernel does it, or PyTorch where the kernel cannot; a residual of another type or shape too."""
    module, x = layer(dtype), rows(2, 5, dtype=dtype)
    size = OUT // 2 if activation == "swiglu" else OUT
    whole, other = torch.randn(2, 5, size).to(dtype), torch.bfloat16 if dtype is torch.float32 else torch.float32
    residuals = (None, whole, torch.randn(5, 2, size).to(dtype).transpose(0, 1), whole[:1], whole.to(other))
    for residual in residuals:
        found = product(x, module.weight, module.bias, activation, residual)
        baseline = linear(x, module.weight, module.bias, activation, residual)
        assert found.dtype == baseline.dtype
        verdict = judge(found, exact(x, module.weight, module.bias, activation, residual), baseline)
        assert verdict.passed, verdict
    assert (product.found is None) == (activation == "tanh")


@torch.no_grad()
def test_gates_of_two_weights(product: linears.PackedProduct) -> None:
    gate, up, x = layer(), layer(), rows(5)
    up.weight.copy_(torch.randn(OUT, IN) / IN**0.5)

    def assert_both_count() -> None:
        found = product(x, gate.weight, gate.bias, "swiglu", value=(up.weight, up.bias))
        both = torch.cat((gate.weight, up.weight)), torch.cat((gate.bias, up.bias))
        verdict = judge(found, exact(x, *both, "swiglu", None), linear(x, *both, "swiglu"))
        assert verdict.passed, verdict

    assert_both_count()
    up.weight.mul_(3.0)
    assert_both_count()
    gate.bias.add_(1.0)
    assert_both_count()
    up.bias = None
    gate.bias = None
    found = product(x, gate.weight, None, "swiglu", value=(up.weight, None))
    both = torch.cat((gate.weight, up.weight))
    assert judge(found, exact(x, both, None, "swiglu", None), linear(x, both, None, "swiglu")).passed
    up.weight.data = up.weight.data.t().contiguous().t()  # of other strides
    found = product(x, gate.weight, None, "swiglu", value=(up.weight, None))
    assert product.found is None
    assert torch.equal(found, nn.functional.silu(gate(x)) * up(x))
    up.weight.requires_grad_()
    with torch.enable_grad():
        product(x, gate.weight, None, "swiglu", value=(up.weight, None)).sum().backward()
    assert up.weight.grad is not None


@torch.no_grad()
def test_another_activation_or_instruction_set_is_laid_out_again(product: linears.PackedProduct) -> None:
    module, x = layer(torch.bfloat16), rows(5, dtype=torch.bfloat16)
    for isa in (*cpu_targets.ISAS, *reversed(cpu_targets.ISAS)):
        for activation in (None, "swiglu", "gelu"):
            with force_isa(isa):
                found = product(x, module.weight, module.bias, activation)
            baseline = linear(x, module.weight, module.bias, activation)
            assert judge(found, exact(x, module.weight, module.bias, activation, None), baseline).passed


def test_nothing_to_pack() -> None:
    with pytest.warns(UserWarning, match="Embedding has no nn.Linear; nothing is packed"):
        pack_linears(nn.Embedding(3, 4))


MODELS: dict[str, Any] = {
    "GPT-2": transformers.GPT2Config(n_layer=2, n_embd=384, n_head=6, vocab_size=500, bos_token_id=1, eos_token_id=2),
    "Llama": transformers.LlamaConfig(
        hidden_size=384, num_hidden_layers=2, num_attention_heads=6, intermediate_size=512, vocab_size=500
    ),
}


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_models(name: str, tmp_path: Any) -> None:
    """Of transformers, and of ours with the same weights: the same logits, and every large weight laid out."""
    torch.manual_seed(0)
    theirs = transformers.AutoModelForCausalLM.from_config(MODELS[name]).eval()
    theirs.save_pretrained(tmp_path)
    ids = torch.randint(3, 500, (2, 9))
    expected = theirs.double()(ids).logits
    ours, theirs = models.from_pretrained(tmp_path), theirs.float()
    for model in (theirs, ours):
        pack_linears(model)
        assert (model(input_ids=ids).logits - expected).abs().max() < PROMISED * expected.abs().max()
        large = [m for m in model.modules() if isinstance(m, (nn.Linear, transformers.pytorch_utils.Conv1D))]
        large = [m for m in large if m.weight.numel() >= 2**17]
        assert len(large) >= 8
        assert all(packed_weight(m) is not None for m in large)
        pickle.loads(pickle.dumps(model))
        unpack_linears(model)
        assert not any(isinstance(vars(m).get("product"), linears.PackedProduct) for m in model.modules())
        assert not any(isinstance(m, linears._Packs) for m in model.modules())


def test_own_models_in_training_by_a_fused_optimizer(tmp_path: Any) -> None:
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(MODELS["Llama"]).save_pretrained(tmp_path)
    model, ids = pack_linears(models.from_pretrained(tmp_path)), torch.randint(3, 500, (2, 9))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2, fused=True)

    def assert_as_it_lies(is_packed: bool) -> None:
        with torch.no_grad():
            found = model(input_ids=ids).logits
            expected = unpack_linears(copy.deepcopy(model))(input_ids=ids).logits
        assert (found - expected).abs().max() < PROMISED * expected.abs().max()
        assert any(packed_weight(module) is not None for module in model.modules()) == is_packed

    for _ in range(3):
        model.train()
        model(input_ids=ids, labels=ids).loss.backward()
        model.eval()
        assert_as_it_lies(is_packed=False)  # an optimizer is about to step, and would not be seen
        optimizer.step()
        assert_as_it_lies(is_packed=False)
        optimizer.zero_grad()
        assert_as_it_lies(is_packed=True)
