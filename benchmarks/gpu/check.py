"""Is a result right? Slices of it, at full length, against float64; by the project's one tolerance rule.

The whole of a long problem is too much for the oracle. Judged are some rows of all heads (out, dq) and some keys of
the outer KV heads (dk, dv), in the first and the last batch entry; each of them depends on every key or every row, so
a tile left out or counted twice shows. All of a result has to be finite.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from transformer_fast.testing.baseline import plain_attention, rounding_units
from transformer_fast.testing.tolerance import Verdict, Yardstick

from .work import Contestant, Work

#: Rows or keys that are judged of each head.
SLICE = 64
#: Scores that are computed at a time; a handful of float64 tensors of this size are alive at once.
CHUNK_SCORES = 2**24

_Trio = tuple[Tensor, Tensor, Tensor]  # oracle, plain PyTorch in the dtype of the problem, unit in the last place


def slice_of(n: int, device: torch.device) -> Tensor:
    """Places 0 to n - 1 that are looked at: both ends, where tiles are partial, and some in between."""
    if n <= SLICE:
        return torch.arange(n, device=device)
    edge = SLICE // 4
    between = torch.linspace(edge, n - edge - 1, SLICE - 2 * edge).round().long()
    return torch.cat([torch.arange(edge), between, torch.arange(n - edge, n)]).unique().to(device)


@dataclass
class _Head:
    """One KV head of one sequence with its query heads, as ``(1, heads, seqlen, head_dim)``."""

    work: Work
    entry: int
    kv_head: int

    def __post_init__(self) -> None:
        work, group = self.work, self.work.shape.group_size
        mine = slice(self.kv_head * group, (self.kv_head + 1) * group)
        self.keys = work.shape.sequences[self.entry][1]
        self.query, self.dout = (work.sequence(t, self.entry)[:, mine] for t in (work.query, work.dout))
        one = slice(self.kv_head, self.kv_head + 1)
        self.key, self.value = (work.sequence(t, self.entry)[:, one] for t in (work.key, work.value))

    def visible(self, rows: Tensor) -> Tensor:
        """bool ``(1, 1, len(rows), seqlen_k)``."""
        shape = self.work.shape
        position = rows[:, None] + (self.keys - self.query.shape[2])
        key = torch.arange(self.key.shape[2], device=rows.device)[None]
        mask = (key < self.keys).expand(len(rows), -1)
        if shape.causal:
            mask = mask & (key <= position)
        if shape.window_left is not None:
            mask = mask & (key >= position - shape.window_left)
        return mask[None, None]

    def results(self, rows: Tensor, dtype: torch.dtype, *, gradients: bool) -> dict[str, Tensor]:
        """Plain attention of some rows: out and, with gradients, dq of these rows and what they add to dk and dv."""
        query, key, value = (t.detach().to(dtype) for t in (self.query[:, :, rows], self.key, self.value))
        leaves = [t.requires_grad_(gradients) for t in (query, key, value)]
        scale = self.work.shape.head_dim**-0.5
        out = plain_attention(*leaves, visible=self.visible(rows), softmax_scale=scale)[0]
        found = {"out": out.detach()}
        if gradients:
            grads = torch.autograd.grad(out, leaves, self.dout[:, :, rows].to(dtype))
            found |= dict(zip(("dq", "dk", "dv"), grads, strict=True))
        return found

    def units(self, rows: Tensor) -> dict[str, Tensor]:
        """The size of a unit in the last place of the same."""
        query, key, value, dout = (
            t.double() for t in (self.query[:, :, rows], self.key, self.value, self.dout[:, :, rows])
        )
        units = rounding_units(
            query,
            key,
            value,
            dout,
            None,
            dtype=self.work.dtype,
            sinks=None,
            bias=None,
            softmax_scale=self.work.shape.head_dim**-0.5,
            dropout_p=0.0,
            visible=self.visible(rows),
        )
        return {"out": units["out"], "dq": units["query"], "dk": units["key"], "dv": units["value"]}

    def of_rows(self, rows: Tensor) -> dict[str, _Trio]:
        """out and, for a backward, dq of some rows."""
        backward = self.work.shape.phase == "backward"
        oracle = self.results(rows, torch.float64, gradients=backward)
        plain = self.results(rows, self.work.dtype, gradients=backward)
        units = self.units(rows)
        return {name: (oracle[name], plain[name], units[name]) for name in ("out", "dq") if name in oracle}

    def of_keys(self, keys: Tensor) -> dict[str, _Trio]:
        """dk and dv of some keys: sums over all rows, in chunks."""
        num_rows = self.query.shape[2]
        scores_a_row = self.query.shape[1] * self.key.shape[2]
        step = max(1, CHUNK_SCORES // max(1, scores_a_row))
        sums: dict[str, list[Tensor]] = {}
        for first in range(0, num_rows, step):
            rows = torch.arange(first, min(num_rows, first + step), device=self.query.device)
            oracle = self.results(rows, torch.float64, gradients=True)
            plain = self.results(rows, self.work.dtype, gradients=True)
            units = self.units(rows)
            for name in ("dk", "dv"):
                parts = [t[:, :, keys].double() for t in (oracle[name], plain[name], units[name])]
                parts[2] = parts[2].square()  # units add like independent errors
                old = sums.get(name)
                sums[name] = parts if old is None else [a + b for a, b in zip(old, parts, strict=True)]
        dtype = self.work.dtype
        return {name: (oracle, plain.to(dtype), unit.sqrt()) for name, (oracle, plain, unit) in sums.items()}


class Judge:
    """What a work should give, computed once for all contestants."""

    def __init__(self, work: Work) -> None:
        self.work = work
        self.entries = sorted({0, len(work.shape.sequences) - 1})
        self.kv_heads = sorted({0, work.shape.num_kv_heads - 1})

    def _rows(self, entry: int) -> Tensor:
        return slice_of(self.work.shape.sequences[entry][0], self.work.device)

    def _keys(self, entry: int) -> Tensor:
        return slice_of(self.work.sequence(self.work.key, entry).shape[2], self.work.device)

    @cached_property
    def yardsticks(self) -> dict[tuple[int, str], Yardstick]:
        """By batch entry and result."""
        sticks = {}
        for entry in self.entries:
            heads = [_Head(self.work, entry, h) for h in range(self.work.shape.num_kv_heads)]
            trios = [head.of_rows(self._rows(entry)) for head in heads]
            named = {name: [trio[name] for trio in trios] for name in trios[0]}
            if self.work.shape.phase == "backward":
                outer = [heads[h].of_keys(self._keys(entry)) for h in self.kv_heads]
                named |= {name: [trio[name] for trio in outer] for name in ("dk", "dv")}
            for name, parts in named.items():
                sticks[entry, name] = Yardstick(*(torch.cat(three, dim=1) for three in zip(*parts, strict=True)))
        return sticks

    def verdicts(self, contestant: Contestant, results: dict[str, Tensor]) -> list[Verdict]:
        """One for each result and entry, in the order of the results."""
        found = []
        for name, result in results.items():
            whole = contestant.layout.back(result)
            for entry in self.entries:
                part = self.work.sequence(whole, entry)
                if name in ("out", "dq"):
                    part = part[:, :, self._rows(entry)]
                else:
                    part = part[:, self.kv_heads][:, :, self._keys(entry)]
                found.append(self.yardsticks[entry, name].judge(part, f"{name} of entry {entry}"))
        return found

    def complaint(self, contestant: Contestant, results: dict[str, Tensor], lenience: float = 1.0) -> tuple[str, float]:
        """What is wrong with the results, empty if nothing is, and the largest share of the allowance used; up to
        ``lenience`` of it is let pass.
        """
        for name, result in results.items():
            if not bool(contestant.layout.back(result).isfinite().all()):
                return f"{name} has NaN or infinity in it", float("inf")
        verdicts = self.verdicts(contestant, results)
        wrong = [str(verdict) for verdict in verdicts if not verdict.used <= lenience]
        return "\n".join(wrong), max(verdict.used for verdict in verdicts)
