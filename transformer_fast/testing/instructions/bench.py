"""Runs checks and compares: what all of them share."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple

import torch


class Result(NamedTuple):
    """How one check ended; `detail` is empty or says what is wrong."""

    name: str
    passed: bool
    detail: str
    seconds: float = 0.0


class Comparison(NamedTuple):
    """What came, on whatever device, and what had to come; equal bit by bit, but that any NaN is as good as another."""

    variant: str
    actual: torch.Tensor
    expected: torch.Tensor


@dataclass(frozen=True)
class Geometry:
    """A TMA descriptor (TensorGeometry of cuda/device.cuh): sizes and boxes from the fastest dimension on."""

    data: torch.Tensor
    size: tuple[int, ...]
    stride: tuple[int, ...]  # in bytes, from dimension 1 on
    box: tuple[int, ...]
    swizzled: bool = True

    def fields(self) -> dict[str, object]:
        """As the native module takes them."""
        dtype = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}[self.data.dtype]
        return {
            "dtype": dtype,
            "data": self.data.data_ptr(),
            "size": list(self.size),
            "stride": list(self.stride),
            "box": list(self.box),
            "swizzle_128": self.swizzled,
        }

    def box_bytes(self) -> int:
        """Bytes of shared memory that a box takes."""
        count = self.data.element_size()
        for n in self.box:
            count *= n
        return count


class Bench:
    """A native module with `run_check`, the device of its tensors, and random numbers from a seed."""

    def __init__(self, module: ModuleType, device: torch.device | str, seed: int = 0) -> None:
        self.module = module
        self.device = torch.device(device)
        self.generator = torch.Generator().manual_seed(seed)

    def integers(self, low: int, high: int, shape: Sequence[int], dtype: torch.dtype = torch.int32) -> torch.Tensor:
        """Random integers from `low` to `high`, both included, on the CPU."""
        return torch.randint(low, high + 1, tuple(shape), generator=self.generator).to(dtype)

    def permutation(self, n: int) -> list[int]:
        """A random order of 0..n-1."""
        return torch.randperm(n, generator=self.generator).tolist()

    def empty(self, *shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        """An output on the device, every byte 0x7e: nothing that a check computes."""
        size = torch.empty((), dtype=dtype).element_size()
        count = size
        for n in shape:
            count *= n
        return torch.full((count,), 0x7E, dtype=torch.uint8, device=self.device).view(dtype).reshape(shape)

    def run(
        self,
        name: str,
        inputs: Sequence[torch.Tensor],
        outputs: Sequence[torch.Tensor],
        numbers: Sequence[int] = (),
        geometry: Geometry | None = None,
    ) -> None:
        """Run one check's kernel to its end. Inputs may be on the CPU; outputs and the geometry's data may not."""
        held = [x.to(self.device).contiguous() for x in inputs]
        stream = torch.cuda.current_stream().cuda_stream if self.device.type == "cuda" else 0
        fields = None if geometry is None else geometry.fields()
        addresses = [x.data_ptr() for x in held], [x.data_ptr() for x in outputs]
        self.module.run_check(name, *addresses, list(numbers), fields, stream)
        if self.device.type == "cuda":
            torch.cuda.synchronize()


Check = Callable[[Bench], Iterator[Comparison]]
#: Every check by the name of its kernel; the modules of this package fill it.
CHECKS: dict[str, Check] = {}


def check(*names: str) -> Callable[[Callable[[Bench, str], Iterator[Comparison]]], None]:
    """Register a function for these kernels; it is called with the bench and the kernel's name."""

    def register(function: Callable[[Bench, str], Iterator[Comparison]]) -> None:
        for name in names:

            def bound(bench: Bench, name: str = name) -> Iterator[Comparison]:
                return function(bench, name)

            assert name not in CHECKS, name
            CHECKS[name] = bound

    return register


def _bits(x: torch.Tensor) -> torch.Tensor:
    same_size = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return x if x.dtype == torch.bool else x.view(same_size[x.element_size()])


def difference(c: Comparison) -> str:
    """Empty where both are the same, or what differs first."""
    actual, expected = c.actual.cpu(), c.expected.cpu()
    if actual.dtype != expected.dtype or actual.shape != expected.shape:
        raise AssertionError(f"{c.variant}: {actual.dtype} {actual.shape} against {expected.dtype} {expected.shape}")
    wrong = _bits(actual) != _bits(expected)
    if actual.dtype.is_floating_point:
        wrong &= ~(actual.isnan() & expected.isnan())
    if not wrong.any():
        return ""
    where = tuple(int(i) for i in wrong.nonzero()[0])
    count, total = int(wrong.sum()), wrong.numel()
    first = f"{actual[where].item()} instead of {expected[where].item()} at {list(where)}"
    return f"{c.variant}: {count} of {total} differ, {first}"


def run_one(bench: Bench, name: str) -> Result:
    """Run one check; whatever it raises is its result."""
    began = time.perf_counter()
    compared = 0
    try:
        for comparison in CHECKS[name](bench):
            compared += 1
            if detail := difference(comparison):
                return Result(name, False, detail, time.perf_counter() - began)
    except Exception as error:  # the device's errors have many types, and one must not end the others' checks
        return Result(name, False, f"{type(error).__name__}: {error}", time.perf_counter() - began)
    passed = compared > 0
    return Result(name, passed, "" if passed else "nothing was compared", time.perf_counter() - began)


def capability_of(device: torch.device) -> int:
    """Which checks a device can run: 90 has machine code for compute capability 9.0 alone."""
    if device.type != "cuda":
        return 90
    return 90 if torch.cuda.get_device_capability(device)[0] == 9 else 80


def check_names(module: ModuleType, capability: int) -> list[str]:
    """The kernels of the module that check an instruction (and not the emulator's own faults)."""
    return [name for name in module.check_names(capability) if not name.startswith("fault_")]


def run_instruction_checks(module: ModuleType, device: torch.device | str, seed: int = 0) -> list[Result]:
    """Run every check that the device can; a kernel without an expected result counts as failed."""
    bench = Bench(module, device, seed)
    results = []
    for name in check_names(module, capability_of(bench.device)):
        known = name in CHECKS
        results.append(run_one(bench, name) if known else Result(name, False, "no expected result is written"))
    return results
