"""The tensors of a benchmark case, our own run of it, and the check that comes before any speed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from transformer_fast import attention, attention_varlen
from transformer_fast.testing import Case, Problem, Verdict, judge
from transformer_fast.testing.runner import Expected, expected_of

from .cases import BenchCase

#: A run of the workload: out, or (out, dq, dk, dv) for forward and backward.
Step = Callable[[], tuple[Tensor, ...]]
#: Cold cases go around as many K/V pairs as exceed any last-level cache.
COLD_BYTES = 256 * 2**20


class WrongResultError(AssertionError):
    """Our result does not pass the tolerance rule: there is no speed to speak of."""


@dataclass
class Workload:
    """A case in one dtype: query `(batch, num_heads, seqlen_q, head_dim)`, and one or more pairs of key and value."""

    case: BenchCase
    dtype: torch.dtype
    query: Tensor
    pairs: list[tuple[Tensor, Tensor]]
    dout: Tensor
    lengths: Tensor  # int32 (batch,)
    _next: int = field(default=0)

    def next_pair(self) -> tuple[Tensor, Tensor]:
        """The K and V of the next call: goes around, so that a cold case finds none in the cache."""
        pair = self.pairs[self._next % len(self.pairs)]
        self._next += 1
        return pair

    def rewind(self) -> None:
        """The next call takes the first pair again."""
        self._next = 0

    def keep(self) -> Tensor:
        """bool `(batch, seqlen_k)`: which keys are not padding."""
        return torch.arange(self.case.seqlen_k)[None, :] < self.lengths[:, None]

    def float_mask(self) -> Tensor | None:
        """What a peer without our options gets: `(batch or 1, 1, seqlen_q or 1, seqlen_k)`, 0 or -inf; or None."""
        case = self.case
        if case.padded:
            hidden = ~self.keep()[:, None, None, :]
        elif case.window_left is not None:
            hidden = ~case.visible()
        else:
            return None
        return torch.zeros(hidden.shape, dtype=self.dtype).masked_fill(hidden, float("-inf"))


def make_workload(case: BenchCase, dtype: torch.dtype) -> Workload:
    """Draws the tensors of a case."""
    generator = torch.Generator().manual_seed(1)

    def draw(heads: int, seqlen: int) -> Tensor:
        return torch.randn(case.batch, heads, seqlen, case.head_dim, generator=generator).to(dtype)

    pair_bytes = 2 * case.batch * case.num_kv_heads * case.seqlen_k * case.head_dim * dtype.itemsize
    copies = max(2, -(-COLD_BYTES // pair_bytes)) if case.cold else 1
    first = (draw(case.num_kv_heads, case.seqlen_k), draw(case.num_kv_heads, case.seqlen_k))
    pairs = [first, *((first[0].clone(), first[1].clone()) for _ in range(copies - 1))]
    query, dout = draw(case.num_heads, case.seqlen_q), draw(case.num_heads, case.seqlen_q)
    return Workload(case, dtype, query, pairs, dout, torch.tensor(case.lengths(), dtype=torch.int32))


def our_step(work: Workload) -> Step:
    """Ours as a user would call it: no preparation of masks or layouts that a peer does not get."""
    case = work.case
    if case.form == "packed":
        return _our_packed_step(work)
    options: dict[str, Any] = {}
    if case.form == "dense_mask":
        options["bias"] = case.visible()
    else:
        options["causal"] = case.causal
        if case.window_left is not None:
            options["window_size"] = (case.window_left, 0)
        if case.padded:
            options["key_padding_mask"] = work.keep()

    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = attention(q, k, v, **options)
        assert isinstance(out, Tensor)
        return out

    return with_backward(work, forward)


def _our_packed_step(work: Workload) -> Step:
    keep = work.keep()
    q, k, v = (t.transpose(1, 2)[keep] for t in (work.query, *work.pairs[0]))  # (total, num_heads, head_dim)
    starts = torch.nn.functional.pad(work.lengths.cumsum(0, dtype=torch.int32), (1, 0))
    longest = int(work.lengths.max())

    def step() -> tuple[Tensor, ...]:
        out = attention_varlen(q, k, v, starts, starts, longest, longest, causal=work.case.causal)
        assert isinstance(out, Tensor)
        return (out,)

    return step


def with_backward(work: Workload, forward: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Step:
    """A step from a forward function; with the gradients of query, key and value where the case has them."""
    if not work.case.backward:

        @torch.no_grad()
        def step() -> tuple[Tensor, ...]:
            return (forward(work.query, *work.next_pair()),)

        return step

    leaves = [t.detach().requires_grad_() for t in (work.query, *work.pairs[0])]

    def step_with_backward() -> tuple[Tensor, ...]:
        out = forward(*leaves)
        return (out.detach(), *torch.autograd.grad(out, leaves, work.dout))

    return step_with_backward


# ------------------------------------------------------------------------------------------------------- the check

RESULT_NAMES = ("out", "dq", "dk", "dv")
#: Up to this many scores all of a problem is checked, beyond it the first and the last head of the batch.
MAX_CHECKED_SCORES = 2**24


@dataclass(frozen=True)
class Piece:
    """One batch entry and one KV head with its query heads, and what they should give."""

    entry: int
    kv_head: int
    expected: Expected


def make_pieces(work: Workload) -> list[Piece]:
    """The parts of a problem that are checked, each small enough for the oracle."""
    case = work.case
    every = [(b, h) for b in range(case.batch) for h in range(case.num_kv_heads)]
    scores = case.batch * case.num_heads * case.seqlen_q * case.seqlen_k
    chosen = every if scores <= MAX_CHECKED_SCORES else [every[0], every[-1]]
    return [Piece(b, h, expected_of(_piece_problem(work, b, h))) for b, h in chosen]


def _piece_problem(work: Workload, entry: int, kv_head: int) -> Problem:
    """One batch entry and one KV head as a problem of the test suite."""
    case = work.case
    heads = slice(kv_head * case.group_size, (kv_head + 1) * case.group_size)
    described = Case(
        "benchmark",
        f"{case.name}_{entry}_{kv_head}",
        batch=1,
        num_heads=case.group_size,
        num_kv_heads=1,
        seqlen_q=case.seqlen_q,
        seqlen_k=case.seqlen_k,
        head_dim=case.head_dim,
        causal=case.causal,
        window_size=None if case.window_left is None else (case.window_left, None),
    )
    options: dict[str, Any] = {"causal": case.causal}
    if described.window_size is not None:
        options["window_size"] = described.window_size
    if case.padded:
        options["key_padding_mask"] = work.keep()[entry : entry + 1]
    visible = case.visible()
    inputs = {
        name: t[entry : entry + 1, hs]
        for name, t, hs in (
            ("query", work.query, heads),
            ("key", work.pairs[0][0], slice(kv_head, kv_head + 1)),
            ("value", work.pairs[0][1], slice(kv_head, kv_head + 1)),
        )
    }
    dout = work.dout[entry : entry + 1, heads]
    return Problem(
        described, work.dtype, 0, inputs, inputs, options, visible[entry : entry + 1] if case.padded else visible, dout
    )


def judge_step(
    work: Workload, pieces: list[Piece], results: tuple[Tensor, ...], *, precision: torch.dtype | None = None
) -> list[Verdict]:
    """One verdict for each checked tensor, in units of `precision` (that of the workload by default).

    Padded query rows are not looked at: they are nobody's result.
    """
    case = work.case
    coarser = torch.finfo(precision or work.dtype).eps / torch.finfo(work.dtype).eps
    results = tuple(_padded(work, t) if case.form == "packed" and t.dim() == 3 else t for t in results)
    verdicts = []
    for piece in pieces:
        rows = slice(int(work.lengths[piece.entry])) if case.padded and not case.backward else slice(None)
        for name, result in zip(RESULT_NAMES, results, strict=False):
            size = case.group_size if name in ("out", "dq") else 1
            heads = slice(piece.kv_head * size, (piece.kv_head + 1) * size)
            wanted = piece.expected
            parts = [result[piece.entry : piece.entry + 1, heads]]
            parts += [t[name] for t in (wanted.oracle, wanted.baseline, wanted.units)]
            if name == "out":
                parts = [t[:, :, rows] for t in parts]
            verdicts.append(judge(*parts[:3], name=name, unit=coarser * parts[3]))
    return verdicts


def _padded(work: Workload, packed: Tensor) -> Tensor:
    """`(total, num_heads, head_dim)` -> `(batch, num_heads, seqlen, head_dim)`, zeros in the padding."""
    padded = packed.new_zeros(work.case.batch, work.case.seqlen_q, *packed.shape[1:])
    padded[work.keep()] = packed
    return padded.transpose(1, 2)


def check_ours(work: Workload, pieces: list[Piece], step: Step) -> list[Verdict]:
    """Judges our own results.

    Raises:
        WrongResultError: the tolerance rule refuses one of them.
    """
    work.rewind()
    verdicts = judge_step(work, pieces, step())
    for verdict in verdicts:
        if not verdict.passed:
            raise WrongResultError(f"{work.case.name} in {work.dtype} is wrong, so its speed means nothing: {verdict}")
    return verdicts
