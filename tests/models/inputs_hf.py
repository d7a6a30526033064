"""Batches for the checkpoints of ``checkpoints_hf.py``, with labels for the loss of each."""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from models.checkpoints_hf import VOCAB, Case
from torch import Tensor

IGNORED = -100


@dataclass(frozen=True)
class Inputs:
    """Arguments of a model, labels among them, and which positions hold real tokens.

    ``keep`` is of the sequence that is put out, ``encoder_keep`` of what an encoder-decoder reads: (batch, seqlen)
    bool, or None for a model that reads no tokens there.
    """

    arguments: dict[str, Any]
    keep: Tensor | None
    encoder_keep: Tensor | None = None


def make_inputs(case: Case, kind: str, seed: int) -> Inputs:
    """A batch of one of ``case.kinds``: the padding's side, "full" for none; and labels for the case's loss."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{case.id} {kind} {seed}".encode()))
    config = getattr(transformers, case.config)(**case.options)
    draw = _Draw(generator, config, case)
    if case.inputs == "image":
        size = (20, 16) if kind == "other size" else draw.image_size
        arguments = {"pixel_values": draw.normal(3, 3, *size)}
        arguments |= {"interpolate_pos_encoding": True} if kind == "other size" else {}
        return Inputs(arguments | draw.labels(3, None), None)
    keep = padding_mask(case.lengths, kind.partition(",")[0])
    if case.inputs == "encoder" or case.inputs == "decoder":
        arguments = draw.ids("input_ids", keep) | ({} if kind == "full" else {"attention_mask": keep.long()})
        if kind.endswith("own positions"):
            arguments["position_ids"] = (keep.cumsum(1) - 1).clamp(min=0)
        return Inputs(arguments | draw.labels(len(keep), keep), keep)
    encoder_keep, arguments = None, {}
    if case.inputs == "seq2seq":
        encoder_keep = keep
        arguments = draw.ids("input_ids", keep) | ({} if kind == "full" else {"attention_mask": keep.long()})
    else:
        arguments["input_features"] = draw.normal(len(keep), config.num_mel_bins, 2 * config.max_source_positions)
    if case.labels == "sequence":
        return Inputs(arguments | draw.labels(len(keep), None), keep, encoder_keep)
    keep = padding_mask(case.decoder_lengths, "full" if kind == "full" else "right")
    if kind != "full":
        arguments |= draw.ids("decoder_input_ids", keep) | {"decoder_attention_mask": keep.long()}
    return Inputs(arguments | draw.labels(len(keep), keep), keep, encoder_keep)


def padding_mask(lengths: Iterable[int], side: str) -> Tensor:
    """(batch, longest) bool, True for real tokens."""
    lengths = torch.tensor(tuple(lengths))
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    return {"full": torch.ones_like(mask), "right": mask, "left": mask.flip(1)}[side]


class _Draw:
    """Random inputs and labels of one case."""

    def __init__(self, generator: torch.Generator, config: transformers.PreTrainedConfig, case: Case) -> None:
        self.generator, self.config, self.case = generator, config, case
        special = {getattr(config, f"{name}_token_id", None) for name in ("pad", "eos", "decoder_start")}
        self.allowed = torch.tensor([token for token in range(VOCAB) if token not in special])

    @property
    def image_size(self) -> tuple[int, int]:
        size = self.config.image_size
        return (size, size) if isinstance(size, int) else size

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def below(self, high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=self.generator)

    def ids(self, name: str, keep: Tensor) -> dict[str, Tensor]:
        ids = self.allowed[self.below(len(self.allowed), *keep.shape)].where(keep, self.config.pad_token_id)
        if self.case.family == "bart" and self.case.labels == "sequence":
            last = keep.long().cumsum(1).argmax(1)
            ids[torch.arange(len(ids)), last] = self.config.eos_token_id
        types = getattr(self.config, "type_vocab_size", 1)
        return {name: ids} | ({"token_type_ids": self.below(types, *keep.shape)} if types > 1 else {})

    def labels(self, batch: int, keep: Tensor | None) -> dict[str, Tensor]:
        kind, count = self.case.labels, self.config.num_labels
        if kind == "sequence":
            if self.config.problem_type == "multi_label_classification":
                return {"labels": self.below(2, batch, count).float()}
            return {"labels": self.normal(batch) if count == 1 else self.below(count, batch)}
        if not kind:
            return {}
        assert keep is not None
        if kind == "spans":
            lengths = keep.sum(1)
            first = keep.long().argmax(1)
            starts, ends = (first + self.below(100, batch) % lengths for _ in range(2))
            starts[2] = keep.shape[1] + 3  # out of reach: not in the loss
            return {"start_positions": starts, "end_positions": ends}
        labels = self.below(count if "TokenClassification" in self.case.model else VOCAB, *keep.shape)
        counted = keep & (self.below(4, *keep.shape) > 0)
        counted[0, -1] = keep[0, -1]
        if kind == "next tokens":
            # What stands before the first token is padding, and its prediction is of no interest.
            counted &= keep.cumsum(1) > 1
        labels = {"labels": labels.where(counted, IGNORED)}
        return labels | ({"next_sentence_label": self.below(2, batch)} if kind == "pretraining" else {})
