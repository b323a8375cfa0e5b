"""Pictures in and out: PIL, numpy and torch to tensors (B, 3, H, W) in [-1, 1], and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np
import PIL.Image
import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import CheckpointError, RequestError

Picture = PIL.Image.Image | np.ndarray | Tensor
Pictures = Picture | Sequence[Picture]
OutputType = Literal["pil", "np", "pt", "latent"]


def preprocess(image: Pictures, multiple: int = 8, latent_channels: int = 4) -> Tensor:
    """Pictures as a float32 tensor (B, 3, H, W) in [-1, 1], H and W floored to a `multiple`.

    Takes PIL pictures of one size; numpy arrays (H, W, C) or (B, H, W, C); tensors (C, H, W) or
    (B, C, H, W); or lists of one of these kinds. Floats lie in [0, 1], or in [-1, 1] if any is
    negative; bytes in [0, 255]. Tensors of `latent_channels` channels are latents: they pass as
    they are, unless that number is a picture's (1 or 3).
    """
    pictures: list[Any] = list(image) if isinstance(image, (list, tuple)) else [image]
    kinds = {
        kind
        for p in pictures
        for kind in (PIL.Image.Image, np.ndarray, Tensor)
        if isinstance(p, kind)
    }
    if len(kinds) != 1 or not all(isinstance(p, tuple(kinds)) for p in pictures):
        names = sorted({type(p).__name__ for p in pictures}) or ["nothing"]
        raise RequestError(
            f"image must be a PIL picture, a numpy array, a tensor, or a list of one of these "
            f"kinds, got {' and '.join(names)}"
        )
    if PIL.Image.Image in kinds:
        return stack([resized(p.convert("RGB"), multiple) for p in pictures])
    batch = stack([batch_of(p) for p in pictures])
    if batch.shape[1] == latent_channels and latent_channels not in (1, 3):
        return batch
    return resized_tensor(to_unit_range(batch), multiple)


def resized(picture: PIL.Image.Image, multiple: int) -> Tensor:
    """An RGB picture as (1, 3, H, W) in [-1, 1]."""
    width, height = (floored(side, multiple) for side in picture.size)
    if (width, height) != picture.size:
        picture = picture.resize((width, height), PIL.Image.Resampling.LANCZOS)
    pixels = torch.from_numpy(np.array(picture, dtype=np.float32) / 255.0)
    return pixels.permute(2, 0, 1)[None] * 2.0 - 1.0


def floored(side: int, multiple: int) -> int:
    """`side` floored to a multiple of `multiple`; RequestError if nothing is left of it."""
    if side < multiple:
        raise RequestError(f"image has a side of {side} pixels, at least {multiple} are needed")
    return side - side % multiple


def batch_of(picture: Picture) -> Tensor:
    """A numpy array or tensor as (B, C, H, W)."""
    if isinstance(picture, np.ndarray):
        if picture.ndim == 3:
            picture = picture[None]
        if picture.ndim != 4:
            raise RequestError(
                f"image must be of shape (H, W, C) or (B, H, W, C) as a numpy array, "
                f"got {picture.shape}"
            )
        return torch.from_numpy(np.ascontiguousarray(picture)).permute(0, 3, 1, 2)
    assert isinstance(picture, Tensor)
    tensor = picture[None] if picture.ndim == 3 else picture
    if tensor.ndim != 4:
        raise RequestError(
            f"image must be of shape (C, H, W) or (B, C, H, W) as a tensor, "
            f"got {tuple(picture.shape)}"
        )
    return tensor


def stack(rows: Sequence[Tensor]) -> Tensor:
    """Batches (b, C, H, W) of one size, one behind another."""
    sizes = {tuple(row.shape[1:]) for row in rows}
    if len(sizes) > 1:
        raise RequestError(
            f"image holds pictures of different sizes (channels, height, width): {sorted(sizes)}; "
            "resize them, or call once for each"
        )
    return torch.cat(list(rows))


def to_unit_range(batch: Tensor) -> Tensor:
    """Pictures (B, C, H, W) of bytes or floats as float32 (B, 3, H, W) in [-1, 1]."""
    channels = batch.shape[1]
    if channels not in (1, 3):
        raise RequestError(f"image must have 1 or 3 channels, got {channels}")
    scaled = batch / 255.0 if batch.dtype == torch.uint8 else batch.float()
    low, high = float(scaled.min()), float(scaled.max())
    if low < -1.0 or high > 1.0:
        raise RequestError(
            "image must hold floats in [0, 1] or [-1, 1], or uint8, "
            f"got {batch.dtype} in [{low:g}, {high:g}]"
        )
    scaled = scaled if low < 0 else scaled * 2.0 - 1.0
    return scaled.expand(-1, 3, -1, -1)


def resized_tensor(batch: Tensor, multiple: int) -> Tensor:
    """`batch` (B, C, H, W) with its sides floored, by nearest neighbours as diffusers does."""
    size = (floored(batch.shape[2], multiple), floored(batch.shape[3], multiple))
    return batch if size == tuple(batch.shape[2:]) else F.interpolate(batch, size=size)


def postprocess(
    image: Tensor, output_type: str = "pil"
) -> list[PIL.Image.Image] | np.ndarray | Tensor:
    """Decoded pictures (B, 3, H, W) in about [-1, 1] as what `output_type` asks for.

    "pil": list of PIL pictures; "np": float32 (B, H, W, 3) in [0, 1]; "pt": (B, 3, H, W) in [0, 1];
    "latent": the tensor as it is.
    """
    check_output_type(output_type)
    if output_type == "latent":
        return image
    image = (image / 2 + 0.5).clamp(0, 1)
    if output_type == "pt":
        return image
    array = image.permute(0, 2, 3, 1).float().cpu().numpy()
    if output_type == "np":
        return array
    if not np.isfinite(array).all():
        raise CheckpointError(
            "the picture came out as numbers that are not finite: weights, or those of a LoRA, are "
            "damaged, or too large for float16; load with torch_dtype=torch.float32 or bfloat16"
        )
    return to_pil(array)


def check_output_type(output_type: str) -> None:
    """Raises RequestError unless `output_type` is one of the four kinds."""
    if output_type not in get_args(OutputType):
        raise RequestError(
            f"output_type must be one of {get_args(OutputType)}, got {output_type!r}"
        )


def to_pil(images: np.ndarray) -> list[PIL.Image.Image]:
    """PIL pictures from floats (B, H, W, C) or (H, W, C) in [0, 1], C 1 or 3."""
    images = images[None] if images.ndim == 3 else images
    pixels = (images * 255).round().astype("uint8")
    return [PIL.Image.fromarray(p[..., 0] if p.shape[-1] == 1 else p) for p in pixels]
