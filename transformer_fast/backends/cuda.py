"""The CUDA back end: C++ kernels for NVIDIA GPUs, and the same kernels in an emulator on CPU tensors, for tests.

Nothing here has run on a GPU yet, so "auto" does not choose it: the kernels were run in the emulator and their machine
code was inspected.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._version import __version__
from ..layout import output_layout, row_strides
from ..spec import AttentionSpec, Operands, UnsupportedError, check_values
from .base import Backend, Gradients, Info, Results, Runner, device_name
from .fields import problem_fields
from .gradients import backward_inputs, sinks_gradient

#: Read by tests: the file of a module that was built apart.
EMULATED_MODULE_VARIABLE = "TRANSFORMER_FAST_EMULATED_MODULE"
#: The compute capability that the emulator plays, 90 by default; 80 is the other one there are kernels for.
EMULATED_CAPABILITY_VARIABLE = "TRANSFORMER_FAST_EMULATED_CAPABILITY"

_NOT_BUILT = {
    "_C_cuda": "built without CUDA (it is built where nvcc and an NVIDIA driver are, or with TRANSFORMER_FAST_CUDA=1)",
    "_C_emulated": "the emulator is for tests; build with TRANSFORMER_FAST_EMULATOR=1",
}
_DTYPES = (torch.bfloat16, torch.float16)
_LARGEST_HEAD_DIM = 256


@cache
def native_module(name: str) -> tuple[Any, str | None]:
    """A native module, or the reason why it does not import."""
    path = os.environ.get(EMULATED_MODULE_VARIABLE) if name == "_C_emulated" else None
    full_name = f"transformer_fast.{name}"
    try:
        if path is None:
            return importlib.import_module(full_name), None
        spec = importlib.util.spec_from_file_location(full_name, Path(path))
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module, None
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) and error.name == full_name:
            return None, _NOT_BUILT[name]
        return None, f"the native module {full_name} does not import: {error}"


def _machine(module: Any, device: torch.device) -> list[int]:
    """What launches are chosen by: capability (80 for 8.0), num_sms, l2_bytes, shared_bytes of a block."""
    return _machine_of(module, device.index if device.type == "cuda" else int(_emulated_capability()))


@cache
def _machine_of(module: Any, number: int) -> list[int]:
    found: list[int] = module.machine(number)
    return found


def _emulated_capability() -> str:
    return os.environ.get(EMULATED_CAPABILITY_VARIABLE, "90")


def missing_code(targets: str, capability: int) -> str | None:
    """Why a module with machine code for these targets has none for a capability (80 for 8.0); None if it has."""
    if targets == "emulated":
        return None
    own = "80" if capability < 90 else "90a" if capability == 90 else None
    wanted = [name for name in (own, "80+PTX") if name]
    if set(wanted) & set(targets.split(", ")):
        return None
    return (
        f"compute capability {capability / 10}; this build has machine code for {targets} "
        f"(TRANSFORMER_FAST_CUDA_ARCHS; {' or '.join(wanted)} would do)"
    )


def _pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _pointers(operands: Operands) -> list[int]:
    return [0 if tensor is None else tensor.data_ptr() for tensor in operands]


def _workspace(sizes: tuple[int, int], device: torch.device) -> tuple[Tensor | None, Tensor | None]:
    """The zeroed part and the other, in stream order; 4 bytes an element."""
    zeroed, scratch = sizes
    return (
        torch.zeros(zeroed // 4, dtype=torch.int32, device=device) if zeroed else None,
        torch.empty(scratch // 4, dtype=torch.float32, device=device) if scratch else None,
    )


def _dbias_shape(spec: AttentionSpec) -> tuple[int, ...]:
    """What the kernels add to where a bias wants a gradient; () where there is no bias.

    Blocks add in the order they happen to run in. Where that may not matter, each score gets a place of its own, as
    large as all of them are, and PyTorch sums those that share an element of the bias.
    """
    bias = spec.layout("bias")
    if bias is None:
        return ()
    if spec.options.deterministic:
        return (spec.batch, spec.num_heads, spec.seqlen_q, spec.seqlen_k)
    return tuple(bias.shape)


def make_plan(module: Any, spec: AttentionSpec, machine: Sequence[int] | None = None) -> Any:
    """The native plan of a spec, everything but the pointers; for another ``machine`` than this where one is given."""
    query = spec.layout("query")
    assert query is not None
    _, out_stride = output_layout(query.shape, query.stride, spec.head_dim_v)
    given = [layout is not None for layout in spec.layouts]
    fields = problem_fields(spec, out_stride, _dbias_shape(spec) or None)
    return module.Plan(fields, given, machine or _machine(module, spec.device))


class NativeRunner(Runner):
    """One spec's native plan. No call of it waits for the device, so that CUDA graphs can capture it."""

    def __init__(self, spec: AttentionSpec, module: Any, name: str) -> None:
        super().__init__(spec)
        self.name, self.packed, self.device = name, spec.is_packed, spec.device
        query = spec.layout("query")
        assert query is not None
        self.out_shape, self.out_stride = output_layout(query.shape, query.stride, spec.head_dim_v)
        self.plan = make_plan(module, spec)
        self.forward_workspace, self.backward_workspace = self.plan.forward_workspace(), self.plan.backward_workspace()

    def _numbers(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.device)

    def _place(self) -> tuple[int, int]:
        """The device's number, and the stream to launch on."""
        if self.device.type != "cuda":
            return 0, 0
        return self.device.index, torch.cuda.current_stream(self.device).cuda_stream

    def forward(self, operands: Operands, *, need_lse: bool, need_stats: bool) -> Results:
        spec = self.spec
        if self.device.type == "cpu":  # a GPU would stall
            check_values(operands, spec)
        out = torch.empty_strided(self.out_shape, self.out_stride, dtype=spec.dtype, device=self.device)
        lse = self._numbers(*spec.lse_shape) if need_lse or need_stats else None
        stats = self._numbers(2, *spec.lse_shape) if need_stats else None
        zeroed, scratch = _workspace(self.forward_workspace, self.device)
        with _on(self.device):
            self.plan.forward(_pointers(operands), *map(_pointer, (out, lse, stats, zeroed, scratch)), *self._place())
        return Results(out, lse, stats)

    def backward(
        self, operands: Operands, results: Results, dout: Tensor, dlse: Tensor | None, *, dbias: bool, dsinks: bool
    ) -> Gradients:
        spec, bias, sinks = self.spec, operands.bias, operands.sinks
        if reason := self.plan.backward_refuses():
            raise UnsupportedError(f"backend {self.name!r} cannot do the backward pass: {reason}")
        out, lse, stats, dout, dlse = backward_inputs(results, dout, dlse, self.out_stride, spec.dtype)
        delta = torch.empty_like(lse)
        dquery, dkey, dvalue = (torch.empty_like(t) for t in operands[:3])
        bias_grad = None
        if dbias and bias is not None:
            bias_grad = torch.zeros(_dbias_shape(spec), dtype=torch.float32, device=self.device)
        zeroed, scratch = _workspace(self.backward_workspace, self.device)
        with _on(self.device):
            self.plan.backward(
                _pointers(operands),
                *map(_pointer, (out, lse, stats, dout, dquery, dkey, dvalue, dlse, delta, bias_grad)),
                *(row_strides(t.stride(), self.packed) for t in (dout, dquery, dkey, dvalue)),
                spec.options.deterministic,
                *map(_pointer, (zeroed, scratch)),
                *self._place(),
            )
        if bias is not None and bias_grad is not None:
            bias_grad = bias_grad.sum_to_size(bias.shape).to(bias.dtype)
        sink_grad = sinks_gradient(sinks, lse, delta, packed=self.packed) if dsinks and sinks is not None else None
        return Gradients(dquery, dkey, dvalue, bias_grad, sink_grad)


def _on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """The kernels launch on the current device, which PyTorch wants to know of too."""
    if device.type != "cuda" or torch.cuda.current_device() == device.index:
        return contextlib.nullcontext()
    return torch.cuda.device(device)


class NativeBackend(Backend):
    """``csrc/cuda`` as a back end, on one kind of tensors."""

    module_name: str
    device_type: str

    @property
    def module(self) -> Any:
        """The native module, None where it does not import."""
        return native_module(self.module_name)[0]

    def reason(self, spec: AttentionSpec) -> str | None:
        # Before anything asks for a driver: calls with CPU tensors leave CUDA alone.
        if self.module is not None and spec.device.type != self.device_type:
            return f"the tensors are on {spec.device}, this back end computes on {self.device_type}"
        return super().reason(spec)

    def supports(self, spec: AttentionSpec) -> str | None:
        if spec.dtype not in _DTYPES:
            return f"dtype {str(spec.dtype).removeprefix('torch.')}; it computes bfloat16 and float16"
        if (capability := _machine(self.module, spec.device)[0]) < 80:
            return f"compute capability {capability / 10}; it computes on 8.0 and later"
        if missing := missing_code(self.module.targets(), capability):
            return missing
        if (head_dim := max(spec.head_dim, spec.head_dim_v)) > _LARGEST_HEAD_DIM:
            return f"head_dim {head_dim}; it computes up to {_LARGEST_HEAD_DIM}"
        total_k = 0 if spec.is_paged else spec.total_k  # a table has room for more than there is
        if max(spec.total_q, total_k, spec.seqlen_q * spec.group_size, spec.seqlen_k) >= 2**30:
            return "2**30 or more tokens, or rows of the heads that share keys; its positions are 32-bit"
        longest = max(spec.seqlen_q * spec.group_size, spec.seqlen_k)
        if spec.batch * spec.num_kv_heads * max(1, -(-longest // 16)) >= 2**31:  # a tile has 16 rows or more
            return "2**31 or more tiles of the longest sequence over all batch entries; it counts them in 32 bits"
        return make_plan(self.module, spec).forward_refuses() or None

    def path(self, spec: AttentionSpec) -> str:
        return make_plan(self.module, spec).path()

    def prepare(self, spec: AttentionSpec) -> Runner:
        return NativeRunner(spec, self.module, self.name)


class CudaBackend(NativeBackend):
    """The kernels on a GPU."""

    name, module_name, device_type = "cuda", "_C_cuda", "cuda"

    def info(self) -> Info:
        module, reason = native_module(self.module_name)
        if module is None:
            return Info(self.name, False, reason, None)
        reason = self._why_no_device()
        if reason is not None:
            return Info(self.name, False, reason, __version__, {"machine code": module.targets()})
        details = {"runs on": device_name(), "machine code": module.targets()}
        return Info(self.name, True, None, __version__, details)

    def _why_no_device(self) -> str | None:
        if torch.version.cuda is None:
            return "this PyTorch is built without CUDA"
        # PyTorch may see a device that our own runtime does not, if the driver is older than that.
        if reason := self.module.why_not():
            return str(reason)
        return None if torch.cuda.is_available() else "PyTorch sees no CUDA device"


class EmulatedBackend(NativeBackend):
    """The kernels in the emulator, thousands of times slower: for tests."""

    name, module_name, device_type = "emulated", "_C_emulated", "cpu"

    def info(self) -> Info:
        module, reason = native_module(self.module_name)
        if module is None:
            return Info(self.name, False, reason, None)
        capability = _emulated_capability()
        if capability not in ("80", "90"):
            reason = f"{EMULATED_CAPABILITY_VARIABLE} is {capability!r}; allowed: 80, 90"
            return Info(self.name, False, reason, __version__, is_error=True)
        details = {"runs on": f"the CPU, as compute capability {int(capability) / 10}"}
        return Info(self.name, True, None, __version__, details)
