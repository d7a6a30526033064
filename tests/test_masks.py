"""The one mask, proven on every small problem: Python, C++ and the kernels themselves against the definition.

The definition is design's sentence, written out key by key: for batch entry b and query row i at position
p = i + offset_b, key j is visible when start_b <= j < end_b and p - left <= j <= p + right.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from transformer_fast import _C_cpu, attention, attention_varlen, masks
from transformer_fast.masks import SequenceMask
from transformer_fast.testing import Case, Target, available_targets, judge, make_problem
from transformer_fast.testing.runner import expected

SIZES = range(7)
WINDOWS = range(-1, 7)  # -1 is unbounded
TARGETS = available_targets()
each_target = pytest.mark.parametrize("target", TARGETS, ids=lambda t: t.name)
# On one KV head, one query head is few enough rows for the decode path, and 17 heads are too many. The reference has
# one path.
each_path = pytest.mark.parametrize(
    ("target", "heads"),
    [
        pytest.param(target, heads, id=f"{target.name}-{path}")
        for target in TARGETS
        for path, heads in (("decode", 1), ("tiles", 17))
        if target.backend != "reference" or heads == 1
    ],
)


def sees(mask: SequenceMask, row: int, key: int) -> bool:
    """The definition. Sides are sizes here, unbounded ones included."""
    position = row + mask.offset
    return mask.start <= key < mask.end and position - mask.left <= key <= position + mask.right


def small_masks(offsets: range) -> Iterator[SequenceMask]:
    """Every mask of up to six keys: sub-intervals of the keys, offsets, windows."""
    sides = [(masks.bounds(left, right)) for left in WINDOWS for right in WINDOWS]
    for start, end in itertools.combinations_with_replacement(SIZES, 2):
        for offset in offsets:
            for left, right in sides:
                yield SequenceMask(start, end, offset, left, right)


def row_bits(mask: SequenceMask, rows: int) -> list[int]:
    """Each row's visible keys as the bits of a number, by the definition."""
    return [sum(1 << j for j in SIZES if sees(mask, i, j)) for i in range(rows)]


def ends(bits: int) -> tuple[int, int]:
    """First key and last key + 1 of a set that is not empty."""
    return (bits & -bits).bit_length() - 1, bits.bit_length()


def interval_bits(lo: int, hi: int) -> int:
    return (1 << hi) - (1 << lo)


@pytest.mark.sanitize
def test_row_interval_is_the_definition() -> None:
    """Every visible key is in the interval and no other: so what a row sees is an interval, too."""
    for mask in small_masks(range(-6, 7)):
        for row, wanted in enumerate(row_bits(mask, 6)):
            lo, hi = masks.row_interval(mask, row)
            assert interval_bits(lo, hi) == wanted, (mask, row)
            if not wanted:
                assert lo == hi == mask.start, (mask, row)
            assert tuple(_C_cpu.row_interval(tuple(mask), row)) == (lo, hi), (mask, row)


def test_tile_range_is_the_definition() -> None:
    """The union of a tile's rows and their intersection, for every tile of up to four rows among six.

    The ends are tight: a tile range that began a key too early would cost time, not correctness, and no other test
    would notice.
    """
    for mask in small_masks(range(-6, 7)):
        rows = row_bits(mask, 6)
        for first in range(6):
            union, common = 0, -1
            for last in range(first, min(first + 4, 6)):
                union, common = union | rows[last], common & rows[last]
                found = masks.tile_range(mask, first, last)
                assert interval_bits(found.begin, found.end) == union, (mask, first, last)
                assert interval_bits(found.full_begin, found.full_end) == common, (mask, first, last)
                if not union:
                    assert set(found) == {mask.start}, (mask, first, last)
                assert tuple(_C_cpu.tile_range(tuple(mask), first, last)) == tuple(found), (mask, first, last)


def test_ranges_nest() -> None:
    """begin <= full_begin <= full_end <= end: what the loops over key tiles rely on."""
    for mask in small_masks(range(-6, 7, 3)):
        found = masks.tile_range(mask, 1, 4)
        assert found.begin <= found.full_begin <= found.full_end <= found.end, mask


def test_far_positions_in_both_languages() -> None:
    """Offsets beyond 32 bits: a long cache times nothing may wrap."""
    far = 2**33
    for left, right in ((0, 0), (5, 0), (masks.UNBOUNDED, 0), (masks.UNBOUNDED, masks.UNBOUNDED)):
        mask = SequenceMask(0, far + 10, far, left, right)
        lo, hi = masks.row_interval(mask, 7)
        assert (lo, hi) == (max(0, far + 7 - left), min(far + 10, far + 7 + right + 1))
        assert tuple(_C_cpu.row_interval(tuple(mask), 7)) == (lo, hi)
        assert tuple(_C_cpu.tile_range(tuple(mask), 3, 7)) == tuple(masks.tile_range(mask, 3, 7))


# ------------------------------------------------------------------------------------------------ the dense form


def brute_force(seqlen_q: int, seqlen_k: int, left: int, right: int, lengths: list[int] | None = None) -> Tensor:
    """bool (batch, seqlen_q, seqlen_k), pair by pair, from the public meaning of window_size and seqlens_k."""
    visible = torch.zeros(1 if lengths is None else len(lengths), seqlen_q, seqlen_k, dtype=torch.bool)
    for b, length in enumerate([seqlen_k] if lengths is None else lengths):
        mask = SequenceMask(0, length, length - seqlen_q, *masks.bounds(left, right))
        for i, j in itertools.product(range(seqlen_q), range(seqlen_k)):
            visible[b, i, j] = sees(mask, i, j)
    return visible


def every_window() -> Iterator[tuple[int, int, int, int]]:
    return itertools.product(SIZES, SIZES, WINDOWS, WINDOWS)


def every_pattern(seqlen_k: int) -> Tensor:
    """bool (2**seqlen_k, seqlen_k): every key padding mask there is."""
    return (torch.arange(2**seqlen_k)[:, None] >> torch.arange(seqlen_k)) % 2 == 1


def test_bounds() -> None:
    assert masks.bounds(-1, -1) == (masks.UNBOUNDED, masks.UNBOUNDED)
    assert masks.bounds(0, 3) == (0, 3)
    assert masks.bounds(4, -1) == (4, masks.UNBOUNDED)


def test_visible_keys_is_the_definition() -> None:
    """All sizes and windows, with every key length and every padding pattern there is (four keys at most)."""
    for seqlen_q, seqlen_k, left, right in every_window():
        plain = brute_force(seqlen_q, seqlen_k, left, right)
        assert torch.equal(masks.visible_keys(seqlen_q, seqlen_k, left, right), plain)
        lengths = list(range(seqlen_k + 1))
        found = masks.visible_keys(seqlen_q, seqlen_k, left, right, seqlens_k=torch.tensor(lengths, dtype=torch.int32))
        assert torch.equal(found, brute_force(seqlen_q, seqlen_k, left, right, lengths))
        if seqlen_k > 4:
            continue
        keep = every_pattern(seqlen_k)
        found = masks.visible_keys(seqlen_q, seqlen_k, left, right, key_padding_mask=keep)
        assert torch.equal(found, plain & keep[:, None])


# --------------------------------------------------------------------------------------------- the kernels' masks


def seen_by(target: Target, seqlen_q: int, seqlen_k: int, heads: int, **options: object) -> Tensor:
    """Which keys have a part in the output of each row: with unit vectors as values the output is the probabilities."""
    batch = options.pop("batch", 1)
    query = torch.zeros(batch, heads, seqlen_q, 4)
    key = torch.zeros(batch, 1, seqlen_k, 4)
    unit = torch.eye(seqlen_k, max(seqlen_k, 1)).expand(batch, 1, seqlen_k, max(seqlen_k, 1))
    with target.forced():
        out = attention(query, key, unit, backend=target.backend, **options)
    return out[..., :seqlen_k] > 0


@each_path
def test_every_kernel_sees_what_the_definition_says(target: Target, heads: int) -> None:
    """All sizes with every key length, and windows of every kind."""
    for seqlen_q, seqlen_k in itertools.product(range(1, 7), SIZES):
        lengths = list(range(seqlen_k + 1))
        as_tensor = torch.tensor(lengths, dtype=torch.int32)
        for left, right in itertools.product((-1, 0, 2), (-1, 0, 1)):
            wanted = brute_force(seqlen_q, seqlen_k, left, right, lengths)[:, None].expand(-1, heads, -1, -1)
            found = seen_by(
                target, seqlen_q, seqlen_k, heads,
                batch=len(lengths), seqlens_k=as_tensor, window_size=(left, right),
            )  # fmt: skip
            assert torch.equal(found, wanted), (seqlen_q, seqlen_k, left, right)


@each_path
def test_every_kernel_keeps_what_the_padding_mask_keeps(target: Target, heads: int) -> None:
    """Every pattern of six keys, with windows: the pattern hides keys and moves nothing."""
    keep = every_pattern(6)
    for seqlen_q, left, right in ((1, -1, -1), (2, 0, 0), (4, 2, 1), (6, -1, 0), (6, 3, -1)):
        wanted = brute_force(seqlen_q, 6, left, right) & keep[:, None]
        found = seen_by(target, seqlen_q, 6, heads, batch=len(keep), key_padding_mask=keep, window_size=(left, right))
        assert torch.equal(found, wanted[:, None].expand(-1, heads, -1, -1)), (seqlen_q, left, right)


@each_path
def test_every_kernel_keeps_what_a_boolean_bias_keeps(target: Target, heads: int) -> None:
    """Every pattern of a row of six keys, a different one in each row: the summary of a dense mask loses nothing."""
    patterns = every_pattern(6).reshape(16, 1, 4, 6)  # (batch, 1, rows, keys)
    for left, right in ((-1, -1), (2, 1), (-1, 0)):
        wanted = brute_force(4, 6, left, right)[:, None] & patterns
        found = seen_by(target, 4, 6, heads, batch=16, bias=patterns, window_size=(left, right))
        assert torch.equal(found, wanted.expand(-1, heads, -1, -1)), (left, right)


@each_target
@pytest.mark.parametrize("window", [(None, None), (40, 0), (100, 3), (0, 0)], ids=str)
def test_masks_of_several_tiles(target: Target, window: tuple[int | None, int | None]) -> None:
    """Across the edges of query tiles and blocks of keys, by interval, by padding and by dense mask alike."""
    seqlen_q, seqlen_k = 140, 230
    left, right = (-1 if side is None else side for side in window)
    wanted = brute_force(seqlen_q, seqlen_k, left, right)[:, None]
    assert torch.equal(seen_by(target, seqlen_q, seqlen_k, 1, window_size=window), wanted)
    keep = torch.rand(1, seqlen_k) < 0.5
    found = seen_by(target, seqlen_q, seqlen_k, 1, window_size=window, key_padding_mask=keep)
    assert torch.equal(found, wanted & keep[:, None, None])
    assert torch.equal(seen_by(target, seqlen_q, seqlen_k, 1, bias=wanted), wanted)
    holes = wanted & (torch.rand(seqlen_q, seqlen_k) < 0.8)
    assert torch.equal(seen_by(target, seqlen_q, seqlen_k, 1, bias=holes), holes)
    a_few_whole_rows = wanted.clone()
    a_few_whole_rows[:, :, 64:80] = True
    a_few_whole_rows[:, :, 100:104] = False
    assert torch.equal(seen_by(target, seqlen_q, seqlen_k, 1, bias=a_few_whole_rows), a_few_whole_rows)


# -------------------------------------------------------------------------------------- padding <-> packed helpers


@pytest.mark.parametrize("seqlen", [0, 1, 2, 3])
@pytest.mark.parametrize("batch", [0, 1, 2, 3])
def test_every_padding_pattern_survives_the_round_trip(batch: int, seqlen: int) -> None:
    """All 2 ** (batch * seqlen) patterns: left, right, holes, empty entries."""
    for number in range(2 ** (batch * seqlen)):
        bits = [number >> i & 1 for i in range(batch * seqlen)]
        keep = torch.tensor(bits, dtype=torch.bool).reshape(batch, seqlen)
        indices, cu_seqlens, longest = masks.cu_seqlens_from_mask(keep)
        lengths = [sum(row) for row in keep.tolist()]
        assert indices.tolist() == [i for i, bit in enumerate(bits) if bit]
        assert cu_seqlens.tolist() == [0, *itertools.accumulate(lengths)]
        assert cu_seqlens.dtype == torch.int32
        assert longest == max(lengths, default=0)
        assert type(longest) is int
        hidden = torch.randn(batch, seqlen, 2, 3)
        packed = masks.unpad(hidden, indices)
        assert torch.equal(packed, hidden[keep])
        again = masks.repad(packed, indices, batch, seqlen)
        assert torch.equal(again, hidden * keep[..., None, None])
        assert torch.equal(masks.unpad(again, indices), packed)


def test_padding_helpers_keep_dtype_and_pass_gradients() -> None:
    keep = torch.rand(3, 9) < 0.5
    indices, _, _ = masks.cu_seqlens_from_mask(keep)
    for dtype in (torch.float32, torch.bfloat16, torch.float64, torch.int64):
        hidden = torch.ones(3, 9, dtype=dtype)
        assert masks.unpad(hidden, indices).dtype == dtype
        assert masks.repad(masks.unpad(hidden, indices), indices, 3, 9).dtype == dtype
    hidden = torch.randn(3, 9, 4, requires_grad=True)
    weight = torch.randn(3, 9, 4)
    (masks.repad(masks.unpad(hidden, indices), indices, 3, 9) * weight).sum().backward()
    assert torch.equal(hidden.grad, weight * keep[..., None])


def test_padding_that_is_nan_never_reaches_the_packed_batch() -> None:
    keep = torch.tensor([[True, False, True], [False, False, False]])
    hidden = torch.full((2, 3, 4), float("nan"))
    hidden[keep] = 1.0
    indices, _, _ = masks.cu_seqlens_from_mask(keep)
    packed = masks.unpad(hidden, indices)
    assert torch.equal(packed, torch.ones(2, 4))
    assert torch.equal(masks.repad(packed, indices, 2, 3), torch.where(keep[..., None], 1.0, 0.0).expand(2, 3, 4))


@each_target
@pytest.mark.parametrize("padding", ["left", "right", "holes", "empty_entries"])
def test_unpadded_attention_is_padded_attention(target: Target, padding: str, seed: int) -> None:
    """What the helpers are for: the same tokens padded and packed give the same rows."""
    case = Case(
        "key_padding_mask", f"unpadded_{padding}", batch=4, num_heads=4, num_kv_heads=2, seqlen_q=40, padding=padding
    )
    problem, wanted = make_problem(case, torch.float32, seed), expected(case, torch.float32, seed)
    keep = problem.options["key_padding_mask"]
    indices, cu, longest = masks.cu_seqlens_from_mask(keep)
    # (batch, num_heads, seqlen, head_dim) -> (total, num_heads, head_dim)
    packed = [masks.unpad(problem.inputs[n].transpose(1, 2), indices) for n in ("query", "key", "value")]
    with target.forced():
        out = attention_varlen(*packed, cu, cu, longest, longest, backend=target.backend)
    kept = [
        masks.unpad(t.transpose(1, 2), indices)
        for t in (wanted.oracle["out"], wanted.baseline["out"], wanted.units["out"])
    ]
    verdict = judge(out, kept[0], kept[1], unit=kept[2])
    assert verdict.passed, str(verdict)
