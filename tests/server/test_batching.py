"""Promises of a batch: each row's answer is what its run is answered alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import LCM_UNET, UNET
from torch import Tensor

from fewstep import (
    ControlNetModel,
    DDIMScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    UNet2DConditionModel,
)
from fewstep.models.layers import Memo
from fewstep.pipelines.controls import ControlNetControl, T2IAdapterControl
from fewstep.pipelines.denoise import Conditioning, Job, Run, answer
from fewstep.server.batching import answers, kind_of

pytestmark = pytest.mark.usefixtures("no_gradients")


@pytest.fixture
def no_gradients() -> Any:
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def unet() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(**UNET).eval()


def run(seed: int, steps: int = 4, taken: int = 0, guided: bool = False, **changes: Any) -> Run:
    """A run at a step of its own, of random numbers."""
    numbers = torch.Generator().manual_seed(seed)
    scheduler = changes.pop("scheduler", DDIMScheduler(clip_sample=False))
    length, size = changes.pop("length", 5), changes.pop("size", 8)
    text = torch.randn(2, 1, length, UNET["cross_attention_dim"], generator=numbers)
    job = Job(
        cond=Conditioning(text[0]),
        uncond=Conditioning(text[1]) if guided else None,
        guidance_scale=1.0 + seed,
        plan=scheduler.plan(steps),
        update=scheduler.update,
        shape=(1, 4, size, 8),
        dtype=torch.float32,
        generator=numbers,
    )
    made = Run.of(replace(job, **changes).from_noise())
    made.index = taken
    return made


def same(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().max() <= 1e-5 * b.abs().max())


def test_rows_at_other_steps_with_other_texts_and_guided_or_not_are_answered_as_alone(
    unet: UNet2DConditionModel,
) -> None:
    runs = [run(0), run(1, 2, 1), run(2, 8, 5, guided=True), run(3, 1), run(4, 4, 2, guided=True)]
    assert len({kind_of(r) for r in runs}) == 1
    together = answers(unet, runs)
    assert [len(x) for x in together] == [1, 1, 2, 1, 2]
    for output, each in zip(together, runs, strict=True):
        assert same(output, answer(unet, each.asks()))
    assert not same(together[0], together[1])


def test_runs_that_go_together_end_where_each_ends_alone(unet: UNet2DConditionModel) -> None:
    how: list[Any] = [(0, 4, 0, True), (1, 2, 0, False), (2, 3, 0, True)]
    lcm = LCMScheduler()
    runs = [run(*each, scheduler=lcm) for each in how]
    while under_way := [each for each in runs if not each.is_done]:
        for each, output in zip(under_way, answers(unet, under_way), strict=True):
            each.advance(output)
    for each, arguments in zip(runs, how, strict=True):
        alone = run(*arguments, scheduler=lcm)
        while not alone.is_done:
            alone.advance(answer(unet, alone.asks()))
        assert same(each.z, alone.z)


def test_guidance_that_is_an_input_differs_by_row() -> None:
    torch.manual_seed(1)
    lcm = UNet2DConditionModel(**LCM_UNET).eval()
    runs = []
    for seed in range(3):
        numbers = torch.Generator().manual_seed(seed)
        cond = replace(run(seed).job.cond, w=torch.randn(1, 32, generator=numbers))
        runs.append(run(seed, taken=seed, cond=cond, shape=(1, 8, 8, 8)))
    for output, each in zip(answers(lcm, runs), runs, strict=True):
        assert same(output, answer(lcm, each.asks()))


def test_a_run_alone_keeps_its_memo_and_is_answered_to_the_bit(unet: UNet2DConditionModel) -> None:
    each = run(0, guided=True)
    assert isinstance(each.told.memo, Memo)
    (output,) = answers(unet, [each])
    assert torch.equal(output, answer(unet, run(0, guided=True).asks()))
    assert each.told.memo.contexts


@pytest.mark.parametrize(
    "other",
    [
        {"length": 7},
        {"size": 16},
        {"scheduler": EulerDiscreteScheduler()},  # its times are no whole numbers
        {"extra_channels": torch.zeros(1, 5, 8, 8)},
        {"controls": (T2IAdapterControl((torch.zeros(1, 8, 4, 4),)),)},
    ],
    ids=["text", "size", "times", "channels", "control"],
)
def test_runs_whose_shapes_or_controls_differ_share_no_call(other: dict[str, Any]) -> None:
    assert kind_of(run(0)) == kind_of(run(1, 8, 3, guided=True))
    assert kind_of(run(0)) != kind_of(run(0, **other))


def test_controls_of_one_network_are_asked_once_and_steer_each_row_by_its_own_picture(
    unet: UNet2DConditionModel,
) -> None:
    torch.manual_seed(3)
    net = ControlNetModel.from_unet(unet).eval()
    for parameter in net.parameters():
        parameter.copy_(torch.randn(parameter.shape) * 0.1)
    hints = [torch.randn(1, 8, 8, 8, generator=torch.Generator().manual_seed(i)) for i in (1, 2)]
    controls = [ControlNetControl(net, hint, 0.7, end=0.8) for hint in hints]
    runs = [run(0, controls=(controls[0],)), run(1, 8, 3, guided=True, controls=(controls[1],))]
    assert kind_of(runs[0]) == kind_of(runs[1])
    for output, each in zip(answers(unet, runs), runs, strict=True):
        assert same(output, answer(unet, each.asks()))
        assert not same(output, answer(unet, replace(each.asks(), controls=())))
    assert kind_of(runs[0]) != kind_of(run(0, 4, 3, controls=(controls[0],)))  # off by then
    assert kind_of(runs[0]) != kind_of(run(0, controls=(replace(controls[0], scale=0.5),)))
    deep = replace(controls[0], guess_mode=True)
    others = replace(controls[1], guess_mode=True)
    assert kind_of(run(0, controls=(deep,))) != kind_of(run(0, controls=(others,)))


def test_features_of_adapters_are_added_row_by_row(unet: UNet2DConditionModel) -> None:
    def features(seed: int) -> tuple[Tensor, ...]:
        numbers = torch.Generator().manual_seed(seed)
        shapes = [(8, 4, 4), (16, 4, 4)]
        return tuple(torch.randn(1, *shape, generator=numbers) for shape in shapes)

    runs = [
        run(seed, taken=seed, guided=seed == 1, controls=(T2IAdapterControl(features(seed)),))
        for seed in range(3)
    ]
    for output, each in zip(answers(unet, runs), runs, strict=True):
        assert same(output, answer(unet, each.asks()))
        assert not same(output, answer(unet, replace(each.asks(), controls=())))
