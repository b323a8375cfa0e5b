"""Distillation where everything is known: data N(m, s²), whose ODE has a solution in closed form.

With a teacher that knows the mean 0.7 for its text and 0.2 without, guidance by w is exactly the
ODE of data with the mean 0.7 + 0.5 w: guided trajectories have a closed form too.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fewstep.diffusion import (
    SOLVERS,
    Network,
    NoiseSchedule,
    betas_for,
    boundary_scalings,
    ddim_step,
    expand,
)
from fewstep.diffusion.solvers import half_log_snr, middle_time
from fewstep.training.endpoints import draw_times, phase_edges, sampled_endpoints, stride_of
from fewstep.training.objectives import consistency_loss, data_step, guided, ode_step, squared

MEAN, OTHER, STD = 0.7, 0.2, 0.3
EXACT = NoiseSchedule(torch.cumprod(1 - betas_for().double(), 0))
KINDS = ("epsilon", "v_prediction", "sample")
W = 2.0


def of_kind(kind: str) -> NoiseSchedule:
    return NoiseSchedule(EXACT.alphas_cumprod, kind)  # type: ignore[arg-type]


def normal(rows: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def guided_mean(w: float) -> float:
    return MEAN + w * (MEAN - OTHER)


def spread(t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """alpha_t, and the deviation of z_t."""
    alpha, sigma = EXACT.alpha_sigma(t, like)
    return alpha, (alpha**2 * STD**2 + sigma**2).sqrt()


def solution(z: Tensor, t: Tensor, s: Tensor, mean: float = MEAN) -> Tensor:
    """z at time s of the trajectory through (z, t): as many deviations from the middle."""
    (alpha, deviation), (alpha_s, deviation_s) = spread(t, z), spread(s, z)
    return alpha_s * mean + deviation_s / deviation * (z - alpha * mean)


def as_output(z0: Tensor, z: Tensor, t: Tensor, schedule: NoiseSchedule) -> Tensor:
    """The raw output of the schedule's prediction type that stands for `z0` at (z, t)."""
    alpha, sigma = schedule.alpha_sigma(t, z)
    return schedule.target(z0, (z - alpha * z0) / sigma, t)


def denoiser(mean: float = MEAN, schedule: NoiseSchedule = EXACT) -> Network:
    """The perfect network, whose z_0 is E[z_0 | z_t]."""

    def network(z: Tensor, t: Tensor) -> Tensor:
        alpha, deviation = spread(t, z)
        z0 = mean + alpha * STD**2 / deviation**2 * (z - alpha * mean)
        return as_output(z0, z, t, schedule)

    return network


def guided_teacher(w: float, schedule: NoiseSchedule = EXACT) -> Network:
    positive, negative = denoiser(MEAN, schedule), denoiser(OTHER, schedule)
    return guided(lambda z, t: (positive(z, t), negative(z, t)), torch.tensor([w]).double())


def integrate(solver: str, network: Network, z: Tensor, times: Tensor, schedule=EXACT) -> Tensor:
    step = ode_step(network, schedule, solver)
    for t, t_prev in zip(times[:-1, None], times[1:, None], strict=True):
        z = step(z, t, t_prev)
    return z


# ── solvers ──


@pytest.mark.parametrize(("solver", "order"), [(n, 1 if n == "ddim" else 2) for n in SOLVERS])
def test_solvers_have_their_order(solver: str, order: int) -> None:
    start, end = torch.tensor([900]), torch.tensor([100])
    middle, deviation = spread(start, normal(1))
    z = middle * MEAN + 1.3 * deviation
    errors = []
    for steps in (20, 40, 80):
        times = torch.linspace(900, 100, steps + 1).round().long()
        error = integrate(solver, denoiser(), z, times) - solution(z, start, end)
        errors.append(float(error.abs()))
    observed = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    assert observed == pytest.approx([order] * 2, abs=0.15), errors
    assert errors[-1] < {1: 1e-2, 2: 1e-3}[order]


def test_at_equal_calls_of_the_teacher_second_order_is_nearer() -> None:
    z, start, end = normal(64), torch.tensor([999]), torch.tensor([19])
    errors = {}
    for solver in SOLVERS:
        steps = 98 if solver == "ddim" else 49
        times = torch.linspace(999, 19, steps + 1).round().long()
        error = integrate(solver, denoiser(), z, times) - solution(z, start, end)
        errors[solver] = float(error.abs().max())
    assert max(errors["dpm_solver_2"], errors["dpm_solver_pp_2s"]) < errors["ddim"] / 5, errors


@pytest.mark.parametrize("solver", SOLVERS)
def test_prediction_types_agree(solver: str) -> None:
    z, t, t_prev = normal(3), torch.tensor([19, 499, 999]), torch.tensor([0, 239, 979])
    first, *others = (
        ode_step(guided_teacher(W, of_kind(kind)), of_kind(kind), solver)(z, t, t_prev)
        for kind in KINDS
    )
    for other in others:
        torch.testing.assert_close(first, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_step_of_no_length_stays(solver: str) -> None:
    z, t = normal(3), torch.tensor([0, 500, 999])
    torch.testing.assert_close(ode_step(denoiser(), EXACT, solver)(z, t, t), z)


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_guided_teacher_follows_the_guided_ode(solver: str) -> None:
    z, start, end = normal(8), torch.tensor([999]), torch.tensor([0])
    found = integrate(solver, guided_teacher(W), z, torch.linspace(999, 0, 112).round().long())
    error = (found - solution(z, start, end, guided_mean(W))).abs().max()
    drift = (found - solution(z, start, end, MEAN)).abs().min()
    assert error < 0.05 and drift > 0.9


@pytest.mark.parametrize("log_interpolation", [False, True])
def test_the_middle_time_halves_the_step_in_log_snr(log_interpolation: bool) -> None:
    schedule = replace(EXACT, log_interpolation=log_interpolation)
    t, t_prev = torch.tensor([999, 500, 20, 1, 7]), torch.tensor([0, 480, 0, 0, 7])
    middle = middle_time(t, t_prev, schedule)
    half, above, below = (
        half_log_snr(times.double(), normal(5), schedule) for times in (middle, t, t_prev)
    )
    torch.testing.assert_close(half, (above + below) / 2, rtol=1e-9, atol=1e-9)
    assert ((middle <= t) & (middle >= t_prev)).all()


# ── the consistency function ──


def consistent(
    schedule: NoiseSchedule, endpoint: Tensor | None, mean: float = MEAN
) -> Callable[[Tensor, Tensor], Tensor]:
    """The raw output with which f(z, t -> e) is the ODE's solution; without endpoint, that at 0."""

    def network(z: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = schedule.alpha_sigma(t, z)
        if endpoint is None:
            c_skip, c_out = (expand(c, z).double() for c in boundary_scalings(t))
            goal = solution(z, t, torch.zeros_like(t), mean)
            z0 = (goal - c_skip * z) / c_out.clamp(min=1e-9)  # c_out 0: z_0 does not matter
        else:
            alpha_e, sigma_e = schedule.alpha_sigma(endpoint, z)
            goal = solution(z, t, endpoint, mean)
            ratio = sigma_e / sigma
            z0 = (goal - ratio * z) / (alpha_e - ratio * alpha)
            z0 = torch.where(expand(t == endpoint, z), 0.0, z0)
        return as_output(z0, z, t, schedule)

    return network


def pairs(rows: int = 200, grid: int = 50) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """z, noise (B, 1) and the pairs of times (B,), all of the grid's."""
    t, t_prev = draw_times((torch.arange(rows) + 0.5) / rows, grid)
    return MEAN + STD * normal(rows, seed=1), normal(rows, seed=2), t, t_prev


def endpoints(name: str, t_prev: Tensor, grid: int = 50) -> Tensor | None:
    uniform = torch.rand(t_prev.shape, generator=torch.Generator().manual_seed(3))
    match name:
        case "phases":
            return phase_edges(t_prev, 4, grid)
        case "sampled":
            return sampled_endpoints(t_prev, uniform, grid)
    return None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["zero", "phases", "sampled"])
def test_the_true_consistency_function_has_no_loss(name: str, kind: str) -> None:
    schedule = of_kind(kind)
    z, noise, t, t_prev = pairs()
    e = endpoints(name, t_prev)

    def loss(step_back, mean: float = MEAN) -> float:
        f = consistent(schedule, e, mean)
        args = (f, f, step_back, z, noise, t, t_prev, schedule)
        return float(consistency_loss(*args, distance=squared, endpoint=e))

    teacher = denoiser(MEAN, schedule)
    by_solver = {solver: loss(ode_step(teacher, schedule, solver)) for solver in SOLVERS}
    assert loss(solution) < 1e-11
    assert by_solver["ddim"] < 1e-3
    assert by_solver["dpm_solver_2"] < by_solver["ddim"] / 5
    assert by_solver["dpm_solver_pp_2s"] < by_solver["ddim"] / 5
    assert loss(solution, mean=MEAN + 0.5) > by_solver["ddim"]  # of another ODE


@pytest.mark.parametrize("name", ["zero", "phases", "sampled"])
def test_prediction_types_have_one_consistency_loss(name: str) -> None:
    z, noise, t, t_prev = pairs()
    e = endpoints(name, t_prev)

    def loss(kind: str) -> float:
        schedule = of_kind(kind)
        f, step = denoiser(MEAN, schedule), ode_step(guided_teacher(W, schedule), schedule)
        args = (f, f, step, z, noise, t, t_prev, schedule)
        return float(consistency_loss(*args, distance=squared, endpoint=e))

    assert loss("v_prediction") == pytest.approx(loss("epsilon"), rel=1e-9)
    assert loss("sample") == pytest.approx(loss("epsilon"), rel=1e-9)


def test_one_phase_and_sampled_zeros_are_a_ddim_step_to_time_zero() -> None:
    z, noise, t, t_prev = pairs()
    zero = torch.zeros_like(t)
    f, step = denoiser(), ode_step(denoiser(), EXACT)

    def loss(endpoint: Tensor | None) -> float:
        args = (f, f, step, z, noise, t, t_prev, EXACT)
        return float(consistency_loss(*args, distance=squared, endpoint=endpoint))

    z_t = EXACT.add_noise(z, noise, t)
    z_prev = step(z_t, t, t_prev)
    online, goal = (ddim_step(f(z, t), z, t, zero, EXACT) for z, t in ((z_t, t), (z_prev, t_prev)))
    by_hand = float(squared(online, goal).mean())
    assert loss(phase_edges(t_prev, 1)) == pytest.approx(by_hand, rel=1e-9)
    assert loss(sampled_endpoints(t_prev, torch.zeros(t.shape))) == pytest.approx(by_hand, rel=1e-9)
    assert loss(phase_edges(t_prev, 4)) < by_hand < loss(None)


# ── fine-tuning on data ──


def test_the_mean_of_the_data_step_is_the_unguided_ode_step() -> None:
    """Over draws of (z_0, noise) that give one z_t; they come in pairs around the middle."""
    t, t_prev = torch.tensor([799]), torch.tensor([779])
    z_t = normal(1)
    alpha, sigma = EXACT.alpha_sigma(t, z_t)
    _, deviation = spread(t, z_t)
    middle = EXACT.to_z0(denoiser()(z_t, t), z_t, t)
    away = STD * sigma / deviation * normal(1000)
    z = middle + torch.cat([away, -away])
    noise = (z_t - alpha * z) / sigma
    found = data_step(z, noise, EXACT)(z_t, t, t_prev).mean()
    unguided = ode_step(denoiser(), EXACT)(z_t, t, t_prev)
    distilled = ode_step(guided_teacher(W), EXACT)(z_t, t, t_prev)
    assert float(found - unguided) == pytest.approx(0, abs=1e-9)
    assert float((distilled - unguided).abs()) > 0.005  # what one step loses of the guidance


class Lines(torch.nn.Module):
    """A student that holds z_0 = a z + b for each time of a grid, which is all it takes here."""

    def __init__(self, grid: int) -> None:
        super().__init__()
        self.stride = stride_of(grid, 1000)
        self.lines = torch.nn.Parameter(torch.zeros(2, grid, 1, dtype=torch.float64))

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        a, b = self.lines[:, (t + 1) // self.stride - 1]
        return a * z + b


def train(student: Lines, step_of, steps: int, seed: int) -> None:
    """`steps` of Adam, with the student itself as target; `step_of` makes the step back."""
    schedule = of_kind("sample")
    draw = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(student.parameters(), lr=0.05)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, steps)
    for _ in range(steps):
        z, noise = torch.randn(2, 200, 1, dtype=torch.float64, generator=draw)
        t, t_prev = draw_times(torch.rand(200, generator=draw), student.lines.shape[1])
        z = MEAN + STD * z
        args = (student, student, step_of(z, noise), z, noise, t, t_prev, schedule)
        loss = consistency_loss(*args, distance=squared)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()


def test_distillation_learns_the_guided_ode_and_fine_tuning_on_data_unlearns_it() -> None:
    student = Lines(8)
    schedule = of_kind("sample")
    teacher = ode_step(guided_teacher(W, schedule), schedule, "dpm_solver_2")
    z, start, end = normal(50, seed=9), torch.tensor([999]), torch.tensor([0])
    guided_ode, plain_ode = (solution(z, start, end, guided_mean(w)) for w in (W, 0.0))

    def distance(goal: Tensor) -> float:
        with torch.no_grad():
            return float((student(z, start.expand(50)) - goal).abs().mean())

    train(student, lambda z, noise: teacher, 500, seed=0)
    assert distance(guided_ode) < 0.1 and distance(plain_ode) > 0.9
    train(student, lambda z, noise: data_step(z, noise, schedule), 500, seed=1)
    # Not quite the plain ODE: the mean over the noise is taken with 8 steps of first order.
    assert distance(plain_ode) < 0.15 and distance(guided_ode) > 0.9
