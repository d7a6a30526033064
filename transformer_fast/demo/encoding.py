"""The pretrained sentence encoder on real sentences: what is near what, is it right, and how fast."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from transformer_fast.demo.peers import eager_attention, sdpa_attention
from transformer_fast.demo.speed import Speed, compare
from transformer_fast.models.layers import AttentionFunction, fused_attention
from transformer_fast.tasks import SentenceEncoder, TokenBatch, Tokenizer

QUERIES = (
    "How do I catch an error?",
    "Which objects cannot be changed after they were made?",
    "Rounding numbers for display",
    "Going through the items of a list one at a time",
)

OURS_AND_PYTORCH = "ours, and plain eager PyTorch"

# One call encodes this many sentences of mixed length.
BATCH = 64


@dataclass(frozen=True)
class Neighbours:
    """The sentences nearest to a query, with their cosine similarity, nearest first."""

    query: str
    found: list[tuple[float, str]]


@dataclass(frozen=True)
class Difference:
    """How far two computations of the same hidden states are apart."""

    compared: str
    largest: float
    smallest_cosine: float


@contextmanager
def computing_with(encoder: SentenceEncoder, attend: AttentionFunction, backend: str = "auto") -> Iterator[None]:
    """Within it, the encoder's attention is another function or back end."""
    encoder.encoder.set_attention(attend)
    encoder.encoder.set_backend(backend)
    try:
        yield
    finally:
        encoder.encoder.set_attention(fused_attention)
        encoder.encoder.set_backend("auto")


@torch.no_grad()
def embed(
    encoder: SentenceEncoder,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    on_batch: Callable[[int], None] = lambda number: None,
) -> Tensor:
    """Unit vectors ``(len(texts), d)``; ``on_batch`` hears how many texts are done."""
    vectors = []
    for start in range(0, len(texts), BATCH):
        part = texts[start : start + BATCH]
        vectors.append(encoder(*tokenizer(part)))
        on_batch(len(part))
    return torch.cat(vectors)


def nearest(
    queries: Sequence[str], query_vectors: Tensor, texts: Sequence[str], vectors: Tensor, number: int = 3
) -> list[Neighbours]:
    """The ``number`` texts with the largest cosine similarity to each query."""
    top = (query_vectors @ vectors.T).topk(min(number, len(texts)))
    return [
        Neighbours(query, [(score, texts[i]) for score, i in zip(scores, places, strict=True)])
        for query, scores, places in zip(queries, top.values.tolist(), top.indices.tolist(), strict=True)
    ]


@torch.no_grad()
def differences(encoder: SentenceEncoder, batch: TokenBatch) -> list[Difference]:
    """Our hidden states of a padded batch against other computations with the same weights."""

    def states(attend: AttentionFunction, backend: str = "auto", packed: bool = False) -> Tensor:
        with computing_with(encoder, attend, backend):
            return encoder.encoder(*batch, packed=packed).last_hidden_state[batch.attention_mask]

    ours = states(fused_attention, packed=True)
    reference = states(fused_attention, "reference", packed=True)
    eager = states(eager_attention)
    dtype = eager.dtype
    encoder.double()
    exact = states(eager_attention)
    encoder.to(dtype)
    return [
        _difference("ours, and our reference back end", ours, reference),
        _difference(OURS_AND_PYTORCH, ours, eager),
        _difference("ours, and eager PyTorch in float64", ours, exact),
        _difference("for scale: eager PyTorch, and itself in float64", eager, exact),
    ]


def _difference(compared: str, a: Tensor, b: Tensor) -> Difference:
    a, b = a.double(), b.double()
    return Difference(compared, float((a - b).abs().max()), float(torch.cosine_similarity(a, b, dim=-1).min()))


@torch.no_grad()
def speeds(encoder: SentenceEncoder, batch: TokenBatch, repeats: int) -> list[Speed]:
    """The whole model on one padded batch: ours packed and padded, and the same model with PyTorch's attention."""

    def way(attend: AttentionFunction, packed: bool) -> Callable[[], object]:
        def run() -> None:
            with computing_with(encoder, attend):
                encoder(*batch, packed=packed)

        return run

    ways = {
        "ours, packed": way(fused_attention, True),
        "ours, padded": way(fused_attention, False),
        "PyTorch SDPA, padded": way(sdpa_attention, False),
        "PyTorch eager, padded": way(eager_attention, False),
    }
    return compare(ways, "PyTorch SDPA, padded", repeats)
