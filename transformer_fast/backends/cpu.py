"""The CPU back end: C++ kernels for AMX, AVX-512 (with or without bf16), AVX2 and plain vectors, chosen at run time."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .._version import __version__
from ..layout import Order, exchanged, output_layout, row_strides
from ..spec import AttentionSpec, Operands
from .base import Backend, Gradients, Info, Results, Runner
from .fields import DTYPES, problem_fields
from .gradients import backward_inputs, sinks_gradient

_C_cpu: Any = None
_WHY_NOT: str | None = None
try:
    _C_cpu = importlib.import_module("transformer_fast._C_cpu")
except ImportError as error:  # built without a C++ compiler, or for another Python
    _WHY_NOT = f"the native module transformer_fast._C_cpu does not import: {error}"

#: Of numbers that the kernels beside attention take; none without the native module.
TYPES = frozenset(() if _C_cpu is None else (torch.float32, torch.bfloat16, torch.float16))

_CPU = torch.device("cpu")
_SEED = Operands._fields.index("rng_seed")


@contextmanager
def force_isa(name: str) -> Iterator[None]:
    """Run with one instruction set where the machine has it.

    They are "portable", "avx2", "avx512", "avx512_bf16" (bfloat16 by pairs) and "amx_bf16" (bfloat16 by tiles).

    The environment variable TRANSFORMER_FAST_CPU_ISA does the same for a whole process.

    Raises:
        ValueError: the machine does not have it; the message names those it has.
    """
    before = _C_cpu.current_isa()
    _C_cpu.force_isa(name)
    try:
        yield
    finally:
        _C_cpu.force_isa(before)


def _pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


class CpuRunner(Runner):
    """One spec's native plan: everything but the pointers."""

    def __init__(self, spec: AttentionSpec, order: Order = "bhsd") -> None:
        super().__init__(spec)
        self.packed, self.order = spec.is_packed, order
        query = spec.layout("query")
        assert query is not None
        shape, stride = output_layout(query.shape, query.stride, spec.head_dim_v, order)
        self.plan = _C_cpu.Plan(problem_fields(spec, stride))
        if order != "bhsd":
            shape, stride = exchanged(shape), exchanged(stride)
        self.out_shape, self.out_stride = shape, stride
        # Of one number each, spread: `empty_like` of these is quicker than `empty` with the same said in words.
        self.lse_like = torch.empty((), dtype=torch.float32, device=_CPU).expand(spec.lse_shape)
        self.stats_like = self.lse_like.expand(2, *spec.lse_shape)
        self.both_like = self.lse_like.expand(3, *spec.lse_shape)  # statistics and lse
        self.lse_offset = 2 * self.lse_like.numel() * self.lse_like.element_size()
        self.is_plain = all(layout is None for layout in spec.layouts[3:])

    def in_order(self, order: Order) -> Runner:
        """A kernel knows strides by name, so that views are not needed, which take longer than a small attention."""
        return self if order == self.order else CpuRunner(self.spec, order)

    def _strides(self, tensor: Tensor, *, rows_first: bool) -> tuple[int, int, int]:
        stride = tensor.stride()
        return row_strides(exchanged(stride) if rows_first else stride, self.packed)

    def _pointers(self, operands: Operands) -> list[int]:
        pointers = [0 if t is None else t.data_ptr() for t in operands]
        seed = operands.rng_seed
        if seed is not None:  # the one operand that is passed by value
            pointers[_SEED] = int(seed) & 0xFFFFFFFFFFFFFFFF
        return pointers

    def forward(self, operands: Operands, *, need_lse: bool, need_stats: bool) -> Results:
        out = operands.query.new_empty_strided(self.out_shape, self.out_stride)
        lse, stats, lse_pointer, stats_pointer = None, None, 0, 0
        if need_lse:
            lse = torch.empty_like(self.lse_like)
            lse_pointer = lse.data_ptr()
        if need_stats:
            stats = torch.empty_like(self.stats_like if need_lse else self.both_like)
            stats_pointer = stats.data_ptr()
            if not need_lse:  # it lies behind the statistics, which spares training an allocation
                lse_pointer = stats_pointer + self.lse_offset
        if self.is_plain:  # as mostly; written out, since a list of arguments takes as long as everything else here
            query, key, value = operands[:3]
            self.plan.forward(
                query.data_ptr(), key.data_ptr(), value.data_ptr(), 0, 0, 0, 0, 0, 0, 0, 0, 0,
                out.data_ptr(), lse_pointer, stats_pointer, torch.get_num_threads(),
            )  # fmt: skip
        else:
            pointers = self._pointers(operands)
            self.plan.forward(*pointers, out.data_ptr(), lse_pointer, stats_pointer, torch.get_num_threads())
        return tuple.__new__(Results, (out, lse, stats))  # as Results(...), in half the time

    def backward(
        self, operands: Operands, results: Results, dout: Tensor, dlse: Tensor | None, *, dbias: bool, dsinks: bool
    ) -> Gradients:
        query, bias, sinks = operands.query, operands.bias, operands.sinks
        results = results.with_lse()
        out, lse, stats, dout, dlse = backward_inputs(results, dout, dlse, self.out_stride, self.spec.dtype)
        delta = torch.empty_like(lse)
        dquery, dkey, dvalue = (torch.empty_like(t) for t in operands[:3])
        bias_grad = query.new_zeros(bias.shape, dtype=torch.float32) if dbias and bias is not None else None
        self.plan.backward(
            *self._pointers(operands),
            *map(_pointer, (out, lse, stats)),
            torch.get_num_threads(),
            *map(_pointer, (dout, dquery, dkey, dvalue, dlse, delta, bias_grad)),
            self._strides(dout, rows_first=self.order != "bhsd"),
            *(self._strides(t, rows_first=self.order == "bshd") for t in (dquery, dkey, dvalue)),
        )
        sink_grad = None
        if dsinks and sinks is not None:
            sink_grad = sinks_gradient(sinks, lse, delta, packed=self.packed)
        return Gradients(
            dquery, dkey, dvalue, None if bias is None or bias_grad is None else bias_grad.to(bias.dtype), sink_grad
        )


class CpuBackend(Backend):
    """``csrc/cpu`` as a back end."""

    name = "cpu"

    def info(self) -> Info:
        if _C_cpu is None:
            return Info(self.name, False, _WHY_NOT, None)
        try:
            details = {"isa": _C_cpu.current_isa(), "isas": _C_cpu.available_isas()}
        except ValueError as error:  # TRANSFORMER_FAST_CPU_ISA names none that this machine has
            return Info(self.name, False, str(error), __version__, is_error=True)
        return Info(self.name, True, None, __version__, details)

    def supports(self, spec: AttentionSpec) -> str | None:
        if spec.device.type != "cpu":
            return f"the tensors are on {spec.device}, this back end computes on cpu"
        if spec.dtype not in DTYPES:
            return f"dtype {str(spec.dtype).removeprefix('torch.')}; it computes float32, bfloat16 and float16"
        return None

    def path(self, spec: AttentionSpec) -> str:
        plan = CpuRunner(spec).plan
        way = "split-KV decode" if plan.takes_decode_path() else "tiled forward"
        way += " through a block table" if spec.is_paged else ""
        return f"{way}, {_C_cpu.current_isa()}, {torch.get_num_threads()} threads"

    def prepare(self, spec: AttentionSpec) -> Runner:
        return CpuRunner(spec)
