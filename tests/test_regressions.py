"""What a reviewer once broke: each test says how, and why nothing else had seen it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from transformer_fast import UnsupportedError, attention, attention_varlen, explain, pointwise
from transformer_fast.backends import REGISTRY, Info
from transformer_fast.testing import Case, Target, available_targets, check

CPU_TARGETS = [t for t in available_targets() if t.backend == "cpu"]
each_cpu_target = pytest.mark.parametrize("target", CPU_TARGETS, ids=lambda t: t.name)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])


# ------------------------------------------------------------------------------------------------- saved tensors


def _another_order(t: Tensor) -> Tensor:
    return t.contiguous().clone()


def _another_type(t: Tensor) -> Tensor:
    """Of lse and statistics, which alone end in 33, and in another order too."""
    return t.double().transpose(-1, -2).contiguous().transpose(-1, -2) if t.shape[-1] == 33 else t


@pytest.mark.parametrize("pack", [_another_order, _another_type])
def test_saved_tensors_may_come_back_in_another_form(pack: Callable[[Tensor], Tensor]) -> None:
    """Hooks that offload or compress return copies; backward had read them with the strides that forward saw."""
    x = torch.randn(2, 33, 3, 4, 16, requires_grad=True)  # (batch, seqlen, qkv, heads, head_dim)
    query, key, value = (x[:, :, i].transpose(1, 2) for i in range(3))
    dout = torch.randn(2, 4, 33, 16)
    (wanted,) = torch.autograd.grad(attention(query, key, value), x, dout)
    with saved_tensors_hooks(pack, lambda t: t):
        out = attention(query, key, value)
    (got,) = torch.autograd.grad(out, x, dout)
    assert torch.equal(got, wanted)


# ------------------------------------------------------------------------------------------------ default device


def test_a_default_device_does_not_decide_where_results_are() -> None:
    """Results were allocated without a device: under torch.device("meta") the kernel wrote to address 0."""
    x = torch.randn(1, 2, 70, 16)
    packed, lengths = x[0].transpose(0, 1), torch.tensor([0, 30, 70], dtype=torch.int32)
    with torch.device("meta"):
        results = [
            attention(x, x, x),
            *attention(x, x, x, return_lse=True, dropout_p=0.5),
            attention(x, x, x, causal=True, dropout_p=0.5, backend="reference"),
            attention_varlen(packed, packed, packed, lengths, lengths, 40, 40),
            pointwise.rms_norm(x, x[0, 0, 0], 1e-5),
            pointwise.gated_silu(x.expand(9, 2, 70, 16).contiguous(), x.expand(9, 2, 70, 16).contiguous()),
            pointwise.rotate(packed, packed[:, :1, :8].contiguous(), packed[:, :1, 8:].contiguous()),
        ]
    assert all(r.device == x.device and r.isfinite().all() for r in results)


# ----------------------------------------------------------------------------------------------------- numerics


@each_cpu_target
@each_dtype
@pytest.mark.parametrize(("rows", "size"), [(1, 1e3), (1, 1e5), (40, 1e3), (40, 1e5), (40, 1e10)], ids=str)
def test_huge_scores(target: Target, dtype: torch.dtype, rows: int, size: float, seed: int) -> None:
    """The score's product was contracted with the subtraction of its rounded maximum: 2^-24 of 1e10 is past exp2."""
    case = Case("full", f"huge_{size}_{rows}", seqlen_q=rows, seqlen_k=40, score_size=size)
    outcome = check(case, dtype, target, seed)
    assert outcome.passed, f"\n{outcome}"


@each_cpu_target
def test_huge_scores_of_decoding_have_finite_gradients(target: Target) -> None:
    """Backward adds up the products in another order than decoding, and scores of 1e10 then pass their maximum."""
    query, key = torch.randn(1, 2, 1, 16, requires_grad=True), torch.randn(1, 2, 40, 16)
    with target.forced():
        (dquery,) = torch.autograd.grad(attention(query * 1e10, key, key, backend="cpu").sum(), query)
    assert dquery.isfinite().all()


@each_cpu_target
@pytest.mark.parametrize("rows", [33, 64])
def test_an_infinite_key_spoils_no_other_keys_gradient(target: Target, rows: int) -> None:
    """Lanes past a tile's rows had 0 times infinity as their score, and put NaN into every dK and dV."""
    query, value = torch.rand(1, 1, rows, 8) + 0.1, torch.randn(1, 1, 20, 8, requires_grad=True)
    key = torch.randn(1, 1, 20, 8)
    key[0, 0, 3] = float("-inf")  # a score of -inf for every row: weight 0
    key.requires_grad_()
    with target.forced():
        grads = torch.autograd.grad(attention(query, key, value, backend="cpu").sum(), [key, value])
    assert all(g.isfinite().all() for g in grads)


def test_heads_of_a_group_share_a_row_of_dbias_in_every_run() -> None:
    """Runs of packed rows were cut inside a group, and two threads then added into one row of a broadcast bias.

    It showed in one of a hundred runs, so there are many.
    """
    query, key = torch.randn(1, 3, 256, 64), torch.randn(1, 1, 256, 64)
    bias, dout = torch.randn(256, 256, requires_grad=True), torch.randn(1, 3, 256, 64)

    def gradient() -> Tensor:
        return torch.autograd.grad(attention(query, key, key, bias=bias, deterministic=True), bias, dout)[0]

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        first = gradient()
        assert all(torch.equal(first, gradient()) for _ in range(600))
    finally:
        torch.set_num_threads(before)


MEMORY = """
import json, resource, sys, torch, transformer_fast
threads, batch, heads, n, form = json.loads(sys.argv[1])
torch.set_num_threads(threads)
def step(n):
    q, k, v = (torch.randn(batch, heads, n, 16, requires_grad=True) for _ in range(3))
    bias = torch.randn(n, n, requires_grad=True) if form else None
    transformer_fast.attention(q, k, v, bias=bias, backend="cpu").sum().backward()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = step(64)
print(step(n) - before)
"""


@pytest.mark.parametrize(("batch", "heads", "n", "bias"), [(1, 1, 16384, False), (8, 8, 1024, True)])
def test_memory_of_backward_on_many_threads(batch: int, heads: int, n: int, bias: bool) -> None:
    """Accumulators of dK and dV were one for each part of the rows, and with a broadcast bias for all heads at once."""
    threads = 8

    def peak(count: int) -> int:
        arguments = json.dumps([count, batch, heads, n, bias])
        done = subprocess.run([sys.executable, "-c", MEMORY, arguments], capture_output=True, text=True, check=True)
        return int(done.stdout)

    accumulators = n * 2 * 16 * 4  # of one head, float32
    allowed = (2 * threads + 4) * accumulators + threads * 2**20  # two parts a thread, and their scratch
    assert peak(threads) - peak(1) < allowed


# -------------------------------------------------------------------------------------------- what a view shows


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_views_whose_memory_is_negated(backend: str) -> None:
    """The imaginary part of a conjugate is a view with a flag: what lies in memory has the other sign."""
    x, bias = torch.randn(1, 2, 40, 16), torch.randn(40, 40, dtype=torch.complex64).conj().imag
    assert bias.is_neg()
    got = attention(x, x, x, bias=bias, backend=backend)
    assert torch.equal(got, attention(x, x, x, bias=bias.clone(), backend=backend))
    assert torch.equal(attention(torch._neg_view(x), x, x), attention(-x, x, x))


@each_cpu_target
@pytest.mark.parametrize("rows", [1, 37], ids=["decode", "tiles"])
def test_true_is_any_byte_but_zero(target: Target, rows: int) -> None:
    """A boolean view of bytes: the summary of dense masks had looked for ones."""
    query, key = torch.randn(1, 2, rows, 16), torch.randn(1, 2, 300, 16)
    visible = torch.rand(rows, 300) < 0.5
    odd = (visible * torch.randint(2, 255, (rows, 300))).to(torch.uint8).view(torch.bool)
    with target.forced():
        assert torch.equal(attention(query, key, key, bias=odd), attention(query, key, key, bias=visible))


# ------------------------------------------------------------------------------------------- decoding under masks


HIDDEN_PAGES = """
import ctypes, mmap, torch
from transformer_fast import attention

libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
KEYS, HEAD_DIM = 4096, 64
size = KEYS * HEAD_DIM * 4
place = libc.mmap(None, size, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
key = torch.frombuffer((ctypes.c_char * size).from_address(place), dtype=torch.float32).view(1, 1, KEYS, HEAD_DIM)
key.normal_()
visible = torch.zeros(1, KEYS, dtype=torch.bool)
visible[:, :64] = visible[:, -256:] = True
one_end = visible.clone()
one_end[:, :64] = False
queries = [torch.randn(1, 1, rows, HEAD_DIM) for rows in (1, 40)]
forms = [dict(bias=visible), dict(bias=one_end), dict(key_padding_mask=visible)]
wanted = [attention(q, key, key, **form) for q in queries for form in forms]
first, last = 192 * HEAD_DIM * 4, 3744 * HEAD_DIM * 4  # whole pages, and whole blocks of any size in use
assert first % mmap.PAGESIZE == last % mmap.PAGESIZE == 0
assert libc.mprotect(place + first, last - first, 0) == 0
for q in queries:
    for form in forms:
        print(q.shape[2], list(form), flush=True)
        assert torch.equal(attention(q, key, key, **form), wanted.pop(0))
print("done")
"""


def test_what_a_mask_hides_is_not_read() -> None:
    """Decoding read every block under a dense mask or between kept keys. Here hidden pages may not be touched."""
    done = subprocess.run(
        [sys.executable, "-c", HIDDEN_PAGES], capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL
    )
    assert done.stdout.endswith("done\n"), (done.returncode, done.stdout, done.stderr[-1000:])


# ------------------------------------------------------------------------------------------------------- messages


def test_tensors_without_strides_are_named() -> None:
    """A sparse or nested tensor failed inside PyTorch, before any check."""
    x = torch.randn(1, 2, 8, 4)
    sparse = torch.randn(4, 4).to_sparse()
    with pytest.raises(ValueError, match=r"key has layout torch.sparse_coo; allowed: torch.strided"):
        attention(x, sparse, x)
    nested = torch.nested.nested_tensor([torch.randn(2, 3)], layout=torch.jagged)
    with pytest.raises((ValueError, TypeError), match="value is"):
        attention(x, x, nested)


def test_forward_mode_derivatives_are_refused_in_words() -> None:
    """torch.func.jvp ended in PyTorch's bare NotImplementedError."""
    x = torch.randn(1, 2, 8, 4)
    with pytest.raises(UnsupportedError, match="forward-mode"):
        torch.func.jvp(lambda q: attention(q, x, x), (x,), (x,))


def test_explain_names_its_own_options() -> None:
    """A wrong keyword was reported in the name of an inner function."""
    x = torch.randn(1, 2, 8, 4)
    with pytest.raises(TypeError, match=r"explain\(\) got an unexpected keyword argument 'casual'; allowed: causal"):
        explain(x, x, x, casual=True)


def test_an_empty_packed_batch_stays_attached() -> None:
    """The reference returned new zeros: a training step on an empty batch lost its graph."""
    x, cu = torch.zeros(0, 2, 16, requires_grad=True), torch.zeros(1, dtype=torch.int32)
    out = attention_varlen(x, x, x, cu, cu, 0, 0, backend="reference")
    assert out.requires_grad and out.shape == x.shape


WRONG_ISA = """
import torch, transformer_fast as tf
x = torch.randn(1, 2, 8, 4)
print(tf.backends()["cpu"].reason, tf.attention(x, x, x, backend="reference").shape)
for backend in ("auto", "cpu"):
    try:
        tf.attention(x, x, x, backend=backend)
    except ValueError as error:
        print(backend, error)
"""


def test_a_wrong_instruction_set_leaves_the_other_back_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """With it misspelt, not even the reference could be asked. "auto" must still not pass over it."""
    monkeypatch.setenv("TRANSFORMER_FAST_CPU_ISA", "avx1024")
    done = subprocess.run([sys.executable, "-c", WRONG_ISA], capture_output=True, text=True, check=True)
    reference, auto, cpu = done.stdout.splitlines()
    assert "torch.Size" in reference and auto.startswith("auto") and cpu.startswith("cpu")
    assert all("avx1024" in line and "allowed on this machine" in line for line in (reference, auto, cpu))


@pytest.mark.parametrize("command", [("verify", "--quick"), ("bench", "--quick", "small_16"), ("demo", "--quick")])
def test_no_command_passes_over_a_wrong_instruction_set(
    command: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """They ran the reference, showed its times as ours, and ended well."""
    monkeypatch.setenv("TRANSFORMER_FAST_CPU_ISA", "avx1024")
    done = subprocess.run(
        [sys.executable, "-m", "transformer_fast.cli", *command, "--output", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2 and "avx1024" in done.stderr and "Traceback" not in done.stderr


def test_a_missing_cpu_back_end_is_not_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    """The choice fell on the reference, hundreds of times slower, without a word."""
    cpu = REGISTRY["cpu"]
    monkeypatch.setattr(cpu, "info", lambda: Info("cpu", False, "it was not built", None))
    x = torch.randn(1, 2, 7, 5)
    with pytest.warns(RuntimeWarning, match="slow road: the cpu back end is not available \\(it was not built\\)"):
        attention(x, x, x)


@pytest.mark.parametrize("command", ["verify", "bench", "demo"])
def test_an_output_folder_that_cannot_be_made_is_told_first(command: str, tmp_path: Path) -> None:
    """It was a traceback, after minutes of work."""
    (tmp_path / "file").write_text("")
    done = subprocess.run(
        [sys.executable, "-m", "transformer_fast.cli", command, "--output", str(tmp_path / "file" / "folder")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2 and "which cannot be made" in done.stderr
    assert "Traceback" not in done.stderr
