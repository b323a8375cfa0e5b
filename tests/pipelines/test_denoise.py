from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import UNET

from fewstep import DDIMScheduler, LCMScheduler, UNet2DConditionModel
from fewstep.pipelines.denoise import Conditioning, Job, Step, denoise, predict

pytestmark = pytest.mark.usefixtures("no_gradients")


@pytest.fixture
def no_gradients() -> Any:
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def unet() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(**UNET).eval()


def job_of(scheduler: Any, rows: int = 1, generator: Any = None, **changes: Any) -> Job:
    text = torch.randn(2, 1, 5, UNET["cross_attention_dim"], generator=seeded(9))
    job = Job(
        cond=Conditioning(text[0].expand(rows, -1, -1)),
        uncond=Conditioning(text[1].expand(rows, -1, -1)),
        guidance_scale=3.0,
        plan=scheduler.plan(4),
        update=scheduler.update,
        shape=(rows, 4, 8, 8),
        dtype=torch.float32,
        generator=generator,
    )
    return replace(job, **changes)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("scheduler", [LCMScheduler(), DDIMScheduler(clip_sample=False)])
def test_each_row_of_a_batch_is_what_it_is_alone(
    unet: UNet2DConditionModel, scheduler: Any
) -> None:
    together = denoise(unet, job_of(scheduler, 3, [seeded(i) for i in range(3)]).from_noise())
    for i in range(3):
        alone = denoise(unet, job_of(scheduler, 1, seeded(i)).from_noise())
        # Latents of a random network are large: rounding is measured against them.
        largest = 1e-5 * float(alone.abs().max())
        torch.testing.assert_close(together[i : i + 1], alone, rtol=0, atol=largest)


def test_guidance_is_that_of_two_separate_calls(unet: UNet2DConditionModel) -> None:
    job = job_of(LCMScheduler(), 2)
    z, t = torch.randn(2, 4, 8, 8, generator=seeded(1)), torch.tensor([999, 259])
    assert job.uncond is not None
    positive = unet(z, t, job.cond.text).sample
    negative = unet(z, t, job.uncond.text).sample
    expected = negative + 3.0 * (positive - negative)
    torch.testing.assert_close(predict(unet, job, z, t), expected, rtol=0, atol=1e-5)
    unguided = predict(unet, replace(job, uncond=None), z, t)
    torch.testing.assert_close(unguided, positive, rtol=0, atol=1e-6)
    assert (expected - positive).abs().max() > 1e-3


def test_a_callback_sees_every_step_and_may_change_it(unet: UNet2DConditionModel) -> None:
    seen: list[tuple[int, int]] = []

    def watch(step: Step) -> Step:
        seen.append((step.index, int(step.t)))
        return step

    def zero(step: Step) -> Step:
        return replace(step, z=torch.zeros_like(step.z))

    job = job_of(LCMScheduler(), 1, seeded(0)).from_noise()
    denoise(unet, job, watch)
    assert seen == [(0, 999), (1, 759), (2, 499), (3, 259)]
    assert denoise(unet, job, zero).abs().max() == 0


def test_stopping_gives_the_prediction_of_the_last_step(unet: UNet2DConditionModel) -> None:
    steps: list[Step] = []

    def stop(step: Step) -> Step:
        steps.append(step)
        return replace(step, stop=step.index == 1)

    result = denoise(unet, job_of(LCMScheduler(), 1, seeded(0)).from_noise(), stop)
    assert len(steps) == 2
    assert result is steps[1].z0


def test_the_network_may_have_another_dtype_than_the_latents() -> None:
    torch.manual_seed(0)
    unet = UNet2DConditionModel(**UNET).eval().to(torch.bfloat16)
    job = job_of(LCMScheduler(), 1, seeded(0))
    half = Conditioning(job.cond.text.to(torch.bfloat16))
    result = denoise(unet, replace(job, cond=half, uncond=None).from_noise())
    assert result.dtype == torch.float32
    assert result.isfinite().all()
