"""What a back end is: something that can say whether it can do a spec, and then does it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from ..spec import AttentionSpec, Operands


@dataclass(frozen=True)
class Info:
    """What a machine has of one back end; ``reason`` says why it is not available."""

    name: str
    available: bool
    reason: str | None
    version: str | None
    details: dict[str, Any] = field(default_factory=dict)


class Gradients(NamedTuple):
    """Gradients in the shapes and dtypes of their operands; None where the operand is absent or not asked for."""

    query: Tensor | None
    key: Tensor | None
    value: Tensor | None
    bias: Tensor | None
    sinks: Tensor | None


class Backend(ABC):
    """One adapter: fills the kernel's struct from operands and spec."""

    name: str

    @abstractmethod
    def info(self) -> Info:
        """What this machine has of the back end."""

    @abstractmethod
    def supports(self, spec: AttentionSpec) -> str | None:
        """None if the back end can do the spec, else the reason why not."""

    @abstractmethod
    def path(self, spec: AttentionSpec) -> str:
        """In words, the kernel that would run; for ``explain``."""

    @abstractmethod
    def forward(self, operands: Operands, spec: AttentionSpec, *, need_lse: bool) -> tuple[Tensor, Tensor | None]:
        """``out``, and ``lse`` (may be None unless needed)."""

    @abstractmethod
    def backward(
        self, operands: Operands, spec: AttentionSpec, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None,
        needs: tuple[bool, bool],
    ) -> Gradients:
        """Gradients of query, key and value, and of (bias, sinks) where ``needs`` says so."""
