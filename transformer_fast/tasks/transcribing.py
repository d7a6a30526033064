"""Text from speech, by Whisper."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from transformer_fast.models import Seq2SeqModel
from transformer_fast.tasks import audio
from transformer_fast.tasks.generating import generation_config, until_end
from transformer_fast.tasks.images import FILE
from transformer_fast.tasks.loading import Loaded, Source, batches, load


@torch.no_grad()
def transcribe(
    model: Source,
    speech: str | Path | Tensor,
    *,
    sampling_rate: int | None = None,
    language: str | None = None,
    task: str = "transcribe",
    batch_size: int = 1,
    on_piece: Callable[[str, int], None] | None = None,
    **options: Any,
) -> str:
    """What is said, of any length: it is heard in pieces of 30 s (what the model holds), one after the other.

    Args:
        model: a folder, a repository on the hub, or what ``load`` gave, of the Whisper family.
        speech: a file (WAV; others need the package soundfile), or samples ``(samples,)`` in -1 to 1.
        sampling_rate: of samples that are given as a tensor; default the model's, 16000.
        language: what is spoken, as in "en"; default what the model hears in the first piece.
        task: "transcribe", or "translate" into English.
        batch_size: so many pieces at a time.
        on_piece: called with the text of each piece as it is there, and the number of pieces.
        options: of :class:`transformer_fast.generation.GenerationConfig`, in place of the checkpoint's.
    """
    loaded = load(model)
    front_end = loaded.model.stacks[0].config.front_end
    speaks = isinstance(loaded.model, Seq2SeqModel) and loaded.model.architecture.head.kind == "language"
    loaded.require("transcribe", "an encoder of audio and a language head (Whisper)", speaks and front_end == "audio")
    pieces = _pieces(loaded, *_samples(speech, sampling_rate))
    rate, bins = _rate(loaded), loaded.model.stacks[0].config.channels
    prompt: list[int] = []
    texts: list[str] = []
    for batch in batches(list(pieces), batch_size):
        features = audio.log_mel(torch.stack(list(batch)), bins, rate).to(loaded.model.device)
        prompt = prompt or _prompt(loaded, features[:1], language, task)
        # The prompt says what older files have as forced_decoder_ids.
        config = generation_config(loaded, options, len(prompt), {"forced_decoder_ids": None})
        start = torch.tensor(prompt, device=features.device).repeat(len(batch), 1)
        ids = loaded.model.generate(features, decoder_input_ids=start, config=config)
        for row in ids[:, len(prompt) :].tolist():
            texts.append(loaded.tokenizer.decode(until_end(row, config)).strip())
            if on_piece is not None:
                on_piece(texts[-1], len(pieces))
    return " ".join(filter(None, texts))


def _samples(speech: str | Path | Tensor, rate: int | None) -> tuple[Tensor, int | None]:
    """``(samples,)``, and how many there are a second, where that is known."""
    if isinstance(speech, (str, Path)):
        if rate is not None:
            raise ValueError(f"sampling_rate={rate} for a file, which says it itself; allowed: None")
        return audio.read_audio(speech)
    if speech.dim() != 1 or not speech.is_floating_point():
        raise ValueError(
            f"speech is {speech.dtype} of shape {tuple(speech.shape)}; allowed: floats of shape (samples,)"
        )
    return speech.detach().float().cpu(), rate


def _rate(loaded: Loaded) -> int:
    """Samples a second that the model was trained on; ValueError where its features are not those made here."""
    settings: Mapping[str, Any] = loaded.read_json(FILE) or {}
    for name, made in (("n_fft", audio.N_FFT), ("hop_length", audio.HOP)):
        if settings.get(name, made) != made:
            raise ValueError(f"{FILE} of {loaded.folder} has {name}={settings[name]}; allowed: {made}")
    return int(settings.get("sampling_rate", 16000))


def _pieces(loaded: Loaded, samples: Tensor, rate: int | None) -> Tensor:
    """``(pieces, samples of one)`` at the model's rate, the last one filled up with silence."""
    wanted = _rate(loaded)
    samples = audio.resample(samples, rate or wanted, wanted)
    length = 2 * loaded.model.stacks[0].config.max_positions * audio.HOP  # a step of the encoder is two frames
    return F.pad(samples, (0, -len(samples) % length)).view(-1, length)


def _prompt(loaded: Loaded, features: Tensor, language: str | None, task: str) -> list[int]:
    """What the decoder begins with: start, language, task, and that no times are wanted; what the model has of it."""
    values = loaded.model.generation_defaults
    start = values.get("decoder_start_token_id")
    if start is None:
        raise ValueError(f"{loaded.folder} has no decoder_start_token_id, in config.json or generation_config.json")
    languages: Mapping[str, int] = values.get("lang_to_id") or {}
    tasks: Mapping[str, int] = values.get("task_to_id") or {}
    if values.get("is_multilingual") is False:  # some files have the tables all the same
        languages, tasks = {}, {}
    prompt = [start]
    if language is not None:
        prompt.append(_choice("language", languages, f"<|{language.lower()}|>", language))
    elif languages:
        logits = loaded.model(
            input_features=features, decoder_input_ids=torch.tensor([prompt]).to(features.device)
        ).logits
        ids = list(languages.values())
        prompt.append(ids[int(logits[0, -1, ids].argmax())])
    if tasks:
        prompt.append(_choice("task", tasks, task, task))
    elif task != "transcribe":
        raise ValueError(f"task={task!r}; allowed: 'transcribe', the only one of this checkpoint")
    silent = values.get("no_timestamps_token_id") or loaded.tokenizer.token_id("<|notimestamps|>")
    return prompt if silent is None else [*prompt, silent]


def _choice(name: str, table: Mapping[str, int], key: str, given: str) -> int:
    if key not in table:
        known = ", ".join(entry.strip("<|>") for entry in table) or "none: this checkpoint knows one only"
        raise ValueError(f"{name}={given!r}; allowed: {known}")
    return table[key]
