"""The public functions: fused attention for padded and packed batches and paged caches, and what would run where."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .backends import REGISTRY, reasons, select_backend
from .ops import run
from .spec import Operands, UnsupportedError, make_spec, options_of, parse_flag, parse_options


def four_dims(bias: Any) -> Any:
    """A bias of fewer dimensions stands for leading ones, as everywhere in broadcasting."""
    if bias is None or not isinstance(bias, Tensor) or bias.dim() >= 4:
        return bias
    return bias[(None,) * (4 - bias.dim())]


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    causal: bool = False,
    window_size: tuple[int | None, int | None] | None = None,
    seqlens_k: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    softmax_scale: float | None = None,
    dropout_p: float = 0.0,
    deterministic: bool = False,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Fused attention: ``softmax(softmax_scale * query @ key^T, masked) @ value``, without the score matrix.

    Any strides with a contiguous last dimension are taken as they are. One or a few query rows against a long cache
    (decoding) take a path that splits the keys by itself. ``transformer_fast.reference`` is the exact definition.

    Args:
        query: (batch, num_heads, seqlen_q, head_dim), float32, bfloat16, float16 or float64 (reference only).
        key: (batch, num_kv_heads, seqlen_k, head_dim); num_kv_heads divides num_heads, and query head ``h`` uses
            KV head ``h // (num_heads // num_kv_heads)``.
        value: (batch, num_kv_heads, seqlen_k, head_dim_v); head_dim_v may differ from head_dim.
        causal: row ``i`` sees keys up to ``i + seqlen_k - seqlen_q``: the last row sees the last key (bottom-right
            alignment, as in flash-attn since 2.1).
        window_size: (left, right) keys on each side of a row's position, itself excluded; None or -1 is unbounded.
            ``causal=True`` makes right 0.
        seqlens_k: int32 (batch,), key lengths of right-padded batches or caches, 0 to seqlen_k. They move the
            alignment: the last query row stands at the last valid key.
        key_padding_mask: bool (batch, seqlen_k), True = keep, any pattern. It does not move the alignment.
        bias: added to the scores (float32 or the query's dtype; -inf hides a key) or, as bool, hides keys where
            False; broadcastable to (batch, num_heads, seqlen_q, seqlen_k).
        alibi_slopes: float32 (num_heads,) or (batch, num_heads): adds ``-slope * |i + offset - j|``, where offset is
            key length minus seqlen_q (Press et al., 2022). Without gradient.
        softcap: scores become ``softcap * tanh(scores / softcap)`` before bias (Gemma 2).
        sinks: (num_heads,), float32 or the query's dtype: one extra logit a head, which takes probability and gives
            no value (gpt-oss).
        softmax_scale: default ``head_dim ** -0.5``.
        dropout_p: probability of dropping an attention weight; the mask is Philox-keyed by a seed drawn from
            PyTorch's generator, and the same on every back end.
        deterministic: bit-identical gradients from run to run, with the same number of threads.
        return_lse: also return the log-sum-exp of each row.
        backend: "auto" takes the first that can; a name takes that one or raises.

    Returns:
        (batch, num_heads, seqlen_q, head_dim_v) in the query's dtype and memory order; with ``return_lse`` also the
        natural-log lse (batch, num_heads, seqlen_q), float32, or float64 for float64 inputs. A row that sees no key
        gives 0 and -inf. Both are differentiable with respect to query, key, value, bias and sinks.

    Raises:
        ValueError, TypeError: an argument is wrong; the message names it, its value and what is allowed.
        UnsupportedError: the back end asked for by name cannot do the problem.
    """
    if return_lse is not False:
        parse_flag(return_lse, "return_lse")
    options = options_of(causal, window_size, softmax_scale, softcap, dropout_p, deterministic, backend)
    operands = Operands(
        query, key, value, None, None, seqlens_k, key_padding_mask, four_dims(bias), alibi_slopes, sinks, None
    )
    out, lse = run(operands, options, return_lse)
    return (out, lse) if return_lse else out  # type: ignore[return-value]


def attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    causal: bool = False,
    window_size: tuple[int | None, int | None] | None = None,
    alibi_slopes: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    softmax_scale: float | None = None,
    dropout_p: float = 0.0,
    deterministic: bool = False,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`attention` for sequences packed one after the other, so that no padding is stored or computed.

    Args:
        query: (total_q, num_heads, head_dim).
        key: (total_k, num_kv_heads, head_dim).
        value: (total_k, num_kv_heads, head_dim_v).
        cu_seqlens_q, cu_seqlens_k: int32 (batch + 1,), where each sequence begins; the last entry is the total.
        max_seqlen_q, max_seqlen_k: lengths that no sequence exceeds.

    The other arguments are those of :func:`attention`, for each sequence by itself.

    Returns:
        (total_q, num_heads, head_dim_v); with ``return_lse`` also lse, float32 (num_heads, total_q).

    Raises:
        ValueError, TypeError, UnsupportedError: as :func:`attention`.
    """
    for name, cu in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        if not isinstance(cu, Tensor):
            raise TypeError(f"{name} is of type {type(cu).__name__}; allowed: an int32 torch.Tensor (batch + 1,)")
    parse_flag(return_lse, "return_lse")
    options = options_of(
        causal, window_size, softmax_scale, softcap, dropout_p, deterministic, backend, max_seqlen_q, max_seqlen_k
    )
    operands = Operands(query, key, value, cu_seqlens_q, cu_seqlens_k, None, None, None, alibi_slopes, sinks, None)
    out, lse = run(operands, options, return_lse)
    return (out, lse) if return_lse else out  # type: ignore[return-value]


def attention_paged(
    query: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    block_table: Tensor,
    seqlens_k: Tensor,
    *,
    causal: bool = False,
    window_size: tuple[int | None, int | None] | None = None,
    alibi_slopes: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    softmax_scale: float | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`attention` over a KV cache that lies in pages, as servers keep it, for inference only.

    A sequence's keys are those of its pages, one page after the other; pages may lie anywhere and be shared between
    sequences (PagedAttention of vLLM: Kwon et al., "Efficient Memory Management for Large Language Model Serving with
    PagedAttention", SOSP 2023). The cache is read where it is. Write new keys into their pages first, then call:
    ``seqlens_k`` counts them. One query row a sequence is decoding, many are (chunked) prefill.

    Args:
        query: (batch, num_heads, seqlen_q, head_dim).
        k_pages: (num_pages, num_kv_heads, page_size, head_dim), any page_size. Any strides with a contiguous last
            dimension: a cache of (num_pages, page_size, num_kv_heads, head_dim), as vLLM and flash-attn have it, is
            given as ``cache.transpose(1, 2)``, which copies nothing.
        v_pages: (num_pages, num_kv_heads, page_size, head_dim_v).
        block_table: int32 (batch, max_pages_per_sequence), any strides: key ``j`` of sequence ``b`` is row
            ``j % page_size`` of page ``block_table[b, j // page_size]``. Entries past a sequence's last page are
            never read, and rows of a page past the sequence's length reach nothing, whatever either holds.
        seqlens_k: int32 (batch,), keys of each sequence, the new ones included: 0 to max_pages_per_sequence *
            page_size. They move the alignment as in :func:`attention`: the last query row stands at the last key.

    The other arguments are those of :func:`attention`. Under autocast the query takes the cache's dtype; the cache
    keeps it.

    Returns:
        (batch, num_heads, seqlen_q, head_dim_v); with ``return_lse`` also lse, float32 (batch, num_heads, seqlen_q).

    Raises:
        ValueError, TypeError, UnsupportedError: as :func:`attention`; ValueError too where a floating argument
            requires grad and grad mode is on.
    """
    if block_table is None:
        raise TypeError("block_table is of type NoneType; allowed: an int32 torch.Tensor (batch, max_pages)")
    parse_flag(return_lse, "return_lse")
    options = options_of(causal, window_size, softmax_scale, softcap, 0.0, False, backend)
    operands = Operands(
        query,
        k_pages,
        v_pages,
        seqlens_k=seqlens_k,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        block_table=block_table,
    )
    out, lse = run(operands, options, return_lse)
    return (out, lse) if return_lse else out  # type: ignore[return-value]


#: What explain takes beside tensors: the options that attention and attention_varlen share.
_PLAIN_OPTIONS = ("causal", "window_size", "softmax_scale", "softcap", "dropout_p", "deterministic", "backend")


@dataclass(frozen=True)
class Explanation:
    """What a call would do: the back end, its path in words, and for each other back end the reason why not."""

    backend: str | None
    path: str
    reasons: dict[str, str]

    def __str__(self) -> str:
        lines = [f"{self.backend or 'none'}: {self.path}"]
        return "\n".join(lines + [f"not {name}: {reason}" for name, reason in self.reasons.items()])


def explain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    seqlens_k: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    block_table: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    return_lse: bool = False,
    **options: Any,
) -> Explanation:
    """Which back end and path :func:`attention` would take, or with ``cu_seqlens_*`` :func:`attention_varlen`, or with
    ``block_table`` :func:`attention_paged`.

    Takes the arguments of those functions (pages as ``key`` and ``value``) and runs nothing.

    Returns:
        an :class:`Explanation`; ``backend`` is None if the back end asked for by name cannot do it.

    Raises:
        ValueError, TypeError: as :func:`attention`.
    """
    parse_flag(return_lse, "return_lse")  # it makes no difference to the choice
    for name in options:
        if name not in _PLAIN_OPTIONS:
            raise TypeError(
                f"explain() got an unexpected keyword argument {name!r}; allowed: {', '.join(_PLAIN_OPTIONS)}"
            )
    operands = Operands(
        query,
        key,
        value,
        cu_seqlens_q,
        cu_seqlens_k,
        seqlens_k,
        key_padding_mask,
        four_dims(bias),
        alibi_slopes,
        sinks,
        block_table=block_table,
    )
    lengths = {"max_seqlen_q": max_seqlen_q, "max_seqlen_k": max_seqlen_k}
    is_packed = not (cu_seqlens_q is None and cu_seqlens_k is None and all(n is None for n in lengths.values()))
    if is_packed:
        for name, given in {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k, **lengths}.items():
            if given is None:
                raise TypeError(
                    f"{name} is of type NoneType; allowed: what attention_varlen takes, for packed sequences"
                )
        options |= lengths
    spec = make_spec(operands, parse_options(**options))
    answers = reasons(spec)
    try:
        chosen = select_backend(spec)
    except UnsupportedError as error:
        return Explanation(None, str(error), {name: reason for name, reason in answers.items() if reason is not None})
    others = {
        name: reason or f"it could, but {chosen.name} comes first"
        if spec.options.backend == "auto"
        else reason or f"it could, but backend={chosen.name!r} was asked for"
        for name, reason in answers.items()
        if name != chosen.name
    }
    return Explanation(chosen.name, REGISTRY[chosen.name].path(spec), others)
