"""Small pictures of what the end of a run will look like, from each step's prediction."""

from __future__ import annotations

from typing import Any

import numpy as np
import PIL.Image
import torch
from torch import Tensor

from ..models.vae_tiny import AutoencoderTiny
from ..ops.layers import held
from ..pipelines.approximations import check_tiny, tiny_beside
from ..pipelines.images import to_pil
from ..pipelines.previews import PreviewCallback

SMALL = 4 << 20  # parameters of a decoder that costs less than a step of its model
ENLARGED = 4  # pixels of a linear preview per latent, in each direction


class Previewer:
    """Pictures of latents, by the cheapest way that a model has.

    A tiny autoencoder in the model's folder `vae_tiny`; its own, if that is small; else the linear
    map from latents to colours that fits a first picture (`fit`), 4 pixels per latent.
    """

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe
        self.map: Tensor | None = None  # (C + 1, 3)
        self.decoder: PreviewCallback | None = None
        folder = tiny_beside(pipe.name_or_path)
        own = isinstance(pipe.vae, AutoencoderTiny) or is_small(pipe.vae.decoder)
        if folder is not None and not own:
            vae = AutoencoderTiny.from_pretrained(str(folder), torch_dtype=pipe.vae.dtype)
            check_tiny(vae, pipe.unet)
            self.decoder = PreviewCallback(unseen, vae=vae.to(pipe.vae.device))
        elif own:
            self.decoder = PreviewCallback(unseen)

    @torch.no_grad()
    def pictures(self, z0: Tensor) -> list[PIL.Image.Image]:
        """One for each row of latents (B, C, h, w), unchecked; none if `fit` was not called."""
        if self.decoder is not None:
            return self.decoder.decoded(self.pipe, z0)
        if self.map is None:
            return []
        colours = (with_ones(z0) @ self.map).clamp(0, 1)  # (B, h, w, 3)
        made = to_pil(colours.cpu().numpy())
        shape = (z0.shape[3] * ENLARGED, z0.shape[2] * ENLARGED)
        return [picture.resize(shape, PIL.Image.Resampling.BICUBIC) for picture in made]

    def fit(self, z0: Tensor, picture: PIL.Image.Image) -> None:
        """Learns the map from latents (1, C, h, w) and the picture that they were decoded to."""
        size = (z0.shape[3], z0.shape[2])
        small = picture.convert("RGB").resize(size, PIL.Image.Resampling.BOX)
        colours = torch.from_numpy(np.asarray(small, dtype=np.float32) / 255.0).reshape(-1, 3)
        given = with_ones(z0).reshape(-1, z0.shape[1] + 1).cpu()
        # A little ridge: the latents of one picture may not span all channels.
        square = given.T @ given + 1e-3 * len(given) * torch.eye(given.shape[1])
        self.map = torch.linalg.solve(square, given.T @ colours).to(z0.device)


def unseen(index: int, pictures: list[PIL.Image.Image]) -> None:
    """What a PreviewCallback hands pictures to, where they are asked for by `pictures` alone."""


def with_ones(z0: Tensor) -> Tensor:
    """Latents (B, C, h, w) as (B, h, w, C + 1) float32, the last of them 1."""
    pixels = z0.permute(0, 2, 3, 1).float()
    return torch.cat([pixels, torch.ones_like(pixels[..., :1])], dim=-1)


def is_small(decoder: torch.nn.Module) -> bool:
    """Whether a picture at every step costs little."""
    return sum(p.numel() for p in held(decoder)) <= SMALL


def shown_steps(steps: int, most: int) -> set[int]:
    """Which steps of a run, from 1, get a preview: at most `most`, spread, and not the last."""
    before = steps - 1
    if most <= 0 or before <= 0:
        return set()
    count = min(most, before)
    return {1 + round(i * (before - 1) / max(count - 1, 1)) for i in range(count)}
