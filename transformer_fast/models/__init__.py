"""Transformer models on the library's attention: configuration, stacks, heads, and public checkpoints."""

from transformer_fast.models.config import ModelConfig
from transformer_fast.models.heads import CausalLM, SentenceEncoder
from transformer_fast.models.layout import TokenLayout
from transformer_fast.models.pretrained import (
    from_pretrained,
    load_sentence_encoder,
    minilm_folder,
    save_pretrained,
)
from transformer_fast.models.stack import Block, Decoder, Encoder
from transformer_fast.models.text import TokenBatch, Tokenizer

__all__ = [
    "Block",
    "CausalLM",
    "Decoder",
    "Encoder",
    "ModelConfig",
    "SentenceEncoder",
    "TokenBatch",
    "TokenLayout",
    "Tokenizer",
    "from_pretrained",
    "load_sentence_encoder",
    "minilm_folder",
    "save_pretrained",
]
