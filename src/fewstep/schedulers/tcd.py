"""TCDScheduler: strategic stochastic sampling, for trajectory consistency models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ..diffusion import at_rows, tcd_step
from ..errors import RequestError
from ..outputs import Output
from ..random import Generators
from .lcm import DistilledScheduler, LCMConfig
from .sampling import drawing, working_dtype
from .times import rows

ETA = 0.3  # the authors' gamma for a few steps


@dataclass(frozen=True)
class TCDConfig(LCMConfig):
    """scheduler_config.json of a TCDScheduler.

    Beside LCM's keys without effect these have none, as in diffusers: `timestep_scaling`,
    `clip_sample`, `thresholding` and their numbers.
    """


@dataclass
class TCDSchedulerOutput(Output):
    """Latents for the next step, and those at the lower time s that noise was added to."""

    prev_sample: Tensor
    pred_noised_sample: Tensor | None = None


class TCDScheduler(DistilledScheduler):
    """Steps down to the time s = (1 - eta) t_next and, by fresh noise, up to t_next.

    `eta` is the paper's gamma: 0 is deterministic, 1 is multistep consistency sampling.
    """

    config_class = TCDConfig
    takes_eta = True

    def grid(self, steps: int, original_inference_steps: int | None) -> int:
        """The number of times in the grid: with `original_inference_steps` all, as in diffusers."""
        if original_inference_steps is None:
            return super().grid(steps, None)
        if not steps <= original_inference_steps <= len(self):
            raise RequestError(
                f"original_inference_steps must lie in [{steps}, {len(self)}], the steps of the "
                f"run and of the training, got {original_inference_steps}"
            )
        return len(self)

    def update(
        self,
        output: Tensor,
        z: Tensor,
        t: Tensor,
        t_next: Tensor,
        draw: Callable[[], Tensor],
        *,
        eta: float = ETA,
    ) -> tuple[Tensor, Tensor]:
        """One step: (z at `t_next`, predicted z_0), from the network's `output` at (z, t).

        Shapes: output, z (B, ...); t, t_next (B,) int64, negative t_next for rows at their last
        step. `draw` makes noise like z; it is called unless `eta`, in [0, 1], is 0 or all rows are
        at their last step.
        """
        if not 0 <= eta <= 1:
            raise RequestError(f"eta must lie in [0, 1], got {eta}")
        noise = draw() if eta > 0 and bool((t_next >= 0).any()) else None
        z_next, _ = self.down_and_up(output, z, t, t_next, noise, eta)
        dtype = working_dtype(z)
        z0 = self.noise_schedule.to_z0(output.to(dtype), z.to(dtype), at_rows(t, z))
        return z_next, z0.to(z.dtype)

    def down_and_up(
        self, output: Tensor, z: Tensor, t: Tensor, t_next: Tensor, noise: Tensor | None, eta: float
    ) -> tuple[Tensor, Tensor]:
        """(z at `t_next`, z at the time s below it); without noise both are the latter."""
        dtype = working_dtype(z)
        z_next, z_s = tcd_step(
            output.to(dtype),
            z.to(dtype),
            at_rows(t, z),
            at_rows(t_next, z),
            None if noise is None else noise.to(dtype),
            self.noise_schedule,
            eta,
        )
        return z_next.to(z.dtype), z_s.to(z.dtype)

    def step(
        self,
        model_output: Tensor,
        timestep: Tensor | int,
        sample: Tensor,
        eta: float = ETA,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> TCDSchedulerOutput | tuple[Tensor, Tensor]:
        """The next step of the planned run. Noise is drawn if `eta` > 0, except at the last."""
        draw = drawing(model_output, generator, sample.dtype)
        z_next, _, t_next = self.advance(model_output, timestep, sample, draw, eta=eta)
        _, z_s = self.down_and_up(model_output, sample, rows(timestep, sample), t_next, None, eta)
        return TCDSchedulerOutput(z_next, z_s) if return_dict else (z_next, z_s)
