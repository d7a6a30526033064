"""What the mutants of the CUDA kernels are tried on, and which of them nothing can show."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from transformer_fast.testing.cases import Case, Problem


def _case(name: str, **fields: object) -> Case:
    sizes = {"batch": 1, "num_heads": 2, "seqlen_q": 150, "head_dim": 64} | fields
    return Case(variant="mutants", name=name, **sizes)  # type: ignore[arg-type]


#: Small problems that together come through every synchronisation, most of them in several ways: one tile and many, one
#: block of keys and many, masked and full blocks, more tiles than blocks, fewer keys than a block, decoding in splits.
CASES: tuple[tuple[Case, torch.dtype], ...] = tuple(
    # The order of sums shows in more digits of float16.
    (case, torch.float16 if case.deterministic else torch.bfloat16)
    for case in (
        _case("short", seqlen_q=20),
        _case("causal", causal=True),
        _case("full", num_heads=4, num_kv_heads=2, seqlen_q=130, seqlen_k=300),
        _case("many tiles", batch=2, num_heads=4, seqlen_q=140, causal=True),
        _case("window", seqlen_q=300, window_size=(40, 20)),
        _case("empty rows", seqlen_q=200, seqlen_k=60, causal=True),
        _case("decode", batch=2, num_heads=4, num_kv_heads=2, seqlen_q=2, seqlen_k=700),
        _case("decode, few keys", num_heads=4, num_kv_heads=2, seqlen_q=1, seqlen_k=40),
        _case("deterministic", num_heads=1, seqlen_q=70, seqlen_k=700, deterministic=True),
        _case("softcap, dropout", softcap=5.0, dropout_p=0.2),
        _case("bias", seqlen_q=100, seqlen_k=150, bias="float"),
        _case("padding", padding="holes"),
        _case("pages", batch=2, seqlen_q=20, seqlen_k=200, seqlens_k=(150, 200), page_size=16),
        _case("packed", seqlens_q=(70, 1, 130), seqlens_k=(70, 80, 150), causal=True),
        _case("odd head_dim", seqlen_q=70, head_dim=33),
        _case("growing keys", seqlen_q=80, seqlen_k=300, key_growth=1.02),
        _case("long padding", seqlen_q=4, seqlen_k=900, padding="holes"),
        # NaN in what no row sees: only then does it matter whether it was cleaned away in time.
        _case("poison, causal", seqlen_q=70, seqlen_k=100, causal=True, poison=True),
        _case("poison, window", seqlen_q=150, seqlen_k=300, window_size=(40, 20), poison=True),
        _case("poison, packed", seqlens_q=(70, 1, 130), seqlens_k=(90, 80, 150), window_size=(9, 9), poison=True),
        _case("poison, softcap", seqlen_q=20, seqlen_k=100, window_size=(10, 0), softcap=5.0, poison=True),
        # The first block of keys is another for each tile: who reads the next tile's too soon takes more blocks.
        _case("many windows", num_heads=4, seqlen_q=1400, window_size=(30, 0)),
        _case("poison, neighbours", seqlens_q=(70, 40, 130), seqlens_k=(70, 0, 130), causal=True, poison=True),
        _case("poison, padding", num_heads=1, padding="holes", poison=True),
        *(
            case
            for d in (128, 256)
            for case in (
                _case(f"{d}, causal", num_heads=1, head_dim=d, seqlen_q=100, seqlen_k=140, causal=True),
                _case(f"{d}, empty rows", num_heads=1, head_dim=d, seqlen_q=200, seqlen_k=30, causal=True),
                _case(f"{d}, padding", num_heads=1, head_dim=d, seqlen_q=100, padding="holes", poison=True),
                _case(f"{d}, decode", num_heads=1, head_dim=d, seqlen_q=2, seqlen_k=300),
            )
        ),
    )
)


def spoil_idle_queries(problem: Problem) -> None:
    """NaN in the queries of packed sequences without keys: tiles of the sequence before them may end among them."""
    if not problem.case.packed:
        return
    query = problem.inputs["query"] = problem.inputs["query"].clone()
    begin = 0
    for rows, keys in problem.case.sequences:
        if keys == 0:
            query[begin : begin + rows] = math.nan
        begin += rows


@dataclass(frozen=True)
class Survivor:
    """A synchronisation whose absence nothing shows, by the text of its line, and the reason."""

    file: str
    operation: str
    text: str  # a part of the line
    reason: str

    def matches(self, file: str, operation: str, text: str) -> bool:
        """Whether it is about this line."""
        return self.file == file and self.operation == operation and self.text in text


_PTXAS = "a product waited for again below: it is there for ptxas, which orders registers by it"
_MEMORY_MODEL = "no lane is ahead of the others here, so that only the memory model asks for it: "

SURVIVORS: tuple[Survivor, ...] = (
    Survivor("cuda/backward_consumer_sm90.cuh", "wgmma_wait", "ptxas wants to hear it here", _PTXAS),
    Survivor("cuda/backward_consumer_sm90.cuh", "wgmma_wait", "if constexpr (kHeadDim == 64)", _PTXAS),
    Survivor(
        "cuda/backward_producer_sm90.cuh",
        "sync_warp",
        "whole warps come to a named barrier",
        "bar.arrive follows, to which the emulator lets all lanes come together, as the compiler does in general",
    ),
    Survivor("cuda/forward_sm90.cuh", "sync_warp", "sync_warp();", _MEMORY_MODEL + "a product comes before the read"),
    Survivor("cuda/rows.cuh", "sync_warp", "sync_warp();", _MEMORY_MODEL + "a shuffle comes before the read"),
)
