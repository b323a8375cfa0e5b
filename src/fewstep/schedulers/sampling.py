"""What the schedulers that sample have in common: the noise schedule and diffusers' stepping."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..checkpoints.config import Config
from ..diffusion import (
    NoiseSchedule,
    at_rows,
    betas_for,
    bounded_ddim_step,
    expand,
    rescale_to_zero_snr,
)
from ..errors import RequestError, UnsupportedConfig
from ..outputs import Output
from ..random import Generators, randn
from .base import Plan, Scheduler, SchedulerConfig
from .times import SPACINGS, rows, spaced

Draw = Callable[[], Tensor]
Updater = Callable[..., tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class NoiseConfig(SchedulerConfig):
    """The keys of every scheduler that samples, with diffusers' usual defaults."""

    num_train_timesteps: int = 1000
    beta_start: float = 0.0001
    beta_end: float = 0.02
    beta_schedule: str = "linear"
    trained_betas: tuple[float, ...] | None = None  # in place of the other three
    prediction_type: str = "epsilon"
    timestep_spacing: str = "leading"
    steps_offset: int = 0  # leading: added to every time


@dataclass(frozen=True)
class SamplingConfig(NoiseConfig):
    """The keys that LCM, TCD and DDIM share; some defaults of DDIM differ."""

    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: str = "scaled_linear"
    clip_sample: bool = False  # keep the predicted z_0 within +- clip_sample_range
    clip_sample_range: float = 1.0
    set_alpha_to_one: bool = True  # DDIM: the last step ends at z_0, not at the first noise level
    thresholding: bool = False  # bound the predicted z_0 by a quantile of itself
    dynamic_thresholding_ratio: float = 0.995
    sample_max_value: float = 1.0
    rescale_betas_zero_snr: bool = False


@dataclass
class SchedulerOutput(Output):
    """Latents for the next step, and the predicted z_0 where the scheduler tells it."""

    prev_sample: Tensor
    pred_original_sample: Tensor | None = None


class SamplingScheduler(Scheduler):
    """Base of the schedulers that sample; subclasses say how in `plan` and `update`."""

    config_class = NoiseConfig

    noise_schedule: NoiseSchedule
    betas: Tensor  # (T,)
    alphas: Tensor  # (T,)
    alphas_cumprod: Tensor  # (T,)
    timesteps: Tensor  # (N,) of the planned run
    num_inference_steps: int | None  # of the planned run
    custom_timesteps: bool

    def configure(self, config: Config) -> None:
        """Set up from a config. Raises UnsupportedConfig for values that are not implemented."""
        super().configure(config)
        self.betas = betas_of(self.config)
        self.noise_schedule = self.schedule_of(torch.cumprod(1 - self.betas, 0))
        self.alphas = 1.0 - self.betas
        self.alphas_cumprod = self.noise_schedule.alphas_cumprod
        self.timesteps = torch.arange(len(self) - 1, -1, -1)
        self.num_inference_steps = None
        self.custom_timesteps = False
        self._plan: Plan | None = None
        self._run: Updater | None = None
        self._begin_index: int | None = None
        self._step_index: int | None = None

    def schedule_of(self, alphas_cumprod: Tensor) -> NoiseSchedule:
        """The noise schedule of a table (T,) of alpha squared."""
        return NoiseSchedule(alphas_cumprod, self.config.prediction_type)

    def require(self, name: str, supported: Sequence[object]) -> None:
        """Raises UnsupportedConfig unless the config's `name` is one of `supported`."""
        if self.config[name] not in supported:
            raise UnsupportedConfig(
                f"{name}={self.config[name]!r} is not implemented "
                f"(supported: {', '.join(map(repr, supported))})"
            )

    @property
    def end(self) -> int:
        """The time behind the last step: -1 is that of z_0, 0 that of the first noise level."""
        config, knows = self.config, self.config_class.knows
        to_noise = knows("set_alpha_to_one") and not config.set_alpha_to_one
        to_sigma = knows("final_sigmas_type") and config.final_sigmas_type == "sigma_min"
        return 0 if to_noise or to_sigma else -1

    @property
    def final_alpha_cumprod(self) -> Tensor:
        """What stands for alphas_cumprod behind the last step, ()."""
        return torch.tensor(1.0) if self.end < 0 else self.alphas_cumprod[0]

    # ── the step, in variance-preserving units ──

    def ddim(
        self, output: Tensor, z: Tensor, t: Tensor, t_next: Tensor, **how: Any
    ) -> tuple[Tensor, Tensor]:
        """(z at `t_next`, predicted z_0) by `bounded_ddim_step`; `how` are its keywords."""
        dtype = working_dtype(z)
        if how.get("noise") is not None:
            how["noise"] = how["noise"].to(dtype)
        z_next, z0 = bounded_ddim_step(
            output.to(dtype),
            z.to(dtype),
            at_rows(t, z),
            at_rows(t_next, z).clamp(min=self.end),
            self.noise_schedule,
            **how,
        )
        return z_next.to(z.dtype), z0.to(z.dtype)

    def diffuse(self, z0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """z_t from z_0 and noise (B, ...) at times t (B,)."""
        return self.noise_schedule.add_noise(z0, noise, at_rows(t, z0))

    # ── diffusers' stepping ──

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """z_t from z_0 and noise (B, ...) at timesteps (B,), (1,) or ()."""
        t = torch.as_tensor(timesteps, device=original_samples.device).reshape(-1)
        return self.diffuse(original_samples, noise, t)

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The v_prediction target of z_0 `sample` and noise (B, ...) at timesteps (B,) or ()."""
        t = torch.as_tensor(timesteps, device=sample.device).reshape(-1)
        return self.noise_schedule.velocity(sample, noise, t)

    def scale_model_input(self, sample: Tensor, timestep: Tensor | float | None = None) -> Tensor:
        """`sample`: a network of a variance-preserving schedule takes the latents as they are."""
        return sample

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        timesteps: Sequence[int] | Tensor | None = None,
    ) -> None:
        """Plan a run for `step`; arguments as in `plan`, and the device of `self.timesteps`."""
        plan = self.plan(num_inference_steps, timesteps=timesteps)
        self.begin_run(plan, device, custom=timesteps is not None)

    @property
    def step_index(self) -> int | None:
        """The place in the planned run that `step` has reached, None before the first step."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """The place that the run begins with, None if the first timestep tells."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Begin the run at the place `begin_index`."""
        self._begin_index = begin_index

    def index_for_timestep(
        self, timestep: Tensor | float, schedule_timesteps: Tensor | None = None
    ) -> int:
        """The place of `timestep` in the planned run; the second if it stands there twice."""
        times = self.timesteps if schedule_timesteps is None else schedule_timesteps
        found = [i for i, t in enumerate(times.tolist()) if t == float(timestep)]
        if not found:
            raise RequestError(f"timestep {shown(timestep)} is not planned: {times.tolist()}")
        return found[min(1, len(found) - 1)]

    def previous_timestep(self, timestep: Tensor | int) -> int:
        """The time that follows `timestep` in the planned run (-1 behind the last), or t - 1."""
        if self._plan is None:
            return int(timestep) - 1
        following = [*self._plan.timesteps.tolist()[self.index_for_timestep(timestep) + 1 :], -1]
        return following[0]

    def begin_run(self, plan: Plan, device: torch.device | str | None, custom: bool) -> None:
        """Take `plan` as the run that `step` goes through."""
        self._plan = plan
        self._run = None
        self.timesteps = plan.timesteps.to(device)
        self.num_inference_steps = len(plan.timesteps)
        self.custom_timesteps = custom
        self._begin_index = self._step_index = None

    def planned(self) -> Plan:
        """The planned run. Raises RequestError if there is none."""
        if self._plan is None:
            raise RequestError("no run is planned; call set_timesteps before step")
        return self._plan

    def advance(
        self, output: Tensor, timestep: Tensor | float, z: Tensor, draw: Draw, **how: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The next step of the planned run: (z at the next time, predicted z_0, next time (B,)).

        The first step is that at `timestep`, or at `begin_index`.
        """
        plan, steps = self.planned(), self.num_inference_steps or 0
        index = self._step_index
        if index is None:
            begin = self._begin_index
            index = self.index_for_timestep(timestep) if begin is None else begin
            self._run = self.updater(plan.part(index, steps))
        if index >= steps or self._run is None:
            raise RequestError(f"all {steps} planned steps are done; call set_timesteps again")
        t_next = rows(plan.next_timesteps[index], z)
        z_next, z0 = self._run(output, z, rows(timestep, z), t_next, draw, **how)
        self._step_index = index + 1
        return z_next, z0, t_next

    # ── plans ──

    def steps_or_times(
        self, num_inference_steps: int | None, timesteps: Sequence[int] | Tensor | None
    ) -> int | Tensor:
        """Whichever is given, checked: a number of steps, or custom times (N,) on the CPU."""
        if (num_inference_steps is None) == (timesteps is None):
            raise RequestError(
                "give either num_inference_steps or timesteps, got "
                f"{num_inference_steps!r} and {timesteps!r}"
            )
        if num_inference_steps is not None:
            if not 1 <= num_inference_steps <= len(self):
                raise RequestError(
                    f"num_inference_steps must lie in [1, {len(self)}] (num_train_timesteps), "
                    f"got {num_inference_steps}"
                )
            return num_inference_steps
        times = torch.as_tensor(timesteps, dtype=torch.int64, device="cpu").reshape(-1)
        if not len(times) or (times.diff() >= 0).any():
            raise RequestError(f"timesteps must be strictly descending, got {times.tolist()}")
        self.noise_schedule.check_time(int(times[0]))
        self.noise_schedule.check_time(int(times[-1]))
        return times

    def spaced(self, steps: int) -> Tensor:
        """`steps` times, descending float64, spread as the config says."""
        config = self.config
        times = spaced(steps, len(self), config.timestep_spacing, config.steps_offset)
        return self.within(torch.from_numpy(times.copy()), steps)

    def within(self, times: Tensor, steps: int) -> Tensor:
        """`times` (N,), descending. Raises RequestError if the first is none of the training's."""
        if not 0 <= int(times[0]) < len(self):
            raise RequestError(
                f"num_inference_steps={steps} with steps_offset={self.config.steps_offset} begins "
                f"at time {int(times[0])}, outside [0, {len(self) - 1}]; use fewer steps"
            )
        return times

    def bound(self) -> Callable[[Tensor], Tensor] | None:
        """How the config bounds a predicted z_0, None for not at all."""
        config = self.config
        if config.thresholding:
            return lambda z0: dynamic_threshold(
                z0, config.dynamic_thresholding_ratio, config.sample_max_value
            )
        if config.clip_sample:
            return lambda z0: z0.clamp(-config.clip_sample_range, config.clip_sample_range)
        return None


class SpacedScheduler(SamplingScheduler):
    """Base of the schedulers whose times are spread as `timestep_spacing` says."""

    def configure(self, config: Config) -> None:
        """Set up from a config. Raises UnsupportedConfig for values that are not implemented."""
        super().configure(config)
        self.require("timestep_spacing", SPACINGS)


def betas_of(config: Any) -> Tensor:
    """The betas (T,) that a NoiseConfig asks for."""
    if config.trained_betas is None:
        betas = betas_for(
            config.beta_schedule, config.num_train_timesteps, config.beta_start, config.beta_end
        )
    else:
        betas = torch.as_tensor(config.trained_betas, dtype=torch.float32)
        if len(betas) != config.num_train_timesteps:
            raise UnsupportedConfig(
                f"trained_betas has {len(betas)} entries, "
                f"but num_train_timesteps={config.num_train_timesteps}"
            )
    return rescale_to_zero_snr(betas) if config.get("rescale_betas_zero_snr") else betas


def dynamic_threshold(z0: Tensor, ratio: float, most: float) -> Tensor:
    """z_0 (B, ...) clipped to the `ratio` quantile of its magnitude, then scaled to [-1, 1].

    The quantile of each row is kept within [1, `most`] (Imagen, Saharia et al. 2022, sec. 2.3).
    """
    limit = torch.quantile(z0.flatten(1).abs(), ratio, dim=1).clamp(1, most)
    limit = expand(limit, z0)
    return z0.clamp(-limit, limit) / limit


def drawing(like: Tensor, generator: Generators, dtype: torch.dtype | None = None) -> Draw:
    """What makes noise of the shape of `like`, and in its dtype unless `dtype` is given."""
    return lambda: randn(like.shape, generator, like.device, dtype or like.dtype)


def shown(t: Tensor | float) -> str:
    """A time as text, whole ones without a point."""
    return f"{float(t):g}"


def working_dtype(z: Tensor) -> torch.dtype:
    """The dtype that a step on latents `z` is computed in: float32 at least."""
    return torch.promote_types(z.dtype, torch.float32)
