"""The tiny autoencoder (TAESD): a distilled stand-in for AutoencoderKL, many times as fast.

Attribute names equal the checkpoints' keys. Pictures are (B, 3, H, W) in [-1, 1]; latents
(B, latent_channels, H / f, W / f), f = 8 for the published ones, are those of the UNet as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from ..checkpoints.config import Config
from ..errors import UnsupportedConfig
from ..ops.layers import Conv2d
from ..outputs import Output
from .vae import Autoencoder
from .vae_exact import Step, chained

TILE = 512  # pixels

Run = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class TinyConfig(Config):
    """`config.json` of an AutoencoderTiny."""

    in_channels: int = 3
    out_channels: int = 3
    encoder_block_out_channels: tuple[int, ...] = (64, 64, 64, 64)
    decoder_block_out_channels: tuple[int, ...] = (64, 64, 64, 64)
    latent_channels: int = 4
    upsampling_scaling_factor: int = 2
    num_encoder_blocks: tuple[int, ...] = (1, 3, 3, 3)
    num_decoder_blocks: tuple[int, ...] = (3, 3, 3, 1)
    latent_magnitude: float = 3  # of the latents that a byte can hold
    latent_shift: float = 0.5
    force_upcast: bool = False
    scaling_factor: float = 1.0
    # What diffusers derives the scale from; a copy of decoder_block_out_channels.
    block_out_channels: tuple[int, ...] = (64, 64, 64, 64)

    INERT: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "act_fn": ("relu",),
        "upsample_fn": ("nearest",),
        "shift_factor": (0.0, None),
    }

    def __post_init__(self) -> None:
        for name in ("encoder", "decoder"):
            channels = getattr(self, f"{name}_block_out_channels")
            blocks = getattr(self, f"num_{name}_blocks")
            if len(set(channels)) != 1:
                raise UnsupportedConfig(
                    f"{name}_block_out_channels={channels} is not implemented: its entries must be "
                    "equal"
                )
            if len(channels) != len(blocks):
                raise UnsupportedConfig(
                    f"num_{name}_blocks must have as many entries as {name}_block_out_channels, "
                    f"{len(channels)}, got {len(blocks)}"
                )
        ups = self.upsampling_scaling_factor ** (len(self.num_decoder_blocks) - 1)
        if ups != 2 ** (len(self.num_encoder_blocks) - 1):
            raise UnsupportedConfig(
                f"upsampling_scaling_factor={self.upsampling_scaling_factor} over "
                f"{len(self.num_decoder_blocks)} levels does not undo the encoder's "
                f"{len(self.num_encoder_blocks)} levels"
            )
        object.__setattr__(self, "block_out_channels", self.decoder_block_out_channels)


class TinyBlock(nn.Module):
    """Three convolutions of x (B, C, H, W), residual."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for _ in range(3):
            layers += [conv(channels, channels), nn.ReLU()]
        self.conv = nn.Sequential(*layers[:-1])

    def forward(self, x: Tensor) -> Tensor:
        return (self.conv(x) + x).relu()


def conv(in_channels: int, out_channels: int, bias: bool = True, stride: int = 1) -> Conv2d:
    """A convolution by 3 x 3 that keeps the size, or divides it by `stride`."""
    return Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=bias)


class TinyEncoder(nn.Module):
    """Picture (B, 3, H, W) in [-1, 1] to latents (B, latent_channels, H / f, W / f)."""

    def __init__(self, config: TinyConfig) -> None:
        super().__init__()
        width = config.encoder_block_out_channels[0]
        layers: list[nn.Module] = [conv(config.in_channels, width)]
        for level, blocks in enumerate(config.num_encoder_blocks):
            if level > 0:
                layers.append(conv(width, width, bias=False, stride=2))
            layers += [TinyBlock(width) for _ in range(blocks)]
        self.layers = nn.Sequential(*layers, conv(width, config.latent_channels))

    def forward(self, x: Tensor, run: Run | None = None) -> Tensor:
        return (run or self.layers)((x + 1) / 2)


class TinyDecoder(nn.Module):
    """Latents (B, latent_channels, h, w), softly bounded by 3, to a picture (B, 3, h f, w f)."""

    def __init__(self, config: TinyConfig) -> None:
        super().__init__()
        width, factor = config.decoder_block_out_channels[0], config.upsampling_scaling_factor
        layers: list[nn.Module] = [conv(config.latent_channels, width), nn.ReLU()]
        for level, blocks in enumerate(config.num_decoder_blocks):
            if level > 0:
                layers += [nn.Upsample(scale_factor=factor), conv(width, width, bias=False)]
            layers += [TinyBlock(width) for _ in range(blocks)]
        self.layers = nn.Sequential(*layers, conv(width, config.out_channels))

    def forward(self, z: Tensor, run: Run | None = None) -> Tensor:
        return (run or self.layers)((z / 3).tanh() * 3) * 2 - 1


def in_stripes(layers: nn.Sequential, size: int | None) -> Run:
    """What computes `layers` in stripes of `size` rows: exactly, for they see only near pixels."""
    width = max(layer.out_channels for layer in layers if isinstance(layer, nn.Conv2d))
    return partial(chained, [step_of(layer, width) for layer in layers], size=size)


def step_of(layer: nn.Module, width: int) -> Step:
    """A layer of at most `width` channels, with the rows that it reads and makes."""
    if isinstance(layer, nn.Conv2d):
        return Step(layer, width, down=layer.stride[0])
    if isinstance(layer, nn.Upsample):
        return Step(layer, width, halo=0, up=int(cast(float, layer.scale_factor)))
    return Step(layer, width, halo=3 if isinstance(layer, TinyBlock) else 0)


@dataclass
class AutoencoderTinyOutput(Output):
    """`latents` (B, latent_channels, h, w)."""

    latents: Tensor


class AutoencoderTiny(Autoencoder):
    """The tiny autoencoder; keyword arguments are those of `config.json` (see `TinyConfig`)."""

    config_class = TinyConfig
    config: TinyConfig
    has_posterior = False

    def __init__(self, **config: Any) -> None:
        super().__init__()
        self.config = TinyConfig.from_dict(config)
        self.encoder = TinyEncoder(self.config)
        self.decoder = TinyDecoder(self.config)
        self.tile_sample_min_size = TILE

    @property
    def downscale(self) -> int:
        """Picture pixels per latent pixel, in each direction."""
        return 2 ** (len(self.config.num_encoder_blocks) - 1)

    def encode(self, x: Tensor, return_dict: bool = True) -> Any:
        """The latents of pictures (B, 3, H, W) in [-1, 1]; there is no posterior."""
        latents = self.encoded(x)
        return AutoencoderTinyOutput(latents) if return_dict else (latents,)

    def moments(self, x: Tensor) -> tuple[Tensor, None]:
        """The latents of pictures (B, 3, H, W) in [-1, 1], and no deviation from them."""
        return self.encoded(x), None

    def encode_moments(self, x: Tensor, exact: bool = False) -> Tensor:
        """The latents of pictures at once, or in stripes."""
        return self.encoder(x, in_stripes(self.encoder.layers, self.stripe) if exact else None)

    def decode_latents(self, z: Tensor, exact: bool = False) -> Tensor:
        """Pictures of latents at once, or in stripes."""
        return self.decoder(z, in_stripes(self.decoder.layers, self.stripe) if exact else None)

    def scale_latents(self, x: Tensor) -> Tensor:
        """Latents within +- latent_magnitude as numbers in [0, 1], to keep them in a picture."""
        return (x / (2 * self.config.latent_magnitude) + self.config.latent_shift).clamp(0, 1)

    def unscale_latents(self, x: Tensor) -> Tensor:
        """Undo `scale_latents`."""
        return (x - self.config.latent_shift) * (2 * self.config.latent_magnitude)

    def forward(self, sample: Tensor, return_dict: bool = True) -> Any:
        """Reconstruct pictures (B, 3, H, W) from latents rounded to bytes."""
        scaled = self.scale_latents(self.encode(sample).latents)
        rounded = torch.round(scaled * 255) / 255
        return self.decode(self.unscale_latents(rounded), return_dict=return_dict)
