"""What stands on a stack: hidden states, tokens to come, tokens left out, labels of sequences and tokens, answers.

A head takes rows ``(tokens, d)`` with their layout and gives named results; losses are those of the public classes
whose names the results have.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transformer_fast.linear import ACTIVATIONS
from transformer_fast.models.config import Architecture, HeadConfig
from transformer_fast.models.layers import build_norm
from transformer_fast.models.layout import TokenLayout
from transformer_fast.models.losses import linear_cross_entropy

IGNORED = -100

Targets = Mapping[str, Tensor]
Results = dict[str, Any]


def classification_loss(logits: Tensor, labels: Tensor, kind: str | None) -> Tensor:
    """Of ``(batch, num_labels)`` logits: squared error, cross-entropy, or one binary cross-entropy a label.

    A ``kind`` of None is found from the labels: one output is a regression, whole numbers are classes.
    """
    if kind is None:
        whole = not labels.dtype.is_floating_point
        kind = "regression" if logits.shape[-1] == 1 else f"{'single' if whole else 'multi'}_label_classification"
    if kind == "regression":
        return F.mse_loss(logits.squeeze(), labels.squeeze()) if logits.shape[-1] == 1 else F.mse_loss(logits, labels)
    if kind == "single_label_classification":
        return F.cross_entropy(logits, labels.view(-1))
    if kind == "multi_label_classification":
        return F.binary_cross_entropy_with_logits(logits, labels)
    allowed = "regression, single_label_classification, multi_label_classification"
    raise ValueError(f"problem_type={kind!r} is not one of {allowed}")


def _labels_at_padding(labels: Tensor, keep: Tensor) -> bool:
    """They count in the public classes' loss, so they do here; nobody means them to."""
    found = labels.shape == keep.shape and bool((labels.ne(IGNORED) & ~keep.bool()).any())
    if found:
        warnings.warn(f"labels has labels at padding: it is computed, and counts. Set them to {IGNORED}", stacklevel=3)
    return found


def _row_labels(labels: Tensor, layout: TokenLayout) -> Tensor:
    """``(batch, seqlen)`` labels to those of the rows ``(tokens,)``."""
    if labels.shape != (layout.batch, layout.seqlen):
        allowed = (layout.batch, layout.seqlen)
        raise ValueError(f"labels has shape {tuple(labels.shape)}; allowed: {allowed}, a label for each token")
    return layout.take_rows(labels)


class Head(nn.Module):
    """Hidden states as they are, and the pooled first token where there is a pooler.

    ``targets`` are the names of the labels that :meth:`results` takes.
    """

    targets: tuple[str, ...] = ()

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        self.config: HeadConfig = architecture.head
        size = architecture.stack.hidden_size
        self.pooler = nn.Linear(size, size) if self.config.pooler else None
        self.dropout = nn.Dropout(self.config.dropout)

    def needs_padding(self, ids: Tensor, keep: Tensor, targets: Targets) -> bool:
        """Whether the results depend on tokens that the ``(batch, seqlen)`` mask leaves out: then they are computed."""
        del ids, targets
        return self.pooler is not None and not bool(keep[:, 0].all())

    def pooled(self, rows: Tensor, layout: TokenLayout) -> Tensor:
        """``(batch, d)``: a tanh layer on each sequence's first token."""
        assert self.pooler is not None
        return torch.tanh(self.pooler(layout.first_rows(rows)))

    def results(self, rows: Tensor, layout: TokenLayout, ids: Tensor | None, targets: Targets) -> Results:
        """Named results of the last hidden states; ``ids`` is the grid ``(batch, seqlen)`` that was read."""
        del ids, targets
        found: Results = {"last_hidden_state": layout.to_grid(rows)}
        if self.pooler is not None:
            found["pooler_output"] = self.pooled(rows, layout)
        return found


class LanguageHead(Head):
    """Logits over the vocabulary: of the token after each, or (masked) of each token itself.

    ``next_label`` is 1 where a row's label stands one column on, as causal models take their labels.
    """

    targets: tuple[str, ...] = ("labels",)
    product = staticmethod(F.linear)  # which ``dropin.pack_linears`` exchanges

    def __init__(self, architecture: Architecture, tokens: nn.Embedding) -> None:
        super().__init__(architecture)
        config, stack = self.config, architecture.stack
        alone = architecture.encoder is None or architecture.decoder is None
        self.next_label = int(config.kind == "language" and alone)
        self.dense, self.norm = None, None
        if config.transform is not None:
            self.dense, self.norm = nn.Linear(stack.hidden_size, stack.hidden_size), build_norm(stack)
        # Tied weights are one parameter with two owners; state_dict and files name it once, by the table.
        self.weight = tokens.weight if config.tied else nn.Parameter(torch.zeros_like(tokens.weight))
        bias = torch.zeros(tokens.num_embeddings)
        if not config.bias:
            self.bias = None
        elif config.bias_trained:
            self.bias = nn.Parameter(bias)
        else:
            self.register_buffer("bias", bias)

    def needs_padding(self, ids: Tensor, keep: Tensor, targets: Targets) -> bool:
        """Where padding has labels."""
        if "labels" in targets and _labels_at_padding(self._shifted(targets["labels"]), keep):
            return True
        return super().needs_padding(ids, keep, targets)

    def transformed(self, rows: Tensor) -> Tensor:
        """What the vocabulary projection reads ``(tokens, d)``."""
        if self.dense is not None and self.norm is not None and self.config.transform is not None:
            rows = self.norm(ACTIVATIONS[self.config.transform](self.dense(rows)))
        return rows * self.config.scale if self.config.scale != 1.0 else rows

    def logits(self, rows: Tensor) -> Tensor:
        """``(tokens, d)`` to ``(tokens, vocab_size)``."""
        logits = self.product(self.transformed(rows), self.weight, self.bias)
        cap = self.config.softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def _shifted(self, labels: Tensor) -> Tensor:
        """``(batch, seqlen)``: the label that each column's row predicts."""
        return F.pad(labels, (0, self.next_label), value=IGNORED)[:, self.next_label :]

    def loss(self, rows: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy of the rows' labels ``(tokens,)``, without the logits of all of them at once."""
        config = self.config
        return linear_cross_entropy(self.transformed(rows), self.weight, labels, bias=self.bias, softcap=config.softcap)

    def results(self, rows: Tensor, layout: TokenLayout, ids: Tensor | None, targets: Targets) -> Results:
        """``logits`` (batch, seqlen, vocab_size), and ``loss`` where there are ``labels``."""
        logits = self.logits(rows)
        found: Results = {"logits": layout.to_grid(logits)}
        if "labels" in targets:
            wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
            found["loss"] = F.cross_entropy(wide, _row_labels(self._shifted(targets["labels"]), layout))
        return found


class PretrainingHead(LanguageHead):
    """BERT's two objectives: the tokens left out, and whether the second sentence followed the first."""

    targets = ("labels", "next_sentence_label")

    def __init__(self, architecture: Architecture, tokens: nn.Embedding) -> None:
        super().__init__(architecture, tokens)
        self.relationship = nn.Linear(architecture.stack.hidden_size, 2)

    def results(self, rows: Tensor, layout: TokenLayout, ids: Tensor | None, targets: Targets) -> Results:
        """``prediction_logits``, ``seq_relationship_logits``, and the sum of their losses with both kinds of labels."""
        found = super().results(rows, layout, ids, targets)
        relationship = self.relationship(self.pooled(rows, layout))
        named: Results = {"prediction_logits": found["logits"], "seq_relationship_logits": relationship}
        if "loss" in found and "next_sentence_label" in targets:
            named["loss"] = found["loss"] + F.cross_entropy(relationship, targets["next_sentence_label"].view(-1))
        return named


class SequenceHead(Head):
    """Labels of a whole sequence, read from one of its tokens."""

    targets = ("labels",)

    def __init__(self, architecture: Architecture) -> None:
        super().__init__(architecture)
        config, size = self.config, architecture.stack.hidden_size
        self.pad, self.eos = architecture.token("pad_token_id"), architecture.token("eos_token_id")
        self.dense = nn.Linear(size, size) if config.dense else None
        self.out = nn.Linear(size, config.num_labels, bias=config.bias)

    def needs_padding(self, ids: Tensor, keep: Tensor, targets: Targets) -> bool:
        """The column that stands for the sequence does so, whatever it holds."""
        columns = self._columns(ids)
        return not bool(keep.bool().gather(1, columns[:, None]).all())

    def _columns(self, ids: Tensor) -> Tensor:
        """The column ``(batch,)`` of ``ids`` ``(batch, seqlen)`` that stands for each sequence."""
        device = ids.device
        if self.config.pick == "first":
            return torch.zeros(len(ids), dtype=torch.int64, device=device)
        if self.config.pick == "eos":
            ends = ids.eq(-1 if self.eos is None else self.eos)
            counts = ends.sum(1)
            if not bool((counts == counts[0]).all()) or not bool(counts[0] > 0):
                raise ValueError(
                    f"input_ids has {counts.tolist()} end-of-sequence tokens; allowed: one or more, as many in each"
                )
            return ids.shape[1] - 1 - ends.flip(1).int().argmax(1)
        if self.pad is None:
            if len(ids) != 1:
                raise ValueError(f"a batch of {len(ids)} sequences needs a pad_token_id in the configuration")
            return torch.full((1,), ids.shape[1] - 1, device=device)
        return (torch.arange(ids.shape[1], device=device) * (ids != self.pad)).argmax(1)

    def results(self, rows: Tensor, layout: TokenLayout, ids: Tensor | None, targets: Targets) -> Results:
        """``logits`` (batch, num_labels), and ``loss`` where there are ``labels``."""
        x = layout.first_rows(rows) if ids is None else rows[layout.rows_at(self._columns(ids))]
        if self.dense is not None and self.config.dense is not None:
            x = self.dropout(x) if self.config.dropout_first else x
            x = self.dropout(ACTIVATIONS[self.config.dense](self.dense(x)))
        logits = self.out(x)
        found: Results = {"logits": logits}
        if "labels" in targets:
            found["loss"] = classification_loss(logits, targets["labels"], self.config.problem_type)
        return found


class TokenHead(Head):
    """A label for each token."""

    targets = ("labels",)

    def __init__(self, architecture: Architecture) -> None:
        super().__init__(architecture)
        self.out = nn.Linear(architecture.stack.hidden_size, self.config.num_labels)

    def needs_padding(self, ids: Tensor, keep: Tensor, targets: Targets) -> bool:
        """Only where padding has labels."""
        return "labels" in targets and _labels_at_padding(targets["labels"], keep)

    def results(self, rows: Tensor, layout: TokenLayout, ids: Tensor | None, targets: Targets) -> Results:
        """``logits`` (batch, seqlen, num_labels), and ``loss`` where there are ``labels``."""
        logits = self.out(self.dropout(rows))
        found: Results = {"logits": layout.to_grid(logits)}
        if "labels" in targets:
            found["loss"] = F.cross_entropy(logits, _row_labels(targets["labels"], layout))
        return found


class QuestionHead(Head):
    """Where an answer starts and ends."""

    targets = ("start_positions", "end_positions")

    def __init__(self, architecture: Architecture) -> None:
        super().__init__(architecture)
        self.out = nn.Linear(architecture.stack.hidden_size, 2)

    def needs_padding(self, ids: Tensor, keep: Tensor, targets: Targets) -> bool:
        """The public classes' loss is a softmax over all columns, padding among them."""
        return len(targets) == 2 and not bool(keep.all())

    def results(self, rows: Tensor, layout: TokenLayout, ids: Tensor | None, targets: Targets) -> Results:
        """``start_logits``, ``end_logits`` (batch, seqlen), -inf at padding that was not computed, and ``loss``."""
        grid = self.out(self.dropout(rows))
        if layout.rows is None:
            grid = grid.unflatten(0, (layout.batch, layout.seqlen))
        else:
            grid = layout.to_grid(grid).masked_fill(~layout.mask[..., None], -torch.inf)  # type: ignore[index]
        start, end = grid.unbind(-1)
        found: Results = {"start_logits": start, "end_logits": end}
        if len(targets) == 2:
            places = [targets[name].view(-1).clamp(0, layout.seqlen) for name in self.targets]
            losses = [
                F.cross_entropy(logits, place, ignore_index=layout.seqlen)
                for logits, place in zip((start, end), places, strict=True)
            ]
            found["loss"] = (losses[0] + losses[1]) / 2
        return found


def build_head(architecture: Architecture, tokens: nn.Embedding | None) -> Head:
    """The head that ``architecture`` names; ``tokens`` is the table that a language head may share."""
    kind = architecture.head.kind
    if kind in ("language", "masked", "pretraining"):
        assert tokens is not None
        return (PretrainingHead if kind == "pretraining" else LanguageHead)(architecture, tokens)
    return {"none": Head, "sequence": SequenceHead, "token": TokenHead, "question": QuestionHead}[kind](architecture)
