"""A T2I-Adapter (Mou et al. 2023): a small network whose features steer a frozen model by edges.

The edges are those of the pictures that the autoencoder gives back, so any encoded data will do.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ...annotate import canny
from ...errors import RequestError
from ...models.t2i_adapter import T2IAdapter
from ...pipelines.families import StableDiffusion
from ...pipelines.xl import StableDiffusionXL
from ..config import AdapterPhase, Recipe
from ..data import open_set
from ..draws import Draws
from ..loop import Phase
from ..networks import load_base, schedule_of
from ..objectives import diffusion_loss
from .sheets import grid, to_pil

FOLDER = "adapter"


class Adapter(Phase):
    """Trains a T2IAdapter on the denoising loss of a model that stays as it is."""

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        assert isinstance(recipe.settings, AdapterPhase)
        self.recipe, self.settings, self.device = recipe, recipe.settings, device
        self.pipe: StableDiffusion = load_base(self.settings, recipe.folder)
        check_base(self.pipe)
        self.pipe.to(device)
        self.schedule = schedule_of(self.pipe)
        self.data = open_set(recipe, self.pipe)
        torch.manual_seed(recipe.seed)  # the initial weights
        self.adapter = T2IAdapter(**self.settings.model).to(device).train()
        self.trained = {"adapter": self.adapter}

    def loss(self, step: int, part: range) -> Tensor:
        draws = Draws(self.recipe.seed, step, part, self.device)
        rows = self.data.rows(step, self.recipe.run.batch)[part.start : part.stop]
        with torch.autocast(self.device.type, enabled=False):  # it cannot read float16 on a CPU
            batch = self.data.batch(rows, draws)
        noise = draws.normal(batch.z.shape[1:])
        t = draws.times(len(self.schedule), self.settings.time_power)
        features = self.adapter(self.edges(batch.z))

        def network(z: Tensor, t: Tensor) -> Tensor:
            condition = batch.condition.arguments
            added = {"down_intrablock_additional_residuals": features}
            return self.pipe.unet(z, t, **condition, **added).sample

        return diffusion_loss(network, batch.z, noise, t, self.schedule, gamma=0)

    @torch.no_grad()
    def edges(self, z: Tensor) -> Tensor:
        """Edges (B, 3, H, W) in {0, 1} of the pictures of latents."""
        pictures = to_pil(self.pipe.vae.decode(self.pipe.unscaled(z)).sample)
        low, high = self.settings.thresholds
        found = np.stack([np.asarray(canny(picture, low, high)) for picture in pictures])
        return torch.from_numpy(found).permute(0, 3, 1, 2).float().div(255).to(self.device)

    def show(self) -> tuple[Image.Image, dict[str, float]]:
        """Held-out pictures, their edges, and what the model draws of edges and sheet prompts."""
        from ...pipelines.catalog import StableDiffusionAdapterPipeline

        sheet = self.settings.sheet
        prompts = list(sheet.prompts)
        rows = self.data.held_out[: len(prompts)]
        draws = Draws(self.recipe.seed, 0, range(len(rows)), self.device)
        z = self.data.batch(rows, draws).z
        edges = self.edges(z)
        pipe = StableDiffusionAdapterPipeline(
            **self.pipe.components, adapter=self.adapter, **self.pipe.options
        )
        pipe.set_progress_bar_config(disable=True)
        images, *_ = pipe(
            prompts[: len(rows)],
            image=list(edges),
            num_inference_steps=sheet.teacher_steps,
            guidance_scale=sheet.teacher_guidance_scale,
            generator=[torch.Generator().manual_seed(i) for i in range(len(rows))],
            return_dict=False,
        )
        originals = to_pil(self.pipe.vae.decode(self.pipe.unscaled(z)).sample)
        return grid([*originals, *to_pil(edges * 2 - 1), *images], columns=len(rows)), {}

    def finish(self, folder: Path, figures: Mapping[str, float]) -> None:
        """Write the adapter in diffusers' layout."""
        self.adapter.save_pretrained(folder / FOLDER)


def check_base(pipe: StableDiffusion) -> None:
    """Raises RequestError for a model that the sheets cannot be drawn with."""
    if isinstance(pipe, StableDiffusionXL):
        raise RequestError(
            f"adapter.base is a {type(pipe).__name__}; adapters are trained for Stable Diffusion 1 "
            "and 2 and the embedded model: give one of them"
        )
