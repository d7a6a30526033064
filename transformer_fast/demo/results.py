"""What one run of the demo found: all that the tables, the plot and the report show."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from transformer_fast.demo.encoding import OURS_AND_PYTORCH, Difference, Neighbours
from transformer_fast.demo.speed import Speed, VariantSpeed
from transformer_fast.demo.training import TrainingResult


@dataclass(frozen=True)
class EncoderResults:
    """The pretrained sentence encoder. ``speeds`` is of one batch of ``speed_batch`` sentences."""

    sentences: int
    tokens: int
    seconds: float
    neighbours: list[Neighbours]
    differences: list[Difference]
    speeds: list[Speed]
    speed_batch: int
    speed_seqlen: int
    padding_share: float

    @property
    def difference_to_pytorch(self) -> float:
        """Largest difference of ours to plain eager PyTorch in the same dtype."""
        return next(row.largest for row in self.differences if row.compared == OURS_AND_PYTORCH)

    @property
    def best_speed(self) -> Speed:
        """The fastest way to run the model."""
        return min(self.speeds, key=lambda row: row.milliseconds)


@dataclass(frozen=True)
class DecoderResults:
    """The decoder trained here. Losses in nats a byte; ``speeds`` by task, on ``speed_length`` bytes."""

    parameters: int
    description: str
    training: TrainingResult
    training_bytes: int
    validation_bytes: int
    trigram: float
    prompt: str
    sample: str
    sampled_per_second: float
    speeds: dict[str, list[Speed]]
    speed_length: int

    @property
    def validation(self) -> float:
        """The last validation loss."""
        return self.training.validation[-1][1]


@dataclass(frozen=True)
class DemoResults:
    """Everything."""

    encoder: EncoderResults
    decoder: DecoderResults
    variants: list[VariantSpeed]
    environment: dict[str, Any]
    quick: bool
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)
