"""PNDMScheduler: pseudo linear multistep steps, which old checkpoints come with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..checkpoints.config import Config
from ..diffusion import adams_bashforth
from ..errors import RequestError, UnsupportedConfig
from .base import Plan
from .sampling import NoiseConfig, SchedulerOutput, SpacedScheduler
from .times import followers


@dataclass(frozen=True)
class PNDMConfig(NoiseConfig):
    """scheduler_config.json of a PNDMScheduler."""

    skip_prk_steps: bool = False  # must be true for sampling: no Runge-Kutta steps to begin with
    set_alpha_to_one: bool = False  # the last step ends at z_0, not at the first noise level


class PNDMScheduler(SpacedScheduler):
    """PLMS (Liu et al. 2022): DDIM's step by a mean of the last four outputs.

    A whole run visits its second time twice, to correct the first step: N + 1 network calls.
    """

    config_class = PNDMConfig

    def configure(self, config: Config) -> None:
        """Set up from a config. Raises UnsupportedConfig for values that are not implemented."""
        super().configure(config)
        if self.config.get("rescale_betas_zero_snr"):
            raise UnsupportedConfig(
                "rescale_betas_zero_snr=True is not implemented for PNDMScheduler, which divides "
                "by the signal at the last time; use DDIMScheduler"
            )

    def plan(
        self,
        num_inference_steps: int | None = None,
        *,
        timesteps: Sequence[int] | Tensor | None = None,
    ) -> Plan:
        """The times of a run, by their number, on the CPU: one more, as the second comes twice.

        A step goes from t to t - T // N, as in diffusers.
        """
        if not self.config.skip_prk_steps:
            raise RequestError(
                "skip_prk_steps=False is not implemented for sampling; use "
                "PNDMScheduler.from_config(pipe.scheduler.config, skip_prk_steps=True)"
            )
        steps = self.steps_or_times(num_inference_steps, timesteps)
        if not isinstance(steps, int):
            return Plan(steps, followers(steps))
        times = self.spaced(steps).round().long()
        following = times - len(self) // steps
        if steps == 1:
            return Plan(times, following)
        second = times[1:2]
        return Plan(
            torch.cat([times[:2], times[1:]]),
            torch.cat([following[:1], second, following[1:]]),
        )

    def updater(self, plan: Plan) -> PNDMRun:
        """The steps of one run, which remember the run's last outputs."""
        return PNDMRun(self, plan)

    def update(
        self, output: Tensor, z: Tensor, t: Tensor, t_next: Tensor, draw: Callable[[], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """One step of the first order, which needs no memory: (z at `t_next`, predicted z_0).

        Shapes: output, z (B, ...); t, t_next (B,) int64, negative t_next for rows at their last
        step.
        """
        return self.ddim(output, z, t, t_next)

    def step(
        self,
        model_output: Tensor,
        timestep: Tensor | int,
        sample: Tensor,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor]:
        """The next step of the planned run."""
        z_next, _, _ = self.advance(model_output, timestep, sample, no_noise)
        return SchedulerOutput(z_next) if return_dict else (z_next,)


def no_noise() -> Tensor:
    raise AssertionError("these steps draw nothing")


@dataclass(eq=False)
class PNDMRun:
    """The steps of one run, taken one after the other.

    The second visit to the second time makes the first step again, by the mean of both its ends.
    """

    scheduler: PNDMScheduler
    plan: Plan
    outputs: list[Tensor] = field(default_factory=list)  # the last four, newest first
    first: tuple[Tensor, Tensor] | None = None  # z and its time at the first step
    index: int = 0  # of the next step in the plan

    def __call__(
        self, output: Tensor, z: Tensor, t: Tensor, t_next: Tensor, draw: Callable[[], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """(z at `t_next`, predicted z_0), from the network's `output` at (z, t)."""
        place, self.index = self.plan.begin + self.index, self.index + 1
        if place == 1 and self.first is not None and bool((t == t_next).all()):
            mean = (output + self.outputs[0]) / 2
            return self.scheduler.update(mean, *self.first, t_next, draw)
        self.outputs = [output, *self.outputs][:4]
        if place == 0:
            self.first = (z, t)
        return self.scheduler.update(adams_bashforth(self.outputs), z, t, t_next, draw)
