"""The losses, as the papers write them. Networks come in as functions (z, t) -> raw output.

One consistency loss; its arguments make the methods:

    method                       step_back                  target     endpoint
    LCD (arXiv:2310.04378)       ode_step(guided(...))      average    None
    LCM-LoRA (arXiv:2311.05556)  ode_step(guided(...))      student    None
    LCF (LCM, Algorithm 4)       data_step(...)             average    None
    PCM (arXiv:2405.18407)       ode_step(..., ...)         student    phase_edges(...)
    TCD, CTM                     ode_step(guided(...))      average    sampled_endpoints(...)

Shapes: z, noise and outputs (B, C, H, W); t, t_prev, w, endpoint (B,).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..diffusion import (
    SOLVERS,
    Network,
    NoiseSchedule,
    classifier_free_guidance,
    consistency_function,
    trajectory_function,
)
from ..errors import RequestError, UnsupportedConfig

Distance = Callable[[Tensor, Tensor], Tensor]
StepBack = Callable[[Tensor, Tensor, Tensor], Tensor]  # (z_t, t, t_prev) -> z at t_prev
# (z, t) -> the raw outputs for the prompts and for the negative prompts, made in one network call;
# or for the prompts and None, where no guidance is wanted.
Teacher = Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None]]


def precise(output: Tensor) -> Tensor:
    """`output`, which a network may give in half precision, in float32 or better."""
    return output.to(torch.promote_types(output.dtype, torch.float32))


def squared(a: Tensor, b: Tensor) -> Tensor:
    """Squared distance, elementwise (LCM, the paper's choice)."""
    return (a - b) ** 2


def pseudo_huber(a: Tensor, b: Tensor, c: float = 1e-3) -> Tensor:
    """sqrt((a - b)² + c²) - c, elementwise: squared near zero, absolute beyond c."""
    return ((a - b) ** 2 + c**2).sqrt() - c


def cauchy(a: Tensor, b: Tensor, c: float = 1e-3) -> Tensor:
    """log(1 + (a - b)² / 2c²), elementwise: squared near zero, logarithmic beyond c.

    Against the outliers of latents (arXiv:2502.01441): far beyond c an error's pull fades as its
    inverse. Scaled as in Barron (2019); its curvature at zero is 1 / c².
    """
    return torch.log1p(((a - b) / c) ** 2 / 2)


# By the names that recipes use; all but the first take a scale, `c`.
DISTANCES: dict[str, Callable[..., Tensor]] = {
    "squared": squared,
    "pseudo_huber": pseudo_huber,
    "cauchy": cauchy,
}


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
    output = precise(network(schedule.add_noise(z, noise, t), t))
    error = squared(output, schedule.target(z, noise, t)).flatten(1).mean(1)
    return (error if gamma == 0 else min_snr_weight(t, schedule, gamma) * error).mean()


def consistency_loss(
    student: Network,
    target: Network,
    step_back: StepBack,
    z: Tensor,
    noise: Tensor,
    t: Tensor,
    t_prev: Tensor,
    schedule: NoiseSchedule,
    *,
    distance: Distance = pseudo_huber,
    endpoint: Tensor | None = None,
) -> Tensor:
    """E d(f(z_t, t), f⁻(ẑ_prev, t_prev)), a scalar with the student's gradient.

    `step_back` estimates z at `t_prev` from (z_t, t); `target` is f⁻: the averaged student, or the
    student itself, which gets no gradient here. Without `endpoint`, f leads to z_0 with LCM's
    boundary scalings; with it, to z at the times `endpoint` <= t_prev (see `trajectory_function`).
    """
    check_endpoint(endpoint, t_prev)

    def f(network: Network, z: Tensor, t: Tensor) -> Tensor:
        output = precise(network(z, t))
        if endpoint is None:
            return consistency_function(output, z, t, schedule)
        return trajectory_function(output, z, t, endpoint, schedule)

    z_t = schedule.add_noise(z, noise, t)
    online = f(student, z_t, t)
    with torch.no_grad():
        goal = f(target, step_back(z_t, t, t_prev), t_prev)
    return distance(online, goal).mean()


def check_endpoint(endpoint: Tensor | None, t_prev: Tensor) -> None:
    """Raises RequestError unless `endpoint` is a whole time per row of `t_prev`."""
    if endpoint is None:
        return
    if endpoint.is_floating_point() or endpoint.shape != t_prev.shape:
        raise RequestError(
            f"endpoint must be whole times of shape {tuple(t_prev.shape)}, as t_prev, got "
            f"{endpoint.dtype} of shape {tuple(endpoint.shape)}; see training/endpoints.py"
        )


def guided(teacher: Teacher, w: Tensor | None) -> Network:
    """(1 + w) positive - w negative, the teacher's raw output under guidance (LCM, sec. 4.2).

    `w` (B,) is the paper's omega, guidance_scale - 1; with None the teacher must give no negative
    output, and the positive one is taken. Guidance may come before all else, for every prediction
    type: z_0, noise and the solvers' steps are affine in the output.
    """

    def network(z: Tensor, t: Tensor) -> Tensor:
        positive, negative = teacher(z, t)
        if w is None and negative is None:
            return precise(positive)
        if w is None or negative is None:
            given = "w=None but a negative output" if w is None else "w but no negative output"
            raise RequestError(f"guided() got {given}; give both, or neither for no guidance")
        return classifier_free_guidance(precise(positive), precise(negative), w + 1)

    return network


def ode_step(network: Network, schedule: NoiseSchedule, solver: str = "ddim") -> StepBack:
    """One step of the probability-flow ODE that `network` defines, the Ψ of LCM's Algorithm 1.

    `solver` names one of SOLVERS. Those of second order call the network twice, once at a time
    between integers.
    """
    if solver not in SOLVERS:
        raise RequestError(f"solver={solver!r} is not known; use one of {', '.join(SOLVERS)}")
    # With "epsilon" there is signal at all times, and reading the table may wait for the device.
    may_lack_signal = solver != "ddim" and schedule.prediction_type != "epsilon"
    if may_lack_signal and schedule.alphas_cumprod[-1] == 0:
        raise UnsupportedConfig(
            f"solver={solver!r} cannot start at zero SNR, where log(alpha / sigma) is infinite; "
            "use solver='ddim' or set rescale_betas_zero_snr=False"
        )

    def step_back(z: Tensor, t: Tensor, t_prev: Tensor) -> Tensor:
        return SOLVERS[solver](network, z, t, t_prev, schedule)

    return step_back


def data_step(z: Tensor, noise: Tensor, schedule: NoiseSchedule) -> StepBack:
    """The data with the same noise at t_prev, which needs no teacher (LCM, Algorithm 4).

    Its mean, given z_t, is the unguided DDIM step: long fine-tuning unlearns guidance.
    """
    return lambda z_t, t, t_prev: schedule.add_noise(z, noise, t_prev)


def reconstruction_loss(decoded: Tensor, x: Tensor, kl: Tensor, kl_weight: float) -> Tensor:
    """Mean absolute error of pictures plus `kl_weight` times the KL per latent value."""
    return (decoded - x).abs().mean() + kl_weight * kl.mean()
