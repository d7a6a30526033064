"""Attention problems as data, and the tensors of a problem.

A :class:`Case` is a frozen description (sizes, options, memory layout); :func:`make_problem` draws its tensors from
a seed. The same case, dtype and seed give the same tensors on every machine.
"""

from __future__ import annotations

import contextlib
import math
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from transformer_fast.testing.baseline import visible_pairs
from transformer_fast.testing.pages import lay_in_pages, place_table

NAN, INF = float("nan"), float("inf")
SAME = -1

LAYOUTS = ("contiguous", "heads_last", "gaps", "sequence_first", "shared_batch")
PADDINGS = ("left", "right", "holes", "empty_entries")
#: Which of the dimensions (batch, num_heads, seqlen_q, seqlen_k) a bias has; the others are 1 or absent.
BIAS_FORMS = ("bhqk", "1hqk", "b1qk", "11qk", "b11k", "1h1k", "bhq1", "hqk", "qk", "k")
BIAS_KINDS = (
    "float",
    "float_some_minus_inf",
    "float_high",
    "float_lowest",
    "float_lowest_rows",
    "bool",
    "bool_window",
    "bool_empty_rows",
)
DOUTS = ("contiguous", "heads_last", "ones_expanded")


@dataclass(frozen=True)
class Case:
    """One attention problem. Sizes in tokens, heads and elements; SAME takes the size named beside it."""

    variant: str  # the group it is reported under
    name: str  # unique within the suite
    batch: int = 2
    num_heads: int = 2
    num_kv_heads: int = SAME  # num_heads
    seqlen_q: int = 33
    seqlen_k: int = SAME  # seqlen_q
    head_dim: int = 32
    head_dim_v: int = SAME  # head_dim
    causal: bool = False
    window_size: tuple[int | None, int | None] | None = None
    seqlens_k: tuple[int, ...] | None = None  # key lengths; of a packed case, the sequences' lengths
    seqlens_q: tuple[int, ...] | None = None  # given: a packed case, run through attention_varlen
    page_size: int | None = None  # given: a paged case, run through attention_paged; seqlens_k are in the cache
    shared_pages: int = 0  # of a paged case: so many first pages are those of every sequence
    padding: str | None = None  # one of PADDINGS
    bias: str | None = None  # one of BIAS_KINDS
    bias_form: str = "bhqk"  # one of BIAS_FORMS
    alibi: str | None = None  # "heads" or "batch_heads": the shape of the slopes
    softcap: float | None = None
    sinks: str | None = None  # "finite", or "some_minus_inf"
    softmax_scale: float | None = None  # head_dim ** -0.5
    dropout_p: float = 0.0
    deterministic: bool = False
    layout: str = "contiguous"  # of query, key and value: one of LAYOUTS
    dout: str = "contiguous"  # of the incoming gradient: one of DOUTS
    poison: bool = False  # NaN and infinity in every key and value that no row sees
    lse_gradient: bool = False  # a gradient comes in through lse too
    score_size: float = 1.0  # multiplies the query: larger logits
    key_growth: float = 1.0  # keys grow by this factor along the sequence: the running maximum keeps moving
    core: bool = False  # belongs to the quick suite and to the run under sanitizers

    def __post_init__(self) -> None:
        if self.seqlens_q is not None:
            assert self.seqlens_k is not None and len(self.seqlens_q) == len(self.seqlens_k)
            assert self.bias is None and self.padding is None
            self._set("batch", len(self.seqlens_q))
            self._set("seqlen_q", max(self.seqlens_q, default=0))
            self._set("seqlen_k", max(self.seqlens_k, default=0))
        if self.page_size is not None:
            assert self.seqlens_k is not None and len(self.seqlens_k) == self.batch and not self.packed
            assert self.bias is None and self.padding is None and self.dropout_p == 0.0 and not self.deterministic
            assert not (self.shared_pages and self.poison)  # what one sequence sees, another does not
        for name, other in (("num_kv_heads", "num_heads"), ("seqlen_k", "seqlen_q"), ("head_dim_v", "head_dim")):
            if getattr(self, name) == SAME:
                self._set(name, getattr(self, other))

    def _set(self, name: str, value: int) -> None:
        object.__setattr__(self, name, value)  # the only way into a frozen dataclass

    @property
    def packed(self) -> bool:
        """Whether it goes through `attention_varlen`."""
        return self.seqlens_q is not None

    @property
    def paged(self) -> bool:
        """Whether it goes through `attention_paged`, which gives no gradients."""
        return self.page_size is not None

    @property
    def sequences(self) -> list[tuple[int, int]]:
        """(rows, keys) of each sequence of a packed case."""
        assert self.seqlens_q is not None and self.seqlens_k is not None
        return list(zip(self.seqlens_q, self.seqlens_k, strict=True))

    @property
    def scale(self) -> float:
        """The softmax scale in force."""
        return self.head_dim**-0.5 if self.softmax_scale is None else self.softmax_scale

    def describe(self) -> str:
        """Everything that differs from the defaults, for reports and failure messages."""
        shown = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("variant", "name", "core")}
        defaults = {f.name: f.default for f in fields(self)}
        sizes = ("batch", "num_heads", "num_kv_heads", "seqlen_q", "seqlen_k", "head_dim", "head_dim_v")
        return ", ".join(f"{k}={v!r}" for k, v in shown.items() if k in sizes or v != defaults[k])


@dataclass
class Problem:
    """The tensors of a case in one dtype.

    `inputs` are those with a gradient: query, key, value, and a float bias and sinks if the case has them; key and
    value are poisoned if the case says so. `clean` are the same without poison. `options` are the other keyword
    arguments of the public function. `visible` is bool, broadcastable to `(batch, num_heads, seqlen_q, seqlen_k)`.

    A paged case has pages in `inputs`, k_pages and v_pages, whose unused rows are NaN, and key and value in `clean`:
    what it should give is what the padded problem gives.
    """

    case: Case
    dtype: torch.dtype
    seed: int
    inputs: dict[str, Tensor]
    clean: dict[str, Tensor]
    options: dict[str, Any]
    visible: Tensor
    dout: Tensor
    dlse: Tensor | None = field(default=None)
    block_table: Tensor | None = field(default=None)

    def call(self, inputs: dict[str, Tensor], backend: str, *, return_lse: bool = True) -> Any:
        """Calls the public function. Draws the dropout seed from torch's default generator, seeded by the problem."""
        from transformer_fast import attention, attention_paged, attention_varlen

        function: Any = attention_varlen if self.case.packed else attention
        options = self.options
        if "k_pages" in inputs:
            function, options = attention_paged, options | {"block_table": self.block_table}
        torch.manual_seed(self.seed)
        with seeds_of_the_cpu() if self._draws_elsewhere else contextlib.nullcontext():
            return function(**inputs, **options, return_lse=return_lse, backend=backend)

    @property
    def _draws_elsewhere(self) -> bool:
        return self.case.dropout_p > 0.0 and self.dout.device.type != "cpu"

    def to(self, device: str | torch.device) -> Problem:
        """The same problem on another device."""
        if str(device) == "cpu":
            return self

        def move(value: Any) -> Any:
            if isinstance(value, dict):
                return {k: move(v) for k, v in value.items()}
            return value.to(device) if isinstance(value, Tensor) else value

        return Problem(**{f.name: move(getattr(self, f.name)) for f in fields(self)})


@contextlib.contextmanager
def seeds_of_the_cpu() -> Iterator[None]:
    """Inside, the library draws the seed of dropout from the CPU's generator, whatever the device.

    From the same seed another device's generator draws other numbers, and the oracle, which is computed on the CPU,
    would drop other probabilities.
    """
    draw = torch.randint

    def drawn_on_the_cpu(*args: Any, device: Any = None, **options: Any) -> Tensor:
        return draw(*args, **options).to(device)

    torch.randint = drawn_on_the_cpu
    try:
        yield
    finally:
        torch.randint = draw


def case_seed(case: Case, dtype: torch.dtype, seed: int) -> int:
    """The seed of a problem's tensors: differs from case to case, and is the same on every machine."""
    return zlib.crc32(f"{case.name} {dtype} {seed}".encode())


def make_problem(case: Case, dtype: torch.dtype, seed: int = 0) -> Problem:
    """Draws the tensors of a case, on the CPU."""
    problem_seed = case_seed(case, dtype, seed)
    generator = torch.Generator().manual_seed(problem_seed)
    options = _plain_options(case)
    bias = _draw_bias(case, dtype, generator)
    padding_mask = _draw_padding(case, generator)
    visible = _visible(case, padding_mask, bias)
    if padding_mask is not None:
        options["key_padding_mask"] = padding_mask
    if case.alibi is not None:
        shape = (case.num_heads,) if case.alibi == "heads" else (case.batch, case.num_heads)
        options["alibi_slopes"] = torch.rand(shape, generator=generator) * 0.3 + 0.02

    q, k, v = _draw_qkv(case, dtype, generator)
    clean = {n: _place(t, case.layout, case.packed) for n, t in (("query", q), ("key", k), ("value", v))}
    inputs = dict(clean)
    if case.poison:
        bad_k, bad_v = _poison(case, k, v, visible)
        inputs["key"], inputs["value"] = (_place(t, case.layout, case.packed) for t in (bad_k, bad_v))
    block_table = None
    if case.paged:
        inputs, block_table = _into_pages(case, inputs, generator)
    others = {}
    if bias is not None and bias.dtype == torch.bool:
        options["bias"] = bias
    elif bias is not None:
        others["bias"] = bias
    if case.sinks is not None:
        sinks = torch.randn(case.num_heads, generator=generator)
        if case.sinks == "some_minus_inf":
            sinks[::2] = -INF
        others["sinks"] = sinks
    dout, dlse = _draw_incoming(case, q, dtype, generator)
    return Problem(
        case, dtype, problem_seed, inputs | others, clean | others, options, visible, dout, dlse, block_table
    )


def _plain_options(case: Case) -> dict[str, Any]:
    """The keyword arguments that need no random numbers; the defaults are left out, to be tested as defaults."""
    options: dict[str, Any] = {}
    for name in ("causal", "window_size", "softcap", "softmax_scale", "dropout_p", "deterministic"):
        if getattr(case, name):
            options[name] = getattr(case, name)
    if case.packed:
        for side, lengths in (("q", [q for q, _ in case.sequences]), ("k", [k for _, k in case.sequences])):
            starts = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
            options[f"cu_seqlens_{side}"] = starts
            options[f"max_seqlen_{side}"] = max(lengths, default=0)
    elif case.seqlens_k is not None:
        options["seqlens_k"] = torch.tensor(case.seqlens_k, dtype=torch.int32)
    return options


def _draw_qkv(case: Case, dtype: torch.dtype, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    leading_q: tuple[int, ...]
    leading_k: tuple[int, ...]
    if case.packed:
        leading_q = (sum(q for q, _ in case.sequences), case.num_heads)
        leading_k = (sum(k for _, k in case.sequences), case.num_kv_heads)
        key_dim = 0
    else:
        # A batch that shares its memory (stride 0) is drawn once and expanded when it is placed.
        batch = min(case.batch, 1) if case.layout == "shared_batch" else case.batch
        leading_q = (case.batch, case.num_heads, case.seqlen_q)
        leading_k = (batch, case.num_kv_heads, case.seqlen_k)
        key_dim = 2
    q = torch.randn(*leading_q, case.head_dim, generator=generator) * case.score_size
    k = torch.randn(*leading_k, case.head_dim, generator=generator)
    v = torch.randn(*leading_k, case.head_dim_v, generator=generator)
    if case.key_growth != 1.0:
        size = torch.logspace(0.0, math.log10(case.key_growth), k.shape[key_dim])
        k = k * (size[:, None, None] if case.packed else size[:, None])
    if case.shared_pages:
        assert case.page_size is not None
        prefix = case.shared_pages * case.page_size
        for t in (k, v):
            t[:, :, :prefix] = t[:1, :, :prefix].clone()
    if case.layout == "shared_batch":
        k, v = (t.expand(case.batch, *t.shape[1:]) for t in (k, v))
    return q.to(dtype), k.to(dtype), v.to(dtype)


def _into_pages(case: Case, inputs: dict[str, Tensor], generator: torch.Generator) -> tuple[dict[str, Tensor], Tensor]:
    """The inputs with pages in place of key and value, and the table of the pages."""
    assert case.page_size is not None and case.seqlens_k is not None
    query, key, value = inputs["query"], inputs["key"], inputs["value"]
    *pages, table = lay_in_pages(key, value, case.seqlens_k, case.page_size, case.shared_pages, generator)
    k_pages, v_pages = (_place(t, case.layout, packed=False) for t in pages)
    return {"query": query, "k_pages": k_pages, "v_pages": v_pages}, place_table(table, case.layout)


def _place(t: Tensor, layout: str, packed: bool) -> Tensor:
    """The same values in another memory layout. Memory that belongs to nobody is filled with NaN."""
    if layout == "contiguous":
        return t.clone(memory_format=torch.contiguous_format)
    if layout == "shared_batch":
        return t  # stride 0 already
    if layout == "heads_last":  # (batch, seqlen, num_heads, head_dim) in memory; packed: (num_heads, total, head_dim)
        first = t.dim() - 3
        return t.transpose(first, first + 1).contiguous().transpose(first, first + 1)
    if layout == "sequence_first" and not packed:  # (seqlen, batch, num_heads, head_dim) in memory
        return t.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3)
    # "gaps": a window into a larger buffer, starting at an odd element, with odd strides.
    buffer = t.new_full([n + 2 * extra for n, extra in zip(t.shape, (1, 1, 3, 5)[-t.dim() :], strict=True)], NAN)
    for dim, extra in enumerate((1, 1, 3, 5)[-t.dim() :]):
        buffer = buffer.narrow(dim, extra, t.shape[dim])
    buffer.copy_(t)
    return buffer


def _draw_padding(case: Case, generator: torch.Generator) -> Tensor | None:
    """bool `(batch, seqlen_k)`, True = keep."""
    if case.padding is None:
        return None
    batch, seqlen_k = case.batch, case.seqlen_k
    lengths = torch.randint(1, max(seqlen_k, 1) + 1, (batch, 1), generator=generator)
    lengths[:1] = seqlen_k
    position = torch.arange(seqlen_k)[None]
    if case.padding == "right":
        return position < lengths
    if case.padding == "left":
        return position >= seqlen_k - lengths
    mask = torch.rand(batch, seqlen_k, generator=generator) < 0.6
    if case.padding == "empty_entries":
        mask[1:2] = False
    return mask


def _draw_bias(case: Case, dtype: torch.dtype, generator: torch.Generator) -> Tensor | None:
    if case.bias is None:
        return None
    sizes = {"b": case.batch, "h": case.num_heads, "q": case.seqlen_q, "k": case.seqlen_k, "1": 1}
    shape = [sizes[letter] for letter in case.bias_form]
    if case.bias.startswith("float"):
        bias = torch.randn(shape, generator=generator)
        hidden = torch.rand(shape, generator=generator) < 0.4
        if case.bias == "float_some_minus_inf":
            bias = bias.masked_fill(hidden, -INF)
        elif case.bias == "float_high":
            bias = bias + 200  # exp of which no float32 holds: lanes without a row must not take it
        elif case.bias.startswith("float_lowest"):
            # The additive masks of model code: the lowest number instead of -inf. A row that has nothing else sees
            # all its keys alike.
            if case.bias == "float_lowest_rows" and "q" in case.bias_form:
                hidden.movedim(case.bias_form.index("q"), 0)[::3] = True
            bias = torch.zeros(shape).masked_fill(hidden, torch.finfo(dtype).min)
        return bias.to(dtype)
    if (
        case.bias == "bool_window" and "qk" in case.bias_form
    ):  # a causal sliding window as dense boolean mask, as unmodified model code has it
        row = torch.arange(case.seqlen_q)[:, None] + case.seqlen_k - case.seqlen_q
        key = torch.arange(case.seqlen_k)[None]
        return ((key <= row) & (key >= row - 20)).expand(shape).contiguous()
    mask = torch.rand(shape, generator=generator) < 0.5
    if case.bias == "bool_empty_rows" and "q" in case.bias_form:
        mask.movedim(case.bias_form.index("q"), 0)[::3] = False
    return mask


def _visible(case: Case, padding_mask: Tensor | None, bias: Tensor | None) -> Tensor:
    """Visible pairs as the definition has them. A packed case: each sequence in its own corner, the rest False."""
    if not case.packed:
        visible = visible_pairs(
            case.batch,
            case.seqlen_q,
            case.seqlen_k,
            causal=case.causal,
            window_size=case.window_size,
            seqlens_k=None if case.seqlens_k is None else list(case.seqlens_k),
            key_padding_mask=padding_mask,
        )
        if bias is None:
            return visible
        return visible & (bias if bias.dtype == torch.bool else bias != -INF)
    visible = torch.zeros(case.batch, 1, case.seqlen_q, case.seqlen_k, dtype=torch.bool)
    for b, (rows, keys) in enumerate(case.sequences):
        visible[b, :, :rows, :keys] = visible_pairs(1, rows, keys, causal=case.causal, window_size=case.window_size)[0]
    return visible


def _poison(case: Case, k: Tensor, v: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
    """Key and value with NaN and infinities wherever no query row of the group of heads looks."""
    group_size = case.num_heads // case.num_kv_heads
    visible = visible.expand(case.batch, case.num_heads, *visible.shape[2:])
    unseen = ~visible.any(2).unflatten(1, (case.num_kv_heads, group_size)).any(2)  # (batch, kv heads, seqlen_k)
    if case.packed:
        unseen = torch.cat([unseen[b, :, :n] for b, (_, n) in enumerate(case.sequences)], dim=1).transpose(0, 1)
    k, v = k.clone(), v.clone()
    k[unseen], v[unseen] = NAN, NAN
    k[..., ::3].masked_fill_(unseen[..., None], INF)
    v[..., ::2].masked_fill_(unseen[..., None], -INF)
    return k, v


def _draw_incoming(
    case: Case, q: Tensor, dtype: torch.dtype, generator: torch.Generator
) -> tuple[Tensor, Tensor | None]:
    """The gradients that come in through out `(..., head_dim_v)` and lse."""
    shape = (*q.shape[:-1], case.head_dim_v)
    if case.dout == "ones_expanded":  # what out.sum().backward() gives: all strides 0
        dout = torch.ones((), dtype=dtype).expand(shape)
    else:
        dout = torch.randn(shape, generator=generator).to(dtype)
        dout = _place(dout, case.dout, case.packed)
    if not case.lse_gradient:
        return dout, None
    lse_shape = (q.shape[1], q.shape[0]) if case.packed else q.shape[:-1]
    return dout, torch.randn(lse_shape, generator=generator)


def select(cases: Iterable[Case], *, core: bool = False, variants: Iterable[str] | None = None) -> list[Case]:
    """The core cases only, or those of some variants."""
    wanted = None if variants is None else set(variants)
    return [c for c in cases if (c.core or not core) and (wanted is None or c.variant in wanted)]
