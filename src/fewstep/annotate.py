"""Pictures to steer by, made of pictures: Canny's edges, as OpenCV finds them."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

import numpy as np
import PIL.Image

from .errors import RequestError

# tan(22.5 degrees) in units of 2^-15, as OpenCV rounds it.
BITS = 15
TAN_22 = int(math.tan(math.pi / 8) * 2**BITS + 0.5)


def canny(
    picture: PIL.Image.Image | np.ndarray, low: float = 100, high: float = 200
) -> PIL.Image.Image:
    """White edges on black, an RGB picture of the same size.

    Edges are ridges of the gradient above `high`, and those above `low` that lead to them. Takes a
    PIL picture or bytes (H, W) or (H, W, 3). As in OpenCV nothing is blurred first.

    Raises RequestError for other arrays and for thresholds that are no numbers from 0.
    """
    given: dict[str, Any] = {"low": low, "high": high}
    for name, value in given.items():
        if not isinstance(value, Real) or not 0 <= float(value) < math.inf:
            raise RequestError(f"{name} must be a number from 0 up, got {value!r}")
    low, high = sorted((math.floor(low), math.floor(high)))
    dx, dy = strongest(*sobel(pixels_of(picture)))
    strength = np.abs(dx) + np.abs(dy)
    ridge = ridges(strength, dx, dy) & (strength > low)
    edges = connected(ridge, ridge & (strength > high))
    return PIL.Image.fromarray(edges.astype(np.uint8) * 255).convert("RGB")


def pixels_of(picture: PIL.Image.Image | np.ndarray) -> np.ndarray:
    """Integers (H, W, C)."""
    if isinstance(picture, PIL.Image.Image):
        picture = np.asarray(picture.convert("L" if picture.mode in ("1", "L") else "RGB"))
    if not isinstance(picture, np.ndarray) or picture.dtype != np.uint8:
        kind = getattr(picture, "dtype", type(picture).__name__)
        raise RequestError(f"picture must be a PIL picture or a uint8 array, got {kind}")
    if picture.ndim == 2:
        picture = picture[:, :, None]
    if picture.ndim != 3 or picture.shape[2] not in (1, 3) or not picture.size:
        raise RequestError(f"picture must be of shape (H, W) or (H, W, 3), got {picture.shape}")
    return picture.astype(np.int32)


def sobel(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The gradient along x and along y, (H, W, C) each; beyond the border the picture goes on."""
    padded = np.pad(pixels, ((1, 1), (1, 1), (0, 0)), mode="edge")
    columns = padded[:-2] + 2 * padded[1:-1] + padded[2:]
    rows = padded[:, :-2] + 2 * padded[:, 1:-1] + padded[:, 2:]
    return columns[:, 2:] - columns[:, :-2], rows[2:] - rows[:-2]


def strongest(dx: np.ndarray, dy: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The gradient (H, W) of each pixel's channel that changes most."""
    channel = (np.abs(dx) + np.abs(dy)).argmax(axis=2)[:, :, None]

    def chosen(d: np.ndarray) -> np.ndarray:
        return np.take_along_axis(d, channel, axis=2)[:, :, 0]

    return chosen(dx), chosen(dy)


def ridges(strength: np.ndarray, dx: np.ndarray, dy: np.ndarray) -> np.ndarray:
    """Where the gradient (H, W) is no weaker than on either side, in its own direction.

    Directions are four; of equal neighbours in a row or a column the first is the ridge.
    """
    padded = np.pad(strength, 1)
    height, width = strength.shape

    def beside(down: int, right: int) -> np.ndarray:
        return padded[1 + down : 1 + down + height, 1 + right : 1 + right + width]

    x, y = np.abs(dx).astype(np.int64), np.abs(dy).astype(np.int64) << BITS
    tan_22 = x * TAN_22
    flat, steep = y < tan_22, y > tan_22 + (x << (BITS + 1))  # tan 67.5 = tan 22.5 + 2
    falling = (dx ^ dy) >= 0  # down to the right
    along_x = (strength > beside(0, -1)) & (strength >= beside(0, 1))
    along_y = (strength > beside(-1, 0)) & (strength >= beside(1, 0))
    one = (strength > beside(-1, -1)) & (strength > beside(1, 1))
    other = (strength > beside(-1, 1)) & (strength > beside(1, -1))
    return np.select([flat, steep, falling], [along_x, along_y, one], other)


def connected(weak: np.ndarray, strong: np.ndarray) -> np.ndarray:
    """The pixels of `weak` (H, W) that a chain of such neighbours joins to one of `strong`."""
    left = np.pad(weak & ~strong, 1)
    found = np.pad(strong, 1)
    stride = left.shape[1]
    around = np.array([r * stride + c for r in (-1, 0, 1) for c in (-1, 0, 1) if r or c])
    left_flat, found_flat = left.reshape(-1), found.reshape(-1)
    front = np.flatnonzero(found_flat)
    while front.size:
        near = np.unique(front[:, None] + around)
        front = near[left_flat[near]]
        left_flat[front], found_flat[front] = False, True
    return found[1:-1, 1:-1]
