"""The interfaces with the embedded model behind them."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import httpx
import numpy as np
import openai
import PIL.Image
import pytest
import torch
from server.asked import file, listening, packed, square, unpacked, until

import fewstep
from fewstep.server.worker import PipelineWorker


@pytest.fixture(scope="module")
def worker() -> PipelineWorker:
    made = PipelineWorker(fewstep.EMBEDDED.name, deterministic=True)
    made.start()
    assert made.wait_until_ready(60)
    return made


@pytest.fixture(scope="module")
def address(worker: PipelineWorker) -> Iterator[str]:
    with listening(worker) as found:
        yield found


def difference(a: PIL.Image.Image, b: PIL.Image.Image) -> int:
    """The largest of all channels of all pixels."""
    return int(np.abs(np.asarray(a, np.int16) - np.asarray(b, np.int16)).max())


def test_a_served_picture_is_the_pipelines_own_to_the_bit(address: str) -> None:
    pipe = fewstep.DiffusionPipeline.from_pretrained(fewstep.EMBEDDED)
    pipe.set_progress_bar_config(disable=True)
    own = pipe(
        "a red apple",
        num_inference_steps=3,
        guidance_scale=5.0,
        generator=torch.Generator().manual_seed(11),
    ).images[0]
    with openai.OpenAI(base_url=f"{address}/v1", api_key="any", max_retries=0) as client:
        more = {"seed": 11, "steps": 3, "guidance_scale": 5.0}
        answer = client.images.generate(prompt="a red apple", extra_body=more)
    assert difference(unpacked(answer.data[0].b64_json), own) == 0


def test_an_edit_leaves_what_is_outside_the_mask_to_the_bit(address: str) -> None:
    image = PIL.Image.effect_noise((64, 64), 90).convert("RGB")
    mask = PIL.Image.new("RGBA", (64, 64), (0, 0, 0, 255))
    mask.paste((0, 0, 0, 0), (0, 0, 24, 64))
    with openai.OpenAI(base_url=f"{address}/v1", api_key="any", max_retries=0) as client:
        answer = client.images.edit(
            image=("a.png", file(image)), mask=("m.png", file(mask)), prompt="a green pear"
        )
    drawn = unpacked(answer.data[0].b64_json)
    right, left = (40, 0, 64, 64), (0, 0, 16, 64)
    assert difference(drawn.crop(right), image.crop(right)) == 0
    assert difference(drawn.crop(left), image.crop(left)) > 0


def test_the_web_uis_image_to_image_stays_near_its_picture_at_a_low_strength(address: str) -> None:
    image = square("blue")
    asked = {"prompt": "a red apple", "seed": 1, "init_images": [packed(image)]}

    def distance(strength: float) -> float:
        more = {**asked, "denoising_strength": strength}
        answer = httpx.post(f"{address}/sdapi/v1/img2img", json=more, timeout=30).json()
        drawn = unpacked(answer["images"][0])
        return float(np.abs(np.asarray(drawn, float) - np.asarray(image, float)).mean())

    assert distance(0.1) < distance(0.95)


def test_who_leaves_frees_the_place_within_a_step(address: str, worker: PipelineWorker) -> None:
    host, _, port = address.removeprefix("http://").partition(":")
    body = b'{"prompt": "a cat", "steps": 50, "width": 256, "height": 256}'
    drawn = worker.load().drawn
    for _ in range(3):
        connection = socket.create_connection((host, int(port)))
        connection.sendall(
            f"POST /v1/generate HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(body)}\r\n"
            "Content-Type: application/json\r\nAccept: image/png\r\n\r\n".encode()
            + body
        )
        until(lambda: worker.load().running > 0)
        connection.close()
        until(lambda: worker.load().running == 0)
    assert worker.load().drawn == drawn and worker.load().cancelled >= 3
