"""The PTX instructions of the CUDA back end, in the emulator: what each gives, and that missing waits are caught.

`make gpu` runs the same checks on a device first of all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from transformer_fast.backends.cuda import native_module
from transformer_fast.testing.instructions import CHECKS, Bench, check_names, run_one
from transformer_fast.testing.instructions.bench import Geometry
from transformer_fast.testing.instructions.copies import expected_tile, store_tile
from transformer_fast.testing.instructions.layouts import gather, places_of, rows_along_k

emulated, why_not = native_module("_C_emulated")
if emulated is None:
    pytest.skip(why_not or "", allow_module_level=True)

SEEDS = range(3)
#: Under how many schedules a fault must show in at least one.
FAULT_SEEDS = range(12)


@pytest.fixture(autouse=True)
def _default_settings() -> Iterator[None]:
    yield
    emulated.configure(seed=0)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", [n for n in check_names(emulated, 90) if not n.startswith("wgmma")])
def test_instruction(name: str, seed: int) -> None:
    emulated.configure(seed=seed)
    result = run_one(Bench(emulated, "cpu", seed), name)
    assert result.passed, result.detail


@pytest.mark.parametrize("name", [n for n in check_names(emulated, 90) if n.startswith("wgmma")])
def test_wgmma(name: str) -> None:
    """Products are the slow ones: one seed each, drawn from the name, so that all schedules occur."""
    seed = sum(name.encode())
    emulated.configure(seed=seed)
    result = run_one(Bench(emulated, "cpu", seed), name)
    assert result.passed, result.detail


def test_every_kernel_has_an_expected_result() -> None:
    assert set(check_names(emulated, 90)) == set(CHECKS)
    assert set(emulated.check_names(80)) < set(emulated.check_names(90))


def test_a_wrong_result_fails() -> None:
    class Wrong:
        @staticmethod
        def run_check(name: str, inputs: list[int], outputs: list[int], *rest: object) -> None:
            emulated.run_check("ldmatrix_transposed", inputs, outputs, *rest)

    result = run_one(Bench(Wrong(), "cpu"), "ldmatrix")  # type: ignore[arg-type]
    assert not result.passed and "differ" in result.detail


# --- What the emulator must catch -----------------------------------------------------------------

TILE_BYTES = 8192
#: A case runs a kernel, with its fault or without, and says whether the result is right.
Case = Callable[[str, int], bool]


def _tensor(rows: int = 64) -> Geometry:
    data = torch.randint(-99, 99, (rows * 64,)).bfloat16()
    return Geometry(data, (64, rows, 1, 1), (128, 128 * rows, 128 * rows), (64, 64, 1, 1))


def _copies(name: str, fault: int) -> bool:
    bench = Bench(emulated, "cpu")
    source = torch.randn(TILE_BYTES // 4)
    out = bench.empty(TILE_BYTES // 4, dtype=torch.float32)
    bench.run(name, [source], [out], [fault])
    return torch.equal(out, source)


def _loads(name: str, fault: int) -> bool:
    bench, geometry = Bench(emulated, "cpu"), _tensor(128)
    out = bench.empty(2 if name.endswith("empty_barrier") else 1, TILE_BYTES, dtype=torch.uint8)
    bench.run(name, [], [out], [fault], geometry)
    return all(torch.equal(out[i], expected_tile(geometry, (0, 64 * i, 0, 0))) for i in range(len(out)))


def _stores(name: str, fault: int, way: int = 0) -> bool:
    bench, geometry = Bench(emulated, "cpu"), _tensor()
    tile = torch.randint(0, 256, (TILE_BYTES,), dtype=torch.uint8)
    expected = geometry.data.clone().view(torch.uint8)
    store_tile(geometry, expected, tile, (0, 0, 0, 0))
    bench.run(name, [tile], [], [fault, way], geometry)
    return torch.equal(geometry.data.view(torch.uint8), expected)


def _stores_uncommitted(name: str, fault: int) -> bool:
    return _stores(name, fault, way=1)


def _adds(name: str, fault: int) -> bool:
    bench = Bench(emulated, "cpu")
    source, out = torch.randn(TILE_BYTES // 4), torch.zeros(TILE_BYTES // 4)
    bench.run(name, [source], [out], [fault])
    return torch.equal(out, source)


def _products(name: str, fault: int) -> bool:
    bench = Bench(emulated, "cpu")
    a, b = bench.integers(-4, 4, (64, 16), torch.float64), bench.integers(-4, 4, (64, 16), torch.float64)
    image = torch.full((TILE_BYTES // 2,), float("nan"), dtype=torch.bfloat16)
    image[rows_along_k(64, 16, 1024, 8192) // 2] = b.bfloat16()
    fragment = gather(a, places_of("wgmma_a", 128, 8)).bfloat16()
    out = bench.empty(128 * 32, dtype=torch.float32)
    bench.run(name, [image, fragment], [out], [fault])
    sums = (a @ b.T + 1.0) * (2.0 if name.endswith("used_d") else 1.0)
    return torch.equal(out, gather(sums, places_of("wgmma_d", 128, 32)).float())


def _reports(way: int) -> Case:
    def case(name: str, fault: int) -> bool:
        bench = Bench(emulated, "cpu")
        out = bench.empty(128)
        bench.run(name, [torch.zeros(1024)], [out], [fault, way], _tensor())
        return bool((out == 7).all())

    return case


FAULTS: dict[str, tuple[str, Case]] = {
    "no barrier": ("fault_no_barrier", _copies),
    "no barrier before reuse": ("fault_no_barrier_before_reuse", _copies),
    "cp.async, no wait": ("fault_cp_async_no_wait", _copies),
    "cp.async, no barrier": ("fault_cp_async_no_barrier", _copies),
    "cp.async, wait of one group too few": ("fault_cp_async_waits_too_few", _copies),
    "tma, no wait": ("fault_tma_no_wait", _loads),
    "tma, too many bytes announced": ("fault_tma_more_bytes", _loads),
    "tma, too few bytes announced": ("fault_tma_less_bytes", _loads),
    "no fence after mbarrier.init": ("fault_no_fence_mbarrier_init", _loads),
    "tma, overtakes the readers": ("fault_tma_no_empty_barrier", _loads),
    "tma store, no proxy fence": ("fault_tma_store_no_fence", _stores),
    "tma store, no barrier": ("fault_tma_store_no_barrier", _stores),
    "tma store, source written anew": ("fault_tma_store_no_wait", _stores),
    "tma store, not committed": ("fault_tma_store_no_wait", _stores_uncommitted),
    "bulk reduction, no proxy fence": ("fault_bulk_reduce_no_fence", _adds),
    "wgmma, no wait": ("fault_wgmma_no_wait", _products),
    "wgmma, no commit": ("fault_wgmma_no_commit", _products),
    "wgmma, a written anew": ("fault_wgmma_overwritten_a", _products),
    "wgmma, b written anew": ("fault_wgmma_overwritten_shared", _products),
    "wgmma, no proxy fence": ("fault_wgmma_no_proxy_fence", _products),
    "wgmma, no fence": ("fault_wgmma_no_fence", _products),
    "wgmma, d used in flight": ("fault_wgmma_used_d", _products),
    "tma store, left in flight": ("fault_left_in_flight", _stores),
}
#: What must be reported, under every schedule, and words of the report.
REPORTED: dict[str, tuple[str, int, str]] = {
    "deadlock at an mbarrier": ("fault_deadlock", 0, "deadlock"),
    "deadlock at a named barrier": ("fault_deadlock", 1, "deadlock"),
    "deadlock of two barriers": ("fault_deadlock", 2, "deadlock"),
    **{
        f"half a warp at {what}": ("fault_divergent", way, "checks_faults")
        for way, what in enumerate(("shuffle", "any", "sync_warp", "ldmatrix", "mma", "elect_one", "wgmma_fence"))
    },
    "cp.async outside": ("fault_bad_address", 0, "cp_async"),
    "cp.async target misaligned": ("fault_bad_address", 1, "cp_async"),
    "cp.async source misaligned": ("fault_bad_address", 2, "cp_async"),
    "ldmatrix outside": ("fault_bad_address", 3, "ldmatrix"),
    "ldmatrix misaligned": ("fault_bad_address", 4, "ldmatrix"),
    "tma outside": ("fault_bad_address", 5, "tma_load"),
    "tma misaligned": ("fault_bad_address", 6, "tma_load"),
    "no mbarrier": ("fault_bad_address", 7, "tma_load"),
    "a plain write outside": ("fault_bad_address", 8, "shared memory"),
    "cp.async of too many bytes": ("fault_bad_address", 9, "cp_async"),
}


def _is_caught(name: str, case: Case, fault: int, seed: int) -> bool:
    emulated.configure(seed=seed)
    try:
        return not case(name, fault)
    except RuntimeError as error:
        if "; seed" not in str(error):  # an error, but not the emulator's
            raise
        return True


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_caught(fault: str) -> None:
    name, case = FAULTS[fault]
    for seed in SEEDS:
        emulated.configure(seed=seed)
        assert case(name, 0), f"the kernel without its fault is wrong under seed {seed}"
    caught = [seed for seed in FAULT_SEEDS if _is_caught(name, case, 1, seed)]
    assert caught, f"no schedule of {len(FAULT_SEEDS)} shows it"


@pytest.mark.parametrize("fault", REPORTED)
def test_a_fault_is_reported(fault: str) -> None:
    name, way, words = REPORTED[fault]
    case = _reports(way)
    for seed in SEEDS:
        emulated.configure(seed=seed)
        assert case(name, 0), f"the kernel without its fault is wrong under seed {seed}"
        with pytest.raises(RuntimeError, match=words) as caught:
            case(name, 1)
        assert "checks_faults.cu:" in str(caught.value) or "plain write" in fault
        assert "thread" in str(caught.value) or "plain write" in fault


def test_all_faults_are_tried() -> None:
    kernels = {name for name in emulated.check_names(90) if name.startswith("fault_")}
    assert kernels == {name for name, _ in FAULTS.values()} | {name for name, _, _ in REPORTED.values()}
