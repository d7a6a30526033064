"""What a back end is: something that can say whether it can do a spec, and then does it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..layout import Order
from ..spec import AttentionSpec, Operands


@dataclass(frozen=True)
class Info:
    """What a machine has of one back end; ``reason`` says why it is not available.

    ``is_error``: it is not available because somebody asked for what cannot be; no call may pass over that.
    """

    name: str
    available: bool
    reason: str | None
    version: str | None
    details: dict[str, Any] = field(default_factory=dict)
    is_error: bool = False


def device_name() -> str:
    """The CUDA device's, or no more than that there is one: a process that may fork must not initialise CUDA."""
    return torch.cuda.get_device_name() if torch.cuda.is_initialized() else "a CUDA device"


class Results(NamedTuple):
    """What forward gives; lse and stats may be None where they were not asked for.

    ``stats`` is for the same back end's backward: float32 (2, *lse.shape), each row's maximum in base 2 and the
    inverse of its sum. The natural-log lse alone would cost float32 gradients some of their accuracy. Without lse a
    back end may have a third plane for it.
    """

    out: Tensor
    lse: Tensor | None
    stats: Tensor | None

    def transposed(self) -> Results:
        """With heads and rows of the output exchanged, as a view."""
        return self._replace(out=self.out.transpose(1, 2))

    def with_lse(self) -> Results:
        """With the lse of its own that backward takes."""
        return self if self.lse is not None or self.stats is None else self._replace(lse=self.stats[2])


class Gradients(NamedTuple):
    """Gradients in the shapes and dtypes of their operands; None where the operand is absent or not asked for."""

    query: Tensor | None
    key: Tensor | None
    value: Tensor | None
    bias: Tensor | None
    sinks: Tensor | None

    def to_order(self, order: Order) -> Gradients:
        """Those of the library's own order as views in this one."""
        if order != "bshd":
            return self
        query, key, value = (None if grad is None else grad.transpose(1, 2) for grad in self[:3])
        return self._replace(query=query, key=key, value=value)


class Runner(ABC):
    """A back end made ready for one spec: fills the kernel's struct from operands and launches it."""

    #: Does autograd differentiate ``forward`` itself (eager PyTorch), to any order?
    is_differentiable = False
    #: Of the tensors and their gradients. The spec has the library's own, "bhsd", whatever this is.
    order: Order = "bhsd"

    def __init__(self, spec: AttentionSpec) -> None:
        self.spec = spec

    @abstractmethod
    def forward(self, operands: Operands, *, need_lse: bool, need_stats: bool) -> Results:
        """The attention itself."""

    @abstractmethod
    def backward(
        self, operands: Operands, results: Results, dout: Tensor, dlse: Tensor | None, *, dbias: bool, dsinks: bool
    ) -> Gradients:
        """Gradients of query, key and value, and of bias and sinks where asked for."""

    def in_order(self, order: Order) -> Runner:
        """One that does the same for tensors of another order than "bhsd", which this is of."""
        return self if order == self.order else _Reordered(self, order)


class _Reordered(Runner):
    """Another runner behind views of its own order."""

    def __init__(self, runner: Runner, order: Order) -> None:
        super().__init__(runner.spec)
        self.runner, self.order, self.is_differentiable = runner, order, runner.is_differentiable

    def forward(self, operands: Operands, *, need_lse: bool, need_stats: bool) -> Results:
        operands = operands.to_bhsd(self.order)
        return self.runner.forward(operands, need_lse=need_lse, need_stats=need_stats).transposed()

    def backward(
        self, operands: Operands, results: Results, dout: Tensor, dlse: Tensor | None, *, dbias: bool, dsinks: bool
    ) -> Gradients:
        given = operands.to_bhsd(self.order), results.transposed(), dout.transpose(1, 2), dlse
        return self.runner.backward(*given, dbias=dbias, dsinks=dsinks).to_order(self.order)


class Backend(ABC):
    """One adapter."""

    name: str

    @abstractmethod
    def info(self) -> Info:
        """What this machine has of the back end."""

    def reason(self, spec: AttentionSpec) -> str | None:
        """None if the back end is there and can do the spec, else the reason why not."""
        info = self.info()
        return self.supports(spec) if info.available else info.reason

    @abstractmethod
    def supports(self, spec: AttentionSpec) -> str | None:
        """None if the back end can do the spec, else the reason why not."""

    @abstractmethod
    def path(self, spec: AttentionSpec) -> str:
        """In words, the kernel that would run; for ``explain``."""

    @abstractmethod
    def prepare(self, spec: AttentionSpec) -> Runner:
        """Everything that depends on the spec alone, done once."""
