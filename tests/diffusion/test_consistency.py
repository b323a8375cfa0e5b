import pytest
import torch

from fewstep.diffusion import (
    NoiseSchedule,
    betas_for,
    boundary_scalings,
    classifier_free_guidance,
    consistency_function,
    ddim_step,
    guidance_embedding,
    lcm_step,
    lcm_timesteps,
    rescale_guidance,
)
from fewstep.errors import RequestError

SCHEDULE = NoiseSchedule.from_betas(betas_for(), "v_prediction")


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_at_time_zero_the_consistency_function_is_the_identity():
    z, output = normal(2, 4, 3, 3), normal(2, 4, 3, 3, seed=1)
    assert torch.equal(consistency_function(output, z, torch.zeros(2).long(), SCHEDULE), z)


def test_boundary_scalings_have_the_published_values():
    c_skip, c_out = boundary_scalings(torch.tensor([0, 19, 999]))
    assert c_skip.tolist() == pytest.approx([1, 6.925e-6, 2.505e-9], rel=1e-3)
    assert c_out.tolist() == pytest.approx([0, 0.999996537, 1], rel=1e-6)


def test_rows_at_different_steps_give_what_each_gives_alone():
    z, output, noise = (normal(3, 4, 3, 3, seed=i) for i in range(3))
    t, t_next = torch.tensor([999, 499, 259]), torch.tensor([499, 259, -1])
    together, z0 = lcm_step(output, z, t, t_next, noise, SCHEDULE)
    for i in range(3):
        row = slice(i, i + 1)
        alone, _ = lcm_step(output[row], z[row], t[row], t_next[row], noise[row], SCHEDULE)
        assert torch.equal(together[row], alone)
    assert torch.equal(together[2], z0[2])


@pytest.mark.parametrize(
    ("steps", "strength", "plan"),
    [
        (1, 1.0, [999]),
        (4, 1.0, [999, 759, 499, 259]),
        (8, 1.0, [999, 879, 759, 639, 499, 379, 259, 139]),
        (4, 0.5, [499, 379, 259, 139]),
        (4, 0.2, [199, 159, 99, 59]),
        (2, 0.6, [599, 299]),
    ],
)
def test_plans_are_the_published_ones(steps, strength, plan):
    assert lcm_timesteps(steps, strength=strength).tolist() == plan


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"steps": 0}, "num_inference_steps"),
        ({"steps": 51}, "num_inference_steps"),
        ({"steps": 4, "original_steps": 1001}, "original_inference_steps"),
        ({"steps": 4, "strength": 0.05}, "strength=0.05"),
    ],
)
def test_impossible_plans_name_the_argument(arguments, named):
    with pytest.raises(RequestError, match=named):
        lcm_timesteps(**arguments)


def test_ddim_with_the_true_output_lands_on_the_true_latent():
    z0, noise = normal(2, 4, 3, 3), normal(2, 4, 3, 3, seed=1)
    t, t_prev = torch.tensor([999, 419]), torch.tensor([979, 399])
    z = SCHEDULE.add_noise(z0, noise, t)
    reached = ddim_step(SCHEDULE.target(z0, noise, t), z, t, t_prev, SCHEDULE)
    torch.testing.assert_close(reached, SCHEDULE.add_noise(z0, noise, t_prev), atol=1e-5, rtol=1e-5)


def test_ddim_is_first_order_on_a_gaussian_with_a_known_solution():
    """For data N(m, s²) the ODE's solution keeps (z - alpha m) / sqrt(alpha² s² + sigma²)."""
    mean, std, schedule = 0.7, 0.3, NoiseSchedule.from_betas(betas_for().double(), "epsilon")
    schedule = NoiseSchedule(schedule.alphas_cumprod.double())

    def spread(alpha, sigma):
        return (alpha**2 * std**2 + sigma**2).sqrt()

    def error(steps):
        times = torch.linspace(900, 100, steps + 1).round().long()
        z = torch.full((1, 1), 1.3, dtype=torch.float64)
        alpha, sigma = schedule.alpha_sigma(times[:1], z)
        kept = (z - alpha * mean) / spread(alpha, sigma)
        for t, t_prev in zip(times[:-1, None], times[1:, None], strict=True):
            alpha, sigma = schedule.alpha_sigma(t, z)
            noise = sigma * (z - alpha * mean) / spread(alpha, sigma) ** 2
            z = ddim_step(noise, z, t, t_prev, schedule)
        alpha, sigma = schedule.alpha_sigma(times[-1:], z)
        return (z - alpha * mean - kept * spread(alpha, sigma)).abs().item()

    errors = [error(steps) for steps in (20, 40, 80)]
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.15)
    assert errors[1] / errors[2] == pytest.approx(2, rel=0.15)


def test_guidance_one_is_the_positive_output_and_rows_may_differ():
    positive, negative = normal(2, 4, 3, 3), normal(2, 4, 3, 3, seed=1)
    torch.testing.assert_close(classifier_free_guidance(positive, negative, 1.0), positive)
    guided = classifier_free_guidance(positive, negative, torch.tensor([1.0, 0.0]))
    torch.testing.assert_close(guided, torch.stack([positive[0], negative[1]]))


def test_rescaled_guidance_has_the_positive_outputs_deviation():
    positive, negative = normal(2, 4, 8, 8), normal(2, 4, 8, 8, seed=1)
    guided = classifier_free_guidance(positive, negative, 7.5)
    rescaled = rescale_guidance(guided, positive, 1.0)
    torch.testing.assert_close(rescaled.std((1, 2, 3)), positive.std((1, 2, 3)))
    torch.testing.assert_close(rescale_guidance(guided, positive, 0.0), guided)


def test_guidance_embedding_has_the_published_values():
    embedding = guidance_embedding(torch.tensor([7.5, 0.0]), 256)
    assert embedding[0, :4].tolist() == pytest.approx(
        [-0.85124, 0.84223, 0.01182, 0.99238], abs=2e-3
    )
    assert embedding[0, 128:130].tolist() == pytest.approx([-0.52478, 0.53912], abs=2e-3)
    assert torch.equal(embedding[1], torch.cat([torch.zeros(128), torch.ones(128)]))
    assert guidance_embedding(torch.tensor([1.0]), 7).shape == (1, 7)
