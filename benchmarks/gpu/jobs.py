"""What a process at the device can be asked to do: each kind of job gives one row of plain data."""

from __future__ import annotations

import math
import time
import traceback
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from transformer_fast import UnsupportedError
from transformer_fast.testing.cases import Case
from transformer_fast.testing.runner import Target, check
from transformer_fast.testing.suite import standard_cases
from transformer_fast.testing.verify import DTYPES

from ..measure import NotApplicableError
from . import model
from .check import Judge
from .cuda_module import native_module
from .device import Device
from .peers import DRY_PEERS, PEERS, Peer
from .shapes import SHAPES, Shape
from .timing import Setup, line_up, measured
from .work import Work, make_step, make_work, ours, ours_unpadded

Job = dict[str, Any]
Row = dict[str, Any]

#: A handful of small problems that touch every kernel: the first thing that runs, and what the sanitizer watches.
SMOKE_CASES = {
    case.name: case
    for case in (
        Case("smoke", "smoke_causal_gqa", num_heads=4, seqlen_q=129, num_kv_heads=2, head_dim=64, causal=True),
        Case("smoke", "smoke_packed", seqlens_q=(17, 0, 100), seqlens_k=(17, 5, 130), head_dim=128, causal=True),
        Case("smoke", "smoke_decode", num_heads=8, num_kv_heads=2, seqlen_q=1, seqlen_k=2000, head_dim=128,
             seqlens_k=(2000, 33)),
        Case("smoke", "smoke_bias_dropout", num_heads=2, seqlen_q=40, seqlen_k=70, bias="float", bias_form="1hqk",
             dropout_p=0.2, sinks="finite", softcap=9.0),
    )
}  # fmt: skip


def shape_of(job: Job, device: Device) -> Shape:
    """The shape that a job names, small in a dry run."""
    shape = SHAPES[job["name"]]
    return shape.shrunk() if device.is_dry else shape


# ------------------------------------------------------------------------------------------- environment, correctness


def environment_job(device: Device, job: Job) -> Row:
    """The device, and the limits that figures are shares of."""
    from transformer_fast.testing.environment import environment

    facts = environment() | device.facts()
    del facts["commit"]  # known already, and perhaps better than by looking for .git
    facts["triton"] = facts["backends"]["triton"]["version"]
    facts["limits"] = device.limits()
    return {"status": "ok", "facts": facts}


def conformance_job(device: Device, job: Job) -> Row:
    """One case of the suite in one dtype on one back end, against the float64 oracle."""
    case = SMOKE_CASES.get(job["case"]) or _standard_cases()[job["case"]]
    outcome = check(case, DTYPES[job["dtype"]], Target(job["backend"]), job.get("seed", 0))
    used = max((v.used for v in outcome.verdicts), default=0.0)
    row: Row = {"status": outcome.status, "variant": case.variant, "used": used}
    if outcome.status != "passed":
        row["text"] = str(outcome)
    return row


def instruction_job(device: Device, job: Job) -> Row:
    """One PTX instruction by itself, against what its documentation says."""
    from transformer_fast.testing import instructions
    from transformer_fast.testing.instructions.bench import capability_of

    module = native_module(job["backend"])
    bench = instructions.Bench(module, device.torch_device, job.get("seed", 0))
    if job["name"] not in instructions.check_names(module, capability_of(bench.device)):
        return {"status": "not applicable", "text": "this device does not have it"}
    result = instructions.run_one(bench, job["name"])
    return {"status": "passed" if result.passed else "failed", "text": result.detail}


def _standard_cases() -> dict[str, Case]:
    if not _CASES:
        _CASES.update((case.name, case) for case in standard_cases())
    return _CASES


_CASES: dict[str, Case] = {}


# ------------------------------------------------------------------------------------------------------------- speed


def peers_of(device: Device) -> tuple[Peer, ...]:
    """All of them; in a dry run those of the CPU as well."""
    return (*PEERS, *DRY_PEERS) if device.is_dry else PEERS


def timing_job(device: Device, job: Job) -> Row:
    """One shape: ours and every peer, checked, then timed in turn."""
    shape, backends = shape_of(job, device), job["backends"]
    work = make_work(shape, device.torch_device)
    judge = Judge(work)
    setups: dict[str, Setup] = {name: partial(ours, work, name) for name in backends}
    setups |= {f"{name}_unpadded": partial(ours_unpadded, work, name) for name in backends}
    setups |= {peer.name: partial(peer.setup, work, device) for peer in peers_of(device)}
    deadline = time.monotonic() + job["setup_seconds"]
    without = job.get("without", {})
    line = line_up(work, judge, setups, device, ours=set(backends), without=without, deadline=deadline)
    found = measured(device, line, backends, job["seconds"])
    absent = [name for name in backends if name in line.missing]
    return {
        "status": "wrong" if line.wrong else "not applicable" if absent == backends else "ok",
        "text": "\n".join(f"{name}: {text}" for name, text in line.wrong.items()),
        "group": shape.group,
        "title": shape.title,
        "description": shape.describe(),
        "phase": shape.phase,
        "is_decode": shape.is_decode,
        "flops": shape.flops,
        "bytes_read": shape.bytes_read,
        "peak_bytes": device.peak_bytes(),
    } | found


def compile_job(device: Device, job: Job) -> Row:
    """The first call of ours or flex on a shape, so that its compilation is on disk when the clock runs."""
    shape = shape_of(job, device)
    work = make_work(shape, device.torch_device)
    peers = {peer.name: peer for peer in PEERS}
    start, who = time.perf_counter(), job["contestant"]
    try:
        contestant = peers[who].setup(work, device) if who in peers else ours(work, who)
        if contestant is not None:
            make_step(work, contestant)()
            device.synchronize()
    except (NotApplicableError, UnsupportedError, torch.OutOfMemoryError) as reason:  # many do this at a time
        return {"status": "not applicable", "text": str(reason)[:300]}
    except Exception as reason:
        if who not in peers:
            raise
        return {"status": "not applicable", "text": str(reason)[:300]}
    return {"status": "ok", "first_call_seconds": time.perf_counter() - start}


def launch_job(device: Device, job: Job) -> Row:
    """What a call costs on the host: one decoding step, and forward with backward of a short sequence."""
    shape = LAUNCH_SHAPES[job["name"]]
    work = make_work(shape.shrunk() if device.is_dry else shape, device.torch_device)
    found = {}
    for name, contestant in _who_launches(device, work, job["backends"]).items():
        step = _forward_and_backward(work, contestant) if shape.phase == "backward" else make_step(work, contestant)
        for _ in range(1 if device.is_dry else 5):
            step()
        rounds, calls = (2, 1) if device.is_dry else (9, 40)
        found[name] = sorted(1e6 * device.host_seconds(step, calls) for _ in range(rounds))[rounds // 2]
    return {"status": "ok", "title": shape.title, "description": shape.describe(), "host_us": found}


LAUNCH_SHAPES = {
    shape.name: shape
    for shape in (
        Shape("decode_call", "launch", "one decoding step", num_heads=32, num_kv_heads=8, seqlen_q=1, seqlen_k=1024,
              causal=True),
        Shape("training_call", "launch", "forward and backward, 128 tokens", seqlen_q=128, seqlen_k=128, causal=True,
              head_dim=64, phase="backward"),
    )
}  # fmt: skip


def _who_launches(device: Device, work: Work, backends: list[str]) -> dict[str, Any]:
    sdpa = next(peer for peer in DRY_PEERS if peer.name == "sdpa")
    return {name: ours(work, name) for name in backends} | {"sdpa": sdpa.setup(work, device)}


def _forward_and_backward(work: Work, contestant: Any) -> Callable[[], Any]:
    leaves = [t.detach().requires_grad_() for t in (work.query, work.key, work.value)]
    return lambda: torch.autograd.grad(contestant.forward(*leaves), leaves, work.dout)


def graph_job(device: Device, job: Job) -> Row:
    """A decoding step in a CUDA graph: replays give what the call gives, on new data too."""
    shape = LAUNCH_SHAPES["decode_call"]
    work = make_work(shape.shrunk() if device.is_dry else shape, device.torch_device)
    step = make_step(work, ours(work, job["backend"]))
    replay, captured = device.capture(step)
    replay()
    device.synchronize()
    same = _same(captured["out"], step()["out"])
    for tensor in (work.query, work.key, work.value):
        tensor.neg_().mul_(0.5)
    eager = step()["out"]
    replay()
    device.synchronize()
    follows = _same(captured["out"], eager)
    failures = [text for good, text in ((same, "the first replay"), (follows, "a replay on new data")) if not good]
    microseconds = 1e6 * device.median_seconds(replay, device.most_rounds)
    return {
        "status": "failed" if failures else "ok",
        "text": f"not what the call gives: {', '.join(failures)}" if failures else "",
        "replay_us": microseconds,
    }


def _same(a: Tensor, b: Tensor) -> bool:
    """Bit for bit: a replay is the same kernels on the same numbers."""
    return bool(torch.equal(a, b))


JOBS: dict[str, Callable[[Device, Job], Row]] = {
    "environment": environment_job,
    "instruction": instruction_job,
    "conformance": conformance_job,
    "timing": timing_job,
    "compile": compile_job,
    "launch": launch_job,
    "graph": graph_job,
    "model": model.model_job,
}


# ------------------------------------------------------------------------------------------------------ running a job


def run_job(device: Device, job: Job) -> Row:
    """The row of a job; what it raises becomes a row as well. ``fatal``: this process cannot use its device again."""
    start = time.perf_counter()
    try:
        device.release()
        row = JOBS[job["kind"]](device, job)
    except Exception:
        row = {"status": "error", "text": traceback.format_exc(limit=-6)}
    if row["status"] in ("error", "wrong", "failed") and not device.is_healthy():
        row["fatal"] = True
    row = {key: value for key, value in job.items() if key not in ("setup_seconds", "seconds")} | row
    return plain(row | {"took": round(time.perf_counter() - start, 2), "dry_run": device.is_dry})


def plain(value: Any) -> Any:
    """As JSON can hold it: no NaN, no infinity, five digits."""
    if isinstance(value, dict):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(inner) for inner in value]
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else None
    return value if isinstance(value, (str, int, bool, type(None))) else str(value)
