"""A recipe on a tiny model: the same family and method, random weights, made-up pictures.

It runs every line that the real run will run, in seconds, and leaves nothing behind.
"""

from __future__ import annotations

import contextlib
import io
import json
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..checkpoints.known.clip_tokenizer import clip_tokenizer
from ..models.unet import UNet2DConditionModel
from ..models.vae import AutoencoderKL
from ..pipelines.base import DiffusionPipeline
from ..pipelines.catalog import StableDiffusionPipeline, StableDiffusionXLPipeline
from ..schedulers import scheduler_from_config
from .bases import Base
from .config import ConsistencyPhase, Pictures, Recipe, Scenes
from .run import train

WIDTH = 32  # channels of each text
LATENT = 8  # a side
PICTURES = 6
TEXT: dict[str, Any] = {
    "hidden_size": WIDTH,
    "intermediate_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "projection_dim": WIDTH,
    "vocab_size": 49408,
    "max_position_embeddings": 77,
}


def rehearse(recipe: Recipe, base: Base, device: torch.device) -> None:
    """Train two steps of a recipe of the consistency phase, with a sheet and the result's files.

    Whatever the real run would raise because of its settings is raised.
    """
    with TemporaryDirectory(prefix="fewstep-dry-run-") as place:
        folder = Path(place)
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(0)
            small_pipeline(base).save_pretrained(folder / "base")
        if isinstance(recipe.data, Pictures):
            write_pictures(folder / "pictures", LATENT * base.factor)
        with contextlib.redirect_stderr(io.StringIO()):  # of bars
            train(small_recipe(recipe, base, folder, device))


def small_recipe(recipe: Recipe, base: Base, folder: Path, device: torch.device) -> Recipe:
    """The recipe with a model, pictures, steps and files of its own in `folder`."""
    settings, run = recipe.settings, recipe.run
    assert isinstance(settings, ConsistencyPhase)
    parts = min(run.accumulate, 2)
    sheet = replace(
        settings.sheet,
        prompts=settings.sheet.prompts[:2],
        steps=settings.sheet.steps[:2],
        teacher_steps=2,
    )
    small = replace(
        settings,
        base=str(folder / "base"),
        unet="",
        vae="",
        variant="",
        revision="",
        sheet=sheet,
        lora=settings.lora and replace(settings.lora, rank=min(settings.lora.rank, 4)),
        output=replace(settings.output, push_to=""),
    )
    on_cpu = device.type == "cpu"
    return replace(
        recipe,
        folder=str(folder / "run"),
        data=small_data(recipe.data, folder, LATENT * base.factor),
        optimizer=replace(recipe.optimizer, kind="adamw" if on_cpu else recipe.optimizer.kind),
        run=replace(
            run,
            steps=2,
            batch=2 * parts,
            accumulate=parts,
            device=device.type,
            threads=0,
            compile=False,
            shard=False,
            sheet_steps=min(run.sheet_steps, 1),
            trackers=(),
        ),
        settings=small,
    )


def small_data(data: Scenes | Pictures, folder: Path, size: int) -> Scenes | Pictures:
    """Few small samples, treated as the recipe says."""
    held = min(data.held_out, 1)
    cache = str(folder / "cache")
    if isinstance(data, Scenes):
        return replace(data, scenes=PICTURES, size=size, workers=0, held_out=held, cache=cache)
    return replace(
        data,
        source="folder",
        path=str(folder / "pictures"),
        caption_key="text",
        resolution=size,
        min_side=0,
        limit=0,
        held_out=held,
        workers=0,
        cache=cache,
    )


def write_pictures(folder: Path, size: int) -> None:
    """A folder of captioned noise, high and wide."""
    folder.mkdir()
    numbers = np.random.default_rng(0)
    lines = []
    for index in range(PICTURES):
        shape = (size + 8 * (index % 2), size + 8 * (index % 3), 3)
        pixels = numbers.integers(0, 256, shape, dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
        lines.append(json.dumps({"file_name": f"{index}.png", "text": f"picture {index}"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def small_pipeline(base: Base) -> DiffusionPipeline:
    """A pipeline of the base's family with few channels and random weights."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    vae = dict(base.configs.get("vae", {}))
    vae |= {"block_out_channels": (8,) * base.levels, "norm_num_groups": 4}
    components: dict[str, Any] = {
        "vae": AutoencoderKL.from_config(vae | {"layers_per_block": 1, "sample_size": None}),
        "text_encoder": CLIPTextModel(CLIPTextConfig(**TEXT)),
        "tokenizer": clip_tokenizer(),
        "unet": UNet2DConditionModel.from_config(small_unet(base)),
        "scheduler": scheduler_from_config(base.configs["scheduler"]),
    }
    if not base.is_xl:
        return StableDiffusionPipeline(**components, requires_safety_checker=False)
    components["text_encoder_2"] = CLIPTextModelWithProjection(CLIPTextConfig(**TEXT))
    components["tokenizer_2"] = clip_tokenizer("!")
    return StableDiffusionXLPipeline(**components)


def small_unet(base: Base) -> dict[str, Any]:
    """The UNet's config with few channels and one transformer layer wherever it has some."""
    config = dict(base.configs["unet"])
    config |= {
        "block_out_channels": (8, *(16,) * (len(config.get("block_out_channels", (1,) * 4)) - 1)),
        "norm_num_groups": 4,
        "attention_head_dim": 2,
        "cross_attention_dim": 2 * WIDTH if base.is_xl else WIDTH,
        "sample_size": LATENT,
        "layers_per_block": config.get("layers_per_block", 2),
    }
    for name in ("transformer_layers_per_block", "reverse_transformer_layers_per_block"):
        if config.get(name) is not None:
            config[name] = thinned(config[name])
    if config.get("addition_embed_type") == "text":
        config["addition_embed_type_num_heads"] = 4
    if base.is_xl:
        config["addition_time_embed_dim"] = LATENT
        config["projection_class_embeddings_input_dim"] = 6 * LATENT + WIDTH
    return config


def thinned(depth: Any) -> Any:
    """Numbers of layers, at most one each."""
    return min(depth, 1) if isinstance(depth, int) else tuple(map(thinned, depth))
