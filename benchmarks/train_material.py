"""What the training benchmark works on: a model of random weights, and synthetic pictures."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

TOKENS = 77  # the published script pads to so many, whatever the tokenizer says
COLOURS = ("red", "green", "blue", "yellow", "black", "white", "grey", "orange")
THINGS = ("apple", "house", "river", "cat", "mountain", "ship", "tree", "lamp")


@dataclass(frozen=True)
class Size:
    """The configs of a model's networks."""

    unet: Mapping[str, Any]
    vae: Mapping[str, Any]
    text: Mapping[str, Any]
    resolution: int  # its own, in pixels
    batch: int


def size_of(name: str) -> Size:
    """`full` is Stable Diffusion 1.5; `tiny` has its proportions at a 40th of its parameters.

    In proportion: what VAE and text encoder cost beside the UNet.
    """
    from fewstep.checkpoints.known import FAMILIES

    configs = FAMILIES["sd1"].configs
    if name == "full":
        return Size(configs["unet"], configs["vae"], configs["text_encoder"], 512, 1)
    unet = {
        "sample_size": 16,
        "block_out_channels": (80, 160, 320),
        "norm_num_groups": 16,
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": 80,
        "attention_head_dim": 4,
    }
    vae = {"block_out_channels": (24, 48, 96, 96), "norm_num_groups": 24, "sample_size": 128}
    text = {"hidden_size": 80, "intermediate_size": 320, "num_hidden_layers": 4}
    text |= {"num_attention_heads": 4, "vocab_size": 1000, "max_position_embeddings": TOKENS}
    return Size(
        {**configs["unet"], **unet},
        {**configs["vae"], **vae},
        {**configs["text_encoder"], **text},
        128,
        4,
    )


def make_model(name: str, folder: Path) -> None:
    """Write a pipeline of random weights, the same each time, in diffusers' layout."""
    import torch
    from transformers import CLIPTextConfig, CLIPTextModel

    from fewstep import (
        AutoencoderKL,
        DDIMScheduler,
        StableDiffusionPipeline,
        UNet2DConditionModel,
    )
    from fewstep.checkpoints.known import FAMILIES
    from fewstep.training.tokenizer import train_tokenizer

    torch.manual_seed(0)
    size = size_of(name)
    text = CLIPTextConfig(**{k: v for k, v in size.text.items() if k[0] != "_"})
    noise = {k: v for k, v in FAMILIES["sd1"].configs["scheduler"].items() if k[0] != "_"}
    words = [caption(i) for i in range(64)]
    beside = folder.with_name(f".{folder.name}.part")
    pipe = StableDiffusionPipeline(
        vae=AutoencoderKL(**size.vae),
        text_encoder=CLIPTextModel(text).eval(),
        tokenizer=train_tokenizer(words, text.vocab_size, TOKENS, beside / "tokenizer"),
        unet=UNet2DConditionModel(**size.unet),
        scheduler=DDIMScheduler(**{k: v for k, v in noise.items() if k != "skip_prk_steps"}),
        requires_safety_checker=False,
    )
    pipe.save_pretrained(beside)
    beside.rename(folder)


def caption(index: int) -> str:
    """What picture number `index` is said to show."""
    colour, thing = COLOURS[index % len(COLOURS)], THINGS[index // len(COLOURS) % len(THINGS)]
    return f"a {colour} {thing}, picture {index}"


def picture(index: int, side: int) -> bytes:
    """A JPEG file of smooth random colours, `side` pixels each way."""
    coarse = np.random.default_rng(index).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    smooth = Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC)
    file = io.BytesIO()
    smooth.save(file, "JPEG", quality=90)
    return file.getvalue()


def make_pictures(folder: Path, count: int, side: int) -> Path:
    """A folder of pictures with .txt files beside them, and the WebDataset shard of the same."""
    shard = folder.with_name(f"{folder.name}.tar")
    if shard.exists():
        return shard
    folder.mkdir(parents=True, exist_ok=True)
    beside = shard.with_suffix(".tar.part")
    with tarfile.open(beside, "w") as tar:
        for index in range(count):
            for suffix, data in (("jpg", picture(index, side)), ("txt", caption(index).encode())):
                name = f"{index:06d}.{suffix}"
                (folder / name).write_bytes(data)
                entry = tarfile.TarInfo(name)
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))
    beside.rename(shard)
    return shard
