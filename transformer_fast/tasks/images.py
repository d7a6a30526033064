"""Images to a model's pixel values, as ``preprocessor_config.json`` says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from transformer_fast.tasks.loading import Loaded

FILE = "preprocessor_config.json"


def pixel_values(loaded: Loaded, images: Sequence[Any]) -> Tensor:
    """Paths or Pillow's images to ``(batch, channels, height, width)`` float32."""
    settings = loaded.read_json(FILE)
    if settings is None:
        raise FileNotFoundError(f"{loaded.folder} has no {FILE}: it says to which size and values images are brought")
    channels = loaded.model.stacks[0].config.channels
    return torch.stack([_prepared(open_image(image, channels), settings) for image in images])


def open_image(source: Any, channels: int = 3) -> Any:
    """A Pillow image of 3 channels (RGB), or 1 (grey), from a file or another image."""
    try:
        from PIL import Image, ImageOps, UnidentifiedImageError
    except ImportError as error:
        raise ImportError("reading images needs Pillow: pip install Pillow") from error
    if isinstance(source, (str, Path)):
        try:
            with Image.open(source) as file:
                source = ImageOps.exif_transpose(file)  # as the camera was held; loads the pixels too
        except UnidentifiedImageError as error:
            raise ValueError(f"{source} is no image that Pillow can read") from error
    return source.convert("RGB" if channels == 3 else "L")


def _prepared(image: Any, settings: Mapping[str, Any]) -> Tensor:
    """``(channels, height, width)``."""
    if settings.get("do_resize", True):
        image = image.resize(_size(settings.get("size", 224), image.size), settings.get("resample", 2))
    if settings.get("do_center_crop", False):
        image = _cropped(image, _size(settings.get("crop_size", 224), image.size))
    channels = len(image.getbands())
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    x = pixels.view(image.height, image.width, channels).permute(2, 0, 1).float()
    if settings.get("do_rescale", True):
        x = x * settings.get("rescale_factor", 1 / 255)
    if settings.get("do_normalize", True):
        mean, std = (torch.tensor(settings.get(name, [0.5] * channels)) for name in ("image_mean", "image_std"))
        x = (x - mean[:, None, None]) / std[:, None, None]
    return x


def _size(wanted: int | Mapping[str, int], size: tuple[int, int]) -> tuple[int, int]:
    """``(width, height)``, as Pillow has it, from the ways in which the files say it."""
    if isinstance(wanted, int):
        return wanted, wanted
    if "shortest_edge" in wanted:
        short, edge = min(size), wanted["shortest_edge"]
        width, height = (edge * side // short for side in size)
        return width, height
    return wanted["width"], wanted["height"]


def _cropped(image: Any, size: tuple[int, int]) -> Any:
    """The middle of an image; black around it where the image is smaller."""
    left, top = ((have - want) // 2 for have, want in zip(image.size, size, strict=True))
    return image.crop((left, top, left + size[0], top + size[1]))
