"""The sdist, the wheel, the wheel in an environment of its own, and the price of an import.

The wheel is built from the sdist, so a file that the sdist lacks fails here. It is installed into
a fresh environment that sees this one's torch and nothing of the checkout.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
IMPORT_BUDGET_SECONDS = 0.3

needs_sources = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="not running from a source tree")


def run(command: Sequence[str | Path], cwd: Path, **environment: str) -> str:
    """Run a command away from the checkout and return its output; show all of it on failure."""
    dropped = {"PYTHONPATH", "TRANSFORMER_FAST_SANITIZE", "TRANSFORMER_FAST_EMULATOR", "LD_PRELOAD"}
    clean = {name: value for name, value in os.environ.items() if name not in dropped}
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env=clean | environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{command} failed\n{done.stdout}\n{done.stderr}"
    return done.stdout


@dataclass(frozen=True)
class Distributions:
    sdist: Path
    wheel: Path

    def sdist_names(self) -> set[str]:
        with tarfile.open(self.sdist) as archive:
            return {name.partition("/")[2] for name in archive.getnames()}

    def wheel_names(self) -> set[str]:
        with zipfile.ZipFile(self.wheel) as archive:
            return set(archive.namelist())


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> Distributions:
    pytest.importorskip("build")
    folder = tmp_path_factory.mktemp("dist")
    run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT],
        cwd=folder,
        TMPDIR=str(tmp_path_factory.mktemp("build")),
        TRANSFORMER_FAST_CUDA="0",  # minutes of nvcc
    )
    (sdist,) = folder.glob("*.tar.gz")
    (wheel,) = folder.glob("*.whl")
    return Distributions(sdist, wheel)


@pytest.fixture(scope="module")
def installed_python(distributions: Distributions, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a fresh environment that holds the wheel and borrows this torch."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check"]
    run([*pip, "install", "--quiet", "--no-deps", "--no-index", distributions.wheel], cwd=folder)
    purelib = run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], folder)
    # Folders named in a .pth file go on sys.path, after this environment's own, but the .pth files
    # inside them are not read: an editable install in the borrowed one stays out.
    borrowed = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    borrowed.add(str(Path(torch.__file__).parents[1]))
    Path(purelib.strip(), "borrowed.pth").write_text("\n".join(sorted(borrowed)), encoding="utf-8")
    return python


@needs_sources
def test_the_sdist_carries_every_source(distributions: Distributions) -> None:
    names = distributions.sdist_names()
    folders = ["csrc", "kernels", "benchmarks", "transformer_fast", "tests"]
    wanted = {
        str(path.relative_to(ROOT))
        for folder in folders
        for path in (ROOT / folder).rglob("*")
        if path.suffix in {".py", ".cpp", ".h", ".cu", ".cuh", ".j2"}
    }
    wanted |= {"pyproject.toml", "setup.py", "Makefile", "LICENSE", "README.md", ".ci/run"}
    assert wanted <= names, f"missing: {sorted(wanted - names)}"


@needs_sources
def test_the_wheel_carries_every_module_and_nothing_foreign(distributions: Distributions) -> None:
    names = distributions.wheel_names()
    installed_as = {
        "transformer_fast": "transformer_fast",
        "kernels": "transformer_fast/kernels",
        "benchmarks": "transformer_fast/benchmarks",
    }
    wanted = {"transformer_fast/py.typed", "transformer_fast/kernels/baseline.json"} | {
        f"{target}/{path.relative_to(ROOT / folder)}"
        for folder, target in installed_as.items()
        for path in (ROOT / folder).rglob("*")
        if path.suffix in {".py", ".j2"}
    }
    assert wanted <= names, f"missing: {sorted(wanted - names)}"
    shared_objects = [name for name in names if ".so" in Path(name).name]
    assert [Path(name).name.partition(".")[0] for name in shared_objects] == ["_C_cpu"]
    foreign = [name for name in names if not re.match(r"transformer_fast(/|-[^/]*\.dist-info/)", name)]
    assert not foreign


@needs_sources
def test_native_sources_never_include_torch() -> None:
    include = re.compile(r'^\s*#\s*include\s*[<"](torch|ATen|c10|aten)/', re.MULTILINE)
    sources = [path for path in (ROOT / "csrc").rglob("*") if path.is_file()]
    assert sources
    assert not [path for path in sources if include.search(path.read_text(encoding="utf-8"))]


@needs_sources
def test_the_module_is_linked_to_the_shared_openmp_and_not_to_torch(
    distributions: Distributions, tmp_path: Path
) -> None:
    if not shutil.which("readelf"):
        pytest.skip("readelf is not installed")
    with zipfile.ZipFile(distributions.wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".so")]
        module = archive.extract(name, tmp_path)
    dynamic = run(["readelf", "-d", "-W", module], cwd=tmp_path)
    needed = set(re.findall(r"NEEDED.*\[(.+?)\]", dynamic))
    assert "libgomp.so.1" in needed
    assert not [name for name in needed if re.match(r"lib(torch|c10|asan|ubsan|python)", name)]
    assert not re.search(r"\b(RPATH|RUNPATH)\b", dynamic)


SMOKE_TEST = """
import json
import torch
import transformer_fast
import transformer_fast._C_cpu
import transformer_fast.benchmarks
import transformer_fast.kernels

query = torch.randn(2, 4, 17, 32)
key, value = torch.randn(2, 2, 2, 33, 32)
fused = transformer_fast.attention(query, key, value, causal=True, backend="cpu")
reference = transformer_fast.attention(query, key, value, causal=True, backend="reference")
torch.testing.assert_close(fused, reference)
with open("/proc/self/maps") as maps:
    openmp = {line.split()[-1] for line in maps if "libgomp" in line}
modules = [
    transformer_fast,
    transformer_fast._C_cpu,
    transformer_fast.benchmarks,
    transformer_fast.kernels,
]
print(json.dumps({
    "version": transformer_fast.__version__,
    "files": [module.__file__ for module in modules],
    "openmp": sorted(openmp),
}))
"""


@needs_sources
def test_the_wheel_works_outside_the_checkout(installed_python: Path, tmp_path: Path) -> None:
    found = json.loads(run([installed_python, "-c", SMOKE_TEST], cwd=tmp_path))
    environment = installed_python.parents[1]
    for file in found["files"]:
        assert Path(file).is_relative_to(environment), f"{file} is not the wheel's copy"
    assert len(found["openmp"]) == 1, "torch and the native module must share one libgomp"
    version = (ROOT / "transformer_fast" / "_version.py").read_text(encoding="utf-8")
    assert f'"{found["version"]}"' in version


@needs_sources
def test_the_console_script_is_installed(installed_python: Path, tmp_path: Path) -> None:
    script = installed_python.with_name("transformer-fast")
    assert "demo" in run([script, "--help"], cwd=tmp_path)


@needs_sources
def test_import_costs_little_beyond_torch(installed_python: Path, tmp_path: Path) -> None:
    program = (
        "import time, torch; start = time.perf_counter(); import transformer_fast; print(time.perf_counter() - start)"
    )
    seconds = [float(run([installed_python, "-c", program], cwd=tmp_path)) for _ in range(5)]
    assert statistics.median(seconds) < IMPORT_BUDGET_SECONDS, seconds


@needs_sources
def test_ci_runs_the_command_the_readme_names() -> None:
    assert re.search(r"^make test\b", (ROOT / ".ci" / "run").read_text(), re.MULTILINE)
    assert re.search(r"^ *make test\b", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


@pytest.mark.sanitize
def test_the_expected_copy_is_the_one_under_test() -> None:
    """`make sanitize` names the copy it built; a run over another one would prove nothing."""
    expected = os.environ.get("TRANSFORMER_FAST_EXPECTED_COPY")
    if expected is None:
        pytest.skip("TRANSFORMER_FAST_EXPECTED_COPY is not set")
    native = Path(importlib.import_module("transformer_fast._C_cpu").__file__)
    assert native.resolve().is_relative_to(Path(expected).resolve())
    assert b"__asan_init" in native.read_bytes(), "the module is not sanitized"
