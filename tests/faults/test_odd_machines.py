"""Case 25: what lasts long, and processes that fork, leave weights, memory and pictures alone."""

from __future__ import annotations

import gc
import itertools
import os
import resource
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from bad_files import python
from server.asked import Served

from fewstep import DiffusionPipeline, RequestError

LAYERS = [
    f"unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_{letter}" for letter in "kv"
]
FEW, MANY = 60, 240  # pictures
PICTURE = {"num_inference_steps": 1, "height": 32, "width": 32, "guidance_scale": 1.0}


@pytest.fixture(scope="module")
def pipe(sd_folder: Path) -> Any:
    pipe: Any = DiffusionPipeline.from_pretrained(sd_folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: Any, seed: int = 3) -> np.ndarray:
    generator = torch.Generator().manual_seed(seed)
    return np.asarray(pipe("a cat", generator=generator, **PICTURE).images[0])


def resident() -> int:
    """Bytes of memory in use."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def lora(seed: int) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    return {
        f"{layer}.lora_{part}.weight": torch.randn(shape, generator=random)
        for layer in LAYERS
        for part, shape in (("A", (2, 32)), ("B", (16, 2)))
    }


def test_three_hundred_pictures_leave_nothing_in_memory(pipe: Any) -> None:
    """Case 25: 10,000 sequential pictures, in small; under 8 kB a picture."""
    for seed in range(FEW):
        draw(pipe, seed)
    gc.collect()
    before = resident()
    for seed in range(MANY):
        draw(pipe, seed)
    gc.collect()
    assert resident() - before < MANY * 8_000


def test_a_hundred_loras_come_and_go_and_the_weights_are_the_same_to_the_bit(pipe: Any) -> None:
    """Case 25: LoRA add and remove x 100; memory stays too."""
    state = {name: value.clone() for name, value in pipe.unet.state_dict().items()}
    picture = draw(pipe)
    for turn in range(100):
        if turn == 20:
            before = resident()
        pipe.load_lora_weights(lora(turn), adapter_name=f"lora {turn}")
        pipe.set_adapters(f"lora {turn}", 0.7)
        if turn % 10 == 0:
            assert (draw(pipe) != picture).any()
        pipe.delete_adapters(f"lora {turn}") if turn % 2 else pipe.unload_lora_weights()
    now = pipe.unet.state_dict()
    assert all(torch.equal(now[name], value) for name, value in state.items())
    assert (draw(pipe) == picture).all()
    assert resident() - before < 8 << 20


FORK = """
import os, sys, numpy, torch
from fewstep import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained(sys.argv[1])
pipe.set_progress_bar_config(disable=True)
def draw():
    generator = torch.Generator().manual_seed(3)
    return numpy.asarray(pipe("a cat", generator=generator, num_inference_steps=2).images[0])
before = draw()
child = os.fork()
if child == 0:
    os._exit(0 if (draw() == before).all() else 3)
_, status = os.waitpid(child, 0)
assert (draw() == before).all()
sys.exit(os.waitstatus_to_exitcode(status))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_forked_process_draws_the_same_picture(sd_folder: Path) -> None:
    """Case 25: fork after drawing, as pre-forking servers and data loaders do."""
    done = python("-c", FORK, sd_folder)
    assert done.returncode == 0, done.stderr


def test_a_prompt_of_no_text_is_refused_by_name(pipe: Any) -> None:
    """Case 25: bytes that are no UTF-8, as a locale of ASCII hands them over."""
    with pytest.raises(RequestError, match=r"prompt holds bytes .* no text"):
        pipe(os.fsdecode(b"a \xff"), **PICTURE)


def test_a_clock_that_is_set_back_or_forth_ends_no_picture_and_no_address(
    real: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Case 25: deadlines, rates and what is kept for a while go by a clock that nobody sets."""
    clock, jumps = time.time, itertools.cycle((-1e8, 1e8, 0.0))
    asked = {"prompt": "a cat", "response_format": "url"}
    with httpx.Client(base_url=real.address, timeout=30) as client:
        monkeypatch.setattr(time, "time", lambda: clock() + next(jumps))
        answer = client.post("/v1/images/generations", json=asked)
        assert answer.status_code == 200
        assert client.get(answer.json()["data"][0]["url"]).status_code == 200
        plain = client.post("/v1/generate", json={"prompt": "a cat", "seconds": 20.0})
        assert "event: picture" in plain.text
