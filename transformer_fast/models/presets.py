"""Published models of which there are no public weights, as configurations: to train anew in small, and to count."""

from __future__ import annotations

from transformer_fast.models.config import Architecture, HeadConfig, ModelConfig


def transformer_2017(vocab_size: int = 37000, *, big: bool = False) -> Architecture:
    """Vaswani et al., 2017, "Attention Is All You Need", table 3: one table for source, target and output."""
    size, heads, inner, dropout = (1024, 16, 4096, 0.3) if big else (512, 8, 2048, 0.1)
    encoder, decoder = (
        ModelConfig(
            vocab_size=vocab_size,
            hidden_size=size,
            num_layers=6,
            num_heads=heads,
            intermediate_size=inner,
            max_positions=1,  # sinusoidal: there is no longest sequence
            causal=is_decoder,
            cross_attention=is_decoder,
            norm_placement="post",
            activation="relu",
            positions="sinusoidal",
            embedding_scale=size**0.5,
            dropout=dropout,
        )
        for is_decoder in (False, True)
    )
    return Architecture(encoder=encoder, decoder=decoder, head=HeadConfig("language"))


def gpt3(num_layers: int = 96, hidden_size: int = 12288, num_heads: int = 96) -> Architecture:
    """Brown et al., 2020, table 2.1: GPT-2 with dense and banded attention by turns. InstructGPT is the same.

    The width of the band is not published; 256 here (Child et al., 2019, use 128 to 256).
    """
    decoder = ModelConfig(
        vocab_size=50257,
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_heads=num_heads,
        intermediate_size=4 * hidden_size,
        max_positions=2048,
        causal=True,
        activation="gelu_tanh",
        sliding_window=256,
        sliding_layers=tuple(range(1, num_layers, 2)),
    )
    return Architecture(decoder=decoder, head=HeadConfig("language"))


def palm(num_layers: int = 118, hidden_size: int = 18432, num_heads: int = 48) -> Architecture:
    """Chowdhery et al., 2022, section 2 and table 1: parallel blocks, one KV head, SwiGLU, no biases, tied tokens."""
    decoder = ModelConfig(
        vocab_size=256000,
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=1,
        head_dim=256,
        intermediate_size=4 * hidden_size,
        max_positions=2048,
        causal=True,
        norm_bias=False,
        norm_placement="parallel",
        activation="swiglu",
        biases=(),
        positions="rope",
    )
    return Architecture(decoder=decoder, head=HeadConfig("language"))
