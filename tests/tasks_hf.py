"""Tiny random checkpoints with tokenizers of their own, and what transformers makes of them."""

from __future__ import annotations

import json
import os
import tempfile
import wave
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import tokenizers
import torch
import transformers
from PIL import Image
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from transformer_fast.testing import judge

transformers.logging.disable_progress_bar()
transformers.logging.set_verbosity_error()

TEXTS = ["Angela Merkel lives in Berlin.", "who?", "The unbelievable rivers of Babylon flow to the sea, they say"]
CONTEXT = "The river Spree flows through Berlin and into the Havel. The Havel flows into the Elbe near Havelberg. "
CONTEXT += "They say that the sea is where all rivers of Germany end, but the Danube flows to the east."
UNICODE = "naïve café 🎉 日本語 — ok"
CORPUS = [*TEXTS, CONTEXT, "summarize : translate English to German : This example is sea .", UNICODE]
LABELS = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]

# --------------------------------------------------------------------------------------------------- checkpoints


@cache
def word_pieces() -> tokenizers.Tokenizer:
    """BERT's kind, with subwords."""
    made = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer, made.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    made.train_from_iterator(CORPUS, trainers.WordPieceTrainer(vocab_size=95, special_tokens=special))
    made.post_processor = processors.TemplateProcessing(
        "[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", [("[CLS]", 2), ("[SEP]", 3)]
    )
    made.decoder = decoders.WordPiece()
    # As files have it: what was set by whoever saved them.
    made.enable_padding(length=77)
    made.enable_truncation(5)
    return made


@cache
def byte_pairs(kind: str) -> tokenizers.Tokenizer:
    """GPT-2's kind; BART's and Whisper's add special tokens, Marian's here a language."""
    languages = ["<|en|>", "<|de|>", ">>fra<<"]
    special = ["<s>", "<pad>", "</s>", *languages, "<|transcribe|>", "<|translate|>", "<|notimestamps|>"]
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet)
    made.train_from_iterator(TEXTS, trainer)
    made.decoder = decoders.ByteLevel()
    if kind == "bart":
        made.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), trim_offsets=True)
    elif kind == "t5":
        made.post_processor = processors.TemplateProcessing("$A </s>", "$A </s> $B </s>", [("</s>", 2)])
    return made


BERT = dict(
    hidden_size=24, num_hidden_layers=2, num_attention_heads=4, intermediate_size=37, max_position_embeddings=48
)
GPT = dict(n_embd=24, n_layer=2, n_head=2, n_positions=64, bos_token_id=2, eos_token_id=2)
BART = dict(
    d_model=24, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=4,
    encoder_ffn_dim=37, decoder_ffn_dim=29, max_position_embeddings=48, pad_token_id=1, eos_token_id=2,
    bos_token_id=0, decoder_start_token_id=2, forced_eos_token_id=2,
)  # fmt: skip
T5 = dict(
    d_model=24, d_kv=5, d_ff=37, num_layers=2, num_heads=4, pad_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    task_specific_params={
        "summarization": dict(prefix="summarize: ", num_beams=2, max_length=9, length_penalty=2.0),
        "translation_en_to_de": dict(prefix="translate English to German: ", max_length=7),
        "translation_en_to_fr": dict(prefix="translate English to French: ", max_length=8),
    },
)  # fmt: skip
WHISPER = BART | dict(
    num_mel_bins=10, max_source_positions=50, max_target_positions=24, begin_suppress_tokens=None, pad_token_id=2
)
VIT = dict(
    hidden_size=20, num_hidden_layers=2, num_attention_heads=2, intermediate_size=37, image_size=16, patch_size=4,
    num_labels=4,
)  # fmt: skip
SPOKEN = dict(
    lang_to_id={"<|en|>": 3, "<|de|>": 4}, task_to_id={"transcribe": 6, "translate": 7}, no_timestamps_token_id=299,
    is_multilingual=True, suppress_tokens=[10, 11], begin_suppress_tokens=[12, 2],
)  # fmt: skip
NLI = dict(num_labels=3, id2label={0: "contradiction", 1: "neutral", 2: "entailment"},
           label2id={"contradiction": 0, "neutral": 1, "entailment": 2})  # fmt: skip
MANY = dict(num_labels=3, problem_type="multi_label_classification")
NAMED = dict(num_labels=5, id2label=dict(enumerate(LABELS)), label2id={name: i for i, name in enumerate(LABELS)})

#: Class, configuration and kind of tokenizer of each checkpoint.
ZOO: dict[str, tuple[str, dict[str, Any], str]] = {
    "bert": ("BertModel", BERT, "bert"),
    "masked": ("BertForMaskedLM", BERT, "bert"),
    "one label": ("BertForSequenceClassification", BERT | dict(num_labels=3), "bert"),
    "many labels": ("BertForSequenceClassification", BERT | MANY, "bert"),
    "sigmoid": ("BertForSequenceClassification", BERT | dict(num_labels=1), "bert"),
    "regression": ("BertForSequenceClassification", BERT | dict(num_labels=2, problem_type="regression"), "bert"),
    "gpt labels": ("GPT2ForSequenceClassification", GPT | dict(num_labels=3), "gpt"),
    "gpt labels with padding": ("GPT2ForSequenceClassification", GPT | dict(num_labels=3, pad_token_id=1), "gpt"),
    "nli": ("BartForSequenceClassification", BART | NLI, "bart"),
    "names": ("BertForTokenClassification", BERT | NAMED, "bert"),
    "answers": ("BertForQuestionAnswering", BERT, "bert"),
    "gpt": ("GPT2LMHeadModel", GPT, "gpt"),
    "bart": ("BartForConditionalGeneration", BART, "bart"),
    "t5": ("T5ForConditionalGeneration", T5, "t5"),
    "marian": ("MarianMTModel", BART, "t5"),
    "whisper": ("WhisperForConditionalGeneration", WHISPER, "gpt"),
    "vit": ("ViTForImageClassification", VIT, ""),
}  # fmt: skip


_FOLDERS = tempfile.TemporaryDirectory(prefix="transformer_fast_tasks_")  # gone when the tests are over


@cache
def zoo(name: str) -> Path:
    """The folder of a checkpoint, made when it is first asked for; the caller's random numbers stay as they are."""
    class_name, options, kind = ZOO[name]
    path = Path(_FOLDERS.name) / name.replace(" ", "_")
    tokenizer = None if not kind else word_pieces() if kind == "bert" else byte_pairs(kind)
    vocab = {} if tokenizer is None else {"vocab_size": tokenizer.get_vocab_size()}
    cls = getattr(transformers, class_name)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(zlib.crc32(name.encode()))
        model = cls(cls.config_class(**options, **vocab)).eval()
        for key, parameter in model.named_parameters():
            center = 1.0 if parameter.dim() == 1 and bool((parameter == 1).all()) else 0.0
            table = any(part in key for part in ("word_embed", "wte", "shared", "embed_tokens"))
            parameter.copy_(center + (1.0 if table else 0.2) * torch.randn(parameter.shape))
    if name == "marian":
        model.generation_config.update(num_beams=2, max_length=12)
    if name == "whisper":
        for key, value in SPOKEN.items():
            setattr(model.generation_config, key, value)
        model.generation_config._from_model_config = False
        transformers.WhisperFeatureExtractor(feature_size=10, chunk_length=1).save_pretrained(path)
    if name == "vit":
        size = {"height": 16, "width": 16}
        transformers.ViTImageProcessorPil(size=size, image_mean=[0.4, 0.5, 0.6]).save_pretrained(path)
    model.save_pretrained(path)
    if tokenizer is not None:
        tokenizer.save(str(path / "tokenizer.json"))
    return path


@cache
def theirs(folder: Path) -> Any:
    """The same model in transformers."""
    (name,) = json.loads((folder / "config.json").read_text())["architectures"]
    return getattr(transformers, name).from_pretrained(folder, attn_implementation="eager").eval()


def their_tokenizer(folder: Path) -> transformers.PreTrainedTokenizerFast:
    made = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    made.no_padding()
    made.no_truncation()
    is_bert = made.token_to_id("[PAD]") is not None
    special = ("[PAD]", "[UNK]", "[SEP]", "[CLS]") if is_bert else ("<pad>", None, "</s>", "<s>")
    names = dict(zip(("pad_token", "unk_token", "eos_token", "bos_token"), special, strict=True))
    inputs = ["input_ids", "attention_mask"] + ["token_type_ids"] * is_bert
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, model_max_length=48, model_input_names=inputs, padding_side="left", **names
    )


def pipeline(kind: str, folder: Path, **options: Any) -> Any:
    return transformers.pipeline(kind, model=theirs(folder), tokenizer=their_tokenizer(folder), **options)


def check_scores(ours: Any, run: Callable[[], Any], folder: Path) -> None:
    """``run`` gives (names, scores) by transformers: the names must be ours, the scores as near as the rule allows."""
    names, baseline = run()
    theirs(folder).double()
    try:
        oracle_names, oracle = run()
    finally:
        theirs(folder).float()
    assert ours[0] == names == oracle_names
    verdict = judge(torch.tensor(ours[1]), torch.tensor(oracle).double(), torch.tensor(baseline))
    assert verdict.passed, str(verdict)


def split(results: list[list[Any]]) -> tuple[list[list[Any]], list[float]]:
    """(label, score, ...) as all but the scores, and the scores."""
    return [[(a, *c) for a, _, *c in found] for found in results], [each[1] for found in results for each in found]


# --------------------------------------------------------------------------------------------------------- files


def save_pictures(folder: Path) -> list[str]:
    """Files of three kinds, of other sizes than the model's: colours (by a camera held upright), grey, transparent."""
    paths = []
    for mode, size in (("RGB", (23, 31)), ("L", (16, 16)), ("RGBA", (9, 40))):
        exif = Image.Exif()
        exif[0x0112] = 6 if mode == "RGB" else 1  # the orientation: to be turned by 90 degrees
        pixels = torch.randint(256, (size[0] * size[1] * len(mode),), dtype=torch.uint8)
        paths.append(str(folder / f"{mode}.png"))
        Image.frombytes(mode, size, pixels.numpy().tobytes()).save(paths[-1], exif=exif)
    return paths


def write_wave(path: Path, samples: np.ndarray, rate: int, width: int) -> str:
    """Whole numbers ``(samples, channels)``, as many octets wide."""
    octets = (samples + 128).astype("u1") if width == 1 else samples.astype("<i4").view("u1").reshape(*samples.shape, 4)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(samples.shape[1])
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(octets.tobytes() if width == 1 else octets[..., :width].tobytes())
    return str(path)


def save_speech(folder: Path) -> str:
    """1.3 seconds of noise with a sine in it."""
    time = np.arange(20800) / 16000
    sound = 9000 * np.sin(2 * np.pi * 700 * time) + 2000 * torch.randn(20800).numpy()
    return write_wave(folder / "spoken.wav", sound.astype("i4")[:, None], 16000, 2)
