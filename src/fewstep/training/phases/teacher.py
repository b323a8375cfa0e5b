"""Phase 3: the text-conditioned diffusion model that the LCM is distilled from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ...checkpoints.config import write_json
from ...models.unet import UNet2DConditionModel
from ...models.vae import AutoencoderKL
from ...pipelines.catalog import StableDiffusionPipeline
from ...schedulers import DDIMScheduler
from ..config import Recipe, TeacherPhase
from ..data.epochs import Epochs
from ..draws import Draws
from ..loop import Phase
from ..objectives import diffusion_loss
from ..scenes import encoded_scenes, sampler_of, tokenize
from .sheets import grid

SHEET_PROMPTS = 24


class Teacher(Phase):
    """Trains UNet and text encoder together on encoded scenes, with empty captions now and then."""

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        from transformers import CLIPTextModel, CLIPTokenizer

        assert isinstance(recipe.settings, TeacherPhase)
        self.recipe, self.settings, self.device = recipe, recipe.settings, device
        root = Path(recipe.folder)
        self.vae = AutoencoderKL.from_pretrained(root / "autoencoder" / "vae").to(device)
        self.tokenizer = CLIPTokenizer.from_pretrained(root / "text" / "tokenizer")
        self.data = encoded_scenes(recipe, root / "latents", self.vae, self.tokenizer)
        self.epochs = Epochs([np.arange(len(self.data))], recipe.seed)
        self.empty = torch.from_numpy(tokenize(self.tokenizer, [""])).long().to(device)
        self.scheduler = DDIMScheduler(**self.settings.scheduler)
        self.schedule = self.scheduler.noise_schedule.to(device)
        text_encoder: nn.Module = CLIPTextModel.from_pretrained(root / "text" / "text_encoder")
        self.text_encoder = text_encoder.float().to(device).train()
        torch.manual_seed(recipe.seed)  # the initial weights
        self.unet = UNet2DConditionModel(**self.settings.model).to(device).train()
        self.trained = {"unet": self.unet, "text_encoder": self.text_encoder}

    def loss(self, step: int, part: range) -> Tensor:
        rows = self.epochs.rows(step, self.recipe.run.batch)[part.start : part.stop]
        z = torch.from_numpy(self.data.z[rows]).to(self.device).float()
        tokens = torch.from_numpy(self.data.tokens[rows]).long().to(self.device)
        draws = Draws(self.recipe.seed, step, part, self.device)
        noise = draws.normal(z.shape[1:])
        t = draws.times(len(self.schedule), self.settings.time_power)
        dropped = draws.uniform() < self.settings.empty_captions
        tokens = torch.where(dropped[:, None], self.empty, tokens)
        text = self.text_encoder(tokens).last_hidden_state

        def network(z: Tensor, t: Tensor) -> Tensor:
            return self.unet(z, t, text).sample

        return diffusion_loss(network, z, noise, t, self.schedule, self.settings.min_snr)

    def show(self) -> tuple[Image.Image, dict[str, float]]:
        """DDIM at 20 steps, guidance 3, of one row of prompts."""
        request = {"num_inference_steps": 20, "guidance_scale": 3.0}
        return sheet_of(self.pipeline(), self.recipe, **request), {}

    def pipeline(self) -> StableDiffusionPipeline:
        return StableDiffusionPipeline(
            vae=self.vae,
            text_encoder=self.text_encoder.eval(),
            tokenizer=self.tokenizer,
            unet=self.unet.eval(),
            scheduler=self.scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )

    def finish(self, folder: Path, figures: Mapping[str, float]) -> None:
        """Write the teacher as a pipeline folder, which any loader of diffusers' layout can use."""
        self.pipeline().save_pretrained(folder / "pipeline")
        run = self.recipe.run
        write_json({"samples": run.steps * run.batch}, folder / "figures.json")


def sheet_of(pipe: StableDiffusionPipeline, recipe: Recipe, **request: Any) -> Image.Image:
    """One picture of each of some prompts that are spread over the recipe's concepts."""
    prompts = [prompt for _, prompt in sampler_of(recipe).concept_prompts()]
    prompts = prompts[:: max(1, len(prompts) // SHEET_PROMPTS)][:SHEET_PROMPTS]
    pipe.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(i) for i in range(len(prompts))]
    size = recipe.scenes.size
    images, _ = pipe(
        prompts, height=size, width=size, generator=generators, return_dict=False, **request
    )
    return grid(cast(list[Image.Image], images), columns=12)
