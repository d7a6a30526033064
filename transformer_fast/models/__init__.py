"""Transformer models on the library's attention: configuration, stacks, heads, and public checkpoints."""

from transformer_fast.models.config import Architecture, HeadConfig, ModelConfig
from transformer_fast.models.layout import TokenLayout
from transformer_fast.models.model import CausalLM, DecoderModel, EncoderModel, Model, Seq2SeqModel
from transformer_fast.models.output import ModelOutput
from transformer_fast.models.pretrained import (
    SentenceEncoder,
    from_config,
    from_pretrained,
    load_sentence_encoder,
    minilm_folder,
    save_pretrained,
)
from transformer_fast.models.text import TokenBatch, Tokenizer

__all__ = [
    "Architecture",
    "CausalLM",
    "DecoderModel",
    "EncoderModel",
    "HeadConfig",
    "Model",
    "ModelConfig",
    "ModelOutput",
    "Seq2SeqModel",
    "SentenceEncoder",
    "TokenBatch",
    "TokenLayout",
    "Tokenizer",
    "from_config",
    "from_pretrained",
    "load_sentence_encoder",
    "minilm_folder",
    "save_pretrained",
]
