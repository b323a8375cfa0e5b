"""The one form in which evaluation takes pictures: NumPy uint8 [N, H, W, 3], RGB."""

from __future__ import annotations

from typing import Literal

import numpy as np
from PIL import Image

from fewstep.errors import RequestError


def check_pictures(pictures: np.ndarray) -> np.ndarray:
    """`pictures` themselves; RequestError when they are not uint8 [N, H, W, 3] with N >= 1."""
    array = np.asarray(pictures)
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[-1] != 3 or 0 in array.shape:
        raise RequestError(
            "pictures must be a uint8 array [N, H, W, 3] with N >= 1, "
            f"got {array.dtype} {list(array.shape)}"
        )
    return array


def border_colours(pictures: np.ndarray, width: int = 2) -> np.ndarray:
    """The median colour of the outermost `width` pixels of each picture, uint8 [N, 3].

    The median per channel: an object may cover up to half of the border without moving it.
    """
    array = check_pictures(pictures)
    if not 1 <= width <= min(array.shape[1:3]):
        raise RequestError(
            f"width must be in [1, {min(array.shape[1:3])}], the smaller side, got {width}"
        )
    border = np.ones(array.shape[1:3], bool)
    border[width:-width, width:-width] = False
    return np.median(array[:, border], axis=1).astype(np.uint8)


def foreground(pictures: np.ndarray, tolerance: float = 0.12) -> np.ndarray:
    """Where a picture differs from its border colour by more than `tolerance`, bool [N, H, W].

    The difference is that of the channel that differs most, as a share of 255.
    """
    array = check_pictures(pictures)
    if not 0 <= tolerance < 1:
        raise RequestError(f"tolerance must be in [0, 1), got {tolerance}")
    background = border_colours(array).astype(np.int16)[:, None, None]
    return np.abs(array.astype(np.int16) - background).max(-1) > 255 * tolerance


def halves(
    pictures: np.ndarray, cut: Literal["left-right", "top-bottom"]
) -> tuple[np.ndarray, np.ndarray]:
    """The two halves of each picture: [N, H, W/2, 3] twice, or [N, H/2, W, 3] twice.

    In an odd number of rows or columns the middle one belongs to neither.
    """
    array = check_pictures(pictures)
    match cut:
        case "left-right":
            middle = array.shape[2] // 2
            return array[:, :, :middle], array[:, :, -middle:]
        case "top-bottom":
            middle = array.shape[1] // 2
            return array[:, :middle], array[:, -middle:]
        case _:
            raise RequestError(f"unknown cut {cut!r} (have: 'left-right', 'top-bottom')")


def framed(pictures: np.ndarray, size: int, *, filling: float = 0.88) -> np.ndarray:
    """What each picture shows, centred on its background: uint8 [N, size, size, 3].

    The longer side of the foreground's box becomes `filling` of the square, so that a small object
    is judged at the size at which judges have seen it. An empty picture stays empty.
    """
    array = check_pictures(pictures)
    backgrounds = border_colours(array)
    masks = foreground(array)
    return np.stack(
        [_framed(*each, size, filling) for each in zip(array, masks, backgrounds, strict=True)]
    )


def _framed(
    picture: np.ndarray, mask: np.ndarray, background: np.ndarray, size: int, filling: float
) -> np.ndarray:
    square = np.empty((size, size, 3), np.uint8)
    square[:] = background
    rows, columns = _extent(mask.mean(1)), _extent(mask.mean(0))
    if rows is None or columns is None:
        return square
    box = picture[slice(*rows), slice(*columns)]
    scale = size * filling / max(box.shape[:2])
    height, width = (max(1, round(side * scale)) for side in box.shape[:2])
    resized = Image.fromarray(box).resize((width, height), Image.Resampling.BICUBIC)
    top, left = (size - height) // 2, (size - width) // 2
    square[top : top + height, left : left + width] = np.asarray(resized)
    return square


def _extent(shares: np.ndarray) -> tuple[int, int] | None:
    """First, and one past the last, line of which over 3 % is foreground; specks are less."""
    lines = np.flatnonzero(shares > 0.03)
    return (int(lines[0]), int(lines[-1]) + 1) if len(lines) else None
