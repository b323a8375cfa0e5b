"""A latent consistency model of any Stable Diffusion checkpoint (Luo et al. 2023).

The settings choose the method: distillation (LCD, Algorithm 1), LCM-LoRA, fine-tuning (LCF,
Algorithm 4), phased (PCM) and sampled (TCD) endpoints. `loss` is their common outline; what differs
comes in as arguments of `objectives.consistency_loss`.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ...diffusion import Network, guidance_embedding
from ...models.unet import UNet2DConditionModel
from ...pipelines.families import StableDiffusion
from .. import endpoints
from ..batch import Batch, Condition
from ..config import ConsistencyPhase, Recipe
from ..data import open_set
from ..draws import Draws
from ..export import finish_full, finish_lora, push
from ..loop import DTYPES, Phase, precision_of
from ..lora_layers import adapters, adapters_off, attach
from ..networks import (
    check_prediction_type,
    compile_blocks,
    load_base,
    save_memory,
    schedule_of,
    store_as,
    student_of,
)
from ..objectives import (
    DISTANCES,
    StepBack,
    consistency_loss,
    data_step,
    diffusion_loss,
    guided,
    ode_step,
)
from ..parallel import shares
from .samples import Samples

HELD_OUT_STEP = 2**31  # a step that no run takes: its draws are the held-out loss's


class Consistency(Phase):
    """Trains the student so that one step down the ODE leaves its answer unchanged."""

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        assert isinstance(recipe.settings, ConsistencyPhase)
        self.recipe, self.settings, self.device = recipe, recipe.settings, device
        self.pipe: StableDiffusion = load_base(self.settings, recipe.folder)
        self.pipe.to(device)
        self.schedule = schedule_of(self.pipe)
        self.data = open_set(recipe, self.pipe)
        self.base = self.pipe.unet
        check_prediction_type(self.pipe, self.batch(0, range(min(8, recipe.run.batch)))[0])
        self.student = self.make_student()
        self.target = self.student
        self.trained = {"unet": self.student}
        if self.settings.target == "ema":
            self.target = copy.deepcopy(self.student).requires_grad_(False)
            self.kept = {"target": self.target}
        self.distance = functools.partial(DISTANCES[self.settings.distance])
        if self.settings.distance != "squared":
            self.distance = functools.partial(self.distance, c=self.settings.distance_c)
        self.samples = Samples(self)
        if self.settings.method != "distillation":
            # There is no teacher: what it started from is needed no longer.
            self.base = self.pipe.unet = self.student
        self.frozen = {"teacher": self.base}
        if recipe.run.precision != "fp32":
            store_as(self.base, DTYPES[recipe.run.precision])
        if recipe.run.gradient_checkpointing:
            save_memory(self.student)
        if recipe.run.compile:
            compile_blocks(self.student)

    def make_student(self) -> UNet2DConditionModel:
        """The network that trains: a copy of the base, or the base itself with adapters."""
        lora = self.settings.lora
        if lora is None:
            return student_of(self.base, self.settings.guidance_dim)
        attach(self.base, lora.targets, lora.rank, lora.alpha, self.recipe.seed)
        return self.base.train()

    # ── the method ──

    def loss(self, step: int, part: range) -> Tensor:
        batch, draws = self.batch(step, part)
        return self.loss_of(batch, draws, step)

    def loss_of(self, batch: Batch, draws: Draws, step: int) -> Tensor:
        """The loss of a batch, on the grid of training step `step`."""
        settings, grid = self.settings, self.grid(step)
        noise = draws.normal(batch.z.shape[1:])
        t, t_prev = endpoints.draw_times(draws.uniform(), grid, len(self.schedule))
        w = draws.uniform(settings.w_min, settings.w_max)
        student = self.network(self.student, batch.condition, w)
        if settings.method == "denoising":
            return diffusion_loss(student, batch.z, noise, t, self.schedule, gamma=0)
        return consistency_loss(
            student,
            self.network(self.target, batch.condition, w),
            self.step_back(batch, noise, w),
            batch.z,
            noise,
            t,
            t_prev,
            self.schedule,
            distance=self.distance,
            endpoint=self.endpoint(t_prev, draws, grid),
        )

    def network(self, unet: UNet2DConditionModel, condition: Condition, w: Tensor) -> Network:
        """A network as a function (z, t) -> output, its text and guidance given."""
        width = unet.config.time_cond_proj_dim
        omega = None if width is None else guidance_embedding(w, width)
        given = {"timestep_cond": omega, "return_dict": False, **condition.arguments}
        return lambda z, t: unet(z, t, **given)[0]

    def step_back(self, batch: Batch, noise: Tensor, w: Tensor) -> StepBack:
        """The way from z_t to z_prev: the teacher's ODE, or the data with the same noise."""
        settings, condition = self.settings, batch.condition
        if settings.method == "fine_tuning":
            return data_step(batch.z, noise, self.schedule)
        both = condition.beside(condition.without_text(self.data.empty))

        def teacher(z: Tensor, t: Tensor) -> tuple[Tensor, Tensor | None]:
            with adapters_off(self.base):
                if not settings.solver_guidance:
                    return self.network(self.base, condition, w)(z, t), None
                doubled = self.network(self.base, both, torch.cat([w, w]))
                positive, negative = doubled(torch.cat([z, z]), torch.cat([t, t])).chunk(2)
                return positive, negative

        omega = w if settings.solver_guidance else None
        return ode_step(guided(teacher, omega), self.schedule, settings.solver)

    def endpoint(self, t_prev: Tensor, draws: Draws, grid: int) -> Tensor | None:
        """Where f leads to: z_0 (LCM), the lower edge of a phase (PCM), a sampled time (TCD)."""
        match self.settings.endpoint:
            case "phases":
                return endpoints.phase_edges(t_prev, self.settings.phases, grid, len(self.schedule))
            case "sampled":
                return endpoints.sampled_endpoints(
                    t_prev, draws.uniform(), grid, len(self.schedule)
                )
        return None

    def grid(self, step: int) -> int:
        """The steps of the grid at a training step."""
        first, last = self.settings.first_grid_steps, self.settings.grid_steps
        if not first or step >= self.recipe.run.steps:
            return last
        return endpoints.grid_steps_at(step, self.recipe.run.steps, first, last)

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """theta⁻ <- mu theta⁻ + (1 - mu) theta."""
        if self.target is not self.student:
            torch._foreach_lerp_(
                shares(self.target.parameters()),
                shares(self.student.parameters()),
                1 - self.settings.target_decay,
            )

    # ── data ──

    def batch(self, step: int, part: range) -> tuple[Batch, Draws]:
        """These positions of a step's batch, and their random numbers."""
        draws = Draws(self.recipe.seed, step, part, self.device)
        rows = self.data.rows(step, self.recipe.run.batch)[part.start : part.stop]
        with torch.autocast(self.device.type, enabled=False):  # it cannot read float16 on a CPU
            return self.data.batch(rows, draws), draws

    # ── what comes out ──

    def show(self) -> tuple[Image.Image, dict[str, float]]:
        """The prompts at some numbers of steps, and below them the teacher's pictures.

        The figures are the held-out loss, and how far the latents are from the teacher's.
        """
        sheet, drift = self.samples.show()
        return sheet, self.held_out() | drift

    def held_out(self) -> dict[str, float]:
        """The loss on samples that are never trained on, always with the same draws."""
        size = self.recipe.run.batch // self.recipe.run.accumulate
        losses, last = [], self.recipe.run.steps
        for start in range(0, len(self.data.held_out), size):
            rows = self.data.held_out[start : start + size]
            draws = Draws(
                self.recipe.seed, HELD_OUT_STEP, range(start, start + len(rows)), self.device
            )
            with precision_of(self.recipe.run, self.device):
                loss = self.loss_of(self.data.batch(rows, draws), draws, last)
            losses.append(loss * len(rows))
        if not losses:
            return {}
        return {"held_out_loss": (torch.stack(losses).sum() / len(self.data.held_out)).item()}

    def finish(self, folder: Path, figures: Mapping[str, float]) -> None:
        """Write the model into `pipeline`, or the LoRA into `lora`, with its card."""
        told: dict[str, Any] = {"figures": table(figures), "counts": self.data.counts.numbers}
        if self.settings.lora is None:
            result = finish_full(self.student, self.pipe, folder / "pipeline", self.recipe, **told)
        else:
            config = dict(self.student.config)
            found = adapters(self.student)
            result = finish_lora(found, config, folder / "lora", self.recipe, **told)
        if repository := self.settings.output.push_to:
            push(result, repository)


def table(figures: Mapping[str, float]) -> str:
    """Figures as a Markdown table, or nothing."""
    if not figures:
        return ""
    rows = "".join(f"| {name} | {value:.4g} |\n" for name, value in figures.items())
    return f"| figure | |\n|---|---|\n{rows}"
