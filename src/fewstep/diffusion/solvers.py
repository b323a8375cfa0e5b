"""Steps of the probability-flow ODE and of its SDEs. State, where a solver has one, goes in.

Shapes: output, z, noise (B, ...); times (B,), each row its own; a negative time is that of z_0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .noise_schedule import NoiseSchedule, chosen, expand

Network = Callable[[Tensor, Tensor], Tensor]  # (z, t) -> raw output; t may lie between integers

# Weights of the last outputs, the newest first, by their number (Adams and Bashforth).
ADAMS_BASHFORTH = (
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)


def ddim_step(
    output: Tensor, z: Tensor, t: Tensor, t_prev: Tensor, schedule: NoiseSchedule
) -> Tensor:
    """z at `t_prev` by one deterministic DDIM step from (z, t) (Song et al. 2021, eq. 12, eta 0).

    Shapes: output, z (B, ...); t, t_prev (B,). Guidance may be applied to `output` beforehand: the
    step is affine in it. In units of z / alpha_t this is a step of Euler's method.
    """
    z0 = schedule.to_z0(output, z, t)
    return schedule.add_noise(z0, schedule.to_noise(output, z, t), t_prev)


def trajectory_function(
    output: Tensor, z: Tensor, t: Tensor, endpoint: Tensor, schedule: NoiseSchedule
) -> Tensor:
    """f(z, t -> e): the prediction of z at time e = `endpoint` (B,) on the trajectory through z.

    It is a DDIM step to e, as phased consistency models have it (Wang et al. 2024,
    arXiv:2405.18407). A row with t = e is z itself, bit for bit: the boundary condition.
    """
    return torch.where(expand(t == endpoint, z), z, ddim_step(output, z, t, endpoint, schedule))


def ddim_solver(
    network: Network, z: Tensor, t: Tensor, t_prev: Tensor, schedule: NoiseSchedule
) -> Tensor:
    """z at `t_prev` by DDIM: order 1, one call of the network."""
    return ddim_step(network(z, t), z, t, t_prev, schedule)


def dpm_solver_2(
    network: Network, z: Tensor, t: Tensor, t_prev: Tensor, schedule: NoiseSchedule
) -> Tensor:
    """z at `t_prev` by DPM-Solver-2 (Lu et al. 2022, arXiv:2206.00927, Alg. 1, r_1 = 1/2).

    Order 2, two calls: the noise predicted half-way leads from z straight to `t_prev`.
    """
    output, z_mid, t_mid = _half_way(network, z, t, t_prev, schedule)
    noise = schedule.to_noise(output, z_mid, t_mid)
    alpha, sigma = schedule.alpha_sigma(t, z)
    return schedule.add_noise((z - sigma * noise) / alpha, noise, t_prev)


def dpm_solver_pp_2s(
    network: Network, z: Tensor, t: Tensor, t_prev: Tensor, schedule: NoiseSchedule
) -> Tensor:
    """z at `t_prev` by DPM-Solver++(2S) (Lu et al. 2022, arXiv:2211.01095, Alg. 1, r = 1/2).

    Order 2, two calls: the z_0 predicted half-way leads from z straight to `t_prev`.
    """
    output, z_mid, t_mid = _half_way(network, z, t, t_prev, schedule)
    z0 = schedule.to_z0(output, z_mid, t_mid)
    alpha, sigma = schedule.alpha_sigma(t, z)
    return schedule.add_noise(z0, (z - alpha * z0) / sigma, t_prev)


def _half_way(
    network: Network, z: Tensor, t: Tensor, t_prev: Tensor, schedule: NoiseSchedule
) -> tuple[Tensor, Tensor, Tensor]:
    """The network's output half-way between the times, the z (B, ...) and the time (B,) there."""
    t_mid = middle_time(t, t_prev, schedule)
    z_mid = ddim_step(network(z, t), z, t, t_mid, schedule)
    return network(z_mid, t_mid), z_mid, t_mid


def middle_time(t: Tensor, t_prev: Tensor, schedule: NoiseSchedule) -> Tensor:
    """The time (B,), floating, whose log(alpha / sigma) lies half-way between `t` and `t_prev`.

    It inverts the schedule's own interpolation, so that alpha and sigma there are exact.
    """
    table = schedule.ratio(torch.arange(len(schedule), device=t.device))
    middle = (schedule.ratio(t) * schedule.ratio(t_prev)).sqrt()
    low = (torch.searchsorted(table, middle, right=True) - 1).clamp(0, len(schedule) - 2)
    below, above = table[low], table[low + 1]
    if schedule.log_interpolation:
        below, above, middle = below.log(), above.log(), middle.log()
    return low + (middle - below) / (above - below)


# By the names that recipes use: z at t_prev from (network, z, t, t_prev, schedule).
SOLVERS = {
    "ddim": ddim_solver,
    "dpm_solver_2": dpm_solver_2,
    "dpm_solver_pp_2s": dpm_solver_pp_2s,
}


def bounded_ddim_step(
    output: Tensor,
    z: Tensor,
    t: Tensor,
    t_next: Tensor,
    schedule: NoiseSchedule,
    *,
    noise: Tensor | None = None,
    eta: float = 0.0,
    bound: Callable[[Tensor], Tensor] | None = None,
    rederive_noise: bool = False,
) -> tuple[Tensor, Tensor]:
    """(z at `t_next`, predicted z_0) by one DDIM step (Song et al. 2021, eq. 12 and 16).

    Shapes: output, z, noise (B, ...); t, t_next (B,). `bound`, if given, bounds z_0, and with
    `rederive_noise` the predicted noise is what leads from the bounded z_0 to z. At eta 1 it is
    the ancestral step of DDPM (Ho et al. 2020, eq. 7).
    """
    z0 = schedule.to_z0(output, z, t)
    if bound is None and noise is None:
        return ddim_step(output, z, t, t_next, schedule), z0
    alpha, sigma = schedule.alpha_sigma(t, z)
    alpha_next, sigma_next = schedule.alpha_sigma(t_next, z)
    predicted = schedule.to_noise(output, z, t)
    if bound is not None:
        z0 = bound(z0)
    if rederive_noise:
        predicted = (z - alpha * z0) / sigma
    if noise is None:
        return alpha_next * z0 + sigma_next * predicted, z0
    # Eq. 16, rearranged so that nothing cancels: of the noise at t_next the share `kept` squared
    # stays the predicted one at eta 1, and the rest is fresh.
    kept = (alpha / alpha_next) * (sigma_next / sigma)
    old = sigma_next * (1 - eta**2 + (eta * kept) ** 2).sqrt()
    fresh = sigma_next * eta * (1 - kept**2).clamp(min=0).sqrt()
    return alpha_next * z0 + old * predicted + fresh * noise, z0


def tcd_step(
    output: Tensor,
    z: Tensor,
    t: Tensor,
    t_next: Tensor,
    noise: Tensor | None,
    schedule: NoiseSchedule,
    gamma: float = 0.3,
) -> tuple[Tensor, Tensor]:
    """(z at `t_next`, z at the time s below it) by strategic stochastic sampling.

    The trajectory consistency function leads down to s = (1 - gamma) t_next, and fresh noise back
    up to t_next (Zheng et al. 2024, arXiv:2402.19159). A row with t_next < 0 is at its last step
    and ends at the first noise level, where the network was trained to end.
    """
    s = ((1 - gamma) * t_next.clamp(min=0)).floor().long()
    z_s = ddim_step(output, z, t, s, schedule)
    if noise is None:
        return z_s, z_s
    alpha_s, _ = schedule.alpha_sigma(s, z)
    alpha_next, _ = schedule.alpha_sigma(t_next.clamp(min=0), z)
    kept = alpha_next / alpha_s
    up = kept * z_s + (1 - kept**2).clamp(min=0).sqrt() * noise
    return chosen(t_next < 0, z_s, up), z_s


def dpm_solver_step(
    z: Tensor,
    predictions: Sequence[tuple[Tensor, Tensor]],
    t_next: Tensor,
    schedule: NoiseSchedule,
    *,
    noise: Tensor | None = None,
    heun: bool = False,
    of_noise: bool = False,
) -> Tensor:
    """z at `t_next` by one multistep step of DPM-Solver++ (Lu et al. 2022, arXiv:2211.01095).

    `predictions` are one to three pairs (time, z_0 predicted there), the newest first and at the
    time of z: their number is the order. One is DDIM, two is 2M (Alg. 2), three is the authors'
    3M, whose last term is half of Taylor's: errors are smaller than 2M's, but fall no faster. More
    than one need a `t_next` >= 0. With `noise` it is SDE-DPM-Solver++, for up to two. `heun` takes
    the second-order term exactly, where 2M has the midpoint's.

    `of_noise` makes it DPM-Solver (Lu et al. 2022, arXiv:2206.00927): the predictions are of the
    noise, and the step is the same with alpha and sigma, and the direction of log(alpha / sigma),
    exchanged. Needs a `t_next` >= 0 and takes no `noise`.
    """
    alpha, sigma = schedule.alpha_sigma(t_next, z)
    alpha_now, sigma_now = schedule.alpha_sigma(predictions[0][0], z)
    log_snr = [half_log_snr(t, z, schedule) for t, _ in predictions]
    h = half_log_snr(t_next, z, schedule) - log_snr[0]
    if of_noise:
        alpha, sigma, sigma_now = sigma, alpha, alpha_now
        h, log_snr = -h, [-value for value in log_snr]
    # The integral of the exponential weight over the step; noise doubles its rate.
    k = h if noise is None else 2 * h
    weight = -torch.expm1(-k)
    decay = sigma / sigma_now if noise is None else sigma / sigma_now * torch.exp(-h)
    step = decay * z + alpha * weight * predictions[0][1]
    if noise is not None:
        step = step + sigma * weight.sqrt() * noise
    if len(predictions) == 1:
        return step
    slope, bend = derivatives(h, log_snr, [z0 for _, z0 in predictions])
    k = torch.where(k == 0, torch.ones_like(k), k)  # a step of no length: the weights are 0
    moment = torch.where(h == 0, 0.0, 1 - weight / k)
    step = step + alpha * (moment if heun or bend is not None else weight / 2) * slope
    if bend is None:
        return step
    return step + alpha * torch.where(h == 0, 0.0, 0.5 - (k - weight) / k**2) * bend


def derivatives(
    h: Tensor, log_snr: Sequence[Tensor], z0s: Sequence[Tensor]
) -> tuple[Tensor, Tensor | None]:
    """First and, from three values on, second derivative of z_0 times powers of the step `h`.

    By divided differences over half the logarithm of the signal-to-noise ratio, newest first.
    """
    before = log_snr[0] - log_snr[1]
    first = h / before * (z0s[0] - z0s[1])
    if len(z0s) == 2:
        return first, None
    earlier = log_snr[1] - log_snr[2]
    change = first - h / earlier * (z0s[1] - z0s[2])
    both = before + earlier
    return first + before / both * change, h / both * change


def half_log_snr(t: Tensor, like: Tensor, schedule: NoiseSchedule) -> Tensor:
    """log(alpha_t / sigma_t) of `t` (B,), shaped to multiply `like`; infinite at sigma 0."""
    alpha, sigma = schedule.alpha_sigma(t, like)
    return alpha.log() - sigma.log()


def adams_bashforth(outputs: Sequence[Tensor]) -> Tensor:
    """The mean of the last one to four outputs, newest first, that a linear multistep step takes.

    Pseudo linear multistep (Liu et al. 2022, PNDM, eq. 12) transfers by it as DDIM by one output.
    """
    weights = ADAMS_BASHFORTH[len(outputs) - 1]
    first, *others = (w * output for w, output in zip(weights, outputs, strict=True))
    return sum(others, start=first)
