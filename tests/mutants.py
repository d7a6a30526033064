"""Plants faults in a copy of the tree, one at a time, and tells which test catches each: `make mutants`.

    python tests/mutants.py                # all; exit status 1 if any survives
    python tests/mutants.py --only window  # those whose name contains a word
    python tests/mutants.py --list         # their names
    python tests/mutants.py --check        # only whether every text to be replaced is still there

The faults are data, in tests/mutants/faults.py. The copy is built with one instruction set and little optimisation;
for each fault the pristine objects are put back, so that only what the fault touches is compiled again. Before
anything is planted, every selection of tests must pass on the unchanged copy.
"""

# ruff: noqa: T201 - a program that prints its table
from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.insert(0, str(HERE / "mutants"))

from faults import FAULTS, Fault  # noqa: E402 - from tests/mutants/

COPIED = (
    "transformer_fast",
    "csrc",
    "kernels",
    "benchmarks",
    "tests",
    "setup.py",
    "pyproject.toml",
    "README.md",
    "LICENSE",
)
TIMEOUT = 300  # seconds; a fault may well make a loop endless
SEED = "1"  # the same inputs on the pristine and the faulty copy, so that only the fault makes the difference


@dataclass(frozen=True)
class Outcome:
    """What became of one fault."""

    fault: Fault
    caught_by: str | None  # None: it survived
    seconds: float


def snapshot(target: Path) -> Path:
    """Everything that is needed to build and test, as it is now: the checkout may change while this runs."""
    target.mkdir(parents=True)
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, target / name, ignore=shutil.ignore_patterns("*.so", "__pycache__", ".*"))
        elif (ROOT / name).exists():
            shutil.copy2(ROOT / name, target / name)
    return target


class Copy:
    """A copy of the tree, built for one instruction set, into which faults are planted."""

    def __init__(self, sources: Path, folder: Path, isa: str) -> None:
        self.isa = isa
        self.tree, self.built = folder / "tree", folder / "pristine-build"
        shutil.copytree(sources, self.tree)
        problem = self.build()
        if problem:
            raise SystemExit(f"the unchanged copy does not build:\n{problem}")
        shutil.copytree(self.tree / "build", self.built)
        self._check_that_the_copy_is_tested()

    def _environment(self) -> dict[str, str]:
        forced = {"TRANSFORMER_FAST_SANITIZE", "TRANSFORMER_FAST_CPU_ISA"}
        clean = {name: value for name, value in os.environ.items() if name not in forced}
        return clean | {
            "PYTHONPATH": str(self.tree),
            "PYTHONDONTWRITEBYTECODE": "1",
            "TRANSFORMER_FAST_ISAS": self.isa,
            "CXXFLAGS": "-O1 -w",
        }

    def _run(self, *command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *command],
            cwd=self.tree,
            env=self._environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            timeout=TIMEOUT,
        )

    def _check_that_the_copy_is_tested(self) -> None:
        done = self._run("-c", "import transformer_fast._C_cpu as m; print(m.__file__, m.available_isas())")
        if done.returncode or str(self.tree) not in done.stdout or self.isa not in done.stdout:
            raise SystemExit(f"not the copy in {self.tree} with {self.isa} is imported, but:\n{done.stdout}")

    def build(self) -> str | None:
        """Compile what has changed; the compiler's words if that fails."""
        done = self._run("setup.py", "--quiet", "build_ext", "--inplace")
        return done.stdout if done.returncode else None

    def restore(self) -> None:
        """The pristine objects, with their times, so that ninja sees the planted change and no other."""
        shutil.rmtree(self.tree / "build")
        shutil.copytree(self.built, self.tree / "build")

    def first_failure(self, tests: tuple[str, ...]) -> str | None:
        """The first test of a selection that fails; None if all pass."""
        try:
            done = self._run("-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--seed", SEED, "--tb=no", *tests)
        except subprocess.TimeoutExpired:
            return "the tests did not end"
        if done.returncode == 0:
            return None
        failed = re.search(r"^(?:FAILED|ERROR) \S*?([^/\s]+\.py\S*)", done.stdout, re.MULTILINE)
        if failed:
            return failed[1]
        if done.returncode < 0:
            return f"a crash (signal {-done.returncode})"
        raise SystemExit(f"pytest could not run {' '.join(tests)}:\n{done.stdout[-3000:]}")

    def plant(self, fault: Fault) -> Outcome:
        """Plant one fault, run its tests, and take it out again."""
        begin = time.monotonic()
        target = self.tree / fault.file
        text, times = target.read_text(encoding="utf-8"), target.stat()
        target.write_text(text.replace(fault.old, fault.new), encoding="utf-8")
        try:
            if fault.file.startswith("csrc/"):
                problem = self.build()
                if problem:
                    raise SystemExit(f"with the fault {fault.name!r} the copy does not build:\n{problem[-3000:]}")
            caught_by = self.first_failure(fault.tests)
        finally:
            target.write_text(text, encoding="utf-8")
            os.utime(target, ns=(times.st_atime_ns, times.st_mtime_ns))
            if fault.file.startswith("csrc/"):
                self.restore()
        return Outcome(fault, caught_by, time.monotonic() - begin)

    def rebuild_pristine(self) -> None:
        """After the last native fault the module must be the unchanged one again."""
        self.restore()
        self.build()


def rotten(faults: list[Fault], tree: Path) -> list[str]:
    """Faults whose text is not found exactly once in the tree."""
    complaints = []
    for fault in faults:
        file = tree / fault.file
        found = file.read_text(encoding="utf-8").count(fault.old) if file.exists() else 0
        if found != 1:
            complaints.append(f"{fault.name}: found {found} times in {fault.file}: {fault.old!r}")
    names = [fault.name for fault in faults]
    complaints += [f"{name}: the name of two faults" for name in {n for n in names if names.count(n) > 1}]
    return complaints


def machine_has(isa: str) -> bool:
    program = "import transformer_fast._C_cpu as m; print(*m.available_isas())"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    return isa in done.stdout.split()


def check_pristine(copy: Copy, faults: list[Fault]) -> None:
    """A test that fails anyhow catches nothing."""
    for tests in dict.fromkeys(fault.tests for fault in faults):
        failure = copy.first_failure(tests)
        if failure:
            raise SystemExit(f"without any fault this fails already: {failure}\n  of: {' '.join(tests)}")
        print(f"  passes unchanged: {' '.join(tests)}", flush=True)


def run(faults: list[Fault], sources: Path, folder: Path) -> list[Outcome]:
    outcomes = []
    for isa in dict.fromkeys(fault.isa for fault in faults):
        mine = [fault for fault in faults if fault.isa == isa]
        print(f"{len(mine)} faults, built for {isa}", flush=True)
        copy = Copy(sources, folder / isa, isa)
        check_pristine(copy, mine)
        # Python faults after the native ones, which leave a faulty module behind.
        native = [fault for fault in mine if fault.file.startswith("csrc/")]
        others = [fault for fault in mine if fault not in native]
        for i, fault in enumerate([*native, *others]):
            if i == len(native) and native:
                copy.rebuild_pristine()
            outcome = copy.plant(fault)
            outcomes.append(outcome)
            verdict = outcome.caught_by or "SURVIVED"
            print(f"  {outcome.seconds:5.1f} s  {fault.name:<62} {verdict}", flush=True)
    return outcomes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="plant only faults whose name contains this")
    parser.add_argument("--list", action="store_true", help="print the names and stop")
    parser.add_argument("--check", action="store_true", help="check that every text is still found, and stop")
    options = parser.parse_args()
    faults = [fault for fault in FAULTS if options.only in fault.name]
    if options.list:
        print(*(f"{fault.name}  [{fault.file}]" for fault in faults), sep="\n")
        return 0
    for isa in sorted({fault.isa for fault in faults} - {"portable"}):
        if not options.check and not machine_has(isa):
            print(f"this machine has no {isa}: {sum(f.isa == isa for f in faults)} faults are left out")
            faults = [fault for fault in faults if fault.isa != isa]
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="transformer_fast-mutants-") as folder:
        sources = snapshot(Path(folder, "sources"))
        complaints = rotten(FAULTS, sources)
        if complaints:
            print("These faults no longer fit the code; move them along:", *complaints, sep="\n  ", file=sys.stderr)
            return 2
        if options.check:
            return 0
        outcomes = run(faults, sources, Path(folder))
    survivors = [outcome.fault for outcome in outcomes if outcome.caught_by is None]
    print(f"\n{len(outcomes) - len(survivors)} of {len(outcomes)} faults caught in {time.monotonic() - begin:.0f} s")
    for fault in survivors:
        print(f"SURVIVED: {fault.name}  [{fault.file}]")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
