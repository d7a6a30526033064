"""A family that the library does not know: one small file and a call of `register` make its checkpoints loadable."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from models.checkpoints_hf import ABSENT, LLAMA, Case, read
from models.family_qwen2 import QWEN2
from models.oracle_hf import Shelf, load_theirs, worst

from transformer_fast.models import from_pretrained
from transformer_fast.models.families import FAMILIES, register
from transformer_fast.testing import judge

OPTIONS = {key: value for key, value in LLAMA.items() if key != "head_dim"} | dict(num_hidden_layers=3)
WINDOW = dict(use_sliding_window=True, sliding_window=4, max_window_layers=1)
KINDS = ["full_attention", "sliding_attention", "full_attention"]
CASES = [
    Case(
        f"qwen2 {name}", "Qwen2ForCausalLM", "Qwen2Config", OPTIONS | options, "decoder", "next tokens", in_json=in_json
    )
    for name, options, in_json in (
        ("plain", {}, {}),
        ("tied, layer types", WINDOW | dict(tie_word_embeddings=True, layer_types=KINDS), {}),
        ("older file", WINDOW, dict(layer_types=ABSENT)),
        ("older file without the window", dict(max_window_layers=1), dict(layer_types=ABSENT, sliding_window=4)),
    )
]
each_case = pytest.mark.parametrize("case", CASES, ids=[case.id for case in CASES])


@pytest.fixture(scope="module", autouse=True)
def registered() -> Iterator[None]:
    before = dict(FAMILIES)
    register(QWEN2)
    yield
    FAMILIES.clear()
    FAMILIES.update(before)


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory, seed: int) -> Shelf:
    return Shelf(tmp_path_factory.mktemp("checkpoints"), seed)


@each_case
@pytest.mark.parametrize("kind", ["full", "left"])
def test_logits_and_loss(case: Case, kind: str, shelf: Shelf) -> None:
    ours, oracle, runs = shelf.ours(case, kind), shelf.oracle(case, kind), shelf.baselines(case, kind)
    for name in ("logits", "loss"):
        verdict = judge(ours[name], oracle[name], worst([run[name] for run in runs], oracle[name]), name=name)
        assert verdict.passed, str(verdict)


@each_case
def test_saved_for_transformers(case: Case, shelf: Shelf, tmp_path: Path) -> None:
    shelf.model(case).save_pretrained(tmp_path)
    file, again = read(shelf.folder(case)), read(tmp_path)
    assert file.keys() == again.keys()
    assert all(torch.equal(file[name], again[name]) for name in file)
    theirs = load_theirs(case, tmp_path)
    ids = shelf.inputs(case, "full").arguments["input_ids"]
    assert torch.equal(theirs(ids).logits, shelf.theirs(case)(ids).logits)
    assert torch.equal(from_pretrained(tmp_path)(ids).logits, shelf.model(case)(ids).logits)


def test_it_must_be_registered(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(FAMILIES, "qwen2")
    with pytest.raises(ValueError, match="model_type='qwen2' is not known; allowed: bart, bert"):
        from_pretrained(shelf.folder(CASES[0]))
