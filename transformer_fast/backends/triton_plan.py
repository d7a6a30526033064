"""From a spec to the launches of the Triton kernels: tiles, splits, grids.

The kernel report compiles what this file makes, so what is inspected is what runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels import configs, operands
from ..layout import output_layout
from ..spec import AttentionSpec, Layout, Operands
from .triton_launch import Launch, LaunchArguments, power_of_2


class Scratch(NamedTuple):
    """Memory of one call of forward: partial results of splits, or the counter of jobs."""

    sums: Tensor | None
    top: Tensor | None
    total: Tensor | None
    queue: Tensor | None


def _unpack(tensors: Sequence[Any], count: int) -> tuple[Operands, Sequence[Any], Sequence[Any]]:
    """(operands, the ``count`` tensors after them, the rest)."""
    first = len(Operands._fields)
    return Operands(*tensors[:first]), tensors[first : first + count], tensors[first + count :]


class Planner(LaunchArguments):
    """One spec on one machine: knows the tiles, and makes launches when it is given tensors."""

    def __init__(
        self,
        spec: AttentionSpec,
        machine: configs.Machine,
        precision: str,
        overrides: dict[str, configs.Config] | None = None,
    ) -> None:
        super().__init__(spec, machine, precision, overrides)
        self._plan_forward()

    # --------------------------------------------------------------------------------------------------- forward

    def _plan_forward(self) -> None:
        """The tiles, and where few of them would leave the machine idle, the splits of their keys."""
        spec = self.spec
        rows = spec.seqlen_q * spec.group_size
        self.phase = "decode" if rows <= 64 else "forward"
        config = self.config(self.phase)
        self.block_m = power_of_2(rows, 16) if self.phase == "decode" else config.block_m
        self.block_n = config.block_n
        page_block = spec.page_size & -spec.page_size  # the largest power of 2 that divides a page
        if page_block >= 32:  # a block inside a page needs one look at the table; smaller ones would waste products
            self.block_n = min(self.block_n, page_block)
        self.forward_schedule = self.schedule(-(-rows // self.block_m))
        self.jobs = self.forward_schedule.tiles * self.forward_schedule.heads
        seen = min(spec.seqlen_k, self.left + self.right + spec.seqlen_q)
        slots = self.machine.num_sms * config.ctas_per_sm
        self.splits = configs.num_splits(self.jobs, slots, -(-seen // self.block_n))
        # Uneven work is taken job by job by as many programs as fit on the machine, where the table says so.
        self.is_persistent = config.persistent and self.splits == 1 and self.is_uneven and self.jobs > slots
        self.programs = slots if self.is_persistent else self.jobs

    def scratch(self, device: torch.device) -> Scratch:
        """What forward needs beside its results."""
        if self.is_persistent:
            return Scratch(None, None, None, torch.zeros((), dtype=torch.int32, device=device))
        if self.splits == 1:
            return Scratch(None, None, None, None)
        rows = (self.splits, self.num_rows)
        return Scratch(
            torch.empty((*rows, self.spec.head_dim_v), dtype=torch.float32, device=device),
            torch.empty(rows, dtype=torch.float32, device=device),
            torch.empty(rows, dtype=torch.float32, device=device),
            None,
        )

    def forward(self, tensors: Sequence[Tensor | None]) -> list[Launch]:
        """The tiles, and the merge of their splits where they are split.

        Args:
            tensors: Operands, out, lse or None, stats or None, Scratch; in one row.
        """
        from ..kernels.forward import attention_forward_kernel

        given, (out, lse, stats), scratch = _unpack(tensors, 3)
        scratch = Scratch(*scratch)
        config, page_size = self.config(self.phase), self.spec.page_size
        tma = config.tma and self.can_use_tma(given.key, given.value) and page_size % self.block_n == 0
        partials, stored = None, (lse, stats)
        if self.splits > 1:
            partials, stored = operands.Partials(*scratch[:3], self.num_rows), (None, None)
        tiles = Launch(
            self.phase,
            attention_forward_kernel,
            (self.programs, self.splits),
            dict(
                query=self.rows(given.query),
                key=self.rows(given.key),
                value=self.rows(given.value),
                out=self.rows(out),
                lse=stored[0],
                stats=stored[1],
                stats_plane=self.num_rows,
                partials=partials,
                problem=self.problem(given),
                schedule=self.forward_schedule._replace(queue=scratch.queue),
                splits=self.splits,
            ),
            self.sizes
            | dict(
                BLOCK_M=self.block_m,
                BLOCK_N=self.block_n,
                PAGE_SIZE=page_size,
                TMA=tma,
                MODIFIED=self.modified,
                PRECISION=self.precision,
            ),
            config,
            tma,
        )
        return [tiles] if partials is None else [tiles, self._combine(given, out, lse, stats, partials)]

    def _combine(
        self, given: Operands, out: Tensor, lse: Tensor | None, stats: Tensor | None, partials: operands.Partials
    ) -> Launch:
        from ..kernels.decode import attention_combine_kernel

        config = self.config("combine")
        return Launch(
            "combine",
            attention_combine_kernel,
            (-(-self.num_rows // config.block_m),),
            dict(
                out=self.rows(out),
                lse=lse,
                stats=stats,
                stats_plane=self.num_rows,
                partials=partials,
                problem=self.problem(given),
                num_heads=self.spec.num_heads,
                rows_a_head=self.rows_a_head,
                splits=self.splits,
            ),
            dict(
                HEAD_DIM_V=self.spec.head_dim_v,
                BLOCK_M=config.block_m,
                BLOCK_DV=self.sizes["BLOCK_DV"],
                MODIFIED=self.modified,
            ),
            config,
        )

    # -------------------------------------------------------------------------------------------------- backward

    def backward(self, tensors: Sequence[Tensor | None]) -> list[Launch]:
        """All gradients but those of the sinks, which follow from delta and lse.

        Args:
            tensors: Operands, out, stats, dout, dlse or None, delta, dquery, dkey, dvalue, dbias or None; in one row.
        """
        given, (out, stats, dout, dlse, delta), (dquery, dkey, dvalue, dbias) = _unpack(tensors, 5)
        launches = []
        if out.numel():
            launches += [self.preprocess(out, dout, dlse, delta), self.dq(given, dout, dquery, stats, delta)]
        if dkey.numel():
            launches += self.dkdv(given, dout, dkey, dvalue, stats, delta)
        if dbias is not None and dbias.numel():
            launches.append(self.dbias(given, dout, dbias, stats, delta))
        return launches

    def preprocess(self, out: Tensor, dout: Tensor, dlse: Tensor | None, delta: Tensor) -> Launch:
        """delta."""
        from ..kernels.backward import attention_backward_preprocess_kernel

        config = self.config("preprocess")
        return Launch(
            "preprocess",
            attention_backward_preprocess_kernel,
            (-(-self.num_rows // config.block_m),),
            dict(
                out=self.rows(out),
                dout=self.rows(dout),
                dlse=dlse,
                delta=delta,
                rows_in_all=self.num_rows,
                num_heads=self.spec.num_heads,
                rows_a_head=self.rows_a_head,
            ),
            dict(HEAD_DIM_V=self.spec.head_dim_v, BLOCK_M=config.block_m, BLOCK_DV=self.sizes["BLOCK_DV"]),
            config,
        )

    def dkdv(
        self, given: Operands, dout: Tensor, dkey: Tensor, dvalue: Tensor, stats: Tensor, delta: Tensor
    ) -> list[Launch]:
        """Gradients of key and value, where the table says so in a launch each."""
        from ..kernels.backward import attention_backward_dkdv_kernel

        launches = []
        for phase in configs.key_phases(self.machine, self.head_dim, self.spec.dtype.itemsize):
            config = self.config(phase)
            launch = self._gradient(
                phase, attention_backward_dkdv_kernel, config, given, dout, stats, delta,
                config.tma and self.can_use_tma(given.query, given.key, given.value, dout, dkey, dvalue),
                dict(dkey=self.rows(dkey), dvalue=self.rows(dvalue)),
                self.schedule(-(-self.spec.seqlen_k // config.block_n)),
            )  # fmt: skip
            launch.constants |= dict(NEED_DK=phase != "dv", NEED_DV=phase != "dk")
            launches.append(launch)
        return launches

    def dq(self, given: Operands, dout: Tensor, dquery: Tensor, stats: Tensor, delta: Tensor) -> Launch:
        """The gradient of query."""
        from ..kernels.backward import attention_backward_dq_kernel

        config, spec = self.config("dq"), self.spec
        tiles = -(-spec.seqlen_q * spec.group_size // config.block_m)
        tma = config.tma and self.can_use_tma(given.key, given.value)
        return self._gradient(
            "dq", attention_backward_dq_kernel, config, given, dout, stats, delta, tma,
            dict(dquery=self.rows(dquery)), self.schedule(tiles),
        )  # fmt: skip

    def _gradient(
        self, phase: str, kernel: Any, config: configs.Config, given: Operands, dout: Tensor, stats: Tensor,
        delta: Tensor, tma: bool, results: dict[str, Any], schedule: operands.Schedule,
    ) -> Launch:  # fmt: skip
        return Launch(
            phase,
            kernel,
            (schedule.tiles * schedule.heads,),
            dict(
                query=self.rows(given.query),
                key=self.rows(given.key),
                value=self.rows(given.value),
                dout=self.rows(dout),
                **results,
                stats=stats,
                stats_plane=self.num_rows,
                delta=delta,
                problem=self.problem(given),
                schedule=schedule,
            ),
            self.sizes
            | dict(
                BLOCK_M=config.block_m,
                BLOCK_N=config.block_n,
                TMA=tma,
                MODIFIED=self.modified,
                PRECISION=self.precision,
            ),
            config,
            tma,
        )

    def dbias(self, given: Operands, dout: Tensor, dbias: Tensor, stats: Tensor, delta: Tensor) -> Launch:
        """The gradient of bias, summed over what it broadcasts over."""
        from ..kernels.backward import attention_backward_dbias_kernel

        config, spec = self.config("dbias"), self.spec
        one_batch, one_head, one_row, one_key = (n == 1 for n in dbias.shape)
        grid = (
            dbias.shape[0] * dbias.shape[1],
            1 if one_row else -(-spec.seqlen_q // config.block_m),
            1 if one_key else -(-spec.seqlen_k // config.block_n),
        )
        return Launch(
            "dbias",
            attention_backward_dbias_kernel,
            grid,
            dict(
                query=self.rows(given.query),
                key=self.rows(given.key),
                value=self.rows(given.value),
                dout=self.rows(dout),
                dbias=operands.Dense(dbias, *dbias.stride()),
                stats=stats,
                stats_plane=self.num_rows,
                delta=delta,
                problem=self.problem(given),
                batches=spec.batch,
                heads=spec.num_heads,
            ),
            self.sizes
            | dict(
                BLOCK_M=config.block_m,
                BLOCK_N=config.block_n,
                ONE_BATCH=one_batch,
                ONE_HEAD=one_head,
                ONE_ROW=one_row,
                ONE_KEY=one_key,
                MODIFIED=self.modified,
                PRECISION=self.precision,
            ),
            config,
        )


def _meta(layout: Layout | None) -> Tensor | None:
    if layout is None:
        return None
    dtype = torch.uint8 if layout.dtype == torch.bool else layout.dtype  # as the back end gives it to a kernel
    return torch.empty_strided(layout.shape, layout.stride, dtype=dtype, device="meta")


def plan_launches(spec: AttentionSpec, capability: int, num_sms: int = 132, *, precision: str = "ieee") -> list[Launch]:
    """Every launch that forward and backward of a problem make, with meta tensors in place of real ones.

    Args:
        capability: 80 for compute capability 8.0 and so on; the machine need not be there.
    """
    planner = Planner(spec, configs.Machine(capability, num_sms, 50 << 20), precision, {})
    given = Operands(*map(_meta, spec.layouts))  # type: ignore[arg-type]
    query = given.query

    def numbers(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device="meta")

    shape, stride = output_layout(query.shape, query.stride(), spec.head_dim_v)
    out = torch.empty_strided(shape, stride, dtype=query.dtype, device="meta")
    lse, stats, delta = numbers(*spec.lse_shape), numbers(2, *spec.lse_shape), numbers(*spec.lse_shape)
    launches = planner.forward((*given, out, lse, stats, *planner.scratch(out.device)))
    if spec.page_size:
        return launches
    dbias = None
    if given.bias is not None and given.bias.dtype != torch.uint8:
        dbias = torch.empty(given.bias.shape, dtype=given.bias.dtype, device="meta")
    dquery, dkey, dvalue = (torch.empty_like(t) for t in given[:3])
    return launches + planner.backward((*given, out, stats, out, None, delta, dquery, dkey, dvalue, dbias))
