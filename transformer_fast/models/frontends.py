"""What turns a model's inputs into the first hidden states: token ids, image patches, or audio frames."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transformer_fast.models.config import ModelConfig
from transformer_fast.models.layers import build_norm, table


def sinusoids(positions: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """``(tokens, size)``: sines in the first half and cosines in the second (Vaswani et al., 2017, as Marian lays it).

    Made from the positions, so that there is no table to store and no longest sequence.
    """
    exponents = torch.arange(0, size, 2, device=positions.device, dtype=torch.float64) / size
    angles = positions[:, None].double() * 10000.0**-exponents
    return torch.cat((angles.sin(), angles.cos()), dim=-1)[:, :size].to(dtype)


class Embeddings(nn.Module):
    """Token, position and token-type embeddings, whichever the configuration has."""

    def __init__(self, config: ModelConfig, tokens: nn.Embedding | None = None) -> None:
        super().__init__()
        size = config.hidden_size
        self.config = config
        self.tokens = tokens or table(config.vocab_size, size, config.padding_id)
        rows, pad = config.max_positions + config.position_offset, config.positions_from_pad
        self.positions = table(rows, size, pad) if config.positions == "learned" else None
        self.types = table(config.token_types, size) if config.token_types else None
        self.norm = build_norm(config) if config.embedding_norm else None

    def forward(self, input_ids: Tensor, positions: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        """``(tokens,)`` ids, positions and types to ``(tokens, d)``.

        Types default to 0, or in GPT to none; a model without types ignores them.
        """
        config = self.config
        x = self.tokens(input_ids)
        if config.embedding_scale != 1.0:
            scale = config.embedding_scale
            x = x * (torch.tensor(scale, dtype=x.dtype, device=x.device) if config.rounded_scale else scale)
        if self.types is not None:
            x = x + (self.types.weight[0] if token_type_ids is None else self.types(token_type_ids))
        elif token_type_ids is not None and config.types_are_tokens:
            x = x + self.tokens(token_type_ids)
        if self.positions is not None:
            x = x + self.positions(positions + config.position_offset)
        elif config.positions == "sinusoidal":
            x = x + sinusoids(positions, config.hidden_size, x.dtype)
        return x if self.norm is None else self.norm(x)


class PatchEmbeddings(nn.Module):
    """An image cut into patches, a class token before them (ViT: Dosovitskiy et al., 2021)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        size, patch = config.hidden_size, config.patch_size
        self.config = config
        self.patches = nn.Conv2d(config.channels, size, kernel_size=patch, stride=patch)
        self.class_token = nn.Parameter(torch.zeros(1, 1, size))
        self.positions = nn.Parameter(torch.zeros(1, config.max_positions, size))

    def forward(self, pixel_values: Tensor, interpolate_pos_encoding: bool = False) -> Tensor:
        """``(batch, channels, height, width)`` to ``(batch, 1 + patches, d)``.

        ``interpolate_pos_encoding`` resizes the position table to an image of another size.
        """
        config, size = self.config, tuple(pixel_values.shape[2:])
        if pixel_values.dim() != 4 or pixel_values.shape[1] != config.channels:
            shape = f"(batch, {config.channels}, height, width)"
            raise ValueError(f"pixel_values has shape {tuple(pixel_values.shape)}; allowed: {shape}")
        if size != config.image_size and not interpolate_pos_encoding:
            raise ValueError(
                f"pixel_values is of {size[0]} x {size[1]} pixels; allowed: {config.image_size[0]} x "
                f"{config.image_size[1]}, or interpolate_pos_encoding=True"
            )
        patches = self.patches(pixel_values.to(self.patches.weight.dtype)).flatten(2).transpose(1, 2)
        x = torch.cat((self.class_token.expand(len(patches), -1, -1), patches), dim=1)
        return x + (self._resized(size) if interpolate_pos_encoding else self.positions)

    def _resized(self, size: tuple[int, ...]) -> Tensor:
        """The table for an image of ``size``: its own is a square one, as the checkpoints' code has it."""
        config = self.config
        grid = [length // patch for length, patch in zip(size, config.patch_size, strict=True)]
        side = math.isqrt(config.max_positions - 1)
        if size[0] == size[1] and grid[0] * grid[1] == config.max_positions - 1:
            return self.positions
        if side * side != config.max_positions - 1:
            raise ValueError(f"image_size={config.image_size} gives no square of patches, which resizing needs")
        table = self.positions[:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2)
        table = F.interpolate(table, size=grid, mode="bicubic", align_corners=False)
        return torch.cat((self.positions[:, :1], table.flatten(2).transpose(1, 2)), dim=1)


class AudioEmbeddings(nn.Module):
    """Two convolutions over the frames of a mel spectrogram, the second by strides of 2 (Whisper)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.config = config
        self.conv1 = nn.Conv1d(config.channels, size, kernel_size=3, padding=1)
        self.conv2 = nn.Conv1d(size, size, kernel_size=3, stride=2, padding=1)
        self.positions = table(config.max_positions, size)
        self.positions.weight.requires_grad_(config.positions_trained)

    @torch.no_grad()
    def initialize_positions(self) -> None:
        """Sines and cosines of positions, whose slowest wave is 10000 radians long (Whisper)."""
        rows, size = self.positions.weight.shape
        frequencies = 10000.0 ** -(torch.arange(size // 2, dtype=torch.float64) / max(size // 2 - 1, 1))
        angles = torch.arange(rows, dtype=torch.float64)[:, None] * frequencies
        self.positions.weight.copy_(torch.cat((angles.sin(), angles.cos()), dim=1))

    def forward(self, input_features: Tensor) -> Tensor:
        """``(batch, mel bins, 2 * max_positions)`` to ``(batch, max_positions, d)``."""
        config = self.config
        expected = (config.channels, 2 * config.max_positions)
        if input_features.dim() != 3 or tuple(input_features.shape[1:]) != expected:
            raise ValueError(f"input_features has shape {tuple(input_features.shape)}; allowed: (batch, *{expected})")
        x = F.gelu(self.conv1(input_features.to(self.conv1.weight.dtype)))
        return F.gelu(self.conv2(x)).transpose(1, 2) + self.positions.weight
