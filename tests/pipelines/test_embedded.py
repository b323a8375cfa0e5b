"""What comes along with the embedded model: its teacher, a style, and an adapter for edges."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch

import fewstep
from fewstep import EMBEDDED
from fewstep.annotate import canny
from fewstep.pipelines.embedded import embedded_teacher


@pytest.fixture(scope="module")
def pipe() -> Any:
    pipe = fewstep.DiffusionPipeline.from_pretrained(EMBEDDED)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def drawn(pipe: Any, prompt: str, steps: int = 4, **arguments: Any) -> PIL.Image.Image:
    generator = torch.Generator().manual_seed(7)
    arguments = {"guidance_scale": 4.0, "num_inference_steps": steps} | arguments
    return pipe(prompt, generator=generator, **arguments).images[0]


def corners(picture: PIL.Image.Image) -> np.ndarray:
    """The mean colour (3,) of the corners."""
    pixels = np.asarray(picture.convert("RGB"), dtype=float)
    return pixels[[0, 0, -1, -1], [0, -1, 0, -1]].mean(0)


def test_all_companions_are_small() -> None:
    folders = [path for path in EMBEDDED.parent.iterdir() if path != EMBEDDED]
    assert {path.name for path in folders} == {
        "fewstep-emoji-blueprint",
        "fewstep-emoji-edges",
        "fewstep-emoji-teacher",
    }
    files = [file for folder in folders for file in folder.rglob("*.safetensors")]
    assert sum(file.stat().st_size for file in files) < 12e6


def test_the_teacher_takes_no_guidance_input_and_draws_what_the_model_draws(pipe: Any) -> None:
    teacher = embedded_teacher()
    teacher.set_progress_bar_config(disable=True)
    assert teacher.unet.config.time_cond_proj_dim is None
    assert teacher.get_list_adapters() == {}
    pictures = [
        np.asarray(drawn(made, "a red apple", steps, guidance_scale=3.0), dtype=float)
        for made, steps in ((teacher, 20), (pipe, 4))
    ]
    red = [picture[24:40, 24:40].mean((0, 1)) for picture in pictures]
    assert all(colour[0] > 150 > 100 > colour[2] for colour in red)
    assert all(picture[0, 0].min() > 200 for picture in pictures)


def test_the_style_turns_the_paper_blue_and_comes_off_again(pipe: Any) -> None:
    before = drawn(pipe, "a house")
    pipe.load_lora_weights(EMBEDDED.parent / "fewstep-emoji-blueprint")
    styled = corners(drawn(pipe, "a house"))
    pipe.unload_lora_weights()
    assert corners(before).min() > 200
    assert styled[2] > 180 and styled[0] < 110
    assert np.array_equal(np.asarray(drawn(pipe, "a house")), np.asarray(before))


@pytest.mark.parametrize("corner", [(0, 0), (28, 28)])
def test_the_adapter_puts_a_thing_where_the_edges_are(pipe: Any, corner: tuple[int, int]) -> None:
    sketch = PIL.Image.new("RGB", (64, 64), "white")
    sketch.paste(drawn(pipe, "a penguin").resize((36, 36)), corner)
    adapter = fewstep.T2IAdapter.from_pretrained(EMBEDDED.parent / "fewstep-emoji-edges")
    steered = fewstep.StableDiffusionAdapterPipeline(
        **pipe.components, adapter=adapter, requires_safety_checker=False
    )
    steered.set_progress_bar_config(disable=True)
    picture = drawn(steered, "a penguin", image=canny(sketch, 60, 120))
    ink = 255 - np.asarray(picture.convert("L"), dtype=float)
    ink[ink < 60] = 0
    middle = np.array([(ink.sum(axis) * np.arange(64)).sum() / ink.sum() for axis in (0, 1)])
    assert np.abs(middle - (np.array(corner) + 18)).max() < 9


def test_the_command_knows_them_by_name(tmp_path: Path) -> None:
    from fewstep.cli.additions import shipped

    assert shipped("fewstep-emoji-edges") == str(EMBEDDED.parent / "fewstep-emoji-edges")
    assert shipped("owner/fewstep-emoji-edges") == "owner/fewstep-emoji-edges"
    assert shipped("no-such-thing") == "no-such-thing"
