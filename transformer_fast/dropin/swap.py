"""Modules whose class is exchanged in place: the same objects and parameters, with another ``forward``."""

from __future__ import annotations

import functools
from typing import Any

from torch import nn


class Swapped(nn.Module):
    """Mixed into the class of a module by :func:`swapped`, in front of what the module was."""

    def __reduce__(self) -> Any:  # its class is made anew, and cannot be found by name
        return _empty, (type(self).mixin, own_class(self)), vars(self)  # type: ignore[attr-defined]


@functools.cache
def swapped(mixin: Any, own: Any) -> Any:
    """The class of ``own``'s modules with the ``mixin``, a :class:`Swapped`, in front."""
    members = {"__module__": own.__module__, "__doc__": own.__doc__, "own_class": own, "mixin": mixin}
    return type(own.__name__, (mixin, own), members)


def own_class(module: Any) -> Any:
    """What it was before; others may have derived from what it is now, as FSDP and parametrizations do."""
    return type(module).own_class


def is_swapped(module: Any) -> bool:
    """Is its class what :func:`swapped` made, and nothing else has changed it since?"""
    return type(module) is swapped(type(module).mixin, own_class(module))


def _empty(mixin: Any, own: Any) -> nn.Module:
    cls: Any = swapped(mixin, own)
    made: nn.Module = cls.__new__(cls)
    return made
