"""``import flash_attn`` with no flash-attn there: what answers, when it refuses, and that it goes away again."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from dropin.promised import PROMISED

import transformer_fast.flash_attn as ours
from transformer_fast.flash_attn import install as install_module
from transformer_fast.flash_attn import install_as_flash_attn, uninstall_as_flash_attn

NAMES = {f"flash_attn{inner}": is_package for inner, is_package in install_module._MODULES.items()}

if importlib.util.find_spec("flash_attn") is not None:
    pytest.skip("a flash_attn is installed here", allow_module_level=True)


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    yield
    uninstall_as_flash_attn()
    assert not any(name.partition(".")[0] == "flash_attn" for name in sys.modules)


def test_third_party_imports() -> None:
    install_as_flash_attn()
    code = """
import flash_attn
from flash_attn import (flash_attn_func, flash_attn_kvpacked_func, flash_attn_qkvpacked_func, flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func, flash_attn_varlen_qkvpacked_func, flash_attn_with_kvcache)
from flash_attn.flash_attn_interface import flash_attn_func as again, _get_block_size_n
from flash_attn.bert_padding import pad_input, unpad_input, index_first_axis, index_put_first_axis
from flash_attn.bert_padding import unpad_input_for_concatenated_sequences
from flash_attn.layers.rotary import RotaryEmbedding, apply_rotary_emb, apply_rotary_emb_func, apply_rotary_emb_torch
from flash_attn.ops.triton.rotary import apply_rotary
from flash_attn.ops.rms_norm import rms_norm
import flash_attn.layers.rotary as by_name
"""
    names: dict[str, object] = {}
    exec(code, names)
    assert names["flash_attn_func"] is names["again"] is ours.flash_attn_func
    assert names["by_name"] is sys.modules["flash_attn.layers.rotary"]
    q = torch.randn(1, 5, 2, 8)
    assert torch.equal(sys.modules["flash_attn"].flash_attn_func(q, q, q), ours.flash_attn_func(q, q, q))


@pytest.mark.parametrize("name", NAMES)
def test_specs_and_modules(name: str) -> None:
    install_as_flash_attn()
    spec, module = importlib.util.find_spec(name), sys.modules[name]
    assert spec is not None and spec.name == name and module.__spec__ is spec and module.__name__ == name
    assert (spec.submodule_search_locations is not None) == NAMES[name] == hasattr(module, "__path__")
    assert module.__version__ == "2.8.3" and Path(str(module.__file__)).exists() and module.__doc__
    assert importlib.reload(module) is module
    parent, _, last = name.rpartition(".")
    assert not parent or getattr(sys.modules[parent], last) is module


def test_distribution() -> None:
    """What transformers and others ask before they import."""
    before = importlib.metadata.packages_distributions()
    with install_as_flash_attn():
        assert importlib.metadata.version("flash-attn") == importlib.metadata.version("flash_attn") == "2.8.3"
        assert importlib.metadata.packages_distributions() == before | {"flash_attn": ["flash-attn"]}
        with pytest.raises(importlib.metadata.PackageNotFoundError):
            importlib.metadata.version("flash-attn-3")
        assert importlib.metadata.version("torch")
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version("flash-attn")
    assert importlib.metadata.packages_distributions() == before


@pytest.mark.parametrize("name", ["flash_attn.cute", "flash_attn.options", "flash_attn.layers.patch_embed"])
def test_what_is_not_there(name: str) -> None:
    with install_as_flash_attn(), pytest.raises(ModuleNotFoundError, match=name):
        importlib.import_module(name)


def test_undone() -> None:
    finders = list(sys.meta_path)
    installation = install_as_flash_attn()
    assert install_as_flash_attn() is installation
    installation.restore()
    assert sys.meta_path == finders and importlib.util.find_spec("flash_attn") is None
    with pytest.raises(ModuleNotFoundError, match="flash_attn"):
        importlib.import_module("flash_attn")
    installation.restore()
    with install_as_flash_attn() as second:
        installation.restore()  # of an installation that is over: touches no later one
        assert "flash_attn" in sys.modules and second is not installation


def is_installed() -> bool:
    return "flash_attn" in sys.modules


def test_with_inside_with() -> None:
    with install_as_flash_attn() as outer:
        with install_as_flash_attn() as inner:
            assert inner is outer
        assert is_installed()
        with outer:
            assert is_installed()
        assert is_installed()
    assert not is_installed()


def test_with_after_a_plain_call() -> None:
    installation = install_as_flash_attn()
    with install_as_flash_attn():
        assert is_installed()
    assert is_installed()
    installation.restore()
    assert not is_installed()


def test_a_plain_call_inside_with_stays() -> None:
    with install_as_flash_attn():
        install_as_flash_attn()
    assert is_installed()
    with install_as_flash_attn() as installation:
        installation.restore()  # at once, whoever else asked for it
        assert not is_installed()


def test_with_of_an_installation_made_before() -> None:
    installation = install_as_flash_attn()
    with installation:
        assert is_installed()
    assert not is_installed()


@pytest.fixture
def another_flash_attn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An installed package of that name, with a module inside."""
    package = tmp_path / "flash_attn"
    package.mkdir()
    (package / "__init__.py").write_text("__version__ = '9.9'\n")
    (package / "own.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "flash_attn"]:
        del sys.modules[name]


@pytest.mark.usefixtures("another_flash_attn")
def test_refuses_where_another_is_installed() -> None:
    with pytest.raises(RuntimeError, match=r"flash_attn is there already: .*__init__.py; allowed: .*force=True"):
        install_as_flash_attn()
    assert importlib.import_module("flash_attn").__version__ == "9.9"


@pytest.mark.usefixtures("another_flash_attn")
@pytest.mark.parametrize("imported", [False, True])
def test_force_hides_another_for_a_while(imported: bool) -> None:
    theirs = importlib.import_module("flash_attn.own") if imported else None
    with install_as_flash_attn(force=True):
        assert importlib.import_module("flash_attn").__version__ == "2.8.3"
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module("flash_attn.own")
    assert importlib.import_module("flash_attn").__version__ == "9.9"
    again = importlib.import_module("flash_attn.own")
    assert theirs is None or again is theirs


def test_refuses_a_module_without_a_spec(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn", ModuleType("flash_attn"))
    with pytest.raises(RuntimeError, match=r"already: a module in sys\.modules"):
        install_as_flash_attn()
    monkeypatch.undo()


def run(code: str) -> None:
    """In a process of its own, since transformers asks once, when it is imported."""
    done = subprocess.run([sys.executable, "-c", code, str(PROMISED)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_importing_is_cheap() -> None:
    heavy = "transformers", "torch.nn.attention.flex_attention", "torch._dynamo", "einops"
    code = "import sys, torch; before = set(sys.modules); import transformer_fast.flash_attn\n"
    run(code + f"assert not (set({heavy!r}) & set(sys.modules) - before)")


def test_transformers_runs_on_it() -> None:
    """transformers takes it where it would take flash-attn (it asks for a CUDA device, which is played here)."""
    pytest.importorskip("transformers")
    run("""
import sys
import torch
from transformer_fast.flash_attn import install_as_flash_attn
install_as_flash_attn()
import transformers
from transformers.utils import import_utils
from transformers import LlamaConfig, LlamaForCausalLM, modeling_flash_attention_utils as utils, modeling_utils
assert not import_utils.is_flash_attn_2_available()  # for want of a CUDA device only
import_utils.is_flash_attn_2_available.cache_clear()
import_utils.is_torch_cuda_available = lambda: True
assert import_utils.is_flash_attn_2_available()
row = utils.FLASH_ATTENTION_COMPATIBILITY_MATRIX[2]
row["supported_devices"] = ((lambda: True, "cpu"),)
config = LlamaConfig(vocab_size=50, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0)
torch.manual_seed(0)
eager = LlamaForCausalLM._from_config(config, attn_implementation="eager").eval()
flash = LlamaForCausalLM._from_config(config, attn_implementation="flash_attention_2").eval()
flash.load_state_dict(eager.state_dict())
tokens = torch.randint(1, 50, (3, 12))
mask = torch.ones_like(tokens)
mask[0, :5], mask[1, :1] = 0, 0
with torch.no_grad():
    for given in (mask, None):
        expected, found = (m(tokens, attention_mask=given).logits for m in (eager, flash))
        kept = torch.ones_like(tokens) if given is None else given
        error = (expected - found)[kept.bool()].abs().max()
        assert error < float(sys.argv[1]), error
    ids = [m.generate(tokens, attention_mask=mask, max_new_tokens=6, do_sample=False) for m in (eager, flash)]
    assert torch.equal(*ids)
""")
