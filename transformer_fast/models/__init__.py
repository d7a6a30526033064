"""Transformer models on the library's attention: configuration, stacks, heads, and public checkpoints."""

from transformer_fast.models.base import Model
from transformer_fast.models.config import Architecture, HeadConfig, ModelConfig
from transformer_fast.models.layout import TokenLayout
from transformer_fast.models.model import CausalLM, DecoderModel, EncoderModel, Seq2SeqModel
from transformer_fast.models.output import ModelOutput
from transformer_fast.models.pretrained import from_config, from_pretrained, save_pretrained

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
    "TokenLayout",
    "from_config",
    "from_pretrained",
    "save_pretrained",
]
