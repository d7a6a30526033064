"""The kernels compile for real targets, which needs no GPU. The interpreter accepts what a compiler does not."""

from __future__ import annotations

import subprocess
import sys

import pytest

COMPILE = """
import sys, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from transformer_fast.kernels.forward import attention_forward_kernel as kernel

capability, everything = int(sys.argv[1]), sys.argv[2] == "everything"
flags = ("PACKED", "HAS_SEQLENS_K", "HAS_KEY_MASK", "HAS_ALIBI", "HAS_SOFTCAP", "HAS_SINKS", "HAS_DROPOUT", "MODIFIED")
constants = dict.fromkeys(flags, everything) | dict(
    GROUP=4 if everything else 1, HEAD_DIM=80 if everything else 64, HEAD_DIM_V=64, BLOCK_M=64, BLOCK_N=64,
    BLOCK_D=128 if everything else 64, BLOCK_DV=64, BIAS="float" if everything else "none", NEED_LSE=True,
    NEED_STATS=True, PRECISION="ieee",
)
pointers = dict.fromkeys(("query", "key", "value", "out"), "*bf16") | dict.fromkeys(
    ("lse", "stats", "bias", "alibi_slopes", "sinks"), "*fp32"
) | dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k", "seqlens_k"), "*i32") | dict(key_mask="*u8", rng_seed="*i64")
numbers = dict.fromkeys(("softmax_scale", "softcap", "dropout_keep"), "fp32") | dict(dropout_threshold="i64")
signature = {
    name: "constexpr" if name in constants else pointers.get(name) or numbers.get(name, "i32")
    for name in kernel.arg_names
}
source = ASTSource(kernel, signature=signature, constexprs=constants)
compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=dict(num_warps=4, num_stages=2))
instruction = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}[capability]
print(compiled.asm["ptx"].count(instruction), len(compiled.asm["cubin"]))
"""


@pytest.mark.parametrize("what", ["plain", "everything"])
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_forward_compiles_to_tensor_core_code(
    capability: int, what: str, monkeypatch: pytest.MonkeyPatch, tmp_path: object
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, str(capability), what], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    products, size = map(int, done.stdout.split())
    assert products > 0 and size > 0
