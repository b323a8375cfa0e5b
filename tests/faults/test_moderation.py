"""Case 24: a model's safety checker that breaks, hangs or raves shows nothing and stops nobody."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from conftest import NOISE, UNET, VAE
from faults.wires import drawn
from server.asked import Served, error_of, serving, until

from fewstep import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from fewstep.pipelines.safety import StableDiffusionSafetyChecker
from fewstep.server import delivery
from fewstep.server.orders import Limits, Order
from fewstep.server.worker import PipelineWorker

VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
BAD = 666
Look = Callable[[Any], Any]


@pytest.fixture(scope="module")
def folder(tokenizer: Any, text_encoder: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose checker objects to nothing."""
    from transformers import CLIPConfig

    torch.manual_seed(3)
    checker = StableDiffusionSafetyChecker(CLIPConfig(vision_config=VISION, projection_dim=12))
    for weights in (checker.concept_embeds_weights, checker.special_care_embeds_weights):
        weights.data.fill_(2.0)  # of a cosine, out of reach
    pipe = StableDiffusionPipeline(
        vae=AutoencoderKL(**VAE),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=UNet2DConditionModel(**UNET),
        scheduler=DDIMScheduler(**NOISE),
        safety_checker=checker.eval(),
    )
    found = tmp_path_factory.mktemp("models") / "checked"
    pipe.save_pretrained(found)
    return found


@pytest.fixture(scope="module")
def served(folder: Path) -> Iterator[tuple[Served, PipelineWorker]]:
    worker = PipelineWorker(str(folder), Limits(waiting_per_client=64), picture_bytes=0)
    worker.start()
    assert worker.wait_until_ready(60)
    with serving(worker) as found:
        yield found, worker


@pytest.fixture
def looking(
    served: tuple[Served, PipelineWorker], monkeypatch: pytest.MonkeyPatch
) -> Callable[[Look], None]:
    """Lets the checker answer something else for the pictures of one seed."""
    work = served[1]._work
    assert work is not None
    checker = work.loaded.pipe.safety_checker
    usual = checker.forward

    def call(look: Look) -> None:
        def forward(pixel_values: Any) -> Any:
            seed = work.delivery._current[0].slot.place.order.seed
            return look(pixel_values) if seed == BAD else usual(pixel_values)

        monkeypatch.setattr(checker, "forward", forward)

    return call


async def answers_of(address: str) -> list[httpx.Response]:
    """Of four who ask at once, of whom one has the picture that is looked at badly."""

    async def ask(client: httpx.AsyncClient, seed: int) -> httpx.Response:
        fields = {"prompt": "a cat", "seed": seed, "steps": 2}
        return await client.post("/v1/generate", json=fields, headers={"Accept": "image/png"})

    async with httpx.AsyncClient(base_url=address, timeout=60) as client:
        return list(await asyncio.gather(*(ask(client, seed) for seed in (1, BAD, 3, 4))))


def raises(_: Any) -> Any:
    raise KeyError("/secret/place")


RAVES = {
    "nothing": [],
    "None": None,
    "one None": [None],
    "a word": ["no"],
    "two": [False, False],
    "NaN": [float("nan")],
    "a tensor": torch.tensor([False]),
    "False": False,
}


@pytest.mark.parametrize("name", ["raises", *RAVES])
def test_what_the_checker_does_not_clear_is_not_shown_and_the_others_are(
    served: tuple[Served, PipelineWorker], looking: Any, name: str
) -> None:
    """Case 24: a checker that raises, or answers what is no answer."""
    looking(raises if name == "raises" else lambda _: RAVES[name])
    first, bad, *others = asyncio.run(answers_of(served[0].address))
    told = error_of(bad, 500)
    assert told["code"] == "internal" and "secret" not in told["message"]
    assert {answer.status_code for answer in (first, *others)} == {200}


def delivering() -> list[threading.Thread]:
    """The threads that look at pictures and hand them over."""
    return [thread for thread in threading.enumerate() if thread.name == "fewstep-delivery"]


def test_a_checker_that_hangs_costs_its_own_picture_a_bounded_time(
    served: tuple[Served, PipelineWorker], looking: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Case 24: that one fails, those beside it are drawn, and the next is too."""
    monkeypatch.setattr(delivery, "LOOKING", 1.0)
    assert drawn(served[0], prompt="a dog", steps=1)  # so that its thread has begun
    threads, released = len(delivering()), threading.Event()
    looking(lambda _: [not released.wait(30)])
    try:
        first, bad, *others = asyncio.run(asyncio.wait_for(answers_of(served[0].address), 20))
        assert error_of(bad, 500)["code"] == "internal"
        assert {answer.status_code for answer in (first, *others)} == {200}
        assert drawn(served[0], prompt="a dog", steps=1)
        before = served[1].load()
    finally:
        released.set()
    until(lambda: len(delivering()) <= threads)
    assert served[1].load().drawn == before.drawn  # what comes too late counts for nothing


def test_a_preview_that_is_not_cleared_is_not_shown_either(
    served: tuple[Served, PipelineWorker], looking: Any
) -> None:
    """Case 24: steps are told without it."""
    looking(raises)

    async def events() -> list[Any]:
        ticket = served[1].submit(Order("a cat", seed=BAD, steps=4, previews=True))
        return [event async for event in ticket.events()]

    found = asyncio.run(asyncio.wait_for(events(), 20))
    assert not any(getattr(event, "preview", None) for event in found)
    assert found[-1].error.code == "internal"


def test_a_checker_of_numbers_that_are_none_clears_nothing(folder: Path) -> None:
    """Case 24: damaged weights."""
    checker = StableDiffusionPipeline.from_pretrained(folder).safety_checker
    assert checker is not None
    pictures = torch.rand(2, 3, 32, 32)
    assert checker(pictures) == [False, False]
    checker.visual_projection.weight.data[0, 0] = float("nan")
    assert checker(pictures) == [True, True]
