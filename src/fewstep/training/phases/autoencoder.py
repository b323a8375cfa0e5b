"""Phase 1: pictures to latents and back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from ...checkpoints.config import write_json
from ...models.vae import AutoencoderKL
from ..config import AutoencoderPhase, Recipe
from ..draws import Draws
from ..loop import Phase
from ..objectives import reconstruction_loss
from ..scenes import DrawnScenes, normalised, sampler_of
from .sheets import grid, to_pil

HELD_OUT = 10**9  # scenes from this index on are never trained on
FOLDER = "vae"


class Autoencoder(Phase):
    """Trains an AutoencoderKL on new scenes in every batch; finishes with its scaling factor."""

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        assert isinstance(recipe.settings, AutoencoderPhase)
        self.recipe, self.settings, self.device = recipe, recipe.settings, device
        self.sampler = sampler_of(recipe)
        torch.manual_seed(recipe.seed)  # the initial weights
        self.vae = AutoencoderKL(**self.settings.model).to(device)
        self.trained = {"vae": self.vae}
        self.batches: Iterator[tuple[Tensor, list[str]]] | None = None
        self.drawn: tuple[int, Tensor] | None = None  # the last step's pictures

    def loss(self, step: int, part: range) -> Tensor:
        x = self.batch(step)[part.start : part.stop]
        posterior = self.vae.encode(x).latent_dist
        draws = Draws(self.recipe.seed, step, part, self.device)
        noise = draws.normal(posterior.mean.shape[1:])
        z = posterior.mean.float() + posterior.std.float() * noise
        kl = posterior.kl() / posterior.mean[0].numel()
        return reconstruction_loss(
            self.vae.decode(z).sample.float(), x, kl.float(), self.settings.kl_weight
        )

    def batch(self, step: int) -> Tensor:
        """The pictures of a step; steps are asked for in order, from any first one on."""
        recipe = self.recipe
        if self.drawn is not None and self.drawn[0] == step:
            return self.drawn[1]
        if self.batches is None:
            start, stop = (s * recipe.run.batch for s in (step, recipe.run.steps))
            scenes = DrawnScenes(self.sampler, start, stop, recipe.scenes.size)
            self.batches = iter(scenes.batches(recipe.run.batch, recipe.scenes.workers))
        pixels, _ = next(self.batches)
        self.drawn = step, normalised(pixels, self.device)
        return self.drawn[1]

    def held_out(self, count: int) -> Tensor:
        """Pictures (count, 3, size, size) that are never trained on."""
        size = self.recipe.scenes.size
        scenes = DrawnScenes(self.sampler, HELD_OUT, HELD_OUT + count, size)
        pixels, _ = next(iter(scenes.batches(count, workers=0)))
        return normalised(pixels, self.device)

    def show(self) -> tuple[Image.Image, dict[str, float]]:
        """Held-out scenes above, their reconstructions below."""
        x = self.held_out(16)
        return grid([*to_pil(x), *to_pil(self.vae(x).sample)], columns=16), {}

    def finish(self, folder: Path, figures: Mapping[str, float]) -> None:
        """Write the VAE with the scaling factor that gives its latents unit standard deviation."""
        x = self.held_out(256)
        z = self.vae.encode(x).latent_dist.mode()
        error = (self.vae.decode(z).sample.clamp(-1, 1) - x).square().flatten(1).mean(1)
        psnr = (10 * torch.log10(4 / error)).mean().item()
        factor = round(1 / z.std().item(), 5)
        config = {**self.settings.model, "scaling_factor": factor}
        finished = AutoencoderKL(**config)
        finished.load_state_dict(self.vae.state_dict())
        finished.save_pretrained(folder / FOLDER)
        write_json({"psnr_db": round(psnr, 2)}, folder / "figures.json")
