"""flash_attn_with_kvcache: new keys into a cache, in place, then attention over it where it lies."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..ops import run, runner_for
from ..spec import Operands, Options, check, check_pages, options_of, parse_flag
from .ops.triton.rotary import check_tables, rotate, rows_at
from .options import OPEN, PADDED, PAGES, softcap_of, window_of, with_contiguous_rows


class _Step(NamedTuple):
    """What a call says beside the queries, the cache and the options of attention; lengths as int32 (batch,)."""

    k: Tensor | None
    v: Tensor | None
    rotary_cos: Tensor | None
    rotary_sin: Tensor | None
    cache_batch_idx: Tensor | None
    cache_leftpad: Tensor | None
    block_table: Tensor | None
    rotary_interleaved: bool
    alibi_slopes: Tensor | None
    return_lse: bool


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = OPEN,
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention over a KV cache, into which new keys and values are written first, with flash-attn's signature.

    For inference: no gradient is recorded, as in flash-attn. The cache is read where it lies, never copied; under
    autocast it keeps its dtype, which q, k and v take.

    Args:
        q: (batch, seqlen_q, num_heads, head_dim).
        k_cache: (batch_cache, seqlen_cache, num_kv_heads, head_dim); with ``block_table`` pages, (num_pages, page_size,
            num_kv_heads, head_dim), of any page_size. Any strides with a contiguous last dimension.
        v_cache: likewise, with head_dim_v.
        k, v: (batch, seqlen_new, num_kv_heads, head_dim), in the cache's dtype: written to places ``cache_seqlens`` and
            on, of which there must be enough.
        rotary_cos, rotary_sin: (at least the longest position + 1, rotary_dim / 2), any even rotary_dim up to head_dim.
            Together with ``k``, which is turned by the positions that it is written to before it is. A query row ``i``
            is turned by position ``cache_seqlens + i`` if ``causal`` or a window is given, else by ``cache_seqlens``.
        cache_seqlens: keys of each sequence that are in the cache before the new ones, left padding counted: one
            integer, or int32 (batch,). None is all of the cache.
        cache_batch_idx: int32 (batch,), the entry of the cache of each sequence; None is the first ``batch`` entries.
            Entries that are not distinct get new keys from any of their sequences.
        cache_leftpad: int32 (batch,), where each sequence's keys begin. It moves no position.
        block_table: int32 (batch, max_pages), the pages of each sequence in order; not with ``cache_batch_idx`` or
            ``cache_leftpad``.
        softmax_scale, causal, window_size, softcap, alibi_slopes: as in
            :func:`~transformer_fast.flash_attn.flash_attn_func`; the last query row stands at the last key, new ones
            included.
        rotary_interleaved: pairs are numbers 2i and 2i + 1 (GPT-J), else i and i + rotary_dim / 2 (GPT-NeoX).
        num_splits: how flash-attn divides the keys among multiprocessors, a hint about speed; here the kernels choose.
        return_softmax_lse: also return the log-sum-exp.

    Returns:
        out (batch, seqlen_q, num_heads, head_dim_v); with ``return_softmax_lse`` also softmax_lse, float32 (batch,
        num_heads, seqlen_q).

    Raises:
        ValueError, TypeError: an argument is wrong, or does not go with another; nothing has been written then.
    """
    if type(num_splits) is not int or num_splits < 0:
        raise ValueError(f"num_splits is {num_splits!r}; allowed: an integer, 0 to let the kernel choose")
    for name, tensor in (("k_cache", k_cache), ("v_cache", v_cache), ("k", k), ("v", v)):
        if not isinstance(tensor, Tensor) and (tensor is not None or tensor is k_cache or tensor is v_cache):
            raise TypeError(f"{name} is of type {type(tensor).__name__}; allowed: a torch.Tensor {PADDED}")
    parse_flag(return_softmax_lse, "return_softmax_lse")
    window = window_size if window_size is OPEN else window_of(window_size)
    cap = softcap_of(softcap) if softcap else None
    options = options_of(causal, window, softmax_scale, cap, 0.0, False, "auto")
    q = with_contiguous_rows(q, "q", 4, PADDED)
    seqlens = None if cache_seqlens is None else _lengths(cache_seqlens, q)
    where = cache_batch_idx, cache_leftpad, block_table
    step = _Step(k, v, rotary_cos, rotary_sin, *where, rotary_interleaved, alibi_slopes, return_softmax_lse)
    autocast = torch.is_autocast_enabled(q.device.type)
    if torch.is_grad_enabled() or autocast:
        with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
            if autocast:  # which would make a copy of the cache
                q = q.to(k_cache.dtype)
                k, v = (t if t is None else t.to(k_cache.dtype) for t in (k, v))
                step = step._replace(k=k, v=v)
            out, lse = _take_step(q, k_cache, v_cache, seqlens, step, options)
    else:
        out, lse = _take_step(q, k_cache, v_cache, seqlens, step, options)
    return (out, lse) if return_softmax_lse else out  # type: ignore[return-value]


def _lengths(cache_seqlens: Any, q: Tensor) -> Tensor:
    """``cache_seqlens`` as int32 (batch,)."""
    if isinstance(cache_seqlens, int) and not isinstance(cache_seqlens, bool):
        return torch.full((q.shape[0],), cache_seqlens, dtype=torch.int32, device=q.device)
    _check_int32(cache_seqlens, "cache_seqlens", q.shape[0], "an integer or ")
    return cache_seqlens


def _check_int32(tensor: Any, name: str, batch: int, also: str = "") -> None:
    if not isinstance(tensor, Tensor) or tensor.dtype != torch.int32:
        kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise TypeError(f"{name} is of type {kind}; allowed: {also}an int32 torch.Tensor (batch,)")
    if tensor.dim() != 1 or tensor.shape[0] != batch:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; allowed: ({batch},), the batch of q")


def _take_step(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, seqlens: Tensor | None, step: _Step, options: Options
) -> tuple[Tensor, Tensor | None]:
    """Writes the new keys, then attends: (batch, seqlen_q, num_heads, head_dim_v), and lse if asked for."""
    _check_company(q, k_cache, v_cache, seqlens, step)
    if step.k is not None:
        assert seqlens is not None
        q = _write(q, k_cache, v_cache, seqlens, step, options)
        seqlens = seqlens + step.k.shape[1]
    if step.cache_batch_idx is not None and step.cache_leftpad is not None and q.shape[0]:
        return _one_by_one(q, k_cache, v_cache, seqlens, step, options)
    return run(_operands(q, k_cache, v_cache, seqlens, step), options, step.return_lse, "bshd")


def _operands(q: Tensor, k_cache: Tensor, v_cache: Tensor, seqlens: Tensor | None, step: _Step) -> Operands:
    """The problem in flash-attn's order of dimensions. Where entries of the cache are chosen, each is one page."""
    mask, table = None, step.block_table
    if step.cache_batch_idx is not None:
        table = step.cache_batch_idx.unsqueeze(1)
    if table is not None:
        if seqlens is None:
            seqlens = _lengths(k_cache.shape[1] * table.shape[1], q)
    else:
        if k_cache.shape[0] != q.shape[0]:
            k_cache, v_cache = k_cache[: q.shape[0]], v_cache[: q.shape[0]]
        if step.cache_leftpad is not None:
            mask = torch.arange(k_cache.shape[1], device=q.device) >= step.cache_leftpad.unsqueeze(1)
    return Operands(q, k_cache, v_cache, None, None, seqlens, mask, None, step.alibi_slopes, None, None, table)


def _check_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, seqlens: Tensor, step: _Step, options: Options
) -> None:
    """Raise for what attention would refuse, before anything is written. Remembered, as attention remembers it."""
    operands = _operands(q, k_cache, v_cache, seqlens, step)
    if torch.compiler.is_compiling():
        check(operands.to_bhsd("bshd"), options)
    else:
        runner_for(operands, options, order="bshd")


def _check_entries(cache_batch_idx: Tensor, size: int) -> None:
    for b, entry in enumerate(cache_batch_idx.tolist()):
        if not 0 <= entry < size:
            raise ValueError(f"cache_batch_idx[{b}] is {entry}; allowed: 0 to {size - 1}, the cache")


def _check_company(q: Tensor, k_cache: Tensor, v_cache: Tensor, seqlens: Tensor | None, step: _Step) -> None:
    """Raise for arguments that lack what they need, or have what they cannot have, beside them."""
    batch = q.shape[0]
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        if cache.dim() != 4:
            raise ValueError(
                f"{name} has shape {tuple(cache.shape)}; allowed: {PADDED if step.block_table is None else PAGES}"
            )
    if step.cache_batch_idx is not None or step.cache_leftpad is not None:
        for name in ("cache_batch_idx", "cache_leftpad"):
            if getattr(step, name) is not None:
                _check_int32(getattr(step, name), name, batch)
                if getattr(step, name).device != q.device:
                    raise ValueError(f"{name} is on device {getattr(step, name).device}; allowed: {q.device}, as q")
                if step.block_table is not None:
                    raise ValueError(f"{name} is given with block_table; allowed: None, as in flash-attn")
        if step.cache_batch_idx is not None and (q.device.type == "cpu" or step.cache_leftpad is not None):
            _check_entries(step.cache_batch_idx, k_cache.shape[0])
    if step.k is not None or step.v is not None:
        if step.k is None or step.v is None:
            raise ValueError(f"{'v' if step.k is None else 'k'} is given alone; allowed: both k and v, or neither")
        if seqlens is None:
            raise ValueError("cache_seqlens is None with new k and v; allowed: where they go, an integer or (batch,)")
    if step.rotary_cos is not None or step.rotary_sin is not None:
        if step.rotary_cos is None or step.rotary_sin is None:
            alone = "rotary_sin" if step.rotary_cos is None else "rotary_cos"
            raise ValueError(f"{alone} is given alone; allowed: both rotary_cos and rotary_sin, or neither")
        if step.k is None:
            raise ValueError("rotary_cos is given without k and v; allowed: with new k and v, as in flash-attn")
    if k_cache.shape[0] < batch and step.block_table is None and step.cache_batch_idx is None:
        raise ValueError(f"k_cache has batch {k_cache.shape[0]}; allowed: at least {batch}, the batch of q")


def _write(q: Tensor, k_cache: Tensor, v_cache: Tensor, seqlens: Tensor, step: _Step, options: Options) -> Tensor:
    """New keys and values, turned if there are tables, into the cache; returns the queries, turned likewise."""
    k, v, cos, sin = step.k, step.v, step.rotary_cos, step.rotary_sin
    assert k is not None and v is not None
    _check_new(k, "k", k_cache, q.shape[0])
    _check_new(v, "v", v_cache, q.shape[0])
    if k.shape[1] != v.shape[1]:
        raise ValueError(f"v has seqlen {v.shape[1]}; allowed: {k.shape[1]}, as k")
    _check_attention(q, k_cache, v_cache, seqlens, step, options)
    places = seqlens.unsqueeze(1) + torch.arange(k.shape[1], device=q.device)  # (batch, seqlen_new), int64
    where = _where(places, k_cache, step)
    if cos is not None:
        assert sin is not None
        check_tables(k, cos, sin)
        rows = seqlens.unsqueeze(1)
        if options.window_left != -1 or options.window_right != -1:
            rows = rows + torch.arange(q.shape[1], device=q.device)
        q = _turned(q, cos, sin, rows, step.rotary_interleaved)
        k = _turned(k, cos, sin, places, step.rotary_interleaved)
    k_cache.index_put_(where, k)
    v_cache.index_put_(where, v)
    return q


def _check_new(tensor: Tensor, name: str, cache: Tensor, batch: int) -> None:
    if tensor.dtype != cache.dtype:
        raise TypeError(f"{name} has dtype {tensor.dtype}; allowed: {cache.dtype}, as {name}_cache")
    # Written without this check, one head or one sequence would silently broadcast.
    if tensor.dim() != 4 or tensor.shape[0] != batch or tensor.shape[2:] != cache.shape[2:]:
        allowed = f"({batch}, seqlen_new, {cache.shape[2]}, {cache.shape[3]})"
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; allowed: {allowed}, as {name}_cache")


def _where(places: Tensor, k_cache: Tensor, step: _Step) -> tuple[Tensor, Tensor]:
    """Indices into the first two dimensions of a cache for the keys ``places`` (batch, seqlen_new) of each sequence."""
    page_size, table = k_cache.shape[1], step.block_table
    capacity = page_size if table is None else page_size * table.shape[1]
    if places.device.type == "cpu" and places.numel():  # elsewhere to look would stall the device
        first, last = min(places[:, 0].tolist()), max(places[:, -1].tolist())
        if first < 0 or last >= capacity:
            raise ValueError(
                f"cache_seqlens puts new keys at {first} to {last}; allowed: 0 to {capacity - 1}, the cache"
            )
    if table is not None:
        if places.device.type == "cpu" and places.shape[1]:
            check_pages(table, places[:, -1] + 1, k_cache.shape[0], page_size)
        return table.gather(1, places // page_size).long(), places % page_size
    if step.cache_batch_idx is not None:
        return step.cache_batch_idx.long().unsqueeze(1), places
    return torch.arange(places.shape[0], device=places.device).unsqueeze(1), places


def _turned(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, interleaved: bool) -> Tensor:
    """(batch, seqlen, num_heads, head_dim) turned by positions (batch, seqlen or 1)."""
    return rotate(x, rows_at(cos, positions).unsqueeze(-2), rows_at(sin, positions).unsqueeze(-2), interleaved)


def _one_by_one(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, seqlens: Tensor | None, step: _Step, options: Options
) -> tuple[Tensor, Tensor | None]:
    """A call for each sequence, its keys a view: neither entries in any order nor left padding needs a copy then."""
    assert step.cache_batch_idx is not None and step.cache_leftpad is not None
    entries, begins = step.cache_batch_idx.tolist(), step.cache_leftpad.tolist()
    size, slopes = k_cache.shape[1], step.alibi_slopes
    ends = [size] * len(entries) if seqlens is None else seqlens.tolist()
    outs, lses = [], []
    for b, (entry, begin, end) in enumerate(zip(entries, begins, ends, strict=True)):
        if not 0 <= end <= size:
            raise ValueError(f"cache_seqlens leads to {end} keys; allowed: 0 to {size}, the cache")
        begin = min(max(begin, 0), end)
        key, value = (t[entry : entry + 1, begin:end] for t in (k_cache, v_cache))
        own = slopes if slopes is None or slopes.dim() == 1 else slopes[b]
        out, lse = run(Operands(q[b : b + 1], key, value, alibi_slopes=own), options, step.return_lse, "bshd")
        outs.append(out)
        lses.append(lse)
    return torch.cat(outs), torch.cat(lses) if step.return_lse else None  # type: ignore[arg-type]
