"""T2I-Adapters (Mou et al. 2023): small networks that turn a picture into features for the UNet.

Features do not depend on z or t, so they are made once per call. Attribute names equal the
checkpoints' keys. Shapes: B batch, C channels, H and W height and width of the picture.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from ..checkpoints.config import Config
from ..errors import RequestError, UnsupportedConfig
from ..ops.layers import Conv2d
from .base import Model
from .several import Several


@dataclass(frozen=True)
class T2IAdapterConfig(Config):
    """`config.json` of a T2I-Adapter; `downscale_factor` is that of its first layer alone."""

    in_channels: int = 3
    channels: tuple[int, ...] = (320, 640, 1280, 1280)
    num_res_blocks: int = 2
    downscale_factor: int = 8
    adapter_type: str = "full_adapter"

    INERT: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "adapter_type": ("full_adapter", "full_adapter_xl", "light_adapter"),
    }

    def __post_init__(self) -> None:
        if self.adapter_type == "full_adapter_xl" and len(self.channels) < 3:
            raise UnsupportedConfig(
                f"channels={self.channels!r} must have at least 3 entries with "
                "adapter_type='full_adapter_xl'"
            )

    @property
    def blocks(self) -> list[tuple[int, int, bool]]:
        """(channels in, channels out, whether the size is halved) of each block."""
        outs = list(self.channels)
        if self.adapter_type == "light_adapter":
            first = self.in_channels * self.downscale_factor**2
            ins, outs = [first, *outs], [*outs, outs[-1]]
        else:
            ins = [outs[0], *outs[:-1]]
        xl = self.adapter_type == "full_adapter_xl"
        halved = [i == 2 if xl else i > 0 for i in range(len(outs))]
        return list(zip(ins, outs, halved, strict=True))


class AdapterResnet(nn.Module):
    """Two convolutions around a ReLU, residual; the second has a kernel of `kernel`."""

    def __init__(self, channels: int, kernel: int) -> None:
        super().__init__()
        self.block1 = Conv2d(channels, channels, 3, padding=1)
        self.block2 = Conv2d(channels, channels, kernel, padding=kernel // 2)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.block2(F.relu(self.block1(x)))


class AdapterBlock(nn.Module):
    """Half the size where `halved`, then resnets; a light one has them at a quarter the width."""

    def __init__(
        self, in_channels: int, out_channels: int, halved: bool, layers: int, light: bool
    ) -> None:
        super().__init__()
        width = out_channels // 4 if light else out_channels
        self.halved = halved
        self.in_conv = (
            Conv2d(in_channels, width, 1) if light or in_channels != out_channels else None
        )
        self.resnets = nn.Sequential(
            *(AdapterResnet(width, 3 if light else 1) for _ in range(layers))
        )
        self.out_conv = Conv2d(width, out_channels, 1) if light else None

    def forward(self, x: Tensor) -> Tensor:
        if self.halved:
            x = F.avg_pool2d(x, 2, stride=2, ceil_mode=True)  # rounds up, as the UNet does
        x = x if self.in_conv is None else self.in_conv(x)
        x = self.resnets(x)
        return x if self.out_conv is None else self.out_conv(x)


class AdapterBody(nn.Module):
    """Pixels to channels, a convolution unless it is a light one, and the blocks."""

    def __init__(self, config: T2IAdapterConfig) -> None:
        super().__init__()
        light = config.adapter_type == "light_adapter"
        unshuffled = config.in_channels * config.downscale_factor**2
        self.unshuffle = nn.PixelUnshuffle(config.downscale_factor)
        self.conv_in = None if light else Conv2d(unshuffled, config.channels[0], 3, padding=1)
        self.body = nn.ModuleList(
            AdapterBlock(*block, config.num_res_blocks, light) for block in config.blocks
        )

    def forward(self, picture: Tensor) -> list[Tensor]:
        x = self.unshuffle(picture)
        x = x if self.conv_in is None else self.conv_in(x)
        features = []
        for block in self.body:
            x = block(x)
            features.append(x)
        return features


class T2IAdapter(Model):
    """A T2I-Adapter; keyword arguments are those of `config.json` (see `T2IAdapterConfig`)."""

    config_class = T2IAdapterConfig
    config: T2IAdapterConfig

    def __init__(self, **config: Any) -> None:
        super().__init__()
        self.config = T2IAdapterConfig.from_dict(config)
        self.adapter = AdapterBody(self.config)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Features, one per block of the UNet, of a picture x (B, in_channels, H, W) in [0, 1].

        H and W must be multiples of `downscale_factor`.
        """
        return self.adapter(x)

    @property
    def downscale_factor(self) -> int:
        """What the sides of a picture must be multiples of."""
        return self.config.downscale_factor

    @property
    def total_downscale_factor(self) -> int:
        """How much smaller the last feature is than the picture."""
        halvings = sum(halved for _, _, halved in self.config.blocks)
        return self.config.downscale_factor * 2**halvings


class MultiAdapter(Several):
    """Several T2I-Adapters of one layout, whose features add up."""

    each = T2IAdapter

    def __init__(self, adapters: Sequence[T2IAdapter]) -> None:
        super().__init__(adapters)
        if len(adapters) == 1:
            raise RequestError("MultiAdapter takes two adapters or more; use the T2IAdapter itself")
        factors = {(a.downscale_factor, a.total_downscale_factor) for a in adapters}
        if len(factors) > 1:
            raise RequestError(
                "adapters must all scale down alike, got (downscale_factor, "
                f"total_downscale_factor) = {', '.join(map(str, sorted(factors)))}"
            )
        self.adapters = nn.ModuleList(adapters)
        self.downscale_factor, self.total_downscale_factor = factors.pop()

    @property
    def members(self) -> list[Any]:
        return list(self.adapters)

    def forward(
        self, xs: Sequence[Tensor], adapter_weights: Sequence[float] | None = None
    ) -> list[Tensor]:
        """The features' sums by block, of one picture for each adapter; equal weights of sum 1 by
        default."""
        weights = adapter_weights or [1 / len(self.adapters)] * len(self.adapters)
        every = [
            [weight * feature for feature in adapter(x)]
            for adapter, x, weight in zip(self.adapters, xs, weights, strict=True)
        ]
        return [sum(features[1:], features[0]) for features in zip(*every, strict=True)]
