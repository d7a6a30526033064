"""What stands on a stack: sentence embeddings, and next-token logits."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transformer_fast.models.config import ModelConfig
from transformer_fast.models.stack import Decoder, Encoder

if TYPE_CHECKING:
    from transformer_fast.generation.cache import KVCache


class SentenceEncoder(nn.Module):
    """An encoder whose mean over each sentence's tokens, scaled to length 1, is the sentence's vector."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        *,
        packed: bool = True,
    ) -> Tensor:
        """``(batch, seqlen)`` ids to unit vectors ``(batch, d)``; arguments as in :class:`Encoder`."""
        rows, layout = self.encoder.encode(input_ids, attention_mask, token_type_ids, packed=packed)
        return F.normalize(layout.mean(rows), dim=-1)


class CausalLM(nn.Module):
    """A decoder with its token embedding as the output projection (tied weights)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        if not config.causal:
            raise ValueError("a language model that predicts the next token needs a configuration with causal=True")
        self.config = config
        self.decoder = Decoder(config)
        self.initialize()

    @torch.no_grad()
    def initialize(self) -> None:
        """Draw fresh weights; what each layer adds to the residual stream shrinks with the number of layers."""
        std = self.config.initializer_range
        residual_std = std / math.sqrt(2 * self.config.num_layers)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 1:
                parameter.fill_(1.0 if name.endswith("norm.weight") else 0.0)
            else:
                adds_to_residual = name.endswith(("attention.out.weight", "mlp.down.weight"))
                parameter.normal_(0.0, residual_std if adds_to_residual else std)

    def logits(self, rows: Tensor) -> Tensor:
        """``(tokens, d)`` to ``(tokens, vocab_size)``."""
        return F.linear(rows, self.decoder.embeddings.tokens.weight)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        """``(batch, seqlen)`` ids to logits ``(batch, seqlen, vocab_size)``; arguments as in :class:`Decoder`."""
        rows, layout = self.decoder.decode(input_ids, attention_mask, cache)
        return layout.to_grid(self.logits(rows))

    def next_token_logits(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, cache: KVCache | None = None
    ) -> Tensor:
        """``(batch, vocab_size)``: the logits after each sequence's last token, and no others."""
        rows, layout = self.decoder.decode(input_ids, attention_mask, cache)
        return self.logits(layout.last_rows(rows))

    def loss(self, input_ids: Tensor) -> Tensor:
        """Mean cross-entropy in nats of each token given those before it; ``input_ids`` (batch, seqlen + 1)."""
        rows, _ = self.decoder.decode(input_ids[:, :-1])
        return F.cross_entropy(self.logits(rows).float(), input_ids[:, 1:].flatten())
