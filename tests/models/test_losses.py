"""The fused output projection and cross entropy: values and gradients against the plain one, memory, and edges."""

from __future__ import annotations

import itertools
import re
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from transformer_fast.models.losses import linear_cross_entropy
from transformer_fast.testing import judge

TOKENS, D, VOCAB = 37, 12, 61
Operands = dict[str, Tensor | None]


def plain(rows: Tensor, weight: Tensor, labels: Tensor, *, bias=None, scale=1.0, softcap=None, **options) -> Tensor:
    """The same loss by way of all logits, in float32 from the product on, as models are usually written."""
    logits = F.linear(rows, weight)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    logits = logits * scale if bias is None else logits * scale + bias
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(logits, labels, **options)


def operands(dtype: torch.dtype = torch.float32, bias: bool = True) -> tuple[Operands, Tensor]:
    """Rows, weight and bias as leaves, and labels of which a third are ignored."""
    drawn: Operands = {
        "rows": torch.randn(TOKENS, D).to(dtype),
        "weight": torch.randn(VOCAB, D).to(dtype),
        "bias": torch.randn(VOCAB).to(dtype) if bias else None,
    }
    labels = torch.randint(VOCAB, (TOKENS,)).where(torch.rand(TOKENS) < 2 / 3, -100)
    return drawn, labels


def loss_and_gradients(function, drawn: Operands, labels: Tensor, dtype=None, upstream=1.0, **options):
    leaves = {name: t if t is None else t.detach().to(dtype or t.dtype) for name, t in drawn.items()}
    given = [t.requires_grad_() for t in leaves.values() if t is not None]
    loss = function(leaves["rows"], leaves["weight"], labels, bias=leaves["bias"], **options)
    (loss * upstream).backward()
    return [loss, *(t.grad for t in given)]


def judged(drawn: Operands, labels: Tensor, upstream: float = 1.0, chunk_size: int | None = 5, **options: Any) -> None:
    ours = loss_and_gradients(linear_cross_entropy, drawn, labels, upstream=upstream, chunk_size=chunk_size, **options)
    baseline = loss_and_gradients(plain, drawn, labels, upstream=upstream, **options)
    oracle = loss_and_gradients(plain, drawn, labels, torch.float64, upstream, **options)
    assert ours[0].dtype == torch.float32 and ours[0].shape == ()
    for name, *three in zip(("loss", "rows", "weight", "bias"), ours, oracle, baseline, strict=False):
        verdict = judge(*three, name=name)
        assert verdict.passed, str(verdict)
        assert three[0].dtype == three[2].dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "options",
    [{}, {"scale": 0.3}, {"softcap": 2.0}, {"scale": 1.5, "softcap": 3.0, "reduction": "sum"}],
    ids=str,
)
def test_loss_and_gradients_are_those_of_all_logits(options, dtype):
    drawn, labels = operands(dtype)
    judged(drawn, labels, **options)


@pytest.mark.parametrize("chunk_size", [1, 7, TOKENS, 1000, None])
def test_any_chunk_size_and_no_bias(chunk_size):
    drawn, labels = operands(bias=False)
    judged(drawn, labels, upstream=-3.0, chunk_size=chunk_size)


def test_the_gradient_of_the_loss_multiplies_in_float32():
    """As a gradient scaler uses it: gradients too small for float16 survive."""
    drawn, labels = operands(torch.float16)
    judged(drawn, labels, upstream=2.0**15, scale=2.0**-16)


def test_gradcheck():
    drawn, labels = operands(torch.float64)
    small = (drawn["rows"][:7, :3], drawn["weight"][:11, :3], drawn["bias"][:11])
    labels = (labels[:7] % 11).where(torch.arange(7) != 2, -100)
    for reduction, softcap in itertools.product(("mean", "sum"), (None, 1.5)):

        def loss(rows, weight, bias, reduction=reduction, softcap=softcap):
            how = {"scale": 0.7, "softcap": softcap, "reduction": reduction, "chunk_size": 4}
            return linear_cross_entropy(rows, weight, labels, bias=bias, **how)

        assert torch.autograd.gradcheck(loss, [t.clone().requires_grad_() for t in small])


@pytest.mark.parametrize("wanted", [(), ("rows",), ("weight",), ("bias",), ("rows", "bias")], ids=" ".join)
def test_only_the_gradients_asked_for(wanted):
    drawn, labels = operands()
    full = loss_and_gradients(linear_cross_entropy, drawn, labels)
    leaves = {name: drawn[name].detach().requires_grad_(name in wanted) for name in drawn}
    loss = linear_cross_entropy(leaves["rows"], leaves["weight"], labels, bias=leaves["bias"])
    assert torch.equal(loss, full[0]) and loss.requires_grad == bool(wanted)
    if wanted:
        loss.backward()
    for (name, leaf), gradient in zip(leaves.items(), full[1:], strict=True):
        assert torch.equal(leaf.grad, gradient) if name in wanted else leaf.grad is None


def test_tied_weights_accumulate_and_the_graph_may_be_retained():
    embedding = nn.Embedding(VOCAB, D)
    ids, labels = torch.randint(VOCAB, (TOKENS,)), torch.randint(VOCAB, (TOKENS,))
    gradients = []
    for function in (linear_cross_entropy, plain):
        embedding.weight.grad = None
        loss = function(embedding(ids), embedding.weight, labels)
        loss.backward(retain_graph=True)
        once = embedding.weight.grad.clone()
        loss.backward()
        assert torch.equal(embedding.weight.grad, once + once)
        gradients.append(once)
    embedding.double()
    embedding.weight.grad = None
    plain(embedding(ids), embedding.weight, labels).backward()
    verdict = judge(gradients[0], embedding.weight.grad, gradients[1])
    assert verdict.passed, str(verdict)


def test_autocast():
    """Products in bfloat16, but the float32 weight's gradient is not rounded to it; float64 stays as it is."""
    drawn, labels = operands()
    with torch.autocast("cpu", torch.bfloat16):
        judged(drawn, labels, chunk_size=None)
        exact = loss_and_gradients(linear_cross_entropy, drawn, labels, torch.float64)
    loss = loss_and_gradients(linear_cross_entropy, drawn, labels)[0]
    with torch.autocast("cpu", torch.bfloat16):
        low, _, low_dweight, _ = loss_and_gradients(linear_cross_entropy, drawn, labels, chunk_size=5)
    assert not torch.equal(loss, low)
    assert low_dweight.dtype == torch.float32 and not torch.equal(low_dweight, low_dweight.bfloat16().float())
    assert exact[0].dtype == torch.float64
    assert all(map(torch.equal, exact, loss_and_gradients(linear_cross_entropy, drawn, labels, torch.float64)))


class Watch(TorchDispatchMode):
    """Counts the memory that what PyTorch's operators return takes, and the rows of every matrix product."""

    def __init__(self) -> None:
        super().__init__()
        self.held = self.peak = self.multiplied = 0
        self.seen: set[int] = set()

    def _freed(self, pointer: int, size: int) -> None:
        self.held -= size
        self.seen.discard(pointer)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.multiplied += args[0].shape[0] if function is torch.ops.aten.mm.default else 0
        for t in out if isinstance(out, (tuple, list)) else [out]:
            storage = t.untyped_storage() if isinstance(t, Tensor) else None
            if storage is not None and storage.data_ptr() not in self.seen:
                self.seen.add(storage.data_ptr())
                self.held += storage.nbytes()
                self.peak = max(self.peak, self.held)
                weakref.finalize(storage, self._freed, storage.data_ptr(), storage.nbytes())
        return out


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_never_all_logits(softcap):
    """A training step holds less than a twentieth of the logits, beside the two copies of the weight's gradient."""
    tokens, vocab = 1024, 2048
    weight, rows = torch.randn(vocab, 8, requires_grad=True), torch.randn(tokens, 8, requires_grad=True)
    labels = torch.randint(vocab, (tokens,))
    logits = tokens * vocab * weight.element_size()
    peaks = {}
    for function, options in ((linear_cross_entropy, {"chunk_size": 16}), (plain, {})):
        with Watch() as watch:
            function(rows, weight, labels, softcap=softcap, **options).backward()
        peaks[function] = watch.peak
    assert peaks[plain] > 2 * logits, "the counting works"
    assert peaks[linear_cross_entropy] < logits / 20 + 2 * weight.nbytes + 2 * rows.nbytes


def test_ignored_rows_cost_nothing_and_may_hold_anything():
    drawn, labels = operands(bias=False)
    rows, weight = drawn["rows"].requires_grad_(), drawn["weight"]
    with torch.no_grad():
        rows[labels == -100] = torch.nan
    with Watch() as watch:
        loss = linear_cross_entropy(rows, weight, labels)
    assert watch.multiplied == 2 * int((labels != -100).sum()), "one product for logits, one for the rows' gradient"
    loss.backward()
    assert loss.isfinite() and rows.grad.isfinite().all() and not rows.grad[labels == -100].any()


def test_no_gradients_are_made_where_none_can_be_asked_for():
    drawn, labels = operands(bias=False)
    rows, weight = drawn["rows"].requires_grad_(), drawn["weight"].requires_grad_()
    with torch.no_grad(), Watch() as watch:
        loss = linear_cross_entropy(rows, weight, labels)
    assert watch.multiplied == int((labels != -100).sum()) and not loss.requires_grad
    assert torch.equal(loss, linear_cross_entropy(rows, weight, labels))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("tokens", [0, 3])
def test_no_label_at_all_is_zero_not_nan(tokens, reduction):
    rows, weight = torch.randn(tokens, D, requires_grad=True), torch.randn(VOCAB, D, requires_grad=True)
    loss = linear_cross_entropy(rows, weight, torch.full((tokens,), 7), ignore_index=7, reduction=reduction)
    loss.backward()
    assert loss.item() == 0.0 and not rows.grad.any() and not weight.grad.any()


def test_logits_that_are_huge_or_forbidden():
    drawn, labels = operands()
    drawn["bias"][labels.clamp(min=0)] = 3e4
    judged(drawn, labels)
    forbidden = [token for token in range(VOCAB) if token not in labels]
    drawn["bias"][forbidden] = -torch.inf
    judged(drawn, labels)


def test_a_second_derivative_is_refused():
    drawn, labels = operands(bias=False)
    rows = drawn["rows"].requires_grad_()
    loss = linear_cross_entropy(rows, drawn["weight"], labels)
    (gradient,) = torch.autograd.grad(loss * loss, rows, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": torch.zeros(2, 3, D)}, "rows=torch.float32 (2, 3, 12); allowed: float (tokens, d)"),
        ({"weight": torch.zeros(VOCAB, 5)}, "weight=torch.float32 (61, 5); allowed: torch.float32 (vocab_size, 12)"),
        ({"weight": torch.zeros(VOCAB, D).half()}, "weight=torch.float16 (61, 12); allowed: torch.float32 "),
        ({"labels": torch.zeros(TOKENS).int()}, "labels=torch.int32 (37,); allowed: torch.int64 (37,)"),
        ({"labels": torch.arange(TOKENS) + 30}, "labels[31]=61; allowed: 0 to 60, or ignore_index=-100"),
        ({"labels": torch.arange(TOKENS) - 1}, "labels[0]=-1; allowed"),
        ({"bias": torch.zeros(D)}, "bias=torch.float32 (12,); allowed: None or (61,)"),
        ({"softcap": 0.0}, "softcap=0.0; allowed: None or above 0"),
        ({"reduction": "none"}, "reduction=none; allowed: mean or sum"),
        ({"chunk_size": 0}, "chunk_size=0; allowed: None or at least 1"),
    ],
)
def test_errors_name_the_argument(change, message):
    given = {"rows": torch.zeros(TOKENS, D), "weight": torch.zeros(VOCAB, D), "labels": torch.arange(TOKENS)}
    with pytest.raises(ValueError, match=re.escape(message)):
        linear_cross_entropy(**(given | change))
