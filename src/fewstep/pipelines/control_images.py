"""Pictures to steer by: from what a caller gives to tensors (b, C, H, W) in [0, 1].

Shapes: B rows of a job, b pictures, C channels, H and W height and width in pixels.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import PIL.Image
import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import RequestError
from .images import batch_of, floored, stack


def size_of(images: Any, multiple: int, name: str = "image") -> tuple[int, int]:
    """Height and width of the first picture of `images`, floored to a multiple."""
    while isinstance(images, (list, tuple)) and images:
        images = images[0]
    if isinstance(images, PIL.Image.Image):
        sides = (images.height, images.width)
    elif isinstance(images, (np.ndarray, Tensor)):
        sides = (batch_of(images).shape[2], batch_of(images).shape[3])
    else:
        raise RequestError(missing(images, name))
    return floored(sides[0], multiple), floored(sides[1], multiple)


def by_network(images: Any, name: str) -> Any:
    """`images` with one entry per network: lists within a list are diffusers' one per prompt."""
    if not isinstance(images, (list, tuple)):
        return images
    nested = [isinstance(entry, (list, tuple)) for entry in images]
    if not any(nested):
        return images
    if not all(nested) or len({len(entry) for entry in images}) > 1:
        raise RequestError(
            f"{name} mixes lists and pictures, or lists of different lengths; give a picture for "
            "each ControlNet, or for each prompt a list of them"
        )
    return [list(entry) for entry in zip(*images, strict=True)]


def per_network_pictures(images: Any, count: int, name: str) -> list[Any]:
    """The pictures of each of `count` networks."""
    if images is None:
        raise RequestError(missing(images, name))
    if count == 1:
        inner = isinstance(images, (list, tuple)) and len(images) == 1
        return [images[0] if inner else images]
    if not isinstance(images, (list, tuple)) or len(images) != count:
        got = f"{len(images)}" if isinstance(images, (list, tuple)) else type(images).__name__
        raise RequestError(
            f"{name} must be a list with an entry for each of {count} networks, got {got}"
        )
    return list(images)


def unit_pictures(images: Any, size: tuple[int, int], channels: int, name: str) -> Tensor:
    """Pictures as float32 (b, C, H, W) of a size; PIL and uint8 become [0, 1].

    Floats pass as they are, in [-1, 1]: some ControlNets for inpainting read -1 as a hole.
    """
    pictures = list(images) if isinstance(images, (list, tuple)) else [images]
    if pictures and all(isinstance(p, PIL.Image.Image) for p in pictures):
        return torch.cat([from_pil(p, size, channels) for p in pictures])
    if not pictures or not all(isinstance(p, (np.ndarray, Tensor)) for p in pictures):
        raise RequestError(missing(images, name))
    batch = stack([batch_of(p) for p in pictures])
    batch = batch.float() / 255 if batch.dtype == torch.uint8 else batch.float()
    low, high = float(batch.min()), float(batch.max())
    if low < -1 or high > 1:
        raise RequestError(
            f"{name} must hold floats in [0, 1] or uint8, got floats in [{low:g}, {high:g}]"
        )
    if batch.shape[1] not in (1, channels):
        raise RequestError(
            f"{name} has {batch.shape[1]} channels, but the network reads {channels}"
        )
    batch = batch.expand(-1, channels, -1, -1)
    return batch if batch.shape[2:] == torch.Size(size) else F.interpolate(batch, size=size)


def from_pil(picture: PIL.Image.Image, size: tuple[int, int], channels: int) -> Tensor:
    """A PIL picture as float32 (1, C, H, W) in [0, 1], resized if need be."""
    height, width = size
    if channels not in (1, 3):
        raise RequestError(
            f"the network reads {channels} channels; give tensors (B, {channels}, H, W)"
        )
    picture = picture.convert("L" if channels == 1 else "RGB")
    if picture.size != (width, height):
        picture = picture.resize((width, height), PIL.Image.Resampling.LANCZOS)
    pixels = torch.from_numpy(np.array(picture, dtype=np.float32) / 255)
    return pixels.reshape(height, width, channels).permute(2, 0, 1)[None]


def spread(batch: Tensor, rows: int, name: str) -> Tensor:
    """Rows (B, ...) of a batch (b, ...): each serves B / b rows side by side."""
    if rows % len(batch):
        raise RequestError(
            f"{name} holds {len(batch)} pictures, but {rows} are drawn; give one, or one per prompt"
        )
    return batch.repeat_interleave(rows // len(batch), 0)


def missing(images: Any, name: str) -> str:
    """What to say where `images` are no pictures."""
    kinds = images if isinstance(images, (list, tuple)) else [images]
    got = ", ".join(sorted({type(kind).__name__ for kind in kinds})) or "an empty list"
    return (
        f"{name} must be a picture to steer by: a PIL picture, a numpy array (H, W, C) or a tensor "
        f"(C, H, W), or a list of one of these kinds; got {got}"
    )
