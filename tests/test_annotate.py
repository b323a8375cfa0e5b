"""Canny's edges: what they are, and that OpenCV finds the same."""

from __future__ import annotations

import numpy as np
import PIL.Image
import pytest

from fewstep import RequestError
from fewstep.annotate import canny


def scene(seed: int, height: int = 97, width: int = 131) -> PIL.Image.Image:
    """Smooth colours with a bright box and a disc, and some noise."""
    draw = np.random.default_rng(seed)
    coarse = draw.integers(0, 256, (7, 9, 3), dtype=np.uint8)
    smooth = PIL.Image.fromarray(coarse).resize((width, height), PIL.Image.Resampling.BICUBIC)
    pixels = np.asarray(smooth).astype(int) // 2
    y, x = np.mgrid[:height, :width]
    pixels[20:60, 30:80] += 90
    pixels[(y - 60) ** 2 + (x - 95) ** 2 < 500] += (20, 120, 5)
    return PIL.Image.fromarray((pixels + draw.integers(0, 12, pixels.shape)).astype(np.uint8))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("thresholds", [(100, 200), (30, 90), (50.7, 50.2), (200, 60), (0, 0)])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_edges_are_those_of_opencv(seed: int, thresholds: tuple[float, float], mode: str) -> None:
    cv2 = pytest.importorskip("cv2")
    picture = scene(seed).convert(mode)
    expected = cv2.Canny(np.array(picture), *thresholds)
    assert 0 < expected.mean() < 255
    found = canny(picture, *thresholds)
    assert found.mode == "RGB" and found.size == picture.size
    for channel in range(3):
        np.testing.assert_array_equal(np.asarray(found)[..., channel], expected)


def test_edges_of_noise_and_of_tiny_pictures_are_those_of_opencv() -> None:
    cv2 = pytest.importorskip("cv2")
    draw = np.random.default_rng(0)
    for shape in ((64, 64, 3), (1, 9, 3), (9, 1), (2, 2), (5, 40)):
        pixels = draw.integers(0, 256, shape, dtype=np.uint8)
        np.testing.assert_array_equal(
            np.asarray(canny(pixels, 300, 700))[..., 0], cv2.Canny(pixels, 300, 700)
        )


def test_a_box_has_an_outline_and_a_plain_picture_none() -> None:
    pixels = np.zeros((40, 40), dtype=np.uint8)
    assert not np.asarray(canny(pixels)).any()
    pixels[10:30, 10:30] = 255
    edges = np.asarray(canny(pixels))[..., 0] > 0
    assert edges[9:11, 15:25].any(axis=0).all() and not edges[13:27, 13:27].any()
    assert set(np.unique(canny(pixels))) == {0, 255}
    faint = (pixels // 16).astype(np.uint8)
    assert not np.asarray(canny(faint)).any(), "below the thresholds"
    assert np.asarray(canny(faint, 10, 20)).any()


def test_a_faint_line_counts_only_where_it_leads_to_a_strong_one() -> None:
    pixels = np.zeros((30, 60), dtype=np.uint8)
    pixels[:15, :30], pixels[:15, 30:] = 120, 40  # one edge, strong on the left, faint on the right
    whole = np.asarray(canny(pixels, 100, 300))[..., 0] > 0
    assert whole[13:17, 50].any()
    faint = np.asarray(canny(pixels[:, 33:], 100, 300))[..., 0]
    assert not faint.any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((np.zeros((4, 4)),), "uint8 array, got float64"),
        ((np.zeros((4, 4, 2), dtype=np.uint8),), r"\(4, 4, 2\)"),
        ((np.zeros((4, 4), dtype=np.uint8), -1, 5), "low must be"),
        ((np.zeros((4, 4), dtype=np.uint8), 1, float("nan")), "high must be"),
        (("picture.png",), "got str"),
    ],
)
def test_what_is_no_picture_is_refused(arguments: tuple, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        canny(*arguments)
