"""ControlNet (Zhang et al. 2023): the UNet's encoder once more, which reads a picture beside z.

What it finds is added to the UNet's skips and to its middle. Attribute names equal the checkpoints'
keys. Shapes: B batch, C channels, h and w latent height and width, H and W those of the picture, L
text tokens, D text channels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..checkpoints.config import Config
from ..errors import UnsupportedConfig
from ..ops.layers import Conv2d
from ..outputs import Output
from .layers import Context, Memo
from .several import Several
from .unet import UNet2DConditionModel, UNetConfig, UNetEncoder


@dataclass(frozen=True)
class ControlNetConfig(Config):
    """`config.json` of a ControlNet; names mean what they mean in a UNet's."""

    in_channels: int = 4
    conditioning_channels: int = 3
    conditioning_embedding_out_channels: tuple[int, ...] = (16, 32, 96, 256)
    controlnet_conditioning_channel_order: str = "rgb"
    global_pool_conditions: bool = False
    flip_sin_to_cos: bool = True
    freq_shift: int = 0
    down_block_types: tuple[str, ...] = UNetConfig.down_block_types
    mid_block_type: str = "UNetMidBlock2DCrossAttn"
    block_out_channels: tuple[int, ...] = UNetConfig.block_out_channels
    layers_per_block: int = 2
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    attention_head_dim: int | tuple[int, ...] = 8
    cross_attention_dim: int = 1280
    transformer_layers_per_block: int | tuple[Any, ...] = 1
    use_linear_projection: bool = False
    upcast_attention: bool | None = False
    addition_embed_type: str | None = None
    addition_embed_type_num_heads: int = 64
    addition_time_embed_dim: int | None = None
    projection_class_embeddings_input_dim: int | None = None

    INERT: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "controlnet_conditioning_channel_order": ("rgb", "bgr"),
        "mid_block_type": ("UNetMidBlock2DCrossAttn", "UNetMidBlock2D"),
        "addition_embed_type": UNetConfig.INERT["addition_embed_type"],
    } | {
        name: UNetConfig.INERT[name]
        for name in (
            "only_cross_attention",
            "downsample_padding",
            "mid_block_scale_factor",
            "act_fn",
            "encoder_hid_dim",
            "encoder_hid_dim_type",
            "num_attention_heads",
            "class_embed_type",
            "num_class_embeds",
            "resnet_time_scale_shift",
        )
    }

    @property
    def encoder(self) -> UNetConfig:
        """The config of a UNet that has this encoder."""
        levels = len(self.block_out_channels)
        shared = {name: getattr(self, name) for name in shared_names()}
        return UNetConfig.from_dict(shared, up_block_types=("UpBlock2D",) * levels)

    @classmethod
    def of(cls, unet: UNetConfig, **own: Any) -> ControlNetConfig:
        """The config of a ControlNet on a UNet; `own` are the entries that a UNet has not.

        Raises UnsupportedConfig for a UNet of which such a config cannot tell.
        """
        if unet.time_embedding_dim not in (None, 4 * unet.block_out_channels[0]):
            raise UnsupportedConfig(
                f"time_embedding_dim={unet.time_embedding_dim!r} of the UNet has no place in a "
                "ControlNet's config (supported: None)"
            )
        shared = {name: getattr(unet, name) for name in shared_names()}
        for name in ("layers_per_block", "cross_attention_dim"):
            values = set(unet.per_level(name))
            if len(values) > 1:
                raise UnsupportedConfig(
                    f"{name}={shared[name]!r} of the UNet differs between levels, but a "
                    "ControlNet's config holds one number"
                )
            shared[name] = values.pop()
        return cls.from_dict(shared, **own)


def shared_names() -> list[str]:
    """The keys that configs of UNets and of ControlNets both have."""
    own = {field.name for field in fields(ControlNetConfig)}
    return [field.name for field in fields(UNetConfig) if field.name in own]


@dataclass
class ControlNetOutput(Output):
    """What is added to the UNet's skips, in their order, and to its mid block's output."""

    down_block_res_samples: tuple[Tensor, ...]
    mid_block_res_sample: Tensor


class HintEmbedding(nn.Module):
    """A picture (B, C, H, W) at the size of the latents (B, C', h, w), by convolutions."""

    def __init__(self, in_channels: int, channels: Sequence[int], out_channels: int) -> None:
        super().__init__()
        self.conv_in = Conv2d(in_channels, channels[0], 3, padding=1)
        self.blocks = nn.ModuleList()
        for before, after in pairwise(channels):
            self.blocks.append(Conv2d(before, before, 3, padding=1))
            self.blocks.append(Conv2d(before, after, 3, padding=1, stride=2))
        self.conv_out = zeroed(Conv2d(channels[-1], out_channels, 3, padding=1))

    def forward(self, picture: Tensor) -> Tensor:
        x = F.silu(self.conv_in(picture))
        for block in self.blocks:
            x = F.silu(block(x))
        return self.conv_out(x)


def zeroed(module: Conv2d) -> Conv2d:
    """A convolution that gives zeros until it is trained."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def skip_channels(config: UNetConfig) -> Iterator[int]:
    """The channels of each skip of a UNet's encoder, from the input down."""
    yield config.block_out_channels[0]
    last = len(config.block_out_channels) - 1
    layers = config.per_level("layers_per_block")
    for level, channels in enumerate(config.block_out_channels):
        yield from [channels] * (layers[level] + (level < last))


class ControlNetModel(UNetEncoder):
    """A ControlNet; keyword arguments are those of `config.json` (see `ControlNetConfig`)."""

    config_class = ControlNetConfig
    config: ControlNetConfig

    def __init__(self, **config: Any) -> None:
        super().__init__()
        self.config = ControlNetConfig.from_dict(config)
        encoder = self.config.encoder
        self.build_encoder(encoder)
        self.controlnet_cond_embedding = HintEmbedding(
            self.config.conditioning_channels,
            self.config.conditioning_embedding_out_channels,
            encoder.block_out_channels[0],
        )
        self.controlnet_down_blocks = nn.ModuleList(
            zeroed(Conv2d(channels, channels, 1)) for channels in skip_channels(encoder)
        )
        middle = encoder.block_out_channels[-1]
        self.controlnet_mid_block = zeroed(Conv2d(middle, middle, 1))

    @classmethod
    def from_unet(
        cls,
        unet: UNet2DConditionModel,
        controlnet_conditioning_channel_order: str = "rgb",
        conditioning_embedding_out_channels: Sequence[int] = (16, 32, 96, 256),
        load_weights_from_unet: bool = True,
        conditioning_channels: int = 3,
    ) -> ControlNetModel:
        """A ControlNet to train for a UNet, from whose weights it starts; it steers nothing yet.

        The guidance embedding of an LCM is left behind: ControlNets know no guidance.
        """
        own = ControlNetConfig.of(
            unet.config,
            controlnet_conditioning_channel_order=controlnet_conditioning_channel_order,
            conditioning_embedding_out_channels=conditioning_embedding_out_channels,
            conditioning_channels=conditioning_channels,
        )
        net = cls(**own)
        if load_weights_from_unet:
            wanted = [name for name in net.state_dict() if not name.startswith("controlnet_")]
            weights = unet.state_dict()
            net.load_state_dict({name: weights[name] for name in wanted}, strict=False)
        return net

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        encoder_hidden_states: Tensor,
        controlnet_cond: Tensor,
        conditioning_scale: float = 1.0,
        *,
        added_cond_kwargs: Mapping[str, Tensor] | None = None,
        guess_mode: bool = False,
        return_dict: bool = True,
    ) -> ControlNetOutput | tuple[tuple[Tensor, ...], Tensor]:
        """The residuals of the UNet at (sample, timestep) that a picture asks for.

        Shapes: sample (B, C, h, w); timestep a number or (B,); encoder_hidden_states (B, L, D);
        controlnet_cond (B, 3, H, W) in [0, 1]. `guess_mode` weighs deep residuals more.
        """
        hint = self.embed_hint(controlnet_cond)
        found = self.residuals(sample, timestep, encoder_hidden_states, hint, added_cond_kwargs)
        down, mid = self.scaled(*found, conditioning_scale, guess_mode)
        return ControlNetOutput(down, mid) if return_dict else (down, mid)

    def embed_hint(self, picture: Tensor) -> Tensor:
        """A picture (B, 3, H, W) in [0, 1] as (B, C', h, w); it is the same at every step."""
        backwards = self.config.controlnet_conditioning_channel_order == "bgr"
        return self.controlnet_cond_embedding(picture.flip(1) if backwards else picture)

    def residuals(
        self,
        z: Tensor,
        t: Tensor | float,
        text: Tensor,
        hint: Tensor,
        added: Mapping[str, Tensor] | None = None,
        memo: Memo | None = None,
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        """Unscaled residuals of the skips and of the middle, for a picture that is embedded."""
        times = torch.as_tensor(t, device=z.device).reshape(-1).expand(len(z))
        time, context = self.time(times, z, text, None, added, memo), Context(text, memo=memo)
        x, skips = self.encode(self.conv_in(z) + hint, time, context)
        assert self.mid_block is not None, "a ControlNet's config has always one"
        middle = self.controlnet_mid_block(self.mid_block(x, time, context))
        pairs = zip(self.controlnet_down_blocks, skips, strict=True)
        return tuple(convolution(skip) for convolution, skip in pairs), middle

    def scaled(
        self, down: Sequence[Tensor], mid: Tensor, scale: float, guess_mode: bool
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        """Residuals times `scale`; without places if the config says so, else with guess_mode
        growing from a tenth at the first skip to the whole in the middle."""
        every, count = [*down, mid], len(down)
        if self.config.global_pool_conditions:
            every = [x.mean(dim=(2, 3), keepdim=True) * scale for x in every]
        elif guess_mode:
            every = [x * (scale * 10 ** (i / count - 1)) for i, x in enumerate(every)]
        else:
            every = [x * scale for x in every]
        return tuple(every[:-1]), every[-1]


class MultiControlNetModel(Several):
    """Several ControlNets, whose residuals add up."""

    each = ControlNetModel

    def __init__(self, controlnets: Sequence[ControlNetModel]) -> None:
        super().__init__(controlnets)
        self.nets = nn.ModuleList(controlnets)

    @property
    def members(self) -> list[Any]:
        return list(self.nets)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        encoder_hidden_states: Tensor,
        controlnet_cond: Sequence[Tensor],
        conditioning_scale: Sequence[float],
        **arguments: Any,
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        """The sums of the residuals; a picture and a scale for each ControlNet."""
        every = [
            net(sample, timestep, encoder_hidden_states, picture, scale, **arguments)
            for net, picture, scale in zip(
                self.nets, controlnet_cond, conditioning_scale, strict=True
            )
        ]
        downs = zip(*(down for down, _ in every), strict=True)
        mids = [mid for _, mid in every]
        return tuple(sum(down[1:], down[0]) for down in downs), sum(mids[1:], mids[0])
