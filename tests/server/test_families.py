"""The worker draws what pipelines of other families and with ControlNets do, in shared steps."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from conftest import NOISE, TEXT_CHANNELS, UNET, VAE

from fewstep import (
    AutoencoderKL,
    AutoPipelineForImage2Image,
    AutoPipelineForInpainting,
    AutoPipelineForText2Image,
    ControlNetModel,
    LCMScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from fewstep.server.orders import Drawn, Limits, Order
from fewstep.server.worker import PipelineWorker

FAR = 1  # of 255, where rows share a call
TASKS = {
    "text": AutoPipelineForText2Image,
    "image": AutoPipelineForImage2Image,
    "inpaint": AutoPipelineForInpainting,
}


def scene(seed: int) -> PIL.Image.Image:
    numbers = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return PIL.Image.fromarray(numbers).resize((64, 64), PIL.Image.Resampling.BICUBIC)


def half() -> PIL.Image.Image:
    mask = PIL.Image.new("L", (64, 64), 0)
    mask.paste(255, (0, 0, 32, 64))
    return mask


@pytest.fixture(scope="module")
def xl_folder(tokenizer: Any, text_encoder: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny SDXL on disk."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    torch.manual_seed(4)
    stored = text_encoder.config.to_dict() | {"projection_dim": 32}
    unet = UNET | {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 8 * 6 + 32,
        "cross_attention_dim": 2 * TEXT_CHANNELS,
    }
    pipe = StableDiffusionXLPipeline(
        vae=AutoencoderKL(**VAE),
        text_encoder=text_encoder,
        text_encoder_2=CLIPTextModelWithProjection(CLIPTextConfig.from_dict(stored)).eval(),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=UNet2DConditionModel(**unet),
        scheduler=LCMScheduler(**NOISE),
    )
    folder = tmp_path_factory.mktemp("models") / "xl"
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def control_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ControlNet for the tiny Stable Diffusion, of random numbers throughout."""
    torch.manual_seed(5)
    net = ControlNetModel.from_unet(UNet2DConditionModel(**UNET))
    for parameter in net.parameters():
        parameter.data = torch.randn(parameter.shape) * 0.1
    folder = tmp_path_factory.mktemp("models") / "edges"
    net.save_pretrained(folder)
    return folder


def served(folder: Path, orders: list[Order], **how: Any) -> tuple[list[Drawn], Any]:
    """The pictures of orders that are sent at once, and how busy the worker was."""
    worker = PipelineWorker(str(folder), Limits(seconds=60), **how)
    worker.start()
    assert worker.wait_until_ready(60)

    async def main() -> list[Drawn]:
        tickets = [worker.submit(order) for order in orders]
        return await asyncio.gather(*(ticket.result() for ticket in tickets))

    try:
        return asyncio.run(asyncio.wait_for(main(), 60)), worker.load()
    finally:
        worker.drain(10)


def alone(folder: Path, order: Order, **added: Any) -> np.ndarray:
    """The picture of an order by the public pipeline."""
    pipe = TASKS[order.task].from_pretrained(folder, **added)
    pipe.set_progress_bar_config(disable=True)
    arguments: dict[str, Any] = {
        "prompt": order.prompt,
        "num_inference_steps": order.steps,
        "guidance_scale": order.guidance_scale,
        "generator": torch.Generator().manual_seed(order.seed),
    }
    if order.negative_prompt is not None:
        arguments["negative_prompt"] = order.negative_prompt
    if order.image is not None:
        arguments |= {"image": order.image, "strength": order.strength}
    if order.mask is not None:
        arguments |= {"mask_image": order.mask, "paste_back": True}
    if order.control is not None:
        arguments["image" if order.image is None else "control_image"] = order.control
        arguments["controlnet_conditioning_scale"] = order.control_scale
    return np.asarray(pipe(**arguments).images[0])


def far(drawn: Drawn, expected: np.ndarray) -> int:
    return int(np.abs(np.asarray(drawn.image).astype(int) - expected.astype(int)).max())


def orders_of_all_tasks(guidance: float) -> list[Order]:
    common: dict[str, Any] = {"guidance_scale": guidance, "negative_prompt": "a dog"}
    return [
        Order("a cat", seed=1, steps=4, **common),
        Order("a red dog", seed=2, steps=2, **common),
        Order("a cat", seed=3, steps=4, image=scene(1), strength=0.75, **common),
        Order("a red cat", seed=4, steps=3, image=scene(2), mask=half(), strength=1.0, **common),
    ]


def test_sdxl_in_shared_steps_is_sdxl_alone(xl_folder: Path) -> None:
    orders = orders_of_all_tasks(2.5)
    pictures, load = served(xl_folder, orders)
    assert load.rows > load.batches  # steps were shared
    for order, picture in zip(orders, pictures, strict=True):
        assert far(picture, alone(xl_folder, order)) <= FAR, order.task


def test_controlnets_in_shared_steps_steer_as_alone(sd_folder: Path, control_folder: Path) -> None:
    plain = orders_of_all_tasks(3.0)
    orders = [Order("a cat", seed=i, steps=3, guidance_scale=3.0, control=scene(i)) for i in (7, 8)]
    pictures, load = served(sd_folder, [*plain, *orders], control=str(control_folder))
    assert load.rows > load.batches
    net = ControlNetModel.from_pretrained(control_folder)
    for order, picture in zip([*plain, *orders], pictures, strict=True):
        added = {} if order.control is None else {"controlnet": net}
        assert far(picture, alone(sd_folder, order, **added)) <= FAR, order.task
    unsteered = alone(sd_folder, Order("a cat", seed=7, steps=3, guidance_scale=3.0))
    assert far(pictures[-2], unsteered) > 8
