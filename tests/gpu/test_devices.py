"""What is not here, by stand-ins: the CUDA device line by line, and peers that only a GPU has."""

from __future__ import annotations

import contextlib
import os
import sys
import time
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from transformer_fast.benchmarks import measure
from transformer_fast.benchmarks.gpu import check, jobs, peers
from transformer_fast.benchmarks.gpu.device import CudaDevice, DryDevice
from transformer_fast.benchmarks.gpu.shapes import SHAPES, Shape
from transformer_fast.benchmarks.gpu.work import make_step, make_work

from transformer_fast import attention, attention_varlen

CPU = torch.device("cpu")


def small(name: str) -> Shape:
    return SHAPES[name].shrunk()


def _window(options: dict[str, Any]) -> dict[str, Any]:
    left, right = options.pop("window_size", (-1, -1))
    return options | {"window_size": (left, right), "backend": "reference"}


def _fake_flash_attn() -> types.ModuleType:
    """flash-attn's calls, as its documentation has them, computed by the reference."""
    module: Any = types.ModuleType("flash_attn")

    def flash_attn_func(q: Any, k: Any, v: Any, causal: bool = False, window_size: Any = (-1, -1)) -> Any:
        heads_first = [t.transpose(1, 2) for t in (q, k, v)]
        return attention(*heads_first, **_window({"causal": causal, "window_size": window_size})).transpose(1, 2)

    def flash_attn_varlen_func(
        q: Any,
        k: Any,
        v: Any,
        cu_q: Any,
        cu_k: Any,
        max_q: int,
        max_k: int,
        causal: bool = False,
        window_size: Any = (),
    ) -> Any:
        window_size = window_size or (-1, -1)
        options = _window({"causal": causal, "window_size": window_size})
        return attention_varlen(q, k, v, cu_q, cu_k, max_q, max_k, **options), "the log-sum-exp"

    def flash_attn_with_kvcache(
        q: Any, k_cache: Any, v_cache: Any, cache_seqlens: Any = None, causal: bool = False
    ) -> Any:
        q, k, v = (t.transpose(1, 2) for t in (q, k_cache, v_cache))
        return attention(q, k, v, seqlens_k=cache_seqlens, causal=causal, backend="reference").transpose(1, 2)

    for function in (flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache):
        setattr(module, function.__name__, function)
    return module


@pytest.mark.parametrize("name", [n for n, s in SHAPES.items() if s.group != "forward" or s.goals])
def test_flash_attn_would_do_the_same_work(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn", _fake_flash_attn())
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: name if name == "flash_attn" else None)
    problem = make_work(small(name), CPU)
    peer = next(p for p in peers.PEERS if p.name == "flash_attn")
    if problem.lengths is not None and not problem.shape.is_decode:
        with pytest.raises(measure.NotApplicableError, match="key lengths"):
            peer.setup(problem, DryDevice())
        return
    contestant = peer.setup(problem, DryDevice())
    assert contestant is not None
    assert check.Judge(problem).complaint(contestant, make_step(problem, contestant)())[0] == ""


@pytest.mark.parametrize("version", ["2.10", "2.12"])
@pytest.mark.parametrize("name", ["varlen_causal", "varlen_full", "varlen_causal_backward"])
def test_pytorchs_packed_call_would_do_the_same_work(name: str, version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def old(q: Any, k: Any, v: Any, cu_q: Any, cu_k: Any, max_q: int, max_k: int, is_causal: bool = False) -> Any:
        return attention_varlen(q, k, v, cu_q, cu_k, max_q, max_k, causal=is_causal, backend="reference")

    def new(
        q: Any, k: Any, v: Any, cu_q: Any, cu_k: Any, max_q: int, max_k: int, *, window_size: Any = (-1, -1)
    ) -> Any:
        return old(q, k, v, cu_q, cu_k, max_q, max_k, window_size == (-1, 0))

    module: Any = types.ModuleType("torch.nn.attention.varlen")
    module.varlen_attn = old if version == "2.10" else new
    module.__spec__ = object()
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", module)
    problem = make_work(small(name), CPU)
    contestant = peers._sdpa_varlen(problem, DryDevice())
    assert contestant is not None
    assert check.Judge(problem).complaint(contestant, make_step(problem, contestant)())[0] == ""


class _Event:
    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.time = time.perf_counter()

    def synchronize(self) -> None:
        assert self.time

    def elapsed_time(self, end: _Event) -> float:
        return 1e3 * (end.time - self.time)


class _Graph:
    def replay(self) -> None: ...


def test_the_cuda_device_line_by_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every line of it, with a stand-in for each call into CUDA: names and arguments, not behaviour."""
    found = types.SimpleNamespace(
        name="NVIDIA H100 80GB HBM3",
        major=9,
        minor=0,
        multi_processor_count=132,
        total_memory=2**24,
        L2_cache_size=2**16,
    )
    stream = types.SimpleNamespace(wait_stream=lambda other: None)
    slept = []
    stand_ins: dict[str, Any] = {
        "get_device_properties": lambda index: found,
        "synchronize": lambda: None,
        "Event": _Event,
        "_sleep": slept.append,
        "Stream": lambda: stream,
        "current_stream": lambda: stream,
        "stream": lambda s: contextlib.nullcontext(),
        "CUDAGraph": _Graph,
        "graph": lambda g: contextlib.nullcontext(),
        "empty_cache": lambda: None,
        "max_memory_allocated": lambda: 5,
        "reset_peak_memory_stats": lambda: None,
    }
    for name, stand_in in stand_ins.items():
        assert hasattr(torch.cuda, name), f"torch.cuda has no {name}"
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(CudaDevice, "matmul_size", 16)
    monkeypatch.setattr(CudaDevice, "most_rounds", 2)
    device = CudaDevice("cpu")
    assert device.is_healthy() and device.peak_bytes() == 5
    device.release()
    assert device.seconds(lambda: None, lead=1e-4) > 0
    assert slept and all(isinstance(cycles, int) and cycles > 0 for cycles in slept)
    replay, results = device.capture(lambda: {"out": 3})
    replay()
    assert results == {"out": 3}
    limits = device.limits()
    assert limits["matmul_flops"] > 0 and limits["copy_bytes_per_second"] > 0
    facts = device.facts()
    assert facts["capability"] == "9.0" and facts["multiprocessors"] == 132
    assert callable(device.compiled(lambda x: x))
    row = jobs.run_job(device, {"kind": "timing", "name": "decode_b16_8k", "backends": []})
    assert row["status"] == "error" and "fatal" not in row, "the full shape has no place in a test, its failure has"

    def lost() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    assert jobs.run_job(device, {"kind": "launch", "name": "no such"})["fatal"]


def test_nvidia_smi_is_read_where_there_is_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho '580.1, 1980 MHz, 2619 MHz, 1980 MHz, 600 W, 700 W, 50'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: types.SimpleNamespace(total_memory=2**24))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(CudaDevice, "matmul_size", 4)
    facts = CudaDevice("cpu")._under_load()
    assert facts["driver"] == "580.1"
    assert facts["clocks"]["clocks.sm"] == "1980 MHz" and facts["clocks"]["power.limit"] == "700 W"
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    assert CudaDevice("cpu")._under_load() == {}


def test_dropout_is_seeded_on_the_cpu_for_other_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or a device's own generator would draw another mask than the oracle's."""
    from transformer_fast.testing import cases

    torch.manual_seed(3)
    due = torch.randint(2**60, (1,))
    torch.manual_seed(3)
    real = torch.randint
    monkeypatch.setattr(
        torch, "randint", lambda *a, **k: pytest.fail("drawn there") if "device" in k else real(*a, **k)
    )
    with cases.seeds_of_the_cpu():
        assert torch.equal(torch.randint(2**60, (1,), device="cpu"), due)
