"""Sound from files, and the log-mel features that Whisper reads: in torch; only formats other than WAV need more."""

from __future__ import annotations

import importlib
import math
import sys
import wave
from pathlib import Path

import torch
from torch import Tensor

#: Of the features: the samples of a window and of a step, and what counts as silence.
N_FFT, HOP = 400, 160
_SILENCE, _RANGE = 1e-10, 8.0


def read_audio(path: str | Path) -> tuple[Tensor, int]:
    """A file's samples ``(samples,)`` as float32 in -1 to 1, channels averaged, and how many there are a second."""
    try:
        soundfile = importlib.import_module("soundfile")
    except ImportError:
        return _read_wave(path)
    try:
        samples, rate = soundfile.read(str(path), dtype="float32", always_2d=True)  # (samples, channels)
    except RuntimeError as error:
        raise ValueError(f"{path} cannot be read as audio: {error}") from error
    mono: Tensor = torch.from_numpy(samples).mean(1)
    return mono, int(rate)


def _read_wave(path: str | Path) -> tuple[Tensor, int]:
    """A WAV file of 8, 16, 24 or 32 bits, by the standard library."""
    try:
        with wave.open(str(path), "rb") as file:
            channels, width, rate = file.getnchannels(), file.getsampwidth(), file.getframerate()
            data = file.readframes(file.getnframes())
    except (wave.Error, EOFError) as error:
        what = f"{path} is no WAV file of whole numbers ({error or 'it is empty'})"
        raise ValueError(f"{what}; for other formats: pip install soundfile") from error
    if not data:
        return torch.zeros(0), rate
    octets = torch.frombuffer(bytearray(data), dtype=torch.uint8).view(-1, width)
    if width == 1:
        samples = octets[:, 0].float() - 128  # the only width without a sign
    else:
        if sys.byteorder == "big":
            octets = octets.flip(1)
        # Zeros below the lowest octet make an int32 of any width.
        whole = torch.cat((octets.new_zeros(len(octets), 4 - width), octets), dim=1)
        samples = whole.view(torch.int32)[:, 0].double() / 2 ** (8 * (4 - width))
    return (samples.view(-1, channels).mean(1) / 2 ** (8 * width - 1)).float(), rate


def resample(samples: Tensor, rate: int, wanted: int) -> Tensor:
    """``(samples,)`` at another rate: their Fourier series, without what the new rate cannot hold."""
    if rate == wanted or not len(samples):
        return samples
    length = max(round(len(samples) * wanted / rate), 1)
    spectrum = torch.fft.rfft(samples.double())[: length // 2 + 1]
    found: Tensor = torch.fft.irfft(spectrum, n=length)
    return (found * (length / len(samples))).float()


def mel_filters(bins: int, rate: int) -> Tensor:
    """``(bins, N_FFT // 2 + 1)``: triangles of equal area on Slaney's mel scale from 0 to 8000 Hz (Auditory Toolbox).

    The scale is linear up to 1000 Hz, which is mel 15, and logarithmic from there: 27 mels more are 6.4 times as high.
    """
    top = 15 + 27 * math.log(8) / math.log(6.4)
    mels = torch.linspace(0, top, bins + 2, dtype=torch.float64)
    corners = torch.where(mels < 15, mels * (200 / 3), 1000 * 6.4 ** ((mels - 15) / 27))
    frequencies = torch.linspace(0, rate / 2, N_FFT // 2 + 1, dtype=torch.float64)
    widths = corners.diff()[:, None]
    rising = (frequencies - corners[:-2, None]) / widths[:-1]
    falling = (corners[2:, None] - frequencies) / widths[1:]
    area = (corners[2:] - corners[:-2])[:, None] / 2
    return torch.minimum(rising, falling).clamp(min=0) / area


def log_mel(samples: Tensor, bins: int, rate: int = 16000) -> Tensor:
    """``(..., samples)`` to ``(..., bins, samples // HOP)``, as Whisper was trained on (Radford et al., 2022).

    Decimal logarithms of the power in each band, at most 8 below the loudest of the whole, and brought near -1 to 1.
    """
    window = torch.hann_window(N_FFT, device=samples.device)
    spectrum = torch.stft(samples, N_FFT, HOP, window=window, return_complex=True)[..., :-1]
    power = mel_filters(bins, rate).to(samples) @ spectrum.abs().square()
    logs = power.clamp(min=_SILENCE).log10()
    return (torch.maximum(logs, logs.amax((-2, -1), keepdim=True) - _RANGE) + 4) / 4
