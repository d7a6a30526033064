"""What models are for: images, speech and vectors, against transformers on tiny checkpoints."""

from __future__ import annotations

import contextlib
import json
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from dropin.promised import PROMISED
from PIL import Image, ImageOps
from tasks_hf import TEXTS, check_scores, save_pictures, save_speech, split, their_tokenizer, theirs, write_wave, zoo
from torch import Tensor

from transformer_fast import tasks
from transformer_fast.tasks import Tokenizer, audio
from transformer_fast.testing import judge

# -------------------------------------------------------------------------------------------------------- images


def test_images_are_classified_as_by_the_pipeline(tmp_path: Path) -> None:
    folder, pictures = zoo("vit"), save_pictures(tmp_path)
    processor = transformers.ViTImageProcessorPil.from_pretrained(folder)
    run = transformers.pipeline("image-classification", model=theirs(folder), image_processor=processor)
    ours = tasks.classify_images(folder, pictures)
    check_scores(split(ours), lambda: split([[(e["label"], e["score"]) for e in run(p)] for p in pictures]), folder)
    opened = tasks.classify_images(folder, [Image.open(path) for path in pictures[1:]])
    for found, expected in zip(opened, ours[1:], strict=True):  # of another batch: the last bits may differ
        assert [label.label for label in found] == [label.label for label in expected]
        scores, others = (torch.tensor([label.score for label in labels]) for labels in (found, expected))
        assert (scores - others).abs().max() <= PROMISED


def test_sizes_that_preprocessors_name(tmp_path: Path) -> None:
    from transformer_fast.tasks.images import pixel_values

    settings = dict(
        size={"shortest_edge": 20}, do_center_crop=True, crop_size={"height": 16, "width": 18}, do_resize=True
    )
    processor = transformers.ViTImageProcessorPil(**settings, resample=3, do_rescale=False)
    processor.save_pretrained(tmp_path)
    loaded, pictures = tasks.load(zoo("vit")), save_pictures(tmp_path)
    ours = pixel_values(tasks.Loaded(loaded.model, tmp_path), pictures)
    upright = [ImageOps.exif_transpose(Image.open(path)).convert("RGB") for path in pictures]
    due = [processor(image, return_tensors="pt").pixel_values[0] for image in upright]
    assert ours.shape == (3, 3, 16, 18)
    assert torch.equal(ours, torch.stack(due))


# --------------------------------------------------------------------------------------------------------- sound


@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_wave_files_of_any_width(width: int, tmp_path: Path) -> None:
    top = 2 ** (8 * width - 1)
    whole = np.array([[0, 0], [top - 1, top - 1], [-top, -top], [1, 3], [-5, 4], [top // 2, 0]])
    samples, rate = audio.read_audio(write_wave(tmp_path / "a.wav", whole, 8000, width))
    assert rate == 8000
    assert torch.equal(samples, torch.from_numpy(whole.mean(1) / top).float())


def test_other_formats_by_soundfile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "soundfile", None)  # as if it were not installed
    (tmp_path / "a.flac").write_bytes(b"fLaC")
    with pytest.raises(ValueError, match=r"a.flac is no WAV file of whole numbers .*: pip install soundfile"):
        audio.read_audio(tmp_path / "a.flac")
    with pytest.raises(FileNotFoundError):
        audio.read_audio(tmp_path / "missing.wav")
    stereo = np.array([[0.5, 0.25], [-1.0, 0.0]], dtype="f4")
    module = types.SimpleNamespace(read=lambda path, dtype, always_2d: (stereo, 44100))
    monkeypatch.setitem(sys.modules, "soundfile", module)
    samples, rate = audio.read_audio(tmp_path / "a.flac")
    assert samples.tolist() == [0.375, -0.5] and rate == 44100


@pytest.mark.parametrize("rate", [44100, 8000, 16000])
def test_resampling_keeps_waves_and_drops_those_too_fast(rate: int) -> None:
    def sound(rate: int, hertz: int, dtype: torch.dtype) -> Tensor:
        return torch.sin(2 * torch.pi * hertz / rate * torch.arange(rate, dtype=dtype))

    ours = audio.resample(sound(rate, 440, torch.float64).float(), rate, 16000)
    verdict = judge(ours, sound(16000, 440, torch.float64), sound(16000, 440, torch.float32))
    assert verdict.passed, str(verdict)
    if rate > 20000:
        low = audio.resample((sound(rate, 440, torch.float64) + sound(rate, 9000, torch.float64)).float(), rate, 16000)
        assert judge(low, sound(16000, 440, torch.float64), sound(16000, 440, torch.float32)).passed


@pytest.mark.parametrize("bins", [80, 128])
def test_log_mel_is_whisper_s(bins: int) -> None:
    samples = 0.1 * torch.randn(2, 16000)
    samples[:, 9000:] = 0
    extractor = transformers.WhisperFeatureExtractor(feature_size=bins, chunk_length=1)
    baseline = torch.from_numpy(extractor._torch_extract_fbank_features(samples.numpy()))
    oracle = torch.from_numpy(extractor._np_extract_fbank_features(samples.numpy(), "cpu"))
    verdict = judge(audio.log_mel(samples, bins), oracle, baseline)
    assert verdict.passed, str(verdict)


@pytest.mark.parametrize("options", [dict(language="de", task="translate"), dict(language="en", task="transcribe")])
def test_transcribe_is_whisper_s_generate(options: dict[str, Any], tmp_path: Path) -> None:
    folder, spoken = zoo("whisper"), save_speech(tmp_path)
    pieces: list[tuple[str, int]] = []
    options = options | dict(max_new_tokens=12, repetition_penalty=3.0)
    ours = tasks.transcribe(folder, spoken, on_piece=lambda *piece: pieces.append(piece), **options)
    due = [heard(folder, piece, **options) for piece in audio.read_audio(spoken)[0].split(16000)]
    assert len(due) == 2
    assert [text for text, _ in pieces] == due and pieces[0][1] == 2
    assert ours == " ".join(due)
    assert tasks.transcribe(folder, spoken, batch_size=2, **options) == ours


def heard(folder: Path, samples: Tensor, **options: Any) -> str:
    """By transformers."""
    extractor = transformers.WhisperFeatureExtractor.from_pretrained(folder)
    features = extractor(samples.numpy(), sampling_rate=16000, return_tensors="pt").input_features
    ids = theirs(folder).generate(features, **options)
    return their_tokenizer(folder).decode(ids[0], skip_special_tokens=True).strip()


def test_the_language_is_heard_and_other_rates_are_taken(tmp_path: Path) -> None:
    loaded = tasks.load(zoo("whisper"))
    samples = audio.read_audio(save_speech(tmp_path))[0][:16000]
    extractor = transformers.WhisperFeatureExtractor.from_pretrained(loaded.folder)
    features = extractor(samples.numpy(), sampling_rate=16000, return_tensors="pt").input_features
    language = {3: "en", 4: "de"}[theirs(loaded.folder).detect_language(features).item()]
    other = {"en": "de", "de": "en"}[language]
    options = dict(max_new_tokens=12, repetition_penalty=3.0)
    ours = tasks.transcribe(loaded, samples, **options)
    assert ours == tasks.transcribe(loaded, samples, language=language, **options)
    assert ours != tasks.transcribe(loaded, samples, language=other, **options)
    again = audio.resample(samples, 16000, 48000)
    assert ours == tasks.transcribe(loaded, again, sampling_rate=48000, **options)
    assert tasks.transcribe(loaded, samples[:0]) == ""
    twice = torch.cat((samples, torch.zeros_like(samples)))
    pieces: list[str] = []
    tasks.transcribe(loaded, twice, on_piece=lambda text, _: pieces.append(text), **options)
    silence = tasks.transcribe(loaded, twice[16000:], language=language, **options)
    assert [text.strip() for text in pieces] == [ours, silence], "one language for all of it"


def test_speech_that_cannot_be_asked_for(tmp_path: Path, monkeypatch) -> None:
    loaded, spoken = tasks.load(zoo("whisper")), save_speech(tmp_path)
    for options, message in (
        (dict(language="xx"), "language='xx'; allowed: de, en"),
        (dict(task="sing"), "task='sing'; allowed: transcribe, translate"),
        (dict(sampling_rate=8000), "sampling_rate=8000 for a file"),
    ):
        with pytest.raises(ValueError, match=message):
            tasks.transcribe(loaded, spoken, **options)
    with pytest.raises(ValueError, match=r"speech is torch.int64 of shape \(2, 3\)"):
        tasks.transcribe(loaded, torch.ones(2, 3, dtype=torch.int64))
    monkeypatch.setitem(loaded.model.generation_defaults, "is_multilingual", False)
    with pytest.raises(ValueError, match="language='en'; allowed: none: this checkpoint knows one only"):
        tasks.transcribe(loaded, spoken, language="en")


# ------------------------------------------------------------------------------------------------------- vectors


@pytest.mark.parametrize(
    ("pooling", "modules"),
    [
        (None, None),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, ["Transformer", "Pooling", "Normalize"]),
        ({"pooling_mode": "mean", "embedding_dimension": 24}, ["Transformer", "Pooling"]),
    ],
)
def test_vectors_are_pooled_as_the_folder_says(pooling, modules, tmp_path: Path) -> None:
    folder = zoo("bert")
    loaded = tasks.Loaded(tasks.load(folder).model, tmp_path, Tokenizer(folder))
    if pooling is not None:
        (tmp_path / "1_Pooling").mkdir()
        (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
        kinds = [{"type": f"sentence_transformers.models.{name}"} for name in modules]
        (tmp_path / "modules.json").write_text(json.dumps(kinds))
        (tmp_path / "sentence_bert_config.json").write_text('{"max_seq_length": 9}')

    @torch.no_grad()
    def due() -> Tensor:
        rows = []
        for text in TEXTS:
            limit = 48 if pooling is None else 9
            ids = their_tokenizer(folder)(text, return_tensors="pt", truncation=True, max_length=limit)
            states = theirs(folder)(**ids).last_hidden_state[0]
            rows.append(states[0] if pooling and "pooling_mode_cls_token" in pooling else states.mean(0))
        vectors = torch.stack(rows)
        return vectors if modules == ["Transformer", "Pooling"] else vectors / vectors.norm(dim=1, keepdim=True)

    baseline = due()
    theirs(folder).double()
    oracle = due()
    theirs(folder).float()
    with pytest.warns(UserWarning, match="cut to 9") if pooling else contextlib.nullcontext():
        ours = tasks.embed(loaded, TEXTS, batch_size=2)
    verdict = judge(ours, oracle, baseline)
    assert verdict.passed, str(verdict)


def test_pooling_that_is_not_there(tmp_path: Path) -> None:
    loaded = tasks.Loaded(tasks.load(zoo("bert")).model, tmp_path, Tokenizer(zoo("bert")))
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text('{"pooling_mode_max_tokens": true}')
    with pytest.raises(ValueError, match="pools by pooling_mode_max_tokens; allowed: mean or cls"):
        tasks.embed(loaded, TEXTS)
    (tmp_path / "modules.json").write_text('[{"type": "sentence_transformers.models.Dense"}]')
    with pytest.raises(ValueError, match="has Dense; allowed"):
        tasks.embed(loaded, TEXTS, pooling="mean")
    assert tasks.embed(loaded, [], pooling="cls", normalize=False).shape == (0, 24)
