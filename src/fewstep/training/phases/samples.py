"""What a student draws on the way, beside its teacher: sheets, and how far the two are apart."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from ...models.unet import UNet2DConditionModel
from ..export import pipeline_around
from ..loop import precision_of
from ..lora_layers import adapters_off
from .sheets import grid, to_pil

if TYPE_CHECKING:
    from .consistency import Consistency


def student_pipeline(phase: Consistency, unet: UNet2DConditionModel) -> Any:
    """The base's pipeline with another UNet and the student's scheduler in it."""
    pipe = pipeline_around(unet, phase.pipe, phase.settings)
    pipe.set_progress_bar_config(disable=True)
    return pipe


class Samples:
    """Pictures of one list of prompts, always from the same noise."""

    def __init__(self, phase: Consistency) -> None:
        self.phase = phase
        self.prompts = list(phase.settings.sheet.prompts)
        if phase.recipe.run.sheet_steps and phase.settings.method != "distillation":
            self.teachers  # noqa: B018 - while the model that is fine-tuned is still there

    def draw(self, pipe: Any, steps: int, guidance_scale: float) -> Tensor:
        """Latents (P, C, h, w) of the prompts."""
        request: dict[str, Any] = {
            "num_inference_steps": steps,
            "guidance_scale": guidance_scale,
            "height": self.phase.recipe.size,
            "width": self.phase.recipe.size,
            "generator": [torch.Generator().manual_seed(i) for i in range(len(self.prompts))],
            "output_type": "latent",
            "return_dict": False,
        }
        with precision_of(self.phase.recipe.run, self.phase.device):
            latents, *_ = pipe(self.prompts, **request)
        return latents.float()

    @functools.cached_property
    def teachers(self) -> Tensor:
        """The latents of the teacher, or of the model that fine-tuning starts from."""
        sheet, pipe = self.phase.settings.sheet, self.phase.pipe  # drawn by DDIM
        if self.phase.settings.method == "fine_tuning":
            pipe = student_pipeline(self.phase, self.phase.base)
        with adapters_off(self.phase.base):
            return self.draw(pipe, sheet.teacher_steps, sheet.teacher_guidance_scale)

    def students(self) -> dict[int, Tensor]:
        """The latents of the student, by the number of steps."""
        sheet = self.phase.settings.sheet
        pipe = student_pipeline(self.phase, self.phase.student)
        return {n: self.draw(pipe, n, sheet.guidance_scale) for n in sheet.steps}

    def show(self) -> tuple[Image.Image, dict[str, float]]:
        """A row for each number of steps and the teacher's last; and by steps, the drift.

        Drift is the root mean square of student minus teacher in latents of the same noise.
        """
        students = self.students()
        rows = [*students.values(), self.teachers]
        pictures = [picture for latents in rows for picture in self.decode(latents)]
        drift = {
            f"drift_{n}": (latents - self.teachers).square().mean().sqrt().item()
            for n, latents in students.items()
        }
        return grid(pictures, columns=len(self.prompts)), drift

    def decode(self, latents: Tensor) -> list[Image.Image]:
        """PIL pictures of latents."""
        pipe = self.phase.pipe
        with precision_of(self.phase.recipe.run, self.phase.device):
            return to_pil(pipe.vae.decode(pipe.unscaled(latents).to(pipe.vae.dtype)).sample)
