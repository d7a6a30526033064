"""A cache in pages of fixed size, which sequences take as they grow, and share where they begin alike."""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor

from transformer_fast.attention import attention_paged
from transformer_fast.generation.cache import CacheShape
from transformer_fast.models.layers import AttentionOptions, fused_attention
from transformer_fast.models.layout import TokenLayout


class OutOfPages(RuntimeError):  # noqa: N818, what it is called everywhere
    """More pages are needed than are free."""


@dataclass(eq=False)
class PagedSequence:
    """One sequence's place in a :class:`PagedCache`.

    Attributes:
        ids: the prompt, and the tokens after it if its owner appends them: only told tokens can be found again.
        cached: how many first tokens were there already when it was opened.
        length: how many tokens the cache holds; -1 once it is closed.
        pages: where they are, ``page_size`` tokens a page.
    """

    ids: list[int]
    cached: int
    length: int
    pages: list[int]
    digests: list[bytes] = field(default_factory=list)


class PagedCache:
    """Pages of keys and values for all layers, counted by their users.

    ``buffers`` holds for each layer its pages ``(2, num_pages, num_kv_heads, page_size, head_dim)``. A full page is
    known by the hash of its token ids and of all before them, as in vLLM (Kwon et al., SOSP 2023): a prompt that begins
    alike takes it instead of computing it. A known page that nobody uses keeps its content until no other is free; the
    one unused for the longest goes first. Layers with a window keep all their tokens here.
    """

    def __init__(
        self,
        num_pages: int,
        page_size: int,
        layers: Sequence[CacheShape],
        *,
        device: torch.device | str,
        dtype: torch.dtype,
    ) -> None:
        for name, number in (("num_pages", num_pages), ("page_size", page_size)):
            if number < 1:
                raise ValueError(f"{name}={number} must be at least 1")
        self.num_pages, self.page_size, self.device = num_pages, page_size, torch.device(device)
        self.layers, self.dtype = tuple(layers), dtype
        self.buffers = [
            torch.empty(2, num_pages, shape.num_kv_heads, page_size, shape.head_dim, device=device, dtype=dtype)
            for shape in layers
        ]
        self._users = [0] * num_pages
        self._free = list(range(num_pages))[::-1]
        self._known: dict[bytes, int] = {}
        self._idle: OrderedDict[int, bytes] = OrderedDict()  # known and unused, the longest unused first
        self._digest_of: dict[int, bytes] = {}

    @property
    def available(self) -> int:
        """Pages that nobody uses."""
        return len(self._free) + len(self._idle)

    def missing(self, sequence: PagedSequence, length: int) -> int:
        """How many more pages ``sequence`` needs to hold ``length`` tokens."""
        return max(0, -(-length // self.page_size) - len(sequence.pages))

    def open(self, prompt_ids: Iterable[int]) -> PagedSequence:
        """Begin a sequence with the pages that are known already; at least its last token is left to compute."""
        ids = [int(i) for i in prompt_ids]
        if not ids:
            raise ValueError("prompt_ids is empty; allowed: at least one token")
        sequence = PagedSequence(ids, 0, 0, [])
        for number in range((len(ids) - 1) // self.page_size):
            digest = self._digest(sequence, number)
            page = self._known.get(digest)
            if page is None:
                break
            self._idle.pop(page, None)
            self._users[page] += 1
            sequence.pages.append(page)
            sequence.digests.append(digest)
        sequence.cached = sequence.length = len(sequence.pages) * self.page_size
        return sequence

    def close(self, sequence: PagedSequence) -> None:
        """Give the pages back. The sequence may not be used again."""
        # The last page first, so that it is forgotten first: without those before it nobody would find it.
        for page in reversed(sequence.pages):
            self._users[page] -= 1
            if self._users[page] == 0 and page in self._digest_of:
                self._idle[page] = self._digest_of[page]
            elif self._users[page] == 0:
                self._free.append(page)
        sequence.pages, sequence.length = [], -1

    def bind(self, sequences: Sequence[PagedSequence]) -> PagedBatch:
        """These sequences as the cache of forward passes, row by row."""
        return PagedBatch(self, sequences)

    def grow(self, sequence: PagedSequence, count: int) -> None:
        """Append ``count`` free pages."""
        for _ in range(count):
            if self._free:
                page = self._free.pop()
            else:
                page, digest = self._idle.popitem(last=False)
                del self._known[digest], self._digest_of[page]
            self._users[page] = 1
            sequence.pages.append(page)

    def publish(self, sequence: PagedSequence) -> None:
        """Make the full pages known; their keys and values must be written."""
        full = min(sequence.length, len(sequence.ids)) // self.page_size
        for number in range(len(sequence.digests), full):
            digest, page = self._digest(sequence, number), sequence.pages[number]
            sequence.digests.append(digest)
            if digest not in self._known:
                self._known[digest], self._digest_of[page] = page, digest

    def _digest(self, sequence: PagedSequence, number: int) -> bytes:
        """The name of a page's content: its token ids and, by their own names, all pages before."""
        before = sequence.digests[number - 1] if number else b""
        ids = sequence.ids[number * self.page_size : (number + 1) * self.page_size]
        return hashlib.blake2b(before + array("q", ids).tobytes(), digest_size=16).digest()


class PagedBatch:
    """Sequences of a :class:`PagedCache` bound together, with what a decoder asks of a cache (as ``KVCache``)."""

    def __init__(self, cache: PagedCache, sequences: Sequence[PagedSequence]) -> None:
        if len({id(sequence) for sequence in sequences}) < len(sequences):
            raise ValueError("sequences has one of them twice")
        self.cache, self.sequences = cache, list(sequences)
        self.layers, self.dtype = cache.layers, cache.dtype
        # Positions are counted by each sequence's tokens.
        self.by_token, self.columns, self.padding = True, 0, None
        self._lengths = [sequence.length for sequence in sequences]
        if min(self._lengths, default=-1) < 0:
            raise ValueError("sequences has none or a closed one; allowed: one or more that are open")
        self.seqlens = torch.tensor(self._lengths, dtype=torch.int32, device=cache.device)
        self.table = self.seqlens.new_zeros(len(sequences), 0)
        self._enter([0] * len(sequences))

    @property
    def max_seqlen(self) -> int:
        """Tokens of the longest sequence."""
        return max(self._lengths)

    @property
    def is_empty(self) -> bool:
        """Whether no token has been taken in yet."""
        return self.max_seqlen == 0

    def extend(self, layout: TokenLayout) -> None:
        """Take in the tokens of a dense ``layout``, and the pages for them.

        Raises:
            OutOfPages: there are not enough; nothing is changed.
        """
        cache, new = self.cache, layout.seqlen
        if layout.batch != len(self.sequences) or layout.cu_seqlens is not None or layout.key_padding_mask is not None:
            raise ValueError(f"a paged cache takes unpadded tokens of its {len(self.sequences)} sequences")
        if self._lengths != [sequence.length for sequence in self.sequences]:
            raise ValueError("a sequence was extended or closed elsewhere; bind the sequences again")
        counts = [cache.missing(sequence, sequence.length + new) for sequence in self.sequences]
        if sum(counts) > cache.available:
            raise OutOfPages(f"{sum(counts)} pages are needed; {cache.available} of {cache.num_pages} are free")
        self._is_first = self.is_empty
        held = [len(sequence.pages) for sequence in self.sequences]
        for sequence, count in zip(self.sequences, counts, strict=True):
            cache.grow(sequence, count)
            sequence.length += new
        self._lengths = [sequence.length for sequence in self.sequences]
        self._enter(held)
        index = torch.arange(new, device=cache.device) + self.seqlens[:, None]  # (batch, seqlen)
        pages = self.table.gather(1, index // cache.page_size)
        self._where = (pages.flatten(), slice(None), (index % cache.page_size).flatten())
        self.seqlens = self.seqlens + new

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        layout: TokenLayout,
        options: AttentionOptions,
        bias: Tensor | None = None,
    ) -> Tensor:
        """Keep a layer's new keys and values, and attend to all so far; as :meth:`KVCache.attend`, without a bias."""
        if bias is not None:
            raise ValueError("bias is given; a paged cache takes none")
        keys, values = self.cache.buffers[layer]
        keys[self._where], values[self._where] = key.detach().to(keys.dtype), value.detach().to(values.dtype)
        if layer == len(self.cache.buffers) - 1:
            for sequence in self.sequences:
                self.cache.publish(sequence)
        if self._is_first:  # nothing to read back
            return fused_attention(query, key, value, layout, options)
        how = options.arguments()
        del how["dropout_p"]
        out = attention_paged(layout.to_grid(query).transpose(1, 2), keys, values, self.table, self.seqlens, **how)
        return layout.take_rows(cast(Tensor, out).transpose(1, 2))

    def _enter(self, held: Sequence[int]) -> None:
        """Enter into the table the pages after the first ``held`` of each sequence. Its width doubles."""
        new = [
            (row, column, sequence.pages[column])
            for row, sequence in enumerate(self.sequences)
            for column in range(held[row], len(sequence.pages))
        ]
        if new:
            row, column, page = torch.tensor(new, dtype=torch.int32).T.to(self.table.device)
            width, needed = self.table.shape[1], max(column for _, column, _ in new) + 1
            if needed > width:
                more = self.table.new_zeros(len(self.sequences), max(needed, 2 * width) - width)
                self.table = torch.cat((self.table, more), 1)
            self.table[row.long(), column.long()] = page
