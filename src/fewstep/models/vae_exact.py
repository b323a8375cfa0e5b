"""Decoding and encoding in stripes of rows: what the whole network gives, but for rounding, in a
fraction of its memory and without seams.

A convolution reads one row more on each side, so it can go stripe by stripe. Group norm needs the
mean and variance of the whole map: its input is kept until they are known, then normed on its way
into the next convolution and dropped behind it. At every moment two maps of a resnet are held, its
input and its hidden one, and a few stripes; a plain call holds up to six such maps.

Maps are (1, C, H, W): the rows of a batch are normed each on its own, so they go one by one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from .layers import ResnetBlock
    from .vae import Decoder, Encoder, Level

STRIPE = 8 * 2**20  # bytes of a stripe, if it has LEAST rows: a few are held beside the kept maps
LEAST = 16  # rows of a stripe: a convolution makes two rows more and throws them away


class Stripes:
    """A map (1, C, H, W) as stripes of rows from the top, of which the first may be gone."""

    def __init__(self, parts: Iterable[Tensor] = ()) -> None:
        self.parts: deque[Tensor] = deque()
        self.dropped = self.height = 0  # rows
        for part in parts:
            self.append(part)

    def append(self, part: Tensor) -> None:
        """Add rows below; a part of a larger tensor is copied, so that the rest can go."""
        whole = part.untyped_storage().nbytes() == part.numel() * part.element_size()
        self.parts.append(part if whole else part.clone())
        self.height += part.shape[2]

    def rows(self, start: int, stop: int) -> Tensor:
        """A copy of the rows from `start` to `stop`."""
        pieces, top = [], self.dropped
        for part in self.parts:
            piece = part[:, :, max(start - top, 0) : max(stop - top, 0)]
            if piece.shape[2]:
                pieces.append(piece)
            top += part.shape[2]
        return torch.cat(pieces, dim=2)

    def drop(self, stop: int) -> None:
        """Let go of the stripes above row `stop`."""
        while self.parts and self.dropped + self.parts[0].shape[2] <= stop:
            self.dropped += self.parts.popleft().shape[2]


Moments = tuple[Tensor, Tensor]  # mean and variance that each channel is normed by, (C,)


@dataclass(frozen=True)
class Step:
    """A layer over cells of rows: a cell is `down` rows of its input and `up` rows of its output.

    `halo` cells on each side are read as well. A `norm` and SiLU come before the layer. `channels`
    are those of the widest map that it reads or writes.
    """

    layer: Callable[[Tensor], Tensor]
    channels: int
    halo: int = 1
    up: int = 1
    down: int = 1
    norm: nn.GroupNorm | None = None

    def spans(self, x: Stripes, size: int | None) -> Iterator[tuple[int, int]]:
        """The cells (start, stop) of stripes of `size` rows, by default of STRIPE bytes."""
        part, count = x.parts[0], max(x.height // self.down, 1)
        row = self.channels * part.shape[3] * self.up * part.element_size()
        size = size or max(LEAST, STRIPE // row)
        stripes = -(-count // max(size // max(self.up, self.down), 1))
        cells = -(-count // stripes)  # in all but the last: kernels are prepared for a size
        for start in range(0, count, cells):
            yield start, min(start + cells, count)

    def __call__(self, x: Stripes, start: int, stop: int, stats: Moments | None) -> Tensor:
        """What the layer makes of the cells from `start` to `stop` of x."""
        first, last = max(start - self.halo, 0), (stop + self.halo) * self.down
        at_end = (stop + 1) * self.down > x.height  # rows that fill no cell belong to the last one
        window = x.rows(first * self.down, x.height if at_end else last)
        if self.norm is not None and stats is not None:
            window = normed(window, self.norm, stats)
        out = self.layer(window)
        return out[:, :, (start - first) * self.up : None if at_end else (stop - first) * self.up]


def moments(parts: Iterable[Tensor], groups: int) -> Moments:
    """Mean and variance of each channel's group in a map, merged from those of its stripes.

    First over the stripes (Chan, Golub and LeVeque 1979), then over the channels of a group.
    """
    mean = variance = torch.zeros(())
    rows = 0
    for part in parts:
        own_mean, own_variance = of_channels(part)
        if rows == 0:
            mean, variance = own_mean, own_variance
        rows += part.shape[2]
        share, gap = part.shape[2] / rows, own_mean - mean
        mean = mean + share * gap
        variance = variance + share * (own_variance - variance + (1 - share) * gap**2)
    means, variances = mean.unflatten(0, (groups, -1)), variance.unflatten(0, (groups, -1))
    middle = means.mean(1, keepdim=True)
    spread = (variances + (means - middle) ** 2).mean(1, keepdim=True)
    return middle.expand_as(means).flatten(), spread.expand_as(means).flatten()


def of_channels(x: Tensor) -> Moments:
    """Mean and variance (C,) of the channels of x (1, C, h, W), at least in float32."""
    # Two passes of sums: torch.var_mean takes ten times as long on a CPU.
    mean = x.mean((0, 2, 3), dtype=torch.promote_types(x.dtype, torch.float32))
    return mean, (x - mean[:, None, None]).square_().mean((0, 2, 3))


def normed(x: Tensor, norm: nn.GroupNorm, stats: Moments) -> Tensor:
    """SiLU of x (1, C, h, W), normed by the moments of the map that it is a part of."""
    # With given moments group norm is batch norm: a scale and a shift for each channel.
    weight, bias = (p.to(stats[0].dtype) for p in (norm.weight, norm.bias))
    h = F.batch_norm(x, *stats, weight, bias, training=False, eps=norm.eps)
    return F.silu(h, inplace=True)


def mapped(
    x: Stripes,
    *steps: Step,
    size: int | None,
    keep: bool = False,
    onto: Stripes | None = None,
) -> list[Stripes]:
    """The map that each of the steps makes of x, added to `onto`. x is used up, unless `keep`."""
    outs = [Stripes() for _ in steps]
    stats = [None if s.norm is None else moments(x.parts, s.norm.num_groups) for s in steps]
    for start, stop in steps[0].spans(x, size):
        for out, step, stat in zip(outs, steps, stats, strict=True):
            out.append(added(step(x, start, stop, stat), onto, out.height))
        if not keep:
            x.drop((stop - steps[0].halo) * steps[0].down)
    return outs


def added(part: Tensor, onto: Stripes | None, start: int) -> Tensor:
    """`part` plus the rows of `onto` from `start`, which are used up."""
    if onto is None:
        return part
    stop = start + part.shape[2]
    rows = onto.rows(start, stop).add_(part)
    onto.drop(stop)
    return rows


def resnet(block: ResnetBlock, x: Stripes, size: int | None) -> Stripes:
    """A residual block of x."""
    conv1, conv2, shortcut = block.conv1, block.conv2, block.conv_shortcut
    widest = max(conv1.in_channels, conv1.out_channels)
    steps = [Step(conv1, widest, norm=block.norm1)]
    if shortcut is not None:
        steps.append(Step(shortcut, widest, halo=0))
    # Input and hidden map of different widths are never whole at the same time.
    h, *shortened = mapped(x, *steps, size=size, keep=shortcut is None)
    skip = shortened[0] if shortened else x
    return mapped(h, Step(conv2, widest, norm=block.norm2), size=size, onto=skip)[0]


def level(block: Level, x: Stripes, size: int | None) -> Stripes:
    """The resnets of one size, and the layer that leads to the next size."""
    for one in block.resnets:
        x = resnet(cast("ResnetBlock", one), x, size)
    for up in getattr(block, "upsamplers", ()):
        (x,) = mapped(x, Step(up, up.conv.out_channels, up=2), size=size)
    for down in getattr(block, "downsamplers", ()):
        (x,) = mapped(x, Step(down, down.conv.out_channels, down=2), size=size)
    return x


def decode(decoder: Decoder, z: Tensor, size: int | None = None) -> Tensor:
    """`decoder(z)`, pictures (B, 3, h f, w f) of latents (B, C, h, w), by stripes of `size` rows.

    The rows are those of each resolution; by default a stripe takes STRIPE bytes.
    """

    def one(row: Tensor) -> Tensor:
        # The smallest maps and the attention over them are whole: a sixteenth of the largest map.
        x = Stripes([decoder.mid_block(decoder.conv_in(row))])
        for block in decoder.up_blocks:
            x = level(cast("Level", block), x, size)
        return ended(x, decoder, size)

    return torch.cat([one(row) for row in z.split(1)])


def encode(encoder: Encoder, pictures: Tensor, size: int | None = None) -> Tensor:
    """`encoder(pictures)` (B, 2 latent_channels, H / f, W / f) by stripes of `size` rows."""

    def one(row: Tensor) -> Tensor:
        conv = encoder.conv_in
        (x,) = mapped(Stripes([row]), Step(conv, conv.out_channels), size=size)
        for block in encoder.down_blocks:
            x = level(cast("Level", block), x, size)
        whole = encoder.mid_block(x.rows(0, x.height))
        return ended(Stripes([whole]), encoder, size)

    return torch.cat([one(row) for row in pictures.split(1)])


def ended(x: Stripes, net: Decoder | Encoder, size: int | None) -> Tensor:
    """What the network's last norm and convolution make of x."""
    last = Step(net.conv_out, net.conv_out.in_channels, norm=net.conv_norm_out)
    (x,) = mapped(x, last, size=size)
    return x.rows(0, x.height)


def chained(steps: Sequence[Step], x: Tensor, size: int | None = None) -> Tensor:
    """What the steps, one after another, make of x (B, C, H, W)."""

    def one(row: Tensor) -> Tensor:
        stripes = Stripes([row])
        for step in steps:
            (stripes,) = mapped(stripes, step, size=size)
        return stripes.rows(0, stripes.height)

    return torch.cat([one(row) for row in x.split(1)])


def records(model: nn.Module, x: Tensor) -> bool:
    """Whether a gradient of the model's result on x may be asked for."""
    if not torch.is_grad_enabled():
        return False
    return x.requires_grad or any(p.requires_grad for p in model.parameters())
