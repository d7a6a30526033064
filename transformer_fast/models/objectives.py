"""What pretraining asks of a model: corrupted inputs with their targets, and batches of them.

Texts are 1-D int64 tensors of token ids on the CPU. Each draw comes from the generator given, so its seed repeats it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Generator, Tensor
from torch.nn.utils.rnn import pad_sequence

#: The label of a token that is not to be predicted, as in :func:`torch.nn.functional.cross_entropy`.
IGNORED = -100


def mask_tokens(
    ids: Tensor, special_mask: Tensor, vocab_size: int, mask_id: int, generator: Generator, probability: float = 0.15
) -> tuple[Tensor, Tensor]:
    """BERT's masked language model (Devlin et al., 2019): ids of any shape to new (inputs, labels).

    Each token is chosen with the probability given, unless ``special_mask`` (True: special, or padding) forbids it. Of
    the chosen, 80% become ``mask_id``, 10% a random token and 10% stay. Labels are -100 where nothing was chosen.
    """
    _check_share("probability", probability)
    chance, fate = torch.rand((2, *ids.shape), generator=generator, device=ids.device)
    random = torch.randint(vocab_size, ids.shape, generator=generator, device=ids.device)
    chosen = (chance < probability) & ~special_mask
    inputs = ids.where(~chosen | (fate >= 0.9), random).masked_fill(chosen & (fate < 0.8), mask_id)
    return inputs, ids.where(chosen, IGNORED)


class SentencePair(NamedTuple):
    """One example of next-sentence prediction: 1-D ids, their segments (0, then 1), and 1 for a random next."""

    ids: Tensor
    segments: Tensor
    label: int


def next_sentence_pairs(
    documents: Sequence[Sequence[Tensor]], cls_id: int, sep_id: int, generator: Generator
) -> Iterator[SentencePair]:
    """``[CLS] first [SEP] second [SEP]`` for each sentence that has a next one in its document (Devlin et al., 2019).

    The second is that next one or, half of the time, any sentence of any other document.
    """
    documents = [document for document in documents if document]
    if len(documents) < 2:
        raise ValueError(f"documents has {len(documents)} with sentences; allowed: at least 2")

    def below(n: int) -> int:
        return int(torch.randint(n, (), generator=generator))

    cls, sep = torch.tensor([cls_id]), torch.tensor([sep_id])
    for number, document in enumerate(documents):
        for first, second in pairwise(document):
            label = below(2)
            if label:
                other = documents[number - 1 - below(len(documents) - 1)]
                second = other[below(len(other))]
            ids = torch.cat((cls, first, sep, second, sep))
            yield SentencePair(ids, (torch.arange(len(ids)) > len(first) + 1).long(), label)


def span_corruption(
    ids: Tensor, first_sentinel: int, generator: Generator, density: float = 0.15, mean_span: float = 3.0
) -> tuple[Tensor, Tensor]:
    """T5's objective (Raffel et al., 2020): a text of at least two tokens to (inputs, targets), without end tokens.

    In the inputs one sentinel stands for each span; the targets are each sentinel with its span, and a closing
    sentinel. Sentinels count down from ``first_sentinel`` (T5: the last id of the vocabulary). The share of tokens in
    spans is exact up to rounding. As in T5, the text begins with tokens that are kept and ends with a span.
    """
    _check_share("density", density)
    if ids.dim() != 1 or len(ids) < 2:
        raise ValueError(f"ids has shape {tuple(ids.shape)}; allowed: (seqlen,) of at least 2")
    noise = min(max(round(len(ids) * density), 1), len(ids) - 1)
    spans = min(max(round(noise / mean_span), 1), noise, len(ids) - noise)
    last = first_sentinel - spans
    if last < 0 or bool(((ids >= last) & (ids <= first_sentinel)).any()):
        raise ValueError(f"first_sentinel={first_sentinel}; allowed: one down from which {spans + 1} are not in ids")
    lengths = torch.stack([_parts(total, spans, generator) for total in (len(ids) - noise, noise)], dim=1)
    is_noise = (torch.arange(2 * spans) % 2 == 1).repeat_interleave(lengths.flatten())
    targets = _collapse(ids, ~is_noise, first_sentinel)
    return _collapse(ids, is_noise, first_sentinel), torch.cat((targets, ids.new_tensor([last])))


def _parts(total: int, count: int, generator: Generator) -> Tensor:
    """``count`` positive numbers whose sum is ``total``; all such are equally likely."""
    cuts = torch.randperm(total - 1, generator=generator)[: count - 1].sort().values + 1
    return torch.cat((cuts, torch.tensor([total]))).diff(prepend=torch.tensor([0]))


def _collapse(ids: Tensor, out: Tensor, first_sentinel: int) -> Tensor:
    """A sentinel for each run of True in ``out``, whose first and last element differ."""
    begins = out & ~out.roll(1)
    return ids.where(~begins, first_sentinel + 1 - begins.cumsum(0))[~out | begins]


def denoise(
    ids: Tensor,
    mask_id: int,
    generator: Generator,
    ratio: float = 0.3,
    mean_span: float = 3.0,
    end_of_sentence: int | None = None,
) -> tuple[Tensor, Tensor]:
    """BART's objective (Lewis et al., 2020): a text without begin and end tokens to (inputs, targets = the text).

    With ``end_of_sentence``, the id that closes a sentence, the sentences are shuffled. Then spans are replaced by one
    ``mask_id`` each. Their lengths are drawn from Poisson(mean_span), and the last is cut, so that exactly ``ratio`` of
    the tokens (rounded) are gone; a span of length 0 inserts a mask. All placings of the spans are equally likely.
    """
    _check_share("ratio", ratio)
    text, masked = ids, round(len(ids) * ratio)
    if end_of_sentence is not None:
        sentences = ids.tensor_split((ids == end_of_sentence).nonzero().squeeze(1) + 1)
        text = torch.cat([sentences[i] for i in torch.randperm(len(sentences), generator=generator).tolist()])
    # Should the draws fall short, one more span takes the rest.
    lengths = torch.cat((torch.poisson(torch.full((masked,), float(mean_span)), generator), torch.tensor([masked])))
    ends = lengths.cumsum(0).clamp(max=masked).long()
    spans = ends.diff(prepend=torch.tensor([0]))[: int((ends < masked).sum()) + (masked > 0)]
    # The inputs as slots, in which a token takes one place of the text, and a span as many as its length.
    slots = torch.ones(len(text) - masked + len(spans), dtype=torch.int64)
    at = torch.randperm(len(slots), generator=generator)[: len(spans)]
    slots[at] = spans
    begins = (slots.cumsum(0) - slots).clamp(max=len(text) - 1)
    return text[begins].index_fill(0, at, mask_id), ids


def pad_batch(texts: Sequence[Tensor], pad: int) -> tuple[Tensor, Tensor]:
    """1-D texts to ids (batch, longest) padded on the right, and a mask of that shape (True: a token)."""
    masks = [torch.ones_like(text, dtype=torch.bool) for text in texts]
    return pad_sequence(list(texts), batch_first=True, padding_value=pad), pad_sequence(masks, batch_first=True)


def shift_right(labels: Tensor, start_id: int, pad_id: int) -> Tensor:
    """A decoder's inputs for labels (..., seqlen): the start token, then all labels but the last; -100 is padding."""
    inputs = torch.cat((torch.full_like(labels[..., :1], start_id), labels[..., :-1]), dim=-1)
    return inputs.masked_fill(inputs == IGNORED, pad_id)


def _check_share(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"{name}={value}; allowed: 0 to 1")
