"""Samplers under diffusers' names: what a config says, applied by the functions of `diffusion`.

Sampling needs `plan` (the times of a run) and `update` (one step), which keep no state and take a
time per row; multistep solvers remember a run's last steps in its `updater`. `set_timesteps`,
`step` and their like are diffusers' stateful way to the same.

Configs of schedulers that are not implemented load too, since pipelines come with them: they can
be read, saved and handed to `LCMScheduler.from_config`, but not sampled with.
"""

from .base import SCHEDULER_CONFIG_NAME, Plan, Scheduler
from .catalog import (
    SCHEDULERS,
    ConfigOnlyScheduler,
    DDIMInverseScheduler,
    DEISMultistepScheduler,
    DPMSolverSDEScheduler,
    DPMSolverSinglestepScheduler,
    EDMEulerScheduler,
    HeunDiscreteScheduler,
    KDPM2AncestralDiscreteScheduler,
    KDPM2DiscreteScheduler,
    LMSDiscreteScheduler,
    UniPCMultistepScheduler,
    scheduler_from_config,
)
from .ddim import DDIMScheduler, DDIMSchedulerOutput
from .ddpm import DDPMScheduler
from .dpm_solver import DPMSolverMultistepScheduler
from .euler import EulerAncestralDiscreteScheduler, EulerDiscreteScheduler
from .lcm import LCMScheduler, LCMSchedulerOutput
from .pndm import PNDMScheduler
from .sampling import SamplingScheduler, SchedulerOutput
from .tcd import TCDScheduler, TCDSchedulerOutput
from .times import spaced_timesteps

__all__ = [
    "SCHEDULERS",
    "SCHEDULER_CONFIG_NAME",
    "ConfigOnlyScheduler",
    "DDIMInverseScheduler",
    "DDIMScheduler",
    "DDIMSchedulerOutput",
    "DDPMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSDEScheduler",
    "DPMSolverSinglestepScheduler",
    "EDMEulerScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LCMScheduler",
    "LCMSchedulerOutput",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "Plan",
    "SamplingScheduler",
    "Scheduler",
    "SchedulerOutput",
    "TCDScheduler",
    "TCDSchedulerOutput",
    "UniPCMultistepScheduler",
    "scheduler_from_config",
    "spaced_timesteps",
]
