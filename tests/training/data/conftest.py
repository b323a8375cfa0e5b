"""Tiny pipelines, folders of tiny pictures, and recipes over them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import NOISE, TEXT_CHANNELS, UNET, VAE
from PIL import Image

from fewstep import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from fewstep.training.config import Recipe, parse_recipe

SPRITES = Path(__file__).parents[2] / "data" / "emoji"


@pytest.fixture(scope="session")
def sd(sd_folder: Path) -> Any:
    """A tiny Stable Diffusion: 8 pixels per latent."""
    pipe = StableDiffusionPipeline.from_pretrained(sd_folder)
    # Random weights give tiny deviations; these are worth a test.
    torch.nn.init.zeros_(pipe.vae.quant_conv.bias)
    return pipe


@pytest.fixture(scope="session")
def xl(tokenizer: Any, text_encoder: Any) -> Any:
    """A tiny SDXL."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    torch.manual_seed(0)
    stored = text_encoder.config.to_dict() | {"projection_dim": 24}
    unet = UNET | {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 8 * 6 + 24,
        "cross_attention_dim": 2 * TEXT_CHANNELS,
    }
    return StableDiffusionXLPipeline(
        vae=AutoencoderKL(**VAE),
        text_encoder=text_encoder,
        text_encoder_2=CLIPTextModelWithProjection(CLIPTextConfig.from_dict(stored)).eval(),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=UNet2DConditionModel(**unet),
        scheduler=DDIMScheduler(**NOISE),
    )


def noise(height: int, width: int, seed: int = 0) -> Image.Image:
    """A smooth picture of random colours."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Eight captioned pictures of several sizes, the captions in metadata.jsonl."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    lines = []
    for i in range(8):
        noise(48 + 8 * (i % 3), 48 + 16 * (i % 2), i).save(folder / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", "text": f"a cat {i % 4}"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture
def recipe(tmp_path: Path) -> Callable[..., Recipe]:
    """A recipe of given data; its cache is in `tmp_path`."""

    def make(path: object, **data: Any) -> Recipe:
        source = {"source": "folder", "path": str(path), "resolution": 32}
        if data.get("source") == "emoji":
            source = {"sprites": str(SPRITES), "size": 32}
        table = {
            "phase": "consistency",
            "folder": str(tmp_path / "run"),
            "seed": 3,
            "data": source | {"cache": str(tmp_path / "cache")} | data,
            "optimizer": {"lr": 1e-4},
            "run": {"steps": 1, "batch": 4},
            "consistency": {"base": "x", "sheet": {"prompts": ["a cat"]}},
        }
        return parse_recipe(table, "test")

    return make
