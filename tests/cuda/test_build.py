"""How the CUDA modules are built, and that a machine without a driver imports them and is told why they do nothing."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformer_fast.kernels.configs import num_splits

import transformer_fast
from transformer_fast import UnsupportedError, attention
from transformer_fast.backends.cuda import make_plan, missing_code
from transformer_fast.spec import Operands, make_spec, parse_options
from transformer_fast.testing.cuda_kernels import source_module

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "csrc" / "cuda"

needs_sources = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="not running from a source tree")


def _cuda_module() -> ModuleType:
    return pytest.importorskip("transformer_fast._C_cuda", reason="built without CUDA")


# ---------------------------------------------------------------------------------------------------- the module


def test_it_imports_without_a_driver() -> None:
    """Before PyTorch, which would bring libraries of its own."""
    file = _cuda_module().__file__
    program = f"""
import importlib.util
spec = importlib.util.spec_from_file_location("transformer_fast._C_cuda", {file!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
print(module.device_count(), module.why_not(), len(module.kernels()), module.targets(), sep="|")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    devices, reason, kernels, targets = done.stdout.strip().split("|")
    assert int(kernels) > 0 and targets
    assert (int(devices) == 0) == (reason != "None")
    if not Path("/proc/driver/nvidia").exists():
        assert reason == "there is no NVIDIA driver"


def test_it_is_linked_to_no_library_of_cuda(tmp_path: Path) -> None:
    """Nor does it show the runtime inside it, which PyTorch's would be mistaken for."""
    if not shutil.which("readelf"):
        pytest.skip("readelf is not installed")
    file = _cuda_module().__file__
    dynamic, symbols = (
        subprocess.run(["readelf", *words, "-W", file], capture_output=True, text=True, check=True).stdout
        for words in (["-d"], ["--dyn-syms"])
    )
    needed = set(re.findall(r"NEEDED.*\[(.+?)\]", dynamic))
    assert "libstdc++.so.6" in needed
    assert not [name for name in needed if re.match(r"lib(cuda|nv|torch|c10)", name)]
    assert not re.search(r"\b(RPATH|RUNPATH)\b", dynamic)
    defined = re.findall(r"GLOBAL\s+DEFAULT\s+\d+\s+(\S+)", symbols)
    assert "PyInit__C_cuda" in defined
    assert not [name for name in defined if name.startswith(("cuda", "__cuda", "_ZN2tf"))]


def test_a_machine_without_a_gpu_is_told_so() -> None:
    info = transformer_fast.backends()["cuda"]
    if info.available:
        pytest.skip("there is a GPU")
    assert re.search(
        "built without CUDA|no NVIDIA driver|no CUDA device|PyTorch is built without CUDA|driver", info.reason
    )
    x = torch.randn(1, 1, 4, 8).to(torch.bfloat16)
    with pytest.raises(UnsupportedError, match="backend 'cuda' cannot do this"):
        attention(x, x, x, backend="cuda")


@pytest.mark.parametrize(
    ("targets", "capability", "fits"),
    [
        ("80, 90a, 80+PTX", 120, True),
        ("80, 90a", 89, True),
        ("80, 90a", 90, True),
        ("80+PTX", 90, True),
        ("80", 90, False),
        ("90a", 80, False),
        ("80, 90a", 100, False),
    ],
)
def test_a_build_is_used_where_it_has_code(targets: str, capability: int, fits: bool) -> None:
    missing = missing_code(targets, capability)
    assert (missing is None) == fits
    assert fits or f"has machine code for {targets} (TRANSFORMER_FAST_CUDA_ARCHS" in missing


def test_every_kernel_of_the_table_is_there(emulator: None) -> None:
    """And the table of the module says of each what its struct says."""
    from transformer_fast.backends.cuda import native_module

    if not SOURCES.exists() or os.environ.get("TRANSFORMER_FAST_EMULATED_MODULE"):
        pytest.skip("no sources here, or a module built apart")
    instances = {i.name: i for i in source_module("instances").INSTANCES}
    kernels = {k["name"]: k for k in native_module("_C_emulated")[0].kernels()}
    assert set(kernels) == set(instances)
    for name, kernel in kernels.items():
        instance = instances[name]
        assert (kernel["phase"], kernel["family"]) == (instance.phase, instance.family)
        assert (kernel["head_dim"], kernel["modified"]) == (instance.head_dim, instance.modified)
        assert kernel["threads"] % 32 == 0 and kernel["shared_bytes"] <= 227 << 10


# ---------------------------------------------------------------------------------------------------- the plan


def _path(machine: tuple[int, int, int, int], query: torch.Tensor, keys: torch.Tensor, **options: Any) -> str:
    from transformer_fast.backends.cuda import native_module

    spec = make_spec(Operands(query, keys, keys), parse_options(**options))
    module, reason = native_module("_C_emulated")
    assert module is not None, reason

    path: str = make_plan(module, spec, machine).path()
    return path


@pytest.mark.parametrize("keys", [100, 1000, 5000, 40000])
@pytest.mark.parametrize("batch", [1, 3, 70])
def test_splits_are_those_of_the_triton_kernels(emulator: None, batch: int, keys: int) -> None:
    """The formula stands in C++ and in Python."""
    from transformer_fast.backends.cuda import native_module

    machine = (90, 132, 50 << 20, 227 << 10)
    query, key = (torch.empty(batch, 4, n, 64, dtype=torch.bfloat16, device="meta") for n in (1, keys))
    for window, seen in (((-1, -1), keys), ((99, 0), min(keys, 100))):
        path = _path(machine, query, key, window_size=window)
        name = re.search(r"\((\w+)\)", path)
        assert name is not None
        (kernel,) = [k for k in native_module("_C_emulated")[0].kernels() if k["name"] == name[1]]
        wanted = num_splits(batch * 4, 132 * kernel["min_blocks"], -(-seen // kernel["block_n"]))
        found = re.search(r"(\d+) splits", path)
        assert (int(found[1]) if found else 1) == wanted


def test_a_machine_gets_the_kernels_it_can_run(emulator: None) -> None:
    query, keys = (torch.empty(1, 4, 300, 64, dtype=torch.bfloat16) for _ in range(2))
    for capability, words in ((80, "mma.sync"), (86, "mma.sync"), (90, "wgmma and TMA"), (100, "mma.sync")):
        assert words in _path((capability, 100, 1 << 20, 227 << 10), query, keys), capability
    # What does not fit into a small multiprocessor is not taken.
    assert _path((86, 100, 1 << 20, 1 << 10), query, keys).startswith("no kernel of the forward pass is built")


# ---------------------------------------------------------------------------------------------------- setup.py


def _setup(**environment: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("TRANSFORMER_FAST", "LD_PRELOAD"))}
    command = [sys.executable, "setup.py", "--name"]
    return subprocess.run(command, cwd=ROOT, env=clean | environment, capture_output=True, text=True, check=False)


@needs_sources
@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"TRANSFORMER_FAST_CUDA": "yes"}, "TRANSFORMER_FAST_CUDA is 'yes'; allowed: 1 or 0"),
        ({"TRANSFORMER_FAST_EMULATOR": "2"}, "TRANSFORMER_FAST_EMULATOR is '2'; allowed: 1 or 0"),
        ({"TRANSFORMER_FAST_MODULES": "gpu"}, "TRANSFORMER_FAST_MODULES has ['gpu']; allowed: cpu, cuda, emulated"),
    ],
    ids=["cuda", "emulator", "modules"],
)
def test_a_wrong_choice_is_said(environment: dict[str, str], message: str) -> None:
    done = _setup(**environment)
    assert done.returncode != 0 and message in done.stderr


@needs_sources
def test_a_wrong_machine_is_said() -> None:
    table = source_module("instances")
    assert table.parse_targets("90a, 80") == ["80", "90a"]
    for wrong in ("70", "90", ""):
        with pytest.raises(ValueError, match=r"TRANSFORMER_FAST_CUDA_ARCHS is .*; allowed: a comma list of 80, 90a"):
            table.parse_targets(wrong)
    if source_module("toolkit").why_no_nvcc() is None:
        done = _setup(TRANSFORMER_FAST_CUDA="1", TRANSFORMER_FAST_CUDA_ARCHS="70")
        assert done.returncode != 0 and "TRANSFORMER_FAST_CUDA_ARCHS is '70'" in done.stderr


@pytest.fixture
def toolkit() -> Iterator[ModuleType]:
    """What setup.py asks about CUDA, which here asks anew: it remembers where nvcc is, as a build may."""
    module = source_module("toolkit")
    module.find_nvcc.cache_clear()
    yield module
    module.find_nvcc.cache_clear()


@needs_sources
def test_without_nvcc_the_reason_names_where_it_was_sought(
    toolkit: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(toolkit, "_candidates", lambda: [tmp_path / "nvcc"])
    assert "$CUDA_HOME" in toolkit.why_no_nvcc()
    old = tmp_path / "nvcc"
    old.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 11.8, V11.8.89'\n")
    old.chmod(0o755)
    toolkit.find_nvcc.cache_clear()
    assert "is of CUDA 11.8; 12.5 is the oldest" in toolkit.why_no_nvcc()


@needs_sources
def test_cuda_home_comes_first(toolkit: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("CUDA_PATH", "CUDA_HOME"):
        monkeypatch.setenv(name, str(tmp_path / name))
        (tmp_path / name / "bin").mkdir(parents=True)
        (tmp_path / name / "bin" / "nvcc").touch()
    assert toolkit.find_nvcc() == tmp_path / "CUDA_HOME" / "bin" / "nvcc"


@needs_sources
def test_names_choose_kernels() -> None:
    table = source_module("instances")
    names = [instance.name for instance in table.INSTANCES]
    assert len(set(names)) == len(names) and all(name.isidentifier() for name in names)
    chosen = [i.name for i in table.chosen("key_ranges,forward_sm90*_64_plain")]
    assert chosen == ["key_ranges_sm80", "forward_sm90_bf16_64_plain", "forward_sm90_f16_64_plain"]
    assert all((SOURCES / i.header).exists() for i in table.INSTANCES)
