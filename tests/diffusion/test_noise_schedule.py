import pytest
import torch

from fewstep.diffusion import NoiseSchedule, betas_for, rescale_to_zero_snr
from fewstep.errors import RequestError, UnsupportedConfig


@pytest.fixture(params=["epsilon", "v_prediction", "sample"])
def schedule(request):
    return NoiseSchedule.from_betas(betas_for(), request.param)


def rows(seed=0):
    generator = torch.Generator().manual_seed(seed)
    z0, noise = torch.randn(2, 5, 4, 3, 3, generator=generator)
    return z0, noise, torch.tensor([0, 19, 259, 759, 999])


def test_stable_diffusion_table_has_the_published_values():
    table = NoiseSchedule.from_betas(betas_for()).alphas_cumprod
    known = {0: 0.99915, 19: 0.98224399, 259: 0.65897553, 499: 0.27766965, 999: 0.0046601}
    for t, value in known.items():
        assert table[t].item() == pytest.approx(value, rel=2e-5)


def test_the_true_target_gives_back_z0_and_noise(schedule):
    z0, noise, t = rows()
    z = schedule.add_noise(z0, noise, t)
    output = schedule.target(z0, noise, t)
    torch.testing.assert_close(schedule.to_z0(output, z, t), z0, atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(schedule.to_noise(output, z, t), noise, atol=2e-4, rtol=1e-3)


def test_each_row_has_its_own_time(schedule):
    z0, noise, t = rows()
    together = schedule.add_noise(z0, noise, t)
    for i in range(len(t)):
        alone = schedule.add_noise(z0[i : i + 1], noise[i : i + 1], t[i : i + 1])
        assert torch.equal(together[i : i + 1], alone)


def test_a_negative_time_is_clean():
    schedule = NoiseSchedule.from_betas(betas_for())
    z0, noise, _ = rows()
    assert torch.equal(schedule.add_noise(z0, noise, torch.full((5,), -1)), z0)


def test_half_precision_latents_stay_half_precision(schedule):
    z0, noise, t = rows()
    assert schedule.add_noise(z0.half(), noise.half(), t).dtype == torch.float16


def test_zero_snr_leaves_no_signal_at_the_end_and_the_first_step_alone():
    betas = betas_for("linear", beta_start=1e-4, beta_end=0.02)
    rescaled = NoiseSchedule.from_betas(rescale_to_zero_snr(betas), "v_prediction")
    assert rescaled.alphas_cumprod[-1].item() == pytest.approx(0, abs=1e-7)
    assert rescaled.alphas_cumprod[0].item() == pytest.approx(1 - 1e-4, rel=1e-5)


def test_zero_snr_with_epsilon_is_refused():
    with pytest.raises(UnsupportedConfig, match="v_prediction"):
        NoiseSchedule(torch.tensor([0.9, 0.0]))


def test_unknown_names_are_refused_by_name():
    with pytest.raises(UnsupportedConfig, match="prediction_type='flow'"):
        NoiseSchedule(torch.tensor([0.9]), "flow")
    with pytest.raises(UnsupportedConfig, match="beta_schedule='sigmoid'"):
        betas_for("sigmoid")


def test_a_time_outside_the_table_is_refused():
    with pytest.raises(RequestError, match="1000"):
        NoiseSchedule.from_betas(betas_for()).check_time(1000)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("t", [-1, 0, 499, 999])
def test_numbers_of_one_time_are_those_of_rows_and_may_meet_gradients(
    t: int, dtype: torch.dtype
) -> None:
    schedule = NoiseSchedule.from_betas(torch.linspace(1e-4, 0.02, 1000))
    z = torch.randn(2, 3, dtype=dtype)
    rows = schedule.alpha_sigma(torch.tensor([t, t]), z)
    for _ in range(2):  # made, then kept
        with torch.inference_mode():
            numbers = schedule.alpha_sigma(torch.tensor(t), z)
        for number, row in zip(numbers, rows, strict=True):
            assert number.shape == () and torch.equal(number.expand(2, 1), row)
            (number * z.requires_grad_()).sum().backward()
