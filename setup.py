"""Builds the native modules with ninja. The metadata is in pyproject.toml.

The native code never sees torch: it takes pointers, strides and sizes, so one wheel serves every
torch version and a build needs only a C++ compiler, pybind11 and ninja.

Environment:
    CXX, CXXFLAGS, LDFLAGS          honoured; flags are appended, so they win
    MAX_JOBS                        compile jobs at a time
    TRANSFORMER_FAST_ISAS           only these instruction sets (comma list), for a quicker build
    TRANSFORMER_FAST_SANITIZE=1     AddressSanitizer and UndefinedBehaviorSanitizer, with symbols
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"

# Folders that live beside the package and are installed inside it.
MAPPED_PACKAGES = {
    "transformer_fast.kernels": "kernels",
    "transformer_fast.benchmarks": "benchmarks",
}

IS_LINUX = sys.platform.startswith("linux")
IS_X86_64 = platform.machine().lower() in {"x86_64", "amd64"} and sys.maxsize > 2**32
SANITIZE = os.environ.get("TRANSFORMER_FAST_SANITIZE", "0") not in {"", "0"}


# --- What is built: one table entry a module -----------------------------------------------------


@dataclass(frozen=True)
class Unit:
    """One object file: a source, the flags it adds, and a tag that keeps its object apart."""

    source: Path
    flags: tuple[str, ...] = ()
    tag: str = "baseline"
    rule: str = "cxx"  # the ninja rule that compiles it


@dataclass(frozen=True)
class NativeModule:
    name: str  # dotted Python name
    units: tuple[Unit, ...]


# The last two: GCC warns of "uninitialized" inside its own AVX-512 header.
_AVX512 = (
    "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c -mprefer-vector-width=512"
    " -Wno-uninitialized -Wno-maybe-uninitialized"
)

# In ascending order, each a superset of the one before, and linked in this order. That matters: an
# inline function used by several instruction sets (a std:: template, say) is kept by the linker
# from the FIRST object that has it, so it is never made of instructions its caller may not have.
INSTRUCTION_SETS: dict[str, str] = {"portable": ""}
if IS_X86_64:
    INSTRUCTION_SETS |= {
        "avx2": "-mavx2 -mfma -mf16c",
        "avx512": _AVX512,
        "avx512_bf16": f"{_AVX512} -mavx512bf16",
    }
# A quicker build for one's own machine: a comma list of instruction sets; "portable" is always there.
if only := os.environ.get("TRANSFORMER_FAST_ISAS"):
    unknown = set(only.split(",")) - set(INSTRUCTION_SETS)
    if unknown:
        allowed = ", ".join(INSTRUCTION_SETS)
        sys.exit(f"TRANSFORMER_FAST_ISAS names {', '.join(sorted(unknown))}; allowed: {allowed}")
    INSTRUCTION_SETS = {k: v for k, v in INSTRUCTION_SETS.items() if k == "portable" or k in only.split(",")}


def cpu_module() -> NativeModule:
    """Bindings and the host side once; the kernels once per instruction set."""
    once = [CSRC / "bindings" / "cpu.cpp", *sorted((CSRC / "cpu" / "host").glob("*.cpp"))]
    kernels = sorted((CSRC / "cpu").glob("*.cpp"))
    baseline = tuple(f"-DTF_HAS_{isa.upper()}=1" for isa in INSTRUCTION_SETS)
    units = [Unit(source, baseline) for source in once]
    for isa, flags in INSTRUCTION_SETS.items():
        units += [Unit(source, (f"-DTF_ISA={isa}", *flags.split()), isa) for source in kernels]
    return NativeModule("transformer_fast._C_cpu", tuple(units))


NATIVE_MODULES = [cpu_module()] if IS_LINUX else []


# --- How it is built -----------------------------------------------------------------------------


def compile_flags() -> list[str]:
    flags = "-std=c++17 -O3 -g0 -fPIC -fvisibility=hidden -fno-math-errno -fno-trapping-math"
    flags += " -fopenmp -Wall -Wextra -Wno-psabi"
    if SANITIZE:
        flags += " -fsanitize=address,undefined -fno-sanitize-recover=all"
        flags += " -fno-omit-frame-pointer -O1 -g"
    return flags.split() + shlex.split(os.environ.get("CXXFLAGS", ""))


def link_flags() -> list[str]:
    # -fopenmp names libgomp.so.1, and nothing bundles it: torch has loaded its own copy under that
    # name before our module is imported, so both run on the one thread pool.
    flags = ["-shared", "-fopenmp"]
    flags += ["-fsanitize=address,undefined"] if SANITIZE else ["-Wl,--strip-all"]
    return flags + shlex.split(os.environ.get("LDFLAGS", ""))


def include_dirs() -> list[str]:
    import pybind11  # only building needs it; an sdist does not

    python_include = sysconfig.get_path("include")
    if not Path(python_include, "Python.h").exists():
        raise SystemExit(
            f"transformer_fast: {python_include}/Python.h is missing. Install the headers of this "
            "Python (Debian and Ubuntu: python3-dev; Fedora: python3-devel)."
        )
    return [pybind11.get_include(), python_include]


def find_compiler() -> list[str]:
    """The C++ compiler as a command line: $CXX, or the first usual name that exists."""
    chosen = shlex.split(os.environ.get("CXX", ""))
    for command in [chosen] if chosen else [["g++"], ["c++"], ["clang++"]]:
        if shutil.which(command[0]):
            return command
    looked_for = f"CXX={os.environ['CXX']!r}" if chosen else "g++, c++ and clang++"
    raise SystemExit(
        f"transformer_fast: no C++ compiler found (looked for {looked_for}). Install g++ 10 or "
        "newer (Debian and Ubuntu: apt install g++), or set CXX to a C++17 compiler."
    )


def find_ninja() -> str:
    if importlib.util.find_spec("ninja"):
        import ninja

        packaged = Path(ninja.BIN_DIR, "ninja")
        if packaged.exists():
            return str(packaged)
    found = shutil.which("ninja")
    if not found:
        raise SystemExit("transformer_fast: ninja not found. Install it: pip install ninja")
    return found


def ninja_escape(text: object) -> str:
    """Escape a path for a ninja build line."""
    return str(text).replace("$", "$$").replace(":", "$:").replace(" ", "$ ")


def ninja_value(words: list[str]) -> str:
    """Quote words for the shell, then for ninja: the value of a ninja variable."""
    return shlex.join(words).replace("$", "$$")


def ninja_lines(modules: dict[NativeModule, Path]) -> Iterator[str]:
    """The text of build.ninja: a compile rule, a link rule, and every module's objects."""
    includes = [word for path in include_dirs() for word in ("-isystem", path)]
    yield f"cxx = {ninja_value(find_compiler())}"
    yield f"cxxflags = {ninja_value([*compile_flags(), f'-I{CSRC}', *includes])}"
    yield f"ldflags = {ninja_value(link_flags())}"
    yield "rule cxx"
    yield "  command = $cxx $cxxflags $flags -MMD -MF $out.d -c $in -o $out"
    yield "  depfile = $out.d"
    yield "  deps = gcc"
    yield "  description = compile $out"
    yield "rule link"
    yield "  command = $cxx $in -o $out $ldflags"
    yield "  description = link $out"
    for module, target in modules.items():
        objects = []
        for unit in module.units:
            relative = unit.source.relative_to(CSRC).with_suffix("")
            objects.append(ninja_escape(f"{module.name}/{relative}.{unit.tag}.o"))
            yield f"build {objects[-1]}: {unit.rule} {ninja_escape(unit.source)}"
            yield f"  flags = {ninja_value(list(unit.flags))}"
        yield f"build {ninja_escape(target)}: link {' '.join(objects)}"


class NinjaBuildExt(build_ext):
    """build_ext by ninja: parallel, and right when only a header or a flag has changed."""

    def finalize_options(self) -> None:
        super().finalize_options()
        if self.editable_mode:
            # Editable installs build in a throw-away folder; keep the objects where `build_ext
            # --inplace` has them, so that a reinstall compiles only what changed.
            platform_tag = f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
            self.build_temp = str(ROOT / "build" / f"temp.{platform_tag}")
        if SANITIZE:
            self.build_temp += "-sanitize"

    def build_extensions(self) -> None:
        build_dir = Path(self.build_temp).resolve()
        build_dir.mkdir(parents=True, exist_ok=True)
        modules = {module: build_dir / Path(self.get_ext_fullpath(module.name)).name for module in NATIVE_MODULES}
        lines = [*ninja_lines(modules), ""]
        (build_dir / "build.ninja").write_text("\n".join(lines), encoding="utf-8")
        command = [find_ninja(), "-C", str(build_dir)]
        if max_jobs := os.environ.get("MAX_JOBS"):
            command += ["-j", max_jobs]
        if subprocess.run(command, check=False).returncode:
            raise SystemExit(
                f"transformer_fast: building the native code failed; see the messages above. To "
                f"look closer: {shlex.join([*command, '--verbose'])}"
            )
        for module, built in modules.items():
            self._install_atomically(built, Path(self.get_ext_fullpath(module.name)))

    def copy_extensions_to_source(self) -> None:
        package_dirs = self.get_finalized_command("build_py")
        for extension in self.extensions:
            package = extension.name.rpartition(".")[0]
            built = Path(self.build_lib, self.get_ext_filename(extension.name))
            in_place = Path(package_dirs.get_package_dir(package), built.name)
            self._install_atomically(built, in_place)

    @staticmethod
    def _install_atomically(built: Path, target: Path) -> None:
        """Copy and rename, so that a process that has the old module mapped keeps it intact."""
        target.parent.mkdir(parents=True, exist_ok=True)
        fresh = target.with_name(f".{target.name}.{os.getpid()}")
        shutil.copy2(built, fresh)
        os.replace(fresh, target)


def all_packages() -> list[str]:
    packages = find_packages(str(ROOT), include=["transformer_fast", "transformer_fast.*"])
    for name, folder in MAPPED_PACKAGES.items():
        if (ROOT / folder / "__init__.py").exists():
            packages.append(name)
            packages += [f"{name}.{inner}" for inner in find_packages(str(ROOT / folder))]
    return packages


if not IS_LINUX:
    print(
        f"transformer_fast: native code is built on Linux only so far; on {sys.platform} the "
        "package is installed without it (backend='reference' works).",
        file=sys.stderr,
    )

setup(
    packages=all_packages(),
    package_dir=MAPPED_PACKAGES,
    ext_modules=[
        Extension(
            module.name,
            sources=sorted({str(unit.source.relative_to(ROOT)) for unit in module.units}),
        )
        for module in NATIVE_MODULES
    ],
    cmdclass={"build_ext": NinjaBuildExt},
)
