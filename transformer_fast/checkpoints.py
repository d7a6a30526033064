"""Weights from and to safetensors files, with every name accounted for.

A **key map** says for each parameter of a model which tensors of the file it is made of: one, or several whose rows
are stacked (a fused query-key-value projection from three files' worth of weights). A name that is missing, or that
nothing asked for, is an error that says so; names known to be of no use are listed as such by the family that knows
why.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from types import ModuleType

    from transformer_fast.models.base import Model

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
CONFIG_FILE = "config.json"
GENERATION_FILE = "generation_config.json"

# A wrong checkpoint differs in hundreds of names; the first few tell the story.
_NAMES_SHOWN = 8

# What norms' parameters were called in checkpoints converted from TensorFlow.
_OLD_NAMES = (("gamma", "weight"), ("beta", "bias"))


class CheckpointError(ValueError):
    """The files do not hold what the model needs; the message names the keys."""


@dataclass(frozen=True)
class Source:
    """Where one parameter comes from.

    Attributes:
        names: tensors of the file whose rows are stacked; with one name, that tensor.
        sizes: rows that each of them gives.
        transposed: the file has it as (in, out).
        is_row: the file has the vector as a matrix of one row.
        others: further names under which the same tensor may stand, or stand again.
        optional: a file may lack it, which is zeros.
    """

    names: tuple[str, ...]
    sizes: tuple[int, ...] = ()
    transposed: bool = False
    is_row: bool = False
    others: tuple[str, ...] = ()
    optional: bool = False


KeyMap = Mapping[str, Source]


def _safetensors() -> ModuleType:
    """The safetensors module, or an error that says how to get it."""
    try:
        import safetensors.torch as module
    except ImportError as error:
        raise ImportError(
            'reading and writing checkpoints needs safetensors: pip install "transformer-fast[demo]"'
        ) from error
    return module


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's ``config.json``."""
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no {CONFIG_FILE}: it is not the folder of a checkpoint")
    return read_json(path)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file."""
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
        places = read_json(index).get("weight_map")
        if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
            raise CheckpointError(f"{index} has no weight_map of file names")
        files = [folder / name for name in sorted(set(places.values()))]
    else:
        files = [folder / WEIGHTS_FILE]
    absent = [str(file) for file in files if not file.is_file()]
    if absent:
        raise FileNotFoundError(f"no weights at {', '.join(absent)}")
    return files


class Checkpoint(Mapping[str, Tensor]):
    """The tensors of a folder by name, read when asked for: there is no copy of all of them.

    Names are without the base model's ``prefix``, which files have or have not, and in today's spelling.
    """

    def __init__(self, folder: Path, prefix: str = "") -> None:
        self.prefix = prefix
        self._places: dict[str, tuple[Any, str]] = {}
        opened = _safetensors().safe_open
        for path in weight_files(folder):
            try:
                file = opened(path, framework="pt")
            except Exception as error:  # safetensors' own, and whatever the reading of a broken header raises
                raise CheckpointError(f"{path} is not a safetensors file: {error}") from error
            self._places |= {self.plain(name): (file, name) for name in file.keys()}  # noqa: SIM118 (not a dict)

    def plain(self, name: str) -> str:
        """A file's name for a tensor, without prefix and old spelling."""
        stem, _, kind = name.removeprefix(self.prefix).rpartition(".")
        return f"{stem}.{dict(_OLD_NAMES).get(kind, kind)}" if stem else kind

    def stored_name(self, name: str) -> str:
        """What the file calls it."""
        return self._places[name][1]

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self.plain(name) in self._places

    def __getitem__(self, name: str) -> Tensor:
        file, stored = self._places[self.plain(name)]
        return file.get_tensor(stored)


def stored_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name; what is shared, once, under its first name."""
    state = model.state_dict(keep_vars=True)
    first: dict[int, str] = {}
    for name, tensor in state.items():
        first.setdefault(id(tensor), name)
    return {name: state[name] for name in first.values()}


def load_into(
    model: nn.Module,
    checkpoint: Checkpoint,
    key_map: KeyMap,
    *,
    stray: Iterable[str] = (),
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> None:
    """Give ``model`` its weights, one parameter at a time. It may be on the meta device: parameters are replaced.

    Args:
        checkpoint: what the files hold; every name must be used.
        key_map: from the model's names to the file's.
        stray: patterns of names that need not be.
        dtype, device: what the parameters become; None leaves them as they are in the file.
    """
    wanted = stored_tensors(model)
    allowed = {checkpoint.plain(n) for source in key_map.values() for n in (*source.names, *source.others)}
    missing = [n for name in wanted for n in _absent(key_map[name], checkpoint)]
    patterns = [re.compile(pattern) for pattern in stray]
    unexpected = [n for n in checkpoint if n not in allowed and not any(p.fullmatch(n) for p in patterns)]
    unexpected = [checkpoint.stored_name(n) for n in unexpected]
    _check_names(missing, unexpected)
    for name, old in wanted.items():
        tensor = _assemble(name, old.shape, key_map[name], checkpoint, dtype)
        if not tensor.dtype.is_floating_point:
            raise CheckpointError(f"{key_map[name].names[0]} is {tensor.dtype}; allowed: floating point, not quantized")
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        if leaf in module._parameters:
            module._parameters[leaf] = nn.Parameter(tensor.to(device), requires_grad=old.requires_grad)
        else:
            module._buffers[leaf] = tensor.to(device)


def _absent(source: Source, checkpoint: Checkpoint) -> list[str]:
    if len(source.names) == 1:
        is_there = source.optional or any(n in checkpoint for n in (*source.names, *source.others))
        return [] if is_there else [source.names[0]]
    return [n for n in source.names if n not in checkpoint]


def _assemble(
    name: str, shape: torch.Size, source: Source, checkpoint: Checkpoint, dtype: torch.dtype | None
) -> Tensor:
    """A parameter from its parts, in memory of its own: a mapped file may be overwritten."""
    held = [n for n in (*source.names, *source.others) if n in checkpoint]
    if not held:
        return torch.zeros(shape, dtype=dtype or checkpoint[next(iter(checkpoint))].dtype)
    if len(source.names) == 1:
        parts = [checkpoint[held[0]]]
        for other in held[1:]:
            if not torch.equal(parts[0], checkpoint[other]):
                raise CheckpointError(f"{other} differs from {held[0]}, and {name} can be only one of them")
    else:
        parts = [checkpoint[n] for n in source.names]
    if source.transposed:
        parts = [part.t() if part.dim() == 2 else part for part in parts]
    if source.is_row:
        parts = [part.squeeze(0) for part in parts]
    found = (sum(part.shape[0] for part in parts), *parts[0].shape[1:]) if parts[0].dim() else ()
    if found != tuple(shape):
        raise CheckpointError(f"{' + '.join(held)} has shape {found}, and {name} needs {tuple(shape)}")
    tensor = torch.empty(shape, dtype=dtype if parts[0].dtype.is_floating_point and dtype else parts[0].dtype)
    place = 0
    for part in parts:
        rows = part.shape[0] if part.dim() else 0
        (tensor[place : place + rows] if len(parts) > 1 else tensor).copy_(part)
        place += rows
    return tensor


def _check_names(missing: list[str], unexpected: list[str]) -> None:
    """Every wanted name is held, and nothing else."""
    problems = []
    for title, names in (("missing", missing), ("unexpected", unexpected)):
        if names:
            more = ", ..." if len(names) > _NAMES_SHOWN else ""
            problems.append(f"{len(names)} {title}: {', '.join(sorted(names)[:_NAMES_SHOWN])}{more}")
    if problems:
        raise CheckpointError(f"the checkpoint does not fit the model; {'; '.join(problems)}")


def export_state_dict(model: Model, tensors: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Tensors under the names that the public checkpoints of the model's family have.

    Args:
        model: from ``from_pretrained`` or ``from_config``.
        tensors: by the model's own parameter names, each in its parameter's shape (weights, gradients, moments);
            None is the model's weights and buffers.

    Returns:
        the same values; fused projections are taken apart (as views), and what a family stores the other way round
        is turned.

    Raises:
        ValueError: a name that is none of the model's, or a tensor of another shape.
    """
    from transformer_fast.models.families import family_of

    stored = stored_tensors(model)
    key_map = family_of(model.architecture.values).key_map(model)
    found: dict[str, Tensor] = {}
    for name, tensor in (stored if tensors is None else tensors).items():
        if name not in stored:
            raise ValueError(f"tensors has {name!r}, which is no parameter of the model")
        if tensor.shape != stored[name].shape:
            raise ValueError(f"tensors[{name!r}] has shape {tuple(tensor.shape)}; allowed: {tuple(stored[name].shape)}")
        source, tensor = key_map[name], tensor.detach()
        parts = [tensor] if len(source.names) == 1 else list(tensor.split(source.sizes))
        if source.transposed:
            parts = [part.t() for part in parts]
        found |= {n: part[None] if source.is_row else part for n, part in zip(source.names, parts, strict=True)}
    return found


def save(
    folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], more: Mapping[str, Mapping[str, Any]]
) -> None:
    """Write ``config`` and ``tensors``, and ``more`` JSON files by name, in place of an older checkpoint's.

    Each file appears whole or not at all.
    """
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    unfinished = folder / "unfinished"
    _safetensors().save_file(weights, unfinished, metadata={"format": "pt"})
    os.replace(unfinished, folder / WEIGHTS_FILE)
    for old in (folder / INDEX_FILE, *folder.glob("model-*-of-*.safetensors")):
        old.unlink(missing_ok=True)
    for name, values in {CONFIG_FILE: config, **more}.items():
        unfinished.write_text(json.dumps(dict(values), indent=2) + "\n", encoding="utf-8")
        os.replace(unfinished, folder / name)
