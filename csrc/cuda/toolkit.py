"""What setup.py asks about CUDA: where nvcc is, whether there is a driver, and how to compile and link with it."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

#: cudaGetDriverEntryPointByVersion came with it.
OLDEST = (12, 5)
HOW_TO_INSTALL = (
    "Install the CUDA toolkit, 12.5 or newer (https://developer.nvidia.com/cuda-downloads, or on Debian and Ubuntu "
    "with NVIDIA's package source: apt install cuda-toolkit), and set CUDA_HOME if it is not in /usr/local/cuda"
)


def _candidates() -> list[Path]:
    """Where nvcc may be, in the order of how much somebody meant it."""
    found = [Path(os.environ[name], "bin", "nvcc") for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    if on_path := shutil.which("nvcc"):
        found.append(Path(on_path))
    found.append(Path("/usr/local/cuda/bin/nvcc"))
    spec = importlib.util.find_spec("nvidia")  # the pip package nvidia-cuda-nvcc
    for folder in spec.submodule_search_locations or [] if spec else []:
        found += sorted(Path(folder).glob("cu*/bin/nvcc"), reverse=True)
    return found


@functools.cache
def find_nvcc() -> Path | None:
    """The first nvcc there is."""
    return next((path for path in _candidates() if path.is_file()), None)


def version_of(nvcc: Path) -> tuple[int, int]:
    """(12, 8) for 12.8; (0, 0) if it does not say."""
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False).stdout
    found = re.search(r"release (\d+)\.(\d+)", said)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def has_driver() -> bool:
    """Whether this machine can run what is built."""
    if Path("/proc/driver/nvidia").exists():
        return True
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def why_no_nvcc() -> str | None:
    """The reason why CUDA cannot be compiled here, None where it can."""
    nvcc = find_nvcc()
    if nvcc is None:
        return "no nvcc in $CUDA_HOME, $CUDA_PATH, $PATH, /usr/local/cuda or the pip package nvidia-cuda-nvcc"
    version = version_of(nvcc)
    if version < OLDEST:
        return f"{nvcc} is of CUDA {version[0]}.{version[1]}; {OLDEST[0]}.{OLDEST[1]} is the oldest that will do"
    try:
        library_folder(nvcc)
    except FileNotFoundError as error:
        return str(error)
    return None


@functools.cache
def _root(nvcc: Path) -> Path:
    """The toolkit's folder as nvcc itself tells it: what lies on PATH may be a script that calls the real one."""
    said = subprocess.run([nvcc, "--dryrun", "-c", "x.cu"], capture_output=True, text=True, check=False).stderr
    found = re.search(r"^#\$ TOP=(.+)$", said, re.MULTILINE)
    return Path(found[1]).resolve() if found else nvcc.resolve().parents[1]


def include_folder(nvcc: Path) -> Path:
    """Of cuda.h and the runtime's headers."""
    return _root(nvcc) / "include"


def library_folder(nvcc: Path) -> Path:
    """Of libcudart_static.a.

    Raises:
        FileNotFoundError: it is not there.
    """
    for folder in ("lib64", "lib", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib"):
        if (_root(nvcc) / folder / "libcudart_static.a").exists():
            return _root(nvcc) / folder
    raise FileNotFoundError(f"no libcudart_static.a in {_root(nvcc)}")


def compile_flags(compiler: str) -> list[str]:
    """nvcc's, but for the machines. ptxas tells registers and spills: the kernel report reads what it said."""
    return [
        *("-std=c++17", "-O3", "-ccbin", compiler, "-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall,-g0"),
        *("-Xptxas", "-v,-warn-spills"),
    ]


def link_flags(nvcc: Path) -> list[str]:
    """The runtime inside and invisible, so that it is never mistaken for PyTorch's; the driver not at all."""
    return [f"-L{library_folder(nvcc)}", "-lcudart_static", "-Wl,--exclude-libs,ALL", "-ldl", "-lrt", "-lpthread"]


if __name__ == "__main__":
    sys.exit(why_no_nvcc())
