"""What inpainting keeps, crops, pastes and refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch

from fewstep import (
    AutoPipelineForInpainting,
    DiffusionPipeline,
    LCMScheduler,
    StableDiffusionControlNetInpaintPipeline,
    StableDiffusionInpaintPipeline,
)
from fewstep.errors import RequestError
from fewstep.models.controlnet import ControlNetModel
from fewstep.pipelines.masks import cropped_box, fitted_mask

PICTURE = PIL.Image.fromarray(
    np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
)


def mask_of(box: tuple[int, int, int, int], size: tuple[int, int] = (96, 64)) -> PIL.Image.Image:
    mask = PIL.Image.new("L", size)
    mask.paste(255, box)
    return mask


MASK = mask_of((32, 16, 64, 48))


@pytest.fixture(scope="module")
def pipe(sd_folder: Path) -> Any:
    pipe = StableDiffusionInpaintPipeline.from_pretrained(sd_folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def paint(pipe: Any, **changes: Any) -> PIL.Image.Image:
    arguments: dict[str, Any] = {
        "prompt": "a cat",
        "image": PICTURE,
        "mask_image": MASK,
        "height": 64,
        "width": 96,
        "num_inference_steps": 2,
        "guidance_scale": 1.0,
        "generator": torch.Generator().manual_seed(0),
    }
    return pipe(**(arguments | changes)).images[0]


def differs(a: PIL.Image.Image, b: PIL.Image.Image) -> np.ndarray:
    return (np.asarray(a, dtype=int) != np.asarray(b, dtype=int)).any(axis=2)


def test_pasted_back_no_pixel_outside_the_mask_changes(pipe: Any) -> None:
    white = np.asarray(MASK) > 0
    pasted = differs(paint(pipe, paste_back=True), PICTURE)
    assert not pasted[~white].any()
    assert pasted[white].mean() > 0.9
    assert differs(paint(pipe), PICTURE)[~white].any(), "the control: the VAE changes pixels"


def test_a_blurred_edge_is_softened_inwards_only(pipe: Any) -> None:
    white = np.asarray(MASK) > 0
    hard, soft = (paint(pipe, paste_back=True, mask_blur=blur) for blur in (0, 3))
    assert not differs(soft, PICTURE)[~white].any()
    assert differs(hard, soft)[white].any()


def test_a_crop_works_on_the_surroundings_of_the_mask(pipe: Any) -> None:
    image = PICTURE.resize((192, 128))
    mask = mask_of((100, 60, 120, 80), image.size)
    box = cropped_box(image, mask, (64, 96), 8)
    assert box[0] <= 92 and box[1] <= 52 and box[2] >= 128 and box[3] >= 88
    assert (box[2] - box[0]) / (box[3] - box[1]) == pytest.approx(96 / 64, rel=0.05)
    result = paint(pipe, image=image, mask_image=mask, padding_mask_crop=8)
    assert result.size == image.size
    changed = differs(result, image)
    assert changed[60:80, 100:120].mean() > 0.9
    changed[60:80, 100:120] = False
    assert not changed.any()


def test_a_box_at_the_border_stays_inside() -> None:
    mask = mask_of((0, 0, 4, 60))
    left, top, right, bottom = cropped_box(PICTURE, mask, (64, 96), 16)
    assert 0 <= left < right <= 96 and 0 <= top < bottom <= 64


def test_masks_are_read_in_every_form() -> None:
    grey = np.asarray(MASK, dtype=np.float32) / 255
    wanted = fitted_mask(MASK, None, (96, 64))
    for form in (grey, grey[..., None], torch.from_numpy(grey), torch.from_numpy(grey)[None]):
        torch.testing.assert_close(fitted_mask(form, None, (96, 64)), wanted)
    assert set(wanted.unique().tolist()) == {0.0, 1.0}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mask_image": None}, "mask_image is missing"),
        ({"image": None}, "image is missing"),
        ({"mask_blur": 2}, "add paste_back=True"),
        ({"mask_blur": -1}, "mask_blur must be at least 0"),
        ({"paste_back": True, "output_type": "np"}, "output_type='np' cannot be pasted back"),
        ({"paste_back": True, "image": torch.rand(1, 3, 64, 96)}, "must be single PIL pictures"),
        ({"padding_mask_crop": 4, "mask_image": mask_of((0, 0, 0, 0))}, "black throughout"),
        ({"padding_mask_crop": 4, "mask_image": mask_of((0, 0, 8, 8), (8, 8))}, "picture's size"),
        ({"mask_image": "mask.png"}, "mask_image must be a PIL picture"),
        ({"mask_image": [MASK] * 3}, "mask_image holds 3 pictures, but there are 1 prompts"),
        ({"masked_image_latents": torch.zeros(1, 4, 8, 12)}, "for UNets that see the mask"),
        ({"image": torch.zeros(1, 4, 8, 12)}, "image holds latents"),
    ],
)
def test_bad_arguments_are_named(pipe: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        paint(pipe, **changes)


def test_an_lcm_paints_by_the_task_of_stable_diffusion(lcm_folder: Path) -> None:
    pipe = AutoPipelineForInpainting.from_pretrained(lcm_folder)
    assert isinstance(pipe, StableDiffusionInpaintPipeline)
    assert pipe.is_embedded and isinstance(pipe.scheduler, LCMScheduler)
    pipe.set_progress_bar_config(disable=True)
    assert paint(pipe, guidance_scale=8.0).size == (96, 64)
    plain = DiffusionPipeline.from_pretrained(lcm_folder)
    assert type(AutoPipelineForInpainting.from_pipe(plain)) is StableDiffusionInpaintPipeline


def test_with_a_controlnet_the_family_has_one_and_its_picture_is_cropped_too(
    sd_folder: Path,
) -> None:
    unet = DiffusionPipeline.from_pretrained(sd_folder).unet
    net = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(4, 8, 8, 8))
    pipe = AutoPipelineForInpainting.from_pretrained(sd_folder, controlnet=net)
    assert isinstance(pipe, StableDiffusionControlNetInpaintPipeline)
    pipe.set_progress_bar_config(disable=True)
    seen = []
    whole = pipe.controls
    pipe.controls = lambda request, job: seen.append(request.control_image) or whole(request, job)
    paint(pipe, control_image=PICTURE, padding_mask_crop=0)
    assert seen[0].size == (48, 32)
    with pytest.raises(RequestError, match="control_image must be PIL pictures"):
        paint(pipe, control_image=torch.rand(1, 3, 64, 96), padding_mask_crop=0)
