"""DDPMScheduler: the ancestral steps that the networks are trained for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from ..random import Generators
from .base import Plan
from .sampling import NoiseConfig, SchedulerOutput, SpacedScheduler, drawing
from .times import followers


@dataclass(frozen=True)
class DDPMConfig(NoiseConfig):
    """scheduler_config.json of a DDPMScheduler."""

    clip_sample: bool = True  # keep the predicted z_0 within +- clip_sample_range
    clip_sample_range: float = 1.0
    thresholding: bool = False  # bound the predicted z_0 by a quantile of itself
    dynamic_thresholding_ratio: float = 0.995
    sample_max_value: float = 1.0
    rescale_betas_zero_snr: bool = False

    INERT: ClassVar[Mapping[str, tuple[Any, ...]]] = {"variance_type": ("fixed_small", None)}


class DDPMScheduler(SpacedScheduler):
    """DDPM (Ho et al. 2020) over a part of the times, with the smaller of its two variances."""

    config_class = DDPMConfig

    def plan(
        self,
        num_inference_steps: int | None = None,
        *,
        timesteps: Sequence[int] | Tensor | None = None,
    ) -> Plan:
        """The times of a run, by their number or given one by one (descending), on the CPU."""
        steps = self.steps_or_times(num_inference_steps, timesteps)
        times = self.spaced(steps).round().long() if isinstance(steps, int) else steps
        return Plan(times, followers(times))

    def update(
        self, output: Tensor, z: Tensor, t: Tensor, t_next: Tensor, draw: Callable[[], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """One step: (z at `t_next`, predicted z_0), from the network's `output` at (z, t).

        Shapes: output, z (B, ...); t, t_next (B,) int64, negative t_next for rows at their last
        step. `draw` makes noise like z; it is called unless all rows are at their last step.
        """
        noise = draw() if bool((t_next >= 0).any()) else None
        bound = self.bound()
        how = {"bound": bound, "rederive_noise": bound is not None}
        return self.ddim(output, z, t, t_next, noise=noise, eta=1.0, **how)

    def step(
        self,
        model_output: Tensor,
        timestep: Tensor | int,
        sample: Tensor,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor, Tensor]:
        """The next step of the planned run. Noise is drawn except at the last."""
        draw = drawing(model_output, generator)
        z_next, z0, _ = self.advance(model_output, timestep, sample, draw)
        return SchedulerOutput(z_next, z0) if return_dict else (z_next, z0)
