"""What is measured, as data: the table of the project's speed goals, and a few sizes beyond it."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from transformer_fast.testing.baseline import visible_pairs


@dataclass(frozen=True)
class BenchCase:
    """One attention problem to time. Sizes in tokens, heads and elements."""

    name: str
    title: str
    batch: int = 1
    num_heads: int = 8
    num_kv_heads: int = 8
    seqlen_q: int = 2048
    seqlen_k: int = 2048
    head_dim: int = 64
    causal: bool = False
    window_left: int | None = None  # keys to the left of a row, itself excluded; with causal
    shortest: int | None = None  # sequences of random lengths from here to seqlen: a padded batch
    form: str = "options"  # how ours is called: "options", "dense_mask" (a bool bias), or "packed"
    backward: bool = False  # forward and backward
    cold: bool = False  # K and V come from memory, not from the cache, as in a real decoding step
    #: The goal by dtype: how many times as fast as a peer.
    goal: dict[str, float] = field(default_factory=dict, hash=False)
    goal_peer: str = "sdpa"

    @property
    def padded(self) -> bool:
        """Whether sequences have lengths of their own."""
        return self.shortest is not None

    @property
    def group_size(self) -> int:
        """Query heads that share a KV head."""
        return self.num_heads // self.num_kv_heads

    def lengths(self) -> list[int]:
        """Length of each sequence; the same in every run, so that runs compare."""
        if self.shortest is None:
            return [self.seqlen_k] * self.batch
        generator = torch.Generator().manual_seed(self.batch * 1000 + self.seqlen_k)
        drawn = torch.randint(self.shortest, self.seqlen_k + 1, (self.batch,), generator=generator)
        return [int(n) for n in drawn]

    def visible(self) -> Tensor:
        """bool `(batch or 1, 1, seqlen_q, seqlen_k)`, True where a row sees a key; padded rows see like others."""
        window = None if self.window_left is None else (self.window_left, None)
        mask = visible_pairs(1, self.seqlen_q, self.seqlen_k, causal=self.causal, window_size=window)
        if not self.padded:
            return mask
        keep = torch.arange(self.seqlen_k)[None, :] < torch.tensor(self.lengths())[:, None]
        return mask & keep[:, None, None, :]

    @property
    def visible_pair_count(self) -> int:
        """(query row, key) pairs that count as work, over batch and heads: padding is nobody's work."""
        return _visible_pair_count(self)

    @property
    def flops(self) -> float:
        """Floating-point operations of the visible pairs: two products forward, five more backward."""
        products = 7 if self.backward else 2
        return 2.0 * products * self.head_dim * self.visible_pair_count

    def bytes_read(self, element_size: int) -> float:
        """Bytes of K and V that a decoding step has to read."""
        return 2.0 * sum(self.lengths()) * self.num_kv_heads * self.head_dim * element_size

    def shortened(self) -> BenchCase:
        """A quarter of the sequence: the same shape of work, for a quick look."""
        if max(self.seqlen_q, self.seqlen_k) <= 256:
            return self
        window = self.window_left if self.window_left is None else (self.window_left + 1) // 4 - 1
        seqlen_q = self.seqlen_q if self.seqlen_q == 1 else self.seqlen_q // 4
        return replace(self, seqlen_q=seqlen_q, seqlen_k=self.seqlen_k // 4, window_left=window)

    def describe(self) -> str:
        """Sizes in words."""
        heads = f"{self.num_heads} heads"
        if self.num_kv_heads != self.num_heads:
            heads += f" over {self.num_kv_heads}"
        tokens = f"{self.seqlen_k} tokens"
        if self.seqlen_q != self.seqlen_k:
            tokens = f"{self.seqlen_q} query to {self.seqlen_k} keys"
        if self.padded:
            tokens = f"{self.shortest}..{self.seqlen_k} tokens"
        return f"batch {self.batch}, {heads}, {tokens}, head_dim {self.head_dim}"


@functools.lru_cache(maxsize=64)
def _visible_pair_count(case: BenchCase) -> int:
    if not case.padded:
        return int(case.visible().sum()) * case.batch * case.num_heads
    return sum(n * n for n in case.lengths()) * case.num_heads


_DECODE = dict(batch=4, num_heads=32, num_kv_heads=8, seqlen_q=1, seqlen_k=4096, head_dim=128, cold=True)
_BERT = dict(batch=16, num_heads=12, num_kv_heads=12, seqlen_q=128, seqlen_k=128, shortest=16)


def _goal(float32: float, bfloat16: float) -> dict[str, float]:
    return {"float32": float32, "bfloat16": bfloat16}


_ALL = [
    BenchCase("full", "full", goal=_goal(2.6, 5)),
    BenchCase("causal", "causal", causal=True, goal=_goal(3.2, 6)),
    BenchCase("window", "causal, window 256", causal=True, window_left=255, goal=_goal(18, 35)),
    BenchCase(
        "window_dense",
        "the same as dense boolean mask",
        causal=True,
        window_left=255,
        form="dense_mask",
        goal=_goal(8, 15),
    ),
    BenchCase("decode", "decode", **_DECODE, goal=_goal(5.5, 40)),  # type: ignore[arg-type]
    BenchCase("bert", "BERT-like, padded", **_BERT, goal=_goal(2.7, 5.8)),  # type: ignore[arg-type]
    BenchCase("bert_packed", "BERT-like, packed", **_BERT, form="packed", goal=_goal(4, 10)),  # type: ignore[arg-type]
    BenchCase("full_backward", "full, forward + backward", backward=True, goal=_goal(2.6, 3.7)),
    BenchCase("causal_backward", "causal, forward + backward", causal=True, backward=True, goal=_goal(3.1, 4.5)),
    BenchCase(
        "bert_backward",
        "BERT-like, forward + backward",
        **_BERT,  # type: ignore[arg-type]
        backward=True,
        goal={"bfloat16": 1.7},
        goal_peer="eager",
    ),
    BenchCase(
        "gqa",
        "causal, grouped heads",
        num_heads=16,
        num_kv_heads=4,
        seqlen_q=1024,
        seqlen_k=1024,
        head_dim=128,
        causal=True,
    ),
    *(
        BenchCase(f"small_{n}", f"{n} tokens", seqlen_q=n, seqlen_k=n, causal=causal)
        for n, causal in ((16, False), (64, False), (128, True))
    ),
]

#: Every case by name, in reporting order.
CASES: dict[str, BenchCase] = {case.name: case for case in _ALL}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def choose(names: list[str] | None) -> list[BenchCase]:
    """Cases by name, all by default.

    Raises:
        ValueError: there is no case of that name.
    """
    for name in names or []:
        if name not in CASES:
            raise ValueError(f"no benchmark case {name!r}; there are: {', '.join(CASES)}")
    return [CASES[name] for name in names or CASES]
