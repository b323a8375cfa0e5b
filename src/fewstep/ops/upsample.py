"""A convolution of a picture that nearest neighbours have enlarged twice, without enlarging it.

Of the nine pixels that a 3x3 convolution sees in such a picture, at most four differ. So each of
the four places in an enlarged pixel is a 2x2 convolution of the small picture, by sums of the
weights: 2.25 times fewer products.

Shapes: B batch, C and O channels, h and w height and width before.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .layers import Conv2d, infers, onednn, packable
from .memory import release_pages

HALVES = (((0,), (1, 2)), ((0, 1), (2,)))  # place -> the rows of weights that meet each of 2 pixels

FEWEST = 128  # channels; with less, moving the pixels costs what the products save


def place_weights(weight: Tensor) -> Tensor:
    """The 2x2 convolutions (4 O, C, 2, 2) of the four places, of one 3x3 (O, C, 3, 3)."""
    outputs, channels = weight.shape[:2]
    four = weight.new_empty(2, 2, outputs, channels, 2, 2)
    # Pixel by pixel: all at once would take the memory of several weights.
    for a, b, i, j in product((0, 1), repeat=4):
        seen = weight[:, :, list(HALVES[a][i])][..., list(HALVES[b][j])]
        four[a, b, :, :, i, j] = seen.float().sum((2, 3))
    return four.flatten(0, 2)


class UpConv2d(Conv2d):
    """The 3x3 convolution behind an enlargement; a Conv2d in all but `enlarged`."""

    _places: Any = None  # the packed weights of the places, the weight and the size they are for

    def enlarged(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """The convolution (B, O, H, W) of x (B, C, h, w) enlarged to `size`, (H, W)."""
        twice = size == (2 * x.shape[2], 2 * x.shape[3]) and self.in_channels >= FEWEST
        if x.dtype == torch.float32:  # where Winograd's algorithm has fewer products yet
            twice = twice and self.winograd_way(x, size) is None
        if twice and type(self) is UpConv2d and infers(x, self) and packable(x.dtype):
            return self.by_places(x)
        return self(F.interpolate(x, size=size, mode="nearest"))

    def by_places(self, x: Tensor) -> Tensor:
        """The convolution (B, O, 2 h, 2 w) of x (B, C, h, w) enlarged twice."""
        (rows, _, h, w), outputs = x.shape, self.out_channels
        x = x.contiguous(memory_format=torch.channels_last)
        how = ([1, 1], [1, 1], [1, 1], 1)
        y = onednn._convolution_pointwise(x, self.places(x), None, *how, "none", [], "")
        y = y.permute(0, 2, 3, 1).unflatten(3, (2, 2, outputs))  # (B, h + 1, w + 1, 2, 2, O)
        out = y.new_empty(rows, h, 2, w, 2, outputs)
        bias = self._parameters["bias"]
        for a in (0, 1):
            for b in (0, 1):
                part = y[:, a : a + h, b : b + w, a, b]
                target = out[:, :, a, :, b]
                torch.add(part, 0 if bias is None else bias, out=target)
        return out.view(rows, 2 * h, 2 * w, outputs).permute(0, 3, 1, 2)

    def places(self, x: Tensor) -> Any:
        """The packed weights of the four places, made when the weight or the size is another."""
        weight, size = self.weight, tuple(x.shape[1:])
        key = (weight.data_ptr(), weight._version, weight.dtype, size)
        if self._places is None or self._places[0] != key:
            four = place_weights(weight.detach())
            how = ([1, 1], [1, 1], [1, 1], 1)
            packed = onednn._reorder_convolution_weight(four, *how, [1, *size])
            self._places = (key, packed)
            release_pages(weight)
        return self._places[1]

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_places": None}


class Upsample(nn.Module):
    """Nearest-neighbour enlargement to twice the size, or to a given (H, W), and a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv: nn.Module = UpConv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        size = (2 * x.shape[2], 2 * x.shape[3]) if size is None else size
        if isinstance(self.conv, UpConv2d):
            return self.conv.enlarged(x, size)
        return self.conv(F.interpolate(x, size=size, mode="nearest"))
