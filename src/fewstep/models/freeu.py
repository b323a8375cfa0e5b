"""FreeU (Si et al. 2023, arXiv:2309.11497): stronger backbone, softer skips."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class FreeU(NamedTuple):
    """Scales of the skips (s) and of the backbone (b) in the first and second up block."""

    s1: float
    s2: float
    b1: float
    b2: float

    def apply(self, block: int, hidden: Tensor, skip: Tensor) -> tuple[Tensor, Tensor]:
        """Scaled (hidden, skip), each (B, C, H, W), of up block number `block`."""
        if block > 1:
            return hidden, skip
        s, b = (self.s1, self.b1) if block == 0 else (self.s2, self.b2)
        half = hidden.shape[1] // 2
        hidden = torch.cat([hidden[:, :half] * b, hidden[:, half:]], dim=1)
        return hidden, scale_low_frequencies(skip, s)


def scale_low_frequencies(x: Tensor, scale: float, radius: int = 1) -> Tensor:
    """x (B, C, H, W) with the frequencies within `radius` of zero multiplied by `scale`."""
    spectrum = torch.fft.fftshift(torch.fft.fftn(x.float(), dim=(-2, -1)), dim=(-2, -1))
    row, column = x.shape[-2] // 2, x.shape[-1] // 2
    mask = torch.ones(x.shape[-2:], device=x.device)
    mask[row - radius : row + radius, column - radius : column + radius] = scale
    filtered = torch.fft.ifftn(torch.fft.ifftshift(spectrum * mask, dim=(-2, -1)), dim=(-2, -1))
    return filtered.real.to(x.dtype)
