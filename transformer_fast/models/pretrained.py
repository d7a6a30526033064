"""From a checkpoint's folder to a model, and back."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from transformer_fast import checkpoints
from transformer_fast.models.base import Model
from transformer_fast.models.config import Architecture
from transformer_fast.models.families import family_of
from transformer_fast.models.families.native import NATIVE, write
from transformer_fast.models.model import build
from transformer_fast.spec import parse_options

if TYPE_CHECKING:
    from transformer_fast.models.families.family import Family


def from_pretrained(
    path: str | Path,
    *,
    architecture: str | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    backend: str = "auto",
) -> Any:
    """Load the model that a checkpoint holds (config.json and safetensors, whole or in shards), ready for inference.

    Args:
        path: a local folder, or a repository on the Hugging Face hub (needs ``huggingface_hub``).
        architecture: the class whose head it gets (``"BertModel"``), in place of ``architectures`` in config.json. What
            the family's other heads have in the file is passed over; what its own needs must be there.
        dtype: of the weights; None keeps the file's.
        device: where they go; None is the CPU.
        backend: the attention back end, as in ``transformer_fast.attention``.

    Returns:
        an :class:`EncoderModel`, :class:`DecoderModel` or :class:`Seq2SeqModel` with its head, in evaluation mode.

    Raises:
        FileNotFoundError, CheckpointError, ValueError: there is no such model; the message says why.
    """
    parse_options(backend=backend)  # raises before the weights are read, not at the first call
    folder = checkpoint_folder(path)
    values = checkpoints.read_config(folder)
    family = family_of(values)
    stray = family.stray
    if values.get("quantization_config"):
        method = values["quantization_config"].get("quant_method")
        raise ValueError(f"{path} is quantized (quant_method={method!r}); allowed: plain weights, without quantization")
    if architecture is not None:
        values, stray = {**values, "architectures": [architecture]}, (*stray, *family.heads_stray())
    checkpoint = checkpoints.Checkpoint(folder, family.prefix)
    model = _build(family, values, checkpoint, folder / checkpoints.CONFIG_FILE)
    checkpoints.load_into(model, checkpoint, family.key_map(model), stray=stray, dtype=dtype, device=device)
    model.tie()
    if dtype is None:  # one dtype, where the file has several: the widest
        model.to(functools.reduce(torch.promote_types, (p.dtype for p in model.parameters())))
    model.generation_defaults = _generation_defaults(folder, values)
    model.set_backend(backend)
    return model.eval()


def from_config(
    config: Mapping[str, Any] | Architecture,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    backend: str = "auto",
) -> Any:
    """A model with fresh weights, from the values of a public config.json or from our own :class:`Architecture`.

    On the meta device it has no weights: parameters can be counted that no machine holds.
    """
    where = torch.device("cpu" if device is None else device)
    if isinstance(config, Architecture):
        with torch.device("meta"):
            model = build(config)
    else:
        model = _build(family_of(config), config, {}, "the configuration")
    model = model.to(dtype or torch.get_default_dtype())
    if where.type != "meta":
        model = model.to_empty(device=where)
        model.tie()
        model.initialize()
    model.set_backend(backend)
    return model


def _build(family: Family, values: Mapping[str, Any], tensors: Mapping[str, Tensor], source: object) -> Model:
    """An empty model on the meta device."""
    try:
        architecture = family.read(values, tensors)
    except (KeyError, TypeError) as error:
        raise checkpoints.CheckpointError(f"{source} is not complete: {error}") from error
    with torch.device("meta"):
        return build(architecture)


def checkpoint_folder(path: str | Path) -> Path:
    """A local folder as it is; a hub id, downloaded."""
    folder = Path(path)
    if folder.exists() or str(path).count("/") != 1 or str(path).startswith((".", "/", "~")):
        return folder
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise FileNotFoundError(
            f"{path} is no folder here; for a hub repository: pip install huggingface_hub"
        ) from error
    return Path(snapshot_download(str(path), allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model"]))


def _generation_defaults(folder: Path, values: Mapping[str, Any]) -> dict[str, Any]:
    """What generation_config.json says, or an older config.json itself."""
    file = folder / checkpoints.GENERATION_FILE
    return checkpoints.read_json(file) if file.is_file() else dict(values)


def save_pretrained(model: Model, path: str | Path) -> None:
    """Write a model so that :func:`from_pretrained` gives it back, and ``transformers`` too where it has its class."""
    architecture, folder = model.architecture, Path(path)
    native = family_of(architecture.values) is NATIVE
    config: dict[str, Any] = {**architecture.values, "dtype": str(model.dtype).removeprefix("torch.")}
    config = write(architecture) if native else config
    config.pop("torch_dtype", None)
    defaults = model.generation_defaults
    more = {} if defaults == architecture.values else {checkpoints.GENERATION_FILE: defaults}
    checkpoints.save(folder, config, checkpoints.export_state_dict(model), more)
