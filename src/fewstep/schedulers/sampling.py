"""What the schedulers that sample have in common: the noise schedule and diffusers' stepping."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..checkpoints.config import Config
from ..diffusion import NoiseSchedule, betas_for, expand, rescale_to_zero_snr
from ..errors import RequestError, UnsupportedConfig
from .base import Plan, Scheduler, SchedulerConfig


@dataclass(frozen=True)
class SamplingConfig(SchedulerConfig):
    """The keys that LCM and DDIM share; some defaults of DDIM differ."""

    num_train_timesteps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: str = "scaled_linear"
    trained_betas: tuple[float, ...] | None = None  # in place of the other three
    clip_sample: bool = False  # keep the predicted z_0 within +- clip_sample_range
    clip_sample_range: float = 1.0
    set_alpha_to_one: bool = True  # DDIM: the last step ends at z_0, not at the first noise level
    steps_offset: int = 0  # DDIM, leading: added to every time
    prediction_type: str = "epsilon"
    thresholding: bool = False  # bound the predicted z_0 by a quantile of itself
    dynamic_thresholding_ratio: float = 0.995
    sample_max_value: float = 1.0
    timestep_spacing: str = "leading"  # DDIM
    rescale_betas_zero_snr: bool = False


class SamplingScheduler(Scheduler):
    """Base of the schedulers that sample; subclasses say how in `plan`, `update` and `step`."""

    config_class = SamplingConfig

    noise_schedule: NoiseSchedule
    betas: Tensor  # (T,)
    alphas: Tensor  # (T,)
    alphas_cumprod: Tensor  # (T,)
    final_alpha_cumprod: Tensor  # (), stands for alphas_cumprod behind the last step
    timesteps: Tensor  # (N,) int64, of the planned run
    num_inference_steps: int | None  # of the planned run
    custom_timesteps: bool

    def configure(self, config: Config) -> None:
        """Set up from a config. Raises UnsupportedConfig for values that are not implemented."""
        super().configure(config)
        self.betas = betas_of(self.config)
        self.noise_schedule = NoiseSchedule.from_betas(self.betas, self.config.prediction_type)
        self.alphas = 1.0 - self.betas
        self.alphas_cumprod = self.noise_schedule.alphas_cumprod
        one = torch.tensor(1.0)
        self.final_alpha_cumprod = one if self.config.set_alpha_to_one else self.alphas_cumprod[0]
        self.timesteps = torch.arange(len(self) - 1, -1, -1)
        self.num_inference_steps = None
        self.custom_timesteps = False
        self._plan: Plan | None = None
        self._begin_index: int | None = None
        self._step_index: int | None = None

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """z_t from z_0 and noise (B, ...) at timesteps (B,), (1,) or ()."""
        t = torch.as_tensor(timesteps, device=original_samples.device).reshape(-1)
        return self.noise_schedule.add_noise(original_samples, noise, t)

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The v_prediction target of z_0 `sample` and noise (B, ...) at timesteps (B,) or ()."""
        t = torch.as_tensor(timesteps, device=sample.device).reshape(-1)
        return self.noise_schedule.velocity(sample, noise, t)

    def scale_model_input(self, sample: Tensor, timestep: Tensor | int | None = None) -> Tensor:
        """`sample`: a network of a variance-preserving schedule takes the latents as they are."""
        return sample

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
        self, timestep: Tensor | int, schedule_timesteps: Tensor | None = None
    ) -> int:
        """The place of `timestep` in the planned run; the second if it stands there twice."""
        times = self.timesteps if schedule_timesteps is None else schedule_timesteps
        found = [i for i, t in enumerate(times.tolist()) if t == int(timestep)]
        if not found:
            raise RequestError(f"timestep {int(timestep)} is not planned: {times.tolist()}")
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
        self.timesteps = plan.timesteps.to(device)
        self.num_inference_steps = len(plan.timesteps)
        self.custom_timesteps = custom
        self._begin_index = self._step_index = None

    def planned(self) -> Plan:
        """The planned run. Raises RequestError if there is none."""
        if self._plan is None:
            raise RequestError("no run is planned; call set_timesteps before step")
        return self._plan

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


def betas_of(config: Any) -> Tensor:
    """The betas (T,) that a SamplingConfig asks for."""
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
    return rescale_to_zero_snr(betas) if config.rescale_betas_zero_snr else betas


def dynamic_threshold(z0: Tensor, ratio: float, most: float) -> Tensor:
    """z_0 (B, ...) clipped to the `ratio` quantile of its magnitude, then scaled to [-1, 1].

    The quantile of each row is kept within [1, `most`] (Imagen, Saharia et al. 2022, sec. 2.3).
    """
    limit = torch.quantile(z0.flatten(1).abs(), ratio, dim=1).clamp(1, most)
    limit = expand(limit, z0)
    return z0.clamp(-limit, limit) / limit


def followers(times: Tensor) -> Tensor:
    """For each of `times` (N,) the next one, -1 for the last."""
    return torch.cat([times[1:], times.new_tensor([-1])])


def rows(t: Tensor | int, like: Tensor) -> Tensor:
    """The one time `t` for every row of `like`: (B,) int64 on the CPU."""
    return torch.full((len(like),), int(t), dtype=torch.int64)


def working_dtype(z: Tensor) -> torch.dtype:
    """The dtype that a step on latents `z` is computed in: float32 at least."""
    return torch.promote_types(z.dtype, torch.float32)
