"""What was wrong once in the models, each found by trying to break them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from models.checkpoints_hf import CASES, save
from safetensors.torch import load_file, save_file

from transformer_fast import models
from transformer_fast.checkpoints import CheckpointError
from transformer_fast.testing import judge

IDS = torch.tensor([[7, 8, 9, 10, 11], [12, 13, 14, 15, 16]])


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """The folder of a case by its id, made once."""
    made: dict[str, Path] = {}

    def folder(case_id: str) -> Path:
        if case_id not in made:
            made[case_id] = tmp_path_factory.mktemp("checkpoint")
            save(next(case for case in CASES if case.id == case_id), made[case_id], seed=0)
        return made[case_id]

    return folder


def judge_logits(ours: torch.Tensor, theirs: transformers.PreTrainedModel, **inputs: torch.Tensor) -> None:
    baseline, oracle = theirs(**inputs).logits, theirs.double()(**inputs).logits
    theirs.float()
    columns = slice(-ours.shape[1], None)
    verdict = judge(ours, oracle[:, columns], baseline[:, columns], name="logits")
    assert verdict.passed, str(verdict)


@torch.no_grad()
@pytest.mark.parametrize("case_id", ["distilbert Model", "llama Model"])
def test_types_are_nothing_to_models_without_them(case_id, folder_of):
    """They were looked up in the token table, as GPT does: tokenizers return types of 0 to everybody."""
    model = models.from_pretrained(folder_of(case_id))
    with_types, without = model(IDS, token_type_ids=torch.zeros_like(IDS)), model(IDS)
    assert torch.equal(with_types.last_hidden_state, without.last_hidden_state)


@torch.no_grad()
def test_a_padded_decoder_prompt_that_is_continued(folder_of):
    """Positions were counted by token after the first call, and by column in it."""
    folder = folder_of("bart ConditionalGeneration")
    ours = models.from_pretrained(folder)
    theirs = transformers.BartForConditionalGeneration.from_pretrained(folder, attn_implementation="eager").eval()
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    first = ours(IDS, decoder_input_ids=IDS[:, :3], decoder_attention_mask=mask[:, :3], use_cache=True)
    context = first.past_key_values
    with pytest.raises(ValueError, match=r"decoder_attention_mask has shape \(2, 9\); allowed: \(2, 5\)"):
        ours(decoder_input_ids=IDS[:, 3:], decoder_attention_mask=torch.ones(2, 9), past_key_values=context)
    with pytest.raises(ValueError, match="hides other tokens"):
        ours(decoder_input_ids=IDS[:, 3:], decoder_attention_mask=torch.ones(2, 5), past_key_values=context)
    assert context.cache.seqlens.tolist() == [1, 3], "a refused call takes nothing in"
    second = ours(decoder_input_ids=IDS[:, 3:], decoder_attention_mask=mask, past_key_values=context)
    judge_logits(second.logits, theirs, input_ids=IDS, decoder_input_ids=IDS, decoder_attention_mask=mask)


@torch.no_grad()
@pytest.mark.parametrize("has_mask", [True, False])
def test_a_padded_prompt_that_is_continued_with_and_without_its_mask(has_mask, folder_of):
    folder = folder_of("gpt2 LMHeadModel")
    ours = models.from_pretrained(folder)
    theirs = transformers.GPT2LMHeadModel.from_pretrained(folder, attn_implementation="eager").eval()
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    cache = ours(IDS[:, :3], mask[:, :3], use_cache=True).past_key_values
    second = ours(IDS[:, 3:], mask if has_mask else None, past_key_values=cache)
    judge_logits(second.logits, theirs, input_ids=IDS, attention_mask=mask)


def test_windows_go_by_column_or_not_at_all(folder_of):
    """After a prompt padded on the right they counted tokens, where the first call had counted columns."""
    model = models.from_pretrained(folder_of("mistral CausalLM window"))
    with pytest.raises(ValueError, match="attention_mask is padded on the right; allowed with a cache"):
        model(IDS, torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]), use_cache=True)


@torch.no_grad()
def test_generation_goes_by_its_own_file_which_is_saved_too(folder_of, tmp_path):
    """config.json's old settings were mixed in, and the file was dropped by saving."""
    shutil.copytree(folder_of("llama CausalLM"), tmp_path / "a")
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    (tmp_path / "a" / "config.json").write_text(json.dumps(config | {"num_beams": 3, "max_length": 7}))
    (tmp_path / "a" / "generation_config.json").write_text(json.dumps({"max_new_tokens": 4, "eos_token_id": [50, 51]}))
    model = models.from_pretrained(tmp_path / "a")
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "a").eval()
    made = model.generate(IDS)
    assert made.shape == (2, 9)
    assert torch.equal(made, theirs.generate(IDS))
    model.save_pretrained(tmp_path / "b")
    assert models.from_pretrained(tmp_path / "b").generation_defaults == model.generation_defaults


@torch.no_grad()
def test_what_stands_for_a_sequence_is_masked(folder_of):
    """The row before it was taken, of another sequence if there was none; transformers goes by the pad id alone."""
    folder = folder_of("gpt2 SequenceClassification classes")
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    theirs = transformers.GPT2ForSequenceClassification.from_pretrained(folder, attn_implementation="eager").eval()
    judge_logits(models.from_pretrained(folder)(IDS, mask).logits, theirs, input_ids=IDS, attention_mask=mask)
    with pytest.raises(ValueError, match="attention_mask leaves a sequence without any token"):
        models.from_pretrained(folder_of("gpt2 LMHeadModel")).next_token_logits(IDS, torch.zeros_like(IDS))


@torch.no_grad()
@pytest.mark.parametrize("case_id", ["t5 ConditionalGeneration 1.0", "marian MTModel"])
def test_a_decoder_prompt_begins_with_the_start_token(case_id, folder_of):
    theirs = transformers.AutoModelForSeq2SeqLM.from_pretrained(folder_of(case_id)).eval()
    ours = models.from_pretrained(folder_of(case_id))
    prompt = {"decoder_input_ids": torch.tensor([[7, 8], [9, 10]]), "max_new_tokens": 5}
    assert torch.equal(ours.generate(IDS, **prompt), theirs.generate(IDS, use_cache=False, **prompt))


@torch.no_grad()
def test_a_mask_that_is_a_view(folder_of):
    model = models.from_pretrained(folder_of("bert Model"))
    big = torch.ones(2, 9, dtype=torch.bool)
    big[0, 0] = False
    view = big[:, :5]
    assert torch.equal(model(IDS, view).last_hidden_state, model(IDS, view.clone()).last_hidden_state)


def test_spellings_of_old_files(folder_of, tmp_path):
    """T5's first class name, null dropouts, and rotary scaling that leaves the original length to the configuration."""

    def with_config(case_id: str, **changes):
        folder = tmp_path / case_id.replace(" ", "_")
        shutil.copytree(folder_of(case_id), folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))
        return models.from_pretrained(folder)

    assert (
        with_config("t5 ConditionalGeneration 1.0", architectures=["T5WithLMHeadModel"]).head.config.kind == "language"
    )
    with_config("bart ConditionalGeneration", classifier_dropout=None, dropout=None)
    scaling = {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    found = with_config("llama CausalLM", rope_parameters=None, rope_scaling=scaling, rope_theta=100.0)
    assert found.config.rope_scaling["original_max_position_embeddings"] == 64
    with pytest.raises(ValueError, match="rotary scaling 'linear' has no factor"):
        with_config("llama Model", rope_parameters={"rope_type": "linear"})
    with pytest.raises(ValueError, match="model_type=None is not known"):
        with_config("bert Model", model_type=None)


def test_files_that_are_no_plain_weights(folder_of, tmp_path):
    """Whole numbers were loaded as if they were weights; a broken index failed in the words of a dictionary."""
    shutil.copytree(folder_of("bert Model"), tmp_path / "int8")
    weights = load_file(tmp_path / "int8" / "model.safetensors")
    name = "encoder.layer.0.output.dense.weight"
    save_file(weights | {name: weights[name].to(torch.int8)}, tmp_path / "int8" / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"{name} is torch.int8; allowed: floating point"):
        models.from_pretrained(tmp_path / "int8")
    (tmp_path / "int8" / "model.safetensors.index.json").write_text('{"weight_map": ["a"]}')
    with pytest.raises(CheckpointError, match="has no weight_map of file names"):
        models.from_pretrained(tmp_path / "int8")


def test_one_dtype_where_the_file_has_two(folder_of, tmp_path):
    shutil.copytree(folder_of("bert Model"), tmp_path / "mixed")
    weights = load_file(tmp_path / "mixed" / "model.safetensors")
    name = "encoder.layer.0.output.dense.weight"
    save_file(weights | {name: weights[name].half()}, tmp_path / "mixed" / "model.safetensors")
    assert {p.dtype for p in models.from_pretrained(tmp_path / "mixed").parameters()} == {torch.float32}
