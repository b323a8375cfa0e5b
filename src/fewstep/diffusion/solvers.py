"""Steps of the probability-flow ODE. State, where a solver has one, goes in and comes out."""

from __future__ import annotations

from torch import Tensor

from .noise_schedule import NoiseSchedule


def ddim_step(
    output: Tensor, z: Tensor, t: Tensor, t_prev: Tensor, schedule: NoiseSchedule
) -> Tensor:
    """z at `t_prev` by one deterministic DDIM step from (z, t) (Song et al. 2021, eq. 12, eta 0).

    Shapes: output, z (B, ...); t, t_prev (B,). Guidance may be applied to `output` beforehand: the
    step is affine in it.
    """
    z0 = schedule.to_z0(output, z, t)
    return schedule.add_noise(z0, schedule.to_noise(output, z, t), t_prev)
