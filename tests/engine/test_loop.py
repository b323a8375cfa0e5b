"""Promises of the recorded loop: it gives what the loop gives, waits for nothing, and is recorded
once whatever is drawn by it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import NOISE, VAE
from quick import Quick
from torch import Tensor
from traced import META, NoWaiting, Traced, Waited

from fewstep import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    TCDScheduler,
)
from fewstep.engine.graphs import Graphs
from fewstep.ops.layers import plain
from fewstep.pipelines.denoise import denoise
from fewstep.pipelines.recorded import count_draws, drawn, inputs_of, timed, without_tensors

KARRAS = {"use_karras_sigmas": True}
SDE = {"algorithm_type": "sde-dpmsolver++"}
CASES: dict[str, tuple[Any, float, int]] = {  # scheduler, eta, draws of three steps
    "lcm": (LCMScheduler(**NOISE), 0.0, 2),
    "lcm, bounded": (LCMScheduler(**NOISE | {"thresholding": True}), 0.0, 2),
    "tcd": (TCDScheduler(**NOISE), 0.3, 2),
    "tcd without noise": (TCDScheduler(**NOISE), 0.0, 0),
    "ddim": (DDIMScheduler(**NOISE), 0.0, 0),
    "ddim, eta 1": (DDIMScheduler(**NOISE), 1.0, 3),
    "ddpm": (DDPMScheduler(beta_schedule="linear"), 0.0, 2),
    "euler": (EulerDiscreteScheduler(), 0.0, 0),
    "euler, karras": (EulerDiscreteScheduler(**KARRAS), 0.0, 0),
    "euler a": (EulerAncestralDiscreteScheduler(), 0.0, 2),
    "dpm++ 2m": (DPMSolverMultistepScheduler(), 0.0, 0),
    "dpm++ 3m, karras": (DPMSolverMultistepScheduler(solver_order=3, **KARRAS), 0.0, 0),
    "dpm++ sde": (DPMSolverMultistepScheduler(**SDE), 0.0, 2),
    "pndm": (PNDMScheduler(skip_prk_steps=True), 0.0, 0),
}
case = pytest.mark.parametrize("name", CASES)


@pytest.fixture(autouse=True)
def _plain() -> Iterator[None]:
    with plain(), torch.no_grad():
        yield


def quick(name: str, **how: Any) -> tuple[Quick, float]:
    scheduler, eta, _ = CASES[name]
    return Quick(scheduler, graphs=Graphs(Traced()), **how), eta


@case
def test_the_recorded_loop_is_the_loop_bit_for_bit_for_every_prompt_seed_and_guidance(
    name: str,
) -> None:
    pipe, eta = quick(name)
    for seed, guidance in ((0, 7.5), (1, 7.5), (2, 3.25), (3, 1.7)):
        by_graph = pipe.draw(pipe.job(seed=seed, guidance=guidance, eta=eta), eta=eta)
        plainly = pipe.plainly(pipe.job(seed=seed, guidance=guidance, eta=eta))
        assert torch.equal(by_graph, plainly), (seed, guidance)
    assert pipe._graphs is not None
    assert (pipe._graphs.recordings, pipe._graphs.replays) == (1, 3)


@case
def test_as_much_noise_is_drawn_before_as_the_loop_would_draw(name: str) -> None:
    pipe, eta = quick(name)
    job = pipe.job(eta=eta)
    assert count_draws(job) == CASES[name][2]
    pipe.draw(job, eta=eta)
    other = pipe.job(eta=eta)
    pipe.plainly(other)
    for a, b in zip(job.generator, other.generator, strict=True):  # type: ignore[arg-type]
        assert torch.equal(a.get_state(), b.get_state())


def on_meta(name: str, guidance: float, rows: int = 2) -> tuple[Any, list[Tensor]]:
    """The function that is recorded, on a device without values, and its inputs."""
    pipe, eta = quick(name)
    pipe.on(META)
    job = pipe.job(guidance=guidance, eta=eta, device=META, rows=rows)
    facts = pipe._facts_of("k", job)
    inputs = inputs_of(job)
    if facts.draws:
        inputs["noise"] = torch.stack([job.draw() for _ in range(facts.draws)])
    names, bare = tuple(inputs), without_tensors(job, facts)

    def run(*tensors: Tensor) -> Tensor:
        given = dict(zip(names, tensors, strict=True))
        return denoise(timed(pipe.unet), drawn(bare, job.update, given))

    return run, list(inputs.values())


@case
def test_nothing_in_the_loop_waits_for_the_device(name: str) -> None:
    run, inputs = on_meta(name, guidance=7.5)
    with NoWaiting() as watch:
        assert run(*inputs).device == META
    assert watch.calls > 100


def test_the_watch_sees_what_waits() -> None:
    x = torch.zeros(2, device=META)
    for waits in (
        lambda: x.sum().item(),
        lambda: torch.tensor([1.0, 2.0]).to(META) + x,
        lambda: x.nonzero(),
        lambda: torch.as_tensor([1, 2]).to(x),
    ):
        with pytest.raises(Waited), NoWaiting():
            waits()


def test_the_loop_without_its_network_told_on_the_device_would_wait() -> None:
    pipe, _ = quick("lcm")
    pipe.on(META)
    with pytest.raises(Waited, match="copies"), NoWaiting():
        denoise(pipe.unet, pipe.job(device=META))


def test_decoding_waits_for_nothing() -> None:
    vae = AutoencoderKL(**VAE).eval().to(META)
    z = torch.zeros(2, 4, 8, 8, device=META)
    with NoWaiting() as watch:
        vae.decode(z, return_dict=False)
    assert watch.calls > 20


def test_decoding_is_recorded_for_each_shape_and_setting() -> None:
    pipe, _ = quick("lcm")
    graphs = pipe._graphs
    assert graphs is not None
    zs = [torch.randn(rows, 4, 4, 4) for rows in (1, 1, 1, 2, 2)]
    for z in zs:
        assert torch.equal(pipe.decoded(z), pipe.vae.decode(z, return_dict=False)[0])
    assert (graphs.recordings, graphs.replays) == (2, 3)
    pipe.vae.enable_slicing()
    pipe.decoded(zs[-1])
    assert graphs.replays == 3
    pipe.decoded(zs[0], is_settled=False)  # weights on their way through float32
    assert graphs.replays == 3


def test_a_guidance_distilled_network_takes_new_guidance_without_another_recording() -> None:
    pipe, _ = quick("lcm", embedded=True)
    drawn_by = [pipe.draw(pipe.job(guidance=g)) for g in (4.0, 4.0, 8.0)]
    assert torch.equal(drawn_by[2], pipe.plainly(pipe.job(guidance=8.0)))
    assert not torch.equal(drawn_by[1], drawn_by[2])
    assert pipe._graphs is not None and pipe._graphs.recordings == 1


def test_another_number_of_steps_is_another_graph_and_both_stay() -> None:
    pipe, _ = quick("lcm")
    for steps in (2, 2, 4, 4, 2, 4):
        assert torch.equal(pipe.draw(pipe.job(steps)), pipe.plainly(pipe.job(steps)))
    assert pipe._graphs is not None
    assert (pipe._graphs.recordings, pipe._graphs.replays) == (2, 4)
    assert pipe.advanced == 2 * 3 + 4 * 3


def test_weights_merged_in_place_take_effect_and_moved_ones_record_anew() -> None:
    pipe, _ = quick("lcm")
    before = [pipe.draw(pipe.job()) for _ in range(2)][1]
    pipe.unet.conv_in.weight.copy_(pipe.unet.conv_in.weight * 1.5)
    after = pipe.draw(pipe.job())
    assert torch.equal(after, pipe.plainly(pipe.job())) and not torch.equal(before, after)
    assert pipe._graphs is not None and pipe._graphs.recordings == 1
    pipe.unet.to(torch.float64).to(torch.float32)
    kept = pipe.draw(pipe.job())
    assert torch.equal(kept, after) and len(pipe._graphs) == 0


@pytest.mark.parametrize(
    "change",
    [
        lambda pipe: pipe.unet.enable_freeu(0.9, 0.2, 1.1, 1.2),
        lambda pipe: setattr(pipe, "scheduler", CASES["lcm, bounded"][0]),
    ],
    ids=["freeu", "scheduler"],
)
def test_settings_that_change_the_picture_are_no_old_graphs_business(change: Any) -> None:
    pipe, _ = quick("lcm")
    for _ in range(2):
        pipe.draw(pipe.job())
    change(pipe)
    assert torch.equal(pipe.draw(pipe.job()), pipe.plainly(pipe.job()))
    assert pipe._graphs is not None and pipe._graphs.replays == 1


def test_what_needs_python_between_steps_is_run_step_by_step() -> None:
    pipe, _ = quick("lcm")
    graphs = pipe._graphs
    assert graphs is not None
    for _ in range(2):
        pipe.draw(pipe.job(), callback=lambda *a: {})
        pipe.draw(replace(pipe.job(), keep=lambda z, t: z))
        pipe.draw(replace(pipe.job(), controls=(lambda *a, **k: None,)))  # type: ignore[arg-type]
        pipe.unet.train()
        pipe.draw(pipe.job())
        pipe.unet.eval()
    assert (graphs.recordings, graphs.replays, pipe.advanced) == (0, 0, 0)


def test_graphs_can_be_switched_off_and_are_then_forgotten() -> None:
    pipe, _ = quick("lcm")
    for _ in range(2):
        pipe.draw(pipe.job())
    pipe.enable_cuda_graphs(False)
    assert torch.equal(pipe.draw(pipe.job()), pipe.plainly(pipe.job()))
    assert pipe._graphs is None
    pipe.enable_cuda_graphs()
    pipe.draw(pipe.job())
    assert pipe._graphs is None, "there are none on a CPU"


def test_a_loop_that_cannot_be_recorded_is_drawn_all_the_same() -> None:
    scheduler, _, _ = CASES["lcm"]
    pipe = Quick(scheduler, graphs=Graphs(Traced(fails="no")))
    pipe.draw(pipe.job())
    with pytest.warns(UserWarning, match="runs step by step"):
        assert torch.equal(pipe.draw(pipe.job()), pipe.plainly(pipe.job()))


def test_half_precision_latents_are_guided_as_by_a_number() -> None:
    from fewstep.diffusion import classifier_free_guidance as guided

    torch.manual_seed(0)
    a, b = torch.randn(2, 3, 4, 4, 4).to(torch.bfloat16)
    for scale in (7.3, 1.1, 4.0):
        assert torch.equal(guided(a, b, torch.full((1,), scale)), guided(a, b, scale))
