"""Native modules as data, and the build.ninja that makes them; setup.py says which ones there are."""

from __future__ import annotations

import importlib.util
import shlex
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

CSRC = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Unit:
    """One object file: a source, the flags it adds, and a tag that keeps its object apart.

    A source with a ``text`` is made in the build folder; its path is relative to there.
    """

    source: Path
    flags: tuple[str, ...] = ()
    tag: str = ""
    rule: str = "cxx"  # of _RULES
    text: str | None = None

    def object_name(self) -> str:
        """Relative to the module's folder."""
        relative = self.source if self.text else self.source.relative_to(CSRC)
        return f"{relative.with_suffix('')}{self.tag and '.' + self.tag}.o"


@dataclass(frozen=True)
class NativeModule:
    """One extension module; ``note`` says in a few words what is in it."""

    name: str  # dotted Python name
    units: tuple[Unit, ...]
    link_flags: tuple[str, ...] = ()
    note: str = ""

    @property
    def short_name(self) -> str:
        """What it is called on the command line: cpu."""
        return self.name.rpartition("_C_")[2]

    def source_of(self, unit: Unit) -> Path:
        """Where a unit's source lies, seen from the build folder."""
        return unit.source if unit.text is None else Path(self.name, "made", unit.source)


# What ptxas says of a kernel is kept beside its object: the kernel report reads it.
_RULES = """\
rule cxx
  command = $cxx $cxxflags $flags -MMD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
  description = compile $out
rule nvcc
  command = $nvcc $nvccflags $flags -MMD -MF $out.d -c $in -o $out > $out.log 2>&1 || { cat $out.log >&2; exit 1; }
  depfile = $out.d
  deps = gcc
  description = compile $out
rule link
  command = $cxx $in -o $out $link_flags $ldflags
  description = link $out
"""


def find_ninja() -> str:
    """The program: pip's, or one on the path."""
    if importlib.util.find_spec("ninja"):
        import ninja

        packaged = Path(ninja.BIN_DIR, "ninja")
        if packaged.exists():
            return str(packaged)
    found = shutil.which("ninja")
    if not found:
        raise SystemExit("transformer_fast: ninja not found. Install it: pip install ninja")
    return found


def _path(text: object) -> str:
    """Escaped for a build line."""
    return str(text).replace("$", "$$").replace(":", "$:").replace(" ", "$ ")


def _value(words: Sequence[str]) -> str:
    """Quoted for the shell, then for ninja: the value of a variable."""
    return shlex.join(words).replace("$", "$$")


def _lines(variables: Mapping[str, Sequence[str]], modules: Mapping[NativeModule, Path]) -> Iterator[str]:
    for name, words in variables.items():
        yield f"{name} = {_value(words)}"
    yield _RULES
    for module, target in modules.items():
        objects = [_path(f"{module.name}/{unit.object_name()}") for unit in module.units]
        for unit, name in zip(module.units, objects, strict=True):
            yield f"build {name}: {unit.rule} {_path(module.source_of(unit))}"
            yield f"  flags = {_value(unit.flags)}"
        yield f"build {_path(target)}: link {' '.join(objects)}"
        yield f"  link_flags = {_value(module.link_flags)}"


def write(folder: Path, variables: Mapping[str, Sequence[str]], modules: Mapping[NativeModule, Path]) -> None:
    """Writes build.ninja and the sources that are made; those of them that have changed, since ninja goes by time.

    Args:
        folder: the build folder.
        variables: cxx, cxxflags, ldflags and, where a unit's rule is nvcc, nvcc and nvccflags.
        modules: each with the file it becomes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for module in modules:
        for unit in module.units:
            path = folder / module.source_of(unit)
            if unit.text is None or (path.exists() and path.read_text(encoding="utf-8") == unit.text):
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(unit.text, encoding="utf-8")
    (folder / "build.ninja").write_text("\n".join([*_lines(variables, modules), ""]), encoding="utf-8")
