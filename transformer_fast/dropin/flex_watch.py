"""Whether what a ``mask_mod`` reads is still what it was: tensors, closure variables, globals and attributes.

FlexAttention evaluates a ``mask_mod`` anew in each call. What is remembered of one must not outlive a table of
documents that was filled anew, or a window that was rebound.
"""

from __future__ import annotations

import functools
import operator
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from .flex_masks import indexable

_attributes = operator.attrgetter(
    "mask_mod",
    "seq_lengths",
    "BLOCK_SIZE",
    "kv_num_blocks",
    "kv_indices",
    "full_kv_num_blocks",
    "full_kv_indices",
)


class _Touched(TorchDispatchMode):
    """Collects the tensors that come from outside of what runs under it."""

    def __init__(self, own: list[Tensor]) -> None:
        super().__init__()
        self.own, self.outside = {id(t): t for t in own}, dict[int, Tensor]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in pytree.tree_leaves((args, kwargs or {})):
            if isinstance(tensor, Tensor) and id(tensor) not in self.own:
                self.outside[id(tensor)] = tensor
        result = func(*args, **(kwargs or {}))
        self.own |= {id(t): t for t in pytree.tree_leaves(result) if isinstance(t, Tensor)}  # kept: ids stay theirs
        return result


class Watch:
    """The state of a block mask when it was read."""

    def __init__(self, block_mask: Any) -> None:
        self.attributes = _attributes(block_mask)
        self.mod = block_mask.mask_mod
        reads = list(_reads(self.mod))
        self.reads, self.values = [read for read, _ in reads], [value for _, value in reads]
        # One element is enough: which tensors a mod reads does not depend on the place.
        index = [torch.zeros(1, dtype=torch.int64, device=block_mask.kv_num_blocks.device) for _ in range(4)]
        function = self.mod
        for place in (3, 2, 1, 0):
            function = torch.vmap(function, in_dims=tuple(0 if d == place else None for d in range(4)))
        with torch.no_grad(), indexable(), _Touched(index) as touched:
            function(*index)
        tensors = [t for t in (*touched.outside.values(), *self.attributes) if isinstance(t, Tensor)]
        self.counted = [t for t in tensors if not t.is_inference()]
        self.versions = [t._version for t in self.counted]
        self.copies = [(t, t.clone()) for t in tensors if t.is_inference()]  # these count no versions

    def is_unchanged(self, block_mask: Any) -> bool:
        """Would reading the block mask again give the same? Asked in every call, so without a generator."""
        return (
            all(map(operator.is_, _attributes(block_mask), self.attributes))
            and [t._version for t in self.counted] == self.versions
            and all(map(operator.is_, [read() for read in self.reads], self.values))
            and (not self.copies or all(torch.equal(t, copy) for t, copy in self.copies))
        )


def _reads(mod: Any) -> Iterator[tuple[Callable[[], Any], Any]]:
    """What a mod and its helpers read by name: how to read it again, and its value now."""
    todo: list[tuple[Any, frozenset[str]]] = [(mod, frozenset())]
    done = set()
    while todo:
        value, names = todo.pop()
        if (id(value), names) in done or isinstance(value, (types.ModuleType, Tensor, type)):
            continue
        done.add((id(value), names))
        reads: list[Callable[[], Any]] = []  # by name, so that the name may stand for something else later
        parts: list[Any] = []  # cannot become something else
        if isinstance(value, types.FunctionType):
            names = frozenset(_names(value.__code__))
            reads += [functools.partial(getattr, cell, "cell_contents", None) for cell in value.__closure__ or ()]
            reads += [functools.partial(value.__globals__.get, n) for n in sorted(names) if n in value.__globals__]
            parts += value.__defaults__ or ()
        elif isinstance(value, functools.partial):
            parts += [value.func, *value.args, *value.keywords.values()]
        elif isinstance(value, types.MethodType):
            names = frozenset(_names(value.__func__.__code__))
            parts += [value.__func__, value.__self__]
        elif isinstance(value, tuple):
            parts += value
        elif isinstance(value, list):  # one place more than there are: something may be appended
            reads += [functools.partial(_item, value, place) for place in range(len(value) + 1)]
        elif isinstance(value, dict):
            reads += [functools.partial(value.get, name) for name in value]
        elif hasattr(value, "__dict__"):
            names = _names_of_object(value, names)
            reads += [functools.partial(vars(value).get, n) for n in sorted(names) if n in vars(value)]
            of_type = {n: getattr(type(value), n) for n in sorted(names) if hasattr(type(value), n)}
            parts += of_type.values()
            reads += [functools.partial(getattr, type(value), n) for n, part in of_type.items() if not callable(part)]
        for read in reads:
            now = read()
            yield read, now
            parts.append(now)
        todo += [(part, names) for part in parts]


def _item(sequence: Any, place: int) -> Any:
    return sequence[place] if place < len(sequence) else None


def _names_of_object(value: Any, names: frozenset[str]) -> frozenset[str]:
    """The names, and those that the methods among them name in turn; of a callable also its own."""
    known: set[str] = set()
    todo = set(names) | ({"__call__"} if callable(value) else set())
    while todo:
        known |= todo
        methods = [getattr(type(value), name, None) for name in todo]
        codes = [getattr(getattr(m, "fget", m), "__code__", None) for m in methods]  # fget: of a property
        todo = {name for code in codes for name in _names(code)} - known
    return frozenset(known)


def _names(code: Any) -> Iterator[str]:
    """Globals and attributes that a function's code, and functions inside of it, name."""
    if code is None:
        return
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)
