"""The documentation says what is so: its code runs, its links lead somewhere, its site builds.

The ```python blocks of a page run one after the other and share their variables. A ```text block right after one is
what it prints, with "..." for what may differ. A block that cannot run here has a comment on the line before it:
`<!-- not run: the reason -->`.
"""

from __future__ import annotations

import contextlib
import doctest
import importlib.util
import io
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import transformer_fast
from transformer_fast import backends

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
README = ROOT / "README.md"
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)

_AS_SAID = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
_FENCE = re.compile(r"^```(?P<kind>[^\n]*)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)
_NOT_RUN = re.compile(r"<!-- not run: \S.* -->\n\Z")
_LINK = re.compile(r"(?<!!)\[[^\]]*\]\((?P<target>[^)\s]+)\)")


@dataclass(frozen=True)
class Block:
    """A block of Python in a page, and what it is said to print."""

    line: int
    code: str
    printed: str | None


def blocks_of(text: str) -> Iterator[Block]:
    fences = list(_FENCE.finditer(text))
    for fence, following in zip_longest(fences, fences[1:]):
        if fence["kind"] != "python" or _NOT_RUN.search(text[: fence.start()]):
            continue
        printed = None
        if following is not None and following["kind"] == "text" and not text[fence.end() : following.start()].strip():
            printed = following["code"]
        yield Block(text.count("\n", 0, fence.start()) + 2, fence["code"], printed)


def run_page(path: Path, variables: dict[str, Any]) -> int:
    """Run a page's blocks; returns how many there were."""
    count = 0
    for block in blocks_of(path.read_text()):
        code = compile("\n" * (block.line - 1) + block.code, str(path), "exec")
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(code, variables)
        if block.printed is not None:
            same = doctest.OutputChecker().check_output(block.printed, printed.getvalue(), _AS_SAID)
            assert same, f"{path.name}:{block.line} prints\n{printed.getvalue()}and not\n{block.printed}"
        count += 1
    return count


@pytest.fixture
def _alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """In a folder of its own, with what a page changes of PyTorch put back."""
    monkeypatch.chdir(tmp_path)
    before = torch.nn.functional.scaled_dot_product_attention
    yield
    assert torch.nn.functional.scaled_dot_product_attention is before, "a page left accelerate() active"
    assert "flash_attn" not in sys.modules, "a page left install_as_flash_attn() active"


@pytest.mark.usefixtures("_alone")
@pytest.mark.skipif(not backends()["cpu"].available, reason="the pages say what the CPU back end does")  # type: ignore[operator]
@each_page
def test_the_code_of_a_page_runs(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if "transformers" in "".join(block.code for block in blocks_of(page.read_text())):
        pytest.importorskip("transformers")
    torch.manual_seed(0)
    module = ModuleType(f"docs_{page.stem}")
    monkeypatch.setitem(sys.modules, module.__name__, module)  # compilers look functions' globals up there
    count = run_page(page, vars(module))
    assert count or "```python" not in page.read_text()


@pytest.mark.usefixtures("_alone")
def test_the_code_of_the_readme_runs() -> None:
    """With a small random checkpoint where it says "folder or hub id"."""
    transformers = pytest.importorskip("transformers")
    sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, vocab_size=31)
    config = transformers.LlamaConfig(**sizes, num_key_value_heads=1, bos_token_id=1, eos_token_id=2)
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained("folder or hub id")
    ids = torch.arange(3, 11).view(2, 4)
    assert run_page(README, {"ids": ids, "mask": torch.ones_like(ids), "labels": ids}) >= 2


def slug(heading: str) -> str:
    """The anchor that a heading gets."""
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower())


def prose(path: Path) -> str:
    return _FENCE.sub("", path.read_text())


@pytest.mark.parametrize("page", [*PAGES, README], ids=lambda page: page.name)
def test_links_within_the_project_lead_somewhere(page: Path) -> None:
    for link in _LINK.finditer(prose(page)):
        file, _, anchor = link["target"].partition("#")
        if "://" in file or file.startswith("mailto:"):
            continue
        target = (page.parent / file) if file else page
        assert target.exists(), f"{page.name} links to {link['target']}, which is not there"
        if anchor and target.suffix == ".md":
            headings = re.findall(r"^#+ (.*)$", prose(target), re.MULTILINE)
            assert anchor in map(slug, headings), f"{page.name} links to {link['target']}; {file} has no such heading"
        if page != README:
            assert target.resolve().parent == DOCS, f"{page.name} links to {link['target']}, which is not on the site"


def test_the_navigation_has_every_page() -> None:
    listed = re.findall(r"^\s*- .*: (\w+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert sorted(listed) == [page.name for page in PAGES]


def test_every_drop_in_is_on_a_page() -> None:
    from transformer_fast import dropin, flash_attn

    text = "".join(prose(page) + page.read_text() for page in PAGES)
    names = {*dropin.__all__, *flash_attn.__all__, *transformer_fast.__all__} - {"__version__"}
    missing = sorted(name for name in names if name not in text)
    assert not missing


@pytest.mark.skipif(importlib.util.find_spec("material") is None, reason="mkdocs-material is not installed (make docs)")
def test_the_site_builds(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "index.html").exists()
