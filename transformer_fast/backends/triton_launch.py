"""What a launch of a Triton kernel is, and the arguments that all of them share."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .. import masks
from ..kernels import configs, operands
from ..kernels.masks import UNBOUNDED
from ..layout import broadcast_strides, row_strides
from ..reference import dropout_threshold
from ..spec import AttentionSpec, Operands, UnsupportedError
from . import triton_tuning


@dataclass
class Launch:
    """One kernel call. ``arguments`` are in the kernel's order: tensors, numbers, None, named tuples of those."""

    phase: str
    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    constants: dict[str, Any]
    config: configs.Config
    tma: bool = False

    def run(self) -> Any:
        """Compiles where it was not yet, and launches; the compiled kernel, or None in the interpreter."""
        return run_within_limits(self, list(self.arguments.values()))

    def smaller(self) -> Launch | None:
        """The same with less shared memory: a stage less, then blocks of half the size in the loop; None at the end.

        The table knows the plain variants. A bias, the look at small pages and many rows a tile need room too.
        """
        config, constants = self.config, dict(self.constants)
        if config.num_stages > 1:
            return replace(self, config=config._replace(num_stages=config.num_stages - 1))
        name = "BLOCK_M" if self.phase in ("dkdv", "dk", "dv") else "BLOCK_N"  # what the loop walks over
        if self.phase in ("dbias", "combine", "preprocess") or constants[name] <= 16:
            return None
        constants[name] //= 2
        return replace(self, constants=constants)


def run_within_limits(launch: Launch, arguments: list[Any]) -> Any:
    """Launches, with the least reduction that fits on the machine.

    Raises:
        UnsupportedError: nothing fits.
    """
    while True:
        try:
            return launch.kernel[launch.grid](
                *arguments,
                **launch.constants,
                num_warps=launch.config.num_warps,
                num_stages=launch.config.num_stages,
            )
        except Exception as error:
            if type(error).__name__ != "OutOfResources":  # known by name: Triton has moved it between modules
                raise
            reduced = launch.smaller()
            if reduced is None:
                raise UnsupportedError(f"no tile of the Triton {launch.phase} kernel fits here: {error}") from error
            launch.config, launch.constants = reduced.config, reduced.constants  # for the next call, too


def power_of_2(n: int, least: int) -> int:
    """The least power of 2 that is neither below ``n`` nor below ``least``."""
    return max(least, 1 << (n - 1).bit_length())


def _table(tensor: Tensor | None) -> operands.Table | None:
    """A tensor of (batch, n) or (n,)."""
    if tensor is None:
        return None
    strides = (0, *broadcast_strides(tensor.shape, tensor.stride()))[-2:]
    return operands.Table(tensor, *strides)


def _vector(tensor: Tensor | None) -> operands.Vector | None:
    return None if tensor is None else operands.Vector(tensor, tensor.stride(0))


class LaunchArguments:
    """One spec on one machine: what the launches of all its kernels have in common."""

    def __init__(
        self,
        spec: AttentionSpec,
        machine: configs.Machine,
        precision: str,
        overrides: dict[str, configs.Config] | None = None,
    ) -> None:
        self.spec, self.machine, self.precision = spec, machine, precision
        self.overrides = overrides  # configurations by phase, in place of the table and of what tuning found
        options = spec.options
        bias = spec.layout("bias")
        self.modified = (
            options.softcap is not None
            or (bias is not None and bias.dtype != torch.bool)
            or spec.layout("alibi_slopes") is not None
            or spec.layout("sinks") is not None
            or spec.softmax_scale < 1e-30
        )
        self.head_dim = max(spec.head_dim, spec.head_dim_v)
        self.sizes: dict[str, Any] = dict(
            GROUP=spec.group_size,
            HEAD_DIM=spec.head_dim,
            HEAD_DIM_V=spec.head_dim_v,
            BLOCK_D=power_of_2(spec.head_dim, 16),
            BLOCK_DV=power_of_2(spec.head_dim_v, 16),
        )
        sides = masks.bounds(options.window_left, options.window_right)
        self.left, self.right = (min(side, UNBOUNDED) for side in sides)  # positions are 32-bit in the kernels
        self.rows_a_head = spec.total_q if spec.is_packed else spec.seqlen_q
        #: Rows as lse lays them out.
        self.num_rows = spec.num_heads * spec.total_q
        #: Tiles differ in work: a mask, or sequences of unequal length.
        self.is_uneven = (
            options.window_left >= 0
            or options.window_right >= 0
            or spec.is_packed
            or spec.layout("seqlens_k") is not None
        )

    # ------------------------------------------------------------------------------------------------- arguments

    def problem(self, given: Operands) -> operands.Problem:
        """What all kernels share."""
        spec, options = self.spec, self.spec.options
        bias = None
        if given.bias is not None:
            bias = operands.Dense(given.bias, *broadcast_strides(given.bias.shape, given.bias.stride()))
        dropout = None
        if options.dropout_p > 0.0:
            threshold = dropout_threshold(options.dropout_p)
            dropout = operands.Dropout(given.rng_seed, threshold, 1.0 / (1.0 - options.dropout_p))
        return operands.Problem(
            seqlen_q=spec.seqlen_q,
            seqlen_k=spec.seqlen_k,
            left=self.left,
            right=self.right,
            cu_seqlens_q=given.cu_seqlens_q,
            cu_seqlens_k=given.cu_seqlens_k,
            seqlens_k=_vector(given.seqlens_k),
            block_table=_table(given.block_table),
            lse_batch=0 if spec.is_packed else spec.num_heads * spec.seqlen_q,
            lse_head=self.rows_a_head,
            softmax_scale=spec.softmax_scale,
            softcap=options.softcap,
            bias=bias,
            alibi=_table(given.alibi_slopes),
            key_mask=_table(given.key_padding_mask),
            sinks=_vector(given.sinks),
            dropout=dropout,
        )

    def rows(self, tensor: Tensor) -> operands.Rows:
        """A padded (b, h, s, d), packed (s, h, d) or paged tensor."""
        packed = self.spec.is_packed
        shape = tensor.shape
        sizes = (1, shape[1], shape[0]) if packed else tuple(shape[:3])
        return operands.Rows(tensor, *row_strides(tensor.stride(), packed), *sizes)

    def can_use_tma(self, *tensors: Tensor) -> bool:
        """Descriptors want addresses and strides in whole 16 bytes, and no dimension that is a repetition."""
        if not self.machine.has_tma or (self.spec.dtype == torch.float32 and self.precision == "ieee"):
            return False  # multiply-adds on what descriptors loaded: thousands of spills (Triton 3.6, 3.7)
        for tensor in tensors:
            bytes_of = tensor.element_size()
            steps = [s * bytes_of for n, s in zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True) if n > 1]
            if any(step <= 0 or step % 16 for step in steps) or tensor.shape[-1] * bytes_of % 16:
                return False
            if not tensor.is_meta and tensor.data_ptr() % 16:
                return False
        return True

    def config(self, phase: str) -> configs.Config:
        """What tuning found on this machine, else the row of the table."""
        wanted = (self.machine, phase, self.head_dim, self.spec.dtype.itemsize)
        if self.overrides is not None:
            return self.overrides.get(phase) or configs.config_for(*wanted)
        return triton_tuning.found(*wanted, self.precision) or configs.config_for(*wanted)

    def schedule(self, tiles: int) -> operands.Schedule:
        """Jobs for all tiles of all heads, a program each."""
        spec = self.spec
        heads = spec.num_kv_heads * spec.batch
        width = (spec.head_dim + spec.head_dim_v) * spec.dtype.itemsize
        section = configs.section_of(self.machine, heads, spec.seqlen_k * width)
        return operands.Schedule(tiles, spec.num_kv_heads, heads, section, None)
