"""The solvers on a Gaussian whose trajectories are known, and against one another."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fewstep.diffusion import (
    NoiseSchedule,
    adams_bashforth,
    betas_for,
    bounded_ddim_step,
    ddim_step,
    dpm_solver_step,
    tcd_step,
)

MEAN, STD = 0.7, 0.3  # of the data
EXACT = NoiseSchedule(torch.cumprod(1 - betas_for().double(), 0))


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def spread(t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """alpha_t, and the deviation of z_t."""
    alpha, sigma = EXACT.alpha_sigma(t, like)
    return alpha, (alpha**2 * STD**2 + sigma**2).sqrt()


def solution(t: Tensor, kept: float) -> Tensor:
    """z (1, 1) at time t (1,) of the trajectory that is `kept` deviations from the middle."""
    alpha, deviation = spread(t, torch.ones(1, 1, dtype=torch.float64))
    return alpha * MEAN + kept * deviation


def predicted(z: Tensor, t: Tensor) -> Tensor:
    """E[z_0 | z_t]."""
    alpha, deviation = spread(t, z)
    return MEAN + alpha * STD**2 / deviation**2 * (z - alpha * MEAN)


def error(steps: int, order: int, heun: bool = False) -> float:
    """How far a run from 800 to 100 ends from the solution, begun with true predictions."""
    times = torch.linspace(800, 100, steps + 1).round().long()
    stride = int(times[0] - times[1])
    earlier = [times[:1] + stride * i for i in range(1, order)]
    past = [(t, predicted(solution(t, 1.3), t)) for t in earlier]
    z = solution(times[:1], 1.3)
    for t, t_next in zip(times[:-1, None], times[1:, None], strict=True):
        past = [(t, predicted(z, t)), *past][:order]
        z = dpm_solver_step(z, past, t_next, EXACT, heun=heun)
    return float((z - solution(times[-1:], 1.3)).abs())


@pytest.mark.parametrize(("order", "heun"), [(1, False), (2, False), (2, True)])
def test_dpm_solver_has_its_order(order: int, heun: bool) -> None:
    errors = [error(steps, order, heun) for steps in (35, 70, 140)]
    assert errors[0] / errors[1] == pytest.approx(2**order, rel=0.2)
    assert errors[1] / errors[2] == pytest.approx(2**order, rel=0.2)


def test_dpm_solver_of_the_third_order_beats_the_second() -> None:
    for steps in (35, 70, 140, 350):
        assert error(steps, 3) < error(steps, 2) / 5


def test_dpm_solver_of_the_first_order_is_ddim() -> None:
    schedule = NoiseSchedule.from_betas(betas_for())
    z, output, noise = (normal(3, 4, 2, 2, seed=i) for i in range(3))
    t, t_next = torch.tensor([999, 500, 259]), torch.tensor([700, 0, -1])
    z0 = schedule.to_z0(output, z, t)
    ours = dpm_solver_step(z, [(t, z0)], t_next, schedule)
    theirs = ddim_step(output, z, t, t_next, schedule)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    ours = dpm_solver_step(z, [(t, z0)], t_next, schedule, noise=noise)
    theirs, _ = bounded_ddim_step(output, z, t, t_next, schedule, noise=noise, eta=1.0)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_stochastic_steps_keep_the_distribution_of_a_gaussian() -> None:
    z = (
        solution(torch.tensor([800]), 0.0)
        + normal(20000, 1).double() * (spread(torch.tensor([800]), torch.ones(1, 1).double())[1])
    )
    past: list[tuple[Tensor, Tensor]] = []
    times = torch.arange(800, 99, -5)
    for i, (t, t_next) in enumerate(zip(times[:-1, None], times[1:, None], strict=True)):
        past = [(t, predicted(z, t)), *past][:2]
        noise = normal(20000, 1, seed=i + 1).double()
        z = dpm_solver_step(z, past, t_next, EXACT, noise=noise)
    alpha, deviation = spread(times[-1:], z)
    assert float(z.mean() - alpha * MEAN) == pytest.approx(0, abs=0.02)
    assert float(z.std() / deviation) == pytest.approx(1, abs=0.02)


def test_a_step_of_no_length_changes_nothing() -> None:
    t, z = torch.tensor([400]), normal(1, 3).double()
    past = [(t + 50 * i, normal(1, 3, seed=i).double()) for i in range(3)]
    for order in (1, 2, 3):
        torch.testing.assert_close(dpm_solver_step(z, past[:order], t, EXACT), z)


def test_tcd_at_gamma_0_is_ddim_and_at_1_draws_anew() -> None:
    schedule = NoiseSchedule.from_betas(betas_for())
    z, output, noise = (normal(2, 4, 2, 2, seed=i) for i in range(3))
    t, t_next = torch.tensor([999, 499]), torch.tensor([499, 259])
    down, lower = tcd_step(output, z, t, t_next, None, schedule, gamma=0.0)
    assert torch.equal(down, lower)
    assert torch.equal(down, ddim_step(output, z, t, t_next, schedule))
    anew, z_s = tcd_step(output, z, t, t_next, noise, schedule, gamma=1.0)
    assert torch.equal(z_s, ddim_step(output, z, t, torch.zeros(2).long(), schedule))
    z0 = schedule.to_z0(output, z, t)
    alpha, sigma = schedule.alpha_sigma(t_next, z)
    # But for the noise of the first level, which consistency sampling does not have.
    torch.testing.assert_close(anew, alpha * z0 + sigma * noise, atol=0.2, rtol=0)
    last, _ = tcd_step(output, z, t, torch.tensor([-1, 259]), noise, schedule, gamma=1.0)
    assert torch.equal(last[0], z_s[0]) and torch.equal(last[1], anew[1])


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_adams_bashforth_extrapolates_polynomials_exactly(order: int) -> None:
    for power in range(order):
        outputs = [torch.tensor(float(-i) ** power) for i in range(order)]
        # The mean of x^power over the step from 0 to 1.
        assert float(adams_bashforth(outputs)) == pytest.approx(1 / (power + 1), abs=1e-5)


@pytest.mark.parametrize("log", [False, True])
def test_between_whole_times_sigma_is_interpolated(log: bool) -> None:
    schedule = NoiseSchedule(EXACT.alphas_cumprod.float(), log_interpolation=log)
    like = torch.ones(3, 1)
    whole = torch.tensor([0, 499, 999])
    for a, b in zip(
        schedule.alpha_sigma(whole, like), schedule.alpha_sigma(whole.float(), like), strict=True
    ):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)
    left, middle, right = schedule.ratio(torch.tensor([400.0, 400.5, 401.0])).tolist()
    assert middle == pytest.approx((left * right) ** 0.5 if log else (left + right) / 2, rel=1e-6)
    alpha, sigma = schedule.alpha_sigma(torch.tensor([-1.0, 0.25, 998.75]), like)
    assert alpha[0] == 1 and sigma[0] == 0
    torch.testing.assert_close(alpha**2 + sigma**2, like)
