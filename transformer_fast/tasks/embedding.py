"""Vectors of sentences."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from transformer_fast.models import EncoderModel, SentenceEncoder
from transformer_fast.models.pretrained import pooling_of
from transformer_fast.tasks.loading import Done, Loaded, Source, batches, load


@torch.no_grad()
def embed(
    model: Source,
    texts: Sequence[str],
    *,
    pooling: str | None = None,
    normalize: bool | None = None,
    batch_size: int = 32,
    on_done: Done = None,
) -> Tensor:
    """A vector for each text, ``(texts, d)`` float32 on the CPU.

    Args:
        model: a folder, a repository on the hub, or what ``load`` gave: an encoder of text.
        texts: what is to be encoded; what is longer than the checkpoint's files allow is cut, with a warning.
        pooling: "mean" of the tokens or "cls", the first one; default what ``1_Pooling/config.json`` says, or the mean.
        normalize: whether vectors have length 1; default what ``modules.json`` says, or that they do.
        batch_size: so many texts at a time.
        on_done: called with the number of texts after each batch.
    """
    loaded = load(model)
    fits = isinstance(loaded.model, EncoderModel) and loaded.model.config.front_end == "tokens"
    loaded.require("embed", "an encoder of text", fits)
    if pooling is None:
        pooling = pooling_of(loaded.read_json("1_Pooling/config.json"), loaded.folder)
    normalize = _normalizes(loaded) if normalize is None else normalize
    encoder = SentenceEncoder(loaded.model, pooling, normalize=normalize)
    limits = [(loaded.read_json("sentence_bert_config.json") or {}).get("max_seq_length"), loaded.max_seqlen]
    max_seqlen = min((limit for limit in limits if limit), default=None)
    found = [torch.zeros(0, loaded.model.config.hidden_size)]
    for batch in batches(texts, batch_size, on_done):
        vectors = encoder(**loaded.inputs(loaded.encode(batch, max_seqlen=max_seqlen)))
        found.append(vectors.float().cpu())
    return torch.cat(found)


def save_vectors(path: Path, texts: Sequence[str], vectors: Tensor) -> None:
    """Write vectors ``(texts, d)``: the array alone as .npy, or a line of JSON for each text with its vector."""
    if path.suffix == ".npy":
        try:
            import numpy as np
        except ImportError as error:
            raise ImportError("writing .npy needs numpy: pip install numpy") from error
        np.save(path, vectors.numpy())
    else:
        lines = ({"text": text, "vector": vector} for text, vector in zip(texts, vectors.tolist(), strict=True))
        path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")


def _normalizes(loaded: Loaded) -> bool:
    """Whether the checkpoint's modules end in a normalization; ValueError where there is one that is not known here."""
    modules = loaded.read_json("modules.json")
    if modules is None:
        return True
    kinds = [str(module["type"]).rpartition(".")[2] for module in modules]
    unknown = sorted(set(kinds) - {"Transformer", "Pooling", "Normalize"})
    if unknown:
        raise ValueError(
            f"modules.json of {loaded.folder} has {', '.join(unknown)}; allowed: Transformer, Pooling, Normalize"
        )
    return "Normalize" in kinds
