"""What a model is made of: one frozen record, read by every layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

Norm = Literal["layernorm", "rmsnorm"]
NormPlacement = Literal["pre", "post"]
Activation = Literal["gelu", "swiglu"]
Positions = Literal["learned", "rope"]

_CHOICES: dict[str, tuple[str, ...]] = {
    "norm": ("layernorm", "rmsnorm"),
    "norm_placement": ("pre", "post"),
    "activation": ("gelu", "swiglu"),
    "positions": ("learned", "rope"),
}


@dataclass(frozen=True)
class ModelConfig:
    """The facets of one Transformer stack.

    ``num_kv_heads`` defaults to ``num_heads`` and ``head_dim`` to ``hidden_size // num_heads``.

    ``sliding_window`` counts tokens *including* the query's own, as model configurations do;
    :meth:`window_of` is the one place where it becomes the ``(left, right)`` of ``attention``.
    Layer ``i`` slides when ``i % sliding_window_every == 0``: 1 is every layer, 2 is alternate layers.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    max_positions: int
    num_kv_heads: int = 0
    head_dim: int = 0
    causal: bool = False
    norm: Norm = "layernorm"
    norm_placement: NormPlacement = "pre"
    norm_eps: float = 1e-5
    activation: Activation = "gelu"
    linear_bias: bool = True
    positions: Positions = "learned"
    rope_theta: float = 10000.0
    token_types: int = 0
    embedding_norm: bool = False
    sliding_window: int | None = None
    sliding_window_every: int = 1
    initializer_range: float = 0.02

    def __post_init__(self) -> None:
        """Fill in what follows from other fields, and refuse what cannot be built."""
        sizes = ("vocab_size", "hidden_size", "num_layers", "num_heads", "intermediate_size", "max_positions")
        for name in (*sizes, "sliding_window_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.num_kv_heads == 0:
            object.__setattr__(self, "num_kv_heads", self.num_heads)
        if self.head_dim == 0:
            if self.hidden_size % self.num_heads:
                raise ValueError(
                    f"hidden_size={self.hidden_size} is not a multiple of num_heads={self.num_heads}: give head_dim"
                )
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_heads)
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_kv_heads={self.num_kv_heads} must divide num_heads={self.num_heads}")
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} is not one of {', '.join(allowed)}")
        if self.positions == "rope" and self.head_dim % 2:
            raise ValueError(f"rotary positions need an even head_dim, not {self.head_dim}")
        if self.sliding_window is not None and self.sliding_window < 1:
            raise ValueError(f"sliding_window={self.sliding_window} must be at least 1 (it counts the token itself)")

    def window_of(self, layer: int) -> tuple[int, int] | None:
        """The ``window_size`` that layer ``layer`` passes to ``attention``, or None for no window."""
        if self.sliding_window is None or layer % self.sliding_window_every:
            return None
        left = self.sliding_window - 1
        return (left, 0 if self.causal else left)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for a JSON file."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelConfig:
        """The inverse of :meth:`to_dict`; a name it does not know is an error."""
        unknown = sorted(set(values) - {field.name for field in fields(cls)})
        if unknown:
            raise ValueError(f"unknown model configuration: {', '.join(unknown)}")
        return cls(**values)
