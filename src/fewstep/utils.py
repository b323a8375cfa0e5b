"""Small helpers for scripts: load a picture, lay out a grid, write a video, watch the steps."""

from __future__ import annotations

import importlib
import io
import os
import tempfile
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageOps
import torch
from torch import Tensor

from .errors import RequestError
from .pipelines.images import to_pil
from .pipelines.previews import PreviewCallback
from .random import randn as randn_tensor

__all__ = [
    "PreviewCallback",
    "export_to_apng",
    "export_to_gif",
    "export_to_video",
    "export_to_webp",
    "load_image",
    "make_image_grid",
    "numpy_to_pil",
    "pt_to_pil",
    "randn_tensor",
]

TIMEOUT = 60.0  # seconds for a download

Frames = Sequence[PIL.Image.Image] | np.ndarray | Sequence[np.ndarray] | Tensor


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
    elif isinstance(image, (str, Path)) and os.path.isfile(image):
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


def export_to_gif(image: Frames, output_gif_path: str | Path | None = None, fps: float = 10) -> str:
    """Write frames as an endless GIF of 256 colours; returns its path, by default a new one.

    Frames are PIL pictures, arrays (F, H, W, 3) or a tensor (F, 3, H, W), floats in [0, 1] or
    bytes: one video of a pipeline. Players show at most 50 frames per second.
    """
    return save_animation(image, output_gif_path, ".gif", fps, format="GIF", optimize=False)


def export_to_apng(frames: Frames, output_path: str | Path | None = None, fps: float = 10) -> str:
    """Write frames as an endless animated PNG, without loss; returns its path."""
    return save_animation(frames, output_path, ".png", fps, format="PNG")


def export_to_webp(
    frames: Frames,
    output_path: str | Path | None = None,
    fps: float = 10,
    quality: int = 80,
    lossless: bool = False,
) -> str:
    """Write frames as an endless animated WebP; returns its path. `quality` is 0 to 100."""
    how = {"quality": quality, "lossless": lossless}
    return save_animation(frames, output_path, ".webp", fps, format="WEBP", **how)


def save_animation(
    frames: Frames, path: str | Path | None, suffix: str, fps: float, **how: Any
) -> str:
    """Write frames by PIL, to be shown over and over; returns the path."""
    first, *rest = pictures_of(frames)
    path = named(path, suffix, fps)
    duration = int(1000 // fps)  # milliseconds
    first.save(path, save_all=True, append_images=rest, duration=duration, loop=0, **how)
    return path


def export_to_video(
    video_frames: Frames,
    output_video_path: str | Path | None = None,
    fps: float = 10,
    quality: float | None = 5.0,
    bitrate: int | None = None,
    macro_block_size: int | None = 16,
) -> str:
    """Write frames as an MP4 file (H.264); returns its path, by default a new one.

    `quality` is 0 to 10, and not read with a `bitrate` in bits per second. Sides are stretched to
    multiples of `macro_block_size`, which players may need; 1 leaves them. Needs imageio and
    imageio-ffmpeg.
    """
    frames = pictures_of(video_frames)
    path = named(output_video_path, ".mp4", fps)
    try:
        importlib.import_module("imageio_ffmpeg")
        imageio = importlib.import_module("imageio")
    except ImportError:
        raise RequestError(
            "export_to_video needs two packages: pip install imageio imageio-ffmpeg; or write an "
            "animation with export_to_webp, export_to_apng or export_to_gif"
        ) from None
    how = {"quality": quality, "bitrate": bitrate, "macro_block_size": macro_block_size}
    with imageio.get_writer(path, format="FFMPEG", mode="I", fps=fps, **how) as writer:
        for frame in frames:
            writer.append_data(np.asarray(frame.convert("RGB")))
    return path


def pictures_of(frames: Frames) -> list[PIL.Image.Image]:
    """The frames of one video as PIL pictures of one size."""
    if isinstance(frames, Tensor):
        bytes_or_floats = frames if frames.dtype == torch.uint8 else frames.float()
        frames = bytes_or_floats.detach().movedim(-3, -1).cpu().numpy()
    pictures: list[PIL.Image.Image] = []
    for frame in frames:
        if isinstance(frame, PIL.Image.Image):
            pictures.append(frame)
        elif isinstance(frame, np.ndarray) and frame.ndim == 3:
            pictures += to_pil(frame / 255.0 if frame.dtype == np.uint8 else frame)
        else:
            shape = getattr(frame, "shape", type(frame).__name__)
            raise RequestError(
                "frames must be those of one video, PIL pictures, arrays (H, W, 3) or a tensor "
                f"(F, 3, H, W), got one of {shape}; pipelines return a list of videos: frames[0]"
            )
    if not pictures:
        raise RequestError("frames must hold at least one frame, got none")
    sizes = {picture.size for picture in pictures}
    if len(sizes) > 1:
        raise RequestError(f"frames must have one size, got {sorted(sizes)}")
    return pictures


def named(path: str | Path | None, suffix: str, fps: float) -> str:
    """`path`, or that of a new temporary file. Raises RequestError for an impossible rate."""
    if fps <= 0:
        raise RequestError(f"fps must be positive, got {fps}")
    if path is not None:
        return str(path)
    with tempfile.NamedTemporaryFile(suffix=suffix, delete=False) as file:
        return file.name


def numpy_to_pil(images: np.ndarray) -> list[PIL.Image.Image]:
    """PIL pictures from floats (B, H, W, C) or (H, W, C) in [0, 1]."""
    return to_pil(images)


def pt_to_pil(images: Tensor) -> list[PIL.Image.Image]:
    """PIL pictures from a tensor (B, C, H, W) in [-1, 1]."""
    unit = (images / 2 + 0.5).clamp(0, 1)
    return to_pil(unit.permute(0, 2, 3, 1).float().cpu().numpy())
