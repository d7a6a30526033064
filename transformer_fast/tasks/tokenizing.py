"""Tokenizers that are no ``tokenizer.json``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from transformer_fast.models.text import FILE, Tokenizer


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
