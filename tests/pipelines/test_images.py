from __future__ import annotations

import numpy as np
import PIL.Image
import pytest
import torch

from fewstep import RequestError
from fewstep.pipelines.images import postprocess, preprocess


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).random(shape, dtype=np.float32)


def test_pil_numpy_and_tensor_of_one_picture_agree() -> None:
    pixels = (noise(16, 24, 3) * 255).astype(np.uint8)
    picture = PIL.Image.fromarray(pixels)
    expected = preprocess(picture)
    assert expected.shape == (1, 3, 16, 24)
    assert expected.min() >= -1 and expected.max() <= 1
    same = [
        pixels,
        pixels[None],
        pixels.astype(np.float32) / 255,
        [pixels],
        torch.from_numpy(pixels).permute(2, 0, 1),
        torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255,
        torch.from_numpy(pixels).permute(2, 0, 1) / 127.5 - 1,
    ]
    for other in same:
        torch.testing.assert_close(preprocess(other), expected, rtol=0, atol=1e-6)


def test_a_picture_survives_the_way_in_and_out() -> None:
    pixels = (noise(2, 16, 24, 3) * 255).astype(np.uint8)
    pictures = [PIL.Image.fromarray(p) for p in pixels]
    back = postprocess(preprocess(pictures), "pil")
    assert all(np.array_equal(np.asarray(a), b) for a, b in zip(back, pixels, strict=True))


def test_sides_are_floored_to_the_multiple() -> None:
    picture = PIL.Image.fromarray((noise(39, 50, 3) * 255).astype(np.uint8))
    assert preprocess(picture, 8).shape == (1, 3, 32, 48)
    assert preprocess(picture, 4).shape == (1, 3, 36, 48)
    assert preprocess(torch.rand(3, 39, 50), 8).shape == (1, 3, 32, 48)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK"])
def test_pictures_of_any_mode_become_rgb(mode: str) -> None:
    assert preprocess(PIL.Image.new(mode, (8, 8))).shape == (1, 3, 8, 8)


def test_latents_pass_as_they_are() -> None:
    latents = torch.randn(2, 4, 5, 7) * 10
    assert torch.equal(preprocess(latents, 8, latent_channels=4), latents)
    with pytest.raises(RequestError, match="1 or 3 channels, got 4"):
        preprocess(latents, 8, latent_channels=8)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ("a.png", "got str"),
        ([], "got nothing"),
        ([PIL.Image.new("RGB", (8, 8)), np.zeros((8, 8, 3))], "Image and ndarray"),
        (PIL.Image.new("RGB", (7, 8)), "at least 8"),
        ([PIL.Image.new("RGB", (8, 8)), PIL.Image.new("RGB", (16, 8))], "different sizes"),
        (np.zeros((8, 8)), "must be of shape"),
        (torch.zeros(8, 8), "must be of shape"),
        (torch.zeros(1, 2, 8, 8), "1 or 3 channels, got 2"),
        (np.full((8, 8, 3), 255.0), r"in \[255, 255\]"),
        (torch.full((3, 8, 8), -2.0), r"in \[-2, -2\]"),
    ],
)
def test_what_is_no_picture_is_refused(image: object, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        preprocess(image)  # type: ignore[arg-type]


def test_output_types() -> None:
    decoded = torch.linspace(-2, 2, 2 * 3 * 8 * 8).reshape(2, 3, 8, 8)
    unit = postprocess(decoded, "pt")
    assert isinstance(unit, torch.Tensor)
    assert unit.min() == 0 and unit.max() == 1
    array = postprocess(decoded, "np")
    assert isinstance(array, np.ndarray)
    assert array.shape == (2, 8, 8, 3) and array.dtype == np.float32
    assert [p.size for p in postprocess(decoded, "pil")] == [(8, 8), (8, 8)]
    assert postprocess(decoded, "latent") is decoded
    with pytest.raises(RequestError, match=r"output_type must be one of .* got 'PIL'"):
        postprocess(decoded, "PIL")
