"""What the Triton kernels are compiled to, for GPUs that need not be there.

Every launch of a few representative problems is compiled with the very arguments that the back end would launch it
with.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from transformer_fast.spec import AttentionSpec, Operands, make_spec, parse_options
from transformer_fast.testing.kernel_gate import Kernel, UnavailableError
from transformer_fast.testing.machine_code import LIMITS, inspect
from transformer_fast.testing.pool import Progress, in_processes

CAPABILITIES = (80, 90, 100)


@dataclass(frozen=True)
class ReportCase:
    """An attention problem whose kernels are compiled."""

    name: str
    head_dim: int = 128
    dtype: torch.dtype = torch.bfloat16
    seqlen_q: int = 4096
    num_heads: int = 32
    num_kv_heads: int = 8
    packed: bool = False
    page_size: int = 0
    tensors: tuple[str, ...] = ()  # optional operands, by name
    options: dict[str, Any] = field(default_factory=dict)
    phases: tuple[str, ...] | None = None  # those to compile; all by default
    may_spill: bool = False  # registers run out, and no tile is made smaller for it


_CAUSAL = {"causal": True}
_DIMS = (64, 128, 256, 512)  # one for each row of the table of configurations
_TYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
CASES = (
    *(ReportCase(f"{t} {d} causal", d, dtype, options=_CAUSAL) for t, dtype in _TYPES.items() for d in _DIMS),
    *(
        ReportCase(f"{t} {d} decode", d, dtype, seqlen_q=1, tensors=("seqlens_k",), phases=("decode", "combine"))
        for t, dtype in _TYPES.items()
        for d in _DIMS
    ),
    *(
        ReportCase(f"{t} {d} bias", d, dtype, tensors=("bias",), phases=("dbias",))
        for t, dtype in _TYPES.items()
        for d in _DIMS
    ),
    ReportCase("bf16 128 full", num_kv_heads=32),
    ReportCase("bf16 128 packed", packed=True, options=_CAUSAL),
    # A page to a block or more, and pages so small that each row of a block is looked up.
    *(
        ReportCase(f"bf16 128 pages of {n}", seqlen_q=1, page_size=n, tensors=("seqlens_k",), phases=("decode",))
        for n in (16, 128)
    ),
    # As gpt-oss and Gemma 2 have it.
    ReportCase("bf16 64 sinks", 64, tensors=("sinks",), options={"causal": True, "window_size": (127, 0)}),
    ReportCase("bf16 256 softcap", 256, options={"causal": True, "window_size": (4095, 0), "softcap": 50.0}),
    # More than any model has, to see what it costs.
    ReportCase(
        "bf16 128 all",
        tensors=("key_padding_mask", "bias", "alibi_slopes", "sinks"),
        options={"causal": True, "window_size": (1000, 0), "softcap": 30.0, "dropout_p": 0.1},
        phases=("forward", "dkdv", "dq"),
        may_spill=True,
    ),
)


def make_case_spec(case: ReportCase) -> AttentionSpec:
    """The spec of a case, from tensors without data."""
    batch, seqlen_k = 4, 4096
    packed_options = {"max_seqlen_q": case.seqlen_q, "max_seqlen_k": seqlen_k} if case.packed else {}

    def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def tokens(heads: int, length: int) -> Tensor:
        shape = (batch * length, heads, case.head_dim) if case.packed else (batch, heads, length, case.head_dim)
        return meta(*shape, dtype=case.dtype)

    def keys() -> Tensor:
        if not case.page_size:
            return tokens(case.num_kv_heads, seqlen_k)
        pages = batch * seqlen_k // case.page_size
        return meta(pages, case.num_kv_heads, case.page_size, case.head_dim, dtype=case.dtype)

    optional = {
        "cu_seqlens_q": meta(batch + 1, dtype=torch.int32),
        "cu_seqlens_k": meta(batch + 1, dtype=torch.int32),
        "seqlens_k": meta(batch, dtype=torch.int32),
        "key_padding_mask": meta(batch, seqlen_k, dtype=torch.bool),
        "bias": meta(1, case.num_heads, case.seqlen_q, seqlen_k, dtype=case.dtype),
        "alibi_slopes": meta(case.num_heads),
        "sinks": meta(case.num_heads),
        "rng_seed": meta(dtype=torch.int64),
        "block_table": meta(batch, seqlen_k // max(1, case.page_size), dtype=torch.int32),
    }
    names = case.tensors
    names += ("cu_seqlens_q", "cu_seqlens_k") if case.packed else ()
    names += ("block_table",) if case.page_size else ()
    names += ("rng_seed",) if "dropout_p" in case.options else ()
    operands = Operands(
        tokens(case.num_heads, case.seqlen_q),
        keys(),
        keys(),
        **{name: optional[name] for name in names},
    )
    return make_spec(operands, parse_options(**case.options, **packed_options))


# --------------------------------------------------------------------------------------------- what is to be compiled


@dataclass(frozen=True)
class Job:
    """One launch, in words that another process understands: Triton's functions do not travel."""

    case: ReportCase
    capability: int
    index: int


def launches(case: ReportCase, capability: int) -> list[Any]:
    """What the back end would launch for a case, as far as it is to be compiled."""
    from transformer_fast.backends.triton_plan import plan_launches

    planned = plan_launches(make_case_spec(case), capability)
    return [launch for launch in planned if case.phases is None or launch.phase in case.phases]


def _unit(launch: Any, capability: int) -> Any:
    from transformer_fast.testing.ahead_of_time import unit

    config = launch.config
    return unit(
        launch.kernel,
        launch.arguments,
        launch.constants,
        capability,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


def _jobs(cases: Sequence[ReportCase], capabilities: Sequence[int]) -> Iterator[tuple[Job, Kernel]]:
    """Every different compilation once, under the first case that needs it."""
    seen = set()
    for capability in capabilities:
        for case in cases:
            for index, launch in enumerate(launches(case, capability)):
                key = _unit(launch, capability).key
                if key not in seen:
                    seen.add(key)
                    yield Job(case, capability, index), _kernel(case, capability, launch)


def _kernel(case: ReportCase, capability: int, launch: Any) -> Kernel:
    config, constants = launch.config, launch.constants
    return Kernel(
        phase=launch.phase,
        variant=case.name,
        capability=capability,
        tile=(constants.get("BLOCK_M", config.block_m), constants.get("BLOCK_N", config.block_n)),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        promised_ctas=config.ctas_per_sm,
        needs_tensor_cores=case.dtype.itemsize == 2,
        needs_tma=launch.tma,
        may_spill=case.may_spill,
    )


def _compile(job: Job) -> dict[str, Any]:
    """The code, or the error, of a job; runs in a process of its own."""
    launch = launches(job.case, job.capability)[job.index]
    try:
        return {"code": inspect(_unit(launch, job.capability).compile(), job.capability)}
    except Exception as error:  # the other kernels are still to be reported
        return {"error": _reason(error)}


def _reason(error: BaseException) -> str:
    """What is wrong and the line it is wrong in: the last line of what Triton raised first, and the one marked ^."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).strip().splitlines()] or [""]
    marked = next((f" at {before}" for before, line in itertools.pairwise(lines) if line == "^"), "")
    return f"{type(error).__name__}{marked}: {lines[-1]}"


def triton_version() -> str:
    """Triton's version.

    Raises:
        UnavailableError: it is not installed.
        ValueError: it was told to interpret kernels instead of compiling them.
    """
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        raise ValueError("TRITON_INTERPRET is 1; allowed: unset, since the interpreter compiles nothing")
    try:
        import triton
    except ImportError as error:
        raise UnavailableError(f"Triton is not installed ({error}); try: pip install triton") from None
    return str(triton.__version__)


def compile_kernels(
    cases: Sequence[ReportCase] = CASES,
    capabilities: Sequence[int] = CAPABILITIES,
    *,
    workers: int | None = None,
    progress: Progress | None = None,
) -> list[Kernel]:
    """Compiles and reads every different kernel of the cases.

    Args:
        cases: attention problems.
        capabilities: of LIMITS: 90 for compute capability 9.0.
        workers: processes; as many as there are cores by default, and with 1 all is done in this one.
        progress: called after each kernel with (number done, number in all, which).

    Raises:
        ValueError: a capability that nothing is known of.
    """
    for capability in capabilities:
        if capability not in LIMITS:
            raise ValueError(f"capability is {capability}; allowed: {', '.join(map(str, LIMITS))}")
    jobs = list(_jobs(cases, capabilities))
    done: dict[int, Kernel] = {}
    for number, result in in_processes(_compile, [job for job, _ in jobs], workers):
        done[number] = replace(jobs[number][1], **result)
        if progress:
            progress(len(done), len(jobs), done[number].where)
    return [done[number] for number in range(len(jobs))]
