"""Text to token ids and back: through a checkpoint's own ``tokenizer.json``, or any function."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

#: What a checkpoint's tokenizer is called.
FILE = "tokenizer.json"


class TokenBatch(NamedTuple):
    """A padded batch. All ``(batch, seqlen)``: int64 ids, bool mask (True = a token), int64 types."""

    input_ids: Tensor
    attention_mask: Tensor
    token_type_ids: Tensor


class Tokenizer:
    """A ``tokenizer.json`` without the padding and truncation that were saved in it.

    Those are settings of whoever saved the file (MiniLM's pads everything to 128 tokens); here the
    caller says how long a text may be, and a batch is as long as its longest text.

    Args:
        source: the folder of a checkpoint, or a ``tokenizers.Tokenizer``, of which a copy is taken.
        max_seqlen: texts are cut to so many tokens, special ones among them; None for no limit.
        pad_id: what stands at padding; some models read it (RoBERTa counts positions over all else).
    """

    #: Whether encodings say which characters a token stands for.
    has_offsets = True

    def __init__(self, source: str | Path | Any, *, max_seqlen: int | None = None, pad_id: int = 0) -> None:
        self.max_seqlen, self.pad_id = max_seqlen, pad_id
        self._backend = _backend(source)
        self._backend.no_padding()
        self._backend.no_truncation()

    def encode(
        self, texts: Sequence[str], pairs: Sequence[str] | None = None, *, max_seqlen: int | None = None
    ) -> list[Any]:
        """A ``tokenizers.Encoding`` of each text, or of each text and its pair, with the model's special tokens.

        Of their attributes there are ``ids``, ``type_ids``, ``offsets`` (characters, of the text that
        ``sequence_ids`` names: 0, 1, or None for special tokens), ``word_ids``, and ``overflowing``: what was cut.
        ``max_seqlen`` is one more limit besides the tokenizer's own.
        """
        limits = [limit for limit in (self.max_seqlen, max_seqlen) if limit is not None]
        if limits:
            self._backend.enable_truncation(min(limits))
        try:
            inputs = list(texts) if pairs is None else list(zip(texts, pairs, strict=True))
            return list(self._backend.encode_batch(inputs))
        finally:
            self._backend.no_truncation()

    def windows(self, first: str, second: str, *, max_seqlen: int, overlap: int) -> list[Any]:
        """Encodings of ``first`` with one window of ``second`` each, which share ``overlap`` tokens with the next."""
        room = max_seqlen - len(self._backend.encode(first, "").ids)
        if not 0 <= overlap < room:
            raise ValueError(
                f"max_seqlen={max_seqlen} leaves {room} tokens beside a text of {len(first)} characters; "
                f"allowed: more than the overlap of {overlap}"
            )
        self._backend.enable_truncation(max_seqlen, stride=overlap, strategy="only_second")
        try:
            encoding = self._backend.encode(first, second)
        finally:
            self._backend.no_truncation()
        return [encoding, *encoding.overflowing]

    def pad(self, encodings: Sequence[Any], *, padding_side: Literal["left", "right"] = "right") -> TokenBatch:
        """Encodings as one batch."""
        seqlen = max((len(encoding.ids) for encoding in encodings), default=0)
        shape = (len(encodings), seqlen)
        batch = TokenBatch(
            torch.full(shape, self.pad_id, dtype=torch.int64),
            torch.zeros(shape, dtype=torch.bool),
            torch.zeros(shape, dtype=torch.int64),
        )
        for row, encoding in enumerate(encodings):
            length = len(encoding.ids)
            start = seqlen - length if padding_side == "left" else 0
            columns = slice(start, start + length)
            batch.input_ids[row, columns] = torch.tensor(encoding.ids, dtype=torch.int64)
            batch.attention_mask[row, columns] = True
            batch.token_type_ids[row, columns] = torch.tensor(encoding.type_ids, dtype=torch.int64)
        return batch

    def __call__(
        self,
        texts: Sequence[str],
        pairs: Sequence[str] | None = None,
        *,
        padding_side: Literal["left", "right"] = "right",
    ) -> TokenBatch:
        """Encode ``texts``, each with its pair where there are some, padded on the side asked for."""
        return self.pad(self.encode(texts, pairs), padding_side=padding_side)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ``ids``, without special tokens; what is no whole character yet is U+FFFD."""
        return str(self._backend.decode(list(ids), skip_special_tokens=True))

    def token_id(self, token: str) -> int | None:
        """The id of a token by its name, None where there is no such token."""
        found: int | None = self._backend.token_to_id(token)
        return found


class FunctionTokenizer(Tokenizer):
    """Any function as a tokenizer: called with a text, or a text and its pair, it gives ids with the special tokens.

    ``function`` may also give a mapping with ``input_ids`` and perhaps ``token_type_ids``, as a tokenizer of
    ``transformers`` does. ``decode`` is the way back; by default a method of that name, if there is one.
    It tells no offsets and cuts no text.
    """

    has_offsets = False

    def __init__(
        self, function: Callable[..., Any], decode: Callable[[Sequence[int]], str] | None = None, *, pad_id: int = 0
    ) -> None:
        self.function, self.pad_id, self.max_seqlen = function, pad_id, None
        self._method = getattr(function, "decode", None)
        self._decode = decode

    def encode(
        self, texts: Sequence[str], pairs: Sequence[str] | None = None, *, max_seqlen: int | None = None
    ) -> list[Any]:
        """Objects with ``ids`` and ``type_ids``."""
        given = zip(texts, strict=True) if pairs is None else zip(texts, pairs, strict=True)
        return [self._encoding(self.function(*text)) for text in given]

    @staticmethod
    def _encoding(found: Any) -> SimpleNamespace:
        types = None
        if isinstance(found, Mapping):
            found, types = found["input_ids"], found.get("token_type_ids")
        ids = [int(token) for token in found]
        return SimpleNamespace(ids=ids, type_ids=[0] * len(ids) if types is None else list(types), overflowing=[])

    def windows(self, first: str, second: str, *, max_seqlen: int, overlap: int) -> list[Any]:
        raise ValueError(f"windows of a text need the offsets of its tokens: a {FILE}, not a function")

    def decode(self, ids: Sequence[int]) -> str:
        if self._decode is not None:
            return self._decode(list(ids))
        if self._method is None:
            raise ValueError(
                "tokenizer is a function without a way back; allowed: one with a decode method, or decode=..."
            )
        return str(self._method(list(ids), skip_special_tokens=True))

    def token_id(self, token: str) -> int | None:
        return None


def _backend(source: Any) -> Any:
    """A ``tokenizers.Tokenizer`` of one's own."""
    try:
        from tokenizers import Tokenizer as Backend
    except ImportError as error:
        raise ImportError('tokenizing needs tokenizers: pip install "transformer-fast[demo]"') from error
    if not isinstance(source, (str, Path)):
        return Backend.from_str(source.to_str())
    file = Path(source) / FILE
    if not file.is_file():
        raise FileNotFoundError(_how_to_make(Path(source)))
    try:
        return Backend.from_file(str(file))
    except Exception as error:  # its own class of errors is Exception itself
        raise ValueError(f"{file} cannot be read as a tokenizer: {error}") from error


def _how_to_make(folder: Path) -> str:
    others = ("vocab.txt", "vocab.json", "merges.txt", "spiece.model", "tokenizer.model", "source.spm", "target.spm")
    found = ", ".join(name for name in others if (folder / name).is_file()) or "no other vocabulary that is known"
    code = f"from transformers import AutoTokenizer as T; f = {str(folder)!r}; T.from_pretrained(f).save_pretrained(f)"
    return (
        f"{folder} has no {FILE} (there is: {found}). transformers makes one of most vocabularies: "
        f"python -c {shlex.quote(code)}. Where it cannot (Marian's), give a function as the tokenizer, in Python"
    )
