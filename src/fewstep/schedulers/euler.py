"""Euler's method in the units of sigma: EulerDiscreteScheduler and its ancestral sister.

Their public steps have latents z * sqrt(sigma^2 + 1) with sigma = sigma_t / alpha_t, as diffusers
has; `plan`, `update` and the pipelines have z itself, in which Euler's step is DDIM's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..checkpoints.config import Config
from ..diffusion import NoiseSchedule
from ..errors import RequestError, UnsupportedConfig
from ..random import Generators
from .base import Plan
from .sampling import NoiseConfig, SchedulerOutput, SpacedScheduler, drawing, working_dtype
from .times import followers, karras_times, rows

# In place of 0 at zero terminal SNR, so that sigma stays finite; float16's smallest number.
LEAST_ALPHA_SQUARED = 2.0**-24


@dataclass(frozen=True)
class EulerAncestralConfig(NoiseConfig):
    """scheduler_config.json of an EulerAncestralDiscreteScheduler."""

    timestep_spacing: str = "linspace"
    rescale_betas_zero_snr: bool = False


@dataclass(frozen=True)
class EulerConfig(EulerAncestralConfig):
    """scheduler_config.json of an EulerDiscreteScheduler."""

    use_karras_sigmas: bool = False
    sigma_min: float | None = None  # Karras: the last and the first sigma, if not the spacing's
    sigma_max: float | None = None
    final_sigmas_type: str = "zero"  # or "sigma_min": the last step ends at the first noise level

    INERT: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "interpolation_type": ("linear",),
        "use_exponential_sigmas": (False, None),
        "use_beta_sigmas": (False, None),
        "timestep_type": ("discrete",),
    }


class SigmaScheduler(SpacedScheduler):
    """Base of the schedulers that know noise levels by sigma_t / alpha_t, between times too."""

    def schedule_of(self, alphas_cumprod: Tensor) -> NoiseSchedule:
        """The noise schedule of a table (T,) of alpha squared, with a finite last sigma."""
        if self.config.rescale_betas_zero_snr:
            alphas_cumprod[-1] = LEAST_ALPHA_SQUARED
        prediction_type = self.config.prediction_type
        return NoiseSchedule(alphas_cumprod, prediction_type, log_interpolation=self.is_karras)

    @property
    def is_karras(self) -> bool:
        """Whether sigmas are spread as in Karras et al. (2022)."""
        return self.config_class.knows("use_karras_sigmas") and bool(self.config.use_karras_sigmas)

    @property
    def sigmas(self) -> Tensor:
        """sigma (N + 1,) at the times of the planned run, or of all, and behind the last."""
        plan = self._plan
        times = self.timesteps if plan is None else plan.timesteps
        if plan is not None and plan.exact is not None:
            times = plan.exact
        sigmas = self.noise_schedule.ratio(times.float())
        last = self.noise_schedule.ratio(torch.zeros(1)) if self.end == 0 else torch.zeros(1)
        return torch.cat([sigmas, last])

    def refuse_custom(self, timesteps: object) -> None:
        """Raises RequestError for times given one by one where sigmas tell the times."""
        if timesteps is not None and self.is_karras:
            raise RequestError(
                "timesteps cannot be given with use_karras_sigmas=True, which makes its own; give "
                "num_inference_steps, or from_config(scheduler.config, use_karras_sigmas=False)"
            )


class SigmaSpaceScheduler(SigmaScheduler):
    """Base of the schedulers whose public steps are in the units of sigma."""

    def configure(self, config: Config) -> None:
        """Set up from a config. Raises UnsupportedConfig for values that are not implemented."""
        super().configure(config)
        self.timesteps = self.timesteps.float()

    def plan(
        self,
        num_inference_steps: int | None = None,
        *,
        timesteps: Sequence[int] | Tensor | None = None,
    ) -> Plan:
        """The times of a run, float32, by their number or given one by one (descending)."""
        self.refuse_custom(timesteps)
        steps = self.steps_or_times(num_inference_steps, timesteps)
        times = (self.spaced(steps) if isinstance(steps, int) else steps).float()
        return Plan(times, followers(times))

    def start_scale(self, plan: Plan) -> float:
        """The deviation of the noise that a run starts from: all of it only with leading times."""
        if self.config.timestep_spacing == "leading":
            return 1.0
        sigma = float(self.noise_schedule.ratio(plan.start.reshape(1)))
        return sigma / math.sqrt(sigma**2 + 1)

    @property
    def init_noise_sigma(self) -> float:
        """The deviation of the noise that the planned run starts from, in the units of sigma."""
        sigma = float(self.sigmas.max())
        return math.sqrt(sigma**2 + 1) if self.config.timestep_spacing == "leading" else sigma

    def scale_model_input(self, sample: Tensor, timestep: Tensor | float | None = None) -> Tensor:
        """What the network is given for latents `sample` in the units of sigma."""
        if timestep is None:
            raise RequestError("timestep is missing: the scale of the latents depends on it")
        alpha, _ = self.noise_schedule.alpha_sigma(rows(timestep, sample).float(), sample)
        return sample * alpha

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """z_0 + sigma noise (B, ...) at timesteps (B,), (1,) or ()."""
        t = torch.as_tensor(timesteps).reshape(-1).float()
        alpha, _ = self.noise_schedule.alpha_sigma(t, original_samples)
        return self.diffuse(original_samples, noise, t) / alpha

    def sigma_step(
        self, output: Tensor, timestep: Tensor | float, sample: Tensor, generator: Generators
    ) -> tuple[Tensor, Tensor]:
        """The next step of the planned run, in the units of sigma: (latents, predicted z_0)."""
        dtype = working_dtype(sample)
        z = self.scale_model_input(sample.to(dtype), timestep)
        draw = drawing(output, generator)
        z_next, z0, t_next = self.advance(output.to(dtype), timestep, z, draw)
        alpha, _ = self.noise_schedule.alpha_sigma(t_next.clamp(min=self.end), z_next)
        return (z_next / alpha).to(output.dtype), z0.to(output.dtype)


class EulerDiscreteScheduler(SigmaSpaceScheduler):
    """Euler's method (Karras et al. 2022, Alg. 1 without its correction)."""

    config_class = EulerConfig

    def configure(self, config: Config) -> None:
        """Set up from a config. Raises UnsupportedConfig for values that are not implemented."""
        super().configure(config)
        self.require("final_sigmas_type", ("zero", "sigma_min"))
        lowest, highest = self.noise_schedule.ratio(torch.tensor([0.0, len(self) - 1.0])).tolist()
        for name in ("sigma_min", "sigma_max"):
            value = self.config[name]
            if self.is_karras and value is not None and not lowest <= value <= highest:
                raise UnsupportedConfig(
                    f"{name}={value} is not implemented with use_karras_sigmas=True outside "
                    f"[{lowest:.4g}, {highest:.4g}], the sigmas that the network was trained for"
                )

    def plan(
        self,
        num_inference_steps: int | None = None,
        *,
        timesteps: Sequence[int] | Tensor | None = None,
    ) -> Plan:
        """The times of a run, float32, by their number or given one by one (descending).

        Karras' sigmas lie between those of the first and the last time of the spacing.
        """
        plan = super().plan(num_inference_steps, timesteps=timesteps)
        if not self.is_karras:
            return plan
        table = self.noise_schedule.ratio(torch.arange(len(self)).float())
        # As in diffusers the ends are interpolated linearly, whatever comes between.
        linear = NoiseSchedule(self.alphas_cumprod).ratio(plan.timesteps[[0, -1]])
        highest, lowest = self.config.sigma_max, self.config.sigma_min
        times = karras_times(
            len(plan.timesteps),
            table,
            float(linear[1]) if lowest is None else lowest,
            float(linear[0]) if highest is None else highest,
        )
        exact = torch.from_numpy(times).float()
        return Plan(exact, followers(exact))

    def update(
        self, output: Tensor, z: Tensor, t: Tensor, t_next: Tensor, draw: Callable[[], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """One step: (z at `t_next`, predicted z_0), from the network's `output` at (z, t).

        Shapes: output, z (B, ...); t, t_next (B,), negative t_next for rows at their last step.
        """
        return self.ddim(output, z, t, t_next)

    def step(
        self,
        model_output: Tensor,
        timestep: Tensor | float,
        sample: Tensor,
        s_churn: float = 0.0,
        s_tmin: float = 0.0,
        s_tmax: float = float("inf"),
        s_noise: float = 1.0,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor, Tensor]:
        """The next step of the planned run, on latents in the units of sigma.

        It draws nothing; `s_churn` must be 0, and then the other s_ have no effect.
        """
        if s_churn:
            raise RequestError(
                f"s_churn={s_churn} is not implemented; leave it out, or use the "
                "EulerAncestralDiscreteScheduler for fresh noise in every step"
            )
        result = self.sigma_step(model_output, timestep, sample, generator)
        return SchedulerOutput(*result) if return_dict else result


class EulerAncestralDiscreteScheduler(SigmaSpaceScheduler):
    """Euler's method to a lower sigma and fresh noise up to the next, as DDPM does."""

    config_class = EulerAncestralConfig

    def update(
        self, output: Tensor, z: Tensor, t: Tensor, t_next: Tensor, draw: Callable[[], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """One step: (z at `t_next`, predicted z_0), from the network's `output` at (z, t).

        Shapes: output, z (B, ...); t, t_next (B,), negative t_next for rows at their last step.
        `draw` makes noise like z; it is called unless all rows are at their last step.
        """
        noise = draw() if bool((t_next >= 0).any()) else None
        return self.ddim(output, z, t, t_next, noise=noise, eta=1.0)

    def step(
        self,
        model_output: Tensor,
        timestep: Tensor | float,
        sample: Tensor,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor, Tensor]:
        """The next step of the planned run, on latents in the units of sigma.

        Noise is drawn except at the last.
        """
        result = self.sigma_step(model_output, timestep, sample, generator)
        return SchedulerOutput(*result) if return_dict else result
