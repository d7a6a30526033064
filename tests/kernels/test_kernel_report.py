"""The gate of the kernel report fires for each fault, planted in real code compiled for real targets, and only then."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from transformer_fast.cli import app
from transformer_fast.testing import kernel_gate as gate
from transformer_fast.testing import kernel_report, triton_kernels
from transformer_fast.testing.kernel_gate import Kernel, UnavailableError, judge, read_baseline, write_baseline
from transformer_fast.testing.kernel_report import LANGUAGES, KernelReport, Part
from transformer_fast.testing.machine_code import MachineCode

pytest.importorskip("triton")


@pytest.fixture(scope="module")
def codes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, MachineCode]:
    """The facts about all variants of the toy kernel, compiled once, by a process without the interpreter."""
    path = tmp_path_factory.mktemp("toy") / "codes.pickle"
    program = Path(__file__).with_name("toy_attention.py")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(path.with_name("cache"))
    done = subprocess.run([sys.executable, program, path], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return pickle.loads(path.read_bytes())


@pytest.fixture
def kernel(codes: dict[str, MachineCode]) -> Callable[..., Kernel]:
    """Makes the row of a variant that claims to be as good as the good one."""

    def make(which: str, **changes: Any) -> Kernel:
        good = Kernel(
            phase="forward",
            variant="bf16 64",
            capability=90,
            tile=(128, 64),
            num_warps=8,
            num_stages=2,
            promised_ctas=2,
            needs_tensor_cores=True,
            needs_tma=True,
            code=codes[which],
        )
        return dataclasses.replace(good, **changes)

    return make


def baseline_of(tmp_path: Path, *kernels: Kernel) -> dict[int, dict[str, Any]]:
    path = tmp_path / f"baseline_{len(list(tmp_path.iterdir()))}.json"
    write_baseline(path, "3.7", kernels)
    baseline = read_baseline(path, "3.7")
    assert baseline is not None
    return baseline


# ------------------------------------------------------------------------------------------------------ the rules


def test_good_kernels_pass(kernel: Callable[..., Kernel], tmp_path: Path) -> None:
    kernels = [
        kernel("good"),
        kernel("good on sm_80", capability=80, needs_tma=False, promised_ctas=1),
        kernel("good on sm_100", capability=100, promised_ctas=1),
        kernel("small tile", phase="decode", tile=(16, 64), num_warps=4),
        kernel("float32", variant="fp32 64", needs_tensor_cores=False, tile=(32, 16)),
    ]
    assert judge(kernels, None) == []
    assert judge(kernels, baseline_of(tmp_path, *kernels)) == []


@pytest.mark.parametrize(
    ("rule", "variant", "changes", "words"),
    [
        (gate.spills, "wide tile", {}, "spilled registers"),
        (gate.tensor_cores, "small tile", {}, "48 HMMA; allowed: HGMMA alone"),
        (gate.tensor_cores, "float32", {}, "none; allowed: HGMMA alone"),
        (gate.tensor_cores, "good on sm_80", {"capability": 100}, "192 HMMA; allowed: UTCHMMA alone"),
        (gate.serialization, "too few warps", {}, "serialized its wgmma"),
        (gate.tma, "pointers", {}, "[0, 0, 0]; allowed: at least 1 in each"),
        (gate.occupancy, "many stages", {}, "1 CTAs fit"),
        (gate.occupancy, "wide tile", {"promised_ctas": 1}, "0 CTAs fit"),
    ],
    ids=lambda value: getattr(value, "__name__", value) if isinstance(value, str) or callable(value) else "",
)
def test_a_fault_breaks_its_rule(
    kernel: Callable[..., Kernel], rule: gate.Rule, variant: str, changes: dict[str, Any], words: str
) -> None:
    faulty = kernel(variant, **changes)
    (sentence,) = rule(faulty, faulty.code, {})
    assert words in sentence
    assert any(sentence in failure and faulty.where in failure for failure in judge([faulty], None))
    good = kernel("good")
    assert not list(rule(good, good.code, {}))


def test_a_longer_loop_breaks_the_rule(kernel: Callable[..., Kernel], tmp_path: Path) -> None:
    baseline = baseline_of(tmp_path, kernel("good"))
    failures = judge([kernel("longer loop")], baseline)
    assert [("full" in f, "masked" in f) for f in failures] == [(True, False), (False, True)]
    assert all("instructions in a turn" in f and "3% more than the baseline's" in f for f in failures)


def test_growth_is_forgiven_up_to_3_percent(kernel: Callable[..., Kernel], tmp_path: Path) -> None:
    good = kernel("good")
    assert good.code is not None and good.code.full is not None
    baseline = baseline_of(tmp_path, good)

    def grown_to(length: int) -> Kernel:
        loops = (good.code.loops[0], dataclasses.replace(good.code.full, instructions=length), good.code.loops[2])
        return dataclasses.replace(good, code=dataclasses.replace(good.code, loops=loops))

    most = int(good.code.full.instructions * 1.03)
    assert judge([grown_to(most)], baseline) == []
    assert len(judge([grown_to(most + 1)], baseline)) == 1
    assert judge([grown_to(100)], baseline) == []  # shorter is welcome


def test_lost_loops_are_no_way_out(kernel: Callable[..., Kernel], tmp_path: Path) -> None:
    good = kernel("good", needs_tensor_cores=False, needs_tma=False)
    baseline = baseline_of(tmp_path, good)
    assert good.code is not None
    lost = dataclasses.replace(good, code=dataclasses.replace(good.code, loops=()))
    failures = judge([lost], baseline)
    assert sum("loop was not found" in failure for failure in failures) == 2
    assert sum("TMA loads" in failure for failure in failures) == 1


def test_what_may_spill_spills_no_more_than_before(kernel: Callable[..., Kernel], tmp_path: Path) -> None:
    wide = kernel("wide tile", promised_ctas=0, may_spill=True)
    assert wide.code is not None
    assert judge([wide], baseline_of(tmp_path, wide)) == []
    fewer = dataclasses.replace(wide, code=dataclasses.replace(wide.code, spills=wide.code.spills // 2))
    (failure,) = judge([wide], baseline_of(tmp_path, fewer))
    assert "spilled registers" in failure


def test_what_does_not_compile_fails(kernel: Callable[..., Kernel]) -> None:
    (failure,) = judge([kernel("good", code=None, error="CompilationError: no such thing")], None)
    assert failure == "forward (bf16 64) for sm_90: does not compile: CompilationError: no such thing"


def test_new_and_vanished_kernels_fail(kernel: Callable[..., Kernel], tmp_path: Path) -> None:
    old, new = kernel("good", variant="old"), kernel("good", variant="new")
    failures = judge([new], baseline_of(tmp_path, old))
    assert len(failures) == 2
    assert "forward (new) for sm_90: is not in the baseline" in failures[0]
    assert "forward / old for sm_90: is in the baseline and was not compiled" in failures[1]
    on_another = dataclasses.replace(old, capability=80, needs_tma=False)
    assert judge([new], baseline_of(tmp_path, on_another, new)) == []  # a capability that was not asked for


def test_the_baseline_keeps_what_was_not_compiled(kernel: Callable[..., Kernel], tmp_path: Path) -> None:
    path = tmp_path / "baseline.json"
    write_baseline(path, "3.6", [kernel("good")])
    write_baseline(path, "3.7", [kernel("good"), kernel("good on sm_80", capability=80)])
    write_baseline(path, "3.7", [kernel("longer loop")])
    data = json.loads(path.read_text())
    assert list(data) == ["3.6", "3.7"] and list(data["3.7"]) == ["80", "90"]
    assert data["3.7"]["90"]["forward / bf16 64"]["full"] > data["3.6"]["90"]["forward / bf16 64"]["full"]
    assert read_baseline(path, "3.8") is None


# ----------------------------------------------------------------------------------------------------- the command

Run = Callable[..., Result]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs the command in an empty directory, with baselines there, and no C++ kernels."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TRITON_INTERPRET")
    change_language(monkeypatch, "triton", baseline=lambda: tmp_path / "baseline.json")
    change_language(monkeypatch, "cuda", version=unavailable("nvcc is not here"))

    def invoke(*arguments: str) -> Result:
        result = CliRunner().invoke(app, ["kernels", *arguments])
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return invoke


def change_language(monkeypatch: pytest.MonkeyPatch, name: str, **changes: Any) -> None:
    monkeypatch.setitem(LANGUAGES, name, dataclasses.replace(LANGUAGES[name], **changes))


def unavailable(reason: str) -> Callable[[], str]:
    def version() -> str:
        raise UnavailableError(reason)

    return version


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[Kernel]:
    """What the command compiles; the tests fill it."""
    kernels: list[Kernel] = []
    change_language(monkeypatch, "triton", kernels=lambda **options: list(kernels))
    return kernels


def test_the_command(run: Run, compiled: list[Kernel], kernel: Callable[..., Kernel], tmp_path: Path) -> None:
    compiled.append(kernel("good"))
    result = run()
    assert result.exit_code == 0 and "no baseline for this version" in result.output
    assert run("--update-baseline").exit_code == 0
    result = run()
    assert result.exit_code == 0 and "no baseline" not in result.output
    assert "128x64 w8 s2" in result.output and "24 HGMMA" in result.output and "1w 2m 3b" in result.output
    data = json.loads((tmp_path / "reports/kernels/kernels.json").read_text())
    assert data["passed"] and data["kernels"][0]["code"]["registers"] == compiled[0].code.registers
    assert data["compilers"].keys() == {"Triton"} and data["kernels"][0]["language"] == "Triton"
    assert "| bf16 64 | forward | 128x64 w8 s2 |" in (tmp_path / "reports/kernels/kernels.md").read_text()

    compiled[:] = [kernel("longer loop")]
    result = run("--output", "out")
    assert result.exit_code == 1 and "FAILED: 2 broken rules" in result.output
    assert "instructions in a turn of its full loop" in (tmp_path / "out/kernels.md").read_text()


def test_a_spill_stays_a_failure_in_a_new_baseline(
    run: Run, compiled: list[Kernel], kernel: Callable[..., Kernel]
) -> None:
    compiled.append(kernel("wide tile", promised_ctas=0))
    result = run("--update-baseline")
    assert result.exit_code == 1 and "spilled registers" in result.output


def test_wrong_usage(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    result = run("--capability", "70")
    assert result.exit_code == 2 and "capability is 70; allowed: 80" in result.output
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    result = run()
    assert result.exit_code == 2 and "TRITON_INTERPRET is 1" in result.output
    monkeypatch.delenv("TRITON_INTERPRET")
    result = run("--only", "tritium")
    assert result.exit_code == 2 and "only is 'tritium'; allowed: triton, cuda" in result.output
    monkeypatch.setitem(sys.modules, "triton", None)
    result = run()
    assert result.exit_code == 2 and "pip install triton" in result.output and "nvcc is not here" in result.output


def test_kernels_in_both_languages(
    run: Run, compiled: list[Kernel], kernel: Callable[..., Kernel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each has its own compiler, baseline and tables; a failure of either is one of the report."""
    compiled.append(kernel("good"))
    in_cpp = kernel("good", family=90, num_stages=0)
    cpp = {"version": lambda: "13.0", "baseline": lambda: tmp_path / "cpp.json", "kernels": lambda **options: [in_cpp]}
    change_language(monkeypatch, "cuda", **cpp)
    result = run("--update-baseline")
    assert result.exit_code == 0 and f"1 kernels by Triton {triton_kernels.triton_version()}" in result.output
    assert "1 kernels by nvcc 13.0" in result.output
    assert "Triton, sm_90" in result.output and "C++, sm_90" in result.output
    assert json.loads((tmp_path / "cpp.json").read_text()).keys() == {"13.0"}
    assert "## C++, sm_90" in (tmp_path / "reports/kernels/kernels.md").read_text()

    in_cpp = kernel("longer loop", family=90, num_stages=0)
    assert run().exit_code == 1
    assert run("--only", "triton").exit_code == 0
    assert run("--only", "cuda").exit_code == 1


@pytest.mark.parametrize(("missing", "name"), [("triton", "Triton"), ("cuda", "C++")])
def test_what_is_missing_is_said_and_passed_over(
    missing: str, name: str, run: Run, compiled: list[Kernel], kernel: Callable[..., Kernel],
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    compiled.append(kernel("good"))
    there = {"version": lambda: "13.0", "baseline": lambda: tmp_path / "x.json", "kernels": lambda **_: list(compiled)}
    change_language(monkeypatch, "cuda", **there)
    change_language(monkeypatch, missing, version=unavailable("it is lost"))
    result = run()
    sentence = f"the kernels in {name}, since it is lost"
    assert result.exit_code == 0 and f"not judged: {sentence}" in result.output
    assert sentence in (tmp_path / "reports/kernels/kernels.md").read_text()
    result = run("--only", missing)
    assert result.exit_code == 2 and "it is lost" in result.output


def test_quick_is_one_capability(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    report = KernelReport((Part("Triton", "Triton 3.7.1", (), (), "3.7"),), (), 0.0, {"date": "today"})
    monkeypatch.setattr(kernel_report, "report", lambda which, *_, **options: asked.append(which) or report)
    run("--quick")
    run("--capability", "86", "--capability", "90")
    run()
    assert asked == [[90], [86, 90], None]


# ---------------------------------------------------------------------------------------------------- the real thing


def test_the_committed_baseline_is_complete() -> None:
    """For every version, the same kernels on each capability; what they are is compared by the report itself."""
    data = json.loads(gate.baseline_path().read_text())
    assert "3.7" in data
    for capabilities in data.values():
        assert set(map(int, capabilities)) == set(triton_kernels.CAPABILITIES)


def test_every_row_of_the_table_is_compiled() -> None:
    """All phases, head dims and element sizes of kernels/configs.py have a case."""
    from transformer_fast.kernels.configs import HEAD_DIMS, PHASES

    halves = ("dk", "dv")  # one row for both: "dkdv"
    wanted = {(phase, d, size) for phase in PHASES if phase not in halves for d in HEAD_DIMS for size in (2, 4)}
    for case in triton_kernels.CASES:
        for launch in triton_kernels.launches(case, 90):
            row = "dkdv" if launch.phase in halves else launch.phase
            wanted.discard((row, case.head_dim, case.dtype.itemsize))
    assert not wanted
