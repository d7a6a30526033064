"""Builds the native modules with ninja. The metadata is in pyproject.toml.

The native code never sees torch: it takes pointers, strides and sizes, so one wheel serves every
torch version and a build needs only a C++ compiler, pybind11 and ninja. The CUDA module is built
where nvcc and an NVIDIA driver are found; it holds the runtime and imports where there is no driver.

Environment; every build goes by it anew, `make native` too:
    CXX, CXXFLAGS, LDFLAGS          honoured; flags are appended, so they win
    CUDA_HOME, CUDA_PATH            where nvcc is looked for first
    MAX_JOBS                        compile jobs at a time
    TRANSFORMER_FAST_CUDA=1|0       build the CUDA module without a driver, or never
    TRANSFORMER_FAST_CUDA_ARCHS     machine code to build, a comma list of 80, 90a, 80+PTX; all by default
    TRANSFORMER_FAST_EMULATOR=1     build the module that runs the CUDA kernels on a CPU, for tests
    TRANSFORMER_FAST_ISAS           only these instruction sets (comma list), for a quicker build
    TRANSFORMER_FAST_KERNELS        only CUDA kernels whose names have a part like one of these (comma list), likewise
    TRANSFORMER_FAST_MODULES        only these of the modules cpu, cuda, emulated (comma list), likewise
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
from pathlib import Path
from types import ModuleType

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


def load(path: Path) -> ModuleType:
    """A Python file beside the sources that it is about, which no package holds."""
    spec = importlib.util.spec_from_file_location(f"_setup_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


ninja_file, instances, toolkit = (
    load(CSRC / f"{name}.py") for name in ("ninja_file", "cuda/instances", "cuda/toolkit")
)
Unit, NativeModule = ninja_file.Unit, ninja_file.NativeModule


# --- What is built: one table entry a module -----------------------------------------------------


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
        "amx_bf16": f"{_AVX512} -mavx512bf16 -mamx-tile -mamx-bf16",
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
        # Kernels throw nothing, so their objects need nothing of the C++ runtime that is theirs to keep.
        units += [Unit(source, (f"-DTF_ISA={isa}", "-fno-exceptions", *flags.split()), isa) for source in kernels]
    return NativeModule("transformer_fast._C_cpu", tuple(units), note=", ".join(INSTRUCTION_SETS))


# Kernels of csrc/cuda: an object for each row of the table, and what the host needs of them.


def cuda_host_units(flags: tuple[str, ...], runtime: str, chosen: list) -> list[Unit]:
    sources = [CSRC / "bindings" / "cuda.cpp", *(CSRC / "cuda" / "host" / f"{n}.cpp" for n in ("plan", runtime))]
    table = Unit(Path("kernels.cpp"), flags, text=instances.table_source(chosen))
    return [table, *(Unit(source, flags) for source in sources)]


def check_sources(*, emulated: bool) -> list[Path]:
    """Small kernels that tests check single instructions by; checks_faults is for the emulator alone."""
    return [p for p in sorted((CSRC / "cuda").glob("checks*.cu")) if emulated or p.stem != "checks_faults"]


def chosen_instances() -> list:
    return instances.chosen(os.environ.get("TRANSFORMER_FAST_KERNELS"))


def cuda_module() -> NativeModule:
    try:
        targets = instances.parse_targets(os.environ.get("TRANSFORMER_FAST_CUDA_ARCHS", "80,90a,80+PTX"))
    except ValueError as error:
        raise SystemExit(f"transformer_fast: {error}") from None
    nvcc = toolkit.find_nvcc()
    chosen = [i for i in chosen_instances() if instances.target_flags(i, targets)]
    checks = check_sources(emulated=False)
    words = ", ".join(targets)
    flags = (f'-DTF_TARGETS="{words}"', "-isystem", str(toolkit.include_folder(nvcc)))
    flags += ("-DTF_HAS_CHECKS",) if checks else ()
    units = cuda_host_units(flags, "runtime_cuda", chosen)
    for i in chosen:
        machines = tuple(instances.target_flags(i, targets))
        units.append(Unit(Path("instances", f"{i.name}.cu"), machines, rule="nvcc", text=instances.source_of(i)))
    # The checks run where the kernels of their family do; of the host's part of them any machine's code will do.
    for source in checks:
        own = ["90a"] if source.stem in ("checks_sm90", "checks_wgmma") else ["80", "90a"]
        asked = [name for name in own if name in targets] or own
        machines = [word for name in asked for word in ("-gencode", instances.TARGETS[name])]
        units.append(Unit(source, tuple(machines), rule="nvcc"))
    note = f"{words}; {len(chosen)} kernels by {nvcc}"
    return NativeModule("transformer_fast._C_cuda", tuple(units), tuple(toolkit.link_flags(nvcc)), note)


def emulated_module() -> NativeModule:
    # Half the time to compile of -O3, and as fast.
    flags = ("-DTF_EMULATED", '-DTF_TARGETS="emulated"', *([] if SANITIZE else ["-O2"]))
    chosen, checks = chosen_instances(), check_sources(emulated=True)
    flags += ("-DTF_HAS_CHECKS",) if checks else ()
    units = cuda_host_units(flags, "runtime_emulated", chosen)
    units += [Unit(source, flags) for source in sorted((CSRC / "emulator").glob("*.cpp"))]
    units += [Unit(Path("instances", f"{i.name}.cpp"), flags, text=instances.source_of(i)) for i in chosen]
    units += [Unit(source, ("-x", "c++", *flags)) for source in checks]
    return NativeModule("transformer_fast._C_emulated", tuple(units), note=f"{len(chosen)} kernels")


def switch(name: str) -> bool | None:
    """An environment variable of 1 or 0; None where it is not set."""
    value = os.environ.get(name, "")
    if value not in {"", "0", "1"}:
        raise SystemExit(f"transformer_fast: {name} is {value!r}; allowed: 1 or 0")
    return None if value == "" else value == "1"


def why_no_cuda() -> str | None:
    """The reason why the CUDA module is left out, None where it is built."""
    asked = switch("TRANSFORMER_FAST_CUDA")
    if asked is False:
        return "TRANSFORMER_FAST_CUDA=0"
    if SANITIZE:
        return "a sanitized build"
    missing = toolkit.why_no_nvcc()
    if asked and missing:
        raise SystemExit(f"transformer_fast: TRANSFORMER_FAST_CUDA=1, but {missing}. {toolkit.HOW_TO_INSTALL}.")
    if missing:
        return missing
    if not asked and not toolkit.has_driver():
        return "no NVIDIA driver on this machine; TRANSFORMER_FAST_CUDA=1 builds it all the same"
    return None


def why_no_emulator() -> str | None:
    return None if switch("TRANSFORMER_FAST_EMULATOR") else "for tests; TRANSFORMER_FAST_EMULATOR=1 builds it"


def native_modules() -> tuple[list[NativeModule], dict[str, str]]:
    """The modules to build, and for each of the others why not."""
    if not IS_LINUX:
        return [], {}
    makers = {
        "cpu": (cpu_module, lambda: None),
        "cuda": (cuda_module, why_no_cuda),
        "emulated": (emulated_module, why_no_emulator),
    }
    only = [name for name in os.environ.get("TRANSFORMER_FAST_MODULES", "").split(",") if name]
    if set(only) - set(makers):
        raise SystemExit(f"transformer_fast: TRANSFORMER_FAST_MODULES has {only}; allowed: {', '.join(makers)}")
    built, left_out = [], {}
    for name, (make, why_not) in makers.items():
        reason = "TRANSFORMER_FAST_MODULES" if only and name not in only else why_not()
        if reason is None:
            built.append(make())
        else:
            left_out[name] = reason
    return built, left_out


NATIVE_MODULES, LEFT_OUT = native_modules()


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


def ninja_variables() -> dict[str, list[str]]:
    """What ninja_file's rules are told."""
    includes = [word for path in include_dirs() for word in ("-isystem", path)]
    compiler, here = find_compiler(), f"-I{CSRC}"
    variables = {"cxx": compiler, "cxxflags": [*compile_flags(), here, *includes], "ldflags": link_flags()}
    if any(unit.rule == "nvcc" for module in NATIVE_MODULES for unit in module.units):
        variables["nvcc"] = [str(toolkit.find_nvcc())]
        variables["nvccflags"] = [*toolkit.compile_flags(compiler[0]), here]
    return variables


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
        modules = {module: build_dir / Path(self.get_ext_fullpath(module.name)).name for module in NATIVE_MODULES}
        ninja_file.write(build_dir, ninja_variables(), modules)
        built = [f"{module.short_name} ({module.note})" for module in NATIVE_MODULES]
        left_out = [f"without {name} ({reason})" for name, reason in LEFT_OUT.items()]
        print(f"transformer_fast: building {'; '.join([*built, *left_out])}", flush=True)
        command = [ninja_file.find_ninja(), "-C", str(build_dir)]
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
            sources=sorted({str(unit.source.relative_to(ROOT)) for unit in module.units if unit.text is None}),
        )
        for module in NATIVE_MODULES
    ],
    cmdclass={"build_ext": NinjaBuildExt},
)
