"""Generating text: the cache of keys and values, sampling, and the loop."""

from transformer_fast.generation.cache import KVCache
from transformer_fast.generation.generate import generate
from transformer_fast.generation.sampling import Sampling, next_tokens

__all__ = ["KVCache", "Sampling", "generate", "next_tokens"]
