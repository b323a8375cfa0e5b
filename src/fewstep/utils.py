"""Small helpers for scripts: load a picture, lay out a grid, write a GIF."""

from __future__ import annotations

import io
import tempfile
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageOps
from torch import Tensor

from .errors import RequestError
from .pipelines.images import to_pil
from .random import randn as randn_tensor

__all__ = [
    "export_to_gif",
    "load_image",
    "make_image_grid",
    "numpy_to_pil",
    "pt_to_pil",
    "randn_tensor",
]

TIMEOUT = 60.0  # seconds for a download


def load_image(
    image: str | Path | PIL.Image.Image,
    convert_method: Callable[[PIL.Image.Image], PIL.Image.Image] | None = None,
) -> PIL.Image.Image:
    """A picture from a URL (http, https), a file or a PIL picture, upright and in RGB.

    `convert_method` replaces the conversion to RGB.
    """
    if isinstance(image, PIL.Image.Image):
        picture = image
    elif isinstance(image, str) and image.startswith(("http://", "https://")):
        request = urllib.request.Request(image, headers={"User-Agent": "fewstep"})
        with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
            picture = PIL.Image.open(io.BytesIO(response.read()))
    elif isinstance(image, (str, Path)) and Path(image).is_file():
        picture = PIL.Image.open(image)
    else:
        raise RequestError(
            f"image must be a URL (http:// or https://), a file or a PIL picture, got {image!r}"
        )
    picture = PIL.ImageOps.exif_transpose(picture)
    return picture.convert("RGB") if convert_method is None else convert_method(picture)


def make_image_grid(
    images: Sequence[PIL.Image.Image], rows: int, cols: int, resize: int | None = None
) -> PIL.Image.Image:
    """One picture of `rows` x `cols` cells of the first picture's size, filled row by row.

    `resize` makes every picture a square of that many pixels.
    """
    if len(images) != rows * cols:
        raise RequestError(
            f"images must hold rows * cols = {rows * cols} pictures, got {len(images)}"
        )
    if resize is not None:
        images = [picture.resize((resize, resize)) for picture in images]
    width, height = images[0].size
    grid = PIL.Image.new("RGB", (cols * width, rows * height))
    for index, picture in enumerate(images):
        grid.paste(picture, (index % cols * width, index // cols * height))
    return grid


def export_to_gif(
    image: Sequence[PIL.Image.Image],
    output_gif_path: str | Path | None = None,
    fps: int = 10,
) -> str:
    """Write frames as an endless GIF; returns its path, by default that of a new temporary file."""
    if len(image) == 0:
        raise RequestError("image must hold at least one frame, got none")
    if fps <= 0:
        raise RequestError(f"fps must be positive, got {fps}")
    if output_gif_path is None:
        with tempfile.NamedTemporaryFile(suffix=".gif", delete=False) as file:
            output_gif_path = file.name
    image[0].save(
        output_gif_path,
        save_all=True,
        append_images=list(image[1:]),
        optimize=False,
        duration=1000 // fps,
        loop=0,
    )
    return str(output_gif_path)


def numpy_to_pil(images: np.ndarray) -> list[PIL.Image.Image]:
    """PIL pictures from floats (B, H, W, C) or (H, W, C) in [0, 1]."""
    return to_pil(images)


def pt_to_pil(images: Tensor) -> list[PIL.Image.Image]:
    """PIL pictures from a tensor (B, C, H, W) in [-1, 1]."""
    unit = (images / 2 + 0.5).clamp(0, 1)
    return to_pil(unit.permute(0, 2, 3, 1).float().cpu().numpy())
