"""Reading and writing weights: every name accounted for."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from transformer_fast import checkpoints, models, tasks

BERT_CONFIG = {
    "model_type": "bert",
    "architectures": ["BertModel"],
    "vocab_size": 60,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "max_position_embeddings": 20,
    "type_vocab_size": 2,
    "hidden_act": "gelu",
    "layer_norm_eps": 0.05,  # large enough to be seen in the results
}


@pytest.fixture
def bert_folder(tmp_path, randomized):
    """A random BERT as Hugging Face saves it, norm gains and biases random too, and as older files have it."""
    transformers.BertModel(transformers.BertConfig.from_dict(BERT_CONFIG)).apply(randomized).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(BERT_CONFIG))
    change(tmp_path, **{"embeddings.position_ids": torch.arange(20)[None]})
    return tmp_path


def change(folder, **changes):
    """Rewrite the weights with some tensors replaced, or dropped where the value is None."""
    tensors = load_file(folder / "model.safetensors") | changes
    kept = {name: tensor.clone() for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})


def test_shards(bert_folder):
    whole = models.from_pretrained(bert_folder).state_dict()
    tensors = load_file(bert_folder / "model.safetensors")
    names = sorted(tensors)
    files = {name: f"model-0000{1 + (i % 2)}-of-00002.safetensors" for i, name in enumerate(names)}
    for file in set(files.values()):
        save_file({name: tensors[name] for name in names if files[name] == file}, bert_folder / file)
    (bert_folder / "model.safetensors").unlink()
    (bert_folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    sharded = models.from_pretrained(bert_folder).state_dict()
    assert all(torch.equal(whole[name], sharded[name]) for name in whole)
    (bert_folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="model-00002-of-00002"):
        models.from_pretrained(bert_folder)


def test_missing_and_unexpected_keys_are_named(bert_folder):
    change(bert_folder, **{"encoder.layer.1.output.dense.bias": None, "cls.decoder.bias": torch.zeros(60)})
    message = r"1 missing: encoder\.layer\.1\.output\.dense\.bias; 1 unexpected: cls\.decoder\.bias"
    with pytest.raises(checkpoints.CheckpointError, match=message):
        models.from_pretrained(bert_folder)


def test_wrong_shapes_are_named(bert_folder):
    change(bert_folder, **{"encoder.layer.0.intermediate.dense.weight": torch.zeros(41, 24)})
    message = (
        r"intermediate\.dense\.weight has shape \(41, 24\), and encoder\.blocks\.0\.mlp\.up\.weight needs \(40, 24\)"
    )
    with pytest.raises(checkpoints.CheckpointError, match=message):
        models.from_pretrained(bert_folder)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"model_type": "perceiver"}, "model_type='perceiver' is not known; allowed: bart, bert"),
        ({"hidden_act": "relu6"}, "activation 'relu6'"),
        ({"architectures": ["BertForMultipleChoice"]}, "BertForMultipleChoice.*allowed: BertModel"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type='relative_key'"),
        ({"is_decoder": True}, "is_decoder=True"),
    ],
)
def test_configurations_that_are_not_supported(bert_folder, changes, complaint):
    (bert_folder / "config.json").write_text(json.dumps(BERT_CONFIG | changes))
    with pytest.raises(ValueError, match=complaint):
        models.from_pretrained(bert_folder)


def test_a_folder_without_a_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        models.from_pretrained(tmp_path)


def test_pooling_other_than_mean_and_first_is_refused(bert_folder):
    (bert_folder / "1_Pooling").mkdir()
    pooling = {"word_embedding_dimension": 24, "pooling_mode_max_tokens": True, "pooling_mode_mean_tokens": False}
    (bert_folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    with pytest.raises(ValueError, match="pools by pooling_mode_max_tokens"):
        tasks.load_sentence_encoder(bert_folder)


def test_dtype_and_backend(bert_folder):
    model = models.from_pretrained(bert_folder, dtype=torch.bfloat16, backend="reference")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert {block.attention.options.backend for block in model.encoder.blocks} == {"reference"}
    assert not model.training


def test_a_trained_decoder_comes_back(decoder, tmp_path):
    models.save_pretrained(decoder, tmp_path)
    again = models.from_pretrained(tmp_path)
    assert isinstance(again, models.DecoderModel)
    assert again.config == decoder.config
    ids = torch.randint(50, (2, 9))
    assert torch.equal(again(ids).logits, decoder(ids).logits)


BROKEN = {
    "config is no JSON": (lambda d: (d / "config.json").write_text("{"), r"config\.json is not JSON"),
    "config is a list": (lambda d: (d / "config.json").write_text("[]"), r"config\.json holds a list"),
    "config lacks a size": (
        lambda d: (d / "config.json").write_text(
            json.dumps({k: v for k, v in BERT_CONFIG.items() if k != "hidden_size"})
        ),
        r"config\.json is not complete: 'hidden_size'",
    ),
    "weights are cut off": (
        lambda d: (d / "model.safetensors").write_bytes((d / "model.safetensors").read_bytes()[:40]),
        r"model\.safetensors is not a safetensors file",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_is_named(bert_folder, case):
    """Such errors came without the file's name, in the words of whatever library met them first."""
    spoil, message = BROKEN[case]
    spoil(bert_folder)
    with pytest.raises(checkpoints.CheckpointError, match=message):
        models.from_pretrained(bert_folder)


def test_a_back_end_that_does_not_exist_is_told_at_once(bert_folder):
    with pytest.raises(ValueError, match="backend is 'foo'"):
        models.from_pretrained(bert_folder, backend="foo")
