"""Continuous batching: requests join and leave the batch between two tokens, and none waits for another's end."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from transformer_fast.generation.paged import PagedBatch, PagedCache, PagedSequence

if TYPE_CHECKING:
    from transformer_fast.models.model import DecoderModel


@dataclass(eq=False)
class _Request:
    """A prompt with what was made of it. Once it runs it has a ``sequence``."""

    number: int
    ids: list[int]
    prompt_length: int
    max_length: int
    ends: frozenset[int]
    sequence: PagedSequence = field(init=False)


class ContinuousBatch:
    """Greedy decoding of many requests over one :class:`PagedCache` (after Orca: Yu et al., OSDI 2022).

    Requests start in the order in which they came. When pages run out, the youngest that runs gives its own up, waits
    at the head of the line, and is computed again later, but for the pages that are still known then.

    Args:
        num_pages, page_size: of the cache.
        max_batch: how many requests run together at most.
    """

    def __init__(self, model: DecoderModel, *, num_pages: int, page_size: int = 64, max_batch: int = 8) -> None:
        if max_batch < 1:
            raise ValueError(f"max_batch={max_batch} must be at least 1")
        config = getattr(model, "config", None)
        positions = None if config is None else config.positions
        if not hasattr(model, "cache_shapes") or positions == "relative":
            raise TypeError(
                f"model is a {type(model).__name__} with positions={positions!r}; "
                "allowed: a decoder-only model without relative positions"
            )
        self.model, self.max_batch = model, max_batch
        #: Tokens of a sequence that there are pages and positions for.
        self.room = num_pages * page_size
        if config is not None and positions == "learned":
            self.room = min(self.room, config.max_positions)
        self.cache = PagedCache(num_pages, page_size, model.cache_shapes(), device=model.device, dtype=model.dtype)
        self.submitted, self.preemptions = 0, 0
        self._waiting: deque[_Request] = deque()
        self._running: list[_Request] = []
        self._done: dict[int, list[int]] = {}
        self._bound: PagedBatch | None = None

    def submit(self, prompt_ids: Iterable[int], *, max_new_tokens: int, eos_token_ids: Iterable[int] = ()) -> int:
        """Queue a prompt ``(seqlen,)``; it ends with the first of ``eos_token_ids``, or after ``max_new_tokens``.

        Returns:
            the number that its tokens are found by.
        """
        ids = [int(i) for i in prompt_ids]
        length = len(ids) + max_new_tokens
        if not ids or max_new_tokens < 1 or length - 1 > self.room:  # the last token is not fed back
            raise ValueError(
                f"{len(ids)} prompt_ids and max_new_tokens={max_new_tokens}; "
                f"allowed: at least 1 of each, and {self.room + 1} together, for which there are pages and positions"
            )
        self._waiting.append(_Request(self.submitted, ids, len(ids), length, frozenset(eos_token_ids)))
        self.submitted += 1
        return self.submitted - 1

    @torch.no_grad()
    def step(self) -> dict[int, list[int]]:
        """Start requests while there is room, each with its first token, then make one token for all that run.

        Returns:
            the tokens that were made, by request.
        """
        made: dict[int, list[int]] = {}
        while self._waiting and len(self._running) < self.max_batch and self._start(made):
            pass
        while sum(map(self._missing, self._running)) > self.cache.available:
            self._preempt(self._running.pop())
        if self._running:
            running = list(self._running)
            sequences = [request.sequence for request in running]
            if self._bound is None or self._bound.sequences != sequences:
                self._bound = self.cache.bind(sequences)
            tokens = self._next_tokens([request.ids[-1:] for request in running], self._bound)
            for request, token in zip(running, tokens, strict=True):
                self._take(request, token, made)
        return made

    def run(self) -> dict[int, list[int]]:
        """Step until all are done; returns the new tokens of those that ended since the last call, by request."""
        while self._waiting or self._running:
            self.step()
        done, self._done = self._done, {}
        return done

    def _next_tokens(self, new_ids: list[list[int]], cache: PagedBatch) -> list[int]:
        """The most likely token of each sequence after its new ids; waits for the device."""
        logits = self.model.next_token_logits(torch.tensor(new_ids, device=self.model.device), cache=cache)
        return [int(token) for token in logits.argmax(-1).tolist()]

    def _missing(self, request: _Request) -> int:
        return self.cache.missing(request.sequence, len(request.ids))

    def _start(self, made: dict[int, list[int]]) -> bool:
        """Prefill the first in line by itself, if its pages are there and one more for each that runs."""
        request = self._waiting[0]
        request.sequence = self.cache.open(request.ids)
        if self._missing(request) + len(self._running) > self.cache.available:
            self.cache.close(request.sequence)
            return False
        self._running.append(self._waiting.popleft())
        new_ids = request.ids[request.sequence.cached :]
        self._take(request, self._next_tokens([new_ids], self.cache.bind([request.sequence]))[0], made)
        return True

    def _preempt(self, request: _Request) -> None:
        self.cache.close(request.sequence)
        self._waiting.appendleft(request)
        self.preemptions += 1

    def _take(self, request: _Request, token: int, made: dict[int, list[int]]) -> None:
        """A new token of a running request, which may be its last."""
        for ids in (request.ids, request.sequence.ids, made.setdefault(request.number, [])):
            ids.append(token)
        if len(request.ids) == request.max_length or token in request.ends:
            self.cache.close(request.sequence)
            self._running.remove(request)
            self._done[request.number] = request.ids[request.prompt_length :]
