"""Long videos: the network sees windows of the frames, whose outputs are blended.

Shapes: B videos, F frames, C latent channels, h and w latent height and width, L text tokens, D
text channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..models.motion_unet import UNetMotionModel


@dataclass(frozen=True, eq=False)
class Windows:
    """A motion UNet for any number of frames: it sees `length` at a time, next windows overlap.

    Where they do, their outputs are blended by weights that fall off towards a window's ends.
    """

    unet: UNetMotionModel
    length: int
    overlap: int

    def __call__(self, sample: Tensor, t: Tensor, text: Tensor, **inputs: Any) -> tuple[Tensor]:
        """The output (B, C, F, h, w), as of the UNet; `text` (B, L, D) or (B, F, L, D)."""
        spans = windows(sample.shape[2], self.length, self.overlap)
        if len(spans) == 1:
            return self.unet(sample, t, text, **inputs)
        total = torch.zeros_like(sample, dtype=torch.float32)
        weights = total.new_zeros(sample.shape[2], 1, 1)
        for start, stop in spans:
            own = text if text.ndim == 3 else text[:, start:stop]
            (output,) = self.unet(sample[:, :, start:stop], t, own, **inputs)
            weight = triangle(stop - start).to(weights)[:, None, None]
            total[:, :, start:stop] += weight * output
            weights[start:stop] += weight
        return ((total / weights).to(sample.dtype),)


def windows(frames: int, length: int, overlap: int) -> list[tuple[int, int]]:
    """(first, last + 1) of the windows over `frames`; the last one is moved back to be whole."""
    if frames <= length:
        return [(0, frames)]
    last = frames - length
    return [(start, start + length) for start in (*range(0, last, length - overlap), last)]


def triangle(length: int) -> Tensor:
    """Weights (length,): 1, 2, 3, ..., 3, 2, 1."""
    rising = torch.arange(1, length + 1)
    return torch.minimum(rising, rising.flip(0))
