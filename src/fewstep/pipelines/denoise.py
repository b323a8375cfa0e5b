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
from ..models.layers import Memo
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

    def joined(self, *others: Conditioning) -> Conditioning:
        """The rows of this one, then those of the `others`."""
        every = (self, *others)

        def join(name: str) -> Tensor | None:
            given = [getattr(each, name) for each in every]
            return None if any(x is None for x in given) else torch.cat(given)

        return Conditioning(
            torch.cat([each.text for each in every]),
            join("pooled"),
            join("time_ids"),
            join("w"),
            tuple(map(torch.cat, zip(*(each.image for each in every), strict=True))),
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
        self,
        z: Tensor,
        t: Tensor,
        cond: Conditioning,
        *,
        doubled: bool,
        span: tuple[float, float],
        memo: Memo | None = None,
    ) -> Residuals | None:
        """The residuals of rows z (B, C, h, w) at times t (B,), or None where there are none.

        `doubled`: the first half of the rows is the unconditional one. `span` is the part of the
        run that the step covers, (i / N, (i + 1) / N). `memo` keeps what is the same at each step.
        """


@dataclass(frozen=True, eq=False)
class Job:
    """One denoising problem as plain values. Only this file reads it."""

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

    @property
    def rows(self) -> Conditioning:
        """What one call of the network is told: with guidance the unconditional rows first."""
        return self.cond if self.uncond is None else self.uncond.joined(self.cond)

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


@dataclass(frozen=True, eq=False)
class Told:
    """What the network is told at every step of a job, and what it keeps of that."""

    cond: Conditioning
    memo: Memo | None  # None: the rows stand at times of their own

    @classmethod
    def by(cls, job: Job) -> Told:
        """Made once for all steps, since a job's conditions do not change."""
        return cls(job.rows, Memo(job.plan.timesteps))


@dataclass(frozen=True, eq=False)
class Asked:
    """What the network is asked in one call: R rows, two of each picture that is guided by two."""

    x: Tensor  # (R, C, h, w) in the network's dtype; of a job the unconditional rows first
    t: Tensor  # (R,)
    cond: Conditioning  # of R rows
    doubled: bool = False
    span: tuple[float, float] = (0, 1)
    controls: tuple[Control, ...] = ()
    extra_channels: Tensor | None = None  # (R, 5, h, w)
    memo: Memo | None = None


def asked(
    job: Job,
    z: Tensor,
    t: Tensor,
    span: tuple[float, float] = (0, 1),
    told: Told | None = None,
) -> Asked:
    """What a job's step asks at (z, t), z (B, C, h, w) and t (B,)."""
    told = told or Told(job.rows, None)

    def rows(x: Tensor) -> Tensor:
        return x if job.uncond is None else torch.cat([x, x])

    return Asked(
        rows(z).to(told.cond.text.dtype),
        rows(t),
        told.cond,
        job.uncond is not None,
        span,
        job.controls,
        None if job.extra_channels is None else rows(job.extra_channels),
        told.memo,
    )


def answer(unet: Network, asked: Asked) -> Tensor:
    """The network's output (R, C, h, w), by one call of it."""
    x, cond, residuals = asked.x, asked.cond, Residuals()
    for control in asked.controls:
        found = control(x, asked.t, cond, doubled=asked.doubled, span=asked.span, memo=asked.memo)
        residuals = residuals if found is None else residuals + found
    if asked.extra_channels is not None:
        x = torch.cat([x, asked.extra_channels], dim=1)
    more: dict[str, Any] = {"pictures": cond.image} if cond.image else {}
    if asked.memo is not None and getattr(unet, "keeps_memo", False):
        more["memo"] = asked.memo
    (output,) = unet(
        x,
        asked.t,
        cond.text,
        timestep_cond=cond.w,
        added_cond_kwargs=cond.added,
        down_block_additional_residuals=residuals.down or None,
        mid_block_additional_residual=residuals.mid,
        down_intrablock_additional_residuals=residuals.features or None,
        return_dict=False,
        **more,
    )
    return output


def guided(job: Job, output: Tensor, dtype: torch.dtype) -> Tensor:
    """The output (B, C, h, w) in `dtype` that a step goes by, of the network's (R, C, h, w)."""
    output = output.to(dtype)
    if job.uncond is None:
        return output
    negative, positive = output.chunk(2)
    combined = classifier_free_guidance(positive, negative, job.guidance_scale)
    if job.guidance_rescale > 0:
        combined = rescale_guidance(combined, positive, job.guidance_rescale)
    return combined


def predict(unet: Network, job: Job, z: Tensor, t: Tensor) -> Tensor:
    """The guided network output (B, C, h, w) at (z, t), t (B,), by one call of the network."""
    return guided(job, answer(unet, asked(job, z, t)), z.dtype)


@dataclass(eq=False)
class Run:
    """A job under way: it asks the network, and goes a step on by the answer.

    `denoise` takes one from start to end. A server asks for the rows of many at once.
    """

    job: Job
    z: Tensor  # (B, C, h, w), where it stands
    told: Told
    times: tuple[tuple[Tensor, Tensor], ...]  # of each step and the next
    index: int = 0  # of the step to take

    @classmethod
    def of(cls, job: Job) -> Run:
        """The run of a job from its start."""
        assert job.z is not None, "the task sets the start"
        return cls(job, job.z, Told.by(job), tuple(zip(*job.plan, strict=True)))

    @property
    def is_done(self) -> bool:
        """Whether all steps are taken."""
        return self.index == len(self.times)

    @property
    def span(self) -> tuple[float, float]:
        """The part of the run that the step covers."""
        return self.index / len(self.times), (self.index + 1) / len(self.times)

    def asks(self) -> Asked:
        """What the step asks."""
        if self.told.memo is not None:
            self.told.memo.index = self.index
        t, _ = self.times[self.index]
        return asked(self.job, self.z, t.expand(len(self.z)), self.span, self.told)

    def advance(self, output: Tensor) -> Step:
        """Takes the step, by the network's output (R, C, h, w) for what it asked."""
        job, (t, t_next) = self.job, self.times[self.index]
        rows, next_rows = t.expand(len(self.z)), t_next.expand(len(self.z))
        output = guided(job, output, self.z.dtype)
        z, z0 = job.update(output, self.z, rows, next_rows, job.draw)
        if job.keep is not None:
            z = job.keep(z, next_rows)
        step = Step(self.index, t, z, z0, job)
        self.z, self.index = z, self.index + 1
        return step

    def go_on_from(self, step: Step) -> None:
        """Takes over what a callback made of the last step."""
        if step.job is not self.job:
            self.told = Told.by(step.job)
        self.z, self.job = step.z, step.job


def denoise(unet: Network, job: Job, on_step: Callable[[Step], Step] | None = None) -> Tensor:
    """z_0 (B, C, h, w) from `job.z` by the job's plan.

    `on_step` sees every step and returns the one to go on from; the loop ends with the z_0 of a
    step whose `stop` is set.
    """
    run = Run.of(job)
    while not run.is_done:
        step = run.advance(answer(unet, run.asks()))
        if on_step is not None:
            step = on_step(step)
            if step.stop:
                return step.z0
            run.go_on_from(step)
    return run.z
