"""Each PTX instruction of the CUDA back end, checked by a small kernel around it.

The kernels (csrc/cuda/checks*.cu) store what an instruction gives, bit by bit. What it has to give is computed here, by
plain loops written from the PTX ISA 9.0 and from nothing of ours: neither the emulator nor a kernel. They run on the
emulator (`_C_emulated`, tensors on the CPU) and on a GPU (`_C_cuda`)::

    from transformer_fast import _C_cuda
    results = run_instruction_checks(_C_cuda, torch.device("cuda"))
"""

from transformer_fast.testing.instructions import copies, matrices, numbers, threads
from transformer_fast.testing.instructions.bench import (
    CHECKS,
    Bench,
    Result,
    check_names,
    run_instruction_checks,
    run_one,
)

__all__ = [
    "CHECKS",
    "Bench",
    "Result",
    "check_names",
    "copies",
    "matrices",
    "numbers",
    "run_instruction_checks",
    "run_one",
    "threads",
]
