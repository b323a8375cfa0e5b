"""Latent consistency models (Luo et al. 2023, arXiv:2310.04378): function, step and times."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from ..errors import RequestError
from .noise_schedule import NoiseSchedule, chosen, expand

SIGMA_DATA = 0.5
TIMESTEP_SCALING = 10.0


def boundary_scalings(
    t: Tensor, timestep_scaling: float = TIMESTEP_SCALING
) -> tuple[Tensor, Tensor]:
    """c_skip(t) and c_out(t), (B,) float32: 1 and 0 at t = 0, so that f(z, 0) = z.

    Without the factor sigma_data that consistency models (Song et al. 2023, App. C) have in c_out:
    the published LCMs are trained this way.
    """
    scaled = t.float() * timestep_scaling
    variance = scaled**2 + SIGMA_DATA**2
    return SIGMA_DATA**2 / variance, scaled / variance.sqrt()


def consistency_function(
    output: Tensor,
    z: Tensor,
    t: Tensor,
    schedule: NoiseSchedule,
    timestep_scaling: float = TIMESTEP_SCALING,
    clip: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """f(z, w, c, t) = c_skip(t) z + c_out(t) z_0, from the raw output at (z, t) (LCM, sec. 4.1).

    Shapes: output, z (B, ...); t (B,). `clip`, if given, bounds the predicted z_0.
    """
    z0 = schedule.to_z0(output, z, t)
    if clip is not None:
        z0 = clip(z0)
    c_skip, c_out = boundary_scalings(t, timestep_scaling)
    return expand(c_out, z).to(z.dtype) * z0 + expand(c_skip, z).to(z.dtype) * z


def lcm_step(
    output: Tensor,
    z: Tensor,
    t: Tensor,
    t_next: Tensor,
    noise: Tensor | None,
    schedule: NoiseSchedule,
    timestep_scaling: float = TIMESTEP_SCALING,
    clip: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """One step of multistep consistency sampling (LCM, Alg. 3): (z at `t_next`, predicted z_0).

    Shapes: output, z, noise (B, ...) in the latents' dtype; t, t_next (B,). A row with t_next < 0
    is at its last step and stays at z_0; `noise` may be None when all rows are.
    """
    z0 = consistency_function(output, z, t, schedule, timestep_scaling, clip)
    if noise is None:
        return z0, z0
    renoised = schedule.add_noise(z0, noise, t_next)
    return chosen(t_next < 0, z0, renoised), z0


def lcm_timesteps(
    steps: int,
    original_steps: int = 50,
    train_steps: int = 1000,
    strength: float = 1.0,
) -> Tensor:
    """The `steps` times, descending int64, of a plan over the grid that the LCM was distilled on.

    The grid has `original_steps` times k, 2k, ... (each less one); `strength` keeps its lower part,
    which is how a picture-to-picture LCM starts at a lower noise level in the same number of steps.
    """
    if not 1 <= original_steps <= train_steps:
        raise RequestError(
            f"original_inference_steps must lie in [1, {train_steps}] (the training steps), "
            f"got {original_steps}"
        )
    if not 1 <= steps <= original_steps:
        raise RequestError(
            f"num_inference_steps must lie in [1, {original_steps}] "
            f"(original_inference_steps), got {steps}"
        )
    stride = train_steps // original_steps
    grid = np.arange(1, int(original_steps * strength) + 1) * stride - 1
    if len(grid) < steps:
        raise RequestError(
            f"strength={strength} leaves {len(grid)} of {original_steps} original steps, fewer "
            f"than num_inference_steps={steps}; use strength >= {steps / original_steps:g} "
            "or fewer steps"
        )
    # Float linspace, then floor, as published plans do: integer division differs in 2 % of them.
    index = np.floor(np.linspace(0, len(grid), steps, endpoint=False)).astype(np.int64)
    return torch.from_numpy(grid[::-1][index].astype(np.int64))
