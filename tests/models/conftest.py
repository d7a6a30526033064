"""Small models whose every parameter is random."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TypeVar

import pytest
import torch

from transformer_fast.models import CausalLM, ModelConfig

# Read when transformers is imported, by whichever test comes first.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

Model = TypeVar("Model", bound=torch.nn.Module)


@pytest.fixture(scope="session")
def encoder_config() -> ModelConfig:
    """BERT in small."""
    return ModelConfig(
        vocab_size=50,
        hidden_size=24,
        num_layers=2,
        num_heads=3,
        intermediate_size=40,
        max_positions=32,
        norm_placement="post",
        embedding_norm=True,
        token_types=2,
    )


@pytest.fixture(scope="session")
def decoder_config() -> ModelConfig:
    """Rotary positions, grouped queries, an odd inner size, and on alternate layers a window of 5 tokens."""
    return ModelConfig(
        vocab_size=50,
        hidden_size=24,
        num_layers=3,
        num_heads=6,
        num_kv_heads=2,
        head_dim=6,
        intermediate_size=37,
        max_positions=64,
        causal=True,
        norm="rmsnorm",
        activation="swiglu",
        biases=(),
        positions="rope",
        sliding_window=5,
        sliding_layers=(0, 2),
    )


@pytest.fixture(scope="session")
def randomized() -> Callable[[Model], Model]:
    """Makes norm gains and biases random too: left at 1 and 0, swapped norms would pass unseen."""

    @torch.no_grad()
    def randomize(model: Model) -> Model:
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if name.endswith("norm.weight") else 0.0, 0.3)
        return model

    return randomize


@pytest.fixture
def decoder(decoder_config: ModelConfig, randomized: Callable[[CausalLM], CausalLM]) -> CausalLM:
    return randomized(CausalLM(decoder_config))
