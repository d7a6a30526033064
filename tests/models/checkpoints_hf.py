"""Small random checkpoints of Hugging Face's models.

A case is one class of transformers and one configuration of it. Sizes are awkward on purpose: an odd vocabulary, head
sizes of 5, 6 and 10, encoders and decoders of unlike depth. Every value that is saved is random: norm gains left
at 1 and biases left at 0 would let swapped ones pass.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

transformers.logging.disable_progress_bar()
transformers.logging.set_verbosity_error()

Options = dict[str, Any]

VOCAB = 53
LENGTHS = (9, 1, 4, 7)  # of the sequences of a batch
DECODER_LENGTHS = (5, 6, 2, 1)
ABSENT = object()


@dataclass(frozen=True, eq=False)
class Case:
    """One class and one configuration.

    Args:
        inputs: what it reads: "encoder", "decoder", "seq2seq", "speech" or "image".
        labels: what its loss is of: "tokens", "next tokens", "sequence", "spans", "pretraining"; "" for no loss.
        arguments: of the class, besides the configuration.
        in_json: what config.json says instead of what transformers 5 writes: the spelling of older files.
    """

    id: str
    model: str
    config: str
    options: Options
    inputs: str
    labels: str
    arguments: Options = field(default_factory=dict)
    in_json: Options = field(default_factory=dict)
    lengths: tuple[int, ...] = LENGTHS
    decoder_lengths: tuple[int, ...] = DECODER_LENGTHS

    @property
    def family(self) -> str:
        return self.id.partition(" ")[0]

    @property
    def kinds(self) -> tuple[str, ...]:
        """The batches that there are of it: on which side the padding is, "full" where there is none."""
        if self.inputs == "image":
            return ("full", "other size") if "square" in self.id else ("full",)
        if self.inputs == "speech" or self.id.startswith("bart SequenceClassification"):
            return ("full", "right")  # with left padding, BART's decoder would read the padding
        if self.inputs == "decoder":
            return ("full", "right", "left", "left, own positions")
        return ("full", "right", "left")


BERT = dict(
    vocab_size=VOCAB,
    hidden_size=20,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=37,
    max_position_embeddings=19,
    type_vocab_size=2,
)
ROBERTA = BERT | dict(type_vocab_size=1, max_position_embeddings=21, pad_token_id=1, num_attention_heads=2)
DISTILBERT = dict(vocab_size=VOCAB, dim=24, n_layers=2, n_heads=4, hidden_dim=37, max_position_embeddings=19)
GPT = dict(
    vocab_size=VOCAB, n_embd=20, n_layer=2, n_head=2, n_positions=32, pad_token_id=0, eos_token_id=2, bos_token_id=3
)
T5 = dict(
    vocab_size=VOCAB,
    d_model=24,
    d_kv=5,
    d_ff=37,
    num_layers=2,
    num_decoder_layers=3,
    num_heads=4,
    relative_attention_num_buckets=8,
    relative_attention_max_distance=7,
    decoder_start_token_id=0,
)
BART = dict(
    vocab_size=VOCAB,
    d_model=20,
    encoder_layers=3,
    decoder_layers=2,
    encoder_attention_heads=2,
    decoder_attention_heads=4,
    encoder_ffn_dim=37,
    decoder_ffn_dim=29,
    max_position_embeddings=32,
)
MARIAN = BART | dict(
    pad_token_id=VOCAB - 1,
    eos_token_id=0,
    forced_eos_token_id=0,
    decoder_start_token_id=VOCAB - 1,
    scale_embedding=True,
    activation_function="swish",
)
LLAMA = dict(
    vocab_size=VOCAB,
    hidden_size=24,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=6,
    intermediate_size=37,
    max_position_embeddings=64,
    pad_token_id=0,
    bos_token_id=3,
    rms_norm_eps=1e-5,
)
GEMMA2 = LLAMA | dict(
    num_hidden_layers=3,
    head_dim=10,
    query_pre_attn_scalar=17,
    sliding_window=4,
    eos_token_id=2,
    attn_logit_softcapping=1.5,
    final_logit_softcapping=2.5,
)
WHISPER = dict(
    vocab_size=VOCAB,
    num_mel_bins=7,
    d_model=20,
    encoder_layers=2,
    decoder_layers=3,
    encoder_attention_heads=2,
    decoder_attention_heads=4,
    encoder_ffn_dim=37,
    decoder_ffn_dim=29,
    max_source_positions=11,
    max_target_positions=24,
    decoder_start_token_id=5,
    pad_token_id=50,
    bos_token_id=50,
    eos_token_id=50,
    begin_suppress_tokens=None,
)
VIT = dict(
    hidden_size=20,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=37,
    image_size=(12, 18),
    patch_size=(4, 6),
    num_channels=3,
)

LINEAR = dict(factor=2.5)
LLAMA3 = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32)


def new_rope(rope_type: str, **scaling: Any) -> Options:
    return dict(rope_parameters=dict(rope_type=rope_type, rope_theta=500.0, **scaling))


def old_rope(scaling: Options | None) -> Options:
    return dict(rope_parameters=ABSENT, rope_theta=500.0, rope_scaling=scaling)


PROBLEMS = {
    "classes": dict(problem_type="single_label_classification", num_labels=3),
    "many labels": dict(problem_type="multi_label_classification", num_labels=3),
    "regression": dict(problem_type="regression", num_labels=1),
}


def variants(
    model: str, base: Options, inputs: str, labels: str, options: Mapping[str, Options | tuple[Options, Options]]
) -> list[Case]:
    """One case for each of the options, which are a change of the configuration, or that and one of config.json."""
    prefix = next(p for p in FAMILIES if model.startswith(p))
    head = model.removeprefix(prefix).removeprefix("For")
    cases = []
    for name, change in options.items():
        config, in_json = change if isinstance(change, tuple) else (change, {})
        case_id = " ".join(filter(None, (FAMILIES[prefix], head, name)))
        cases.append(Case(case_id, model, f"{prefix}Config", base | config, inputs, labels, in_json=in_json))
    return cases


#: By prefix of the class.
FAMILIES = {
    "DistilBert": "distilbert",
    "Bert": "bert",
    "Roberta": "roberta",
    "OpenAIGPT": "gpt",
    "GPT2": "gpt2",
    "T5": "t5",
    "Bart": "bart",
    "Marian": "marian",
    "Llama": "llama",
    "Mistral": "mistral",
    "Gemma2": "gemma2",
    "Whisper": "whisper",
    "ViT": "vit",
}


def encoder_cases(prefix: str, base: Options) -> Iterable[Case]:
    """The heads that BERT, RoBERTa and DistilBERT have in common."""
    yield from variants(f"{prefix}Model", base, "encoder", "", {"": {}})
    yield from variants(f"{prefix}ForMaskedLM", base, "encoder", "tokens", {"": {}})
    yield from variants(f"{prefix}ForSequenceClassification", base, "encoder", "sequence", PROBLEMS)
    yield from variants(f"{prefix}ForTokenClassification", base, "encoder", "tokens", {"": dict(num_labels=5)})
    yield from variants(f"{prefix}ForQuestionAnswering", base, "encoder", "spans", {"": {}})


def without_pooler(prefix: str, base: Options, inputs: str) -> Case:
    config = f"{prefix}Config"
    options = dict(add_pooling_layer=False)
    return Case(f"{FAMILIES[prefix]} Model without pooler", f"{prefix}Model", config, base, inputs, "", options)


OLD_LLAMA = old_rope(None) | dict(head_dim=ABSENT, num_key_value_heads=ABSENT, pretraining_tp=ABSENT)
OLD_T5 = dict(tie_word_embeddings=False, scale_decoder_outputs=ABSENT, is_gated_act=ABSENT, dense_act_fn=ABSENT)
OLD_GEMMA2 = old_rope(ABSENT) | dict(layer_types=ABSENT, hidden_act="gelu_pytorch_tanh", cache_implementation="hybrid")
#: Buckets of public files: the logarithmic ones begin at a distance of 8, or 16 in a decoder, and end at 128.
FAR = dict(relative_attention_num_buckets=32, relative_attention_max_distance=128)
UNTIED_T5 = dict(feed_forward_proj="gated-gelu", tie_word_embeddings=False)

CASES = [
    *encoder_cases("Bert", BERT),
    *variants("BertForPreTraining", BERT, "encoder", "pretraining", {"": {}, "gelu_new": dict(hidden_act="gelu_new")}),
    without_pooler("Bert", BERT, "encoder"),
    *encoder_cases("Roberta", ROBERTA),
    without_pooler("Roberta", ROBERTA, "encoder"),
    *encoder_cases("DistilBert", DISTILBERT),
    *variants("RobertaForMaskedLM", ROBERTA, "encoder", "tokens", {"relu": dict(hidden_act="relu")}),
    *variants("DistilBertForMaskedLM", DISTILBERT, "encoder", "tokens", {"relu": dict(activation="relu")}),
    *variants("OpenAIGPTModel", GPT, "decoder", "", {"": {}}),
    *variants("OpenAIGPTLMHeadModel", GPT, "decoder", "next tokens", {"": {}, "silu": dict(afn="silu")}),
    *variants("OpenAIGPTForSequenceClassification", GPT, "decoder", "sequence", PROBLEMS),
    *variants("GPT2Model", GPT, "decoder", "", {"": {}}),
    *variants("GPT2LMHeadModel", GPT, "decoder", "next tokens", {
        "": {},
        "scaled by layer": dict(scale_attn_by_inverse_layer_idx=True),
        "unscaled": dict(scale_attn_weights=False),
        "untied": dict(tie_word_embeddings=False),
        "n_inner, relu": dict(n_inner=31, activation_function="relu"),
    }),
    *variants("GPT2ForSequenceClassification", GPT, "decoder", "sequence", PROBLEMS),
    *variants("T5ForConditionalGeneration", T5, "seq2seq", "tokens", {
        "1.0": {}, "1.1": (UNTIED_T5, OLD_T5), "1.1 saved by transformers 5": UNTIED_T5,
    }),
    replace(
        *variants("T5ForConditionalGeneration", T5 | FAR, "seq2seq", "tokens", {"far": {}}),
        lengths=(150, 60), decoder_lengths=(90, 140),
    ),
    *variants("T5EncoderModel", T5, "encoder", "", {"": {}}),
    *variants("BartForConditionalGeneration", BART, "seq2seq", "tokens", {
        "": {}, "scaled, relu": dict(scale_embedding=True, activation_function="relu"),
    }),
    *variants("BartForSequenceClassification", BART, "seq2seq", "sequence", {"classes": PROBLEMS["classes"]}),
    *variants("MarianMTModel", MARIAN, "seq2seq", "tokens", {"": {}}),
    *variants("LlamaModel", LLAMA, "decoder", "", {"": {}}),
    *variants("LlamaForCausalLM", LLAMA, "decoder", "next tokens", {
        "": {},
        "tied": dict(tie_word_embeddings=True),
        "biases": dict(attention_bias=True, mlp_bias=True),
        "all heads": dict(num_key_value_heads=6, head_dim=None),
        "one kv head": dict(num_key_value_heads=1, head_dim=10),
        "linear rope": new_rope("linear", **LINEAR),
        "llama3 rope": new_rope("llama3", **LLAMA3),
        "old spelling": (new_rope("default") | dict(num_key_value_heads=6, head_dim=None), OLD_LLAMA),
        "linear rope, old spelling": (new_rope("linear", **LINEAR), old_rope(dict(type="linear", **LINEAR))),
        "llama3 rope, old spelling": (new_rope("llama3", **LLAMA3), old_rope(dict(rope_type="llama3", **LLAMA3))),
    }),
    *variants("LlamaForSequenceClassification", LLAMA, "decoder", "sequence", PROBLEMS),
    *variants("MistralForCausalLM", LLAMA, "decoder", "next tokens", {
        "window": dict(sliding_window=4),
        "no window": dict(sliding_window=None),
        "window, old spelling": (dict(sliding_window=4) | new_rope("default"), old_rope(ABSENT)),
    }),
    *variants("Gemma2ForCausalLM", GEMMA2, "decoder", "next tokens", {
        "": {},
        "layer types": dict(layer_types=["full_attention", "sliding_attention", "sliding_attention"]),
        "no caps": dict(attn_logit_softcapping=None, final_logit_softcapping=None),
        "old spelling": (new_rope("default"), OLD_GEMMA2),
    }),
    *variants("WhisperForConditionalGeneration", WHISPER, "speech", "tokens", {
        "": {}, "scaled": dict(scale_embedding=True),
    }),
    *variants("ViTModel", VIT, "image", "", {"": {}}),
    without_pooler("ViT", VIT, "image"),
    *variants("ViTForImageClassification", VIT, "image", "sequence", {
        "": dict(num_labels=3),
        "no qkv bias": dict(num_labels=3, qkv_bias=False),
        "square": dict(num_labels=3, image_size=12, patch_size=4),
    }),
]  # fmt: skip


def build(case: Case, seed: int) -> transformers.PreTrainedModel:
    """The model with every parameter and every saved buffer random, in float32 and eval mode."""
    config = getattr(transformers, case.config)(**case.options)
    model = getattr(transformers, case.model)(config, **case.arguments).eval()
    if case.family == "t5" and case.options.get("tie_word_embeddings") is False:
        # transformers 5 ties them in all new models, and leaves them be where a file holds two unlike ones.
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    generator = torch.Generator().manual_seed(zlib.crc32(f"{case.id} {seed}".encode()))
    never_saved = model._keys_to_ignore_on_save or ()
    saved = {**dict(model.named_parameters()), **{n: b for n, b in model.named_buffers() if n in model.state_dict()}}
    with torch.no_grad():
        for name, tensor in saved.items():
            if name not in never_saved:
                center, spread = _center_and_spread(name, tensor, case.family)
                tensor.copy_(center + spread * torch.randn(tensor.shape, generator=generator))
    return model


def _center_and_spread(name: str, tensor: Tensor, family: str) -> tuple[float, float]:
    """Such that hidden states and logits stay near 1."""
    module = name.rpartition(".")[0].lower()
    if name.endswith("weight") and ("norm" in module or "ln_" in module):
        return (0.0 if family == "gemma2" else 1.0), 0.3  # Gemma adds the 1 itself
    if tensor.dim() < 2 or "relative_attention_bias" in name or "final_logits_bias" in name:
        return 0.0, 0.3
    table = any(part in name for part in ("embed", "shared", "wte", "wpe", "lm_head"))
    return 0.0, 0.5 if table else 0.25


def save(case: Case, folder: Path, seed: int, **options: Any) -> dict[str, str]:
    """Writes the checkpoint; returns the name in the file of each parameter of the model that is trained."""
    model = build(case, seed)
    model.save_pretrained(folder, **options)
    path = folder / "config.json"
    config = json.loads(path.read_text()) | case.in_json
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not ABSENT}))
    tensors = read(folder)
    return {
        name: key
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
        for key, tensor in tensors.items()
        if tensor.shape == parameter.shape and torch.equal(tensor, parameter)
    }


def read(folder: Path) -> dict[str, Tensor]:
    """All tensors of the folder."""
    return {key: tensor for file in sorted(folder.glob("*.safetensors")) for key, tensor in load_file(file).items()}


def rewrite(folder: Path, into: Path, change: Callable[[dict[str, Tensor], Options], None]) -> None:
    """A copy of a checkpoint of one file, with what ``change`` does to its tensors and its configuration."""
    tensors, config = read(folder), json.loads((folder / "config.json").read_text())
    change(tensors, config)
    into.mkdir()
    save_file(
        {key: tensor.contiguous() for key, tensor in tensors.items()}, into / "model.safetensors", {"format": "pt"}
    )
    (into / "config.json").write_text(json.dumps(config))
