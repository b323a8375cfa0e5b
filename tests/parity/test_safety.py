"""The safety checker flags, blackens and is saved as diffusers' is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import NOISE, UNET, VAE

import fewstep
from fewstep.pipelines.safety import StableDiffusionSafetyChecker

diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.filterwarnings("ignore")

VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}


@pytest.fixture(scope="module")
def folder(tokenizer: Any, text_encoder: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Stable Diffusion whose checker flags some pictures and not others."""
    from diffusers.pipelines.stable_diffusion.safety_checker import (
        StableDiffusionSafetyChecker as Theirs,
    )
    from transformers import CLIPConfig, CLIPImageProcessorPil

    torch.manual_seed(0)
    checker = Theirs(CLIPConfig(vision_config=VISION, projection_dim=12)).eval()
    for name in ("concept_embeds", "special_care_embeds"):
        torch.nn.init.normal_(getattr(checker, name))
    checker.concept_embeds_weights.data.fill_(0.9)
    checker.special_care_embeds_weights.data.fill_(0.9)
    pipe = diffusers.StableDiffusionPipeline(
        vae=diffusers.AutoencoderKL(**VAE),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=diffusers.UNet2DConditionModel(**UNET),
        scheduler=diffusers.DDIMScheduler(**NOISE),
        safety_checker=checker,
        feature_extractor=CLIPImageProcessorPil(size=32, crop_size=32),
    )
    found = tmp_path_factory.mktemp("checked")
    pipe.save_pretrained(found)
    return found


def draw(pipe: Any, **arguments: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in range(4)]
    return pipe(
        "a cat",
        num_images_per_prompt=4,
        num_inference_steps=2,
        generator=generators,
        **arguments,
    )


def with_threshold(pipe: Any, threshold: float) -> Any:
    pipe.safety_checker.concept_embeds_weights.data.fill_(threshold)
    return pipe


def test_the_checker_flags_what_diffusers_flags(folder: Path) -> None:
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(folder)
    ours = fewstep.StableDiffusionPipeline.from_pretrained(folder)
    assert isinstance(ours.safety_checker, StableDiffusionSafetyChecker)
    pictures = torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    seen = 0
    for threshold in np.linspace(-0.2, 0.8, 11):
        for pipe in (theirs, ours):
            with_threshold(pipe, float(threshold))
        _, expected = theirs.safety_checker(
            clip_input=pictures, images=np.zeros((6, 8, 8, 3), np.float32)
        )
        assert ours.safety_checker(pictures) == expected
        seen += 0 < sum(expected) < 6
    assert seen, "no threshold tells the pictures apart"


def test_flagged_pictures_are_black(folder: Path) -> None:
    pipe = with_threshold(fewstep.StableDiffusionPipeline.from_pretrained(folder), -2.0)
    with pytest.warns(UserWarning, match="flagged 4 of 4 pictures"):
        result = draw(pipe)
    assert result.nsfw_content_detected == [True] * 4
    assert all(not np.asarray(picture).any() for picture in result.images)
    assert not draw(pipe, output_type="np").images.any()
    assert not draw(pipe, output_type="pt").images.any()
    assert draw(pipe, output_type="latent").nsfw_content_detected is None
    result = draw(with_threshold(pipe, 2.0))
    assert result.nsfw_content_detected == [False] * 4
    assert all(np.asarray(picture).any() for picture in result.images)


def test_the_checker_is_saved_for_diffusers_and_can_be_left_out(
    folder: Path, tmp_path: Path
) -> None:
    pipe = fewstep.StableDiffusionPipeline.from_pretrained(folder)
    pipe.save_pretrained(tmp_path)
    again = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path).safety_checker
    wanted = pipe.safety_checker.concept_embeds
    torch.testing.assert_close(again.concept_embeds, wanted, rtol=0, atol=0)
    without = fewstep.StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    assert draw(without).nsfw_content_detected is None
