"""The fixed inputs of a UNet and of a decoder, by the configs in a checkpoint's folder.

They are drawn in float32 and rounded to the work's dtype, so that a side which computes in another
one is given the same numbers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoints.config import read_json
from .checkpoints import levels
from .sides import TIME
from .work import Setting


def noise(setting: Setting, seed: int, *shape: int) -> Tensor:
    """Normal numbers in the setting's dtype, on the work's device."""
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    rounded = drawn.to(getattr(torch, setting.work.dtype))
    return rounded.to(setting.work.device, getattr(torch, setting.dtype))


def config(setting: Setting, part: str, file: str = "config.json") -> dict[str, Any]:
    """A component's config."""
    return read_json(Path(setting.folder) / part / file)


def latent_size(setting: Setting) -> tuple[int, int]:
    """(h, w) of the work's pictures."""
    assert setting.work.size is not None
    width, height = setting.work.size
    scale = 2 ** (levels(config(setting, "vae")) - 1)
    return height // scale, width // scale


def latents(setting: Setting) -> Tensor:
    """What is decoded, (B, latent channels, h, w)."""
    channels = config(setting, "vae").get("latent_channels", 4)
    return noise(setting, 0, setting.work.batch, channels, *latent_size(setting))


def tokens(setting: Setting) -> int:
    """The length of an encoded prompt."""
    return int(config(setting, "tokenizer", "tokenizer_config.json").get("model_max_length", 77))


def unet_inputs(setting: Setting) -> dict[str, Any]:
    """z (B, C, h, w), a time, the text (B, L, D), and what else the network reads."""
    unet, rows = config(setting, "unet"), setting.work.batch
    channels, width = unet["in_channels"], unet["cross_attention_dim"]
    given: dict[str, Any] = {
        "sample": noise(setting, 0, rows, channels, *latent_size(setting)),
        "timestep": torch.tensor(TIME, device=setting.work.device),
        "encoder_hidden_states": noise(setting, 1, rows, tokens(setting), width),
    }
    if unet.get("time_cond_proj_dim"):
        given["timestep_cond"] = noise(setting, 2, rows, unet["time_cond_proj_dim"])
    if unet.get("addition_embed_type") == "text_time":
        times = noise(setting, 4, rows, 6)
        pooled = unet["projection_class_embeddings_input_dim"]
        pooled -= times.shape[1] * unet["addition_time_embed_dim"]
        text = noise(setting, 3, rows, pooled)
        given["added_cond_kwargs"] = {"text_embeds": text, "time_ids": times}
    return given
