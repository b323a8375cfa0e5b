"""The losses, as the papers write them. Networks come in as functions (z, t) -> output.

Shapes: z, noise and outputs (B, C, H, W); t, t_prev, w (B,).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..diffusion import NoiseSchedule, classifier_free_guidance, consistency_function, ddim_step

Network = Callable[[Tensor, Tensor], Tensor]
Distance = Callable[[Tensor, Tensor], Tensor]


def squared(a: Tensor, b: Tensor) -> Tensor:
    """Squared distance, elementwise (LCM, the paper's choice)."""
    return (a - b) ** 2


def pseudo_huber(a: Tensor, b: Tensor, c: float = 1e-3) -> Tensor:
    """sqrt((a - b)² + c²) - c, elementwise: squared near zero, absolute beyond c."""
    return ((a - b) ** 2 + c**2).sqrt() - c


def min_snr_weight(t: Tensor, schedule: NoiseSchedule, gamma: float = 5.0) -> Tensor:
    """Weight (B,) of each time, so that a loss on the output counts as min(SNR, gamma) on z_0.

    Min-SNR (Hang et al. 2023), divided by what the prediction type already implies.
    """
    snr = schedule.snr(t)
    clipped = snr.clamp(max=gamma)
    match schedule.prediction_type:
        case "epsilon":
            return clipped / snr
        case "v_prediction":
            return clipped / (snr + 1)
        case "sample":
            return clipped


def diffusion_loss(
    network: Network,
    z: Tensor,
    noise: Tensor,
    t: Tensor,
    schedule: NoiseSchedule,
    gamma: float = 5.0,
) -> Tensor:
    """E w(t) |network(z_t, t) - target|², the denoising objective.

    The weights are Min-SNR's, or all 1 with `gamma` 0. Min-SNR favours detail: what a text decides
    is decided at high noise, which it hardly counts.
    """
    output = network(schedule.add_noise(z, noise, t), t).float()
    error = squared(output, schedule.target(z, noise, t)).flatten(1).mean(1)
    return (error if gamma == 0 else min_snr_weight(t, schedule, gamma) * error).mean()


def consistency_loss(
    student: Network,
    target: Network,
    step_back: Callable[[Tensor, Tensor, Tensor], Tensor],
    z: Tensor,
    noise: Tensor,
    t: Tensor,
    t_prev: Tensor,
    schedule: NoiseSchedule,
    distance: Distance = pseudo_huber,
) -> Tensor:
    """E d(f(z_t, t), f⁻(ẑ_prev, t_prev)), latent consistency distillation (LCM, sec. 4).

    `step_back(z_t, t, t_prev)` is the ODE solver's estimate of z at `t_prev`; `target` is f⁻, the
    averaged student.
    """
    z_t = schedule.add_noise(z, noise, t)
    online = consistency_function(student(z_t, t).float(), z_t, t, schedule)
    with torch.no_grad():
        z_prev = step_back(z_t, t, t_prev)
        goal = consistency_function(target(z_prev, t_prev).float(), z_prev, t_prev, schedule)
    return distance(online, goal).mean()


def teacher_step(
    teacher: Callable[[Tensor, Tensor, Tensor], Tensor],
    text: Tensor,
    empty: Tensor,
    w: Tensor,
    schedule: NoiseSchedule,
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """One guided DDIM step of the teacher, the Ψ of LCM's Algorithm 1.

    `teacher` is (z, t, text) -> output; text (B, L, D) and empty (B, L, D) are the prompts' and the
    empty prompt's embeddings, run in one call; w is the paper's omega, guidance_scale - 1.
    """

    def step_back(z: Tensor, t: Tensor, t_prev: Tensor) -> Tensor:
        both = teacher(torch.cat([z, z]), torch.cat([t, t]), torch.cat([text, empty]))
        positive, negative = both.float().chunk(2)
        # Guidance may come before the solver: z_0 and eps are affine in the output.
        guided = classifier_free_guidance(positive, negative, w + 1)
        return ddim_step(guided, z, t, t_prev, schedule)

    return step_back


def reconstruction_loss(decoded: Tensor, x: Tensor, kl: Tensor, kl_weight: float) -> Tensor:
    """Mean absolute error of pictures plus `kl_weight` times the KL per latent value."""
    return (decoded - x).abs().mean() + kl_weight * kl.mean()
