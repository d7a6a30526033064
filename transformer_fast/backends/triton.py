"""The Triton back end: ``transformer_fast.kernels`` on NVIDIA GPUs, or on CPU tensors in Triton's interpreter.

Nothing here has run on a GPU yet, so "auto" does not choose it: the kernels were run in the interpreter and their
machine code was inspected.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import os
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..layout import output_layout
from ..spec import AttentionSpec, Operands
from .base import Backend, Gradients, Info, Results, Runner, device_name
from .gradients import backward_inputs, sinks_gradient

if TYPE_CHECKING:
    from ..kernels import configs
    from .triton_launch import Launch
    from .triton_repeat import Repeat, Tensors

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@cache
def _version() -> str | None:
    """Triton's version; asked of its metadata, since importing Triton takes longer than importing this package."""
    return importlib.metadata.version("triton") if importlib.util.find_spec("triton") else None


def _is_interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@cache
def _machine(device: torch.device) -> configs.Machine:
    """What the table of configurations is chosen by.

    The interpreter plays a machine with tensor descriptors, or one without where TRANSFORMER_FAST_TRITON_CAPABILITY
    says 80.
    """
    from ..kernels import configs

    if device.type != "cuda":
        capability = int(os.environ.get("TRANSFORMER_FAST_TRITON_CAPABILITY", "90"))
        return configs.Machine(capability, num_sms=4, l2_bytes=1 << 20, is_interpreted=True)
    found = torch.cuda.get_device_properties(device)
    return configs.Machine(found.major * 10 + found.minor, found.multi_processor_count, found.L2_cache_size)


def _precision(dtype: torch.dtype) -> str:
    """Products of float32 are IEEE's, or TF32's where PyTorch was told so, by either of its switches:
    torch.set_float32_matmul_precision or torch.backends.cuda.matmul.fp32_precision.
    """
    if dtype != torch.float32:
        return "ieee"
    newer = getattr(torch.backends.cuda.matmul, "fp32_precision", None)  # from torch 2.9 on; it knows of the older one
    if newer is not None:
        return "tf32" if newer == "tf32" else "ieee"
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def _allocate(size: int, alignment: int, stream: int | None) -> Tensor:
    """Global memory, into which kernels write tensor descriptors; PyTorch's is in stream order."""
    return torch.empty(size, dtype=torch.int8, device="cuda" if torch.cuda.is_available() else "cpu")


def _set_allocator() -> None:
    """Before every launch: Triton keeps it for each thread by itself, and autograd has threads of its own."""
    import triton

    triton.set_allocator(_allocate)


def _as_bytes(tensor: Tensor | None) -> Tensor | None:
    """Triton reads booleans as bytes."""
    return tensor.view(torch.uint8) if tensor is not None and tensor.dtype == torch.bool else tensor


class TritonRunner(Runner):
    """One spec's launches: everything but the tensors."""

    def __init__(self, spec: AttentionSpec) -> None:
        super().__init__(spec)
        from .triton_plan import Planner

        query = spec.layout("query")
        assert query is not None
        self.out_shape, self.out_stride = output_layout(query.shape, query.stride, spec.head_dim_v)
        machine = _machine(spec.device)
        self.planners = {name: Planner(spec, machine, name) for name in ("ieee", "tf32")}
        self._repeats: dict[Any, Repeat] = {}
        self._has_masks = any(layout is not None and layout.dtype == torch.bool for layout in spec.layouts)

    def _numbers(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.spec.device)

    def _launch(self, key: Any, tensors: Tensors, make: Callable[[Tensors], list[Launch]]) -> None:
        """Runs what ``make`` makes of the tensors; from the second call of a key on without making it."""
        from .triton_repeat import Repeat, are_aligned

        _set_allocator()
        with _on(self.spec.device):
            if not are_aligned(tensors):
                for launch in make(tensors):
                    launch.run()
                return
            repeat = self._repeats.get(key)
            if repeat is None:
                repeat = self._repeats[key] = Repeat(make, tensors)
            repeat.run(tensors)

    def _given(self, operands: Operands) -> Operands:
        """The operands as kernels take them."""
        return Operands(*map(_as_bytes, operands)) if self._has_masks else operands  # type: ignore[arg-type]

    def forward(self, operands: Operands, *, need_lse: bool, need_stats: bool) -> Results:
        spec, need_lse = self.spec, need_lse or need_stats
        out = torch.empty_strided(self.out_shape, self.out_stride, dtype=spec.dtype, device=spec.device)
        lse = self._numbers(*spec.lse_shape) if need_lse else None
        stats = self._numbers(2, *spec.lse_shape) if need_stats else None
        if out.numel():
            precision = _precision(spec.dtype)
            planner = self.planners[precision]
            scratch = planner.scratch(spec.device)
            self._launch(
                (precision, need_lse, need_stats),
                (*self._given(operands), out, lse, stats, *scratch),
                planner.forward,
            )
        return Results(out, lse, stats)

    def backward(
        self, operands: Operands, results: Results, dout: Tensor, dlse: Tensor | None, *, dbias: bool, dsinks: bool
    ) -> Gradients:
        spec, (query, key, value) = self.spec, operands[:3]
        out, lse, stats, dout, dlse = backward_inputs(results, dout, dlse, self.out_stride, spec.dtype)
        delta = self._numbers(*spec.lse_shape)
        dquery, dkey, dvalue = (torch.empty_like(t) for t in (query, key, value))
        bias_grad = None
        if dbias and operands.bias is not None:
            bias_grad = torch.empty(operands.bias.shape, dtype=operands.bias.dtype, device=spec.device)
        precision = _precision(spec.dtype)
        planner = self.planners[precision]
        self._launch(
            ("backward", precision, dlse is None, bias_grad is None, dout.stride()),
            (*self._given(operands), out, stats, dout, dlse, delta, dquery, dkey, dvalue, bias_grad),
            planner.backward,
        )
        sinks = operands.sinks if dsinks else None
        sink_grad = None if sinks is None else sinks_gradient(sinks, lse, delta, packed=spec.is_packed)
        return Gradients(dquery, dkey, dvalue, bias_grad, sink_grad)


def _on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device, whatever the tensors say."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


class TritonBackend(Backend):
    """``kernels/`` as a back end."""

    name = "triton"

    def info(self) -> Info:
        if _version() is None:
            return Info(self.name, False, "triton is not installed", None)
        if not torch.cuda.is_available() and not _is_interpreted():
            reason = "there is no CUDA device (TRITON_INTERPRET=1 runs the kernels in Triton's interpreter, for tests)"
            return Info(self.name, False, reason, _version())
        way = "interpreter" if _is_interpreted() else device_name()
        return Info(self.name, True, None, _version(), {"runs on": way})

    def supports(self, spec: AttentionSpec) -> str | None:
        wanted = "cpu" if _is_interpreted() else "cuda"
        if spec.device.type != wanted:
            return f"the tensors are on {spec.device}, this back end computes on {wanted}"
        if spec.dtype not in _DTYPES:
            return f"dtype {str(spec.dtype).removeprefix('torch.')}; it computes float32, bfloat16 and float16"
        head_dim = max(spec.head_dim, spec.head_dim_v)
        total_k = 0 if spec.is_paged else spec.total_k  # a table has room for more than there is
        if max(spec.total_q, total_k, spec.seqlen_q, spec.seqlen_k) >= 2**30:
            return "2**30 or more tokens; its positions are 32-bit"
        if spec.num_heads * spec.total_q >= 2**31:
            return "2**31 or more rows over all heads; it counts them in 32 bits"
        longest = max(spec.seqlen_q * spec.group_size, spec.seqlen_k)
        if spec.batch * spec.num_kv_heads * max(1, -(-longest // 16)) >= 2**31:  # a tile has 16 rows or more
            return "2**31 or more tiles of the longest sequence over all batch entries; it counts them in 32 bits"
        machine = _machine(spec.device)
        if machine.capability < 80:
            return f"compute capability {machine.capability / 10}; it computes on 8.0 and later"
        from ..kernels import configs

        largest = configs.largest_head_dim(machine, spec.dtype.itemsize)
        if head_dim > largest:
            return f"head_dim {head_dim}; it computes up to {largest}"
        return None

    def path(self, spec: AttentionSpec) -> str:
        from .triton_plan import Planner

        planner = Planner(spec, _machine(spec.device), _precision(spec.dtype))
        way = "split-KV decode" if planner.splits > 1 else "decode" if planner.phase == "decode" else "tiled forward"
        return f"{way} in Triton" + (" (interpreted)" if _is_interpreted() else "")

    def prepare(self, spec: AttentionSpec) -> Runner:
        return TritonRunner(spec)
