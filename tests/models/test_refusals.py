"""What would be wrong without a word is refused, or warned of; and what means nothing is taken."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from models.checkpoints_hf import CASES, rewrite, save

from transformer_fast import models
from transformer_fast.checkpoints import CheckpointError
from transformer_fast.generation import GenerationConfig, generate
from transformer_fast.models import Architecture, DecoderModel, HeadConfig, ModelConfig

IDS = torch.tensor([[7, 8, 9, 10, 11], [12, 13, 14, 15, 16]])
MASK = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a case by its id, made once."""
    made: dict[str, Path] = {}

    def folder(case_id: str) -> Path:
        if case_id not in made:
            made[case_id] = tmp_path_factory.mktemp("checkpoint")
            save(next(case for case in CASES if case.id == case_id), made[case_id], seed=0)
        return made[case_id]

    return folder


@pytest.fixture(scope="module")
def model_of(folder_of: Callable[[str], Path]) -> Callable[[str], Any]:
    return lambda case_id: models.from_pretrained(folder_of(case_id))


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (dict(typical_p=0.9, epsilon_cutoff=0.01), "epsilon_cutoff=0.01, typical_p=0.9"),
        (dict(sequence_bias={"[1]": -2.0}), "sequence_bias="),
        (dict(forced_decoder_ids=[[1, 5]], num_beam_groups=2), r"forced_decoder_ids=\[\[1, 5\]\], num_beam_groups=2"),
        (dict(guidance_scale=1.5, penalty_alpha=0.6), "guidance_scale=1.5, penalty_alpha=0.6"),
    ],
)
def test_generation_settings_without_effect_are_named(settings: dict[str, Any], named: str) -> None:
    with pytest.warns(UserWarning, match=f"have no effect: {named}"):
        GenerationConfig.from_values(settings | dict(num_beams=2))
    with pytest.raises(TypeError, match="unknown generation option"):
        GenerationConfig().replace(**settings)


def test_generation_settings_that_ask_for_nothing_are_not_named() -> None:
    old = dict(typical_p=1.0, num_beam_groups=1, diversity_penalty=0.0, encoder_no_repeat_ngram_size=0, eta_cutoff=0)
    hub = transformers.GenerationConfig().to_dict()
    defaults = transformers.GenerationConfig._get_default_generation_params()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for values in (old, hub, defaults, dict(sequence_bias=None, forced_decoder_ids=[], guidance_scale=1)):
            GenerationConfig.from_values(values)


def test_a_model_says_so_when_it_generates(folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    shutil.copytree(folder_of("llama CausalLM"), tmp_path / "a")
    (tmp_path / "a" / "generation_config.json").write_text(json.dumps({"typical_p": 0.5, "max_new_tokens": 2}))
    model = models.from_pretrained(tmp_path / "a")
    with pytest.warns(UserWarning, match="have no effect: typical_p=0.5"):
        model.generate(IDS)


@pytest.mark.parametrize("case_id", ["bart ConditionalGeneration", "marian MTModel"])
@torch.no_grad()
def test_a_file_without_the_bias_of_zeros(case_id: str, folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    rewrite(folder_of(case_id), tmp_path / "a", lambda tensors, config: tensors.pop("final_logits_bias"))
    model = models.from_pretrained(tmp_path / "a")
    assert model.head.bias.abs().max() == 0
    assert model(IDS, decoder_input_ids=IDS).logits.isfinite().all()


def changed(folder: Path, into: Path, **settings: object) -> Path:
    """A copy of a checkpoint with other settings; None takes one away."""
    shutil.copytree(folder, into)
    config = json.loads((into / "config.json").read_text()) | settings
    (into / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    return into


def test_what_config_json_lacks_or_has_too_much(folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    folder = changed(folder_of("llama CausalLM"), tmp_path / "a", max_position_embeddings=None)
    assert models.from_pretrained(folder).config.max_positions == transformers.LlamaConfig().max_position_embeddings
    quantized = {"quant_method": "gptq", "bits": 4}
    folder = changed(folder_of("llama CausalLM"), tmp_path / "b", quantization_config=quantized)
    with pytest.raises(ValueError, match=r"is quantized \(quant_method='gptq'\); allowed: plain weights"):
        models.from_pretrained(folder)


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        (dict(output_attentions=True), "output_attentions=True is not supported; allowed: False"),
        (dict(return_dict=False), "return_dict=False is not supported; allowed: True"),
        (dict(encoder_outputs=(torch.zeros(2, 5, 20),)), "encoder_outputs=a tuple is not supported; .* use_cache=True"),
        (dict(inputs_embeds=torch.zeros(2, 5, 20)), "inputs_embeds=a Tensor is not supported; allowed: input_ids"),
        (dict(colour=1), "got colour; labels that its head takes: labels"),
    ],
)
@pytest.mark.parametrize("case_id", ["bert MaskedLM", "llama CausalLM", "bart ConditionalGeneration"])
def test_arguments_of_transformers(case_id: str, given: dict[str, Any], complaint: str, model_of: Any) -> None:
    model = model_of(case_id)
    more = {"decoder_input_ids": IDS} if case_id.startswith("bart") else {}
    with pytest.raises(TypeError, match=complaint):
        model(IDS, **more, **given)
    model(IDS, **more, return_dict=True, output_attentions=False, inputs_embeds=None, labels=None)


OUT_OF_RANGE = [
    ("bert Model", dict(input_ids=IDS + 40), "input_ids has 56; allowed: 0 to 52"),
    ("bert Model", dict(input_ids=IDS - 8), "input_ids has -1; allowed: 0 to 52"),
    ("bert Model", dict(input_ids=IDS, token_type_ids=IDS), "token_type_ids has 16; allowed: 0 to 1"),
    ("bert Model", dict(input_ids=IDS, position_ids=IDS + 3), "position_ids has 19; allowed: 0 to 18"),
    ("roberta Model", dict(input_ids=IDS, position_ids=IDS + 5), "position_ids has 21; allowed: 0 to 20"),
    ("gpt2 LMHeadModel", dict(input_ids=IDS, token_type_ids=IDS + 40), "token_type_ids has 56; allowed: 0 to 52"),
    ("gpt2 LMHeadModel", dict(input_ids=IDS, position_ids=IDS - 8), "position_ids has -1; allowed: 0 to 31"),
    ("t5 EncoderModel", dict(input_ids=IDS, position_ids=IDS), "position_ids is given to a model with .*relative"),
    (
        "bart ConditionalGeneration",
        dict(input_ids=IDS, decoder_input_ids=IDS + 40),
        "decoder_input_ids has 56; allowed: 0 to 52",
    ),
]


@pytest.mark.parametrize(("case_id", "given", "complaint"), OUT_OF_RANGE)
def test_ids_that_no_table_has(case_id: str, given: dict[str, Any], complaint: str, model_of: Any) -> None:
    with pytest.raises(ValueError, match=complaint):
        model_of(case_id)(**given)


@torch.no_grad()
def test_padding_may_be_no_token(model_of: Any) -> None:
    """It is not computed: files have pad_token_id=-1."""
    model = model_of("llama CausalLM")
    strange = IDS.where(MASK.bool(), -1)
    assert torch.equal(model(strange, MASK).logits, model(IDS, MASK).logits)


@pytest.mark.parametrize("case_id", ["bert Model", "llama CausalLM", "t5 ConditionalGeneration 1.0"])
@pytest.mark.parametrize(
    ("ids", "error", "complaint"),
    [
        (IDS[:, :0], ValueError, r"input_ids has shape \(2, 0\); allowed: .* at least one token"),
        (IDS[0], ValueError, r"input_ids has shape \(5,\); allowed: \(batch, seqlen\)"),
        (IDS.float(), TypeError, "input_ids is torch.float32; allowed: a tensor of whole numbers"),
        (IDS.tolist(), TypeError, "input_ids is list; allowed: a tensor of whole numbers"),
        (None, TypeError, "input_ids is None; allowed"),
    ],
)
def test_ids_that_are_none(case_id: str, ids: Any, error: type[Exception], complaint: str, model_of: Any) -> None:
    model = model_of(case_id)
    with pytest.raises(error, match=complaint):
        model(ids, **({"decoder_input_ids": IDS} if case_id.startswith("t5") else {}))
    if hasattr(model, "generate"):
        with pytest.raises(error, match=complaint):
            model.generate(ids)


def test_arguments_that_the_model_would_not_read(model_of: Any) -> None:
    vit, llama, bert = model_of("vit Model"), model_of("llama CausalLM"), model_of("bert Model")
    pixels = torch.zeros(2, 3, 12, 18)
    with pytest.raises(TypeError, match=r"attention_mask given to a model of \(batch, channels.* reads pixel_values"):
        vit(pixel_values=pixels, attention_mask=MASK)
    with pytest.raises(TypeError, match="input_ids given to a model"):
        vit(IDS)
    with pytest.raises(TypeError, match="pixel_values is None"):
        vit()
    with pytest.raises(TypeError, match=r"pixel_values given to a model of .* reads input_ids"):
        bert(IDS, pixel_values=pixels)
    with pytest.raises(TypeError, match="decoder_input_ids is given to a DecoderModel"):
        llama.generate(IDS, decoder_input_ids=IDS)
    with pytest.raises(TypeError, match="input_features given to a model"):
        model_of("t5 ConditionalGeneration 1.0")(input_features=pixels, decoder_input_ids=IDS)
    with pytest.raises(TypeError, match="input_ids given to a model"):
        model_of("whisper ConditionalGeneration")(IDS, decoder_input_ids=IDS)


@torch.no_grad()
def test_a_cache_of_another_model(model_of: Any) -> None:
    llama, gpt = model_of("llama CausalLM"), model_of("gpt2 LMHeadModel")
    cache = gpt(IDS, use_cache=True).past_key_values
    with pytest.raises(ValueError, match=r"past_key_values holds 2 layers like CacheShape.num_kv_heads=2, head_dim=10"):
        llama(IDS, past_key_values=cache)
    half = models.DecoderModel(llama.architecture).bfloat16()
    cache = half(IDS, use_cache=True).past_key_values
    with pytest.raises(ValueError, match=r"in torch.bfloat16; allowed: .* in torch.float32"):
        llama(IDS, past_key_values=cache)
    with pytest.raises(TypeError, match="past_key_values is a tuple; allowed: what use_cache=True gave"):
        model_of("t5 ConditionalGeneration 1.0")(IDS, decoder_input_ids=IDS, past_key_values=())


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        (dict(num_kv_heads=-3), "num_kv_heads=-3 must divide"),
        (dict(head_dim=-2), "head_dim=-2 must be at least 1"),
        (dict(sliding_window=3, sliding_layers=(0, 2)), r"sliding_layers=\(0, 2\); allowed: from 0 to 1"),
        (dict(positions="relative", relative_buckets=1), "relative_buckets=1.*at least 4 buckets"),
        (dict(positions="relative", relative_max_distance=8), "relative_max_distance=8; .* above 8"),
        (dict(dropout=-0.1), "dropout=-0.1; allowed: from 0"),
        (dict(activation_dropout=1.5), "activation_dropout=1.5; allowed"),
        (dict(embedding_dropout=-1.0), "embedding_dropout=-1.0; allowed"),
        (dict(position_offset=-1), "position_offset=-1"),
    ],
)
def test_configurations_of_nonsense(changes: dict[str, Any], complaint: str, encoder_config: ModelConfig) -> None:
    with pytest.raises(ValueError, match=complaint):
        replace(encoder_config, **changes)


def test_heads_of_nonsense() -> None:
    with pytest.raises(ValueError, match="num_labels=0 must be at least 1"):
        HeadConfig("sequence", num_labels=0)
    with pytest.raises(ValueError, match="dropout=2; allowed"):
        HeadConfig("sequence", dropout=2)


def test_gradients_that_a_cache_drops(decoder: DecoderModel, model_of: Any) -> None:
    ids = torch.randint(50, (2, 6))
    decoder.train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cache = decoder(ids, use_cache=True).past_key_values  # all of the gradient is there
        with torch.no_grad():
            decoder(ids, past_key_values=cache)
        decoder.eval()(ids, past_key_values=cache)
    with pytest.warns(UserWarning, match="past_key_values in training: no gradient"):
        decoder.train()(ids, past_key_values=cache)
    bart = model_of("bart ConditionalGeneration").train()
    with pytest.warns(UserWarning, match="past_key_values in training: no gradient"):
        bart(IDS, decoder_input_ids=IDS, use_cache=True)
    bart.eval()


@torch.no_grad()
def test_labels_of_tokens_at_padding(model_of: Any) -> None:
    model = model_of("bert TokenClassification")
    labels = torch.ones_like(IDS)
    with pytest.warns(UserWarning, match="labels has labels at padding"):
        model(IDS, MASK, labels=labels)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(IDS, MASK, labels=labels.where(MASK.bool(), -100))
    with pytest.raises(ValueError, match=r"labels has shape \(2, 4\); allowed: \(2, 5\)"):
        model(IDS, MASK, labels=labels[:, 1:])


@torch.no_grad()
def test_another_head_than_config_json_names(folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    folder = folder_of("bert PreTraining")
    full = models.from_pretrained(folder)
    base = models.from_pretrained(folder, architecture="BertModel")
    assert base.head.config.kind == "none"
    theirs = transformers.BertModel.from_pretrained(folder).eval()
    ours = base(IDS)
    torch.testing.assert_close(ours.last_hidden_state, theirs(IDS).last_hidden_state)
    torch.testing.assert_close(ours.pooler_output, theirs(IDS).pooler_output)
    masked = models.from_pretrained(folder, architecture="BertForMaskedLM")
    assert torch.equal(masked(IDS).logits, full(IDS).prediction_logits)
    with pytest.raises(CheckpointError, match=r"missing: classifier.bias, classifier.weight"):
        models.from_pretrained(folder, architecture="BertForTokenClassification")
    with pytest.raises(ValueError, match=r"architectures=\['GPT2Model'\] is not supported"):
        models.from_pretrained(folder, architecture="GPT2Model")
    llama = folder_of("llama SequenceClassification classes")
    llama = changed(llama, tmp_path / "a", architectures=["LlamaModel"])
    # Without being asked, a head that the file has and the model has not is an error still.
    with pytest.raises(CheckpointError, match=r"unexpected: score\.weight"):
        models.from_pretrained(llama)


def test_a_saved_head_is_the_chosen_one(folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    models.from_pretrained(folder_of("bert PreTraining"), architecture="BertModel").save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["BertModel"]
    assert models.from_pretrained(tmp_path).head.config.kind == "none"


@pytest.mark.parametrize("prefix", ["Bert", "Roberta", "ViT"])
def test_a_new_base_model_has_its_pooler(prefix: str) -> None:
    theirs = getattr(transformers, f"{prefix}Model")
    config = getattr(transformers, f"{prefix}Config")(hidden_size=12, num_hidden_layers=1, num_attention_heads=2)
    values = config.to_dict() | {"architectures": [f"{prefix}Model"]}
    count = sum(p.numel() for p in models.from_config(values, device="meta").parameters())
    assert count == sum(p.numel() for p in theirs(config).parameters())


def test_renormalized_scores() -> None:
    """They are log-probabilities after the rules, which beams notice."""
    from transformer_fast.generation.processors import processor

    config = GenerationConfig(suppress_tokens=[1], renormalize_logits=True, max_new_tokens=3)
    scores = torch.randn(2, 6)
    found = processor(config, 2, scores.device)(torch.zeros(2, 2, dtype=torch.int64), scores)
    expected = scores.index_fill(1, torch.tensor([1]), -torch.inf).log_softmax(-1)
    assert torch.equal(found, expected)
    with pytest.raises(ValueError, match="renormalize_logits=1; allowed: True or False"):
        GenerationConfig(renormalize_logits=1)


def test_generate_needs_a_language_head(encoder_config: ModelConfig) -> None:
    with pytest.raises(TypeError, match="no language head"):
        generate(models.EncoderModel(Architecture(encoder=encoder_config)), IDS)
