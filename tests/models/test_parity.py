"""Models against Hugging Face's: the same files in, the same numbers out, forward and backward, and back again."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from models.checkpoints_hf import CASES, Case, Options, read, rewrite, save
from models.oracle_hf import RUNS, InFloat64, Jittered, Results, Shelf, arguments_for, load_theirs, named_outputs, worst
from torch import Tensor

from transformer_fast.checkpoints import CheckpointError, export_state_dict
from transformer_fast.models import from_pretrained
from transformer_fast.testing import judge

#: What the project promises of a model's outputs and loss in float32: the largest error by the largest magnitude.
PROMISED = 1e-5

BY_ID = {case.id: case for case in CASES}
each_case = pytest.mark.parametrize("case", CASES, ids=list(BY_ID))
each_batch = pytest.mark.parametrize(
    ("case", "kind"), [pytest.param(case, kind, id=f"{case.id}, {kind}") for case in CASES for kind in case.kinds]
)
each_padded_batch = pytest.mark.parametrize(
    ("case", "kind"),
    [
        pytest.param(case, kind, id=f"{case.id}, {kind}")
        for case in CASES
        for kind in case.kinds
        if "full" not in kind and case.inputs != "image"
    ],
)


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory, seed: int) -> Shelf:
    return Shelf(tmp_path_factory.mktemp("checkpoints"), seed)


def verdict_on(name: str, ours: Tensor, oracle: Tensor, baselines: list[Results], unit: Tensor | None = None) -> str:
    """What is wrong with a result; empty if nothing is."""
    verdict = judge(ours, oracle, worst([run[name] for run in baselines], oracle), name=name, unit=unit)
    return "" if verdict.passed else str(verdict)


@each_batch
def test_outputs_and_loss(case: Case, kind: str, shelf: Shelf) -> None:
    """Logits, hidden states of all layers, pooled outputs: each that transformers gives."""
    ours, oracle, baselines = (make(case, kind) for make in (shelf.ours, shelf.oracle, shelf.baselines))
    complaints = []
    for name, expected in oracle.items():
        if name.startswith("gradient of"):
            continue
        assert name in ours, f"no {name} among {', '.join(ours)}"
        complaints.append(verdict_on(name, ours[name], expected, baselines))
        error = float((ours[name] - expected).abs().max() / expected.abs().max())
        complaints.append("" if error <= PROMISED else f"{name}: a relative error of {error:.3g}")
    assert not any(complaints), "\n".join(filter(None, complaints))


@each_batch
def test_gradients(case: Case, kind: str, shelf: Shelf) -> None:
    """Of every parameter, element by element, under its name in the file; a tied one has the sum of all its uses."""
    ours, oracle, baselines = (make(case, kind) for make in (shelf.ours, shelf.oracle, shelf.baselines))
    expected = {name: tensor for name, tensor in oracle.items() if name.startswith("gradient of")}
    largest: dict[str, float] = {}
    for name, gradient in expected.items():
        largest[group_of(name)] = max(largest.get(group_of(name), 0.0), float(gradient.abs().max()))
    complaints = []
    for name, gradient in expected.items():
        unit = torch.full_like(gradient, largest[group_of(name)] * torch.finfo(torch.float32).eps)
        # What no output depends on has no gradient here, and one of zeros there.
        complaints.append(verdict_on(name, ours.get(name, torch.zeros_like(gradient)), gradient, baselines, unit))
    others = [name for name, t in ours.items() if name.startswith("gradient of") and name not in expected and t.any()]
    complaints.append(f"transformers has no {', '.join(others)}" if others else "")
    assert not any(complaints), "\n".join(filter(None, complaints))


def group_of(name: str) -> str:
    """The projections of one attention, say: the gradients of queries and keys, and that of a key's bias, which is
    zero, are what is left where numbers of the size of the values' gradient cancel.
    """
    return ".".join(name.split(".")[:-2])


@each_padded_batch
@torch.no_grad()
def test_outputs_at_padding(case: Case, kind: str, shelf: Shelf) -> None:
    """Zeros, and for the ends of a span what no softmax picks."""
    inputs = shelf.inputs(case, kind)
    labels = ("labels", "next_sentence_label", "start_positions", "end_positions")
    arguments = {name: value for name, value in inputs.arguments.items() if name not in labels}
    outputs = shelf.model(case)(**arguments)
    grids = [(name, inputs.encoder_keep if name.startswith("encoder") else inputs.keep) for name in outputs]
    grids = [(name, keep) for name, keep in grids if keep is not None and outputs[name].shape[:2] == keep.shape]
    for name, keep in grids:
        expected = -torch.inf if name in ("start_logits", "end_logits") else 0.0
        assert (outputs[name][~keep] == expected).all(), name
    assert grids or case.labels == "sequence"


#: Where transformers computes the padding as if it were tokens. Padding on the left of a decoder sees nothing, not
#: even itself, and what transformers makes of that is a matter of the attention's implementation.
TOKEN_LOSSES = {
    "bert MaskedLM": ("right", "left"),
    "roberta TokenClassification": ("right", "left"),
    "gpt LMHeadModel": ("right",),
    "llama CausalLM": ("right",),
    "bart ConditionalGeneration": ("right",),
}


@pytest.mark.parametrize(("case_id", "side"), [(name, side) for name, sides in TOKEN_LOSSES.items() for side in sides])
@pytest.mark.filterwarnings("ignore:labels has labels at padding")
@torch.no_grad()
def test_labels_at_padding_count_as_with_transformers(case_id: str, side: str, shelf: Shelf) -> None:
    """Nobody means them to, but the same script then gives the same loss."""
    case = BY_ID[case_id]
    inputs = shelf.inputs(case, side)
    arguments = inputs.arguments | {"labels": inputs.arguments["labels"].where(inputs.keep, 1)}
    exact = shelf.theirs(case, torch.float64)
    with InFloat64():
        oracle = exact(**arguments_for(exact, arguments)).loss
    with Jittered():
        baselines = [{"loss": shelf.theirs(case)(**arguments).loss} for _ in range(RUNS)]
    complaint = verdict_on("loss", shelf.model(case)(**arguments).loss, oracle, baselines)
    assert not complaint, complaint


@each_case
def test_saved_for_transformers(case: Case, shelf: Shelf, tmp_path: Path) -> None:
    """Save and load again, there and here: not one bit of the weights differs, nor one of a forward pass."""
    model, inputs = shelf.model(case), shelf.inputs(case, case.kinds[0])
    model.save_pretrained(tmp_path)
    theirs, again = shelf.theirs(case), load_theirs(case, tmp_path)
    assert differing(theirs.state_dict(), again.state_dict()) == []
    with torch.no_grad():
        assert differing(dict(named_outputs(theirs(**inputs.arguments), inputs)),
                         dict(named_outputs(again(**inputs.arguments), inputs))) == []  # fmt: skip
        ours = from_pretrained(tmp_path, dtype=torch.float32)
        assert differing(dict(named_outputs(model(**inputs.arguments), inputs)),
                         dict(named_outputs(ours(**inputs.arguments), inputs))) == []  # fmt: skip


@each_case
def test_exported_under_the_names_in_the_file(case: Case, shelf: Shelf) -> None:
    assert differing(read(shelf.folder(case)), export_state_dict(shelf.model(case))) == []


def differing(expected: dict[str, Tensor], found: dict[str, Tensor]) -> list[str]:
    """The names that only one of the two has, and those of which they hold different bits."""
    both = expected.keys() & found.keys()
    return sorted(
        (expected.keys() ^ found.keys()) | {name for name in both if not torch.equal(expected[name], found[name])}
    )


def renamed(*pairs: tuple[str, str]) -> Callable[[dict[str, Tensor], Options], None]:
    """A file with other names: each pattern of regular expressions replaced."""

    def change(tensors: dict[str, Tensor], config: Options) -> None:
        for key in list(tensors):
            name = key
            for pattern, by in pairs:
                name = re.sub(pattern, by, name)
            tensors[name] = tensors.pop(key)

    return change


def with_copies(source: str, *names: str) -> Callable[[dict[str, Tensor], Options], None]:
    """A file that holds the same table again under other names, as PyTorch's own format does with tied ones."""

    def change(tensors: dict[str, Tensor], config: Options) -> None:
        tensors.update({name: tensors[source].clone() for name in names})

    return change


def with_others(tensors_of: Callable[[Options], dict[str, Tensor]]) -> Callable[[dict[str, Tensor], Options], None]:
    """A file with buffers of older versions, which say nothing that the configuration does not."""
    return lambda tensors, config: tensors.update(tensors_of(config))


def position_ids(prefix: str) -> Callable[[Options], dict[str, Tensor]]:
    return lambda config: {
        f"{prefix}embeddings.position_ids": torch.arange(config.get("max_position_embeddings", 0))[None]
    }


def causal_masks(config: Options) -> dict[str, Tensor]:
    size = config["n_positions"]
    mask = torch.ones(1, 1, size, size).tril()
    return {f"transformer.h.{i}.attn.bias": mask.clone() for i in range(config["n_layer"])} | {
        f"transformer.h.{i}.attn.masked_bias": torch.tensor(-1e4) for i in range(config["n_layer"])
    }


def rotary_frequencies(config: Options) -> dict[str, Tensor]:
    frequencies = 1e4 ** (-torch.arange(0, config["head_dim"], 2) / config["head_dim"])
    layers = range(config["num_hidden_layers"])
    return {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": frequencies.clone() for i in layers}


def sinusoids(config: Options) -> dict[str, Tensor]:
    model = transformers.MarianMTModel(transformers.MarianConfig(**config))
    return {key: tensor for key, tensor in model.state_dict().items() if "embed_positions" in key}


def more_settings(**settings: object) -> Callable[[dict[str, Tensor], Options], None]:
    return lambda tensors, config: config.update(settings)


#: Ways in which public files differ from what transformers 5 writes, by the case that they are a change of.
OTHER_FILES = [
    (
        "bert MaskedLM",
        "gamma and beta",
        renamed((r"LayerNorm\.weight", "LayerNorm.gamma"), (r"LayerNorm\.bias", "LayerNorm.beta")),
    ),
    ("bert Model", "prefixed", renamed((r"^", "bert."))),
    ("bert MaskedLM", "position_ids", with_others(position_ids("bert."))),
    (
        "bert MaskedLM",
        "decoder",
        with_copies("bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"),
    ),
    ("bert PreTraining", "decoder's bias", with_copies("cls.predictions.bias", "cls.predictions.decoder.bias")),
    ("bert MaskedLM", "settings", more_settings(position_embedding_type="absolute", gradient_checkpointing=False)),
    ("roberta MaskedLM", "position_ids", with_others(position_ids("roberta."))),
    ("roberta MaskedLM", "decoder", with_copies("roberta.embeddings.word_embeddings.weight", "lm_head.decoder.weight")),
    ("roberta MaskedLM", "decoder's bias", with_copies("lm_head.bias", "lm_head.decoder.bias")),
    ("roberta Model", "prefixed", renamed((r"^", "roberta."))),
    (
        "distilbert MaskedLM",
        "projector",
        with_copies("distilbert.embeddings.word_embeddings.weight", "vocab_projector.weight"),
    ),
    ("distilbert Model", "prefixed", renamed((r"^", "distilbert."))),
    ("gpt LMHeadModel", "head", with_copies("transformer.tokens_embed.weight", "lm_head.weight")),
    ("gpt LMHeadModel", "bare", renamed((r"^transformer\.", ""))),
    ("gpt2 LMHeadModel", "head", with_copies("transformer.wte.weight", "lm_head.weight")),
    ("gpt2 LMHeadModel", "bare", renamed((r"^transformer\.", ""))),
    ("gpt2 LMHeadModel", "masks", with_others(causal_masks)),
    ("gpt2 LMHeadModel", "settings", more_settings(n_ctx=32, task_specific_params={"a": {"b": 1}})),
    (
        "t5 ConditionalGeneration 1.0",
        "tables",
        with_copies("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"),
    ),
    (
        "t5 ConditionalGeneration 1.1",
        "tables",
        with_copies("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"),
    ),
    (
        "t5 ConditionalGeneration 1.0",
        "stray bias",
        with_copies(
            "decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
            "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",
        ),
    ),
    (
        "bart ConditionalGeneration",
        "tables",
        with_copies(
            "model.shared.weight",
            "model.encoder.embed_tokens.weight",
            "model.decoder.embed_tokens.weight",
            "lm_head.weight",
        ),
    ),
    (
        "marian MTModel",
        "tables",
        with_copies(
            "model.shared.weight",
            "model.encoder.embed_tokens.weight",
            "model.decoder.embed_tokens.weight",
            "lm_head.weight",
        ),
    ),
    ("marian MTModel", "sinusoids", with_others(sinusoids)),
    ("llama CausalLM tied", "head", with_copies("model.embed_tokens.weight", "lm_head.weight")),
    ("llama CausalLM", "frequencies", with_others(rotary_frequencies)),
    ("llama Model", "prefixed", renamed((r"^", "model."))),
    ("gemma2 CausalLM", "head", with_copies("model.embed_tokens.weight", "lm_head.weight")),
    ("whisper ConditionalGeneration", "head", with_copies("model.decoder.embed_tokens.weight", "proj_out.weight")),
    ("vit Model", "prefixed", renamed((r"^", "vit."))),
]


@pytest.mark.parametrize(("case_id", "change"), [pytest.param(a, c, id=f"{a}, {b}") for a, b, c in OTHER_FILES])
def test_other_files_of_the_same_model(case_id: str, change: Callable, shelf: Shelf, tmp_path: Path) -> None:
    case = BY_ID[case_id]
    rewrite(shelf.folder(case), tmp_path / "other", change)
    theirs = getattr(transformers, case.model).from_pretrained(tmp_path / "other")
    assert differing(theirs.state_dict(), shelf.theirs(case).state_dict()) == []
    assert_same_model(case, tmp_path / "other", shelf)


def assert_same_model(case: Case, folder: Path, shelf: Shelf) -> None:
    """What the folder holds gives the same bits as the case's own checkpoint."""
    inputs = shelf.inputs(case, case.kinds[0])
    with torch.no_grad():
        expected, found = (
            dict(named_outputs(model(**inputs.arguments), inputs))
            for model in (shelf.model(case), from_pretrained(folder, dtype=torch.float32))
        )
    assert differing(expected, found) == []


SEVERAL = [
    BY_ID[case_id] for case_id in ("bert MaskedLM", "t5 ConditionalGeneration 1.1", "llama CausalLM", "vit Model")
]


@pytest.mark.parametrize("case", SEVERAL, ids=[case.id for case in SEVERAL])
def test_shards(case: Case, shelf: Shelf, tmp_path: Path) -> None:
    save(case, tmp_path, shelf.seed, max_shard_size="10KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert_same_model(case, tmp_path, shelf)


@pytest.mark.parametrize("case", SEVERAL, ids=[case.id for case in SEVERAL])
def test_weights_kept_in_bfloat16(case: Case, shelf: Shelf, tmp_path: Path) -> None:
    def rounded(tensors: dict[str, Tensor], config: Options) -> None:
        tensors.update({key: tensor.bfloat16() for key, tensor in tensors.items()})
        config["dtype"] = "bfloat16"

    rewrite(shelf.folder(case), tmp_path / "bfloat16", rounded)
    ours = from_pretrained(tmp_path / "bfloat16", dtype=torch.float32)
    ours.save_pretrained(tmp_path / "again")
    theirs = load_theirs(case, tmp_path / "bfloat16", torch.float32)
    assert differing(theirs.state_dict(), load_theirs(case, tmp_path / "again").state_dict()) == []


LACKING = {
    "bert MaskedLM": "bert.encoder.layer.1.attention.self.value.bias",
    "gpt2 LMHeadModel": "transformer.h.1.attn.c_attn.weight",
    "t5 ConditionalGeneration 1.0": "decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
    "bart ConditionalGeneration": "model.shared.weight",
    "llama CausalLM": "lm_head.weight",
    "gemma2 CausalLM": "model.layers.2.pre_feedforward_layernorm.weight",
    "whisper ConditionalGeneration": "model.encoder.conv2.bias",
    "vit ImageClassification": "vit.embeddings.cls_token",
}


@pytest.mark.parametrize(("case_id", "key"), LACKING.items(), ids=LACKING)
def test_a_key_that_is_missing_or_unknown_or_of_another_shape(
    case_id: str, key: str, shelf: Shelf, tmp_path: Path
) -> None:
    folder = shelf.folder(BY_ID[case_id])
    unknown = f"{key}_of_another_model"
    changes = {
        "missing": (key, lambda tensors, config: tensors.pop(key)),
        "unknown": (unknown, lambda tensors, config: tensors.update({unknown: torch.zeros(3)})),
        "shape": (key, lambda tensors, config: tensors.update({key: torch.zeros(3, 2, 1, 1, 1)})),
    }
    for name, (named, change) in changes.items():
        rewrite(folder, tmp_path / name, change)
        with pytest.raises(CheckpointError, match=re.escape(named)):
            from_pretrained(tmp_path / name)
