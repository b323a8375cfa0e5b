"""Graphs and compilations on a GPU: the same pictures, and nothing recorded or compiled twice.

    pytest tests/gpu -m gpu

The same logic is tested without a GPU in tests/engine; here it meets real graphs and a compiler.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from conftest import NOISE
from quick import Quick
from torch import Tensor
from torch._dynamo.utils import counters

from fewstep import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    TCDScheduler,
)
from fewstep.checkpoints.lora_formats import Change
from fewstep.models.lora import Adapter, adapters_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU of CUDA"),
]
SCHEDULERS: dict[str, Any] = {
    "lcm": (LCMScheduler(**NOISE), 0.0),
    "tcd": (TCDScheduler(**NOISE), 0.3),
    "ddim": (DDIMScheduler(**NOISE), 0.0),
    "euler": (EulerDiscreteScheduler(), 0.0),
    "euler a": (EulerAncestralDiscreteScheduler(), 0.0),
    "dpm++ 2m": (DPMSolverMultistepScheduler(), 0.0),
}
GPU = "cuda:0"


@pytest.fixture(autouse=True)
def _strict() -> Iterator[None]:
    counters.clear()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")  # a graph that cannot be recorded warns
        yield


def quick(scheduler: Any, **how: Any) -> Quick:
    return Quick(scheduler, **how).on(torch.device(GPU))


def near(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a.float(), b.float(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_prompt_seed_and_guidance_replays_one_graph_of_the_loop(name: str) -> None:
    scheduler, eta = SCHEDULERS[name]
    pipe = quick(scheduler)
    for seed, guidance in ((0, 7.5), (1, 7.5), (2, 3.25), (3, 1.7), (0, 7.5)):
        job = pipe.job(seed=seed, guidance=guidance, eta=eta, device=GPU)
        plainly = pipe.plainly(pipe.job(seed=seed, guidance=guidance, eta=eta, device=GPU))
        assert near(pipe.draw(job, eta=eta), plainly), (seed, guidance)
    assert pipe._graphs is not None
    assert (pipe._graphs.recordings, pipe._graphs.replays) == (1, 4)


def test_half_precision_and_guidance_as_an_input() -> None:
    pipe = quick(SCHEDULERS["lcm"][0], embedded=True)
    pipe.unet.to(torch.bfloat16)
    for guidance in (4.0, 4.0, 8.0):
        job = pipe.job(guidance=guidance, device=GPU, dtype=torch.bfloat16)
        again = pipe.job(guidance=guidance, device=GPU, dtype=torch.bfloat16)
        assert torch.equal(pipe.draw(job), pipe.plainly(again))
    assert pipe._graphs is not None and pipe._graphs.recordings == 1


def test_graphs_of_several_plans_and_shapes_share_memory_without_harm() -> None:
    pipe = quick(SCHEDULERS["lcm"][0])
    z = torch.randn(1, 4, 16, 16, device=GPU)
    for steps, rows in ((2, 1), (4, 1), (2, 3), (2, 1), (4, 1), (2, 3), (4, 1), (2, 1), (2, 3)):
        drawn = pipe.draw(pipe.job(steps, rows=rows, device=GPU))
        pictures = pipe.decoded(z)
        assert near(drawn, pipe.plainly(pipe.job(steps, rows=rows, device=GPU)))
        assert near(pictures, pipe.vae.decode(z, return_dict=False)[0])
    assert pipe._graphs is not None and pipe._graphs.recordings == 4


def test_calls_on_other_streams_wait_for_one_another() -> None:
    pipe = quick(SCHEDULERS["lcm"][0])
    expected = [pipe.plainly(pipe.job(seed=seed, device=GPU)) for seed in range(6)]
    found = []
    for seed in range(6):
        with torch.cuda.stream(torch.cuda.Stream()):
            found.append(pipe.draw(pipe.job(seed=seed, device=GPU)))
    torch.cuda.synchronize()
    assert all(near(a, b) for a, b in zip(found, expected, strict=True))


def test_a_lora_that_is_merged_after_the_recording_takes_effect_without_another() -> None:
    pipe = quick(SCHEDULERS["lcm"][0])
    before = [pipe.draw(pipe.job(device=GPU)) for _ in range(3)][2]
    name = next(n for n, _ in pipe.unet.named_modules() if n.endswith("attn2.to_q"))
    width = pipe.unet.get_submodule(name).weight.shape
    parts = {"up": torch.ones(width[0], 2), "down": torch.ones(2, width[1])}
    adapters = adapters_of(pipe.unet)
    adapters.loaded["a"] = Adapter({name: Change(parts)})
    adapters.weights["a"] = 1.0
    adapters.merge(pipe.unet)
    after = pipe.draw(pipe.job(device=GPU))
    assert near(after, pipe.plainly(pipe.job(device=GPU))) and not near(after, before)
    adapters.weights.clear()
    adapters.merge(pipe.unet)
    assert torch.equal(pipe.draw(pipe.job(device=GPU)), before)
    assert pipe._graphs is not None and pipe._graphs.recordings == 1


def test_weights_that_move_to_the_cpu_and_back_are_recorded_anew() -> None:
    pipe = quick(SCHEDULERS["lcm"][0])
    expected = [pipe.draw(pipe.job(device=GPU)) for _ in range(3)][2]
    pipe.on(torch.device("cpu"))
    kept = [torch.empty_like(p, device=GPU) for p in pipe.unet.parameters()]
    pipe.on(torch.device(GPU))
    for _ in range(3):
        assert near(pipe.draw(pipe.job(device=GPU)), expected)
    assert kept and pipe._graphs is not None and pipe._graphs.recordings == 2


def test_convolutions_keep_their_channels_last() -> None:
    pipe = quick(SCHEDULERS["lcm"][0])
    pipe.draw(pipe.job(device=GPU))
    assert pipe.unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    address = pipe.unet.conv_in.weight.data_ptr()
    pipe.draw(pipe.job(device=GPU))
    assert pipe.unet.conv_in.weight.data_ptr() == address


@pytest.mark.parametrize("background", [True, False])
def test_compiled_blocks_take_over_and_compile_nothing_new(background: bool, tmp_path: Any) -> None:
    pipe = quick(SCHEDULERS["lcm"][0])
    z = torch.randn(1, 4, 8, 8, device=GPU)
    expected = [pipe.plainly(pipe.job(seed=1, device=GPU)), pipe.vae.decode(z).sample]
    pipe.compile(background=background, cache_dir=tmp_path)
    pipe.draw(pipe.job(device=GPU)), pipe.decoded(z)
    assert pipe.wait_until_compiled(300)
    made = counters["stats"]["unique_graphs"]
    for _ in range(3):  # compiled; recorded; replayed
        found = [pipe.draw(pipe.job(seed=1, device=GPU)), pipe.decoded(z)]
        assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(found, expected, strict=True))
    pipe.draw(pipe.job(steps=5, seed=2, device=GPU))
    assert counters["stats"]["unique_graphs"] == made > 0 and not counters["graph_break"]


def test_a_pipeline_draws_the_same_pictures_with_and_without_graphs(lcm_folder: Any) -> None:
    pipe = LatentConsistencyModelPipeline.from_pretrained(lcm_folder).to(GPU)
    pipe.set_progress_bar_config(disable=True)

    def pictures(prompt: str, seed: int) -> Any:
        g = torch.Generator("cpu").manual_seed(seed)
        how = {"num_inference_steps": 3, "output_type": "np", "generator": g}
        return torch.from_numpy(pipe(prompt, **how).images)

    asked = [("a cat", 1), ("a dog", 2), ("red", 3)]
    found = [pictures(*a) for a in asked]
    assert pipe._graphs is not None and pipe._graphs.recordings == 2
    pipe.enable_cuda_graphs(False)
    assert all(near(a, pictures(*b)) for a, b in zip(found, asked, strict=True))
