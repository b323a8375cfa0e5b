"""DDIMScheduler: steps of the probability-flow ODE, with fresh noise on demand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from ..errors import RequestError
from ..random import Generators
from .base import Plan
from .sampling import SamplingConfig, SchedulerOutput, SpacedScheduler, drawing
from .times import followers, rows


@dataclass(frozen=True)
class DDIMConfig(SamplingConfig):
    """scheduler_config.json of a DDIMScheduler."""

    beta_start: float = 0.0001
    beta_end: float = 0.02
    beta_schedule: str = "linear"
    clip_sample: bool = True


class DDIMSchedulerOutput(SchedulerOutput):
    """Latents for the next step, and the predicted z_0."""


class DDIMScheduler(SpacedScheduler):
    """DDIM (Song et al. 2021), deterministic unless `eta` > 0."""

    config_class = DDIMConfig
    takes_eta = True

    def plan(
        self,
        num_inference_steps: int | None = None,
        *,
        timesteps: Sequence[int] | Tensor | None = None,
    ) -> Plan:
        """The times of a run, by their number or given one by one (descending), on the CPU.

        By number a step goes from t to t - T // N, as in diffusers, which need not be the next time
        of the plan.
        """
        steps = self.steps_or_times(num_inference_steps, timesteps)
        if not isinstance(steps, int):
            return Plan(steps, followers(steps))
        times = self.spaced(steps).round().long()
        return Plan(times, times - len(self) // steps)

    def update(
        self,
        output: Tensor,
        z: Tensor,
        t: Tensor,
        t_next: Tensor,
        draw: Callable[[], Tensor],
        *,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """One step: (z at `t_next`, predicted z_0), from the network's `output` at (z, t).

        Shapes: output, z (B, ...); t, t_next (B,) int64, negative t_next for rows at their last
        step. `draw` makes noise like z and is called if `eta`, in [0, 1], is not 0. With
        `use_clipped_model_output` the predicted noise follows from the bounded z_0.
        """
        if not 0 <= eta <= 1:
            raise RequestError(f"eta must lie in [0, 1], got {eta}")
        return self.ddim(
            output,
            z,
            t,
            t_next,
            noise=draw() if eta > 0 else None,
            eta=eta,
            bound=self.bound(),
            rederive_noise=use_clipped_model_output,
        )

    def step(
        self,
        model_output: Tensor,
        timestep: Tensor | int,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
        generator: Generators = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> DDIMSchedulerOutput | tuple[Tensor, Tensor]:
        """The step at `timestep`, whose length is that of the planned run's steps.

        With `eta` > 0 noise is drawn, or taken from `variance_noise`.
        """
        if generator is not None and variance_noise is not None:
            raise RequestError("give either generator or variance_noise, not both")
        plan = self.planned()
        if self.custom_timesteps:
            t_next = int(plan.next_timesteps[self.index_for_timestep(timestep)])
        else:
            t_next = int(timestep) - len(self) // len(plan.timesteps)
        given = variance_noise
        z_next, z0 = self.update(
            model_output,
            sample,
            rows(timestep, sample),
            rows(t_next, sample),
            drawing(model_output, generator) if given is None else lambda: given,
            eta=eta,
            use_clipped_model_output=use_clipped_model_output,
        )
        return DDIMSchedulerOutput(z_next, z0) if return_dict else (z_next, z0)
