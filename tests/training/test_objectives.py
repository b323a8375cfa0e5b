import pytest
import torch

from fewstep.diffusion import NoiseSchedule, betas_for, consistency_function
from fewstep.training.objectives import (
    consistency_loss,
    diffusion_loss,
    min_snr_weight,
    pseudo_huber,
    squared,
    teacher_step,
)

SCHEDULE = NoiseSchedule.from_betas(betas_for(), "epsilon")


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_diffusion_loss_is_zero_for_the_true_target_and_weighted_otherwise():
    z, noise, t = normal(4, 2, 3, 3), normal(4, 2, 3, 3, seed=1), torch.tensor([3, 99, 500, 900])
    assert diffusion_loss(lambda z_t, t: noise, z, noise, t, SCHEDULE) == 0
    off = diffusion_loss(lambda z_t, t: noise + 1, z, noise, t, SCHEDULE)
    assert off == pytest.approx(min_snr_weight(t, SCHEDULE).mean().item(), rel=1e-5)


def test_without_gamma_all_times_count_the_same():
    z, noise, t = normal(4, 2, 3, 3), normal(4, 2, 3, 3, seed=1), torch.tensor([3, 99, 500, 900])
    off = diffusion_loss(lambda z_t, t: noise + 1, z, noise, t, SCHEDULE, gamma=0)
    assert off == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_min_snr_means_the_same_weight_on_z0_for_every_prediction_type(kind):
    schedule = NoiseSchedule(SCHEDULE.alphas_cumprod, kind)
    z, noise, t = normal(3, 2, 3, 3), normal(3, 2, 3, 3, seed=1), torch.tensor([10, 300, 990])
    z_t = schedule.add_noise(z, noise, t)
    output = schedule.target(z, noise, t) + 0.1
    error = squared(schedule.to_z0(output, z_t, t), z).flatten(1).mean(1)
    expected = schedule.snr(t).clamp(max=5) * error
    weight = min_snr_weight(t, schedule) * squared(output, schedule.target(z, noise, t)).mean(
        (1, 2, 3)
    )
    torch.testing.assert_close(weight, expected, rtol=1e-2, atol=1e-5)


def test_pseudo_huber_is_squared_near_zero_and_absolute_far_away():
    assert pseudo_huber(torch.tensor(1e-5), torch.tensor(0.0), 1e-3) == pytest.approx(
        5e-8, rel=0.05
    )
    assert pseudo_huber(torch.tensor(2.0), torch.tensor(0.0), 1e-3) == pytest.approx(2, rel=1e-3)


def test_consistency_loss_vanishes_for_a_consistent_function():
    """A student that always answers the clean latent is consistent along every trajectory."""
    z, noise = normal(2, 2, 3, 3), normal(2, 2, 3, 3, seed=1)
    t, t_prev = torch.tensor([19, 499]), torch.tensor([0, 479])
    schedule = NoiseSchedule(SCHEDULE.alphas_cumprod, "sample")

    def step_back(z_t, t, t_prev):
        return schedule.add_noise(z, noise, t_prev)

    def oracle(z_t, t):
        return z

    loss = consistency_loss(oracle, oracle, step_back, z, noise, t, t_prev, schedule, squared)
    assert loss < 1e-3  # z itself is noised a little at t = 0, where f is the identity
    wrong = consistency_loss(
        lambda z_t, t: z + 1, oracle, step_back, z, noise, t, t_prev, schedule, squared
    )
    assert wrong > 0.9


def test_the_target_gets_no_gradient_and_the_student_does():
    student = torch.nn.Conv2d(2, 2, 1)
    target = torch.nn.Conv2d(2, 2, 1)
    z, noise = normal(2, 2, 3, 3), normal(2, 2, 3, 3, seed=1)
    t = torch.tensor([499, 999])
    loss = consistency_loss(
        lambda z, t: student(z),
        lambda z, t: target(z),
        lambda z, t, s: z,
        z,
        noise,
        t,
        t - 20,
        SCHEDULE,
    )
    loss.backward()
    assert student.weight.grad is not None
    assert target.weight.grad is None


def test_consistency_loss_equals_the_paper_written_out():
    """Algorithm 1 by hand, with guidance applied to z_0 and noise as the published scripts do."""
    z, noise = normal(3, 2, 4, 4), normal(3, 2, 4, 4, seed=1)
    text, empty = normal(3, 5, 6, seed=2), normal(3, 5, 6, seed=3)
    t, w = torch.tensor([19, 499, 999]), torch.tensor([2.0, 5.0, 7.5])
    t_prev = t - 19 - torch.tensor([0, 1, 1])

    def network(z, t, text):
        return z * 0.3 + text.mean((1, 2))[:, None, None, None] + 1e-4 * t[:, None, None, None]

    ours = consistency_loss(
        lambda z, t: network(z, t, text) * 1.1,
        lambda z, t: network(z, t, text) * 0.9,
        teacher_step(network, text, empty, w, SCHEDULE),
        z,
        noise,
        t,
        t_prev,
        SCHEDULE,
    )
    scale = w[:, None, None, None]
    alpha, sigma = SCHEDULE.alpha_sigma(t, z)
    z_t = alpha * z + sigma * noise
    eps_c, eps_u = network(z_t, t, text), network(z_t, t, empty)
    z0_c, z0_u = (z_t - sigma * eps_c) / alpha, (z_t - sigma * eps_u) / alpha
    z0, eps = z0_c + scale * (z0_c - z0_u), eps_c + scale * (eps_c - eps_u)
    alpha_prev, sigma_prev = SCHEDULE.alpha_sigma(t_prev, z)
    z_prev = alpha_prev * z0 + sigma_prev * eps
    online = consistency_function(network(z_t, t, text) * 1.1, z_t, t, SCHEDULE)
    goal = consistency_function(network(z_prev, t_prev, text) * 0.9, z_prev, t_prev, SCHEDULE)
    by_hand = (((online - goal) ** 2 + 1e-6).sqrt() - 1e-3).mean()
    assert ours.item() == pytest.approx(by_hand.item(), rel=1e-4)
