"""Runs one case on one back end and holds the result against the oracle."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor

from transformer_fast.testing.baseline import alibi_bias, plain_attention, rounding_units, stored_ulp
from transformer_fast.testing.cases import Case, Problem, make_problem
from transformer_fast.testing.tolerance import Verdict, Yardstick

#: How the gradients of the inputs are called in results and reports.
GRADIENT_NAMES = {"query": "dq", "key": "dk", "value": "dv", "bias": "dbias", "sinks": "dsinks"}
Tensors = dict[str, Tensor]


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Inside, PyTorch computes on one thread.

    The eager computations here are many and small: threads would mostly wait for each other, and on a machine with
    other work the waiting took ten times as long as the work.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass(frozen=True)
class Target:
    """A back end, and for the CPU one of its instruction sets."""

    backend: str
    isa: str | None = None

    @property
    def name(self) -> str:
        """As shown in reports: `cpu/avx2`."""
        return f"{self.backend}/{self.isa}" if self.isa else self.backend

    @property
    def device(self) -> str:
        """Where its tensors live."""
        return "cuda" if self.backend in ("cuda", "triton") and torch.cuda.is_available() else "cpu"

    def forced(self) -> contextlib.AbstractContextManager[None]:
        """Inside, calls to the back end use this instruction set."""
        if self.backend == "reference":
            return one_thread()
        if self.backend == "triton" and self.device == "cpu":
            from transformer_fast.testing.interpreter import prepare_interpreter

            prepare_interpreter()  # or bfloat16 would be judged by numbers that are not it
        if self.isa is None:
            return contextlib.nullcontext()
        from transformer_fast.backends.cpu import force_isa

        return force_isa(self.isa)


#: A case takes it seconds: it is for the tests of the kernels it runs, and has to be named.
_SLOW = "emulated"


def available_targets(names: list[str] | None = None) -> list[Target]:
    """The back ends of this machine, the CPU one once per instruction set that the machine can run.

    `names` limits them: a back end ("cpu": all its instruction sets) or a target ("cpu/avx2"). Without names the
    emulator is left out, since it is slow.

    Raises:
        ValueError: a name is unknown, or its back end is not available here; with the reason.
    """
    from transformer_fast import backends

    targets, unavailable = [], {}
    for name, info in backends().items():  # type: ignore[operator]  # a module that can be called
        if not info.available:
            if info.is_error:
                raise ValueError(info.reason)
            unavailable[name] = info.reason
            continue
        isas = info.details.get("isas")
        targets += [Target(name, isa) for isa in isas] if isas else [Target(name)]
    for name in names or []:
        if name in unavailable:
            raise ValueError(f"back end {name!r} is not available here: {unavailable[name]}")
        if not any(name in (t.name, t.backend) for t in targets):
            known = ", ".join(dict.fromkeys([t.backend for t in targets] + [t.name for t in targets]))
            raise ValueError(f"no back end {name!r} here; there are: {known}")
    if names is None:
        return [t for t in targets if t.backend != _SLOW]
    return [t for t in targets if t.backend in names or t.name in names]


@dataclass(frozen=True)
class Expected:
    """What a problem should give: the oracle, plain PyTorch in the same dtype, and units in the last place."""

    oracle: Tensors
    baseline: Tensors
    units: Tensors

    @cached_property
    def yardsticks(self) -> dict[str, Yardstick]:
        """What each result is held against; made once for all targets."""
        return {name: Yardstick(t, self.baseline[name], self.units[name]) for name, t in self.oracle.items()}


@dataclass(frozen=True)
class Outcome:
    """One case on one target in one dtype. `error` is set when there was no result to judge."""

    case: Case
    dtype: torch.dtype
    target: Target
    seed: int
    verdicts: tuple[Verdict, ...] = ()
    unsupported: str | None = None  # the back end's own reason
    error: str | None = None

    @property
    def passed(self) -> bool:
        """All verdicts passed, and there was something to judge."""
        return self.error is None and self.unsupported is None and all(v.passed for v in self.verdicts)

    @property
    def status(self) -> str:
        """One of "passed", "failed", "unsupported", "error"."""
        if self.error is not None:
            return "error"
        if self.unsupported is not None:
            return "unsupported"
        return "passed" if self.passed else "failed"

    def __str__(self) -> str:
        lines = [f"{self.case.name} {self.dtype} on {self.target.name}, seed {self.seed}: {self.status}"]
        lines.append(f"  {self.case.describe()}")
        lines += [f"  {text}" for text in (self.unsupported, self.error) if text]
        return "\n".join(lines + [f"  {verdict}" for verdict in self.verdicts])


def compute(
    forward: Callable[[Tensors], tuple[Tensor, Tensor]], inputs: Tensors, dout: Tensor, dlse: Tensor | None
) -> Tensors:
    """out, lse and the gradients (dq, dk, dv, and dbias, dsinks if there are such inputs) of a forward function."""
    leaves = {name: t.detach().requires_grad_() for name, t in inputs.items()}
    out, lse = forward(leaves)
    outputs, incoming = [out], [dout.to(out.dtype)]
    if dlse is not None:
        outputs.append(lse)
        incoming.append(dlse.to(lse.dtype))
    grads: Sequence[Tensor | None] = [None] * len(leaves)
    # Where there is nothing to see, an output may be a constant.
    connected = [(o, g) for o, g in zip(outputs, incoming, strict=True) if o.requires_grad]
    if connected:
        outputs, incoming = [o for o, _ in connected], [g for _, g in connected]
        grads = torch.autograd.grad(outputs, list(leaves.values()), incoming, allow_unused=True)
    result = {"out": out.detach(), "lse": lse.detach()}
    for (name, leaf), grad in zip(leaves.items(), grads, strict=True):
        result[GRADIENT_NAMES[name]] = torch.zeros_like(leaf) if grad is None else grad
    return result


def run_target(problem: Problem, backend: str) -> Tensors:
    """The results of a back end: those of `compute`, and out and lse of the call without gradients.

    The forward pass is run both ways because they take different roads through the library. A paged cache has no
    gradients, and so the second way only.
    """
    results = {}
    if not problem.case.paged:
        results = compute(lambda leaves: problem.call(leaves, backend), problem.inputs, problem.dout, problem.dlse)
    with torch.no_grad():
        out, lse = problem.call(problem.inputs, backend)
    return results | {"out (no grad)": out, "lse (no grad)": lse}


@lru_cache(maxsize=16)
def expected(case: Case, dtype: torch.dtype, seed: int) -> Expected:
    """What the problem of a case and seed should give; remembered for the next target."""
    return expected_of(make_problem(case, dtype, seed))


@one_thread()
def expected_of(problem: Problem) -> Expected:
    """Oracle and baseline of a problem, from its inputs without poison."""
    case = problem.case
    keep = _kept_by_dropout(problem) if case.dropout_p else None
    wide = {name: t.double() for name, t in problem.clean.items()}
    dout, dlse = problem.dout.double(), problem.dlse
    oracle = compute(lambda leaves: problem.call(leaves, "reference"), wide, dout, dlse)
    for name, t in oracle.items():
        # A NaN here would ask for a NaN there: inputs without poison give none.
        assert not t.isnan().any(), f"the oracle has NaN in {name} of {case.name}"
    baseline = compute(lambda leaves: plain_result(problem, leaves, keep), problem.clean, problem.dout, dlse)
    units = _units(problem, wide, dout)
    for name, t in oracle.items():  # no result is finer than its own last place
        ulp = stored_ulp(torch.float32 if name == "lse" else problem.dtype)
        units[name] = torch.maximum(units[name], ulp * t.abs().masked_fill(t.isinf(), 0.0))
    return Expected(oracle, baseline, units)


@one_thread()
def plain_float64(case: Case, dtype: torch.dtype, seed: int) -> Tensors:
    """The plain computation in float64: an independent second oracle."""
    problem = make_problem(case, dtype, seed)
    keep = _kept_by_dropout(problem) if case.dropout_p else None
    wide = {name: t.double() for name, t in problem.clean.items()}
    return compute(lambda leaves: plain_result(problem, leaves, keep), wide, problem.dout.double(), problem.dlse)


def check(case: Case, dtype: torch.dtype, target: Target, seed: int = 0) -> Outcome:
    """Runs a case on a target and judges every output and gradient.

    A back end that says it cannot do the problem gives an outcome "unsupported"; any other exception is raised.
    """
    from transformer_fast import UnsupportedError

    problem = make_problem(case, dtype, seed).to(target.device)
    wanted = expected(case, dtype, seed)
    try:
        with target.forced():
            results = run_target(problem, target.backend)
    except UnsupportedError as refusal:
        return Outcome(case, dtype, target, seed, unsupported=str(refusal))
    return Outcome(case, dtype, target, seed, tuple(judge_all(results, wanted)))


@one_thread()
def judge_all(results: Tensors, wanted: Expected) -> list[Verdict]:
    """One verdict for each result."""
    return [wanted.yardsticks[name.removesuffix(" (no grad)")].judge(result, name) for name, result in results.items()]


def plain_result(problem: Problem, inputs: Tensors, keep: Tensor | None) -> tuple[Tensor, Tensor]:
    """Plain PyTorch on a problem, in the dtype of `inputs`; packed problems sequence by sequence."""
    if not problem.case.packed:
        arguments: dict[str, Any] = {**inputs, **_plain_options(problem, keep)}
        return plain_attention(**arguments)[:2]
    outs, lses = [], []
    for sequence in _sequences(problem, inputs, keep):
        out, lse, _, _ = plain_attention(**sequence)
        outs.append(out[0].transpose(0, 1))
        lses.append(lse[0])
    return torch.cat(outs), torch.cat(lses, dim=1)


def _plain_options(problem: Problem, keep: Tensor | None) -> dict[str, Any]:
    case = problem.case
    options: dict[str, Any] = dict(
        visible=problem.visible, softmax_scale=case.scale, softcap=case.softcap, keep=keep, dropout_p=case.dropout_p
    )
    slopes = problem.options.get("alibi_slopes")
    if slopes is not None and not case.packed:
        lengths = None if case.seqlens_k is None else list(case.seqlens_k)
        options["alibi"] = alibi_bias(slopes, case.batch, case.seqlen_q, case.seqlen_k, lengths)
    return options


def _sequences(problem: Problem, inputs: Tensors, keep: Tensor | None) -> Iterator[dict[str, Any]]:
    """Arguments of `plain_attention` for each sequence of a packed problem, as a batch of one."""
    case, options = problem.case, _plain_options(problem, None)
    slopes = problem.options.get("alibi_slopes")
    row, key = 0, 0
    for b, (rows, keys) in enumerate(case.sequences):
        one = {
            "query": inputs["query"][row : row + rows].transpose(0, 1)[None],
            "key": inputs["key"][key : key + keys].transpose(0, 1)[None],
            "value": inputs["value"][key : key + keys].transpose(0, 1)[None],
            "sinks": inputs.get("sinks"),
        }
        row, key = row + rows, key + keys
        changed: dict[str, Any] = {"visible": problem.visible[b : b + 1, :, :rows, :keys]}
        if slopes is not None:
            changed["alibi"] = alibi_bias(slopes if slopes.dim() == 1 else slopes[b], 1, rows, keys, None)
        if keep is not None:
            changed["keep"] = keep[b : b + 1, :, :rows, :keys]
        yield one | options | changed


def _units(problem: Problem, wide: Tensors, dout: Tensor) -> Tensors:
    """`rounding_units` under the names of results."""
    dlse = None if problem.dlse is None else problem.dlse.double()
    if not problem.case.packed:
        options = {"bias": None, "sinks": None} | wide | _plain_options(problem, None)
        units = rounding_units(dout=dout, dlse=dlse, dtype=problem.dtype, **options)
    else:
        units = _packed_units(problem, wide, dout, dlse)
    return {GRADIENT_NAMES.get(name, name): unit for name, unit in units.items()}


def _packed_units(problem: Problem, wide: Tensors, dout: Tensor, dlse: Tensor | None) -> Tensors:
    collected: dict[str, list[Tensor]] = {}
    row = 0
    for sequence in _sequences(problem, wide, None):
        rows = slice(row, row := row + sequence["query"].shape[2])
        one_dout = dout[rows].transpose(0, 1)[None]
        one_dlse = None if dlse is None else dlse[None, :, rows]
        units = rounding_units(dout=one_dout, dlse=one_dlse, dtype=problem.dtype, bias=None, **sequence)
        for name, unit in units.items():
            collected.setdefault(name, []).append(unit)
    result = {n: torch.cat([t[0].transpose(0, 1) for t in collected[n]]) for n in ("out", "query", "key", "value")}
    result["lse"] = torch.cat([t[0] for t in collected["lse"]], dim=1)
    if "sinks" in collected:
        result["sinks"] = torch.stack(collected["sinks"]).square().sum(0).sqrt()
    return result


def _kept_by_dropout(problem: Problem) -> Tensor:
    """Which probabilities dropout keeps: bool `(batch, num_heads, seqlen_q, seqlen_k)`.

    Found from outside: with the unit vectors as values, the output is the matrix of probabilities.
    """
    case = problem.case
    if case.seqlen_k == 0:
        return torch.zeros(case.batch, case.num_heads, case.seqlen_q, 0, dtype=torch.bool)
    wide = {name: t.double() for name, t in problem.clean.items()}
    unit = torch.eye(case.seqlen_k, dtype=torch.float64)
    if not case.packed:
        wide["value"] = unit.expand(case.batch, case.num_kv_heads, case.seqlen_k, case.seqlen_k)
        out, _ = problem.call(wide, "reference")
        return out > 0
    rows_of_unit = torch.cat([unit[:n] for _, n in case.sequences])
    wide["value"] = rows_of_unit[:, None].expand(-1, case.num_kv_heads, -1)
    out, _ = problem.call(wide, "reference")
    keep = torch.zeros(case.batch, case.num_heads, case.seqlen_q, case.seqlen_k, dtype=torch.bool)
    row = 0
    for b, (rows, _) in enumerate(case.sequences):
        keep[b, :, :rows] = out[row : row + rows].transpose(0, 1) > 0
        row += rows
    return keep
