import numpy as np
import pytest
from PIL import Image, ImageDraw

from fewstep.errors import RequestError
from fewstep.evaluation.checks import background_names, components, hue_names, object_counts
from fewstep.evaluation.pictures import border_colours, foreground, framed, halves

PALETTE = {"white": (255, 255, 255), "red": (222, 58, 58), "blue": (48, 102, 220)}
CENTRES = [(16, 16), (48, 16), (16, 48), (48, 48)]


def discs(
    count: int, background: tuple[int, int, int] = (255, 255, 255), radius: int = 12
) -> np.ndarray:
    """A 64 px picture [1, 64, 64, 3] of green discs."""
    image = Image.new("RGB", (64, 64), background)
    for x, y in CENTRES[:count]:
        ImageDraw.Draw(image).ellipse((x - radius, y - radius, x + radius, y + radius), "green")
    return np.asarray(image)[None]


@pytest.mark.parametrize("count", range(5))
@pytest.mark.parametrize("background", PALETTE.values())
def test_drawn_discs_are_counted(count: int, background: tuple[int, int, int]) -> None:
    assert object_counts(discs(count, background)) == [count]


def test_specks_and_small_gaps_do_not_count() -> None:
    picture = discs(1).copy()
    picture[0, 15:17] = 255  # a cut through the disc, two pixels wide
    picture[0, 60, 60] = 0
    assert object_counts(picture) == [1]
    assert object_counts(picture, gap=0, min_area=0) == [3]


def test_grain_does_not_change_background_or_count() -> None:
    grain = np.random.default_rng(0).normal(0, 6, size=(1, 64, 64, 3))
    picture = np.clip(discs(3, PALETTE["blue"]) + grain, 0, 255).astype(np.uint8)
    assert object_counts(picture) == [3]
    assert background_names(picture, PALETTE) == ["blue"]


def test_components_are_those_of_a_flood_fill() -> None:
    random = np.random.default_rng(0)
    for share in (0.2, 0.4, 0.6):
        mask = random.random((20, 30)) < share
        labels = components(mask)
        assert ((labels > 0) == mask).all()
        flooded = flood_fill(mask)
        pairs = set(zip(labels.ravel().tolist(), flooded.ravel().tolist(), strict=True))
        assert len(pairs) == labels.max() + 1 == flooded.max() + 1


def flood_fill(mask: np.ndarray) -> np.ndarray:
    labels = np.zeros(mask.shape, int)
    for start in zip(*np.nonzero(mask), strict=True):
        if labels[start]:
            continue
        number, queue = labels.max() + 1, [start]
        while queue:
            y, x = queue.pop()
            if (
                0 <= y < mask.shape[0]
                and 0 <= x < mask.shape[1]
                and mask[y, x]
                and not labels[y, x]
            ):
                labels[y, x] = number
                queue += [(y + i, x + j) for i in (-1, 0, 1) for j in (-1, 0, 1)]
    return labels


def test_the_background_is_the_border_even_behind_a_large_object() -> None:
    picture = discs(1, PALETTE["red"], radius=28)  # covers a third of the border
    assert background_names(picture, PALETTE) == ["red"]
    assert border_colours(picture).tolist() == [list(PALETTE["red"])]
    with pytest.raises(RequestError, match="palette"):
        background_names(picture, {})


def test_the_hue_is_that_of_the_object_and_not_of_the_background() -> None:
    hues = {"red": 2.0, "green": 125.0, "blue": 216.0}
    assert hue_names(discs(1, PALETTE["blue"]), hues) == ["green"]
    assert hue_names(discs(0, PALETTE["blue"]), hues) == [None]


def test_halves_hold_one_object_each_and_frames_centre_it() -> None:
    left, right = halves(discs(1), "left-right")
    assert left.shape == right.shape == (1, 64, 32, 3)
    crops = framed(np.concatenate([left, right]), 40)
    assert crops.shape == (2, 40, 40, 3)
    rows = np.flatnonzero(foreground(crops)[0].any(1))
    assert rows[0] == 2 and rows[-1] in (36, 37)  # 0.88 of 40 pixels, in the middle
    assert not foreground(crops)[1].any()
    top, bottom = halves(discs(2), "top-bottom")
    assert foreground(top).any() and not foreground(bottom).any()


@pytest.mark.parametrize("shape", [(4, 4, 3), (1, 4, 4, 4), (0, 4, 4, 3)])
def test_other_arrays_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(RequestError, match=r"uint8 array \[N, H, W, 3\]"):
        border_colours(np.zeros(shape, np.uint8))
    with pytest.raises(RequestError, match="got float64"):
        border_colours(np.zeros((1, 8, 8, 3)))
