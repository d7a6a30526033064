"""``import flash_attn`` for third-party code, answered by this package."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import sys
from collections.abc import Iterable, Iterator, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

#: The flash-attn whose interface this is.
VERSION = "2.8.3"
_NAME = "flash_attn"
#: Module under flash_attn -> is it a package; each stands under the same name in this package.
_MODULES = {
    "": True,
    ".flash_attn_interface": False,
    ".bert_padding": False,
    ".layers": True,
    ".layers.rotary": False,
    ".ops": True,
    ".ops.rms_norm": False,
    ".ops.triton": True,
    ".ops.triton.rotary": False,
}


class _Loader:
    """Hands the import system a module with the names of one of ours, should it ask for it again."""

    def __init__(self, source: ModuleType) -> None:
        self.source = source

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return ModuleType(spec.name, self.source.__doc__)

    def exec_module(self, module: ModuleType) -> None:
        own = {name: value for name, value in vars(self.source).items() if not name.startswith("__")}
        vars(module).update(own, __version__=VERSION, __file__=self.source.__file__)


class _Distribution(importlib.metadata.Distribution):
    """What ``importlib.metadata.version("flash-attn")`` and ``packages_distributions()`` read."""

    def read_text(self, filename: str) -> str | None:
        texts = {
            "METADATA": f"Metadata-Version: 2.1\nName: flash-attn\nVersion: {VERSION}\n"
            "Summary: the interface of flash-attn, by transformer_fast\n",
            "top_level.txt": f"{_NAME}\n",
        }
        return texts.get(filename)

    def locate_file(self, path: Any) -> Any:
        raise FileNotFoundError(f"{path}: flash_attn is transformer_fast.flash_attn and has no files of its own")


class _Finder(importlib.metadata.DistributionFinder):
    """Finds the modules by their specs, and the distribution by its name."""

    def __init__(self, specs: dict[str, ModuleSpec]) -> None:
        self.specs = specs

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> Any:
        return self.specs.get(name)

    def find_distributions(self, context: Any = None) -> Iterable[importlib.metadata.Distribution]:
        name = getattr(context, "name", None)
        if name is None or name.replace("_", "-").lower() == "flash-attn":
            yield _Distribution()


class Installation:
    """What :func:`install_as_flash_attn` did. ``restore()`` undoes it, whoever else asked for it.

    As a context manager it is undone at the end of the outermost ``with``, unless a call without ``with`` asked for it.
    """

    def __init__(self, finder: _Finder, before: dict[str, ModuleType]) -> None:
        self._finder, self._before = finder, before
        self._calls = self._entered = 0  # calls that no ``with`` has taken over, and ``with``s that are not over

    def restore(self) -> None:
        """Take the modules out again and put back what was there; a second time does nothing."""
        global _installed
        if _installed is not self:
            return
        _installed = None
        sys.meta_path.remove(self._finder)
        for name in dict(_loaded()):
            del sys.modules[name]
        sys.modules.update(self._before)
        importlib.invalidate_caches()

    def __enter__(self) -> Installation:
        self._calls, self._entered = max(self._calls - 1, 0), self._entered + 1
        return self

    def __exit__(self, *exception: object) -> None:
        self._entered -= 1
        if not (self._entered or self._calls):
            self.restore()


_installed: Installation | None = None


def install_as_flash_attn(*, force: bool = False) -> Installation:
    """Let ``import flash_attn``, in any code of this process, give :mod:`transformer_fast.flash_attn`.

    Answers for ``flash_attn``, its ``flash_attn_interface``, ``bert_padding``, ``layers.rotary``, ``ops.rms_norm`` and
    ``ops.triton.rotary``, for ``importlib.util.find_spec``, and for the version of the distribution ``flash-attn``;
    other modules of flash-attn raise ModuleNotFoundError as if they were not there. Call it before what imports
    flash_attn or looks for it: transformers looks once, when it is imported. On a CPU transformers 5.17 refuses
    ``flash_attention_2``, whatever is installed: use :func:`transformer_fast.register_with_transformers` there.

    Args:
        force: also where a flash_attn is installed or imported, which is then hidden; who has imported it keeps it.

    Returns:
        an :class:`Installation`, whose ``restore()`` undoes this; installed already, the same one again.

    Raises:
        RuntimeError: another flash_attn is there, and not ``force``.
    """
    global _installed
    if _installed is not None:
        _installed._calls += 1
        return _installed
    if not force:
        found = _other_flash_attn()
        if found is not None:
            raise RuntimeError(f"flash_attn is there already: {found}; allowed: no other flash_attn, or force=True")
    specs, package = {}, __name__.rpartition(".")[0]
    for inner, is_package in _MODULES.items():
        source = importlib.import_module(package + inner)
        specs[_NAME + inner] = ModuleSpec(
            _NAME + inner,
            _Loader(source),  # type: ignore[arg-type]
            origin=source.__file__,
            is_package=is_package,
        )
    finder = _Finder(specs)
    _installed = Installation(finder, dict(_loaded()))
    _installed._calls = 1
    for name in _installed._before:
        del sys.modules[name]
    sys.meta_path.insert(0, finder)
    importlib.invalidate_caches()
    for name in specs:
        importlib.import_module(name)
    return _installed


def uninstall_as_flash_attn() -> None:
    """Undo :func:`install_as_flash_attn`; where it was not called, nothing."""
    if _installed is not None:
        _installed.restore()


def _loaded() -> Iterator[tuple[str, ModuleType]]:
    """The modules of any flash_attn in sys.modules."""
    for name, module in list(sys.modules.items()):
        if name == _NAME or name.startswith(_NAME + "."):
            yield name, module


def _other_flash_attn() -> str | None:
    """Words for a flash_attn that is not ours, None if there is none."""
    try:
        spec = importlib.util.find_spec(_NAME)
    except ValueError:  # somebody's module without a spec
        return f"a module in sys.modules, {sys.modules[_NAME]!r}"
    if spec is None:
        return None
    try:
        return f"version {importlib.metadata.version('flash-attn')} in {spec.origin}"
    except importlib.metadata.PackageNotFoundError:
        return str(spec.origin)
