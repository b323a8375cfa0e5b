"""The only denoising loop. Tasks differ in the `Job` they fill, not in how it is run.

Shapes: B rows, C latent channels, h and w latent height and width, L text tokens, D text channels,
N steps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from ..diffusion.guidance import classifier_free_guidance, rescale_guidance
from ..models.unet import UNet2DConditionModel
from ..random import Generators, randn
from ..schedulers import Plan


class Update(Protocol):
    """A scheduler's step from (z, t) to t_next: (z at t_next, predicted z_0)."""

    def __call__(
        self, output: Tensor, z: Tensor, t: Tensor, t_next: Tensor, draw: Callable[[], Tensor]
    ) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True, eq=False)
class Conditioning:
    """What the network is told beside z and t, in the network's dtype."""

    text: Tensor  # (B, L, D)
    w: Tensor | None = None  # (B, W), the embedding of the paper's omega = guidance_scale - 1


@dataclass(frozen=True, eq=False)
class Job:
    """One denoising problem as plain values. Only `predict` and `denoise` read it."""

    cond: Conditioning
    uncond: Conditioning | None  # None: guidance is an input of the network, or off
    guidance_scale: float
    plan: Plan
    update: Update
    shape: tuple[int, ...]  # (B, C, h, w)
    dtype: torch.dtype  # of z and of every draw
    generator: Generators = None
    guidance_rescale: float = 0.0
    z: Tensor | None = None  # the start; set by the task

    def draw(self) -> Tensor:
        """Noise of the latents' shape; each row comes from its own generator if it has one."""
        return randn(self.shape, self.generator, self.cond.text.device, self.dtype)

    def from_noise(self) -> Job:
        """This job, starting from pure noise."""
        return replace(self, z=self.draw())


@dataclass(frozen=True, eq=False)
class Step:
    """What a step leaves. A callback may return another one for the loop to go on from."""

    index: int
    t: Tensor  # () int64, the time the step started at
    z: Tensor  # (B, C, h, w) at the next time
    z0: Tensor  # (B, C, h, w), the prediction of the end
    job: Job
    stop: bool = False


def predict(unet: UNet2DConditionModel, job: Job, z: Tensor, t: Tensor) -> Tensor:
    """The guided network output (B, C, h, w) at (z, t), t (B,), by one call of the network."""
    if job.uncond is None:
        return run(unet, z, t, job.cond)
    both = Conditioning(torch.cat([job.uncond.text, job.cond.text]))
    negative, positive = run(unet, torch.cat([z, z]), torch.cat([t, t]), both).chunk(2)
    guided = classifier_free_guidance(positive, negative, job.guidance_scale)
    if job.guidance_rescale > 0:
        guided = rescale_guidance(guided, positive, job.guidance_rescale)
    return guided


def run(unet: UNet2DConditionModel, z: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
    """The network's output at (z, t) in the dtype of z, whatever the network's is."""
    (output,) = unet(z.to(cond.text.dtype), t, cond.text, timestep_cond=cond.w, return_dict=False)
    return output.to(z.dtype)


def denoise(
    unet: UNet2DConditionModel, job: Job, on_step: Callable[[Step], Step] | None = None
) -> Tensor:
    """z_0 (B, C, h, w) from `job.z` by the job's plan.

    `on_step` sees every step and returns the one to go on from; the loop ends with the z_0 of a
    step whose `stop` is set.
    """
    assert job.z is not None, "the task sets the start"
    z = job.z
    for index, (t, t_next) in enumerate(zip(*job.plan, strict=True)):
        rows, next_rows = t.expand(len(z)), t_next.expand(len(z))
        z, z0 = job.update(predict(unet, job, z, rows), z, rows, next_rows, job.draw)
        if on_step is not None:
            step = on_step(Step(index, t, z, z0, job))
            if step.stop:
                return step.z0
            z, job = step.z, step.job
    return z
