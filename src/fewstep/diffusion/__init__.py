"""The mathematics: pure functions of tensors. Nothing here knows a network, a file or a task.

A timestep is an int64 tensor of shape (B,): rows of one batch may stand at different steps.
"""

from .consistency import boundary_scalings, consistency_function, lcm_step, lcm_timesteps
from .guidance import classifier_free_guidance, guidance_embedding, rescale_guidance
from .noise_schedule import NoiseSchedule, at_rows, betas_for, expand, rescale_to_zero_snr
from .solvers import (
    SOLVERS,
    Network,
    adams_bashforth,
    bounded_ddim_step,
    ddim_step,
    dpm_solver_step,
    tcd_step,
    trajectory_function,
)

__all__ = [
    "SOLVERS",
    "Network",
    "NoiseSchedule",
    "adams_bashforth",
    "at_rows",
    "betas_for",
    "boundary_scalings",
    "bounded_ddim_step",
    "classifier_free_guidance",
    "consistency_function",
    "ddim_step",
    "dpm_solver_step",
    "expand",
    "guidance_embedding",
    "lcm_step",
    "lcm_timesteps",
    "rescale_guidance",
    "rescale_to_zero_snr",
    "tcd_step",
    "trajectory_function",
]
