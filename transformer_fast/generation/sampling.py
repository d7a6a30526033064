"""From logits to the next token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: 0 takes the most likely token (greedy); above 0 the logits are divided by it.
        top_k: draw from the ``k`` most likely tokens only; None for all.
        seed: makes the draws repeatable; None for fresh ones.
    """

    temperature: float = 0.0
    top_k: int | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ValueError(f"temperature={self.temperature} must not be negative")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k={self.top_k} must be at least 1")

    def generator(self, device: torch.device) -> torch.Generator | None:
        """A source of randomness at the seed's start, or None for torch's own."""
        return None if self.seed is None else torch.Generator(device).manual_seed(self.seed)


def next_tokens(logits: Tensor, sampling: Sampling, generator: torch.Generator | None = None) -> Tensor:
    """Choose one token a sequence: ``(batch, vocab_size)`` to ``(batch,)`` int64."""
    if sampling.temperature == 0:
        return logits.argmax(-1)
    logits = logits.float() / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
        values, candidates = logits.topk(sampling.top_k, dim=-1)
        drawn = torch.multinomial(values.softmax(-1), 1, generator=generator)
        return candidates.gather(-1, drawn).squeeze(-1)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(-1)
