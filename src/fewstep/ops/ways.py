"""Which of our own kernels computes a layer, and what they read of it.

Measured on Zen 4 with one thread, in networks that the caches do not hold.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from ..kernels import linear, winograd

# Rows, or pixels of x, up to which our own kernel is quicker than oneDNN: its calls cost less, and
# it reads the weights once, where it can in half the bytes.
FEW = 256
FEW_WEIGHTS = 1 << 17  # inputs times outputs of 3x3 convolutions; with more oneDNN is quicker
# The same, and the pixels, up to which Winograd's algorithm keeps its weights prepared, 4 times as
# large, and what reading them costs, in pixels of direct convolution.
SMALL, SMALL_PIXELS = 1 << 16, 1 << 10
TILE_COST, READ_COST = 5, 12

# What a weight can be packed for instead of a size: our own kernel, with a gate, Winograd's.
OURS, GATED, WINOGRAD = (0,), (1,), (2,)


class Prepared(NamedTuple):
    """A weight for Winograd's algorithm, and as it was."""

    values: Tensor
    weight: Tensor

    def to_dense(self) -> Tensor:
        return self.weight


@lru_cache(maxsize=4096)
def winograd_way(
    channels: int, outputs: int, height: int, width: int, dtype: torch.dtype
) -> Literal["prepared", "plain"] | None:
    """Whether Winograd's algorithm pays, and with which weights."""
    if channels % winograd.LANES or outputs % winograd.PANEL or not winograd.available():
        return None
    if dtype != torch.float32:
        return "plain" if winograd.pays(channels, outputs, height, width, dtype) else None
    tiles = -(-height // winograd.TILE) * -(-width // winograd.TILE)
    pays = height * width >= 1.5 * (TILE_COST * tiles + READ_COST)
    if pays and channels * outputs <= SMALL and height * width <= SMALL_PIXELS:
        return "prepared"
    return "plain" if winograd.pays(channels, outputs, height, width) else None


def norm_of(norm: nn.LayerNorm | None) -> linear.Norm | None:
    """A layer norm as our kernel reads it."""
    if norm is None:
        return None
    weight, bias = norm._parameters["weight"], norm._parameters["bias"]
    assert weight is not None and bias is not None  # it fuses
    return weight, bias, norm.eps


def is_watched(module: nn.Module) -> bool:
    """Whether somebody sees what goes through a module, which may not be passed by then."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def by_row(shift: Tensor | None, x: Tensor) -> Tensor | None:
    """A shift (1, O) as (B, O), x (B, ...)."""
    return shift if shift is None else shift.expand(len(x), -1)
