"""The losses: identities, published values, errors. What they converge to is in test_gaussian."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from fewstep.diffusion import (
    NoiseSchedule,
    betas_for,
    consistency_function,
    ddim_step,
    lcm_timesteps,
    rescale_to_zero_snr,
    trajectory_function,
)
from fewstep.errors import RequestError, UnsupportedConfig
from fewstep.training.endpoints import (
    draw_times,
    grid_steps_at,
    grid_times,
    phase_edges,
    previous_times,
    sampled_endpoints,
)
from fewstep.training.objectives import (
    DISTANCES,
    cauchy,
    consistency_loss,
    data_step,
    diffusion_loss,
    guided,
    min_snr_weight,
    ode_step,
    pseudo_huber,
    squared,
)

SCHEDULE = NoiseSchedule.from_betas(betas_for(), "epsilon")
KINDS = ("epsilon", "v_prediction", "sample")


def of_kind(kind):
    return NoiseSchedule(SCHEDULE.alphas_cumprod, kind)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# ── the denoising objective ──


def test_diffusion_loss_is_zero_for_the_true_target_and_weighted_otherwise():
    z, noise, t = normal(4, 2, 3, 3), normal(4, 2, 3, 3, seed=1), torch.tensor([3, 99, 500, 900])
    assert diffusion_loss(lambda z_t, t: noise, z, noise, t, SCHEDULE) == 0
    off = diffusion_loss(lambda z_t, t: noise + 1, z, noise, t, SCHEDULE)
    assert off == pytest.approx(min_snr_weight(t, SCHEDULE).mean().item(), rel=1e-5)


def test_without_gamma_all_times_count_the_same():
    z, noise, t = normal(4, 2, 3, 3), normal(4, 2, 3, 3, seed=1), torch.tensor([3, 99, 500, 900])
    off = diffusion_loss(lambda z_t, t: noise + 1, z, noise, t, SCHEDULE, gamma=0)
    assert off == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_min_snr_means_the_same_weight_on_z0_for_every_prediction_type(kind):
    schedule = of_kind(kind)
    z, noise, t = normal(3, 2, 3, 3), normal(3, 2, 3, 3, seed=1), torch.tensor([10, 300, 990])
    z_t = schedule.add_noise(z, noise, t)
    output = schedule.target(z, noise, t) + 0.1
    error = squared(schedule.to_z0(output, z_t, t), z).flatten(1).mean(1)
    expected = schedule.snr(t).clamp(max=5) * error
    weight = min_snr_weight(t, schedule) * squared(output, schedule.target(z, noise, t)).mean(
        (1, 2, 3)
    )
    torch.testing.assert_close(weight, expected, rtol=1e-2, atol=1e-5)


# ── distances ──


def test_pseudo_huber_is_squared_near_zero_and_absolute_far_away():
    zero, c = torch.tensor(0.0), 1e-3
    assert pseudo_huber(torch.tensor(1e-5), zero, c) == pytest.approx(5e-8, rel=0.05)
    assert pseudo_huber(torch.tensor(2.0), zero, c) == pytest.approx(2, rel=1e-3)


def test_cauchy_is_squared_near_zero_and_logarithmic_far_away():
    zero, c = torch.tensor(0.0), 1e-2
    assert cauchy(torch.tensor(1e-4), zero, c) == pytest.approx(5e-5, rel=1e-3)
    assert cauchy(torch.tensor(3.0), zero, c) - cauchy(torch.tensor(1.0), zero, c) == pytest.approx(
        2 * np.log(3), rel=1e-3
    )


def test_an_outlier_pulls_less_by_cauchy_than_by_pseudo_huber_than_by_squares():
    def pull(distance, error):
        a = torch.tensor(error, requires_grad=True)
        distance(a, torch.tensor(0.0)).backward()
        return float(a.grad)

    far, near = 5.0, 0.5
    ratios = {name: pull(f, far) / pull(f, near) for name, f in DISTANCES.items()}
    assert ratios == pytest.approx({"squared": 10, "pseudo_huber": 1, "cauchy": 0.1}, rel=1e-3)


# ── the grid of times ──


@pytest.mark.parametrize("steps", [1, 8, 40, 50, 1000])
def test_the_grid_is_that_of_the_sampler(steps):
    assert grid_times(steps).tolist() == lcm_timesteps(steps, steps).flip(0).tolist()


def test_fifty_steps_are_the_papers_interval_of_twenty():
    times = grid_times(50)
    assert times[:2].tolist() == [19, 39] and times[-1] == 999
    assert previous_times(times).tolist() == [0, *times[:-1].tolist()]


def test_uniform_numbers_draw_every_time_of_the_grid_equally_often():
    t, t_prev = draw_times((torch.arange(400) + 0.5) / 400, grid_steps=50)
    values, counts = t.unique(return_counts=True)
    assert values.tolist() == grid_times(50).tolist() and counts.unique().tolist() == [8]
    assert t_prev.tolist() == previous_times(t).tolist()


@pytest.mark.parametrize("steps", [1, 3, 50, 999])
def test_the_largest_uniform_number_draws_the_last_time(steps):
    almost_one = torch.tensor([0.0, 1 - 2**-24])
    assert draw_times(almost_one, steps)[0].tolist() == grid_times(steps)[[0, -1]].tolist()


def test_the_grid_doubles_in_stages_of_equal_length():
    seen = [grid_steps_at(step, 40, first=10, last=50) for step in range(40)]
    assert seen == [10] * 10 + [20] * 10 + [40] * 10 + [50] * 10
    assert {grid_steps_at(step, 7, 50, 50) for step in range(7)} == {50}


# ── endpoints ──


def test_phases_are_equal_parts_of_the_grid_and_begin_at_their_edges():
    edges = phase_edges(previous_times(grid_times(50)), phases=4)
    assert edges.unique(return_counts=True)[0].tolist() == [0, 239, 499, 739]
    assert edges.unique(return_counts=True)[1].tolist() == [12, 13, 12, 13]
    assert edges[[11, 12]].tolist() == [0, 239]  # t 239 and 259, from 219 and 239


def test_as_many_phases_as_steps_end_each_pair_at_its_own_lower_time():
    t_prev = previous_times(grid_times(40), 40)
    assert phase_edges(t_prev, 40, 40).tolist() == t_prev.tolist()


@pytest.mark.parametrize("steps", [50, 1000])
def test_sampled_endpoints_lie_on_the_grid_down_to_zero_and_never_above(steps):
    t_prev = previous_times(grid_times(steps), steps)
    for uniform in (0.0, 0.3, 1 - 2**-24):
        e = sampled_endpoints(t_prev, torch.full(t_prev.shape, uniform), steps)
        assert (e <= t_prev).all() and set(e.tolist()) <= {0, *grid_times(steps).tolist()}
    assert e.tolist() == t_prev.tolist()  # the largest number stays
    assert not sampled_endpoints(t_prev, torch.zeros(len(t_prev)), steps).any()


def test_sampled_endpoints_are_equally_likely():
    uniform = (torch.arange(300) + 0.5) / 300
    e = sampled_endpoints(torch.full((300,), 99), uniform, 50)
    values, counts = e.unique(return_counts=True)
    assert values.tolist() == [0, 19, 39, 59, 79, 99] and counts.unique().tolist() == [50]


@pytest.mark.parametrize("kind", KINDS)
def test_at_its_endpoint_f_is_the_identity_to_the_bit(kind):
    z, output, t = normal(3, 2, 4, 4), normal(3, 2, 4, 4, seed=1), torch.tensor([0, 239, 999])
    assert torch.equal(trajectory_function(output, z, t, t, of_kind(kind)), z)
    elsewhere = trajectory_function(output, z, t, t // 2, of_kind(kind))
    assert torch.equal(elsewhere[0], z[0]) and not torch.isclose(elsewhere[1:], z[1:]).all()


# ── the consistency loss ──


def test_consistency_loss_vanishes_for_a_consistent_function():
    """A student that always answers the clean latent is consistent along every trajectory."""
    z, noise = normal(2, 2, 3, 3), normal(2, 2, 3, 3, seed=1)
    t, t_prev = torch.tensor([19, 499]), torch.tensor([0, 479])
    schedule = of_kind("sample")

    def oracle(z_t, t):
        return z

    def loss(student, endpoint=None):
        step = data_step(z, noise, schedule)
        return consistency_loss(
            student,
            oracle,
            step,
            z,
            noise,
            t,
            t_prev,
            schedule,
            distance=squared,
            endpoint=endpoint,
        )

    assert loss(oracle) < 1e-3  # z itself is noised a little at t = 0, where f is the identity
    assert loss(oracle, torch.tensor([0, 239])) < 1e-12
    assert loss(lambda z_t, t: z + 1) > 0.9


@pytest.mark.parametrize("endpoint", [None, torch.tensor([239, 739])])
def test_the_target_gets_no_gradient_and_the_student_does(endpoint):
    student, target, teacher = (torch.nn.Conv2d(2, 2, 1) for _ in range(3))
    z, noise = normal(2, 2, 3, 3), normal(2, 2, 3, 3, seed=1)
    t = torch.tensor([499, 999])
    step = ode_step(lambda z, t: teacher(z), SCHEDULE)
    loss = consistency_loss(
        lambda z, t: student(z),
        lambda z, t: target(z),
        step,
        z,
        noise,
        t,
        t - 20,
        SCHEDULE,
        endpoint=endpoint,
    )
    loss.backward()
    assert student.weight.grad is not None
    assert target.weight.grad is None and teacher.weight.grad is None


def test_consistency_loss_equals_the_paper_written_out():
    """Algorithm 1 by hand, with guidance on z_0 and noise."""
    z, noise = normal(3, 2, 4, 4), normal(3, 2, 4, 4, seed=1)
    t, w = torch.tensor([19, 499, 999]), torch.tensor([2.0, 5.0, 7.5])
    t_prev = torch.tensor([0, 479, 979])

    def network(z, t, text=0.5):
        return z * 0.3 + text + 1e-4 * t[:, None, None, None]

    ours = consistency_loss(
        lambda z, t: network(z, t) * 1.1,
        lambda z, t: network(z, t) * 0.9,
        ode_step(guided(lambda z, t: (network(z, t), network(z, t, 0.1)), w), SCHEDULE),
        z,
        noise,
        t,
        t_prev,
        SCHEDULE,
    )
    scale = w[:, None, None, None]
    alpha, sigma = SCHEDULE.alpha_sigma(t, z)
    z_t = alpha * z + sigma * noise
    eps_c, eps_u = network(z_t, t), network(z_t, t, 0.1)
    z0_c, z0_u = (z_t - sigma * eps_c) / alpha, (z_t - sigma * eps_u) / alpha
    z0, eps = z0_c + scale * (z0_c - z0_u), eps_c + scale * (eps_c - eps_u)
    alpha_prev, sigma_prev = SCHEDULE.alpha_sigma(t_prev, z)
    z_prev = alpha_prev * z0 + sigma_prev * eps
    online = consistency_function(network(z_t, t) * 1.1, z_t, t, SCHEDULE)
    goal = consistency_function(network(z_prev, t_prev) * 0.9, z_prev, t_prev, SCHEDULE)
    by_hand = (((online - goal) ** 2 + 1e-6).sqrt() - 1e-3).mean()
    assert ours.item() == pytest.approx(by_hand.item(), rel=1e-4)


PUBLISHED = json.loads((Path(__file__).parents[1] / "data/consistency_losses.json").read_text())


def fixed(name: str) -> Tensor:
    """numpy's legacy generator, whose numbers never change."""
    random = np.random.RandomState(PUBLISHED["seeds"][name])
    return torch.from_numpy(random.standard_normal(PUBLISHED["shape"]))


def network_like(gain: float, offset: float):
    return lambda z, t: (
        torch.sin(gain * z) + offset * torch.cos(t.double() / 300)[:, None, None, None]
    )


def case_id(case) -> str:
    words = (case["script"], case["prediction_type"], case["grid_steps"], case.get("phases"))
    return "-".join(map(str, (*words, case.get("guided", True), case["loss"])))


@pytest.mark.parametrize("case", PUBLISHED["cases"], ids=case_id)
def test_the_loss_has_the_value_of_the_published_scripts(case):
    student, positive, negative = (
        network_like(*numbers) for numbers in ((0.9, 0.1), (0.8, 0.3), (0.7, -0.2))
    )
    exact = torch.cumprod(1 - betas_for().double(), 0)  # so that only the arithmetic is compared
    schedule = NoiseSchedule(exact, case["prediction_type"])
    if case.get("guided", True):
        w = torch.tensor(PUBLISHED["w"], dtype=torch.float64)
        teacher = guided(lambda z, t: (positive(z, t), negative(z, t)), w)
    else:
        teacher = guided(lambda z, t: (positive(z, t), None), None)
    t = torch.tensor(case["t"])
    t_prev = previous_times(t, case["grid_steps"])
    assert t_prev.tolist() == case["t_prev"]
    endpoint = None
    if "phases" in case:
        endpoint = phase_edges(t_prev, case["phases"], case["grid_steps"])
        assert endpoint.tolist() == case["endpoint"]
    distance = {"l2": squared, "huber": partial(pseudo_huber, c=PUBLISHED["huber_c"])}
    ours = consistency_loss(
        student,
        student,
        ode_step(teacher, schedule),
        fixed("z"),
        fixed("noise"),
        t,
        t_prev,
        schedule,
        distance=distance[case["loss"]],
        endpoint=endpoint,
    )
    assert ours.item() == pytest.approx(case["value"], rel=1e-6)


# ── the teacher's step ──


@pytest.mark.parametrize("kind", KINDS)
def test_guidance_on_the_raw_output_is_guidance_on_z0_and_noise(kind):
    schedule = of_kind(kind)
    z, positive, negative = (normal(3, 2, 4, 4, seed=seed) for seed in range(3))
    t, t_prev, w = torch.tensor([19, 499, 979]), torch.tensor([0, 479, 0]), torch.tensor([0, 3, 9])
    ours = ode_step(guided(lambda z, t: (positive, negative), w), schedule)(z, t, t_prev)
    steps = [ddim_step(output, z, t, t_prev, schedule) for output in (positive, negative)]
    scale = w[:, None, None, None]
    torch.testing.assert_close(
        ours, (1 + scale) * steps[0] - scale * steps[1], rtol=1e-4, atol=1e-4
    )


def test_omega_zero_and_no_guidance_are_one():
    z, positive, negative = (normal(3, 2, 4, 4, seed=seed) for seed in range(3))
    t = torch.tensor([19, 499, 979])
    weak = guided(lambda z, t: (positive, negative), torch.zeros(3))(z, t)
    torch.testing.assert_close(weak, guided(lambda z, t: (positive, None), None)(z, t))


@pytest.mark.parametrize(("solver", "calls"), [("ddim", 1), ("dpm_solver_pp_2s", 2)])
def test_a_solver_of_second_order_calls_the_teacher_twice(solver, calls):
    times = []

    def network(z, t):
        times.append(t)
        return z

    ode_step(network, SCHEDULE, solver)(normal(1, 2, 4, 4), torch.tensor([999]), torch.tensor([0]))
    assert len(times) == calls
    assert calls == 1 or 0 < float(times[1]) < 999


# ── what cannot be served ──


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: grid_times(0), r"grid_steps must lie in \[1, 1000\]"),
        (lambda: draw_times(torch.zeros(1), 1001), "got 1001"),
        (lambda: phase_edges(torch.tensor([0]), 51), r"phases must lie in \[1, 50\]"),
        (lambda: grid_steps_at(0, 10, 100, 50), "finer, not coarser"),
        (lambda: grid_steps_at(10, 10, 1, 50), r"step must lie in \[0, 9\]"),
        (lambda: ode_step(lambda z, t: z, SCHEDULE, "heun"), "use one of ddim, dpm_solver_2"),
        (lambda: guided(lambda z, t: (z, None), torch.ones(1))(normal(1), None), "no negative"),
        (lambda: guided(lambda z, t: (z, z), None)(normal(1), None), "w=None but a negative"),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(call, message):
    with pytest.raises(RequestError, match=message):
        call()


@pytest.mark.parametrize("endpoint", [torch.tensor([0.0, 0.0]), torch.tensor(0)])
def test_endpoints_are_whole_times_one_per_row(endpoint):
    z, t = normal(2, 2, 3, 3), torch.tensor([499, 999])
    with pytest.raises(RequestError, match=r"endpoint must be whole times of shape \(2,\)"):
        consistency_loss(
            lambda z, t: z,
            lambda z, t: z,
            lambda z, t, s: z,
            z,
            z,
            t,
            t - 20,
            SCHEDULE,
            endpoint=endpoint,
        )


def test_second_order_solvers_refuse_a_schedule_without_signal_and_ddim_takes_it():
    zero_snr = NoiseSchedule.from_betas(rescale_to_zero_snr(betas_for()), "v_prediction")
    z, t = normal(1, 2, 4, 4), torch.tensor([999])
    assert ode_step(lambda z, t: z, zero_snr)(z, t, t - 20).isfinite().all()
    with pytest.raises(UnsupportedConfig, match="solver='dpm_solver_2' cannot start at zero SNR"):
        ode_step(lambda z, t: z, zero_snr, "dpm_solver_2")
