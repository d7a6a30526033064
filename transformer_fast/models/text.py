"""Text to token ids, through a checkpoint's own ``tokenizer.json``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor


class TokenBatch(NamedTuple):
    """A padded batch. All ``(batch, seqlen)``: int64 ids, bool mask (True = a token), int64 types."""

    input_ids: Tensor
    attention_mask: Tensor
    token_type_ids: Tensor


class Tokenizer:
    """A ``tokenizer.json`` without the padding and truncation that were saved in it.

    Those are settings of whoever saved the file (MiniLM's pads everything to 128 tokens); here the
    caller says how long a text may be, and a batch is as long as its longest text.
    """

    def __init__(self, folder: str | Path, *, max_seqlen: int | None = None) -> None:
        try:
            from tokenizers import Tokenizer as Backend
        except ImportError as error:
            raise ImportError('tokenizing needs tokenizers: pip install "transformer-fast[demo]"') from error
        self._backend = Backend.from_file(str(Path(folder) / "tokenizer.json"))
        self._backend.no_padding()
        self._backend.no_truncation()
        if max_seqlen is not None:
            self._backend.enable_truncation(max_seqlen)

    def __call__(self, texts: Sequence[str], *, padding_side: Literal["left", "right"] = "right") -> TokenBatch:
        """Encode ``texts`` with the special tokens of the model, padded on the side asked for."""
        encodings = self._backend.encode_batch(list(texts))
        seqlen = max((len(encoding.ids) for encoding in encodings), default=0)
        shape = (len(encodings), seqlen)
        batch = TokenBatch(
            torch.zeros(shape, dtype=torch.int64),
            torch.zeros(shape, dtype=torch.bool),
            torch.zeros(shape, dtype=torch.int64),
        )
        for row, encoding in enumerate(encodings):
            length = len(encoding.ids)
            start = seqlen - length if padding_side == "left" else 0
            columns = slice(start, start + length)
            batch.input_ids[row, columns] = torch.tensor(encoding.ids)
            batch.attention_mask[row, columns] = True
            batch.token_type_ids[row, columns] = torch.tensor(encoding.type_ids)
        return batch
