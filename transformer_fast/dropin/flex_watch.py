"""Whether what a ``mask_mod`` reads is still what it was.

FlexAttention evaluates a ``mask_mod`` anew in each call. What is remembered of one must not outlive a table of
documents that was filled anew, or a window that was rebound. So the world is closed: a mask_mod is watched only where
each thing that it can reach is of a kind whose every change is seen. Whatever else it reaches, an array of NumPy or a
``torch.nn.Module`` or ``getattr``, is never called unchanged, and the mask is read in each call.

One change cannot be seen by anybody: a write into a tensor's memory that PyTorch does not count, by ``t.data.fill_()``
or through the NumPy array that it was made from. Then use ``recognize()``, or make a new block mask.
"""

from __future__ import annotations

import dataclasses
import dis
import functools
import operator
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

_attributes = operator.attrgetter(
    "mask_mod",
    "seq_lengths",
    "BLOCK_SIZE",
    "kv_num_blocks",
    "kv_indices",
    "full_kv_num_blocks",
    "full_kv_indices",
)

_version_and_shape = operator.attrgetter("_version", "shape", "dtype")

_ABSENT = object()
_TENSORS = (Tensor, torch.nn.Parameter)
_LEAVES = frozenset(
    {int, float, complex, bool, str, bytes, range, type(None), type(...), type(NotImplemented), object}
    | {torch.dtype, torch.device, torch.layout, torch.Size, torch._ops.OpOverload, torch._ops.OpOverloadPacket}
)
#: These read nothing but what they are given, by special methods. Not so getattr, vars, super, str, or open.
_BUILTINS = frozenset(
    {abs, all, any, bool, bytes, callable, complex, dict, divmod, enumerate, filter, float, frozenset, int, isinstance}
    | {issubclass, iter, len, list, map, max, min, next, object, pow, range, reversed, round, set, slice, sorted, sum}
    | {tuple, zip, functools.partial, functools.reduce}
)
#: Special methods that run only where an object is made, written to, or turned into text.
_MAKERS = frozenset({"__init__", "__new__", "__post_init__"})
_UNUSED = frozenset(
    {"__repr__", "__str__", "__format__", "__setattr__", "__delattr__", "__replace__", "__class__", "__del__"}
    | {"__getstate__", "__setstate__", "__reduce__", "__reduce_ex__", "__getnewargs__", "__annotate_func__"}
    | {"__init_subclass__", "__dataclass_params__", "__dict__", "__weakref__"}
)
#: Of a type's flags: not one that is written in C. (A few in C have it too; their special methods give them away.)
_MADE_BY_CODE = 1 << 9
_COMPARISONS = frozenset({"__eq__", "__lt__", "__le__", "__gt__", "__ge__", "__hash__"})


class _UnwatchableError(Exception):
    """Something is reached whose changes would not be seen."""


class Watch:
    """The state of a block mask when it was read."""

    def __init__(self, block_mask: Any) -> None:
        self.attributes = _attributes(block_mask)
        try:
            world = _World(block_mask.mask_mod)
        except Exception:  # a property may raise anything
            self.is_watchable = False
            return
        self.is_watchable = True
        self.reads, self.values = list(world.reads), list(world.reads.values())
        self.parts = list(world.parts.values())
        tensors = [t for t in (*world.tensors.values(), *self.attributes) if isinstance(t, Tensor)]
        self.counted = [t for t in tensors if not t.is_inference()]
        self.states = _states(self.counted)
        self.copies = [(t, t.clone()) for t in tensors if t.is_inference()]  # these count no versions

    def is_unchanged(self, block_mask: Any) -> bool:
        """Would reading the block mask again give the same? Asked in every call; False where that cannot be known."""
        if not (self.is_watchable and all(map(operator.is_, _attributes(block_mask), self.attributes))):
            return False
        try:
            return (
                _states(self.counted) == self.states
                and all(map(operator.is_, [read() for read in self.reads], self.values))
                and (not self.parts or all(_are_same(read(), values) for read, values in self.parts))
                and (not self.copies or all(torch.equal(t, copy) for t, copy in self.copies))
            )
        except Exception:  # a property may raise anything
            return False


def _states(tensors: list[Tensor]) -> Any:
    """Of each its version, and what ``t.data = other`` changes without counting."""
    return [*map(_version_and_shape, tensors), *map(Tensor.data_ptr, tensors), *map(Tensor.stride, tensors)]


def _are_same(now: tuple[Any, ...], then: tuple[Any, ...]) -> bool:
    return len(now) == len(then) and all(map(operator.is_, now, then))


class _World:
    """All that a mask_mod can reach: ways to read it again, with what each gives now, and its tensors."""

    def __init__(self, mod: Any) -> None:
        self.names: frozenset[str] = frozenset()  # attributes that any of the code reads, of whatever it meets
        before = None
        while before != self.names:  # more code, more names; more names, more code
            before = self.names
            self.reads: dict[Callable[[], Any], Any] = {}
            self.parts: dict[int, tuple[Callable[[], tuple[Any, ...]], tuple[Any, ...]]] = {}
            self.tensors: dict[int, Tensor] = {}
            self.done: dict[int, Any] = {}  # kept: ids stay theirs
            self.todo = [mod]
            while self.todo:
                value = self.todo.pop()
                if id(value) not in self.done:
                    self.done[id(value)] = value
                    self.visit(value)

    def read(self, function: Callable[..., Any], *given: Any) -> None:
        """What gives one thing, which may be another later."""
        again = functools.partial(function, *given)
        self.reads[again] = value = again()
        self.todo.append(value)

    def read_parts(self, function: Callable[..., tuple[Any, ...]], *given: Any) -> None:
        """What gives a tuple that is made anew."""
        again = functools.partial(function, *given)
        values = again()
        self.parts[len(self.parts)] = again, values
        self.todo += values

    def visit(self, value: Any) -> None:
        kind = type(value)
        if kind in _LEAVES or _is_constant(value):
            return
        if kind in _TENSORS:
            self.tensors[id(value)] = value
            self.own_attributes(value)
            for name in self.names & {"grad", "requires_grad"}:
                self.read(getattr, value, name)
        elif kind is types.FunctionType:
            self.function(value)
        elif kind is types.MethodType:
            self.todo += (value.__func__, value.__self__)
        elif kind is functools.partial:
            self.todo += (value.func, *value.args, value.keywords)
            self.own_attributes(value)
        elif kind in (tuple, frozenset):
            self.todo += value
        elif kind is slice:
            self.todo += (value.start, value.stop, value.step)
        elif kind is list:
            self.read_parts(tuple, value)
        elif kind is dict:
            self.read_parts(_entries, value)
        elif kind is types.ModuleType:
            self.attributes(value, self.names)
        elif kind is type:
            self.special_methods(value, _UNUSED)
            self.attributes(value, self.names)
        elif type(kind) is type:
            self.instance(value)
        else:
            raise _UnwatchableError(kind)

    def function(self, value: Any) -> None:
        for name in ("__code__", "__defaults__", "__kwdefaults__"):
            self.reads[functools.partial(getattr, value, name)] = getattr(value, name)
        self.todo += (value.__defaults__, value.__kwdefaults__)
        for cell in value.__closure__ or ():
            self.read(getattr, cell, "cell_contents", _ABSENT)
        if _is_of_torch(value.__globals__.get("__name__")):  # its code reads nothing of ours but the closure
            return
        self.own_attributes(value)
        global_names, attributes = _names(value.__code__)
        for name in sorted(global_names):
            self.read(_global, value.__globals__, value.__builtins__, name)
        self.names |= attributes

    def instance(self, value: Any) -> None:
        kind, names, unused = type(value), self.names, _UNUSED | _MAKERS
        if dataclasses.is_dataclass(kind):  # what its comparisons were made of
            names |= {field.name for field in dataclasses.fields(kind)}
            unused |= {n for n in _COMPARISONS if _is_generated(getattr(kind, n))}
        if isinstance(value, tuple):  # a named one
            self.todo += tuple.__iter__(value)
        self.special_methods(kind, unused)
        self.attributes(value, names)

    def special_methods(self, kind: type, unused: frozenset[str]) -> None:
        """Operators and the like call these without naming them."""
        for base in kind.__mro__:
            if base is not object and base is not tuple:
                # PyTorch's read more of an object than our names: a module's __call__ all of it.
                if not base.__flags__ & _MADE_BY_CODE or _is_of_torch(base.__module__):
                    raise _UnwatchableError(base)
                self.read_parts(_special_methods, base, unused)

    def attributes(self, value: Any, names: frozenset[str]) -> None:
        for name in sorted(names):
            self.read(_attribute, value, name)

    def own_attributes(self, value: Any) -> None:
        """Those that somebody set on what has others of its own."""
        for name in sorted(self.names):
            self.read(vars(value).get, name, _ABSENT)


def _is_of_torch(name: Any) -> bool:
    return isinstance(name, str) and (name == "torch" or name.startswith("torch."))


def _is_constant(value: Any) -> bool:
    """Is it PyTorch's, or Python's, and reads only what it is given?"""
    if isinstance(value, types.ModuleType):
        return _is_of_torch(value.__name__)
    if isinstance(value, types.BuiltinFunctionType):
        owner = value.__self__
        if isinstance(owner, types.ModuleType):
            return value in _BUILTINS or owner.__name__ in ("math", "_operator") or _is_of_torch(owner.__name__)
        return isinstance(owner, type) and _is_of_torch(owner.__module__)
    if isinstance(value, type):
        is_error = issubclass(value, BaseException) and value.__module__ == "builtins"
        return value in _BUILTINS or is_error or _is_of_torch(value.__module__)
    return False


def _is_generated(function: Any) -> bool:
    return hasattr(function, "__code__") and function.__code__.co_filename == "<string>"


def _entries(value: dict[Any, Any]) -> tuple[Any, ...]:
    return (*value, *value.values())


def _global(names: dict[str, Any], of_python: dict[str, Any], name: str) -> Any:
    return names[name] if name in names else of_python.get(name, _ABSENT)


def _attribute(value: Any, name: str) -> Any:
    found = getattr(value, name, _ABSENT)
    # A bound method is made anew by each access.
    return found.__func__ if type(found) is types.MethodType and found.__self__ is value else found


def _special_methods(kind: type, unused: frozenset[str]) -> tuple[Any, ...]:
    special = (v for n, v in vars(kind).items() if n.startswith("__") and n.endswith("__") and n not in unused)
    return tuple(v for v in special if callable(v) or hasattr(v, "__get__"))


def _names(code: types.CodeType) -> tuple[frozenset[str], frozenset[str]]:
    """Globals and attributes that a function's code, and functions inside of it, name."""
    global_names, attributes = set[str](), set[str]()
    for instruction in _instructions(code):
        operation, name = instruction.opname, instruction.argval
        if operation.startswith(("IMPORT_", "FORMAT_", "CONVERT_", "MATCH_CLASS", "LOAD_BUILD_CLASS", "STORE_GLOBAL")):
            raise _UnwatchableError(operation)
        if instruction.opcode not in dis.hasname:
            continue
        if operation.endswith(("_GLOBAL", "_NAME")):
            global_names.add(name)
        elif name.startswith("__") or name in ("format", "format_map"):  # __dict__, __globals__: ways around names
            raise _UnwatchableError(name)
        else:
            attributes.add(name)
    return frozenset(global_names), frozenset(attributes)


def _instructions(code: types.CodeType) -> Iterator[dis.Instruction]:
    yield from dis.get_instructions(code)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _instructions(constant)
