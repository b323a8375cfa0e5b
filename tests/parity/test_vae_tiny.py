"""The tiny autoencoder against diffusers', by itself and in a pipeline."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch

import fewstep
from fewstep import AutoencoderTiny, CheckpointError, UnsupportedConfig

diffusers = pytest.importorskip("diffusers")

pytestmark = pytest.mark.filterwarnings("ignore")

TINY: dict[str, Any] = {
    "encoder_block_out_channels": (8, 8, 8, 8),
    "decoder_block_out_channels": (8, 8, 8, 8),
    "num_encoder_blocks": (1, 2, 1, 1),
    "num_decoder_blocks": (2, 1, 1, 1),
}


def pixels(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Path]:
    torch.manual_seed(0)
    theirs = diffusers.AutoencoderTiny(**TINY).eval()
    folder = tmp_path_factory.mktemp("tiny")
    theirs.save_pretrained(folder)
    return theirs, AutoencoderTiny.from_pretrained(folder), folder


@torch.no_grad()
@pytest.mark.parametrize(("height", "width"), [(32, 32), (40, 24)])
def test_it_encodes_decodes_and_reconstructs_alike(
    both: tuple[Any, Any, Path], height: int, width: int
) -> None:
    theirs, ours, _ = both
    x = pixels(2, 3, height, width)
    latents = ours.encode(x).latents
    assert latents.shape == (2, 4, height // 8, width // 8) and ours.downscale == 8
    torch.testing.assert_close(latents, theirs.encode(x).latents, rtol=0, atol=1e-5)
    z = latents * 40  # beyond what the decoder's bound lets through
    torch.testing.assert_close(ours.decode(z).sample, theirs.decode(z).sample, rtol=0, atol=1e-5)
    torch.testing.assert_close(ours(x).sample, theirs(x).sample, rtol=0, atol=1e-5)
    assert (ours.decode(z).sample - ours.decode(latents).sample).abs().max() > 1e-3


def test_it_has_the_same_keys_and_is_written_for_diffusers(
    both: tuple[Any, Any, Path], tmp_path: Path
) -> None:
    theirs, ours, _ = both
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    ours.save_pretrained(tmp_path)
    again = diffusers.AutoencoderTiny.from_pretrained(tmp_path)
    for key, value in theirs.state_dict().items():
        assert torch.equal(again.state_dict()[key], value)
    parameters = inspect.signature(diffusers.AutoencoderTiny).parameters
    own = dict(AutoencoderTiny().config)
    for key, parameter in parameters.items():
        assert own[key] == parameter.default, key


@torch.no_grad()
def test_slices_are_equal_and_tiles_nearly(both: tuple[Any, Any, Path]) -> None:
    _, ours, _ = both
    x = pixels(2, 3, 96, 64)
    latents, picture = ours.encode(x).latents, ours.decode(ours.encode(x).latents).sample
    ours.enable_slicing()
    torch.testing.assert_close(ours.encode(x).latents, latents)
    ours.enable_tiling(tile_size=64, exact=False)
    assert ours.encode(x).latents.shape == latents.shape
    tiled = ours.decode(latents).sample
    assert 0 < (tiled - picture).abs().max() < 0.2
    ours.disable_slicing()
    ours.disable_tiling()
    torch.testing.assert_close(ours.decode(latents).sample, picture)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"act_fn": "gelu"}, "act_fn='gelu'"),
        ({"upsample_fn": "bilinear"}, "upsample_fn='bilinear'"),
        ({"encoder_block_out_channels": (8, 8, 8, 16)}, "entries must be equal"),
        ({"num_decoder_blocks": (1, 1)}, "as many entries as decoder_block_out_channels"),
        ({"upsampling_scaling_factor": 3}, "does not undo the encoder's"),
    ],
)
def test_what_is_not_implemented_is_named(config: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedConfig, match=message):
        AutoencoderTiny(**TINY | config)


def test_missing_weights_are_an_error(both: tuple[Any, Any, Path]) -> None:
    with pytest.raises(CheckpointError, match=r"decoder\.layers"):
        AutoencoderTiny.from_pretrained(both[2], num_decoder_blocks=(2, 2, 1, 1))


@torch.no_grad()
@pytest.mark.parametrize("task", ["StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline"])
def test_pipelines_take_it_for_their_vae_and_draw_alike(
    both: tuple[Any, Any, Path], sd_folder: Path, tmp_path: Path, task: str
) -> None:
    found = []
    for library, vae in ((diffusers, both[0]), (fewstep, both[1])):
        pipe = getattr(library, task).from_pretrained(sd_folder, vae=vae, safety_checker=None)
        pipe.set_progress_bar_config(disable=True)
        coarse = np.random.default_rng(5).integers(0, 256, (4, 6, 3), dtype=np.uint8)
        image = PIL.Image.fromarray(coarse).resize((48, 32), PIL.Image.Resampling.BICUBIC)
        start = {"image": image, "strength": 0.6} if "Img2Img" in task else {}
        size = {} if start else {"height": 32, "width": 48}
        arguments = {"num_inference_steps": 4, "output_type": "np", **start, **size}
        found.append(pipe("a cat", generator=torch.Generator().manual_seed(0), **arguments).images)
    np.testing.assert_allclose(found[1], found[0], rtol=0, atol=1e-4)
    assert found[1].std() > 0.01
    pipe.save_pretrained(tmp_path)
    again = getattr(fewstep, task).from_pretrained(tmp_path)
    assert isinstance(again.vae, AutoencoderTiny)
    again.set_progress_bar_config(disable=True)
    images = again("a cat", generator=torch.Generator().manual_seed(0), **arguments).images
    np.testing.assert_array_equal(images, found[1])
