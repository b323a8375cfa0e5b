"""DPMSolverMultistepScheduler: DPM-Solver++ of order 1 to 3, its stochastic sister, DPM-Solver."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ..checkpoints.config import Config
from ..diffusion import at_rows, dpm_solver_step
from ..errors import RequestError, UnsupportedConfig
from ..random import Generators
from .base import Plan
from .euler import SigmaScheduler
from .sampling import NoiseConfig, SchedulerOutput, drawing, dynamic_threshold, working_dtype
from .times import followers, karras_times, spaced

FEW = 15  # below so many steps the last ones are of lower order, for stability
# What configs of other classes say -> what is meant by it here.
FOREIGN: Mapping[str, Mapping[str, str]] = {
    "algorithm_type": {"deis": "dpmsolver++"},
    "solver_type": {"logrho": "midpoint", "bh1": "midpoint", "bh2": "midpoint"},
}


@dataclass(frozen=True)
class DPMSolverConfig(NoiseConfig):
    """scheduler_config.json of a DPMSolverMultistepScheduler."""

    solver_order: int = 2
    thresholding: bool = False  # bound the predicted z_0 by a quantile of itself
    dynamic_thresholding_ratio: float = 0.995
    sample_max_value: float = 1.0
    algorithm_type: str = "dpmsolver++"  # or "sde-dpmsolver++", or "dpmsolver" in the noise
    solver_type: str = "midpoint"  # or "heun", of the second order
    lower_order_final: bool = True
    euler_at_final: bool = False
    use_karras_sigmas: bool = False
    final_sigmas_type: str = "zero"  # or "sigma_min": the last step ends at the first noise level
    lambda_min_clipped: float = -float("inf")  # no time has a lower log(alpha / sigma)
    timestep_spacing: str = "linspace"
    rescale_betas_zero_snr: bool = False

    INERT: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "use_exponential_sigmas": (False, None),
        "use_beta_sigmas": (False, None),
        "use_lu_lambdas": (False, None),
        "use_flow_sigmas": (False, None),
        "flow_shift": (1.0,),
        # DDPM's fixed variances are no network's output, so they mean nothing here.
        "variance_type": (
            None,
            "fixed_small",
            "fixed_small_log",
            "fixed_large",
            "fixed_large_log",
        ),
        "use_dynamic_shifting": (False,),
        "time_shift_type": ("exponential",),
    }


class DPMSolverMultistepScheduler(SigmaScheduler):
    """DPM-Solver++ (Lu et al. 2022): from the last predictions of z_0 to the next time."""

    config_class = DPMSolverConfig

    @classmethod
    def own_config(cls, stored: Mapping[str, Any], overrides: Mapping[str, Any]) -> Config:
        """The config of this class from a stored one. Raises TypeError for unknown overrides."""
        said = {key: names.get(stored.get(key, "")) for key, names in FOREIGN.items()}
        meant = {key: value for key, value in said.items() if value is not None}
        return super().own_config({**stored, **meant}, overrides)

    def configure(self, config: Config) -> None:
        """Set up from a config. Raises UnsupportedConfig for values that are not implemented."""
        super().configure(config)
        self.require("final_sigmas_type", ("zero", "sigma_min"))
        self.require("algorithm_type", ("dpmsolver++", "sde-dpmsolver++", "dpmsolver"))
        self.require("solver_type", ("midpoint", "heun"))
        self.require("solver_order", (1, 2, 3))
        if self.is_stochastic and self.config.solver_order == 3:
            raise UnsupportedConfig(
                "solver_order=3 is not implemented with algorithm_type='sde-dpmsolver++'; "
                "use solver_order=2"
            )
        if self.is_of_noise and self.config.final_sigmas_type == "zero":
            raise UnsupportedConfig(
                "final_sigmas_type='zero' cannot be reached with algorithm_type='dpmsolver'; "
                "use 'sigma_min'"
            )

    @property
    def is_stochastic(self) -> bool:
        """Whether every step adds fresh noise."""
        return self.config.algorithm_type == "sde-dpmsolver++"

    @property
    def is_of_noise(self) -> bool:
        """Whether steps go by predictions of the noise, not of z_0."""
        return self.config.algorithm_type == "dpmsolver"

    def followed(self, z0: Tensor, z: Tensor, t: Tensor) -> Tensor:
        """What steps go by, of the prediction `z0` at (z, t): itself, or the noise it implies."""
        if not self.is_of_noise:
            return z0
        alpha, sigma = self.noise_schedule.alpha_sigma(at_rows(t, z), z0)
        return (z.to(z0.dtype) - alpha * z0) / sigma

    def plan(
        self,
        num_inference_steps: int | None = None,
        *,
        timesteps: Sequence[int] | Tensor | None = None,
    ) -> Plan:
        """The times of a run, int64, by their number or given one by one (descending), on the CPU.

        Karras' sigmas lie between whole times, but the network is told these, as in diffusers.
        """
        self.refuse_custom(timesteps)
        steps = self.steps_or_times(num_inference_steps, timesteps)
        if not isinstance(steps, int):
            return Plan(steps, followers(steps))
        if self.is_karras:
            return self.karras_plan(steps)
        times = self.within(torch.from_numpy(self.spread(steps).astype(np.int64)), steps)
        if (times.diff() >= 0).any():
            raise RequestError(
                f"num_inference_steps={steps} is too many for {self.config.timestep_spacing!r} "
                f"spacing of {len(self)} times; use fewer steps"
            )
        return Plan(times, followers(times))

    def karras_plan(self, steps: int) -> Plan:
        """The plan whose sigmas are spread from the training's first to its last."""
        table = self.noise_schedule.ratio(torch.arange(len(self)).float())
        times = karras_times(steps, table, float(table[0]), float(table[-1]))
        exact = torch.from_numpy(times).float()
        return Plan(exact.round().long(), followers(exact), exact)

    def spread(self, steps: int) -> np.ndarray:
        """`steps` whole times, descending, below the noise that `lambda_min_clipped` cuts off."""
        config = self.config
        log_snr = -self.noise_schedule.ratio(torch.arange(len(self)).float()).log()
        top = int((log_snr >= config.lambda_min_clipped).sum())
        if config.timestep_spacing == "trailing":
            stride = len(self) / steps
            times = np.round(np.arange(top, 0, -stride))[:steps] - 1
            return times[times >= 0]
        return spaced(steps + 1, top, config.timestep_spacing, config.steps_offset).round()[:-1]

    def updater(self, plan: Plan) -> DPMSolverRun:
        """The steps of one run, which remember the run's last predictions."""
        return DPMSolverRun(self, plan)

    def update(
        self, output: Tensor, z: Tensor, t: Tensor, t_next: Tensor, draw: Callable[[], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """One step of the first order, which needs no memory: (z at `t_next`, predicted z_0).

        Shapes: output, z (B, ...); t, t_next (B,), negative t_next for rows at their last step.
        `draw` makes noise like z; it is called by "sde-dpmsolver++" unless all rows are at their
        last step.
        """
        z0 = self.prediction(output, z, t)
        followed = self.followed(z0, z, t)
        return self.multistep(z, [(t, followed)], t_next, draw), z0.to(z.dtype)

    def prediction(self, output: Tensor, z: Tensor, t: Tensor) -> Tensor:
        """z_0 (B, ...) in the dtype that steps are computed in."""
        dtype = working_dtype(z)
        z0 = self.noise_schedule.to_z0(output.to(dtype), z.to(dtype), at_rows(t, z))
        config = self.config
        if not config.thresholding:
            return z0
        return dynamic_threshold(z0, config.dynamic_thresholding_ratio, config.sample_max_value)

    def multistep(
        self,
        z: Tensor,
        predictions: Sequence[tuple[Tensor, Tensor]],
        t_next: Tensor,
        draw: Callable[[], Tensor],
    ) -> Tensor:
        """z at `t_next` by the last predictions (time, what is followed), the newest first."""
        dtype = working_dtype(z)
        is_noisy = self.is_stochastic and bool((t_next.clamp(min=self.end) >= 0).any())
        z_next = dpm_solver_step(
            z.to(dtype),
            [(at_rows(t, z), z0) for t, z0 in predictions],
            at_rows(t_next, z).clamp(min=self.end),
            self.noise_schedule,
            noise=draw().to(dtype) if is_noisy else None,
            heun=self.config.solver_type == "heun",
            of_noise=self.is_of_noise,
        )
        return z_next.to(z.dtype)

    def step(
        self,
        model_output: Tensor,
        timestep: Tensor | int,
        sample: Tensor,
        generator: Generators = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor]:
        """The next step of the planned run.

        "sde-dpmsolver++" draws noise unless it ends at z_0, or takes it from `variance_noise`.
        """
        given = variance_noise
        draw = drawing(model_output, generator, working_dtype(sample))
        z_next, _, _ = self.advance(
            model_output, timestep, sample, draw if given is None else lambda: given
        )
        return SchedulerOutput(z_next) if return_dict else (z_next,)


@dataclass(eq=False)
class DPMSolverRun:
    """The steps of one run, taken one after the other; what they remember is `last`."""

    scheduler: DPMSolverMultistepScheduler
    plan: Plan
    last: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # as `multistep` takes them
    index: int = 0  # of the next step in the plan

    def __call__(
        self, output: Tensor, z: Tensor, t: Tensor, t_next: Tensor, draw: Callable[[], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """(z at `t_next`, predicted z_0), from the network's `output` at (z, t)."""
        if self.plan.exact is not None:
            t = self.plan.exact[self.index].expand(len(z))
        z0 = self.scheduler.prediction(output, z, t)
        self.last = [(t, self.scheduler.followed(z0, z, t)), *self.last][: self.order()]
        z_next = self.scheduler.multistep(z, self.last, t_next, draw)
        self.index += 1
        return z_next, z0.to(z.dtype)

    def order(self) -> int:
        """The most that the next step's order may be."""
        config = self.scheduler.config
        total = len(self.plan.timesteps) if self.plan.total is None else self.plan.total
        left = total - self.plan.begin - self.index  # steps, this one included
        few = config.lower_order_final and total < FEW
        if left == 1 and (few or config.euler_at_final or self.scheduler.end < 0):
            return 1
        return min(2, config.solver_order) if left == 2 and few else config.solver_order
