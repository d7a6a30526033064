"""Labels of texts and of images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from transformer_fast.models import DecoderModel
from transformer_fast.tasks.images import pixel_values
from transformer_fast.tasks.loading import Done, Loaded, Source, batches, load

_HEAD = "a sequence classification head"


class Label(NamedTuple):
    """A label, and its probability; of a regression, its value."""

    label: str
    score: float


@torch.no_grad()
def classify(
    model: Source,
    texts: Sequence[str],
    pairs: Sequence[str] | None = None,
    *,
    batch_size: int = 32,
    on_done: Done = None,
) -> list[list[Label]]:
    """The labels of each text, or of each text with its pair, likeliest first.

    Args:
        model: a folder, a repository on the hub, or what ``load`` gave, with a sequence classification head.
        texts: what is to be labelled; what the model cannot hold is cut, with a warning.
        pairs: a second text for each (a hypothesis, a question), for models that read two.
        batch_size: so many texts at a time.
        on_done: called with the number of texts after each batch.
    """
    loaded = load(model)
    _require(loaded, "classify", images=False)
    if pairs is not None and len(pairs) != len(texts):
        raise ValueError(f"pairs has {len(pairs)} texts; allowed: {len(texts)}, one for each of texts")
    found: list[list[Label]] = []
    for logits in _logits(loaded, texts, pairs, batch_size, on_done):
        found += _labelled(loaded, logits)
    return found


@torch.no_grad()
def classify_images(
    model: Source, images: Sequence[Any], *, batch_size: int = 8, on_done: Done = None
) -> list[list[Label]]:
    """The labels of each image, likeliest first.

    Args:
        model: a folder, a repository on the hub, or what ``load`` gave, of images with a classification head.
        images: paths of files, or Pillow's images; prepared as ``preprocessor_config.json`` says.
        batch_size, on_done: as in :func:`classify`.
    """
    loaded = load(model)
    _require(loaded, "classify_images", images=True)
    found: list[list[Label]] = []
    for batch in batches(images, batch_size, on_done):
        pixels = pixel_values(loaded, batch).to(loaded.model.device)
        found += _labelled(loaded, loaded.model(pixel_values=pixels).logits)
    return found


@torch.no_grad()
def zero_shot(
    model: Source,
    texts: Sequence[str],
    labels: Sequence[str],
    *,
    template: str = "This example is {}.",
    multi_label: bool = False,
    batch_size: int = 32,
    on_done: Done = None,
) -> list[list[Label]]:
    """Labels that the model was never trained on: does the text entail that "this example is" one of them?

    Args:
        model: trained on natural language inference (MNLI); the label that begins with "entail" is found by its name.
        texts: what is to be labelled.
        labels: to choose from.
        template: the hypothesis, ``{}`` standing for a label.
        multi_label: each label by itself (entailed or contradicted), in place of one of them all.
        batch_size: so many pairs of a text and a label at a time.
        on_done: called with the number of pairs after each batch.
    """
    loaded = load(model)
    _require(loaded, "zero-shot classification", images=False)
    names = [name.lower() for name in loaded.labels]
    entail = next((i for i, name in enumerate(names) if name.startswith("entail")), None)
    if entail is None:
        raise ValueError(
            f"zero-shot classification needs a label 'entailment'; {loaded.name} has {', '.join(loaded.labels)}"
        )
    if not labels:
        raise ValueError("labels is empty; allowed: at least one")
    if "{}" not in template:
        raise ValueError(f"template={template!r} has no place for a label; allowed: one with {{}}")
    pairs = [template.format(label) for _ in texts for label in labels]
    each = [text for text in texts for _ in labels]
    logits = _logits(loaded, each, pairs, batch_size, on_done)
    if not logits:
        return []
    scores = torch.cat(logits).float().view(len(texts), len(labels), -1)
    if multi_label or len(labels) == 1:
        contradict = next((i for i, name in enumerate(names) if name.startswith("contra")), -1 if entail == 0 else 0)
        scores = scores[..., [contradict, entail]].softmax(-1)[..., 1]
    else:
        scores = scores[..., entail].softmax(-1)
    return [_sorted(labels, row) for row in scores.tolist()]


def _require(loaded: Loaded, task: str, *, images: bool) -> None:
    loaded.require(task, _HEAD, loaded.model.architecture.head.kind == "sequence")
    front_end = loaded.model.stacks[0].config.front_end
    loaded.require(task, "a model of images" if images else "a model of text", (front_end == "patches") == images)


def _logits(
    loaded: Loaded, texts: Sequence[str], pairs: Sequence[str] | None, batch_size: int, on_done: Done
) -> list[Tensor]:
    """``(batch, num_labels)`` of each batch."""
    if isinstance(loaded.model, DecoderModel) and loaded.model.architecture.token("pad_token_id") is None:
        batch_size = 1  # its head finds a text's last token by the padding behind it
    found = []
    for batch in batches(range(len(texts)), batch_size, on_done):
        part = slice(batch[0], batch[-1] + 1)
        encodings = loaded.encode(texts[part], None if pairs is None else pairs[part], max_seqlen=loaded.max_seqlen)
        found.append(loaded.model(**loaded.inputs(encodings)).logits)
    return found


def _labelled(loaded: Loaded, logits: Tensor) -> list[list[Label]]:
    """Logits ``(batch, num_labels)`` by what they are: of one class among many, of independent labels, or values."""
    head, logits = loaded.model.architecture.head, logits.float()
    if head.problem_type == "regression":
        scores = logits
    elif head.problem_type == "multi_label_classification" or head.num_labels == 1:
        scores = logits.sigmoid()
    else:
        scores = logits.softmax(-1)
    return [_sorted(loaded.labels, row) for row in scores.tolist()]


def _sorted(labels: Sequence[str], scores: Sequence[float]) -> list[Label]:
    found = [Label(label, score) for label, score in zip(labels, scores, strict=True)]
    return sorted(found, key=lambda label: label.score, reverse=True)
