"""From a picture of any size and kind to one of the training size: upright, resized, cropped."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ...errors import RequestError
from ..config import Pictures, Recipe

# Heights and widths of SDXL's buckets at 1024 x 1024 pixels (Podell et al. 2023, section 2.3).
BUCKETS = ((640, 1536), (768, 1344), (832, 1216), (896, 1152), (1024, 1024))
ORIENTATION = 0x0112  # of EXIF; from 5 on height and width are exchanged


def upright_size(picture: Image.Image) -> tuple[int, int]:
    """Width and height after the EXIF orientation is applied."""
    width, height = picture.size
    return (height, width) if picture.getexif().get(ORIENTATION, 1) >= 5 else (width, height)


def upright(picture: Image.Image) -> Image.Image:
    """The picture as its EXIF orientation means it, in RGB; what is transparent becomes white."""
    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I"):  # 16 bits of grey, which Pillow would clip
        picture = Image.fromarray((np.asarray(picture).astype(np.uint32) >> 8).astype(np.uint8))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture)
    return picture.convert("RGB")


@dataclass(frozen=True)
class Crop:
    """How a picture is cut: resized, then cropped at (top, left), then mirrored or not.

    Sizes are (height, width) in pixels.
    """

    original: tuple[int, int]
    resized: tuple[int, int]
    top: int
    left: int
    size: tuple[int, int]
    mirrored: bool

    @property
    def name(self) -> str:
        """All that decides the pixels, for the names of cached latents."""
        return f"{self.resized} {self.top},{self.left} {self.size} {self.mirrored} lanczos"

    @property
    def time_ids(self) -> tuple[int, int, int, int, int, int]:
        """What SDXL is told (section 2.2): original size, top left corner, target size.

        A mirrored picture's corner is the one that its mirrored original was cropped at.
        """
        left = self.resized[1] - self.left - self.size[1] if self.mirrored else self.left
        return (*self.original, self.top, left, *self.size)

    def apply(self, picture: Image.Image) -> Tensor:
        """Pixels (3, h, w) uint8 of an RGB picture of the original size."""
        if picture.size != self.resized[::-1]:
            picture = picture.resize(self.resized[::-1], Image.Resampling.LANCZOS)
        (height, width), top, left = self.size, self.top, self.left
        pixels = np.asarray(picture)[top : top + height, left : left + width]
        if self.mirrored:
            pixels = pixels[:, ::-1]
        return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))


@dataclass(frozen=True)
class Cutting:
    """How the pictures of a recipe are cut; `sizes` (height, width) are the buckets."""

    sizes: tuple[tuple[int, int], ...]
    seed: int = 0
    random: bool = False
    flip: float = 0.0
    variants: int = 1

    def crops(self, digest: str, height: int, width: int) -> list[Crop]:
        """The variants of a picture; each depends on the seed, the picture and its number alone."""
        size = nearest(self.sizes, height, width)
        scale = max(size[0] / height, size[1] / width)
        resized = max(size[0], round(height * scale)), max(size[1], round(width * scale))
        spare = resized[0] - size[0], resized[1] - size[1]
        found = []
        for variant in range(self.variants):
            top, left, mirrored = spare[0] // 2, spare[1] // 2, False
            if self.random or self.flip:
                down, right, mirror = chances(self.seed, digest, variant)
                mirrored = mirror < self.flip
            if self.random:
                top, left = int(down * (spare[0] + 1)), int(right * (spare[1] + 1))
            found.append(Crop((height, width), resized, top, left, size, mirrored))
        return found


def chances(seed: int, digest: str, variant: int) -> tuple[float, float, float]:
    """Three numbers in [0, 1) of a variant's own."""
    drawn = hashlib.sha256(f"{seed} {digest} {variant}".encode()).digest()
    first, second, third = (int.from_bytes(drawn[i : i + 6], "big") / 2**48 for i in (0, 6, 12))
    return first, second, third


def nearest(sizes: tuple[tuple[int, int], ...], height: int, width: int) -> tuple[int, int]:
    """The size whose aspect ratio is nearest to that of a picture."""
    return min(sizes, key=lambda size: abs(math.log(size[1] / size[0] * height / width)))


def bucket_sizes(resolution: int, unit: int) -> tuple[tuple[int, int], ...]:
    """SDXL's buckets for squares of `resolution`, in multiples of `unit`, sorted.

    A side halfway between two multiples takes the smaller, so that no bucket needs much memory.
    """

    def side(pixels: int) -> int:
        return unit * max(1, math.ceil(pixels * resolution / (1024 * unit) - 0.5))

    portrait = [(side(height), side(width)) for height, width in BUCKETS]
    return tuple(sorted({*portrait, *((width, height) for height, width in portrait)}))


def cutting_of(recipe: Recipe, factor: int) -> Cutting:
    """How a recipe's pictures are cut, for an autoencoder with `factor` pixels per latent."""
    data = recipe.data
    if not isinstance(data, Pictures):
        check_side("data.size", data.size, factor, "pixels per latent of this autoencoder")
        return Cutting(((data.size, data.size),), recipe.seed)
    sizes: tuple[tuple[int, int], ...] = ((data.resolution, data.resolution),)
    unit, why = factor, "pixels per latent of this autoencoder"
    if data.buckets:
        unit, why = min(64, 8 * factor), "the unit of the buckets' sides"
    check_side("data.resolution", data.resolution, unit, why)
    if data.buckets:
        sizes = bucket_sizes(data.resolution, unit)
    return Cutting(sizes, recipe.seed, data.crop == "random", data.flip, data.variants)


def check_side(name: str, value: int, unit: int, why: str) -> None:
    """Raises RequestError unless a side in pixels is a positive multiple of `unit`."""
    if value < unit or value % unit:
        near = max(unit, round(value / unit) * unit)
        raise RequestError(f"{name}={value} must be a multiple of {unit} ({why}); use {near}")
