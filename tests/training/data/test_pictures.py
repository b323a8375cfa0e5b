"""From a picture to one of the training size: pixels by hand, sizes and SDXL's numbers by hand."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from fewstep.training.data.pictures import (
    Crop,
    Cutting,
    bucket_sizes,
    check_side,
    nearest,
    upright,
    upright_size,
)

GRADIENT = np.stack(
    [
        np.broadcast_to(np.arange(12, dtype=np.uint8)[None] * 20, (8, 12)),
        np.broadcast_to(np.arange(8, dtype=np.uint8)[:, None] * 30, (8, 12)),
        np.zeros((8, 12), np.uint8),
    ],
    axis=-1,
)


def test_a_crop_is_the_pixels_at_its_corner() -> None:
    crop = Crop((8, 12), (8, 12), 2, 3, (4, 4), mirrored=False)
    cut = crop.apply(Image.fromarray(GRADIENT)).numpy().transpose(1, 2, 0)
    np.testing.assert_array_equal(cut, GRADIENT[2:6, 3:7])
    assert crop.time_ids == (8, 12, 2, 3, 4, 4)


def test_a_mirrored_crop_is_a_crop_of_the_mirrored_picture_at_the_corner_it_tells() -> None:
    crop = Crop((8, 12), (8, 12), 2, 3, (4, 4), mirrored=True)
    cut = crop.apply(Image.fromarray(GRADIENT)).numpy().transpose(1, 2, 0)
    *_, top, left, _, _ = crop.time_ids
    assert left == 12 - 3 - 4
    np.testing.assert_array_equal(cut, GRADIENT[:, ::-1][top : top + 4, left : left + 4])


def test_the_corner_is_told_in_resized_pixels_and_the_size_in_original_ones() -> None:
    (crop,) = Cutting(((32, 32),)).crops("0", 100, 200)
    assert (crop.resized, crop.top, crop.left) == ((32, 64), 0, 16)
    assert crop.time_ids == (100, 200, 0, 16, 32, 32)
    (mirrored,) = Cutting(((32, 32),), flip=1.0, random=True).crops("0", 100, 200)
    assert mirrored.time_ids[3] == 64 - mirrored.left - 32


def test_a_small_picture_is_enlarged_until_the_crop_fits() -> None:
    (crop,) = Cutting(((32, 32),)).crops("0", 10, 30)
    assert crop.resized == (32, 96)
    assert crop.apply(Image.new("RGB", (30, 10))).shape == (3, 32, 32)


def test_variants_depend_on_seed_picture_and_number_alone() -> None:
    many = Cutting(((32, 32),), 5, random=True, flip=0.5, variants=40).crops("ab", 80, 64)
    few = Cutting(((32, 32),), 5, random=True, flip=0.5, variants=3).crops("ab", 80, 64)
    assert few == many[:3]
    assert Cutting(((32, 32),), 6, random=True, variants=3).crops("ab", 80, 64) != few
    assert Cutting(((32, 32),), 5, random=True, variants=3).crops("ac", 80, 64) != few
    assert 5 < sum(crop.mirrored for crop in many) < 35
    assert len({crop.top for crop in many}) > 3
    assert all(0 <= crop.top <= 8 and crop.left == 0 for crop in many)


def test_the_buckets_at_1024_are_those_of_sdxl() -> None:
    assert bucket_sizes(1024, 64) == (
        (640, 1536),
        (768, 1344),
        (832, 1216),
        (896, 1152),
        (1024, 1024),
        (1152, 896),
        (1216, 832),
        (1344, 768),
        (1536, 640),
    )


@pytest.mark.parametrize("resolution", [256, 512, 768, 1280])
def test_buckets_of_other_sizes_are_multiples_with_no_more_pixels_than_a_tenth_above(
    resolution: int,
) -> None:
    sizes = bucket_sizes(resolution, 64)
    assert (resolution, resolution) in sizes
    assert all(height % 64 == width % 64 == 0 for height, width in sizes)
    assert all(height * width <= 1.1 * resolution**2 for height, width in sizes)


@pytest.mark.parametrize(
    ("height", "width", "size"),
    [
        (1, 1, (1024, 1024)),
        (900, 1600, (768, 1344)),
        (3000, 2000, (1216, 832)),
        (9, 99, (640, 1536)),
    ],
)
def test_a_picture_goes_to_the_bucket_of_the_nearest_ratio(
    height: int, width: int, size: tuple[int, int]
) -> None:
    assert nearest(bucket_sizes(1024, 64), height, width) == size


def test_exif_orientation_is_applied_to_pixels_and_size() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees, clockwise
    file = io.BytesIO()
    Image.fromarray(GRADIENT).save(file, "png", exif=exif)
    with Image.open(file) as picture:
        assert upright_size(picture) == (8, 12)
        turned = np.asarray(upright(picture))
    np.testing.assert_array_equal(turned, np.rot90(GRADIENT, -1))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
def test_what_is_transparent_becomes_white(mode: str) -> None:
    picture = Image.new("RGBA", (4, 4), (0, 0, 0, 0)).convert(mode)
    assert upright(picture).getpixel((0, 0)) == (255, 255, 255)


def test_sixteen_bits_of_grey_keep_their_brightness() -> None:
    picture = Image.fromarray(np.full((2, 2), 0x8000, np.uint16))
    assert upright(picture).getpixel((0, 0)) == (128, 128, 128)


@pytest.mark.parametrize(("value", "use"), [(30, 32), (3, 8), (100, 96)])
def test_a_side_that_does_not_fit_names_the_nearest_that_does(value: int, use: int) -> None:
    with pytest.raises(ValueError, match=f"data.resolution={value} must be .*; use {use}"):
        check_side("data.resolution", value, 8, "pixels per latent")
