"""Weights from and to safetensors files, with every name accounted for.

A **key map** says for each parameter of a model which tensors of the file it is made of: one name, or
several whose rows are stacked (a fused query-key-value projection from three files' worth of weights).
A name that is missing, or that nothing asked for, is an error that says so; names known to be of no
use are listed as such by the family that knows why.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from types import ModuleType

KeyMap = Mapping[str, tuple[str, ...]]

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
CONFIG_FILE = "config.json"

# A wrong checkpoint differs in hundreds of names; the first few tell the story.
_NAMES_SHOWN = 8


class CheckpointError(ValueError):
    """The files do not hold what the model needs; the message names the keys."""


def _safetensors() -> ModuleType:
    """The safetensors module, or an error that says how to get it."""
    try:
        import safetensors.torch as module
    except ImportError as error:
        raise ImportError(
            'reading and writing checkpoints needs safetensors: pip install "transformer-fast[demo]"'
        ) from error
    return module


def _safetensors_error() -> type[Exception]:
    from safetensors import SafetensorError

    return SafetensorError


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's ``config.json``."""
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no {CONFIG_FILE}: it is not the folder of a checkpoint")
    return _read_json(path)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} holds a {type(values).__name__}; allowed: a JSON object")
    return values


def weight_files(folder: Path) -> list[Path]:
    """The safetensors file of a folder, or its shards."""
    index = folder / INDEX_FILE
    if index.is_file():
        names = sorted(set(_read_json(index).get("weight_map", {}).values()))
        files = [folder / name for name in names]
    else:
        files = [folder / WEIGHTS_FILE]
    absent = [str(file) for file in files if not file.is_file()]
    if absent:
        raise FileNotFoundError(f"no weights at {', '.join(absent)}")
    return files


def read_tensors(folder: Path, *, skip: Iterable[str] = ()) -> dict[str, Tensor]:
    """All tensors of a folder by name, without those that match one of the ``skip`` patterns in full.

    They are views of the mapped file until something writes to them or casts them.
    """
    patterns = [re.compile(pattern) for pattern in skip]
    tensors: dict[str, Tensor] = {}
    for file in weight_files(folder):
        try:
            tensors.update(_safetensors().load_file(file))
        except _safetensors_error() as error:
            raise CheckpointError(f"{file} is not a safetensors file: {error}") from error
    return {name: t for name, t in tensors.items() if not any(p.fullmatch(name) for p in patterns)}


def identity_map(model: nn.Module) -> KeyMap:
    """The key map of a file that uses the model's own names."""
    return {name: (name,) for name in model.state_dict()}


def load_into(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    key_map: KeyMap | None = None,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> None:
    """Give ``model`` its weights. It may be on the meta device: its parameters are replaced, not copied into.

    Args:
        tensors: what the file holds; every one of them must be used.
        key_map: from the model's names to the file's; None when they are the same.
        dtype, device: what the parameters become; None leaves them as they are in the file.
    """
    key_map = identity_map(model) if key_map is None else key_map
    _check_names(set(tensors), {source for sources in key_map.values() for source in sources})
    wanted = model.state_dict()
    state: dict[str, Tensor] = {}
    for name, sources in key_map.items():
        parts = [tensors[source] for source in sources]
        tensor = parts[0] if len(parts) == 1 else torch.cat(parts)
        if tensor.shape != wanted[name].shape:
            raise CheckpointError(
                f"{' + '.join(sources)} has shape {tuple(tensor.shape)}, and {name} needs {tuple(wanted[name].shape)}"
            )
        state[name] = tensor.to(device=device, dtype=dtype)
    model.load_state_dict(state, strict=True, assign=True)


def _check_names(held: set[str], wanted: set[str]) -> None:
    """Every wanted name is held, and nothing else."""
    problems = []
    for title, names in (("missing", wanted - held), ("unexpected", held - wanted)):
        if names:
            more = ", ..." if len(names) > _NAMES_SHOWN else ""
            problems.append(f"{len(names)} {title}: {', '.join(sorted(names)[:_NAMES_SHOWN])}{more}")
    if problems:
        raise CheckpointError(f"the checkpoint does not fit the model; {'; '.join(problems)}")


def save(model: nn.Module, folder: Path, config: Mapping[str, Any]) -> None:
    """Write ``config`` and the model's weights, under its own names, for :func:`load_into` to read back."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG_FILE).write_text(json.dumps(dict(config), indent=2) + "\n", encoding="utf-8")
    state = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
    _safetensors().save_file(state, folder / WEIGHTS_FILE, metadata={"format": "pt"})
