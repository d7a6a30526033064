"""Where the calls of scaled_dot_product_attention came from, and what became of them."""

from __future__ import annotations

import os
import re
import sys
import threading
from dataclasses import dataclass, replace
from types import FrameType
from typing import Any

import torch
from torch import Tensor

#: How many callers of SDPA, innermost first, tell one call site from another.
DEPTH = 3
_TORCH = os.path.dirname(torch.__file__) + os.sep
_OURS = os.path.dirname(os.path.dirname(__file__)) + os.sep
#: Of torch's own files only its layers and functions are code that a model consists of; the rest is machinery.
_LAYERS = tuple(
    _TORCH + os.path.join("nn", name) for name in ("functional.py", "modules" + os.sep, "attention" + os.sep)
)
_MACHINERY = (_TORCH + os.path.join("nn", "modules", "module.py"),)
_TRACE_LINE = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+), in (?P<name>\S+)')


Shape = tuple[Any, ...]


@dataclass
class CallSite:
    """One place in a model that calls SDPA with one kind of arguments.

    Lengths may vary from call to call, as in generation: such a size is then the text ``"5..9"``. One query row (a
    decoding step) and many are kinds of their own.
    """

    callers: tuple[str, ...]  # "file:line (function)", innermost first
    shapes: tuple[Shape, ...]  # of query, key, value and, if there is one, attn_mask
    dtype: torch.dtype
    reason: str | None  # why it was left to PyTorch; None if it was taken
    compiled: bool  # seen by a compiler, which makes one call of many
    calls: int = 0

    @property
    def taken(self) -> bool:
        return self.reason is None

    @property
    def site(self) -> str:
        """File and line of the call itself."""
        return self.callers[0].split(" ", 1)[0]

    @property
    def outcome(self) -> str:
        return "taken" if self.reason is None else f"left to PyTorch: {self.reason}"


class Report(list[CallSite]):
    """The call sites in the order in which they were first seen; as text, a table."""

    def __str__(self) -> str:
        if not self:
            return "no call of scaled_dot_product_attention was seen"
        rows = [("calls", "dtype", "query, key, value[, mask]", "call site", "outcome")]
        for one in self:
            calls = f"{one.calls}{' (traced)' if one.compiled else ''}"
            shapes = " ".join("x".join(str(n) for n in shape) for shape in one.shapes)
            site = " < ".join(_short(caller) for caller in one.callers)
            rows.append((calls, str(one.dtype).removeprefix("torch."), shapes, site, one.outcome))
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
        lines = ["  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[-1]]) for row in rows]
        taken = sum(one.taken for one in self)
        return "\n".join([*lines, f"{taken} of {len(self)} call sites taken"])


class Recorder:
    """Collects call sites, from any thread."""

    def __init__(self) -> None:
        self._sites: dict[tuple[Any, ...], CallSite] = {}
        self._lock = threading.Lock()

    def add(self, query: Tensor, key: Tensor, value: Tensor, mask: Any, reason: str | None, *, traced: bool) -> None:
        callers = callers_of(sys._getframe(1), traced=traced)
        shapes = tuple(_shape(t) for t in (query, key, value, mask) if t is not None)
        kind = (*(len(shape) for shape in shapes), shapes[0][-2:-1] == (1,))
        with self._lock:
            one = self._sites.setdefault(
                (callers, kind, query.dtype, reason, traced), CallSite(callers, shapes, query.dtype, reason, traced)
            )
            one.calls += 1
            one.shapes = tuple(
                tuple(_range(n, m) for n, m in zip(old, new, strict=True))
                for old, new in zip(one.shapes, shapes, strict=True)
            )

    def report(self) -> Report:
        with self._lock:
            return Report(replace(site) for site in self._sites.values())


def _range(known: Any, size: Any) -> Any:
    """A size that was ``known`` (a number, or "5..9") and another: both in one."""
    if known == size:
        return known
    ends = (*str(known).split(".."), str(size))
    if not all(end.isdigit() for end in ends):  # a compiler's symbol
        return "any"
    numbers = [int(end) for end in ends]
    return f"{min(numbers)}..{max(numbers)}"


def callers_of(frame: FrameType | None, *, traced: bool) -> tuple[str, ...]:
    """The innermost callers outside of this package and of PyTorch's machinery."""
    if traced and (found := _traced_callers()):
        return found
    callers: list[str] = []
    while frame is not None and len(callers) < DEPTH:
        name = frame.f_code.co_filename
        if _is_model_code(name):
            callers.append(f"{name}:{frame.f_lineno} ({frame.f_code.co_name})")
        frame = frame.f_back
    return tuple(callers) or ("unknown:0 (a thread without Python code)",)


def _is_model_code(name: str) -> bool:
    if name.startswith((_OURS, "<")) or name in _MACHINERY:
        return False
    return not name.startswith(_TORCH) or name.startswith(_LAYERS)


def _traced_callers() -> tuple[str, ...]:
    """The user's code that a compiler is looking at: its own stack is the only one that Python knows."""
    stack = torch._guards.TracingContext.extract_stack() if torch._guards.TracingContext.try_get() else []
    frames = [(s.filename, str(s.lineno), s.name) for s in stack]
    if not frames:
        text = "".join(torch.fx.traceback.format_stack()) if torch.fx.traceback.has_preserved_node_meta() else ""
        frames = [(m["file"], m["line"], m["name"]) for m in _TRACE_LINE.finditer(text)]
    found = [f"{file}:{line} ({name})" for file, line, name in reversed(frames) if _is_model_code(file)]
    return tuple(found[:DEPTH])


def _short(caller: str) -> str:
    """The file without its folders."""
    return os.path.basename(caller)


def _shape(tensor: Tensor) -> tuple[Any, ...]:
    if getattr(tensor, "is_nested", False):
        return ("nested",)
    return tuple(n if isinstance(n, int) else str(n) for n in tensor.shape)
