"""Phase 4: the teacher becomes a latent consistency model (Luo et al. 2023, Algorithm 1)."""

from __future__ import annotations

import copy
import functools
import json
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from ...diffusion import guidance_embedding
from ...models.unet import UNet2DConditionModel
from ...models.vae import AutoencoderKL
from ...pipelines.catalog import LatentConsistencyModelPipeline, StableDiffusionPipeline
from ...schedulers import DDIMScheduler, LCMScheduler
from ..config import ConsistencyPhase, Recipe
from ..loop import Draws
from ..objectives import Network, consistency_loss, pseudo_huber, teacher_step
from ..scenes import batch_indices, encoded_scenes, sampler_of, tokenize
from .sheets import grid
from .teacher import sheet_of


def student_of(teacher: UNet2DConditionModel, guidance_dim: int) -> UNet2DConditionModel:
    """A copy of the teacher with a guidance input whose projection is zero.

    Zero, so that at the start the student is the teacher for every omega (LCM, section 4.1).
    """
    config = {k: v for k, v in dict(teacher.config).items() if not k.startswith("_")}
    student = UNet2DConditionModel(**{**config, "time_cond_proj_dim": guidance_dim})
    projection = student.time_embedding.cond_proj
    assert projection is not None
    nn.init.zeros_(projection.weight)
    state = teacher.state_dict()
    state["time_embedding.cond_proj.weight"] = projection.weight.data
    student.load_state_dict(state)
    return student


class Consistency:
    """Trains the student so that one ODE step of the teacher leaves its answer unchanged."""

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        assert isinstance(recipe.settings, ConsistencyPhase)
        self.recipe, self.settings, self.device = recipe, recipe.settings, device
        root = Path(recipe.folder)
        self.parts = StableDiffusionPipeline.from_pretrained(root / "teacher" / "pipeline")
        self.parts.to(device)
        self.teacher = self.parts.unet.requires_grad_(False).eval()
        self.text_encoder = self.parts.text_encoder.requires_grad_(False).eval()
        assert isinstance(self.parts.vae, AutoencoderKL)  # as the first phase wrote it
        self.data = encoded_scenes(recipe, root / "latents", self.parts.vae, self.parts.tokenizer)
        tokens = torch.from_numpy(tokenize(self.parts.tokenizer, [""])).long().to(device)
        with torch.no_grad():
            self.empty = self.text_encoder(tokens).last_hidden_state
        assert isinstance(self.parts.scheduler, DDIMScheduler)  # as the teacher's phase wrote it
        self.schedule = self.parts.scheduler.noise_schedule.to(device)
        self.student = student_of(self.teacher, self.settings.guidance_dim).to(device).train()
        self.trained: dict[str, nn.Module] = {"unet": self.student}
        self.kept: dict[str, nn.Module] = {}
        self.target = self.student
        if self.settings.target == "ema":
            self.target = copy.deepcopy(self.student).requires_grad_(False)
            self.kept["target"] = self.target
        self.distance = functools.partial(pseudo_huber, c=self.settings.huber_c)

    def loss(self, step: int) -> Tensor:
        seed, batch, settings = self.recipe.seed, self.recipe.run.batch, self.settings
        rows = batch_indices(step, batch, len(self.data), seed)
        z = torch.from_numpy(self.data.z[rows]).to(self.device).float()
        tokens = torch.from_numpy(self.data.tokens[rows]).long().to(self.device)
        draws = Draws(seed, step, self.device)
        noise = draws.normal(z.shape)
        stride = len(self.schedule) // settings.grid_steps
        t = draws.integers(1, settings.grid_steps + 1, batch) * stride - 1
        t_prev = (t - stride).clamp(min=0)
        w = draws.uniform(settings.w_min, settings.w_max, batch)

        with torch.no_grad():
            text = self.text_encoder(tokens).last_hidden_state
        omega = guidance_embedding(w, settings.guidance_dim)

        def conditioned(unet: UNet2DConditionModel) -> Network:
            return lambda z, t: unet(z, t, text, timestep_cond=omega).sample

        def teacher(z: Tensor, t: Tensor, text: Tensor) -> Tensor:
            return self.teacher(z, t, text).sample

        step_back = teacher_step(teacher, text, self.empty.expand_as(text), w, self.schedule)
        return consistency_loss(
            conditioned(self.student),
            conditioned(self.target),
            step_back,
            z,
            noise,
            t,
            t_prev,
            self.schedule,
            self.distance,
        )

    @torch.no_grad()
    def after_step(self) -> None:
        """theta⁻ <- mu theta⁻ + (1 - mu) theta."""
        if self.target is not self.student:
            torch._foreach_lerp_(
                list(self.target.parameters()),
                list(self.student.parameters()),
                1 - self.settings.target_decay,
            )

    def pipeline(self) -> LatentConsistencyModelPipeline:
        scheduler = LCMScheduler.from_config(
            self.parts.scheduler.config, original_inference_steps=self.settings.grid_steps
        )
        return LatentConsistencyModelPipeline(
            vae=self.parts.vae,
            text_encoder=self.text_encoder,
            tokenizer=self.parts.tokenizer,
            unet=self.student.eval(),
            scheduler=scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )

    def sheet(self) -> Image.Image:
        """The prompts at 1, 2, 4 and 8 steps, guidance 4."""
        pipe = self.pipeline()
        rows = [
            sheet_of(pipe, self.recipe, num_inference_steps=n, guidance_scale=4.0)
            for n in (1, 2, 4, 8)
        ]
        self.student.train()
        return grid(rows, columns=1)

    def finish(self, folder: Path) -> None:
        """Write the LCM as a pipeline folder."""
        self.pipeline().save_pretrained(folder / "pipeline")
        figures = {
            "concepts": len(sampler_of(self.recipe).rows),
            "samples": self.recipe.run.steps * self.recipe.run.batch,
            "w": [self.settings.w_min, self.settings.w_max],
        }
        (folder / "figures.json").write_text(json.dumps(figures) + "\n")
