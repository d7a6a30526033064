"""The fused loss: transformers' own, its gradient, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.loss.loss_utils import ForCausalLMLoss

from transformer_fast.dropin import causal_lm_loss


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("count", [None, 17, torch.tensor(17)], ids=["mean", "int", "tensor"])
@pytest.mark.parametrize("rows", [1, 40])
def test_loss(dtype: torch.dtype, count: Any, rows: int) -> None:
    """With labels that do not count, by what transformers has."""
    torch.manual_seed(0)
    logits = (torch.randn(2, rows, 300) * 3).to(dtype)
    labels = torch.randint(300, (2, rows))
    labels[0, rows // 2 :] = -100
    for arguments in (dict(labels=labels), dict(labels=None, shift_labels=labels)):
        if rows == 1 and arguments["labels"] is not None:
            continue  # nothing to predict
        results = []
        for function in (ForCausalLMLoss, causal_lm_loss):
            leaf = logits.clone().requires_grad_()
            loss = function(leaf, vocab_size=300, num_items_in_batch=count, **arguments)
            (gradient,) = torch.autograd.grad(loss * 3.0, leaf)
            results.append((loss.detach(), gradient))
        (expected, wanted), (found, gradient) = results
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(gradient, wanted)


def test_loss_that_is_none() -> None:
    logits = torch.randn(1, 3, 9, requires_grad=True)
    for function in (ForCausalLMLoss, causal_lm_loss):
        loss = function(logits, torch.full((1, 3), -100), 9)
        assert loss.isnan()  # the mean of nothing
        (gradient,) = torch.autograd.grad(loss, logits)
        assert not gradient.any()
    with pytest.raises(IndexError, match="out of bounds"):
        causal_lm_loss(logits, torch.full((1, 3), 9), 9)
    bad = torch.full((1, 3, 9), float("nan"), requires_grad=True)
    (gradient,) = torch.autograd.grad(causal_lm_loss(bad, torch.tensor([[1, 2, -100]]), 9), bad)
    assert gradient[0, 0].isnan().all()
    assert not gradient[0, 1:].any()


def test_many_gradients_of_the_loss_at_once() -> None:
    logits = torch.randn(1, 4, 9, requires_grad=True)
    loss = causal_lm_loss(logits, torch.tensor([[1, 2, -100, 3]]), 9)
    (one,) = torch.autograd.grad(loss, logits, retain_graph=True)
    (both,) = torch.autograd.grad(loss, logits, torch.tensor([1.0, -2.0]), is_grads_batched=True)
    torch.testing.assert_close(both, torch.stack((one, -2.0 * one)))


@pytest.mark.parametrize("unpack", [torch.Tensor.double, lambda t: t.t().contiguous().t()], ids=["type", "strides"])
def test_saved_tensors_that_come_back_as_others(unpack: Any) -> None:
    logits, labels = torch.randn(1, 4, 9, requires_grad=True), torch.tensor([[1, 2, -100, 3]])
    (expected,) = torch.autograd.grad(causal_lm_loss(logits, labels, 9), logits)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: unpack(t) if t.is_floating_point() else t):
        loss = causal_lm_loss(logits, labels, 9)
    (found,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(found, expected)


def test_labels_of_another_type() -> None:
    """Are refused as PyTorch refuses them."""
    with pytest.raises((RuntimeError, IndexError)):
        causal_lm_loss(torch.randn(1, 3, 9, requires_grad=True), torch.ones(1, 3), 9)


def test_compiled_loss() -> None:
    logits, labels = torch.randn(2, 5, 9), torch.randint(9, (2, 5))
    compiled = torch.compile(causal_lm_loss, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(logits, labels, 9), ForCausalLMLoss(logits, labels, 9))
