"""A small decoder trained at byte level, and the 3-gram model that it has to beat."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from transformer_fast.demo.peers import sdpa_attention
from transformer_fast.demo.speed import Speed, compare
from transformer_fast.models import DecoderModel
from transformer_fast.models.layers import AttentionFunction, fused_attention

BYTES = 256

# RoPE, grouped queries, a window that is shorter than the context: one model that asks for what the kernels are for,
# in the values of a public class (Mistral), so that what is saved opens in other libraries too.
DECODER: dict[str, Any] = {
    "model_type": "mistral",
    "architectures": ["MistralForCausalLM"],
    "vocab_size": BYTES,
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 352,
    "max_position_embeddings": 2048,
    "sliding_window": 64,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "tie_word_embeddings": True,
    "bos_token_id": None,
    "eos_token_id": None,
    # About 1/sqrt(hidden_size). The customary 0.02 suits wide models: at this width the first hundred
    # steps would go into growing the weights (validation 2.60 against 1.73 after 30 s on one core).
    "initializer_range": 0.07,
}


@dataclass(frozen=True)
class TrainingPlan:
    """How long and how fast to train.

    ``seconds`` bounds the wall time, evaluations included, and ``steps`` the number of steps; the
    learning rate follows whichever is nearer to its end. A slow machine takes longer than ``seconds``
    if it would not get to ``at_least`` steps otherwise: fewer teach nothing.
    """

    seconds: float = 60.0
    steps: int = 100_000
    at_least: int = 150
    batch: int = 4
    context: int = 256
    learning_rate: float = 4e-3
    weight_decay: float = 0.1
    warmup: float = 0.03
    evaluations: int = 6
    seed: int = 0


@dataclass
class TrainingResult:
    """What happened, losses in nats a byte; ``validation`` has a (step, loss) for each evaluation.

    ``seconds`` is the time of the training steps alone, ``wall_seconds`` of everything, both with
    ``threads`` threads.
    """

    losses: list[float] = field(default_factory=list)
    validation: list[tuple[int, float]] = field(default_factory=list)
    seconds: float = 0.0
    wall_seconds: float = 0.0
    tokens: int = 0
    threads: int = 0

    @property
    def tokens_per_second(self) -> float:
        """Training tokens a second, evaluations left out."""
        return self.tokens / self.seconds if self.seconds else math.nan


def to_bytes(paragraphs: tuple[str, ...]) -> Tensor:
    """``(bytes,)`` uint8: the paragraphs, one to a line."""
    return torch.frombuffer(bytearray("\n".join(paragraphs).encode()), dtype=torch.uint8)


def random_chunks(data: Tensor, batch: int, length: int, generator: torch.Generator) -> Tensor:
    """``(batch, length)`` int64: contiguous pieces of ``data`` from random places."""
    starts = torch.randint(len(data) - length + 1, (batch, 1), generator=generator)
    return data[starts + torch.arange(length)].long()


def learning_rate_at(progress: float, plan: TrainingPlan) -> float:
    """Linear warm-up, then a cosine down to a twentieth; ``progress`` runs from 0 to 1."""
    if progress < plan.warmup:
        return plan.learning_rate * progress / plan.warmup
    rest = (progress - plan.warmup) / (1 - plan.warmup)
    return plan.learning_rate * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(rest, 1.0))))


@torch.no_grad()
def validation_loss(model: DecoderModel, data: Tensor, context: int, batch: int = 16) -> float:
    """Nats a byte over all of ``data``, in chunks of ``context``; each chunk's first byte is given."""
    chunks = data[: (len(data) - 1) // context * context + 1].unfold(0, context + 1, context)
    total = sum(float(model.loss(part.long())) * len(part) for part in chunks.split(batch))
    return total / len(chunks)


def ngram_loss(training: Tensor, validation: Tensor, order: int = 3) -> float:
    """Nats a byte of a byte n-gram model on ``validation``, with counts from ``training``.

    Each order's probabilities are smoothed towards those of the order below by a constant, the one that suits the
    validation text best, so that the baseline is not understated.
    """

    def codes(data: Tensor, length: int) -> Tensor:
        """The last ``length`` bytes up to each place as one number; places as of the first that has ``order``."""
        code = torch.zeros(len(data) - order + 1, dtype=torch.int64)
        for back in reversed(range(length)):
            code = code * BYTES + data[order - 1 - back : len(data) - back].long()
        return code

    probability, loss = torch.full((len(validation) - order + 1,), 1 / BYTES, dtype=torch.float64), math.inf
    for length in range(1, order + 1):
        counts = torch.bincount(codes(training, length), minlength=BYTES**length)
        ours = codes(validation, length)
        found, seen = counts[ours].double(), counts.view(-1, BYTES).sum(1)[ours // BYTES].double()
        ways = [(found + c * probability) / (seen + c) for c in (0.01, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)]
        losses = [float(-way.log().mean()) for way in ways]
        loss = min(losses)
        probability = ways[losses.index(loss)]
    return loss


def build_optimizer(model: DecoderModel, plan: TrainingPlan) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": plan.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=plan.learning_rate, betas=(0.9, 0.98), fused=True)


def train(
    model: DecoderModel,
    training: Tensor,
    validation: Tensor,
    plan: TrainingPlan,
    on_step: Callable[[float, TrainingResult], None] = lambda progress, result: None,
) -> TrainingResult:
    """Train ``model`` in place on the ``(bytes,)`` of ``training``.

    ``on_step`` is called after each step with the progress (0 to 1) and the result so far.
    """
    generator = torch.Generator().manual_seed(plan.seed)
    optimizer = build_optimizer(model, plan)
    result = TrainingResult(threads=torch.get_num_threads())
    progress, next_evaluation, began = 0.0, 0.0, time.perf_counter()
    while progress < 1.0:
        if progress >= next_evaluation:
            result.validation.append((len(result.losses), validation_loss(model, validation, plan.context)))
            next_evaluation += 1.0 / plan.evaluations
        started = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(progress, plan)
        loss = model.loss(random_chunks(training, plan.batch, plan.context + 1, generator))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        result.losses.append(loss.item())
        result.seconds += time.perf_counter() - started
        result.tokens += plan.batch * plan.context
        result.wall_seconds = time.perf_counter() - began
        progress = _progress(result, plan)
        on_step(progress, result)
    result.validation.append((len(result.losses), validation_loss(model, validation, plan.context)))
    return result


def _progress(result: TrainingResult, plan: TrainingPlan) -> float:
    """0 to 1: how much of the plan is done."""
    steps = len(result.losses)
    reached = max(result.wall_seconds / plan.seconds, steps / plan.steps)
    return min(1.0, reached, steps / min(plan.at_least, plan.steps))


@contextmanager
def quickest_threads(step: Callable[[], object]) -> Iterator[int]:
    """Within it, torch uses all of its threads or a single one, whichever does ``step`` sooner.

    A small model's operations are short. Where other programs hold the cores, threads that wait for
    each other at the end of every one of them were seen to take ten times longer than one thread.
    """
    usual = torch.get_num_threads()
    quickest: dict[int, float] = {}
    try:
        for _ in range(3):
            for threads in {usual, 1}:
                torch.set_num_threads(threads)
                started = time.perf_counter()
                step()
                elapsed = time.perf_counter() - started
                quickest[threads] = min(elapsed, quickest.get(threads, math.inf))
        threads = min(quickest, key=lambda number: quickest[number])
        torch.set_num_threads(threads)
        yield threads
    finally:
        torch.set_num_threads(usual)


def speeds(model: DecoderModel, data: Tensor, length: int, repeats: int) -> dict[str, list[Speed]]:
    """The decoder on one text of ``length`` bytes, with our attention and with PyTorch's: reading, and learning."""
    ids = data[None, : length + 1].long()

    def reading(attend: AttentionFunction) -> Callable[[], object]:
        def run() -> None:
            model.set_attention(attend)
            with torch.no_grad():
                model.loss(ids)

        return run

    def learning(attend: AttentionFunction) -> Callable[[], object]:
        def run() -> None:
            model.set_attention(attend)
            model.zero_grad()
            model.loss(ids).backward()

        return run

    peers = {"ours": fused_attention, "PyTorch SDPA": sdpa_attention}
    found = {}
    for task, way in (("forward", reading), ("forward and backward", learning)):
        ways = {name: way(attend) for name, attend in peers.items()}
        found[task] = compare(ways, "PyTorch SDPA", repeats)
    model.set_attention(fused_attention)
    model.zero_grad()
    return found
