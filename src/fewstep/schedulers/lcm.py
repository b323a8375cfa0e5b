"""LCMScheduler: multistep consistency sampling."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..diffusion import at_rows, lcm_step, lcm_timesteps
from ..errors import RequestError
from ..outputs import Output
from ..random import Generators
from .base import Plan
from .sampling import SamplingConfig, SamplingScheduler, drawing, working_dtype
from .times import followers


@dataclass(frozen=True)
class LCMConfig(SamplingConfig):
    """scheduler_config.json of an LCMScheduler.

    `timestep_spacing`, `steps_offset` and `set_alpha_to_one` have no effect, as in diffusers.
    """

    original_inference_steps: int = 50  # steps of the solver that the LCM was distilled on
    timestep_scaling: float = 10.0


@dataclass
class LCMSchedulerOutput(Output):
    """Latents for the next step, and the z_0 that the consistency function predicts."""

    prev_sample: Tensor
    denoised: Tensor | None = None


class DistilledScheduler(SamplingScheduler):
    """Base of the schedulers whose times are taken from the grid of a distillation."""

    config_class = LCMConfig

    def plan(
        self,
        num_inference_steps: int | None = None,
        *,
        timesteps: Sequence[int] | Tensor | None = None,
        original_inference_steps: int | None = None,
        strength: float = 1.0,
    ) -> Plan:
        """The times of a run over the lower `strength` of the distillation grid, on the CPU.

        The grid has `original_inference_steps` times (default: the config's). Of custom `timesteps`
        (descending) the last share `strength` is kept.
        """
        if not 0 < strength <= 1:
            raise RequestError(f"strength must lie in (0, 1], got {strength}")
        steps = self.steps_or_times(num_inference_steps, timesteps)
        if isinstance(steps, int):
            original = self.grid(steps, original_inference_steps)
            times = lcm_timesteps(steps, original, len(self), strength)
        else:
            times = steps[len(steps) - int(len(steps) * strength) :]
            if not len(times):
                raise RequestError(f"strength={strength} leaves none of {len(steps)} timesteps")
        return Plan(times, followers(times))

    def grid(self, steps: int, original_inference_steps: int | None) -> int:
        """The number of times in the grid that a run of `steps` takes its own from."""
        if original_inference_steps is None:
            return int(self.config.original_inference_steps)
        return original_inference_steps

    def set_timesteps(  # type: ignore[override]  # diffusers' order of arguments
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        original_inference_steps: int | None = None,
        timesteps: Sequence[int] | Tensor | None = None,
        strength: float = 1.0,
    ) -> None:
        """Plan a run for `step`; arguments as in `plan`, and the device of `self.timesteps`."""
        plan = self.plan(
            num_inference_steps,
            timesteps=timesteps,
            original_inference_steps=original_inference_steps,
            strength=strength,
        )
        self.begin_run(plan, device, custom=timesteps is not None)


class LCMScheduler(DistilledScheduler):
    """Multistep consistency sampling (LCM, Alg. 3): predict z_0, add noise, repeat."""

    def update(
        self, output: Tensor, z: Tensor, t: Tensor, t_next: Tensor, draw: Callable[[], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """One step: (z at `t_next`, predicted z_0), from the network's `output` at (z, t).

        Shapes: output, z (B, ...); t, t_next (B,) int64, negative t_next for rows at their last
        step. `draw` makes noise like z; it is called unless all rows are at their last step. Times
        on the CPU save the device a synchronisation.
        """
        noise = draw() if bool((t_next >= 0).any()) else None
        dtype = working_dtype(z)
        z_next, z0 = lcm_step(
            output.to(dtype),
            z.to(dtype),
            at_rows(t, z),
            at_rows(t_next, z),
            None if noise is None else noise.to(dtype),
            self.noise_schedule,
            self.config.timestep_scaling,
            self.bound(),
        )
        return z_next.to(z.dtype), z0.to(z.dtype)

    def step(
        self,
        model_output: Tensor,
        timestep: Tensor | int,
        sample: Tensor,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> LCMSchedulerOutput | tuple[Tensor, Tensor]:
        """The next step of the planned run. Noise is drawn except at the last."""
        draw = drawing(model_output, generator, sample.dtype)
        z_next, z0, _ = self.advance(model_output, timestep, sample, draw)
        return LCMSchedulerOutput(z_next, z0) if return_dict else (z_next, z0)
