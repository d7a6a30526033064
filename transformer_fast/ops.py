"""The road every call takes: one forward op, one backward op, and what PyTorch wants to know about them.

Eager calls go straight to the back end, since dispatch through ``torch.library`` costs more than a small attention.
Whatever traces or transforms (``torch.compile``, export, fake tensors, ``torch.func``, dispatch modes) goes
through the ops ``transformer_fast::attention`` and ``transformer_fast::attention_backward``, which do the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C import _get_tracing_state, _is_any_autocast_enabled, _len_torch_dispatch_stack
from torch._C._functorch import is_legacy_batchedtensor, peek_interpreter_stack
from torch.autograd import forward_ad
from torch.compiler import is_compiling
from torch.nn import Parameter

from .backends import Gradients, Results, Runner, select_backend
from .layout import Order, new_output
from .spec import Operands, Options, UnsupportedError, check, make_spec

_NUM_OPERANDS, _NUM_OPTIONS = len(Operands._fields), len(Options._fields)
_BIAS, _SINKS, _BLOCK_TABLE = (Operands._fields.index(name) for name in ("bias", "sinks", "block_table"))

_runners: dict[tuple[Any, ...], Runner] = {}
_MAX_RUNNERS = 4096


def runner_for(
    operands: Operands, options: Options, tensors: Sequence[Tensor] | None = None, order: Order = "bhsd"
) -> Runner:
    """The back end made ready for a problem; remembered, so that the checks run once per shape and options.

    Args:
        tensors: the operands that there are, where the caller knows them.
        order: of query, key, value and the runner's output.
    """
    if tensors is None:
        tensors = [t for t in operands if t is not None]
    query, key, value = operands[:3]
    try:
        problem = (  # in full: a loop over the three takes half a microsecond more, in every call
            options,
            order,
            (query.shape, query.stride(), query.dtype, query.device),
            (key.shape, key.stride(), key.dtype, key.device),
            (value.shape, value.stride(), value.dtype, value.device),
        )
        if len(tensors) > 3:
            problem += _beyond_qkv(operands)
    except RuntimeError:  # a sparse or nested tensor has no strides
        check(operands.to_bhsd(order), options)
        raise
    found = _runners.get(problem)
    if found is None:
        spec = make_spec(operands.to_bhsd(order), options)
        found = select_backend(spec).prepare(spec).in_order(order)
        if len(_runners) >= _MAX_RUNNERS:  # ever-changing shapes must not grow memory without end
            _runners.clear()
        _runners[problem] = found
    return found


def _beyond_qkv(operands: Operands) -> tuple[Any, ...]:
    """What the operands after query, key and value have to do with the choice and the checks."""
    slopes = operands.alibi_slopes
    return (
        slopes is not None and slopes.requires_grad and torch.is_grad_enabled(),
        operands.block_table is not None and _takes_gradient(operands),
        *[None if t is None else (t.shape, t.stride(), t.dtype, t.device) for t in operands[3:]],
    )


# ------------------------------------------------------------------------------------------------------- eager


class _Attention(torch.autograd.Function):
    """Gradients in eager mode (an autograd.Function costs a quarter of register_autograd per call).

    Autograd is given the tensors that there are, and hands back those that were asked for: it takes time for each
    argument and result, even None.
    """

    @staticmethod
    def forward(ctx: Any, call: tuple[Runner, Operands, bool], *tensors: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        runner, operands, need_lse = call
        results = runner.forward(operands, need_lse=need_lse, need_stats=True)
        ctx.save_for_backward(*tensors, *results)
        ctx.runner = runner
        if not need_lse:
            return results.out
        assert results.lse is not None
        ctx.set_materialize_grads(False)
        return results.out, results.lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None = None) -> tuple[Any, ...]:
        runner, spec, saved = ctx.runner, ctx.runner.spec, iter(ctx.saved_tensors)
        operands = Operands(*(None if layout is None else next(saved) for layout in spec.layouts))  # type: ignore[arg-type]
        results, given = Results(*saved), iter(ctx.needs_input_grad[1:])
        needs = [layout is not None and next(given) for layout in spec.layouts]
        if dout is None:
            dout = torch.zeros_like(results.out)
        # create_graph=True: whoever differentiates again must hear that it cannot be. is_grads_batched=True: many.
        if torch.is_grad_enabled() or any(g is not None and is_legacy_batchedtensor(g) for g in (dout, dlse)):
            grads = _differentiable_backward(runner, operands, results, dout, dlse, (needs[_BIAS], needs[_SINKS]))
        else:
            # Asked again: saved-tensor hooks may have given the operands other strides than forward saw.
            runner = runner_for(operands, spec.options, order=runner.order)
            grads = runner.backward(operands, results, dout, dlse, dbias=needs[_BIAS], dsinks=needs[_SINKS])
        all_grads = zip(spec.layouts, _by_operand(grads, needs), strict=True)
        return None, *(grad for layout, grad in all_grads if layout is not None)


#: ``_Attention.apply`` without what PyTorch looks for there in each call: transforms, which go through the ops.
_apply_attention = super(torch.autograd.Function, _Attention).apply


def _differentiable_backward(
    runner: Runner, operands: Operands, results: Results, dout: Tensor, dlse: Tensor | None, wanted: tuple[bool, bool]
) -> Sequence[Tensor | None]:
    """Backward by the op, in its order of dimensions."""
    operands, results = operands.to_bhsd(runner.order), results.with_lse()
    if runner.order != "bhsd":
        results, dout = results.transposed(), dout.transpose(1, 2)
    grads = _TransformedBackward.apply(*operands, *runner.spec.options, *results, dout, dlse, *wanted)
    return Gradients(*grads).to_order(runner.order)


def _by_operand(grads: Sequence[Tensor | None], needs: Sequence[bool]) -> list[Tensor | None]:
    """Gradients of (query, key, value, bias, sinks) -> one entry an operand, None where it takes no gradient."""
    result: list[Tensor | None] = [None] * _NUM_OPERANDS
    for place, grad in zip((0, 1, 2, _BIAS, _SINKS), grads, strict=True):
        result[place] = grad if needs[place] else None
    return result


def _is_transformed() -> bool:
    """Are we inside torch.func (grad, vmap, ...)? A compiler deals with those itself."""
    return not is_compiling() and peek_interpreter_stack() is not None


def is_watched() -> bool:
    """Is somebody watching who must see PyTorch's operators: a compiler, a tracer, a dispatch mode, a transform?"""
    return (
        is_compiling()
        or _len_torch_dispatch_stack() > 0
        or peek_interpreter_stack() is not None
        or _get_tracing_state() is not None
    )


def is_plain_inference(*tensors: Tensor | None) -> bool:
    """Are these tensors in a CPU's memory, that nobody watches, casts or differentiates? None is none."""
    if is_watched() or torch.is_autocast_enabled("cpu") or forward_ad._current_level >= 0:
        return False
    differentiates = torch.is_grad_enabled()
    for tensor in tensors:
        if tensor is None:
            continue
        if type(tensor) not in (Tensor, Parameter) or not tensor.is_cpu or tensor.layout is not torch.strided:
            return False
        if (differentiates and tensor.requires_grad) or tensor.is_neg() or _has_no_memory(tensor):
            return False
    return True


def _has_no_memory(tensor: Tensor) -> bool:
    """Is this a gradient of zeros that nobody wrote, or many gradients that pass for one (is_grads_batched=True)?"""
    return tensor._is_zerotensor() or is_legacy_batchedtensor(tensor)


def _is_traced(operands: Operands, options: Options, tensors: Sequence[Any], order: Order) -> bool:
    """Must the call be an op, because somebody watches, or since there is a tensor that only the dispatcher knows?

    ``tensors`` are the operands that there are.
    """
    must_dispatch = is_watched()
    for tensor in tensors:
        kind = type(tensor)
        if kind is Tensor or kind is Parameter:
            must_dispatch = must_dispatch or tensor.is_neg()  # memory has the other sign: the dispatcher resolves it
            continue
        if not isinstance(tensor, Tensor):
            check(operands.to_bhsd(order), options)  # raises, naming the argument
        must_dispatch = True
    return must_dispatch or operands.query.is_meta


def _takes_gradient(operands: Sequence[Tensor | None]) -> bool:
    """Must autograd hear of this call?"""
    if not torch.is_grad_enabled():
        return False
    # A loop, since any() over a generator costs three times as much, in every call.
    for tensor in operands:  # noqa: SIM110
        if tensor is not None and tensor.requires_grad:
            return True
    return False


def _refuse_tangents(operands: Operands) -> None:
    """Forward-mode derivatives would be lost in silence."""
    if any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in operands):
        _no_jvp(None)


def autocast_operands(operands: Operands) -> Operands:
    """Query, key and value in the autocast dtype; beside a paged cache, which keeps its dtype, the query in that.

    Bias, slopes and sinks keep theirs: they are added in float32.
    """
    device_type = operands.query.device.type
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return operands
    dtype = torch.get_autocast_dtype(device_type)
    names: tuple[str, ...] = ("query", "key", "value")
    if operands.block_table is not None and operands.key.is_floating_point():
        names, dtype = ("query",), operands.key.dtype  # to cast a cache would be to copy it
    cast = {
        name: tensor.to(dtype)
        for name in names
        if (tensor := getattr(operands, name)).is_floating_point() and tensor.dtype not in (dtype, torch.float64)
    }
    operands = operands._replace(**cast)
    for name in ("bias", "sinks"):  # these may be float32 or the query's dtype, whatever the query has become
        tensor = getattr(operands, name)
        if tensor is not None and tensor.is_floating_point() and tensor.dtype not in (dtype, torch.float32):
            operands = operands._replace(**{name: tensor.to(torch.float32)})
    return operands


def run(operands: Operands, options: Options, need_lse: bool, order: Order = "bhsd") -> tuple[Tensor, Tensor | None]:
    """One attention problem from operands and options: the one place where the ways part.

    ``order`` is that of query, key, value and the output, of a padded batch.
    """
    given: Sequence[Tensor | None] = operands  # whatever the annotations of callers say
    if given[0] is None or given[1] is None or given[2] is None:
        check(operands, options)  # raises, naming the argument
    tensors = [t for t in given if t is not None]
    traced = _is_traced(operands, options, tensors, order)
    if traced or _is_any_autocast_enabled():
        operands = autocast_operands(operands)
    if options.dropout_p > 0.0:
        seed = torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=operands.query.device)
        operands = operands._replace(rng_seed=seed)
    if traced:
        operands = operands.to_bhsd(order)
        if not is_compiling():
            select_backend(make_spec(operands, options))  # raises where a call that runs would
        op = _TransformedAttention.apply if _is_transformed() else attention_op
        out, lse, _ = op(*operands, *options)
        return (out if order == "bhsd" else out.transpose(1, 2).contiguous()), lse  # as in memory without a tracer
    if operands is not given:
        tensors = [t for t in operands if t is not None]
    runner = runner_for(operands, options, tensors, order)
    if not runner.is_differentiable:
        if forward_ad._current_level >= 0:
            _refuse_tangents(operands)
        if _takes_gradient(tensors):
            results = _apply_attention((runner, operands, need_lse), *tensors)
            return results if need_lse else (results, None)
    out, lse, _ = runner.forward(operands, need_lse=need_lse, need_stats=False)
    return out, lse


# --------------------------------------------------------------------------------------------------- torch.library

_ARGUMENTS = (
    "Tensor query, Tensor key, Tensor value, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? seqlens_k, "
    "Tensor? key_padding_mask, Tensor? bias, Tensor? alibi_slopes, Tensor? sinks, Tensor? rng_seed, "
    "Tensor? block_table, SymInt max_seqlen_q, SymInt max_seqlen_k, float? softmax_scale, SymInt window_left, "
    "SymInt window_right, float? softcap, float dropout_p, bool deterministic, str backend"
)


def _split(args: Sequence[Any]) -> tuple[Operands, Options, tuple[Any, ...]]:
    """Op arguments -> operands, options, and what the backward op has beyond them."""
    both = _NUM_OPERANDS + _NUM_OPTIONS
    return Operands(*args[:_NUM_OPERANDS]), Options(*args[_NUM_OPERANDS:both]), tuple(args[both:])


def _like(expected: Tensor, tensor: Tensor) -> Tensor:
    """The tensor with the strides that the fake rule promised."""
    return tensor if tensor.stride() == expected.stride() else expected.copy_(tensor)


@torch.library.custom_op(
    "transformer_fast::attention", mutates_args=(), schema=f"({_ARGUMENTS}) -> (Tensor out, Tensor lse, Tensor stats)"
)
def attention_op(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The forward op: ``Operands`` then ``Options``, in their order, to ``Results``."""
    operands, options, _ = _split(args)
    with torch.no_grad():
        out, lse, stats = runner_for(operands, options).forward(operands, need_lse=True, need_stats=True)
    assert lse is not None and stats is not None
    return _like(new_output(operands.query, out.shape[-1]), out), lse.contiguous(), stats


@attention_op.register_fake
def _(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    operands, options, _ = _split(args)
    select_backend(make_spec(operands, options))  # no graph with a call in it that would fail
    query = operands.query
    lse_shape = query.shape[:3] if query.dim() == 4 else (query.shape[1], query.shape[0])
    lse = query.new_empty(lse_shape, dtype=torch.promote_types(query.dtype, torch.float32))
    stats = query.new_empty((2, *lse_shape), dtype=torch.float32)
    return new_output(query, operands.value.shape[-1]), lse, stats


@torch.library.custom_op(
    "transformer_fast::attention_backward",
    mutates_args=(),
    schema=f"({_ARGUMENTS}, Tensor out, Tensor lse, Tensor stats, Tensor dout, Tensor? dlse, bool dbias, bool dsinks)"
    " -> (Tensor dq, Tensor dk, Tensor dv, Tensor dbias, Tensor dsinks)",
)
def attention_backward_op(*args: Any) -> tuple[Tensor, ...]:
    """The backward op; dbias and dsinks are empty where not asked for (an op cannot return None)."""
    operands, options, (out, lse, stats, dout, dlse, dbias, dsinks) = _split(args)
    promises = _fake_gradients(operands, dbias, dsinks)
    with torch.no_grad():
        grads = runner_for(operands, options).backward(
            operands, Results(out, lse, stats), dout, dlse, dbias=dbias, dsinks=dsinks
        )
    return tuple(
        promise if grad is None or promise.numel() == 0 else _like(promise, grad)
        for grad, promise in zip(grads, promises, strict=True)
    )


def _fake_gradients(operands: Operands, need_dbias: bool, need_dsinks: bool) -> list[Tensor]:
    query, bias, sinks = operands.query, operands.bias, operands.sinks
    if operands.block_table is not None:
        raise UnsupportedError("gradients through a paged cache; attention() and attention_varlen() have them")
    grads = [torch.empty_like(t) for t in operands[:3]]
    grads.append(torch.empty_like(bias) if need_dbias and bias is not None else query.new_empty(0))
    grads.append(torch.empty_like(sinks) if need_dsinks and sinks is not None else query.new_empty(0))
    return grads


@attention_backward_op.register_fake
def _(*args: Any) -> tuple[Tensor, ...]:
    operands, _, (*_, dbias, dsinks) = _split(args)
    return tuple(_fake_gradients(operands, dbias, dsinks))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    if inputs[_BLOCK_TABLE] is not None and any(ctx.needs_input_grad):
        with torch.enable_grad():  # which autograd has switched off here
            check(*_split(inputs)[:2])  # raises, naming the argument
    ctx.save_for_backward(*inputs[:_NUM_OPERANDS], *output)
    ctx.options = inputs[_NUM_OPERANDS:]
    ctx.set_materialize_grads(False)


def _op_backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None, _dstats: None) -> tuple[Any, ...]:
    *tensors, out, lse, stats = ctx.saved_tensors
    needs = ctx.needs_input_grad
    if dout is None:
        dout = torch.zeros_like(out)
    wanted = (bool(needs[_BIAS]), bool(needs[_SINKS]))
    op = _TransformedBackward.apply if _is_transformed() else attention_backward_op
    grads = op(*tensors, *ctx.options, out, lse, stats, dout, dlse, *wanted)
    return (*_by_operand(grads, needs), *[None] * _NUM_OPTIONS)


attention_op.register_autograd(_op_backward, setup_context=_setup_context)


def _no_jvp(ctx: Any, *tangents: Any) -> Any:
    raise UnsupportedError("forward-mode derivatives of a kernel; backend='reference' has them")


class _TransformedAttention(torch.autograd.Function):
    """The same rules in the one form that torch.func differentiates."""

    generate_vmap_rule = True
    jvp = staticmethod(_no_jvp)

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
        return attention_op(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(output[2])
        _setup_context(ctx, inputs, output)

    backward = staticmethod(_op_backward)


class _TransformedBackward(torch.autograd.Function):
    """The backward op in that form; it has no derivative of its own."""

    generate_vmap_rule = True
    jvp = staticmethod(_no_jvp)

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        return attention_backward_op(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[None, ...]:
        raise UnsupportedError(
            "a kernel cannot be differentiated twice; backend='reference' has derivatives of any order"
        )


def _register_autocast(device_type: str) -> None:
    """Autocast for callers of the op itself; ``attention()`` has cast before it comes here."""
    key = f"Autocast{device_type.upper()}"
    keyset = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def kernel(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
        operands, options, _ = _split(args)
        operands = autocast_operands(operands)
        with torch._C._ExcludeDispatchKeyGuard(keyset):
            return attention_op(*operands, *options)

    _library.impl("attention", kernel, key)


_library = torch.library.Library("transformer_fast", "FRAGMENT")
_register_autocast("cpu")
_register_autocast("cuda")


# ------------------------------------------------------------------------------------------------------------ vmap


def _fold(tensor: Tensor | None, in_dim: int | None, size: int) -> Tensor | None:
    """The mapped dimension goes to the front and into the batch: (v, batch, ...) -> (v * batch, ...)."""
    if tensor is None:
        return None
    tensor = tensor.unsqueeze(0).expand(size, *tensor.shape) if in_dim is None else tensor.movedim(in_dim, 0)
    return tensor.flatten(0, 1)


def _fold_operands(info: Any, in_dims: Sequence[int | None], operands: Operands) -> tuple[Operands, int]:
    """The operands with the mapped dimension inside the batch, and the batch of one entry."""
    dims = dict(zip(Operands._fields, in_dims, strict=False))
    if operands.cu_seqlens_q is not None:
        raise UnsupportedError(
            "torch.func.vmap over attention_varlen is not supported; put the sequences in cu_seqlens"
        )
    if operands.block_table is not None:
        raise UnsupportedError("torch.func.vmap over attention_paged is not supported; put the sequences in its batch")
    if dims["sinks"] is not None:
        raise UnsupportedError("torch.func.vmap over sinks is not supported; only tensors with a batch can be mapped")
    if operands.rng_seed is not None:
        raise UnsupportedError(
            "torch.func.vmap with dropout_p > 0 is not supported: its randomness rules cannot be kept"
        )
    size = info.batch_size
    folded: dict[str, Any] = {}
    for name in ("query", "key", "value", "seqlens_k", "key_padding_mask"):
        folded[name] = _fold(getattr(operands, name), dims[name], size)
    query = operands.query
    batch = query.shape[1 if dims["query"] == 0 else 0]
    for name, own_dims in (("bias", 4), ("alibi_slopes", 2)):
        tensor = getattr(operands, name)
        if tensor is None:
            continue
        mapped = dims[name] is not None
        if not mapped and (tensor.dim() < own_dims or tensor.shape[0] == 1):
            continue  # the same for every entry: broadcasts over the folded batch as it is
        tensor = tensor.movedim(dims[name], 0) if mapped else tensor[None]
        if tensor.dim() == own_dims:  # slopes (num_heads,), mapped: the same for the whole batch of an entry
            tensor = tensor.unsqueeze(1)
        folded[name] = tensor.expand(size, batch, *tensor.shape[2:]).flatten(0, 1)
    return operands._replace(**folded), batch


def _fold_stats(stats: Tensor, in_dim: int | None, size: int) -> Tensor:
    """(v, 2, batch, ...) -> (2, v * batch, ...): the planes stay in front."""
    stats = stats.unsqueeze(0).expand(size, *stats.shape) if in_dim is None else stats.movedim(in_dim, 0)
    return stats.transpose(0, 1).flatten(1, 2)


@attention_op.register_vmap
def _(info: Any, in_dims: Sequence[Any], *args: Any) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[int, int, int]]:
    operands, options, _ = _split(args)
    folded, batch = _fold_operands(info, in_dims, operands)
    out, lse, stats = attention_op(*folded, *options)
    size = (info.batch_size, batch)
    return (out.unflatten(0, size), lse.unflatten(0, size), stats.unflatten(1, size)), (0, 0, 1)


@attention_backward_op.register_vmap
def _(info: Any, in_dims: Sequence[Any], *args: Any) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
    operands, options, (out, lse, stats, dout, dlse, dbias, dsinks) = _split(args)
    if dbias or dsinks:
        raise UnsupportedError("torch.func.vmap of the gradient of bias or sinks is not supported; map over a loop")
    out_dim, lse_dim, stats_dim, dout_dim, dlse_dim = in_dims[_NUM_OPERANDS + _NUM_OPTIONS :][:5]
    size = info.batch_size
    folded, batch = _fold_operands(info, in_dims, operands)
    grads = attention_backward_op(
        *folded,
        *options,
        _fold(out, out_dim, size),
        _fold(lse, lse_dim, size),
        _fold_stats(stats, stats_dim, size),
        _fold(dout, dout_dim, size),
        _fold(dlse, dlse_dim, size),
        False,
        False,
    )
    return (*(g.unflatten(0, (size, batch)) for g in grads[:3]), *grads[3:]), (0, 0, 0, None, None)
