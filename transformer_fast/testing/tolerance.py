"""The one tolerance rule of the project.

A result is right when its error against the float64 oracle is at most twice the error that plain PyTorch
makes in the same dtype, plus a few units in the last place, both by maximum and by root mean square. Nothing
is tuned by hand: a harder problem, or a coarser dtype, widens the allowance exactly as far as it hurts PyTorch.

No test in the project holds a tolerance of its own; all of them come here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

#: How much worse than plain PyTorch a result may be.
FACTOR = 2.0
#: Units in the last place on top: on a small problem PyTorch's own error may be zero by luck, while a sum of a few
#: hundred terms, taken one after the other in float32, is a few units off. In float32 this is a millionth.
ULPS = 8.0


@dataclass(frozen=True)
class Verdict:
    """What the rule says about one tensor. All errors are absolute, in the tensor's own units."""

    name: str
    passed: bool
    #: Largest absolute difference to the oracle: ours, plain PyTorch's, and how much the rule allows.
    our_error: float
    torch_error: float
    allowed: float
    #: The same three by root mean square.
    our_rms: float
    torch_rms: float
    allowed_rms: float
    #: Root mean square of the oracle: divide by it for relative errors.
    scale: float
    #: Empty when passed, else what is wrong in words.
    reason: str = ""

    @property
    def used(self) -> float:
        """The larger share of the allowance that was used: at most 1 when passed; infinite for a wrong pattern."""
        if self.reason and not self.reason.startswith("error"):
            return float("inf")
        return max(_share(self.our_error, self.allowed), _share(self.our_rms, self.allowed_rms))

    def __str__(self) -> str:
        return (
            f"{self.name}: {'pass' if self.passed else 'FAIL'} max {self.our_error:.3g} (torch {self.torch_error:.3g}, "
            f"allowed {self.allowed:.3g}), rms {self.our_rms:.3g} (torch {self.torch_rms:.3g}, "
            f"allowed {self.allowed_rms:.3g}){': ' + self.reason if self.reason else ''}"
        )


class Yardstick:
    """What one result is held against: the oracle, and how far from it the rule lets a result be.

    Args:
        oracle: the quantity computed in float64.
        baseline: the same quantity computed by plain PyTorch in the dtype of the problem, same shape.
        unit: size of a unit in the last place of each element, same shape: larger than that of the element where
            larger numbers cancel, as in the gradient of a softmax over one key, which is zero.
    """

    def __init__(self, oracle: Tensor, baseline: Tensor, unit: Tensor) -> None:
        assert oracle.shape == baseline.shape == unit.shape, (oracle.shape, baseline.shape, unit.shape)
        self.oracle = _float64(oracle)
        finite = self.oracle.isfinite()
        #: Which elements have a number; None if all do.
        self.finite = None if bool(finite.all()) else finite
        numbers = self._numbers(self.oracle)
        # Where plain PyTorch overflows it measures nothing; counting its infinity would allow anything.
        plain = self._numbers(_float64(baseline)) - numbers
        plain = plain[plain.isfinite()]
        units = self._numbers(_float64(unit))
        self.torch_error, self.torch_rms = _largest(plain), _rms(plain)
        self.allowed = FACTOR * self.torch_error + ULPS * _largest(units)
        self.allowed_rms = FACTOR * self.torch_rms + ULPS * _rms(units)
        self.scale = _rms(numbers)

    def _numbers(self, t: Tensor) -> Tensor:
        return t if self.finite is None else t[self.finite]

    def judge(self, ours: Tensor, name: str = "result") -> Verdict:
        """Applies the rule to a result of any float dtype and strides."""
        if ours.shape != self.oracle.shape:
            return _wrong(name, f"shape {tuple(ours.shape)} where {tuple(self.oracle.shape)} is due")
        result = _float64(ours)
        error = self._numbers(result) - self._numbers(self.oracle)
        our_error, our_rms = _largest(error), _rms(error)
        if self.finite is not None or not math.isfinite(our_error):
            mismatch = _pattern_mismatch(result, self.oracle)
            if mismatch:
                return _wrong(name, mismatch)
        # `not <=` rather than `>`: should any of these numbers be NaN, it must not pass.
        exceeded = [
            measure
            for measure, found, allowed in (("max", our_error, self.allowed), ("rms", our_rms, self.allowed_rms))
            if not found <= allowed
        ]
        reason = f"error too large by {' and '.join(exceeded)}" if exceeded else ""
        return Verdict(
            name,
            not reason,
            our_error,
            self.torch_error,
            self.allowed,
            our_rms,
            self.torch_rms,
            self.allowed_rms,
            self.scale,
            reason,
        )


def judge(
    ours: Tensor, oracle: Tensor, baseline: Tensor, *, name: str = "result", unit: Tensor | None = None
) -> Verdict:
    """Applies the tolerance rule to one tensor; for the arguments see :class:`Yardstick`.

    By default the unit in the last place is that of `ours.dtype` at the oracle's magnitude.
    """
    if unit is None:
        unit = oracle.abs() * torch.finfo(ours.dtype).eps
    return Yardstick(oracle, baseline, unit).judge(ours, name)


def _float64(t: Tensor) -> Tensor:
    return t.detach().cpu().double()


def _pattern_mismatch(ours: Tensor, oracle: Tensor) -> str:
    """Words for the first place where NaN or infinity does not match the oracle; empty if all match."""
    same = torch.where(oracle.isfinite(), ours.isfinite(), (ours == oracle) | (ours.isnan() & oracle.isnan()))
    if bool(same.all()):
        return ""
    wrong = (~same).nonzero()
    first = tuple(wrong[0].tolist())
    found, due = float(ours[first]), float(oracle[first])
    return f"{len(wrong)} of {oracle.numel()} elements: {found:.4g} at {first} where {due:.4g} is due"


def _wrong(name: str, reason: str) -> Verdict:
    inf = float("inf")
    return Verdict(name, False, inf, 0.0, 0.0, inf, 0.0, 0.0, 0.0, reason)


def _largest(t: Tensor) -> float:
    return float(t.abs().max()) if t.numel() else 0.0  # NaN if there is one


def _rms(t: Tensor) -> float:
    return float(torch.linalg.vector_norm(t)) / math.sqrt(t.numel()) if t.numel() else 0.0


def _share(error: float, allowed: float) -> float:
    if error == 0.0:
        return 0.0
    return error / allowed if allowed > 0.0 else float("inf")
