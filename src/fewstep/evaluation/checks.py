"""Checks of composition that need no network: the background's colour, the number of objects."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image

from fewstep.errors import RequestError
from fewstep.evaluation.pictures import border_colours, check_pictures, foreground


def background_names(
    pictures: np.ndarray, palette: Mapping[str, tuple[int, int, int]]
) -> list[str]:
    """The name of the colour of `palette` (RGB, 0..255) nearest to each picture's border."""
    if not palette:
        raise RequestError("palette must name at least one colour, got none")
    colours = np.array(list(palette.values()), np.float64)  # (P, 3)
    borders = border_colours(pictures).astype(np.float64)  # (N, 3)
    nearest = ((borders[:, None] - colours[None]) ** 2).sum(-1).argmin(1)
    names = list(palette)
    return [names[i] for i in nearest]


def hue_names(pictures: np.ndarray, hues: Mapping[str, float]) -> list[str | None]:
    """The name in `hues` (degrees) nearest to the main hue of what each picture shows.

    The main hue is the mean direction of the foreground's hues, weighted by saturation times
    value; None for a picture without any coloured foreground.
    """
    array = check_pictures(pictures)
    if not hues:
        raise RequestError("hues must name at least one colour, got none")
    names, wanted = list(hues), np.deg2rad(list(hues.values()))
    found: list[str | None] = []
    for picture, mask in zip(array, foreground(array), strict=True):
        hsv = np.asarray(Image.fromarray(picture).convert("HSV"))[mask].astype(np.float64)  # (P, 3)
        direction = (hsv[:, 1] * hsv[:, 2] * np.exp(1j * hsv[:, 0] * (2 * np.pi / 256))).sum()
        distance = np.abs(np.angle(np.exp(1j * (np.angle(direction) - wanted))))
        found.append(names[int(distance.argmin())] if abs(direction) > 0 else None)
    return found


def object_counts(
    pictures: np.ndarray, *, tolerance: float = 0.12, gap: float = 0.03, min_area: float = 0.01
) -> list[int]:
    """The number of connected objects that differ from the background, for each picture.

    Parts closer than about `gap` (of the picture's width) are one object, since many things are
    drawn in loose parts; an object smaller than `min_area` (of the picture's area, before the gaps
    are closed) is a speck and not counted. `tolerance` is that of `pictures.foreground`.
    """
    for name, value in (("gap", gap), ("min_area", min_area)):
        if not 0 <= value < 1:
            raise RequestError(f"{name} must be in [0, 1), got {value}")
    masks = foreground(pictures, tolerance)  # (N, H, W)
    reach = round(gap * masks.shape[2] / 2)
    least = min_area * masks.shape[1] * masks.shape[2]
    return [_count(mask, reach, least) for mask in masks]


def _count(mask: np.ndarray, reach: int, least: float) -> int:
    labels = components(_dilated(mask, reach))
    areas = np.bincount(labels[mask], minlength=1)
    return int((areas[1:] >= least).sum())


def _dilated(mask: np.ndarray, reach: int) -> np.ndarray:
    """`mask` [H, W] grown by `reach` pixels in each direction, diagonals included."""
    for axis in (0, 1):
        padded = np.pad(mask, [(reach, reach) if a == axis else (0, 0) for a in (0, 1)])
        windows = np.lib.stride_tricks.sliding_window_view(padded, 2 * reach + 1, axis)
        mask = np.asarray(windows.any(-1))
    return mask


def components(mask: np.ndarray) -> np.ndarray:
    """Connected components of a bool mask [H, W], 8-neighbours: int labels, 0 is background.

    Labels count from 1 in reading order. Union-find over the runs of each row, not over pixels.
    """
    parent = [0]
    labels = np.zeros(mask.shape, np.int64)
    above: list[tuple[int, int, int]] = []  # (start, end, label) of the row before
    for row, line in enumerate(mask):
        edges = np.flatnonzero(np.diff(line.astype(np.int8), prepend=0, append=0))
        runs = []
        for start, end in edges.reshape(-1, 2).tolist():
            # Half-open runs touch, diagonals included, if each starts no later than the other ends
            touching = [label for s, e, label in above if s <= end and start <= e]
            label = min((_root(parent, other) for other in touching), default=len(parent))
            if label == len(parent):
                parent.append(label)
            for other in touching:
                parent[_root(parent, other)] = label
            labels[row, start:end] = label
            runs.append((start, end, label))
        above = runs
    roots = [_root(parent, label) for label in range(len(parent))]
    dense = {root: i for i, root in enumerate(dict.fromkeys(roots))}
    return np.array([dense[root] for root in roots])[labels]


def _root(parent: Sequence[int], label: int) -> int:
    while parent[label] != label:
        label = parent[label]
    return label
