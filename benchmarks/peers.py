"""The peers: one set-up function each, which returns a step that does the same work, or says why it cannot.

Every peer gets the layout, mask form and preparation that suit it best; masks and sessions are made before the clock
starts. All run with torch's number of threads.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .measure import NotApplicableError
from .workload import Step, Workload, with_backward

Setup = Callable[[Workload], Step]


# ---------------------------------------------------------------------------------------------------------- PyTorch


def sdpa(work: Workload) -> Step:
    """`F.scaled_dot_product_attention`: its flash kernel where it takes one; windows and padding as a dense mask."""
    case, mask = work.case, work.float_mask()
    is_causal = case.causal and mask is None and case.seqlen_q > 1
    grouped = case.group_size > 1

    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal, enable_gqa=grouped)

    return with_backward(work, forward)


def eager(work: Workload) -> Step:
    """Two matrix products and a softmax, as model code writes it."""
    case, mask = work.case, work.float_mask()
    if mask is None and case.causal and case.seqlen_q > 1:
        mask = torch.zeros(case.seqlen_q, case.seqlen_k, dtype=work.dtype)
        mask = mask.masked_fill(~case.visible()[0, 0], float("-inf"))
    scale = case.head_dim**-0.5

    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # The heads of a group as rows: K and V need not be repeated.
        q = q.reshape(q.shape[0], case.num_kv_heads, -1, case.head_dim)
        scores = q @ k.transpose(-1, -2) * scale  # (batch, num_kv_heads, group_size * seqlen_q, seqlen_k)
        if mask is not None:
            scores = (scores.unflatten(2, (case.group_size, -1)) + mask.unsqueeze(-3)).flatten(2, 3)
        out = torch.softmax(scores, dim=-1) @ v
        return out.reshape(case.batch, case.num_heads, case.seqlen_q, -1)

    return with_backward(work, forward)


def flex(work: Workload) -> Step:
    """Compiled `flex_attention` with a block mask, so that empty blocks are skipped."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    case = work.case
    if case.backward:
        raise NotApplicableError("flex_attention has no backward pass on the CPU")
    if min(case.seqlen_k, case.seqlen_q if case.seqlen_q > 1 else case.seqlen_k) < 128:
        raise NotApplicableError("below the block size of flex_attention")
    lengths, left = work.lengths, case.window_left

    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        row = i + (case.seqlen_k - case.seqlen_q)
        seen = j >= 0
        if case.causal:
            seen = seen & (j <= row)
        if left is not None:
            seen = seen & (j >= row - left)
        return seen & (j < lengths[b]) if case.padded else seen

    block_mask = None
    if case.padded or (case.causal and case.seqlen_q > 1):
        batch = case.batch if case.padded else None
        block_mask = create_block_mask(visible, batch, None, case.seqlen_q, case.seqlen_k, device="cpu")
    torch._dynamo.reset()  # each case is a graph of its own: past the recompile limit it would run uncompiled
    compiled: Any = torch.compile(flex_attention, fullgraph=True, dynamic=False)

    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return compiled(q, k, v, block_mask=block_mask, enable_gqa=case.group_size > 1)

    step = with_backward(work, forward)
    step()
    return step


# -------------------------------------------------------------------------------------------------- other runtimes


def onnxruntime(work: Workload) -> Step:
    """ONNX Runtime's fused operators, with input and output bound to fixed memory."""
    case = work.case
    _needs_package("onnxruntime")
    _needs_package("onnx")
    _only_float32_forward(work, "ONNX Runtime's CPU operators")
    if case.window_left is not None or case.group_size > 1:
        return _ort_grouped_query(work)
    return _ort_multi_head(work)


def _ort_session(nodes: list[Any], inputs: dict[str, tuple[Any, list[int]]], outputs: list[str]) -> Any:
    """A session of one graph; inputs by name as (ONNX element type, shape)."""
    import onnx
    import onnxruntime as ort

    graph = onnx.helper.make_graph(
        nodes,
        "attention",
        [onnx.helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in inputs.items()],
        [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in outputs],
    )
    opsets = [onnx.helper.make_opsetid("", 17), onnx.helper.make_opsetid("com.microsoft", 1)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=8)
    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    # Its idle threads must not spin while another peer is on the clock.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _ort_value(tensor: Tensor) -> Any:
    """The tensor's memory as OrtValue, without a copy; the tensor has to stay alive."""
    import onnxruntime as ort

    return ort.OrtValue.ortvalue_from_numpy(tensor.numpy())


def _heads_last(t: Tensor) -> Tensor:
    """`(batch, heads, seqlen, head_dim)` -> contiguous `(batch, seqlen, heads * head_dim)`."""
    return t.transpose(1, 2).flatten(2).contiguous()


def _ort_multi_head(work: Workload) -> Step:
    import onnx

    case, kind = work.case, onnx.TensorProto.FLOAT
    hidden = case.num_heads * case.head_dim
    tensors = {n: _heads_last(t) for n, t in zip("qkv", (work.query, *work.pairs[0]), strict=True)}
    inputs = {n: (kind, [case.batch, t.shape[1], hidden]) for n, t in tensors.items()}
    names = ["q", "k", "v"]
    if case.padded:
        tensors["lengths"] = work.lengths
        inputs["lengths"] = (onnx.TensorProto.INT32, [case.batch])
        names += ["", "lengths"]
    node = onnx.helper.make_node(
        "MultiHeadAttention",
        names,
        ["out"],
        domain="com.microsoft",
        num_heads=case.num_heads,
        unidirectional=int(case.causal),
    )
    out = torch.zeros(case.batch, case.seqlen_q, hidden)
    return _ort_step(work, _ort_session([node], inputs, ["out"]), tensors, {"out": out})


def _ort_grouped_query(work: Workload) -> Step:
    """GroupQueryAttention: causal, with windows, grouped heads and a cache that is written in place."""
    import onnx

    case = work.case
    if not case.causal and case.seqlen_q > 1:
        raise NotApplicableError("GroupQueryAttention is always causal")
    # The newest seqlen_q keys come in as key and value, the others stand in the cache.
    old = case.seqlen_k - case.seqlen_q
    k, v = work.pairs[0]
    tensors = {"q": _heads_last(work.query), "k": _heads_last(k[:, :, old:]), "v": _heads_last(v[:, :, old:])}
    if old:
        tensors["past_k"], tensors["past_v"] = k.clone(), v.clone()
    tensors["last"] = torch.full((case.batch,), case.seqlen_k - 1, dtype=torch.int32)
    tensors["total"] = torch.tensor([case.seqlen_k], dtype=torch.int32)
    kinds = {torch.float32: onnx.TensorProto.FLOAT, torch.int32: onnx.TensorProto.INT32}
    inputs = {name: (kinds[t.dtype], list(t.shape)) for name, t in tensors.items()}
    names = ["q", "k", "v", "past_k" if old else "", "past_v" if old else "", "last", "total"]
    node = onnx.helper.make_node(
        "GroupQueryAttention",
        names,
        ["out", "new_k", "new_v"],
        domain="com.microsoft",
        num_heads=case.num_heads,
        kv_num_heads=case.num_kv_heads,
        local_window_size=-1 if case.window_left is None else case.window_left + 1,
    )
    outputs = {"out": torch.zeros(case.batch, case.seqlen_q, case.num_heads * case.head_dim)}
    if old:  # the cache is written where it stands
        outputs |= {"new_k": tensors["past_k"], "new_v": tensors["past_v"]}
    else:
        outputs |= {"new_k": torch.zeros_like(k), "new_v": torch.zeros_like(v)}
    return _ort_step(work, _ort_session([node], inputs, list(outputs)), tensors, outputs)


def _ort_step(work: Workload, session: Any, tensors: dict[str, Tensor], outputs: dict[str, Tensor]) -> Step:
    case = work.case
    # A cold case goes around as many copies of the cache as the others do.
    caches = [name for name in ("past_k", "past_v") if name in tensors]
    copies = len(work.pairs) if caches else 1
    bindings = []
    for copy in range(copies):
        fresh = {name: tensors[name] if copy == 0 else tensors[name].clone() for name in caches}
        binding = session.io_binding()
        for name, tensor in (tensors | fresh).items():
            binding.bind_ortvalue_input(name, _ort_value(tensor))
        written = {"new_k": fresh["past_k"], "new_v": fresh["past_v"]} if caches else {}
        for name, tensor in (outputs | written).items():
            binding.bind_ortvalue_output(name, _ort_value(tensor))
        bindings.append((binding, fresh))
    count = 0

    def step() -> tuple[Tensor, ...]:
        nonlocal count
        session.run_with_iobinding(bindings[count % copies][0])
        count += 1
        out = outputs["out"].view(case.batch, case.seqlen_q, case.num_heads, case.head_dim)
        return (out.transpose(1, 2),)

    step.alive = tensors  # type: ignore[attr-defined]  # the bindings hold addresses only
    return step


def openvino(work: Workload) -> Step:
    """OpenVINO's scaled_dot_product_attention."""
    case = work.case
    _needs_package("openvino")
    _only_float32_forward(work, "this benchmark's OpenVINO graph")
    if case.group_size > 1:
        raise NotApplicableError("no grouped heads in its scaled_dot_product_attention")
    import openvino as ov
    import openvino.opset13 as ops

    mask = work.float_mask()
    arrays = [t.numpy() for t in (work.query, *work.pairs[0])]
    if mask is not None:
        arrays.append(mask.expand(case.batch, 1, case.seqlen_q, case.seqlen_k).contiguous().numpy())
    parameters = [ops.parameter(list(a.shape), np.float32) for a in arrays]
    is_causal = case.causal and mask is None
    node = ops.scaled_dot_product_attention(*parameters, causal=is_causal)
    settings = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": "f32",
        "PERFORMANCE_HINT": "LATENCY",
    }
    compiled = ov.Core().compile_model(ov.Model([node], parameters), "CPU", settings)
    request = compiled.create_infer_request()
    for index, array in enumerate(arrays):
        request.set_input_tensor(index, ov.Tensor(array, shared_memory=True))
    out = torch.zeros(work.query.shape)
    request.set_output_tensor(0, ov.Tensor(out.numpy(), shared_memory=True))

    def step() -> tuple[Tensor, ...]:
        request.infer()
        return (out,)

    step.alive = arrays  # type: ignore[attr-defined]  # the request holds addresses only

    return step


def _needs_package(name: str) -> None:
    if importlib.util.find_spec(name) is None:
        raise NotApplicableError(f"{name} is not installed")


def _only_float32_forward(work: Workload, who: str) -> None:
    if work.case.backward:
        raise NotApplicableError("inference only")
    if work.dtype != torch.float32:
        raise NotApplicableError(f"{who}: float32 only")


#: Every peer by name. SDPA comes first: it is the one that the goals are set against.
PEERS: dict[str, Setup] = {
    "sdpa": sdpa,
    "eager": eager,
    "flex": flex,
    "onnxruntime": onnxruntime,
    "openvino": openvino,
}


def choose(names: list[str] | None) -> list[str]:
    """Peers by name, all by default.

    Raises:
        ValueError: there is no peer of that name.
    """
    for name in names or []:
        if name not in PEERS:
            raise ValueError(f"no peer {name!r}; there are: {', '.join(PEERS)}")
    return list(PEERS if names is None else names)
