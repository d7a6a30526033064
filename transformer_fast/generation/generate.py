"""The generation loop."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from transformer_fast.generation.cache import KVCache
from transformer_fast.generation.sampling import Sampling, next_tokens
from transformer_fast.models.heads import CausalLM

GREEDY = Sampling()


@torch.no_grad()
def generate(
    model: CausalLM,
    input_ids: Tensor,
    *,
    max_new_tokens: int,
    attention_mask: Tensor | None = None,
    sampling: Sampling = GREEDY,
    use_cache: bool = True,
    on_tokens: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """Continue each prompt by ``max_new_tokens`` tokens.

    Args:
        input_ids: ``(batch, seqlen)`` prompts.
        attention_mask: ``(batch, seqlen)`` for prompts of unequal length, padded on either side.
        sampling: greedy unless said otherwise.
        use_cache: keep keys and values, or compute all of the sequence again for each token
            (the definition that the cached path is tested against).
        on_tokens: called with each step's tokens ``(batch,)``, for streaming.

    Returns:
        ``(batch, max_new_tokens)`` int64, the new tokens only.
    """
    if input_ids.dim() != 2 or 0 in input_ids.shape:
        raise ValueError(f"input_ids must be (batch, seqlen) with at least one token, not {tuple(input_ids.shape)}")
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; allowed: at least 0")
    if attention_mask is not None and not bool(attention_mask.bool().any(1).all()):
        raise ValueError("attention_mask leaves a prompt without any token")
    step = _cached_step(model, input_ids, max_new_tokens) if use_cache else _recomputing_step(model)
    generator = sampling.generator(input_ids.device)
    made: list[Tensor] = []
    logits_input, mask = input_ids, attention_mask
    for _ in range(max_new_tokens):
        tokens = next_tokens(step(logits_input, mask), sampling, generator)
        made.append(tokens)
        if on_tokens is not None:
            on_tokens(tokens)
        logits_input, mask = tokens[:, None], None
    return torch.stack(made, 1) if made else input_ids.new_empty(input_ids.shape[0], 0)


Step = Callable[[Tensor, "Tensor | None"], Tensor]


def _cached_step(model: CausalLM, input_ids: Tensor, max_new_tokens: int) -> Step:
    """Takes the tokens that are new since the last step, gives the logits after them ``(batch, vocab_size)``."""
    weight = model.decoder.embeddings.tokens.weight
    batch, seqlen = input_ids.shape
    # The last token made is never fed back, hence the -1.
    capacity = seqlen + max(max_new_tokens - 1, 0)
    cache = KVCache(model.config, batch, capacity, device=weight.device, dtype=weight.dtype)

    def step(tokens: Tensor, mask: Tensor | None) -> Tensor:
        return model.next_token_logits(tokens, mask, cache)

    return step


def _recomputing_step(model: CausalLM) -> Step:
    """As :func:`_cached_step`, from the whole sequences each time."""
    grid: list[Tensor] = []
    masks: list[Tensor] = []

    def step(tokens: Tensor, mask: Tensor | None) -> Tensor:
        grid.append(tokens)
        masks.append(torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask.bool())
        return model.next_token_logits(torch.cat(grid, 1), torch.cat(masks, 1))

    return step
