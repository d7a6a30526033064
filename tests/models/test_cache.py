"""Caches change nothing but the time: attention through them against attention over whole sequences."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor

from transformer_fast import attention
from transformer_fast.generation.cache import CacheShape, CrossCache, KVCache
from transformer_fast.generation.paged import OutOfPages, PagedBatch, PagedCache, PagedSequence
from transformer_fast.models.layers import AttentionOptions
from transformer_fast.models.layout import TokenLayout
from transformer_fast.testing import judge
from transformer_fast.testing.baseline import plain_attention, visible_pairs

HEADS, KV_HEADS, HEAD_DIM = 4, 2, 8
SCORES: dict[str, Any] = {"softmax_scale": 0.3, "softcap": 5.0}
CPU = torch.device("cpu")
WINDOWS = (None, 1, 3, 40, 6)
NAN = float("nan")

each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


def shapes(windows: Iterable[int | None] = WINDOWS) -> list[CacheShape]:
    return [CacheShape(KV_HEADS, HEAD_DIM, window) for window in windows]


def kv_cache(batch: int, capacity: int, dtype: torch.dtype = torch.float32, slack: int = 0, windows=WINDOWS) -> KVCache:
    return KVCache(batch, shapes(windows), capacity, device=CPU, dtype=dtype, slack=slack)


def options_of(window: int | None) -> AttentionOptions:
    return AttentionOptions(True, None if window is None else (window - 1, 0), **SCORES)


def dense(cache: KVCache | PagedBatch, batch: int, seqlen: int) -> TokenLayout:
    return TokenLayout.dense(batch, seqlen, device=CPU, cached=None if cache.is_empty else cache.seqlens)


def padded(lengths: list[int], *, left: bool = False) -> Tensor:
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return mask.flip(1) if left else mask


def draw(length: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Queries, keys and values of a sequence, as rows."""
    return torch.randn(length, HEADS + 2 * KV_HEADS, HEAD_DIM).to(dtype)


def heads_of(rows: Tensor) -> tuple[Tensor, ...]:
    """Query, key and value."""
    return rows.split((HEADS, KV_HEADS, KV_HEADS), 1)


def one_problem(*parts: Tensor) -> list[Tensor]:
    """Rows (seqlen, heads, head_dim) as (1, heads, seqlen, head_dim)."""
    return [part.transpose(0, 1)[None] for part in parts]


def whole(rows: Tensor, options: AttentionOptions, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Attention over one whole sequence: in float64, and as plain PyTorch has it in the dtype of the rows."""
    qkv = one_problem(*heads_of(rows))
    how = options.arguments() | {"backend": "reference", "bias": None if bias is None else bias.double()}
    oracle = attention(*(x.double() for x in qkv), **how)
    visible = visible_pairs(1, len(rows), len(rows), causal=True, window_size=options.window_size)
    baseline, *_ = plain_attention(*qkv, visible=visible, bias=bias, **SCORES)
    return oracle[0].transpose(0, 1), baseline[0].transpose(0, 1)


class Sequences:
    """Random queries, keys and values of whole sequences, and what attention over each of them gives.

    ``rows[layer][sequence]`` is ``(length, HEADS + 2 * KV_HEADS, HEAD_DIM)``; ``out[layer][sequence]`` collects what a
    cache gives for the tokens ``begin[sequence]`` up to ``at[sequence]``.
    """

    def __init__(self, lengths: list[int], dtype: torch.dtype = torch.float32, windows=WINDOWS) -> None:
        self.windows = tuple(windows)
        self.rows = [[draw(length, dtype) for length in lengths] for _ in self.windows]
        self.out = [[rows.new_full((len(rows), HEADS, HEAD_DIM), NAN) for rows in layer] for layer in self.rows]
        self.begin, self.at = [0] * len(lengths), [0] * len(lengths)

    def feed(
        self, cache: KVCache | PagedBatch, counts: list[int], layout: TokenLayout | None = None, *, keep: bool = True
    ) -> None:
        """The next ``counts`` tokens of each sequence; without ``keep``, tokens of NaN that are to be cropped."""
        layout = layout or dense(cache, len(counts), counts[0])
        cache.extend(layout)
        spans = [slice(at, at + count) for at, count in zip(self.at, counts, strict=True)]
        for layer, window in enumerate(self.windows):
            rows = torch.cat([rows[span] for rows, span in zip(self.rows[layer], spans, strict=True)])
            query, key, value = heads_of(rows if keep else torch.full_like(rows, NAN))
            out = cache.attend(layer, query, key, value, layout, options_of(window))
            assert out.shape == query.shape
            if keep:
                for made, span, part in zip(self.out[layer], spans, out.split(counts), strict=True):
                    made[span] = part
        if keep:
            self.at = [span.stop for span in spans]

    def pick(self, index: list[int], *, copy: bool = False) -> Sequences:
        """Some of the sequences, to go on by themselves."""
        part = Sequences([], windows=self.windows)
        part.rows, part.out = (
            [[each[i].clone() if copy else each[i] for i in index] for each in layers]
            for layers in (self.rows, self.out)
        )
        part.begin, part.at = [self.begin[i] for i in index], [self.at[i] for i in index]
        return part

    def judge(self) -> None:
        for layer, window in enumerate(self.windows):
            results: list[list[Tensor]] = [[], [], []]
            for rows, out, begin, at in zip(self.rows[layer], self.out[layer], self.begin, self.at, strict=True):
                for many, one in zip(results, (out, *whole(rows[:at], options_of(window))), strict=True):
                    many.append(one[begin:at])
            verdict = judge(*map(torch.cat, results), name=f"window {window}")
            assert verdict.passed, str(verdict)


PIECES = {
    "one by one": [1] * 17,
    "small chunks": [2, 3, 1, 2, 4, 3, 2],
    "large chunks": [9, 1, 8],
    "prompt only": [],
}


@each_dtype
@pytest.mark.parametrize("slack", [0, 3])
@pytest.mark.parametrize("grows", [False, True], ids=["fits", "grows"])
@pytest.mark.parametrize("first", [[1, 1], [7, 7], [2, 9, 4], [0, 5]], ids=str)
@pytest.mark.parametrize("pieces", PIECES.values(), ids=PIECES)
def test_cached_attention(pieces, first, grows, slack, dtype):
    """Windows of 1, 3 and 6 wrap around, that of 40 never does; new buffers hold NaN in every test."""
    sequences = Sequences([length + sum(pieces) for length in first], dtype)
    cache = kv_cache(len(first), 2 if grows else max(first) + sum(pieces), dtype, slack)
    is_padded = len(set(first)) > 1
    sequences.feed(cache, first, TokenLayout.from_mask(padded(first)) if is_padded else None)
    for piece in pieces:
        sequences.feed(cache, [piece] * len(first))
    sequences.judge()
    assert cache.seqlens.tolist() == sequences.at and cache.max_seqlen == max(sequences.at)
    assert cache.seqlens.dtype == torch.int32


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
def test_a_padded_first_prompt(left):
    """Padding stays in the rows of a dense layout, and does not come into the cache."""
    lengths, windows = [9, 2, 5], (None, 3)
    sequences, cache = Sequences([15, 8, 11], windows=windows), kv_cache(3, 20, windows=windows)
    mask = padded(lengths, left=left)
    layout = TokenLayout.from_mask(mask, packed=False)
    cache.extend(layout)
    for layer, window in enumerate(windows):
        grid = torch.full((3, 9, HEADS + 2 * KV_HEADS, HEAD_DIM), NAN)
        grid[mask] = torch.cat([rows[:n] for rows, n in zip(sequences.rows[layer], lengths, strict=True)])
        out = cache.attend(layer, *heads_of(grid.flatten(0, 1)), layout, options_of(window))
        for made, part in zip(sequences.out[layer], out[mask.flatten()].split(lengths), strict=True):
            made[: len(part)] = part
    sequences.at = list(lengths)
    for _ in range(6):
        sequences.feed(cache, [1] * 3)
    sequences.judge()


def test_a_ring_holds_its_window_and_not_the_capacity():
    sequences, cache = Sequences([50]), kv_cache(1, 500, slack=2)
    assert cache.nbytes == 0, "allocated on first use"
    sequences.feed(cache, [30])
    sequences.feed(cache, [20])
    slots = [buffer.shape[3] for buffer in cache.buffers]
    assert slots == [500, 3, 5, 42, 8]
    assert cache.nbytes == 2 * KV_HEADS * HEAD_DIM * 4 * sum(slots)


def test_growth_is_by_half_at_least():
    cache, capacities = kv_cache(1, 1, windows=(None,)), []
    for _ in range(200):
        cache.extend(dense(cache, 1, 1))
        capacities.append(cache.capacity)
    steps = sorted(set(capacities))
    assert all(2 * after >= 3 * before for before, after in itertools.pairwise(steps))
    assert capacities[-1] < 400


@pytest.fixture
def keys_seen(monkeypatch) -> list[Tensor]:
    """The keys that a KVCache gives to attention."""
    seen: list[Tensor] = []

    def spy(query, key, value, **options):
        seen.append(key)
        return attention(query, key, value, **options)

    monkeypatch.setattr("transformer_fast.generation.cache.attention", spy)
    return seen


def test_decoding_reads_a_ring_where_it_lies(keys_seen):
    """Neither copied nor put in order."""
    sequences, cache = Sequences([30], windows=(6,)), kv_cache(1, 30, windows=(6,))
    sequences.feed(cache, [20])
    sequences.feed(cache, [1])
    (key,), buffer = keys_seen, cache.buffers[0][0]
    assert (key.data_ptr(), key.shape, key.stride()) == (buffer.data_ptr(), buffer.shape, buffer.stride())


def test_steps_repeat_their_shapes(keys_seen):
    """Each new shape would be planned anew."""
    sequences, cache = Sequences([120], windows=(None, 6)), kv_cache(1, 500, windows=(None, 6))
    sequences.feed(cache, [20])
    for _ in range(100):
        sequences.feed(cache, [1])
    assert len(keys_seen) == 200 and len({key.shape for key in keys_seen}) == 2


@each_dtype
@pytest.mark.parametrize("slack", [1, 4])
def test_guesses_are_taken_back(slack, dtype):
    """As in speculative decoding: tokens are taken in and forgotten again; these are NaN, which would not go unseen."""
    sequences, cache = Sequences([60, 60, 60], dtype), kv_cache(3, 60, dtype, slack)
    sequences.feed(cache, [3, 11, 1], TokenLayout.from_mask(padded([3, 11, 1])))
    for _ in range(14):
        sequences.feed(cache, [random.randint(1, 3)] * 3)
        sequences.feed(cache, [random.randint(1, slack)] * 3, keep=False)
        cache.crop(sequences.at)
        assert cache.seqlens.tolist() == sequences.at and cache.max_seqlen == max(sequences.at)
    sequences.judge()


def test_some_sequences_keep_more_than_others():
    sequences, cache = Sequences([40, 40]), kv_cache(2, 40, slack=3)
    sequences.feed(cache, [9, 9])
    for _ in range(8):
        sequences.feed(cache, [3, 3])
        sequences.at = [at - random.randint(0, 3) for at in sequences.at]
        cache.crop(torch.tensor(sequences.at))
    sequences.judge()


@pytest.mark.parametrize("length", [20, 18, 17])  # the next token's own slot is one more than slack
@pytest.mark.parametrize("prompt", [20, 3])
def test_as_many_as_the_slack_can_be_taken_back(prompt, length):
    sequences, cache = Sequences([30]), kv_cache(1, 30, slack=2)
    for count in (prompt, 20 - prompt)[: 1 + (prompt < 20)]:
        sequences.feed(cache, [count])
    sequences.at = [length]
    cache.crop([length])
    for count in (1, 1, 4, 1):
        sequences.feed(cache, [count])
    sequences.judge()


def test_more_than_the_slack_cannot():
    def filled(*windows: int | None, slack: int = 2) -> KVCache:
        sequences, cache = Sequences([20], windows=windows), kv_cache(1, 30, slack=slack, windows=windows)
        sequences.feed(cache, [20])
        return cache

    with pytest.raises(ValueError, match=r"seqlens\[0\]=16 of 20 tokens.*window of 6.*slack=2"):
        filled(None, 6).crop([16])
    cache = filled(6, slack=4)
    cache.crop([17])
    with pytest.raises(ValueError, match="seqlens"):  # what was overwritten stays overwritten
        cache.crop([14])
    assert cache.seqlens.tolist() == [17]
    filled(None, 40).crop([3])
    with pytest.raises(ValueError, match=r"seqlens=\[-1\]"):
        filled(None).crop([-1])
    cache = filled(6)
    cache.crop([0])
    assert cache.is_empty
    sequences = Sequences([12], windows=(6,))
    for count in (2, 1, 1, 5, 3):
        sequences.feed(cache, [count])
    sequences.judge()


@each_dtype
@pytest.mark.parametrize("slack", [0, 2])
def test_reorder(slack, dtype):
    """Two prompts become three beams each, which then replace one another."""
    sequences, cache = Sequences([30, 30], dtype), kv_cache(2, 30, dtype, slack)
    sequences.feed(cache, [4, 2], TokenLayout.from_mask(padded([4, 2])))
    for index in ([0, 0, 0, 1, 1, 1], [2, 0, 1, 4, 4, 3], [0, 0, 1, 5, 4, 3], [1, 0, 2, 5, 5, 5], [5, 0]):
        cache.reorder(torch.tensor(index))
        sequences = sequences.pick(index, copy=True)
        for layer in sequences.rows:
            for rows, at in zip(layer, sequences.at, strict=True):
                rows[at:] = draw(30 - at, dtype)
        for count in (1, 2):
            sequences.feed(cache, [count] * len(index))
    assert cache.batch == 2
    sequences.judge()


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_position_bias(packed):
    bias, rows, cache, made = torch.randn(1, HEADS, 12, 12), draw(12), kv_cache(1, 12, windows=(None,)), []
    for piece in rows.split((6, 4, 1, 1)):
        begin, layout = cache.max_seqlen, dense(cache, 1, len(piece))
        if packed and cache.is_empty:
            layout = TokenLayout.from_mask(torch.ones(1, len(piece)))
        cache.extend(layout)
        part = bias[:, :, begin : cache.max_seqlen, : cache.max_seqlen]
        made.append(cache.attend(0, *heads_of(piece), layout, options_of(None), bias=part))
    verdict = judge(torch.cat(made), *whole(rows, options_of(None), bias), name="with a bias")
    assert verdict.passed, str(verdict)


def test_gradients_do_not_stay_in_the_cache():
    cache = kv_cache(1, 4, windows=(None,))
    layout = dense(cache, 1, 1)
    cache.extend(layout)
    cache.attend(0, *heads_of(draw(1).requires_grad_()), layout, options_of(None))
    assert not cache.buffers[0].requires_grad


def test_complaints():
    for name, wrong in (("batch", {"batch": 0}), ("capacity", {"capacity": 0}), ("slack", {"slack": -1})):
        with pytest.raises(ValueError, match=f"{name}="):
            kv_cache(**{"batch": 1, "capacity": 3} | wrong)
    sequences, cache = Sequences([20, 20], windows=(4,)), kv_cache(2, 20, windows=(4,))
    with pytest.raises(ValueError, match="batch 3; allowed: 2"):
        cache.extend(TokenLayout.dense(3, 1, device=CPU))
    sequences.feed(cache, [9, 9])
    for is_packed in (True, False):
        with pytest.raises(ValueError, match="first prompt"):
            cache.extend(TokenLayout.from_mask(torch.ones(2, 1), packed=is_packed))
    layout, rows = dense(cache, 2, 1), heads_of(draw(2))
    cache.extend(layout)
    for options in (options_of(None), options_of(5), AttentionOptions(False, (3, 3))):
        with pytest.raises(ValueError, match="causal with the window of 4"):
            cache.attend(0, *rows, layout, options)
    with pytest.raises(ValueError, match="bias"):
        cache.attend(0, *rows, layout, options_of(4), bias=torch.zeros(1, 1, 1, 10))


# ------------------------------------------------------------------------------------------------- cross-attention


class Side:
    """Rows of one side of cross-attention in one kind of layout, and each sequence's own; NaN in padding."""

    def __init__(self, kind: str, lengths: list[int], heads: int, dtype: torch.dtype, *, left: bool = False) -> None:
        lengths = [max(lengths)] * len(lengths) if kind == "dense" else lengths
        self.parts = [torch.randn(n, heads, HEAD_DIM).to(dtype) for n in lengths]
        self.mask = padded(lengths, left=left)
        self.layout = TokenLayout.from_mask(self.mask, packed=kind == "packed")
        if kind == "dense":
            self.layout = TokenLayout.dense(*self.mask.shape, device=CPU)
        grid = torch.full((*self.mask.shape, heads, HEAD_DIM), NAN, dtype=dtype)
        grid[self.mask] = torch.cat(self.parts)
        self.rows = self.layout.take_rows(grid)


@each_dtype
@pytest.mark.parametrize("encoder", ["dense", "packed", "masked"])
@pytest.mark.parametrize("decoder", ["dense", "packed", "masked"])
def test_cross_attention(encoder, decoder, dtype):
    """Every query sees every key of its sequence, whatever the options say of causality."""
    keys = Side(encoder, [5, 9, 1], 2 * KV_HEADS, dtype, left=True)
    queries = Side(decoder, [4, 1, 3], HEADS, dtype, left=True)
    cache, index = CrossCache(), [2, 0, 1]
    cache.store(2, *keys.rows.split(KV_HEADS, 1), keys.layout)
    assert cache.has(2) and not cache.has(0)
    cache.reorder(torch.tensor(index))
    out = cache.attend(2, queries.rows, queries.layout, options_of(3))
    if decoder == "masked":
        out = out[queries.mask.flatten()]
    results: list[list[Tensor]] = [[], []]
    for query, i in zip(queries.parts, index, strict=True):
        qkv = one_problem(query, *keys.parts[i].split(KV_HEADS, 1))
        results[0].append(attention(*(x.double() for x in qkv), backend="reference", **SCORES)[0].transpose(0, 1))
        visible = torch.ones(1, 1, len(query), len(keys.parts[i]), dtype=torch.bool)
        results[1].append(plain_attention(*qkv, visible=visible, **SCORES)[0][0].transpose(0, 1))
    verdict = judge(out, *map(torch.cat, results), name="cross-attention")
    assert verdict.passed, str(verdict)


# ------------------------------------------------------------------------------------------------------------ pages


def pages(number: int, page_size: int = 4, dtype: torch.dtype = torch.float32) -> PagedCache:
    return PagedCache(number, page_size, shapes(), device=CPU, dtype=dtype)


def ids(length: int) -> list[int]:
    return torch.randint(1000, (length,)).tolist()


def fill(cache: PagedCache, prompt: list[int]) -> PagedSequence:
    """Open a sequence and compute what it lacks."""
    sequence = cache.open(prompt)
    new = len(prompt) - sequence.cached
    Sequences([new]).feed(cache.bind([sequence]), [new])
    return sequence


@each_dtype
@pytest.mark.parametrize("page_size", [1, 4, 16])
def test_paged_attention(page_size, dtype):
    """Prompts of unequal length, each by itself and in chunks, then all together."""
    sequences, cache = Sequences([25, 19, 20], dtype), pages(70, page_size, dtype)
    handles = [cache.open(ids(n)) for n in (13, 7, 8)]
    for i, chunks in enumerate(([9, 4], [7], [1, 1, 6])):
        alone, bound = sequences.pick([i]), cache.bind([handles[i]])
        for count in chunks:
            alone.feed(bound, [count])
        sequences.at[i] = alone.at[0]
    together = cache.bind(handles)
    for count in (1, 1, 3, 1, 1, 5):
        sequences.feed(together, [count] * 3)
    sequences.judge()
    assert together.seqlens.tolist() == sequences.at and together.max_seqlen == 25
    assert [len(handle.pages) for handle in handles] == [-(-n // page_size) for n in sequences.at]
    assert together.seqlens.dtype == together.table.dtype == torch.int32


def test_prompts_that_begin_alike_share_pages():
    sequences, cache = Sequences([20, 20]), pages(20)
    for rows in sequences.rows:
        rows[1][:11] = rows[0][:11]  # equal tokens have equal rows
    begin, handles = ids(11), []
    for i in range(2):
        handles.append(cache.open(begin + ids(3)))
        alone, cached = sequences.pick([i]), handles[i].cached
        alone.at = [cached]
        alone.feed(cache.bind(handles[i:]), [14 - cached])
        sequences.begin[i], sequences.at[i] = cached, 14
    assert sequences.begin == [0, 8]
    assert handles[1].pages[:2] == handles[0].pages[:2]
    assert cache.available == 20 - 4 - 2
    for _ in range(6):
        sequences.feed(cache.bind(handles), [1, 1])
    sequences.judge()


def test_the_last_token_is_always_computed():
    cache, prompt = pages(20), ids(8)
    fill(cache, prompt)
    assert [cache.open(prompt[:n]).cached for n in (3, 4, 5, 8)] == [0, 0, 4, 4]
    assert cache.open([*prompt, 1]).cached == 8


def test_a_page_is_the_same_only_after_the_same_pages():
    cache, one, two = pages(20), ids(4), ids(4)
    fill(cache, one + two + ids(1))
    assert cache.open(two + one + ids(1)).cached == 0
    assert cache.open(one + one + ids(1)).cached == 4


def test_pages_that_are_not_computed_are_not_shared():
    cache, prompt = pages(20), ids(9)
    bound = cache.bind([cache.open(prompt)])
    assert cache.open(prompt).cached == 0
    bound.extend(dense(bound, 1, 9))
    assert cache.open(prompt).cached == 0


def test_tokens_after_the_prompt_are_shared_once_told():
    cache, prompt, more = pages(20), ids(6), ids(3)
    sequence = fill(cache, prompt)
    for token in more:
        sequence.ids.append(token)
        Sequences([1]).feed(cache.bind([sequence]), [1])
    assert cache.open([*prompt, *more, 1]).cached == 8


def test_freed_pages_are_found_again_until_they_are_needed():
    cache, old, young = pages(6), ids(9), ids(9)
    for prompt in (old, young):
        cache.close(fill(cache, prompt))
    assert cache.available == 6
    again = cache.open(old)  # now `young` is the one unused for the longest
    assert again.cached == 8 and cache.available == 4
    cache.close(again)
    cache.close(fill(cache, ids(12)))  # two pages were free already
    assert cache.open(young).cached == 4, "the third was its last"
    assert cache.open(old).cached == 8


def test_closing_gives_pages_back_once():
    cache, prompt = pages(8), ids(9)
    first, second = fill(cache, prompt), fill(cache, prompt)
    assert cache.available == 8 - 3 - 1
    for _ in range(2):
        cache.close(first)
        assert cache.available == 8 - 3
    cache.close(second)
    assert cache.available == 8
    with pytest.raises(ValueError, match="closed"):
        cache.bind([first])


def test_pages_with_equal_content_do_not_stand_in_for_each_other():
    """Two prompts that are computed at the same time have pages of their own; one of each pair is known."""
    cache, prompt = pages(6), ids(9)
    both = [cache.open(prompt), cache.open(prompt)]
    Sequences([9, 9]).feed(cache.bind(both), [9, 9])
    assert not set(both[0].pages) & set(both[1].pages)
    third = cache.open(prompt)
    assert third.pages == both[0].pages[:2]
    for sequence in (*both, third):
        cache.close(sequence)
    assert cache.available == 6
    filler = fill(cache, ids(24))
    assert sorted(filler.pages) == list(range(6))
    assert cache.open(prompt).cached == 0


def test_random_traffic():
    """Every page is used, idle or free at any time, and what is found again is right."""
    cache, alive = pages(16), []
    rows = [draw(2 * 16).view(2, 16, -1, HEAD_DIM) for _ in WINDOWS]  # of each layer, token and position
    shared = 0
    for _ in range(80):
        if alive and (len(alive) == 4 or random.random() < 0.4):
            cache.close(alive.pop(random.randrange(len(alive))))
            continue
        prompt = [random.choice((0, 0, 0, 1)) for _ in range(random.randint(1, 16))]
        sequence, sequences = cache.open(prompt), Sequences([len(prompt)])
        sequences.rows = [[layer[torch.tensor(prompt), torch.arange(len(prompt))]] for layer in rows]
        sequences.begin, sequences.at = [sequence.cached], [sequence.cached]
        sequences.feed(cache.bind([sequence]), [len(prompt) - sequence.cached])
        sequences.judge()
        alive.append(sequence)
        shared += sequence.cached
        assert cache.available == 16 - len({page for sequence in alive for page in sequence.pages})
    assert shared


def test_out_of_pages_changes_nothing():
    cache, sequences = pages(4), Sequences([20, 20])
    handles = [fill(cache, ids(4)), fill(cache, ids(7))]
    bound, sequences.at = cache.bind(handles), [4, 7]
    sequences.feed(bound, [1, 1])
    before = [list(handle.pages) for handle in handles], bound.seqlens.tolist()
    with pytest.raises(OutOfPages, match="1 pages are needed; 0 of 4 are free"):
        bound.extend(dense(bound, 2, 1))
    assert before == ([list(handle.pages) for handle in handles], bound.seqlens.tolist())
    cache.close(handles[1])
    bound = cache.bind(handles[:1])
    bound.extend(dense(bound, 1, 11))


def test_paged_complaints():
    with pytest.raises(ValueError, match="page_size=0"):
        pages(3, 0)
    cache = pages(3)
    with pytest.raises(ValueError, match="prompt_ids is empty"):
        cache.open([])
    sequence = cache.open(ids(5))
    for wrong in ([], [sequence, sequence]):
        with pytest.raises(ValueError, match="sequences has"):
            cache.bind(wrong)
    bound, other = cache.bind([sequence]), cache.bind([sequence])
    for layout in (TokenLayout.dense(2, 1, device=CPU), TokenLayout.from_mask(torch.ones(1, 5))):
        with pytest.raises(ValueError, match="unpadded tokens of its 1"):
            bound.extend(layout)
    layout = dense(bound, 1, 5)
    bound.extend(layout)
    with pytest.raises(ValueError, match="bind the sequences again"):
        other.extend(layout)
    with pytest.raises(ValueError, match="bias"):
        bound.attend(0, *heads_of(draw(5)), layout, options_of(None), bias=torch.zeros(1, 1, 5, 5))


@torch.no_grad()
def test_the_shorter_of_two_sequences_goes_on_alone():
    torch.manual_seed(0)
    shape = CacheShape(2, 8)
    cache = KVCache(2, [shape], 16, device="cpu", dtype=torch.float32)
    layout = TokenLayout.from_mask(torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]))
    options = AttentionOptions(True, None)
    query, key, value = (torch.randn(9, heads, 8) for heads in (4, 2, 2))
    cache.extend(layout)
    cache.attend(0, query[:8], key[:8], value[:8], layout, options)
    cache.reorder(torch.tensor([1]))
    step = TokenLayout.dense(1, 1, device="cpu", cached=cache.seqlens)
    cache.buffers[0][:, :, :, 3:] = float("nan")
    cache.extend(step)
    found = cache.attend(0, query[8:], key[8:], value[8:], step, options)
    query, key, value = (x.transpose(0, 1)[None].double() for x in (query[8:], key[5:], value[5:]))
    oracle = attention(query, key, value)[0].transpose(0, 1)
    assert judge(found, oracle, oracle.float()).passed
