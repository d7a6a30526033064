"""Tuning on request: which neighbour of the table's row is fastest for a problem on this machine.

No call tunes by itself: the table of ``kernels.configs`` serves without. What :func:`tune` finds is kept in a file,
which every later process reads, and nothing else is changed by it.
"""

from __future__ import annotations

import json
import os
import statistics
import time
import warnings
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..kernels import configs
from ..spec import AttentionSpec, Operands, UnsupportedError, make_spec, parse_options

#: Where the file lies; the interpreter's findings mean nothing and are kept only where this names a place.
CACHE_VARIABLE = "TRANSFORMER_FAST_TUNING"
_PHASES = ("forward", "decode", "dkdv", "dk", "dv", "dq")


def cache_path() -> Path:
    """The file of findings: $TRANSFORMER_FAST_TUNING, or ~/.cache/transformer_fast/triton.json."""
    asked = os.environ.get(CACHE_VARIABLE)
    return Path(asked) if asked else Path.home() / ".cache" / "transformer_fast" / "triton.json"


def _key(machine: configs.Machine, phase: str, head_dim: int, itemsize: int, precision: str) -> str:
    import triton

    column = next(size for size in configs.HEAD_DIMS if head_dim <= size)
    kind = "interpreter" if machine.is_interpreted else f"sm_{machine.capability} x {machine.num_sms}"
    return f"triton {triton.__version__}, {kind}, {phase}, head_dim {column}, {8 * itemsize} bits, {precision}"


@cache
def _findings(path: Path, changed: float) -> dict[str, configs.Config]:
    return {key: configs.Config(*row) for key, row in json.loads(path.read_text(encoding="utf-8")).items()}


def found(machine: configs.Machine, phase: str, head_dim: int, itemsize: int, precision: str) -> configs.Config | None:
    """What tuning found for a kernel, or None. A file that cannot be read is said once and passed over."""
    if machine.is_interpreted and CACHE_VARIABLE not in os.environ:
        return None
    try:
        path = cache_path()
        if not path.exists():
            return None
        return _findings(path, path.stat().st_mtime).get(_key(machine, phase, head_dim, itemsize, precision))
    except (OSError, RuntimeError, ValueError, TypeError, AttributeError) as error:
        warnings.warn(f"the file of Triton's tuning is passed over: {error}", RuntimeWarning, stacklevel=2)
        return None


def _seconds(run: Callable[[], None], device: torch.device, repeats: int) -> float:
    """Median time of a launch."""
    run()  # compiles
    samples = []
    for _ in range(repeats):
        if device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            run()
            end.record()
            end.synchronize()
            samples.append(begin.elapsed_time(end) / 1e3)
        else:
            start = time.perf_counter()
            run()
            samples.append(time.perf_counter() - start)
    return statistics.median(samples)


def _results(spec: AttentionSpec, given: Operands) -> dict[str, Tensor | None]:
    """Tensors for everything that forward and backward write, and a gradient to start from."""
    from ..layout import new_output

    numbers = given.query.new_empty
    return dict(
        out=new_output(given.query, spec.head_dim_v),
        lse=numbers(spec.lse_shape, dtype=torch.float32),
        stats=numbers((2, *spec.lse_shape), dtype=torch.float32),
        dout=torch.ones_like(new_output(given.query, spec.head_dim_v)),
        delta=numbers(spec.lse_shape, dtype=torch.float32),
    )


def tune(
    query: Tensor, key: Tensor, value: Tensor, *, backward: bool = True, repeats: int = 20, **options: Any
) -> dict[str, dict[str, float]]:
    """Times the candidates of each kernel on a problem and keeps the fastest, for this and later processes.

    Args:
        query, key, value: as :func:`transformer_fast.attention` takes them, padded; on the device to tune for.
        backward: also tune the kernels of the backward pass.
        repeats: samples of each candidate; their median counts.
        options: causal, window_size, softcap and the like, as of :func:`transformer_fast.attention`.

    Returns:
        for each kernel the time of each candidate over that of the table's row, as words: ratio.

    Raises:
        ValueError, TypeError, UnsupportedError: as :func:`transformer_fast.attention` with ``backend="triton"``, and
            ValueError for dropout.
    """
    from . import REGISTRY
    from .triton import _machine, _on, _precision, _set_allocator
    from .triton_launch import Launch
    from .triton_plan import Planner

    if options.get("dropout_p"):
        raise ValueError(f"dropout_p is {options['dropout_p']}; allowed: 0, tuning is done without")
    given = Operands(query, key, value)
    spec = make_spec(given, parse_options(**options))
    reason = REGISTRY["triton"].info().reason or REGISTRY["triton"].supports(spec)
    if reason:
        raise UnsupportedError(f"the Triton back end cannot do this: {reason}")
    machine, precision = _machine(spec.device), _precision(spec.dtype)
    head_dim, itemsize = max(spec.head_dim, spec.head_dim_v), spec.dtype.itemsize
    results, grads = _results(spec, given), [torch.empty_like(t) for t in given[:3]]

    def launches(overrides: dict[str, configs.Config]) -> dict[str, Callable[[], None]]:
        planner = Planner(spec, machine, precision, overrides)
        out, stats, scratch = results["out"], results["stats"], planner.scratch(spec.device)
        made = planner.forward((*given, out, results["lse"], stats, *scratch))
        if backward:
            made += planner.backward((*given, out, stats, results["dout"], None, results["delta"], *grads, None))

        def again(launch: Launch) -> None:
            if scratch.queue is not None and launch.phase == planner.phase:
                scratch.queue.zero_()  # a real call pays for this too
            launch.run()

        return {launch.phase: partial(again, launch) for launch in made}

    ratios: dict[str, dict[str, float]] = {}
    best: dict[str, configs.Config] = {}
    _set_allocator()
    with _on(spec.device):
        for run in launches({}).values():  # what backward reads has to be there
            run()
        for phase in [name for name in launches({}) if name in _PHASES]:
            times: dict[configs.Config, float] = {}
            for candidate in configs.candidates(machine, phase, head_dim, itemsize):
                # One that does not fit runs in a smaller form, and is timed as that.
                times[candidate] = _seconds(launches({phase: candidate})[phase], spec.device, repeats)
            table = next(iter(times.values()))
            ratios[phase] = {_words(candidate): seconds / table for candidate, seconds in times.items()}
            best[_key(machine, phase, head_dim, itemsize, precision)] = min(times, key=times.__getitem__)
    _keep(best)
    return ratios


def _words(config: configs.Config) -> str:
    extra = ", persistent" if config.persistent else ""
    extra += "" if config.tma else ", pointers"
    return f"{config.block_m}x{config.block_n}, {config.num_warps} warps, {config.num_stages} stages{extra}"


def _keep(best: dict[str, configs.Config]) -> None:
    """Adds to the file; whole or not at all, so that a process that reads at the same time reads all of it."""
    path = cache_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    part = path.with_suffix(f".{os.getpid()}")
    part.write_text(json.dumps(known | {key: list(config) for key, config in best.items()}, indent=1), encoding="utf-8")
    part.replace(path)
