"""The variational autoencoder between pictures and latents (Rombach et al. 2022).

Attribute names equal the checkpoints' keys. Pictures are (B, 3, H, W) in [-1, 1]; latents
(B, latent_channels, H / f, W / f) with f = 2 ** (levels - 1), before `scaling_factor`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..checkpoints.config import Config
from ..errors import RequestError, UnsupportedConfig
from ..ops.layers import Conv2d
from ..ops.norm import group_norm, norm_silu
from ..ops.upsample import Upsample
from ..outputs import Output
from ..random import randn
from . import vae_exact
from .base import Model
from .layers import Attention, Downsample, ResnetBlock

EPS = 1e-6
OVERLAP = 0.25  # share of a tile that it has in common with the next one
# Pixels up to which a picture goes through whole unless tiling is on. The maps grow with it: in
# float32 a decoder of Stable Diffusion's size holds 3.5 GiB of them at 1024 x 1024 and 14 GiB at
# 2048 x 2048; in stripes 1.1 and 4.2 GiB.
LARGE = 1024 * 1024


@dataclass(frozen=True)
class AutoencoderConfig(Config):
    """`config.json` of an AutoencoderKL."""

    in_channels: int = 3
    out_channels: int = 3
    down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",)
    up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",)
    block_out_channels: tuple[int, ...] = (64,)
    layers_per_block: int = 1
    latent_channels: int = 4
    norm_num_groups: int = 32
    sample_size: int = 32
    scaling_factor: float = 0.18215
    latents_mean: tuple[float, ...] | None = None
    latents_std: tuple[float, ...] | None = None
    force_upcast: bool = True
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True

    INERT: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "act_fn": ("silu", "swish"),
        "shift_factor": (None,),
    }

    def __post_init__(self) -> None:
        for name, supported in (
            ("down_block_types", "DownEncoderBlock2D"),
            ("up_block_types", "UpDecoderBlock2D"),
        ):
            for value in getattr(self, name):
                if value != supported:
                    raise UnsupportedConfig(
                        f"{name}={value!r} is not implemented (supported: {supported!r})"
                    )
            if len(getattr(self, name)) != len(self.block_out_channels):
                raise UnsupportedConfig(
                    f"{name} must have as many entries as block_out_channels, "
                    f"{len(self.block_out_channels)}, got {len(getattr(self, name))}"
                )


class SpatialAttention(Attention):
    """Single-head attention over all pixels of x (B, C, H, W), normed and residual."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__(channels, heads=1, bias=True)
        self.group_norm = nn.GroupNorm(groups, channels, EPS)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        tokens = group_norm(self.group_norm, x).flatten(2).transpose(1, 2)  # (B, HW, C)
        return super().forward(tokens).transpose(1, 2).reshape(x.shape) + x


class MidBlock(nn.Module):
    """Resnet, attention, resnet."""

    def __init__(self, channels: int, groups: int, attention: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(
            ResnetBlock(channels, channels, None, groups, EPS) for _ in range(2)
        )
        if attention:
            self.attentions = nn.ModuleList([SpatialAttention(channels, groups)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.resnets[0](x)
        if hasattr(self, "attentions"):
            x = self.attentions[0](x)
        return self.resnets[1](x)


class Level(nn.Module):
    """The resnets of one size, and the layer that leads to the next size, if there is one."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        layers: int,
        groups: int,
        downsample: bool = False,
        upsample: bool = False,
    ) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(
            ResnetBlock(in_channels if i == 0 else out_channels, out_channels, None, groups, EPS)
            for i in range(layers)
        )
        if downsample:
            self.downsamplers = nn.ModuleList([Downsample(out_channels, asymmetric=True)])
        if upsample:
            self.upsamplers = nn.ModuleList([Upsample(out_channels)])

    def forward(self, x: Tensor) -> Tensor:
        for resnet in self.resnets:
            x = resnet(x)
        for sampler in (*getattr(self, "downsamplers", ()), *getattr(self, "upsamplers", ())):
            x = sampler(x)
        return x


class Encoder(nn.Module):
    """Picture (B, 3, H, W) to the moments' features (B, 2 latent_channels, H / f, W / f)."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        channels, groups = config.block_out_channels, config.norm_num_groups
        self.conv_in = Conv2d(config.in_channels, channels[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            Level(
                channels[max(i - 1, 0)],
                channels[i],
                config.layers_per_block,
                groups,
                downsample=i < len(channels) - 1,
            )
            for i in range(len(channels))
        )
        self.mid_block = MidBlock(channels[-1], groups, config.mid_block_add_attention)
        self.conv_norm_out = nn.GroupNorm(groups, channels[-1], EPS)
        self.conv_out = Conv2d(channels[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(norm_silu(self.conv_norm_out, self.mid_block(x)))


class Decoder(nn.Module):
    """Latent features (B, latent_channels, h, w) to a picture (B, 3, h f, w f)."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        channels, groups = config.block_out_channels[::-1], config.norm_num_groups
        self.conv_in = Conv2d(config.latent_channels, channels[0], 3, padding=1)
        self.mid_block = MidBlock(channels[0], groups, config.mid_block_add_attention)
        self.up_blocks = nn.ModuleList(
            Level(
                channels[max(i - 1, 0)],
                channels[i],
                config.layers_per_block + 1,
                groups,
                upsample=i < len(channels) - 1,
            )
            for i in range(len(channels))
        )
        self.conv_norm_out = nn.GroupNorm(groups, channels[-1], EPS)
        self.conv_out = Conv2d(channels[-1], config.out_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid_block(self.conv_in(z))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(norm_silu(self.conv_norm_out, x))


class DiagonalGaussian:
    """The posterior q(z | x): a normal distribution per latent value."""

    def __init__(self, moments: Tensor) -> None:
        """`moments` (B, 2 latent_channels, h, w): mean and log-variance."""
        self.mean, logvar = moments.chunk(2, dim=1)
        self.logvar = logvar.clamp(-30.0, 20.0)
        self.std = (0.5 * self.logvar).exp()
        self.var = self.logvar.exp()

    def sample(self, generator: torch.Generator | list[torch.Generator] | None = None) -> Tensor:
        """A draw of z, with the generator's own device; a list holds one generator per row."""
        shape = tuple(self.mean.shape)
        noise = randn(shape, generator, device=self.mean.device, dtype=self.mean.dtype)
        return self.mean + self.std * noise

    def mode(self) -> Tensor:
        """The mean."""
        return self.mean

    def kl(self) -> Tensor:
        """KL divergence from the standard normal distribution, (B,)."""
        terms = self.mean**2 + self.var - 1.0 - self.logvar
        return 0.5 * terms.flatten(1).sum(1)


@dataclass
class AutoencoderKLOutput(Output):
    """`latent_dist`: the posterior."""

    latent_dist: DiagonalGaussian


@dataclass
class DecoderOutput(Output):
    """`sample` (B, 3, H, W) in about [-1, 1]."""

    sample: Tensor


class Autoencoder(Model):
    """Base of the autoencoders: slicing, tiling, and what a pipeline needs of either kind.

    A subclass gives `encode_moments`, `decode_latents`, `moments` and `downscale`, and sets
    `tile_sample_min_size`.
    """

    tile_sample_min_size: int  # pixels
    use_slicing = False
    use_tiling = False
    exact_tiling = True
    stripe: int | None = None  # rows of the exact way's stripes; None: what memory suggests
    has_posterior: ClassVar[bool] = True  # from which latents of pictures are drawn

    @property
    def downscale(self) -> int:
        """Picture pixels per latent pixel, in each direction."""
        raise NotImplementedError

    def encode_moments(self, x: Tensor, exact: bool = False) -> Tensor:
        """What the encoder makes of pictures (B, 3, H, W) in [-1, 1], (B, ..., h, w).

        `exact`: in stripes.
        """
        raise NotImplementedError

    def decode_latents(self, z: Tensor, exact: bool = False) -> Tensor:
        """Pictures (B, 3, H, W) from latents (B, latent_channels, h, w), already unscaled.

        `exact`: in stripes.
        """
        raise NotImplementedError

    def moments(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Mean and standard deviation of the latents of pictures, None if there is no posterior."""
        raise NotImplementedError

    def encoded(self, x: Tensor) -> Tensor:
        """`encode_moments` by rows, stripes and tiles, as they are enabled."""
        return self.sliced(self.way(x, 1, self.encode_moments, self.encode_tiled), x)

    def decode(self, z: Tensor, return_dict: bool = True) -> Any:
        """Pictures (B, 3, H, W) from latents (B, latent_channels, h, w), already unscaled."""
        step = self.way(z, self.downscale, self.decode_latents, self.decode_tiled)
        sample = self.sliced(step, z)
        return DecoderOutput(sample) if return_dict else (sample,)

    def sliced(self, step: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """`step(x)`, one row at a time if slicing is on."""
        if self.use_slicing and len(x) > 1:
            return torch.cat([step(row) for row in x.split(1)])
        return step(x)

    # ── tiling: large pictures in stripes, or in tiles that overlap and are blended ──

    def way(
        self,
        x: Tensor,
        scale: int,
        whole: Callable[..., Tensor],
        blended: Callable[[Tensor], Tensor],
    ) -> Callable[[Tensor], Tensor]:
        """How x (B, C, H, W), of `scale` pixels each, is to be served: whole, exact or blended."""
        height, width = (size * scale for size in x.shape[-2:])
        if self.use_tiling and not self.exact_tiling:
            return blended if max(height, width) > self.tile_sample_min_size else whole
        if (self.use_tiling or height * width > LARGE) and not vae_exact.records(self, x):
            return partial(whole, exact=True)
        return whole

    def encode_tiled(self, x: Tensor) -> Tensor:
        tile = self.tile_sample_min_size
        return tiled(self.encode_moments, x, tile, tile // self.downscale)

    def decode_tiled(self, z: Tensor) -> Tensor:
        tile = self.tile_sample_min_size
        return tiled(self.decode_latents, z, tile // self.downscale, tile)

    def enable_slicing(self) -> None:
        """Encode and decode the pictures of a batch one after another, to save memory."""
        self.use_slicing = True

    def disable_slicing(self) -> None:
        """Undo `enable_slicing`."""
        self.use_slicing = False

    def enable_tiling(
        self, use_tiling: bool = True, tile_size: int | None = None, exact: bool = True
    ) -> None:
        """Encode and decode in pieces, in a fraction of the memory.

        Exact: in stripes of `tile_size` rows, by default as many as take 8 MiB but at least 16. The
        result is that of an untiled call but for rounding; while gradients are recorded it is made
        at once. Pictures of more than 1024 x 1024 pixels go this way by themselves.

        Not exact, as in diffusers: in overlapping tiles of `tile_size` pixels, by default the
        config's `sample_size`. Blending hides the seams; the picture differs a little.
        """
        if tile_size is not None:
            multiple = self.downscale * 4  # so that a quarter of a tile is whole latent pixels
            if tile_size < multiple or tile_size % multiple:
                raise RequestError(
                    f"tile_size must be a positive multiple of {multiple}, got {tile_size}"
                )
            if not exact:
                self.tile_sample_min_size = tile_size
        self.use_tiling, self.exact_tiling = use_tiling, exact
        self.stripe = tile_size if use_tiling and exact else None

    def disable_tiling(self) -> None:
        """Undo `enable_tiling`."""
        self.use_tiling, self.stripe = False, None


class AutoencoderKL(Autoencoder):
    """The autoencoder; keyword arguments are those of `config.json` (see `AutoencoderConfig`)."""

    config_class = AutoencoderConfig
    config: AutoencoderConfig

    def __init__(self, **config: Any) -> None:
        super().__init__()
        self.config = AutoencoderConfig.from_dict(config)
        channels = self.config.latent_channels
        self.encoder = Encoder(self.config)
        self.decoder = Decoder(self.config)
        self.quant_conv = (
            Conv2d(2 * channels, 2 * channels, 1) if self.config.use_quant_conv else None
        )
        self.post_quant_conv = (
            Conv2d(channels, channels, 1) if self.config.use_post_quant_conv else None
        )
        self.tile_sample_min_size = self.config.sample_size

    @property
    def downscale(self) -> int:
        """Picture pixels per latent pixel, in each direction."""
        return 2 ** (len(self.config.block_out_channels) - 1)

    def encode(self, x: Tensor, return_dict: bool = True) -> Any:
        """The posterior of pictures (B, 3, H, W) in [-1, 1]."""
        posterior = DiagonalGaussian(self.encoded(x))
        return AutoencoderKLOutput(posterior) if return_dict else (posterior,)

    def moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the posterior of pictures (B, 3, H, W) in [-1, 1]."""
        posterior = self.encode(x).latent_dist
        return posterior.mean, posterior.std

    def forward(
        self,
        sample: Tensor,
        sample_posterior: bool = False,
        return_dict: bool = True,
        generator: torch.Generator | None = None,
    ) -> Any:
        """Reconstruct pictures (B, 3, H, W), from the posterior's mean or from a draw of it."""
        posterior = self.encode(sample).latent_dist
        z = posterior.sample(generator) if sample_posterior else posterior.mode()
        return self.decode(z, return_dict=return_dict)

    def encode_moments(self, x: Tensor, exact: bool = False) -> Tensor:
        features = vae_exact.encode(self.encoder, x, self.stripe) if exact else self.encoder(x)
        return features if self.quant_conv is None else self.quant_conv(features)

    def decode_latents(self, z: Tensor, exact: bool = False) -> Tensor:
        z = z if self.post_quant_conv is None else self.post_quant_conv(z)
        return vae_exact.decode(self.decoder, z, self.stripe) if exact else self.decoder(z)


def tiled(step: Callable[[Tensor], Tensor], x: Tensor, size_in: int, size_out: int) -> Tensor:
    """`step` over tiles of x of `size_in`, each giving up to `size_out`, blended linearly.

    Tiles start every (1 - OVERLAP) of their size; a tile's first quarter fades from the tile above
    and then from the one on its left.
    """
    stride, blend = int(size_in * (1 - OVERLAP)), int(size_out * OVERLAP)
    keep = size_out - blend
    rows: list[list[Tensor]] = []
    for top in range(0, x.shape[2], stride):
        row: list[Tensor] = []
        for left in range(0, x.shape[3], stride):
            tile = step(x[:, :, top : top + size_in, left : left + size_in])
            if rows:
                tile = fade(rows[-1][len(row)], tile, blend, dim=2)
            if row:
                tile = fade(row[-1], tile, blend, dim=3)
            row.append(tile)
        rows.append(row)
    return torch.cat(
        [torch.cat([tile[:, :, :keep, :keep] for tile in row], dim=3) for row in rows], dim=2
    )


def fade(before: Tensor, tile: Tensor, length: int, dim: int) -> Tensor:
    """`tile` whose first `length` along `dim` fade in from the last `length` of `before`."""
    length = min(length, before.shape[dim], tile.shape[dim])
    weight = torch.arange(length, device=tile.device, dtype=tile.dtype) / length
    weight = weight.reshape([-1 if d == dim else 1 for d in range(4)])
    end = before.narrow(dim, before.shape[dim] - length, length)
    blended = end * (1 - weight) + tile.narrow(dim, 0, length) * weight
    return torch.cat([blended, tile.narrow(dim, length, tile.shape[dim] - length)], dim=dim)
