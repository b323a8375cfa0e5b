"""Contact sheets of pictures, made as training goes on."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image
from torch import Tensor


def to_pil(x: Tensor) -> list[Image.Image]:
    """Pictures (B, 3, H, W) in [-1, 1] as PIL images."""
    pixels = (x.float().clamp(-1, 1) + 1).mul(127.5).round().byte()
    return [Image.fromarray(p) for p in pixels.permute(0, 2, 3, 1).cpu().numpy()]


def grid(images: Sequence[Image.Image], columns: int) -> Image.Image:
    """The images row by row, with a pixel of grey between them."""
    width, height = images[0].size
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * (width + 1), rows * (height + 1)), "grey")
    for i, image in enumerate(images):
        sheet.paste(image, (i % columns * (width + 1), i // columns * (height + 1)))
    return sheet
