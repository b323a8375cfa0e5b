"""DDIMScheduler: steps of the probability-flow ODE, with fresh noise on demand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..checkpoints.config import Config
from ..diffusion import NoiseSchedule, ddim_step
from ..errors import RequestError, UnsupportedConfig
from ..outputs import Output
from ..random import Generators, randn
from .base import Plan
from .sampling import SamplingConfig, SamplingScheduler, followers, rows, working_dtype

SPACINGS = ("leading", "linspace", "trailing")


@dataclass(frozen=True)
class DDIMConfig(SamplingConfig):
    """scheduler_config.json of a DDIMScheduler."""

    beta_start: float = 0.0001
    beta_end: float = 0.02
    beta_schedule: str = "linear"
    clip_sample: bool = True


@dataclass
class DDIMSchedulerOutput(Output):
    """Latents for the next step, and the predicted z_0."""

    prev_sample: Tensor
    pred_original_sample: Tensor | None = None


class DDIMScheduler(SamplingScheduler):
    """DDIM (Song et al. 2021), deterministic unless `eta` > 0."""

    config_class = DDIMConfig

    def configure(self, config: Config) -> None:
        """Set up from a config. Raises UnsupportedConfig for values that are not implemented."""
        super().configure(config)
        if self.config.timestep_spacing not in SPACINGS:
            raise UnsupportedConfig(
                f"timestep_spacing={self.config.timestep_spacing!r} is not implemented "
                f"(supported: {', '.join(map(repr, SPACINGS))})"
            )

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
        config = self.config
        times = spaced_timesteps(steps, len(self), config.timestep_spacing, config.steps_offset)
        if not 0 <= int(times[0]) < len(self):
            raise RequestError(
                f"num_inference_steps={steps} with steps_offset={config.steps_offset} begins at "
                f"time {int(times[0])}, outside [0, {len(self) - 1}]; use fewer steps"
            )
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
        dtype = working_dtype(z)
        # Behind the last step stands z_0 or, without set_alpha_to_one, the first noise level.
        first = -1 if self.config.set_alpha_to_one else 0
        z_next, z0 = bounded_ddim_step(
            output.to(dtype),
            z.to(dtype),
            t.to(z.device),
            t_next.to(z.device).clamp(min=first),
            self.noise_schedule,
            noise=draw().to(dtype) if eta > 0 else None,
            eta=eta,
            bound=self.bound(),
            rederive_noise=use_clipped_model_output,
        )
        return z_next.to(z.dtype), z0.to(z.dtype)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        timesteps: Sequence[int] | Tensor | None = None,
    ) -> None:
        """Plan a run for `step`; arguments as in `plan`, and the device of `self.timesteps`."""
        plan = self.plan(num_inference_steps, timesteps=timesteps)
        self.begin_run(plan, device, custom=timesteps is not None)

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

        def draw() -> Tensor:
            if variance_noise is not None:
                return variance_noise
            return randn(model_output.shape, generator, model_output.device, model_output.dtype)

        z_next, z0 = self.update(
            model_output,
            sample,
            rows(timestep, sample),
            rows(t_next, sample),
            draw,
            eta=eta,
            use_clipped_model_output=use_clipped_model_output,
        )
        return DDIMSchedulerOutput(z_next, z0) if return_dict else (z_next, z0)


def spaced_timesteps(
    steps: int, train_steps: int = 1000, spacing: str = "leading", offset: int = 0
) -> Tensor:
    """`steps` times, descending int64, spread over [0, train_steps) (Lin et al. 2024, Tab. 2).

    `offset` is added to times of leading spacing.
    """
    match spacing:
        case "leading":
            times = np.arange(steps)[::-1] * (train_steps // steps) + offset
        case "linspace":
            times = np.linspace(0, train_steps - 1, steps).round()[::-1]
        case "trailing":
            # The float stride may yield one time more than asked for, at the end.
            times = np.round(np.arange(train_steps, 0, -train_steps / steps))[:steps] - 1
        case _:
            raise RequestError(f"spacing must be one of {SPACINGS}, got {spacing!r}")
    return torch.from_numpy(times.astype(np.int64))


def bounded_ddim_step(
    output: Tensor,
    z: Tensor,
    t: Tensor,
    t_next: Tensor,
    schedule: NoiseSchedule,
    *,
    noise: Tensor | None = None,
    eta: float = 0.0,
    bound: Callable[[Tensor], Tensor] | None = None,
    rederive_noise: bool = False,
) -> tuple[Tensor, Tensor]:
    """(z at `t_next`, predicted z_0) by one DDIM step (Song et al. 2021, eq. 12 and 16).

    Shapes: output, z, noise (B, ...); t, t_next (B,). `bound`, if given, bounds z_0, and with
    `rederive_noise` the predicted noise is what leads from the bounded z_0 to z.
    """
    z0 = schedule.to_z0(output, z, t)
    if bound is None and noise is None:
        return ddim_step(output, z, t, t_next, schedule), z0
    alpha, sigma = schedule.alpha_sigma(t, z)
    alpha_next, sigma_next = schedule.alpha_sigma(t_next, z)
    predicted = schedule.to_noise(output, z, t)
    if bound is not None:
        z0 = bound(z0)
    if rederive_noise:
        predicted = (z - alpha * z0) / sigma
    if noise is None:
        return alpha_next * z0 + sigma_next * predicted, z0
    # Eq. 16, rearranged so that nothing cancels: of the noise at t_next the share `kept` squared
    # stays the predicted one at eta 1, and the rest is fresh.
    kept = (alpha / alpha_next) * (sigma_next / sigma)
    old = sigma_next * (1 - eta**2 + (eta * kept) ** 2).sqrt()
    fresh = sigma_next * eta * (1 - kept**2).clamp(min=0).sqrt()
    return alpha_next * z0 + old * predicted + fresh * noise, z0
