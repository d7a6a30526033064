"""A block mask is read once, and again when what its mask_mod reads has changed."""

from __future__ import annotations

import collections
import copy
import dataclasses
import functools
import math
import operator
import pickle
import types
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy
import pytest
import torch
from dropin.flex_cases import DOCUMENTS, SEQLEN, Mod, causal, documents, seen_through, window
from torch.nn.attention.flex_attention import and_masks, create_block_mask, create_mask

from transformer_fast.dropin import flex
from transformer_fast.dropin.flex import flex_attention, recognize


class Near:
    """A mask_mod that is an object."""

    def __init__(self, left: int) -> None:
        self.left = left

    def __call__(self, b: Any, h: Any, q: Any, k: Any) -> Any:
        return self.is_near(q, k)

    def is_near(self, q: Any, k: Any) -> Any:
        return (q >= k) & (q - k <= self.left)


@dataclasses.dataclass(frozen=True)
class Sizes:
    left: int = 2


class NamedSizes(NamedTuple):
    left: int = 2


def _kinds_that_are_watched() -> Iterator[Mod]:
    sizes, named, table = Sizes(), NamedSizes(), {"left": [2]}
    yield lambda b, h, q, k: (q - k).abs() <= sizes.left
    yield lambda b, h, q, k: (q - k).abs() <= named.left
    yield lambda b, h, q, k: (q - k).abs() <= table["left"][0]
    yield lambda b, h, q, k: torch.where(q >= k, q - k, k - q) <= min(math.floor(2.5), len(table))
    yield functools.wraps(causal)(lambda b, h, q, k: causal(b, h, q, k))
    yield functools.partial(lambda left, b, h, q, k: (q - k).abs() <= left, 2)


def test_a_block_mask_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    reads = []
    monkeypatch.setattr(flex, "recognize", lambda *given: reads.append(given) or recognize(*given))
    for mod in (and_masks(causal, documents), Near(2), window(3, 0), *_kinds_that_are_watched()):
        mask = create_block_mask(mod, 1, 1, SEQLEN, SEQLEN, device="cpu")
        query = torch.randn(1, 1, SEQLEN, 8)
        for _ in range(3):
            flex_attention(query, query, query, block_mask=mask)
        assert len(reads) == 1, mod
        two = query.expand(2, -1, -1, -1)
        for given in (two, query, two):
            flex_attention(given, given, given, block_mask=mask)
        assert len(reads) == 2
        reads.clear()


def test_a_block_mask_that_was_read_can_be_copied() -> None:
    mask = create_block_mask(near, None, None, SEQLEN, SEQLEN, device="cpu")
    due = seen_through(mask, 1, 1, (SEQLEN, SEQLEN))
    for copied in (copy.copy(mask), copy.deepcopy(mask), pickle.loads(pickle.dumps(mask))):
        assert torch.equal(seen_through(copied, 1, 1, (SEQLEN, SEQLEN)), due)


near = Near(4)
WIDTH = 3


def _changes() -> dict[str, Callable[[], tuple[Mod, Callable[[], Any]]]]:
    def tensor() -> tuple[Mod, Callable[[], Any]]:
        table = DOCUMENTS.clone()
        return lambda b, h, q, k: table[q] == table[k], lambda: table.copy_(DOCUMENTS.flip(0))

    def view() -> tuple[Mod, Callable[[], Any]]:
        tables = torch.stack([DOCUMENTS, DOCUMENTS])
        row = tables[1]
        return lambda b, h, q, k: row[q] == row[k], lambda: tables.copy_(DOCUMENTS.flip(0))

    def inference_tensor() -> tuple[Mod, Callable[[], Any]]:
        with torch.inference_mode():
            table = DOCUMENTS.clone()

        def change() -> None:
            with torch.inference_mode():
                table.copy_(DOCUMENTS.flip(0))

        return lambda b, h, q, k: table[q] == table[k], change

    def closure() -> tuple[Mod, Callable[[], Any]]:
        left = 2

        def change() -> None:
            nonlocal left
            left = 5

        return and_masks(causal, lambda b, h, q, k: q - k <= left), change

    def default() -> tuple[Mod, Callable[[], Any]]:
        sizes = [2]
        return lambda b, h, q, k, sizes=sizes: (q - k).abs() <= sum(sizes), lambda: sizes.append(3)

    def attribute() -> tuple[Mod, Callable[[], Any]]:
        mod = Near(2)
        return functools.partial(mod.__call__), lambda: setattr(mod, "left", 5)

    def attribute_of_object() -> tuple[Mod, Callable[[], Any]]:
        mod = Near(2)
        return lambda b, h, q, k: mod.is_near(q, k), lambda: setattr(mod, "left", 5)

    def a_global() -> tuple[Mod, Callable[[], Any]]:
        def change() -> None:
            globals()["WIDTH"] += 1

        return lambda b, h, q, k: (q - k).abs() <= WIDTH, change

    def data_of_tensor() -> tuple[Mod, Callable[[], Any]]:
        table = DOCUMENTS.clone()
        return lambda b, h, q, k: table[q] == table[k], lambda: setattr(table, "data", DOCUMENTS.flip(0))

    def attribute_of_tensor() -> tuple[Mod, Callable[[], Any]]:
        table: Any = DOCUMENTS.clone()
        table.left = 2
        return lambda b, h, q, k: (q - k).abs() <= table.left, lambda: setattr(table, "left", 5)

    def keyword_default() -> tuple[Mod, Callable[[], Any]]:
        left = [2]

        def mod(b: Any, h: Any, q: Any, k: Any, *, left: Any = left) -> Any:
            return (q - k).abs() <= left[0]

        return mod, lambda: left.__setitem__(0, 5)

    def other_keyword_defaults() -> tuple[Mod, Callable[[], Any]]:
        def mod(b: Any, h: Any, q: Any, k: Any, *, left: int = 2) -> Any:
            return (q - k).abs() <= left

        return mod, lambda: setattr(mod, "__kwdefaults__", {"left": 5})

    def attribute_of_function() -> tuple[Mod, Callable[[], Any]]:
        def mod(b: Any, h: Any, q: Any, k: Any) -> Any:
            return (q - k).abs() <= mod.left  # type: ignore[attr-defined]

        mod.left = 2  # type: ignore[attr-defined]
        return mod, lambda: setattr(mod, "left", 5)

    def new_key() -> tuple[Mod, Callable[[], Any]]:
        sizes: dict[str, int] = {}
        return lambda b, h, q, k: (q - k).abs() <= sizes.get("left", 2), lambda: sizes.update(left=5)

    def of_object(
        kind: Any, read: Callable[[Any], Any], change: Callable[[Any], Any]
    ) -> Callable[[], tuple[Mod, Callable[[], Any]]]:
        def make() -> tuple[Mod, Callable[[], Any]]:
            value = kind()
            return lambda b, h, q, k: (q - k).abs() <= read(value), lambda: change(value)

        return make

    def set_left(value: Any) -> None:
        value.left = 5

    def plain_class(**names: Any) -> Any:
        return type("Plain", (), {"left": 2, **names})

    def slotted() -> Any:
        value = type("Slotted", (), {"__slots__": ("left",)})()
        value.left = 2
        return value

    def with_properties() -> Any:
        return plain_class(width=property(lambda self: self.left))()

    def with_getattr() -> Any:
        return type("Any", (), {"left": 2, "__getattr__": lambda self, name: self.left})()

    def match_left(value: Any) -> Any:
        match value:
            case object(left=left):
                return left

    def module() -> Any:
        value = types.ModuleType("settings")
        value.left = 2  # type: ignore[attr-defined]
        return value

    class Linear(torch.nn.Module):
        left = 2

        def forward(self) -> int:
            return self.left

    return {
        f.__name__: f
        for f in (
            *(tensor, view, inference_tensor, closure, default, attribute, attribute_of_object, a_global),
            *(data_of_tensor, attribute_of_tensor, keyword_default, other_keyword_defaults, attribute_of_function),
            new_key,
        )
    } | {
        "instance_over_class": of_object(lambda: plain_class()(), lambda x: x.left, set_left),
        "attribute_of_class": of_object(plain_class, lambda x: x.left, set_left),
        "object_of_class": of_object(plain_class, lambda x: x().left, set_left),
        "attribute_of_module": of_object(module, lambda x: x.left, set_left),
        "property": of_object(with_properties, lambda x: x.width, set_left),
        "slots": of_object(slotted, lambda x: x.left, set_left),
        "getattr": of_object(lambda: plain_class()(), lambda x: getattr(x, "left"), set_left),  # noqa: B009
        "attrgetter": of_object(lambda: plain_class()(), operator.attrgetter("left"), set_left),
        "dict_of_object": of_object(lambda: plain_class()(), lambda x: x.__dict__.get("left", 2), set_left),
        "pattern": of_object(lambda: plain_class()(), match_left, set_left),
        "text": of_object(lambda: plain_class()(), lambda x: int("{0.left}".format(x)), set_left),  # noqa: UP030, UP032
        "object_with_getattr": of_object(with_getattr, lambda x: x.width, set_left),
        "object_with_getitem": of_object(
            lambda: plain_class(__getitem__=lambda self, place: self.left)(), lambda x: x[0], set_left
        ),
        "torch_module": of_object(Linear, lambda x: x(), set_left),
        "set": of_object(lambda: {1, 2}, len, lambda x: x.update(range(5))),
        "deque": of_object(lambda: collections.deque([2]), lambda x: x[0], lambda x: x.append(x.popleft() + 3)),
        "bound_method": of_object(lambda: torch.tensor(2).item, lambda x: x(), lambda x: x.__self__.fill_(5)),
        "numpy": of_object(lambda: numpy.array([2]), lambda x: int(x[0]), lambda x: x.fill(5)),
    }


@pytest.mark.parametrize("what", _changes())
def test_what_a_mask_mod_reads_may_change(what: str) -> None:
    mod, change = _changes()[what]()
    # One block, so that the list of blocks is right before and after.
    mask = create_block_mask(mod, None, None, SEQLEN, SEQLEN, device="cpu")
    before = create_mask(mod, 1, 1, SEQLEN, SEQLEN, device="cpu")
    assert torch.equal(seen_through(mask, 1, 1, (SEQLEN, SEQLEN)), before)
    change()
    after = create_mask(mod, 1, 1, SEQLEN, SEQLEN, device="cpu")
    assert not torch.equal(before, after)
    assert torch.equal(seen_through(mask, 1, 1, (SEQLEN, SEQLEN)), after)


def test_a_mask_mod_and_blocks_that_are_set_anew() -> None:
    mask = create_block_mask(causal, None, None, SEQLEN, SEQLEN, device="cpu")
    for mod in (causal, documents):
        mask.mask_mod = mod
        due = create_mask(mod, 1, 1, SEQLEN, SEQLEN, device="cpu")
        assert torch.equal(seen_through(mask, 1, 1, (SEQLEN, SEQLEN)), due)
    mask.kv_num_blocks.zero_()
    assert not seen_through(mask, 1, 1, (SEQLEN, SEQLEN)).any()
