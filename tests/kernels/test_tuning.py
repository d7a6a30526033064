"""Tuning: it times, keeps and is obeyed. What it finds in the interpreter means nothing but that it works."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformer_fast.kernels import configs

from transformer_fast import UnsupportedError, attention, ops
from transformer_fast.backends import triton_tuning
from transformer_fast.backends.triton import _machine
from transformer_fast.testing import Case, Target, check


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "folder" / "tuning.json"
    monkeypatch.setenv(triton_tuning.CACHE_VARIABLE, str(path))
    ops._runners.clear()
    return path


def test_what_is_found_is_kept_and_used(file: Path) -> None:
    x = torch.randn(1, 2, 100, 16)
    ratios = triton_tuning.tune(x, x, x, repeats=1, causal=True)
    assert set(ratios) == {"forward", "dkdv", "dq"}
    assert all(len(times) > 1 and next(iter(times.values())) == 1.0 for times in ratios.values())
    known = json.loads(file.read_text())
    assert len(known) == 3

    machine = _machine(x.device)
    row = configs.config_for(machine, "forward", 16, 4)
    other = row._replace(block_n=32)
    key = next(key for key in known if "forward" in key)
    file.write_text(json.dumps(known | {key: list(other)}))
    triton_tuning._findings.cache_clear()
    assert triton_tuning.found(machine, "forward", 16, 4, "ieee") == other
    assert triton_tuning.found(machine, "forward", 200, 4, "ieee") is None
    case = Case("tuned", "tuned", batch=1, num_heads=2, seqlen_q=100, seqlen_k=100, head_dim=16, causal=True)
    outcome = check(case, torch.float32, Target("triton"))
    assert outcome.passed, f"\n{outcome}"


def test_candidates_begin_with_the_row_and_differ() -> None:
    for capability in (80, 86, 90, 100):
        machine = configs.Machine(capability, 100, 50 << 20)
        for phase in ("forward", "decode", "dq"):
            for head_dim in configs.HEAD_DIMS:
                for itemsize in (2, 4):
                    found = configs.candidates(machine, phase, head_dim, itemsize)
                    assert found[0] == configs.config_for(machine, phase, head_dim, itemsize)
                    assert len(set(found)) == len(found)


def test_what_cannot_be_tuned_is_said(file: Path) -> None:
    x = torch.randn(1, 2, 9, 8, dtype=torch.float64)
    with pytest.raises(UnsupportedError, match="float64"):
        triton_tuning.tune(x, x, x)
    with pytest.raises(ValueError, match="dropout_p is 0"):
        triton_tuning.tune(x.float(), x.float(), x.float(), dropout_p=0.1)


@pytest.mark.parametrize("text", ["{bad", "[1]", '{"a": [1, 2]}', '{"a": 3}'])
def test_a_broken_file_stops_nobody(file: Path, text: str) -> None:
    file.parent.mkdir()
    file.write_text(text)
    x = torch.randn(1, 2, 9, 8)
    with pytest.warns(RuntimeWarning, match="passed over"):
        attention(x, x, x, backend="triton")


def test_the_number_of_splits() -> None:
    """One where the tiles fill the machine; never parts of MIN_SPLIT_BLOCKS blocks or fewer; else the waves filled."""
    assert configs.num_splits(jobs=0, slots=132, blocks=1000) == 1  # an empty batch
    assert configs.num_splits(jobs=106, slots=132, blocks=1000) == 1
    for blocks in range(1, 200):
        splits = configs.num_splits(jobs=8, slots=132, blocks=blocks)
        assert splits == 1 or blocks // splits > configs.MIN_SPLIT_BLOCKS
    assert configs.num_splits(jobs=8, slots=132, blocks=9) == 1
    assert configs.num_splits(jobs=1, slots=132, blocks=10_000) > 100
    assert configs.num_splits(jobs=64, slots=132, blocks=10_000) == 2
