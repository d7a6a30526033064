"""Generation without a cache: all of a sequence is computed again for each token. What caches are tested against."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from transformer_fast.generation import GenerationConfig
from transformer_fast.generation.search import beam_search, sample_search
from transformer_fast.models import DecoderModel


class Recomputed:
    """A ``Stepper`` of prompts ``(rows, length)`` that keeps nothing but their ids."""

    def __init__(self, model: DecoderModel, ids: Tensor, mask: Tensor | None = None) -> None:
        self.model, self.ids, self.mask = model, ids, mask

    def __call__(self, tokens: Tensor | None) -> Tensor:
        if tokens is not None:
            self.ids = torch.cat((self.ids, tokens[:, None]), 1)
            new = torch.ones_like(tokens[:, None])
            self.mask = None if self.mask is None else torch.cat((self.mask, new.to(self.mask.dtype)), 1)
        return self.model.next_token_logits(self.ids, self.mask)

    def reorder(self, index: Tensor) -> None:
        self.ids = self.ids[index]
        self.mask = None if self.mask is None else self.mask[index]


def recompute(model: DecoderModel, ids: Tensor, *, attention_mask: Tensor | None = None, **options: Any) -> Tensor:
    """What ``generate`` gives for the same arguments."""
    config = GenerationConfig(**options)
    rows = torch.arange(len(ids)).repeat_interleave(config.rows_per_prompt)
    search = beam_search if config.num_beams > 1 else sample_search
    mask = None if attention_mask is None else attention_mask[rows]
    return search(Recomputed(model, ids[rows], mask), ids[rows], config)
