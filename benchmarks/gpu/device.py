"""What differs between a CUDA device and a dry run on the CPU. All else in this folder is the same for both."""

from __future__ import annotations

import gc
import statistics
import subprocess
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

GIBI = 2**30
#: More than this a call's launches never take on the host; a device that sleeps longer only wastes the budget.
LONGEST_LEAD = 5e-3
NVIDIA_SMI = (
    "driver_version",
    "clocks.sm",
    "clocks.mem",
    "clocks.max.sm",
    "power.draw",
    "power.limit",
    "temperature.gpu",
)


class Device(ABC):
    """A clock, a cache to flush, and the limits of a machine."""

    is_dry: bool
    torch_device: torch.device
    #: Rows of the square matrices whose product is the limit of arithmetic, and bytes of the copied buffer.
    matmul_size: int
    copy_bytes: int
    fewest_rounds: int
    most_rounds: int
    #: Told who is at work: if this process does not survive it, the name is known.
    notify: Callable[[str], None] = staticmethod(lambda name: None)

    @abstractmethod
    def synchronize(self) -> None: ...

    @abstractmethod
    def seconds(self, step: Callable[[], Any], lead: float = 0.0) -> float:
        """One call with a cold cache. ``lead``: how long the host needs to launch it."""

    @abstractmethod
    def capture(self, step: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """A function that replays the call, and the tensors that the replay writes."""

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """What a report says about the device."""

    @abstractmethod
    def compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function by torch.compile, for these sizes alone."""

    @abstractmethod
    def peak_bytes(self) -> int:
        """The most memory that was in use since ``release``; 0 where nobody counts."""

    @abstractmethod
    def release(self) -> None:
        """Gives memory back that nobody uses."""

    def is_healthy(self) -> bool:
        """Whether the device still answers: after an illegal access a CUDA context never does again."""
        try:
            self.synchronize()
        except RuntimeError:
            return False
        return True

    def host_seconds(self, step: Callable[[], Any], calls: int = 1) -> float:
        """How long the host is busy with a call, the device being idle before."""
        self.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            step()
        passed = (time.perf_counter() - start) / calls
        self.synchronize()
        return passed

    def median_seconds(self, step: Callable[[], Any], repeats: int) -> float:
        """For limits of the machine."""
        step()
        lead = self.host_seconds(step)
        return statistics.median(self.seconds(step, lead) for _ in range(repeats))

    def limits(self) -> dict[str, float]:
        """FLOP/s of a large bfloat16 product of random numbers, bytes/s (read and written) of a large copy."""
        size, repeats = self.matmul_size, self.most_rounds
        a, b = (torch.randn(size, size, device=self.torch_device).to(torch.bfloat16) for _ in range(2))
        matmul = self.median_seconds(lambda: a @ b, repeats)
        source = torch.randn(self.copy_bytes // 4, device=self.torch_device)
        target = torch.empty_like(source)
        copy = self.median_seconds(lambda: target.copy_(source), repeats)
        return {"matmul_flops": 2.0 * size**3 / matmul, "copy_bytes_per_second": 2.0 * source.nbytes / copy}


class CudaDevice(Device):
    """The current CUDA device."""

    is_dry = False
    matmul_size = 8192
    fewest_rounds = 7
    most_rounds = 30

    def __init__(self, torch_device: str = "cuda") -> None:
        self.torch_device = torch.device(torch_device)
        self.properties: Any = torch.cuda.get_device_properties(0)
        self.copy_bytes = min(GIBI, self.properties.total_memory // 16)
        self._cycles_per_second: float | None = None
        self._scratch: Tensor | None = None

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def _flush(self) -> None:
        """Level 2 ends up full of what nobody asks for, and clean: what was only written would have to go back to
        memory while the next call is on the clock.
        """
        if self._scratch is None:
            level_2 = getattr(self.properties, "L2_cache_size", 0) or 64 * 2**20
            self._scratch = torch.empty(2, max(2 * level_2, 64 * 2**20) // 4, device=self.torch_device)
        self._scratch[0].zero_()
        self._scratch[1].amax()

    def _sleep(self, seconds: float) -> None:
        """Keeps the device busy while the host launches what comes next, so that the clock sees no gaps: what Python
        costs is a row of its own.
        """
        if seconds <= 0.0:
            return
        if self._cycles_per_second is None:
            cycles = 10**7
            torch.cuda._sleep(cycles)
            self._cycles_per_second = cycles / self._between(lambda: torch.cuda._sleep(cycles))
        torch.cuda._sleep(int(min(seconds, LONGEST_LEAD) * self._cycles_per_second) + 1)

    def _between(self, step: Callable[[], Any]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        step()
        end.record()
        end.synchronize()
        return max(start.elapsed_time(end) * 1e-3, 1e-7)

    def seconds(self, step: Callable[[], Any], lead: float = 0.0) -> float:
        self._flush()
        self._sleep(1.5 * lead + 20e-6)
        return self._between(step)

    def capture(self, step: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = step()
        return graph.replay, results

    def facts(self) -> dict[str, Any]:
        found = self.properties
        facts = {
            "device": found.name,
            "capability": f"{found.major}.{found.minor}",
            "multiprocessors": found.multi_processor_count,
            "memory_gib": round(found.total_memory / GIBI, 1),
            "l2_mib": round(getattr(found, "L2_cache_size", 0) / 2**20, 1),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
        return facts | self._under_load()

    def _under_load(self) -> dict[str, Any]:
        """Driver, clocks and power as nvidia-smi reads them during half a second of products; empty without it."""
        size = self.matmul_size
        a = torch.randn(size, size, device=self.torch_device).to(torch.bfloat16)
        b = torch.empty_like(a)
        for _ in range(400):
            torch.mm(a, a, out=b)
        command = ["nvidia-smi", f"--query-gpu={','.join(NVIDIA_SMI)}", "--format=csv,noheader"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
        except (OSError, subprocess.SubprocessError):
            return {}
        finally:
            self.synchronize()
        values = [value.strip() for value in done.stdout.partition("\n")[0].split(",")]
        read = dict(zip(NVIDIA_SMI, values, strict=False))
        return {"driver": read.pop("driver_version", None), "clocks": read}

    def compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        import torch._functorch.config

        torch._dynamo.reset()  # each shape is a graph of its own: past the recompile limit it would run uncompiled
        # A backward that is timed runs again and again over one graph, whose buffers must not be given away.
        torch._functorch.config.donated_buffer = False
        return torch.compile(function, fullgraph=True, dynamic=False)

    def peak_bytes(self) -> int:
        return int(torch.cuda.max_memory_allocated())

    def release(self) -> None:
        gc.collect()  # closures and graphs of the last job go around in circles
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


class DryDevice(Device):
    """The CPU in place of a device: every line that can run here does, and no figure of it means anything."""

    is_dry = True
    torch_device = torch.device("cpu")
    matmul_size = 64
    copy_bytes = 2**16
    fewest_rounds = 2
    most_rounds = 2

    def synchronize(self) -> None:
        pass

    def seconds(self, step: Callable[[], Any], lead: float = 0.0) -> float:
        start = time.perf_counter()
        step()
        return max(time.perf_counter() - start, 1e-7)

    def capture(self, step: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        results = step()

        def replay() -> None:
            for name, fresh in step().items():
                results[name].copy_(fresh)

        return replay, results

    def facts(self) -> dict[str, Any]:
        from transformer_fast.testing.environment import processor

        return {"device": f"dry run on {processor()}"}

    def compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return function

    def peak_bytes(self) -> int:
        return 0

    def release(self) -> None:
        pass


def open_device(*, dry: bool) -> Device:
    """The device of this process. A dry run's kernels belong to Triton's interpreter, whose bfloat16 is repaired."""
    if not dry:
        return CudaDevice()
    from transformer_fast.testing.interpreter import repair_bfloat16

    repair_bfloat16()
    return DryDevice()
