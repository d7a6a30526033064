"""A checkpoint as the tasks need it: a model, its tokenizer, and what its files say besides."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor

from transformer_fast import checkpoints
from transformer_fast.models import from_pretrained
from transformer_fast.models.pretrained import checkpoint_folder
from transformer_fast.tasks.tokenizing import FunctionTokenizer, Tokenizer

#: Told how many more texts are done.
Done: TypeAlias = "Callable[[int], None] | None"
Item = TypeVar("Item")


@dataclass
class Loaded:
    """A model with the folder it came from. ``given`` is a tokenizer in place of the folder's."""

    model: Any
    folder: Path
    given: Any = None

    @property
    def name(self) -> str:
        """The class that the checkpoint's config.json names."""
        names = self.model.architecture.values.get("architectures") or [type(self.model).__name__]
        return str(names[0])

    def require(self, task: str, what: str, holds: bool) -> None:
        """ValueError unless the checkpoint has ``what`` the task needs."""
        if not holds:
            raise ValueError(f"{task} needs {what}; this checkpoint is a {self.name}")

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The one given, or the folder's. Without a padding token, padding is id 0."""
        pad_id = max(self.model.architecture.token("pad_token_id") or 0, 0)
        if isinstance(self.given, Tokenizer):
            mine = copy.copy(self.given)
            mine.pad_id = pad_id
            return mine
        if callable(self.given):
            return FunctionTokenizer(self.given, pad_id=pad_id)
        return Tokenizer(self.folder if self.given is None else self.given, pad_id=pad_id)

    @property
    def max_seqlen(self) -> int | None:
        """The most tokens that the model can read, where there is such a number."""
        config = self.model.stacks[0].config
        return config.max_positions if config.positions == "learned" else None

    @property
    def labels(self) -> list[str]:
        """What each output of a classifier stands for."""
        names = self.model.architecture.values.get("id2label") or {}
        return [str(names.get(str(i), f"LABEL_{i}")) for i in range(self.model.architecture.head.num_labels)]

    def read_json(self, name: str) -> Any:
        """What one of the folder's JSON files holds; None where there is none."""
        file = self.folder / name
        if not file.is_file():
            return None
        try:
            return json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise checkpoints.CheckpointError(f"{file} is not JSON: {error}") from error

    def encode(
        self, texts: Sequence[str], pairs: Sequence[str] | None = None, *, max_seqlen: int | None = None
    ) -> list[Any]:
        """Encodings of texts, or of texts with their pairs, cut to ``max_seqlen`` tokens with a warning."""
        encodings = self.tokenizer.encode(texts, pairs, max_seqlen=max_seqlen)
        vocab_size = self.model.stacks[0].config.vocab_size
        for number, encoding in enumerate(encodings, 1):
            if not encoding.ids:
                raise ValueError(f"text {number} of {len(encodings)} is empty; allowed: at least one token")
            if max(encoding.ids) >= vocab_size:
                raise ValueError(f"the tokenizer gives id {max(encoding.ids)}; allowed: below the model's {vocab_size}")
        cut = sum(bool(encoding.overflowing) for encoding in encodings)
        if cut:
            warnings.warn(f"{cut} of {len(texts)} texts are too long and were cut to {max_seqlen} tokens", stacklevel=3)
        return encodings

    def inputs(self, encodings: Sequence[Any]) -> dict[str, Tensor]:
        """A model's arguments for a batch of encodings, padded on the right."""
        ids, mask, types = (grid.to(self.model.device) for grid in self.tokenizer.pad(encodings))
        arguments = {"input_ids": ids, "attention_mask": mask}
        # A table of one type is for type 0 alone, whatever a tokenizer says; without a table there is none to say.
        return {**arguments, "token_type_ids": types} if self.model.stacks[0].config.token_types > 1 else arguments


#: What every task takes first: a folder, a repository on the hub, or what :func:`load` gave.
Source: TypeAlias = "str | Path | Loaded"


def load(
    source: Source,
    *,
    tokenizer: Any = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    backend: str = "auto",
) -> Loaded:
    """Load a checkpoint once, for any number of calls of the tasks.

    Args:
        source: a folder, or a repository on the Hugging Face hub; what was loaded already comes back as it is.
        tokenizer: in place of the folder's ``tokenizer.json``: a :class:`Tokenizer`, one of the ``tokenizers``
            package, or a function from a text (and its pair) to token ids with special tokens, as
            :class:`FunctionTokenizer` takes it; a tokenizer of ``transformers`` is one.
        dtype, device, backend: as in :func:`transformer_fast.models.from_pretrained`.
    """
    if isinstance(source, Loaded):
        return source
    folder = checkpoint_folder(source)
    return Loaded(from_pretrained(folder, dtype=dtype, device=device, backend=backend), folder, tokenizer)


def batches(items: Sequence[Item], size: int, on_done: Done = None) -> Iterator[Sequence[Item]]:
    """Runs of ``size`` items; ``on_done`` is told of each that has been worked through."""
    if size < 1:
        raise ValueError(f"batch_size={size}; allowed: 1 or more")
    for start in range(0, len(items), size):
        batch = items[start : start + size]
        yield batch
        if on_done is not None:
            on_done(len(batch))
