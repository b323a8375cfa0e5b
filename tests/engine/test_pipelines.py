"""Promises of whole pipelines whose loop and decoding are recorded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch
from torch import Tensor
from traced import Traced

from fewstep import (
    LatentConsistencyModelImg2ImgPipeline,
    LatentConsistencyModelPipeline,
    RequestError,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
)
from fewstep.engine.graphs import Graphs
from fewstep.ops.layers import plain


@pytest.fixture(autouse=True)
def _plain() -> Iterator[None]:
    with plain():
        yield


def recorded(kind: Any, folder: Path) -> Any:
    pipe = kind.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    pipe._graphs = Graphs(Traced())
    return pipe


def pictures(pipe: Any, prompt: str, seed: int, **how: Any) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    how = {"num_inference_steps": 2, "output_type": "pt", "generator": g} | how
    images: Tensor = pipe(prompt, **how).images
    return images


def same_with_and_without(pipe: Any, asked: list[dict[str, Any]]) -> tuple[int, int]:
    """(recordings, replays) of calls that draw the same without any."""
    found = [pictures(pipe, **how) for how in asked]
    counts = pipe._graphs.recordings, pipe._graphs.replays
    pipe.enable_cuda_graphs(False)
    for how, picture in zip(asked, found, strict=True):
        assert torch.equal(picture, pictures(pipe, **how))
    return counts


PROMPTS = [
    {"prompt": "a cat", "seed": 1},
    {"prompt": "a dog", "seed": 2},
    {"prompt": "", "seed": 3},
]


def test_an_lcm_draws_every_prompt_seed_and_guidance_by_two_graphs(lcm_folder: Path) -> None:
    pipe = recorded(LatentConsistencyModelPipeline, lcm_folder)
    asked = [how | {"guidance_scale": 3.0 + i} for i, how in enumerate(PROMPTS)]
    assert same_with_and_without(pipe, asked) == (2, 4)


def test_so_does_classifier_free_guidance(sd_folder: Path) -> None:
    pipe = recorded(StableDiffusionPipeline, sd_folder)
    asked = [how | {"guidance_scale": 3.0 + i, "eta": 1.0} for i, how in enumerate(PROMPTS)]
    assert same_with_and_without(pipe, asked) == (2, 4)


def test_so_does_picture_to_picture(lcm_folder: Path) -> None:
    pipe = recorded(LatentConsistencyModelImg2ImgPipeline, lcm_folder)
    image = PIL.Image.new("RGB", (32, 32), "red")
    assert same_with_and_without(pipe, [how | {"image": image} for how in PROMPTS]) == (2, 4)


def test_what_is_put_back_after_each_step_is_drawn_step_by_step(sd_folder: Path) -> None:
    pipe = recorded(StableDiffusionInpaintPipeline, sd_folder)
    how = {
        "image": PIL.Image.new("RGB", (64, 64), "red"),
        "mask_image": PIL.Image.new("L", (64, 64), 255),
    }
    assert same_with_and_without(pipe, [asked | how for asked in PROMPTS]) == (1, 2), "the decoding"


def test_a_callback_sees_every_step(lcm_folder: Path) -> None:
    pipe = recorded(LatentConsistencyModelPipeline, lcm_folder)
    seen: list[int] = []

    def see(pipe: Any, index: int, t: Any, tensors: Any) -> dict[str, Any]:
        seen.append(index)
        return {}

    for _ in range(3):
        pictures(pipe, "a cat", 1, callback_on_step_end=see)
    assert seen == [0, 1] * 3


def test_the_bar_reaches_its_end(lcm_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pipe = recorded(LatentConsistencyModelPipeline, lcm_folder)
    pipe.set_progress_bar_config(disable=False)
    for _ in range(3):
        pictures(pipe, "a cat", 1)
        assert "2/2" in capsys.readouterr().err


def test_the_command_refuses_to_compile_on_a_cpu(run: Callable[..., Any]) -> None:
    import fewstep.ops.layers as layers

    layers._plain = False  # as users have it; `plain` of these tests sets it back
    code, _, err = run("generate", "a cat", "--compile", "--device", "cpu")
    assert code != 0
    assert "--compile is for a GPU" in " ".join(err.split())


def test_compile_is_refused_on_a_cpu_before_anything_is_changed(lcm_folder: Path) -> None:
    import fewstep.ops.layers as layers

    layers._plain = False
    pipe = recorded(LatentConsistencyModelPipeline, lcm_folder)
    with pytest.raises(RequestError, match="on the cpu"):
        pipe.compile()
    assert not pipe.compiled and pipe.compile_progress == (0, 0)
