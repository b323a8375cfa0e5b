"""Writes the layout of single files: the inverse of what the package reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fewstep.checkpoints.known.names import (
    Names,
    clip_name,
    open_clip_name,
    unet_names,
    vae_names,
)

CLIP = ("cond_stage_model.transformer.", clip_name)


def original(state: Mapping[str, Tensor], names: Names, prefix: str = "") -> dict[str, Tensor]:
    """The tensors of a module under the original code's names."""
    found: dict[str, Tensor] = {}
    thirds: dict[str, list[tuple[int, Tensor]]] = {}
    for name, value in state.items():
        piece = names(name)
        key = prefix + piece.key
        if piece.third is not None:
            thirds.setdefault(key, []).append((piece.third, value))
            continue
        assert key not in found, f"two tensors are called {key}"
        found[key] = value.T.contiguous() if piece.transposed else value
    for key, parts in thirds.items():
        parts.sort(key=lambda part: part[0])
        assert [index for index, _ in parts] == [0, 1, 2], key
        found[key] = torch.cat([value for _, value in parts])
    return found


def original_vae(state: Mapping[str, Tensor], config: Any, prefix: str = "") -> dict[str, Tensor]:
    """A VAE's tensors; its attention is of 1 x 1 convolutions there."""
    found = original(state, vae_names(config), prefix)
    for key, value in found.items():
        if ".mid.attn_1." in key and value.ndim == 2:
            found[key] = value[:, :, None, None]
    return found


def whole(pipe: Any) -> dict[str, Tensor]:
    """The single file of a pipeline: Stable Diffusion 1 or, with two text encoders, SDXL."""
    is_xl = hasattr(pipe, "text_encoder_2")
    prefix = "conditioner.embedders.0.transformer." if is_xl else CLIP[0]
    found = original(pipe.unet.state_dict(), unet_names(pipe.unet.config), "model.diffusion_model.")
    found |= original_vae(pipe.vae.state_dict(), pipe.vae.config, "first_stage_model.")
    found |= original(pipe.text_encoder.state_dict(), clip_name, prefix)
    if is_xl:
        second = pipe.text_encoder_2.state_dict()
        found |= original(second, open_clip_name, "conditioner.embedders.1.model.")
    return {key: value.contiguous() for key, value in found.items()}
