"""Runs the launches of a spec again with other tensors, past everything that Triton and we would work out anew.

Making the arguments took 30 us and Triton's binder 20 us more, against 10 us for a small decoding step on the GPU.
What a compiled kernel was specialised for cannot change between two calls of one spec whose tensors are aligned to
16 bytes: then it is called directly.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from .triton_launch import Launch, run_within_limits

Tensors = Sequence[Tensor | None]
_ALIGNMENT = 16


def are_aligned(tensors: Tensors) -> bool:
    """Whether all addresses are multiples of 16 bytes, as Triton assumes of what it compiled for such."""
    # A loop, since all() over a generator costs three times as much, in every call.
    for tensor in tensors:  # noqa: SIM110
        if tensor is not None and tensor.data_ptr() % _ALIGNMENT:
            return False
    return True


def _maker(value: Any, places: dict[int, int]) -> Callable[[Tensors], Any] | None:
    """How to make an argument from the tensors of a call; None where it is the same in every call."""
    if isinstance(value, Tensor):
        place = places[id(value)]
        return lambda tensors: tensors[place]
    if not isinstance(value, tuple):
        return None
    makers = [(i, maker) for i, part in enumerate(value) if (maker := _maker(part, places)) is not None]
    if not makers:
        return None
    fixed, make = list(value), type(value)._make  # type: ignore[attr-defined]  # a named tuple
    for i, _ in makers:
        fixed[i] = None

    def rebuild(tensors: Tensors) -> Any:
        parts = fixed.copy()
        for i, maker in makers:
            parts[i] = maker(tensors)
        return make(parts)

    return rebuild


class _Step:
    """One launch."""

    def __init__(self, launch: Launch, places: dict[int, int]) -> None:
        values = launch.arguments.values()
        makers = [_maker(value, places) for value in values]
        self.makers = [(i, maker) for i, maker in enumerate(makers) if maker is not None]
        self.fixed = [value if maker is None else None for value, maker in zip(values, makers, strict=True)]
        self.grid = (*launch.grid, 1, 1)[:3]
        self.launch = replace(launch, arguments={})  # without the tensors of the first call
        self.constants: list[Any] = []
        self.compiled: Any = None

    def run(self, tensors: Tensors) -> None:
        arguments = self.fixed.copy()
        for i, maker in self.makers:
            arguments[i] = maker(tensors)
        if self.compiled is not None:
            self.compiled(*arguments, *self.constants)
            return
        launch = self.launch
        kernel = run_within_limits(launch, arguments)
        if kernel is not None:  # the interpreter compiles nothing
            self.constants = [launch.constants[name] for name in launch.kernel.arg_names if name in launch.constants]
            self.compiled = kernel[self.grid]


class Repeat:
    """Launches that are made with the tensors of one call, to be run with others of the same layout, in their order."""

    def __init__(self, make: Callable[[Tensors], list[Launch]], tensors: Tensors) -> None:
        # Other objects for the same memory: one tensor in two places (query and key, say) is two tensors next time.
        own = [None if tensor is None else tensor.detach() for tensor in tensors]
        places = {id(tensor): i for i, tensor in enumerate(own) if tensor is not None}
        self.steps = [_Step(launch, places) for launch in make(own)]

    def run(self, tensors: Tensors) -> None:
        """Launches them all; the tensors are aligned."""
        for step in self.steps:
            step.run(tensors)
