"""From a `Scene` to its pixels."""

from __future__ import annotations

import numpy as np
from PIL import Image

from fewstep.training.emoji.scenes import BACKGROUNDS, RECOLOURS, Placed, Scene
from fewstep.training.emoji.sprites import Sprites


def render(scene: Scene, sprites: Sprites, size: int = 64) -> np.ndarray:
    """The picture of `scene`, uint8 RGB (size, size, 3)."""
    canvas = np.empty((size, size, 3), np.float32)
    canvas[:] = BACKGROUNDS[scene.background]
    for placed in scene.objects:
        sprite = _sprite(placed, scene.style, sprites, max(1, round(placed.size * size)))
        _paste(canvas, sprite, placed, size)
    return (canvas + 0.5).astype(np.uint8)


def _sprite(placed: Placed, style: str, sprites: Sprites, side: int) -> np.ndarray:
    """The object scaled, mirrored and recoloured: float32 RGBA 0-255, premultiplied alpha."""
    image = Image.fromarray(np.ascontiguousarray(sprites.pictures[style][placed.concept]))
    if placed.mirrored:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    image = image.resize((side, side), Image.Resampling.BICUBIC)
    look = sprites.looks[style][placed.concept]
    if placed.recolour is not None and look is not None and look.hue is not None:
        image = rotate_hue(image, look.hue, RECOLOURS[placed.recolour][0])
    rgba = np.asarray(image).astype(np.float32)
    rgba[..., :3] *= rgba[..., 3:] / 255
    return rgba


def rotate_hue(image: Image.Image, own: float, wanted: float) -> Image.Image:
    """The RGBA image with hue `own` turned into `wanted` (degrees); far hues stay as they are.

    Hues within 60 degrees of `own` turn with it, their differences halved so that shades of a red
    do not become both blue and purple; beyond 90 degrees they stay, so that the leaf of "a blue
    apple" is green; between, the turn fades out.
    """
    hue, saturation, value = image.convert("RGB").convert("HSV").split()
    angles = np.arange(256) * (360 / 256)
    offset = (angles - own + 180) % 360 - 180
    shift = (wanted + offset / 2 - angles + 180) % 360 - 180
    turned = angles + shift * np.clip((90 - np.abs(offset)) / 30, 0, 1)
    table = np.round(turned * (256 / 360)).astype(int) % 256
    rotated = Image.merge("HSV", (hue.point(table.tolist()), saturation, value)).convert("RGB")
    rotated.putalpha(image.getchannel("A"))
    return rotated


def _paste(canvas: np.ndarray, sprite: np.ndarray, placed: Placed, size: int) -> None:
    """Lay the sprite over the canvas in place; what stands out of the picture is cut off."""
    side = len(sprite)
    left = round(placed.x * size - side / 2)
    top = round(placed.y * size - side / 2)
    x0, y0, x1, y1 = max(left, 0), max(top, 0), min(left + side, size), min(top + side, size)
    part = sprite[y0 - top : y1 - top, x0 - left : x1 - left]
    area = canvas[y0:y1, x0:x1]
    area *= 1 - part[..., 3:] / 255
    area += part[..., :3]
