"""Guidance: classifier-free, rescaled, and as an input of the network.

`guidance_scale` g is diffusers' number (1 = no guidance); the paper's omega is w = g - 1.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .noise_schedule import expand


def classifier_free_guidance(
    positive: Tensor, negative: Tensor, guidance_scale: Tensor | float
) -> Tensor:
    """negative + g (positive - negative), g a number or one per row (Ho and Salimans 2022)."""
    change = positive - negative
    if isinstance(guidance_scale, Tensor):
        # Multiplied in float32 at least and rounded once, as by a number.
        dtype = torch.promote_types(change.dtype, torch.float32)
        scale = expand(guidance_scale, change).to(dtype)
        return negative + (scale * change).to(change.dtype)
    return negative + guidance_scale * change


def rescale_guidance(guided: Tensor, positive: Tensor, rescale: float) -> Tensor:
    """`guided` with its standard deviation pulled to `positive`'s by the share `rescale`.

    Per row over all other dimensions (Lin et al. 2024, sec. 3.4).
    """
    dims = list(range(1, positive.ndim))
    matched = guided * (positive.std(dims, keepdim=True) / guided.std(dims, keepdim=True))
    return rescale * matched + (1 - rescale) * guided


def guidance_embedding(w: Tensor, dim: int) -> Tensor:
    """Sinusoidal embedding (B, dim) float32 of the paper's omega, `w` (B,): sines, then cosines.

    Not the timestep's embedding: w is scaled by 1000 and the frequencies end at exactly 1/10000.
    """
    half = dim // 2
    frequencies = torch.exp(
        torch.arange(half, dtype=torch.float32, device=w.device) * -(math.log(10000.0) / (half - 1))
    )
    angles = 1000.0 * w.float()[:, None] * frequencies
    embedding = torch.cat([angles.sin(), angles.cos()], dim=1)
    return torch.nn.functional.pad(embedding, (0, dim % 2))
