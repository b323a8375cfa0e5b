"""Settings that spoil an LCM's picture are said, with what to use; others are not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fewstep import LCMScheduler, StableDiffusionPipeline

LAYER = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"


@pytest.fixture
def pipe(sd_folder: Path) -> Any:
    pipe = StableDiffusionPipeline.from_pretrained(sd_folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_guidance_that_burns_an_lcm_lora_is_said(pipe: Any) -> None:
    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
    with pytest.warns(UserWarning, match=r"guidance_scale=7.5 burns .* use 1 to 2"):
        pipe("a cat", num_inference_steps=2, output_type="latent")
    pipe("a cat", num_inference_steps=2, guidance_scale=4, output_type="latent")


def test_more_steps_than_an_lcm_needs_are_said(pipe: Any) -> None:
    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
    with pytest.warns(UserWarning, match="20 steps are more than an LCM needs"):
        pipe("a cat", num_inference_steps=20, guidance_scale=1, output_type="latent")


def test_an_lcm_lora_without_its_scheduler_is_said(pipe: Any, tmp_path: Path) -> None:
    outputs, inputs = pipe.unet.get_submodule(LAYER).weight.shape
    layers = {
        f"{LAYER}.lora_A.weight": torch.zeros(1, inputs),
        f"{LAYER}.lora_B.weight": torch.zeros(outputs, 1),
    }
    folder = tmp_path / "lcm-lora-sdv1-5"
    pipe.save_lora_weights(folder, unet_lora_layers=layers)
    pipe.load_lora_weights(folder)
    with pytest.warns(UserWarning, match=r"the scheduler is a DDIMScheduler.*LCMScheduler.from"):
        pipe("a cat", num_inference_steps=2, output_type="latent")
    pipe.unload_lora_weights()
    pipe("a cat", num_inference_steps=2, output_type="latent")
