"""What a kernel is given, in named tuples: pointers with their strides (in elements), and None for what is absent.

Triton compiles a kernel anew for each pattern of what is None, so ``if problem.bias is not None`` costs nothing.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class Rows(NamedTuple):
    """A tensor of (batch, head, row, column) with contiguous columns. A paged cache has a page for a batch entry."""

    data: Any
    batch: Any
    head: Any
    row: Any
    batches: Any  # sizes, for tensor descriptors
    heads: Any
    rows: Any


class Vector(NamedTuple):
    """A tensor of one dimension."""

    data: Any
    stride: Any


class Table(NamedTuple):
    """A tensor of (batch, anything)."""

    data: Any
    batch: Any
    stride: Any


class Dense(NamedTuple):
    """A bias: (batch, head, row, key), with stride 0 where it broadcasts."""

    data: Any
    batch: Any
    head: Any
    row: Any
    key: Any


class Dropout(NamedTuple):
    """The seed lies in device memory, int64, so that nothing waits for it. Words below the threshold drop."""

    seed: Any
    threshold: Any
    keep: Any  # 1 / (1 - dropout_p)


class Problem(NamedTuple):
    """Everything about an attention problem but its four large tensors."""

    seqlen_q: Any
    seqlen_k: Any
    left: Any
    right: Any
    cu_seqlens_q: Any  # packed sequences
    cu_seqlens_k: Any
    seqlens_k: Any  # Vector
    block_table: Any  # Table of pages
    lse_batch: Any  # strides of lse, and of all that holds one number a row
    lse_head: Any
    softmax_scale: Any
    softcap: Any
    bias: Any  # Dense
    alibi: Any  # Table of slopes by head
    key_mask: Any  # Table by key
    sinks: Any  # Vector
    dropout: Any  # Dropout


class Schedule(NamedTuple):
    """How the tiles of a launch are numbered: see ``kernels.schedule.job``."""

    tiles: Any  # of the longest sequence
    kv_heads: Any
    heads: Any  # kv_heads * batch
    section: Any  # heads that go through the tiles together, so that their K and V stay in the level-2 cache
    queue: Any  # int32 counter at 0 for programs that stay and take job after job, or None for a program a job


class Partials(NamedTuple):
    """Results of the splits of a row's keys, float32: sums (splits, rows, head_dim_v), top and total (splits, rows).

    ``sums`` are those of exp2((s - top) * factor) * v, and total is the sum of the exponentials.
    """

    sums: Any  # not "values": Triton gives tuples a field of that name
    top: Any
    total: Any
    rows: Any  # how many there are: num_heads * total_q
