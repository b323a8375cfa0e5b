"""Inpainting: which part of a picture is drawn anew, and how the rest is kept.

A mask is 1 (white) where the picture is repainted. Shapes: pictures (b, 3, H, W) in [-1, 1], masks
(b, 1, H, W) of 0 and 1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageFilter
import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import RequestError
from .images import Pictures, batch_of, preprocess, stack, to_pil

Box = tuple[int, int, int, int]  # left, top, right, bottom


@dataclass(frozen=True, eq=False)
class Canvas:
    """The pictures and masks of an inpainting request, at the size that the model works at."""

    pictures: Tensor  # (b, 3, H, W), or latents (b, C, h, w)
    masks: Tensor  # (b, 1, H, W)
    finish: Callable[[Any], Any] | None  # puts the results back into the original pictures
    box: Box | None = None  # the part of the picture that is worked on

    def cut(self, name: str, images: Any) -> Any:
        """Further pictures of the same scene, PIL ones in lists or not, cut to the box."""
        if self.box is None or images is None:
            return images
        if isinstance(images, (list, tuple)):
            return [self.cut(name, image) for image in images]
        if not isinstance(images, PIL.Image.Image):
            raise RequestError(f"{name} must be PIL pictures for padding_mask_crop")
        return images.crop(self.box)


def canvas_of(
    image: Pictures | None,
    mask_image: Pictures | None,
    size: tuple[int, int],
    latent_channels: int,
    *,
    crop: int | None = None,
    blur: float = 0.0,
    paste_back: bool = False,
) -> Canvas:
    """What an inpainting request works on; `size` is (H, W).

    With `crop`, a margin in pixels, only the mask's surroundings are worked on and pasted back.
    With `paste_back`, what the mask leaves out comes back unchanged; `blur`, a radius in pixels,
    softens the edge of what is pasted.
    """
    if image is None or mask_image is None:
        missing = "image" if image is None else "mask_image"
        raise RequestError(
            f"{missing} is missing: inpainting needs the picture and a mask, white where it is "
            "repainted"
        )
    box = None
    if crop is not None:
        box = cropped_box(image, mask_image, size, crop)
    if blur > 0 and not (paste_back or box):
        raise RequestError(
            f"mask_blur={blur} softens the edge of what is pasted back; add paste_back=True or "
            "padding_mask_crop"
        )
    finish = None
    if box is not None or paste_back:
        if not isinstance(image, PIL.Image.Image) or not isinstance(mask_image, PIL.Image.Image):
            raise RequestError(
                "image and mask_image must be single PIL pictures for paste_back and "
                "padding_mask_crop"
            )
        finish = Pasting(image.convert("RGB"), mask_image.convert("L"), box, blur)
    height, width = size
    return Canvas(
        fitted(image, box, (width, height), latent_channels),
        fitted_mask(mask_image, box, (width, height)),
        finish,
        box,
    )


def fitted(image: Pictures, box: Box | None, size: tuple[int, int], latent_channels: int) -> Tensor:
    """Pictures (b, 3, H, W) in [-1, 1] cut to `box` and scaled to `size`, (W, H); latents pass."""
    listed: list[Any] = list(image) if isinstance(image, (list, tuple)) else [image]
    if all(isinstance(p, PIL.Image.Image) for p in listed):
        lanczos = PIL.Image.Resampling.LANCZOS
        cut = [p.convert("RGB") if box is None else p.convert("RGB").crop(box) for p in listed]
        return preprocess([p if p.size == size else p.resize(size, lanczos) for p in cut], 1)
    pictures = preprocess(image, 1, latent_channels)
    if pictures.shape[1] != 3 or tuple(pictures.shape[2:]) == size[::-1]:
        return pictures
    return F.interpolate(pictures, size=size[::-1])


def fitted_mask(mask: Pictures, box: Box | None, size: tuple[int, int]) -> Tensor:
    """Masks (b, 1, H, W) of 0 and 1, cut to `box` and scaled to `size`, (W, H)."""
    listed: list[Any] = list(mask) if isinstance(mask, (list, tuple)) else [mask]
    rows = []
    for one in listed:
        if isinstance(one, PIL.Image.Image):
            grey = one.convert("L") if box is None else one.convert("L").crop(box)
            if grey.size != size:
                grey = grey.resize(size, PIL.Image.Resampling.LANCZOS)
            row = torch.from_numpy(np.array(grey, dtype=np.float32) / 255.0)[None, None]
        else:
            row = plain_mask(one, size)
        rows.append(row)
    return (stack(rows) >= 0.5).float()


def plain_mask(mask: Any, size: tuple[int, int]) -> Tensor:
    """A numpy array (H, W[, 1]) or tensor ([b, ][1, ]H, W) in [0, 1] as (b, 1, H, W)."""
    if not isinstance(mask, (np.ndarray, Tensor)):
        raise RequestError(
            "mask_image must be a PIL picture, a numpy array or a tensor, "
            f"got {type(mask).__name__}"
        )
    if mask.ndim == 2:
        mask = mask[None] if isinstance(mask, Tensor) else mask[..., None]
    row = batch_of(mask).float()
    if row.shape[1] != 1:
        raise RequestError(f"mask_image must have 1 channel as an array, got {row.shape[1]}")
    return row if tuple(row.shape[2:]) == size[::-1] else F.interpolate(row, size=size[::-1])


def cropped_box(image: Pictures, mask: Pictures, size: tuple[int, int], margin: int) -> Box:
    """The box around the mask's white part plus `margin`, grown to the shape of `size` (H, W)."""
    if not isinstance(image, PIL.Image.Image) or not isinstance(mask, PIL.Image.Image):
        raise RequestError("padding_mask_crop needs single PIL pictures as image and mask_image")
    if image.size != mask.size:
        raise RequestError(
            f"padding_mask_crop needs a mask of the picture's size {image.size}, got {mask.size}"
        )
    white = mask.convert("L").getbbox()
    if white is None:
        raise RequestError("mask_image is black throughout: nothing is to be repainted")
    width, height = image.size
    left, top = max(white[0] - margin, 0), max(white[1] - margin, 0)
    right, bottom = min(white[2] + margin, width), min(white[3] + margin, height)
    shape = size[1] / size[0]
    if (right - left) / (bottom - top) > shape:
        top, bottom = grown(top, bottom, int((right - left) / shape), height)
    else:
        left, right = grown(left, right, int((bottom - top) * shape), width)
    return left, top, right, bottom


def grown(low: int, high: int, length: int, limit: int) -> tuple[int, int]:
    """An interval grown to `length` around its middle, moved and then cut to lie in [0, limit]."""
    low -= (length - (high - low)) // 2
    low = max(min(low, limit - length), 0)
    return low, min(low + length, limit)


@dataclass(frozen=True, eq=False)
class Pasting:
    """Puts repainted pictures back into the original where the mask is white."""

    picture: PIL.Image.Image  # RGB
    mask: PIL.Image.Image  # L
    box: Box | None
    blur: float

    def __call__(self, results: Any) -> Any:
        if not isinstance(results, list):
            raise RequestError(
                "paste_back and padding_mask_crop need output_type='pil': they paste pixels"
            )
        return [self.pasted(result) for result in results]

    def pasted(self, result: PIL.Image.Image) -> PIL.Image.Image:
        """The original picture with the repainted part of `result`."""
        picture, box = self.picture, self.box or (0, 0, *self.picture.size)
        size = (box[2] - box[0], box[3] - box[1])
        if result.size != size:
            result = result.resize(size, PIL.Image.Resampling.LANCZOS)
        mask = self.mask if self.mask.size == picture.size else self.mask.resize(picture.size)
        if self.blur > 0:
            # Softened inwards only, so that what the mask leaves out stays exact.
            soft = mask.filter(PIL.ImageFilter.GaussianBlur(self.blur))
            inside = np.minimum(np.array(soft), np.array(mask.point(lambda v: 255 * (v >= 128))))
            mask = to_pil(inside[None, ..., None] / 255.0)[0]
        else:
            mask = mask.point(lambda v: 255 * (v >= 128))
        whole = picture.copy()
        whole.paste(result, box[:2], mask.crop(box))
        return whole
