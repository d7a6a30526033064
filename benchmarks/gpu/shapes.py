"""What is timed on a GPU, as data: the headlines first, then the sweep over lengths and head_dims."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from itertools import accumulate

#: Every shape of the sweep has this many tokens in all and this many columns: the same work, cut differently.
TOTAL_TOKENS = 16384
HIDDEN = 2048
PAGE_SIZE = 64


@dataclass(frozen=True)
class Goal:
    """What a figure has to reach on an H100; for the figures' names see ``figures.py``."""

    figure: str
    at_least: float


@dataclass(frozen=True)
class Shape:
    """One attention problem to time. Sizes in tokens, heads and elements."""

    name: str
    group: str  # the table of the report it stands in
    title: str
    batch: int = 1
    num_heads: int = 16
    num_kv_heads: int = 16
    seqlen_q: int = 8192
    seqlen_k: int = 8192
    head_dim: int = 128
    causal: bool = False
    window_left: int | None = None  # keys to the left of a row, itself excluded; with causal
    lengths: tuple[int, ...] | None = None  # keys of each batch entry, or tokens of each packed sequence
    form: str = "padded"  # "padded", "masked" (lengths as key_padding_mask), "packed" or "paged"
    phase: str = "forward"  # or "backward": that alone, without its forward
    flex: bool = True  # flex_attention takes part; each shape costs it a compilation
    dtype: str = "bfloat16"
    goals: tuple[Goal, ...] = ()

    @property
    def group_size(self) -> int:
        """Query heads that share a KV head."""
        return self.num_heads // self.num_kv_heads

    @property
    def is_packed(self) -> bool:
        """Whether sequences lie one after the other, without a batch dimension."""
        return self.form == "packed"

    @property
    def is_decode(self) -> bool:
        """One query row: what it costs is reading K and V."""
        return self.seqlen_q == 1

    @property
    def sequences(self) -> list[tuple[int, int]]:
        """(rows, keys) of each batch entry or packed sequence."""
        if self.lengths is None:
            return [(self.seqlen_q, self.seqlen_k)] * self.batch
        return [(n if self.is_packed else self.seqlen_q, n) for n in self.lengths]

    @property
    def starts(self) -> list[int]:
        """Where each packed sequence begins; the last entry is the total."""
        return list(accumulate((rows for rows, _ in self.sequences), initial=0))

    @property
    def visible_pairs(self) -> int:
        """(query row, key) pairs that count as work, over batch and heads."""
        return self.num_heads * sum(_pairs(*s, self.causal, self.window_left) for s in self.sequences)

    @property
    def flops(self) -> float:
        """Operations of the visible pairs: two products forward, five backward."""
        return (10.0 if self.phase == "backward" else 4.0) * self.head_dim * self.visible_pairs

    @property
    def bytes_read(self) -> float:
        """Bytes of K and V that a decoding step has to read, in two-byte types."""
        return 4.0 * sum(keys for _, keys in self.sequences) * self.num_kv_heads * self.head_dim

    def describe(self) -> str:
        """Sizes in words."""
        heads = f"{self.num_heads} heads"
        if self.num_kv_heads != self.num_heads:
            heads += f" over {self.num_kv_heads}"
        tokens = f"{self.seqlen_k} tokens"
        if self.is_packed:
            tokens = f"{len(self.sequences)} sequences of {min(self.lengths or ())} to {self.seqlen_k} tokens"
        elif self.seqlen_q != self.seqlen_k:
            tokens = f"{self.seqlen_q} query to {self.seqlen_k} keys"
        if self.lengths and not self.is_packed:
            tokens += f" (mean {sum(self.lengths) / len(self.lengths):.0f})"
        batch = "" if self.is_packed else f"batch {self.batch}, "
        return f"{batch}{heads}, {tokens}, head_dim {self.head_dim}, {self.dtype}"

    def shrunk(self) -> Shape:
        """The same shape of work at a size that Triton's interpreter runs in a moment."""
        group_size = min(self.group_size, 2)

        def shorter(n: int) -> int:
            return n if n == 1 else max(3, n * 70 // 16384 + 20)

        batch = min(self.batch, 2)
        lengths = self.lengths
        if lengths is not None:
            lengths = tuple(shorter(n) for n in (lengths[:3] if self.is_packed else lengths[:batch]))
        return replace(
            self,
            batch=batch,
            num_heads=2 * group_size,
            num_kv_heads=2,
            seqlen_q=max(lengths) if self.is_packed and lengths else shorter(self.seqlen_q),
            seqlen_k=max(lengths) if self.is_packed and lengths else shorter(self.seqlen_k),
            head_dim=self.head_dim // 4,
            window_left=None if self.window_left is None else 15,
            lengths=lengths,
        )


@functools.cache
def _pairs(rows: int, keys: int, causal: bool, window_left: int | None) -> int:
    """Visible pairs of one head: row ``i`` stands at position ``i + keys - rows``."""
    pairs = 0
    for position in range(keys - rows, keys):
        first = 0 if window_left is None else max(0, position - window_left)
        end = min(keys, position + 1) if causal else keys
        pairs += max(0, end - first)
    return pairs


# ------------------------------------------------------------------------------------------------------- the table


def _sweep(phase: str, causal: bool, head_dim: int, thousands: int, goals: tuple[Goal, ...] = ()) -> Shape:
    mask = "causal" if causal else "full"
    seqlen, heads = thousands * 1024, HIDDEN // head_dim
    return Shape(
        f"{phase}_{mask}_hd{head_dim}_{thousands}k",
        phase,
        f"{phase}, {mask}",
        batch=TOTAL_TOKENS // seqlen,
        num_heads=heads,
        num_kv_heads=heads,
        seqlen_q=seqlen,
        seqlen_k=seqlen,
        head_dim=head_dim,
        causal=causal,
        phase=phase,
        flex=bool(goals),
        goals=goals,
    )


def _both(shape: Shape, backward_goals: tuple[Goal, ...] = ()) -> list[Shape]:
    """A forward shape and its backward."""
    backward = replace(
        shape,
        name=f"{shape.name}_backward",
        title=f"{shape.title}, backward",
        phase="backward",
        goals=backward_goals,
    )
    return [shape, backward]


def _decode(name: str, title: str, batch: int, keys: int, goals: tuple[Goal, ...] = (), **changed: object) -> Shape:
    options: dict[str, object] = dict(num_heads=32, num_kv_heads=8, seqlen_q=1, seqlen_k=keys, causal=True)
    return Shape(name, "decode", title, batch=batch, goals=goals, **(options | changed))  # type: ignore[arg-type]


#: Longest 4096 tokens, mean 2048: padding is half of the batch.
_HALF_PADDED = (4096, 512, 1024, 3072, 1536, 2560, 2048, 1536)
_RAGGED = (4096, 128, 2048, 1024, 3072, 512, 1536, 2560, 384, 1024)
_DECODE_GOALS = (Goal("share_of_copy", 0.8), Goal("over_sdpa", 1.0), Goal("over_flex", 1.0))


def _headlines() -> list[Shape]:
    window = Shape(
        "window_1024_16k",
        "variants",
        "sliding window of 1024",
        seqlen_q=16384,
        seqlen_k=16384,
        causal=True,
        window_left=1023,
        goals=(Goal("over_sdpa", 6.0),),
    )
    padded = Shape(
        "padded_half",
        "variants",
        "padded, half of it padding",
        batch=8,
        seqlen_q=4096,
        seqlen_k=4096,
        lengths=_HALF_PADDED,
        goals=(Goal("over_unpadded", 1.8),),
    )
    ragged = Shape(
        "varlen_causal",
        "variants",
        "packed, ragged, causal",
        seqlen_q=4096,
        seqlen_k=4096,
        causal=True,
        lengths=_RAGGED,
        form="packed",
    )
    grouped = Shape(
        "gqa_causal_8k", "variants", "causal, 32 heads over 8", batch=2, num_heads=32, num_kv_heads=8, causal=True
    )
    ragged_cache = tuple(4096 + 512 * (i % 9) for i in range(16))
    return [
        _sweep("forward", True, 128, 8, (Goal("tflops", 450),)),
        _sweep("forward", False, 128, 8, (Goal("tflops", 500),)),
        _sweep("backward", True, 128, 8, (Goal("tflops", 330),)),
        _sweep("forward", True, 64, 8, (Goal("tflops", 400),)),
        _decode("decode_b16_8k", "decode, batch 16", 16, 8192, _DECODE_GOALS),
        window,
        padded,
        ragged,
        *_both(grouped),
        _decode("decode_b1_64k", "decode, batch 1, long", 1, 65536),
        _decode("decode_paged_b16_8k", "decode, pages of 64 (the peers: no pages)", 16, 8192, form="paged"),
        _decode("decode_ragged_b16", "decode, caches of unequal length", 16, 8192, lengths=ragged_cache),
        *(_both(shape)[1] for shape in (window, padded, ragged)),
        replace(ragged, name="varlen_full", title="packed, ragged, full", causal=False),
        replace(padded, name="padded_mask", title="padded, by key_padding_mask", form="masked", flex=False, goals=()),
    ]


def _sweeps() -> list[Shape]:
    return [
        _sweep(phase, causal, head_dim, thousands)
        for lengths in ((4, 16, 1), (2, 8))
        for head_dim in (128, 64, 256)
        for thousands in lengths
        for causal in (True, False)
        for phase in ("forward", "backward")
    ]


def _table() -> dict[str, Shape]:
    shapes: dict[str, Shape] = {}
    for shape in (*_headlines(), *_sweeps()):
        shapes.setdefault(shape.name, shape)
    return shapes


#: Every shape by name, the most important first: a run that is cut short has those.
SHAPES: dict[str, Shape] = _table()
