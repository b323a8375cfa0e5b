"""Contact sheets: pictures in a labelled grid, a row a prompt and a column a method."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from fewstep.errors import RequestError

_GAP = 4  # pixels between pictures
_FONT_SIZE = 11
_LABEL_WIDTH = 150


def contact_sheet(
    pictures: np.ndarray,
    row_labels: Sequence[str],
    column_labels: Sequence[str],
    *,
    scale: int = 1,
) -> Image.Image:
    """A white sheet of pictures uint8 [R, C, H, W, 3] with R row and C column labels.

    `scale` repeats each pixel, for small pictures. Long row labels are wrapped and, should they
    still be higher than the picture, cut off at its edge.
    """
    array = np.asarray(pictures)
    if array.dtype != np.uint8 or array.ndim != 5 or array.shape[-1] != 3:
        raise RequestError(
            f"pictures must be uint8 [R, C, H, W, 3], got {array.dtype} {list(array.shape)}"
        )
    if (len(row_labels), len(column_labels)) != array.shape[:2]:
        raise RequestError(
            f"{array.shape[0]} x {array.shape[1]} pictures need as many labels, "
            f"got {len(row_labels)} x {len(column_labels)}"
        )
    if scale < 1:
        raise RequestError(f"scale must be at least 1, got {scale}")
    array = array.repeat(scale, axis=2).repeat(scale, axis=3)
    rows, columns, height, width, _ = array.shape
    font = ImageFont.load_default(_FONT_SIZE)
    head = _text_height(column_labels, width, font) + _GAP
    sheet = Image.new(
        "RGB",
        (_LABEL_WIDTH + columns * (width + _GAP), head + rows * (height + _GAP)),
        "white",
    )
    for column, label in enumerate(column_labels):
        x = _LABEL_WIDTH + column * (width + _GAP)
        sheet.paste(_label(label, width, head - _GAP, font), (x, 0))
    for row, label in enumerate(row_labels):
        y = head + row * (height + _GAP)
        sheet.paste(_label(label, _LABEL_WIDTH - _GAP, height, font), (0, y))
        for column in range(columns):
            picture = Image.fromarray(array[row, column])
            sheet.paste(picture, (_LABEL_WIDTH + column * (width + _GAP), y))
    return sheet


def _wrapped(label: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    letters = max(4, int(width / font.getlength("n")))
    return "\n".join(textwrap.wrap(label, letters))


def _text_height(
    labels: Sequence[str], width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont
) -> int:
    draw = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    boxes = [draw.multiline_textbbox((0, 0), _wrapped(x, width, font), font) for x in labels]
    return int(max(box[3] for box in boxes)) + 2


def _label(
    label: str, width: int, height: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont
) -> Image.Image:
    image = Image.new("RGB", (width, height), "white")
    ImageDraw.Draw(image).multiline_text((2, 0), _wrapped(label, width, font), "black", font)
    return image
