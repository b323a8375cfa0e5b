"""The only denoising loop. Tasks differ in the `Job` they fill, not in how it is run.

Shapes: B rows, C latent channels, h and w latent height and width, L text tokens, D text channels,
N steps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from ..diffusion.guidance import classifier_free_guidance, rescale_guidance
from ..random import Generators, randn
from ..schedulers import Plan

Network = Callable[..., Any]  # a UNet, or what stands for one


class Update(Protocol):
    """A scheduler's step from (z, t) to t_next: (z at t_next, predicted z_0)."""

    def __call__(
        self, output: Tensor, z: Tensor, t: Tensor, t_next: Tensor, draw: Callable[[], Tensor]
    ) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True, eq=False)
class Conditioning:
    """What the network is told beside z and t, in the network's dtype."""

    text: Tensor  # (B, L, D)
    pooled: Tensor | None = None  # (B, P), SDXL's pooled text
    time_ids: Tensor | None = None  # (B, 6), SDXL's sizes and crops
    w: Tensor | None = None  # (B, W), the embedding of the paper's omega = guidance_scale - 1
    image: tuple[Tensor, ...] = ()  # (B, N, D) of each IP-Adapter: picture prompts

    @property
    def added(self) -> dict[str, Tensor] | None:
        """SDXL's conditions under the names that networks take them by."""
        if self.pooled is None or self.time_ids is None:
            return None
        return {"text_embeds": self.pooled, "time_ids": self.time_ids}

    def joined(self, other: Conditioning) -> Conditioning:
        """The rows of this one, then those of `other`."""

        def join(a: Tensor | None, b: Tensor | None) -> Tensor | None:
            return None if a is None or b is None else torch.cat([a, b])

        return Conditioning(
            torch.cat([self.text, other.text]),
            join(self.pooled, other.pooled),
            join(self.time_ids, other.time_ids),
            join(self.w, other.w),
            tuple(torch.cat(pair) for pair in zip(self.image, other.image, strict=True)),
        )

    def rows(self, start: int, stop: int) -> Conditioning:
        """Rows `start` to `stop` - 1."""

        def cut(a: Tensor | None) -> Tensor | None:
            return None if a is None else a[start:stop]

        return Conditioning(
            self.text[start:stop],
            cut(self.pooled),
            cut(self.time_ids),
            cut(self.w),
            tuple(a[start:stop] for a in self.image),
        )


@dataclass(frozen=True, eq=False)
class Residuals:
    """What a control adds to the UNet."""

    down: tuple[Tensor, ...] = ()  # to the skips (ControlNet)
    mid: Tensor | None = None  # to the mid block's output (ControlNet)
    features: tuple[Tensor, ...] = ()  # within the down blocks (T2I-Adapter)

    def __add__(self, other: Residuals) -> Residuals:
        mids = [m for m in (self.mid, other.mid) if m is not None]
        return Residuals(
            sums(self.down, other.down),
            mids[0] + mids[1] if len(mids) == 2 else next(iter(mids), None),
            sums(self.features, other.features),
        )


def sums(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Sums by place; an empty tuple adds nothing."""
    return tuple(x + y for x, y in zip(a, b, strict=True)) if a and b else a or b


class Control(Protocol):
    """ControlNet, T2I-Adapter: a further condition, which answers with residuals of the UNet."""

    def __call__(
        self, z: Tensor, t: Tensor, cond: Conditioning, *, doubled: bool, span: tuple[float, float]
    ) -> Residuals | None:
        """The residuals of rows z (B, C, h, w) at times t (B,), or None where there are none.

        `doubled`: the first half of the rows is the unconditional one. `span` is the part of the
        run that the step covers, (i / N, (i + 1) / N).
        """


@dataclass(frozen=True, eq=False)
class Job:
    """One denoising problem as plain values. Only `predict` and `denoise` read it."""

    cond: Conditioning
    uncond: Conditioning | None  # None: guidance is an input of the network, or off
    guidance_scale: float
    plan: Plan
    update: Update
    shape: tuple[int, ...]  # (B, C, h, w), or (B, C, F, h, w) of a video
    dtype: torch.dtype  # of z and of every draw
    generator: Generators = None
    guidance_rescale: float = 0.0
    controls: tuple[Control, ...] = ()
    extra_channels: Tensor | None = None  # (B, 5, h, w), mask and masked picture (inpainting UNets)
    keep: Callable[[Tensor, Tensor], Tensor] | None = None  # (z, t_next): puts the known part back
    start_scale: float = 1.0  # deviation of the noise that the plan starts from
    z: Tensor | None = None  # the start; set by the task

    def draw(self) -> Tensor:
        """Noise of the latents' shape; each row comes from its own generator if it has one."""
        return randn(self.shape, self.generator, self.cond.text.device, self.dtype)

    def from_noise(self) -> Job:
        """This job, starting from pure noise unless it has a start."""
        return self if self.z is not None else replace(self, z=self.draw() * self.start_scale)


@dataclass(frozen=True, eq=False)
class Step:
    """What a step leaves. A callback may return another one for the loop to go on from."""

    index: int
    t: Tensor  # () int64, the time the step started at
    z: Tensor  # (B, C, h, w) at the next time
    z0: Tensor  # (B, C, h, w), the prediction of the end
    job: Job
    stop: bool = False


def predict(
    unet: Network, job: Job, z: Tensor, t: Tensor, span: tuple[float, float] = (0, 1)
) -> Tensor:
    """The guided network output (B, C, h, w) at (z, t), t (B,), by one call of the network."""
    if job.uncond is None:
        return run(unet, job, z, t, job.cond, span)
    both = job.uncond.joined(job.cond)
    twice = run(unet, job, torch.cat([z, z]), torch.cat([t, t]), both, span)
    negative, positive = twice.chunk(2)
    guided = classifier_free_guidance(positive, negative, job.guidance_scale)
    if job.guidance_rescale > 0:
        guided = rescale_guidance(guided, positive, job.guidance_rescale)
    return guided


def run(
    unet: Network,
    job: Job,
    z: Tensor,
    t: Tensor,
    cond: Conditioning,
    span: tuple[float, float],
) -> Tensor:
    """The network's output at (z, t) in the dtype of z, whatever the network's is."""
    x = z.to(cond.text.dtype)
    residuals = Residuals()
    for control in job.controls:
        found = control(x, t, cond, doubled=job.uncond is not None, span=span)
        residuals = residuals if found is None else residuals + found
    if job.extra_channels is not None:
        copies = len(z) // len(job.extra_channels)
        x = torch.cat([x, torch.cat([job.extra_channels] * copies)], dim=1)
    pictures = {"pictures": cond.image} if cond.image else {}
    (output,) = unet(
        x,
        t,
        cond.text,
        timestep_cond=cond.w,
        added_cond_kwargs=cond.added,
        down_block_additional_residuals=residuals.down or None,
        mid_block_additional_residual=residuals.mid,
        down_intrablock_additional_residuals=residuals.features or None,
        return_dict=False,
        **pictures,
    )
    return output.to(z.dtype)


def denoise(unet: Network, job: Job, on_step: Callable[[Step], Step] | None = None) -> Tensor:
    """z_0 (B, C, h, w) from `job.z` by the job's plan.

    `on_step` sees every step and returns the one to go on from; the loop ends with the z_0 of a
    step whose `stop` is set.
    """
    assert job.z is not None, "the task sets the start"
    z, steps = job.z, len(job.plan.timesteps)
    for index, (t, t_next) in enumerate(zip(*job.plan, strict=True)):
        rows, next_rows = t.expand(len(z)), t_next.expand(len(z))
        span = (index / steps, (index + 1) / steps)
        output = predict(unet, job, z, rows, span)
        z, z0 = job.update(output, z, rows, next_rows, job.draw)
        if job.keep is not None:
            z = job.keep(z, next_rows)
        if on_step is not None:
            step = on_step(Step(index, t, z, z0, job))
            if step.stop:
                return step.z0
            z, job = step.z, step.job
    return z
