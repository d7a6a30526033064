"""Every CUDA kernel that is compiled, as data: setup.py makes a source file of each, in its build folder.

A kernel is a struct in a header beside this file; a row here names the C++ type with all its template arguments, which
are tile sizes that were chosen by reading the machine code. Importing this file does nothing else.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable
from dataclasses import dataclass

#: Machine code by name: what nvcc is told. "80+PTX" is code for machines to come (and 8.9, 10.x, 12.x), which the
#: driver compiles when it first sees it; wgmma exists on 9.0 alone, hence the "a".
TARGETS = {
    "80": "arch=compute_80,code=sm_80",
    "90a": "arch=compute_90a,code=sm_90a",
    "80+PTX": "arch=compute_80,code=compute_80",
}
DTYPES = {"bf16": "Bfloat16", "f16": "Float16"}


@dataclass(frozen=True)
class Instance:
    """One kernel. ``dtype`` and ``head_dim`` are None and 0 where they make no difference, ``modified`` None."""

    phase: str
    family: int  # 80 or 90
    header: str
    cpp_type: str
    dtype: str | None
    head_dim: int
    modified: bool | None
    targets: tuple[str, ...]

    @property
    def name(self) -> str:
        """Unique, and an identifier: forward_sm80_bf16_64_plain."""
        kind = {None: [], False: ["plain"], True: ["modified"]}[self.modified]
        sizes = [self.dtype, str(self.head_dim)] if self.dtype else []
        return "_".join([self.phase, f"sm{self.family}", *sizes, *kind])


_EVERYWHERE = ("80", "90a", "80+PTX")
_HOPPER = ("90a",)

# Template arguments after (element, head_dim), or after (element, head_dim, modified), by head_dim.
_Arguments = dict[int, str]


def _kernels(
    phase: str,
    header: str,
    struct: str,
    plain: _Arguments,
    modified: _Arguments | None = None,
    targets: tuple[str, ...] | None = None,
) -> Iterable[Instance]:
    """A kernel in all sizes and both types. Without ``modified`` there is one for all problems."""
    family = 90 if "sm90" in header else 80
    targets = targets or (_HOPPER if family == 90 else _EVERYWHERE)
    for dtype, element in DTYPES.items():
        for kind, table in ((None, plain),) if modified is None else ((False, plain), (True, modified)):
            for head_dim, arguments in table.items():
                words = [element, str(head_dim), *([] if kind is None else [str(kind).lower()])]
                cpp_type = f"{struct}<{', '.join([*words, *([arguments] if arguments else [])])}>"
                yield Instance(phase, family, header, cpp_type, dtype, head_dim, kind, targets)


_NONE = {64: "", 128: "", 256: ""}

INSTANCES: tuple[Instance, ...] = (
    Instance("key_ranges", 80, "key_ranges.cuh", "KeyRanges", None, 0, None, _EVERYWHERE),
    # kBlockM, kBlockN, kStages, kWarpsM, kWarpsN
    *_kernels(
        "forward",
        "forward_sm80.cuh",
        "ForwardSm80",
        {64: "128, 64, 2, 8, 1", 256: "64, 64, 1, 4, 1"},
        {64: "128, 64, 1, 8, 1", 128: "128, 64, 1, 8, 1", 256: "64, 32, 1, 4, 1"},
    ),
    # Fills the registers of 8.0 to the last; on 9.0, where it has what TMA cannot load, ptxas would spill.
    *_kernels("forward", "forward_sm80.cuh", "ForwardSm80", {128: "128, 64, 1, 4, 1"}, {}, ("80", "80+PTX")),
    *_kernels("forward_fallback", "forward_sm80.cuh", "ForwardSm80", {128: "128, 64, 1, 8, 1"}, {}, _HOPPER),
    *_kernels(
        "decode",
        "forward_sm80.cuh",
        "ForwardSm80",
        {64: "16, 128, 2, 1, 4", 128: "16, 64, 2, 1, 4", 256: "16, 32, 2, 1, 2"},
        {64: "16, 128, 2, 1, 4", 128: "16, 64, 2, 1, 4", 256: "16, 32, 2, 1, 2"},
    ),
    # kConsumers, kBlockN, kStages
    *_kernels(
        "forward",
        "forward_sm90.cuh",
        "ForwardSm90",
        {64: "3, 128, 2", 128: "2, 128, 2", 256: "2, 80, 2"},
        {64: "2, 80, 2", 128: "2, 80, 2", 256: "2, 32, 2"},
    ),
    # Larger blocks where every row sees nearly all keys.
    *_kernels("forward_full", "forward_sm90.cuh", "ForwardSm90", {128: "2, 176, 2"}, {}),
    *_kernels("preprocess", "backward_rows.cuh", "BackwardPreprocess", _NONE),
    # kBlockM, kBlockN, kPairs, kStep, kHold, kMinBlocks
    *_kernels(
        "dkdv",
        "backward_sm80.cuh",
        "BackwardDkdvSm80",
        {64: "64, 64, 2, 16, true, 3", 128: "32, 64, 2, 16, true, 2", 256: "32, 64, 4, 16, true, 1"},
        {64: "64, 64, 2, 16, true, 3", 128: "32, 64, 2, 16, false, 2", 256: "32, 64, 4, 16, true, 1"},
    ),
    # kBlockM, kBlockN, kWarpsM, kWarpsN, kChunk, kValueStages, kMinBlocks
    *_kernels(
        "dq",
        "backward_sm80.cuh",
        "BackwardDqSm80",
        {64: "64, 64, 2, 2, 32, 1, 3", 128: "64, 64, 2, 2, 32, 1, 2", 256: "32, 32, 2, 2, 16, 1, 2"},
        {64: "64, 32, 2, 2, 16, 2, 3", 128: "64, 32, 2, 2, 16, 2, 2", 256: "32, 32, 2, 2, 16, 1, 2"},
    ),
    *_kernels("backward", "backward_sm90.cuh", "BackwardSm90", _NONE, _NONE),
    *_kernels("postprocess", "backward_sums_sm90.cuh", "BackwardPostprocess", _NONE),
)


def chosen(pattern: str | None) -> list[Instance]:
    """The instances whose name one of the patterns of a comma list matches; a part of a name is enough."""
    if not pattern:
        return list(INSTANCES)
    patterns = [f"*{word.strip()}*" for word in pattern.split(",")]
    return [i for i in INSTANCES if any(fnmatch.fnmatchcase(i.name, word) for word in patterns)]


def target_flags(instance: Instance, targets: Iterable[str]) -> list[str]:
    """nvcc's words for the machines that an instance is compiled for; none where it has nothing there."""
    return [word for t in targets if t in instance.targets for word in ("-gencode", TARGETS[t])]


def source_of(instance: Instance) -> str:
    """The text of an instance's source file, for nvcc and for the emulator alike."""
    modified = {None: -1, False: 0, True: 1}[instance.modified]
    words = [
        f'"{instance.name}"',
        f'"{instance.phase}"',
        str(instance.family),
        f"DType::{instance.dtype or 'f32'}",
        str(instance.head_dim),
        str(modified),
    ]
    name = instance.name
    # The section is what the kernel report reads.
    return f"""// Made by setup.py from csrc/cuda/instances.py.
#include "cuda/{instance.header}"
#include "cuda/host/instance.h"

namespace tf::cuda {{

using K = {instance.cpp_type};
extern const KernelInfo {name};
const KernelInfo {name} = info_of<K>({", ".join(words)});

extern const int {name}_facts[5];
__attribute__((section("tf_facts"), used)) const int {name}_facts[5] = {{
    K::kThreads, K::kMinBlocks, K::kBlockM, K::kBlockN, K::kSharedBytes}};

}}  // namespace tf::cuda
"""


def table_source(instances: Iterable[Instance]) -> str:
    """The text of the file that lists all instances of a module."""
    names = [instance.name for instance in instances]
    declared = "\n".join(f"extern const KernelInfo {name};" for name in names)
    listed = ", ".join(f"&{name}" for name in names)
    return f"""// Made by setup.py from csrc/cuda/instances.py.
#include "cuda/host/kernel_info.h"

namespace tf::cuda {{

{declared}

const std::vector<const KernelInfo*>& kernels() {{
    static const std::vector<const KernelInfo*> all = {{{listed}}};
    return all;
}}

}}  // namespace tf::cuda
"""


def parse_targets(text: str) -> list[str]:
    """TRANSFORMER_FAST_CUDA_ARCHS, a comma list, as names of TARGETS.

    Raises:
        ValueError: a name is unknown.
    """
    names = [name for name in re.split(r"[,;\s]+", text.strip()) if name]
    unknown = [name for name in names if name not in TARGETS]
    if unknown or not names:
        raise ValueError(
            f"TRANSFORMER_FAST_CUDA_ARCHS is {text!r}; allowed: a comma list of {', '.join(TARGETS)} (all by default)"
        )
    return [name for name in TARGETS if name in names]
