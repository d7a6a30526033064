"""The keys of a padded problem laid into the pages of a cache, and NaN wherever nobody may look."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

NAN = float("nan")
SPARE = 3  # pages that belong to no sequence
#: What stands in a table where no page is needed. Whoever reads it is led out of the cache.
NO_PAGES = (-1, 10**9, -(2**31), 2**31 - 1)


def lay_in_pages(
    key: Tensor, value: Tensor, lengths: Sequence[int], page_size: int, shared: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values of sequences -> pages in a random order, and the table that finds them.

    Args:
        key, value: (batch, num_kv_heads, seqlen_k, head_dim); what lies past a length is left out.
        shared: so many first pages are those of every sequence, which must have the same keys there.

    Returns:
        k_pages and v_pages (num_pages, num_kv_heads, page_size, head_dim), and int32 block_table (batch, max_pages),
        which has room for seqlen_k keys and no more.
    """
    counts = [-(-length // page_size) for length in lengths]
    common = max((min(count, shared) for count in counts), default=0)
    num_pages = common + sum(max(count - shared, 0) for count in counts) + SPARE
    order = torch.randperm(num_pages, generator=generator).tolist()
    first, free = order[:common], iter(order[common:])

    max_pages = -(-key.shape[2] // page_size)
    table = torch.tensor(NO_PAGES, dtype=torch.int32).repeat(len(lengths), max_pages)[:, :max_pages].contiguous()
    k_pages, v_pages = (t.new_full((num_pages, t.shape[1], page_size, t.shape[3]), NAN) for t in (key, value))
    for b, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        for i in range(count):
            page = first[i] if i < shared else next(free)
            table[b, i] = page
            begin, end = i * page_size, min(length, (i + 1) * page_size)
            k_pages[page, :, : end - begin] = key[b, :, begin:end]
            v_pages[page, :, : end - begin] = value[b, :, begin:end]
    return k_pages, v_pages, table


def place_table(table: Tensor, layout: str) -> Tensor:
    """The same table with other strides; where `layout` has gaps, what leads astray stands between its entries."""
    if layout == "heads_last":
        return table.T.contiguous().T
    if layout != "gaps":
        return table
    wide = table.new_full((table.shape[0] + 1, 2 * table.shape[1] + 1), NO_PAGES[1])
    wide[1:, 1::2] = table
    return wide[1:, 1::2]
