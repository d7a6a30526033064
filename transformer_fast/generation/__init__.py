"""Generating text: caches of keys and values, choosing tokens, and the loop."""

from transformer_fast.generation.cache import CacheShape, CrossCache, KVCache
from transformer_fast.generation.config import GenerationConfig
from transformer_fast.generation.generate import generate
from transformer_fast.generation.speculative import Speculated, speculative_search

__all__ = [
    "CacheShape",
    "CrossCache",
    "GenerationConfig",
    "KVCache",
    "Speculated",
    "generate",
    "speculative_search",
]
