"""The conditional UNet of Stable Diffusion 1.x, 2.x, SDXL and SSD-1B, and of LCMs on them.

Attribute names equal the checkpoints' keys, so a strict `load_state_dict` is the whole mapping.

Shapes: B batch, C channels, H and W latent height and width, L text tokens, D text channels,
E time-embedding channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..checkpoints.config import Config
from ..errors import RequestError, UnsupportedConfig
from ..ops.layers import Conv2d
from ..ops.norm import norm_silu
from ..ops.upsample import Upsample
from ..outputs import Output
from .base import Model
from .freeu import FreeU
from .layers import (
    Context,
    Downsample,
    Memo,
    ResnetBlock,
    TextTimeEmbedding,
    Time,
    TimestepEmbedding,
    Transformer2D,
    timestep_embedding,
)

DOWN_BLOCKS = ("DownBlock2D", "CrossAttnDownBlock2D")
UP_BLOCKS = ("UpBlock2D", "CrossAttnUpBlock2D")
UNetT = TypeVar("UNetT", bound="UNet2DConditionModel")

MID_BLOCKS = ("UNetMidBlock2DCrossAttn", "UNetMidBlock2D", None)


@dataclass(frozen=True)
class UNetConfig(Config):
    """`config.json` of a UNet. `attention_head_dim` is, by an old misnomer, the number of heads."""

    sample_size: int | tuple[int, int] | None = None
    in_channels: int = 4
    out_channels: int = 4
    flip_sin_to_cos: bool = True
    freq_shift: int = 0
    down_block_types: tuple[str, ...] = (
        "CrossAttnDownBlock2D",
        "CrossAttnDownBlock2D",
        "CrossAttnDownBlock2D",
        "DownBlock2D",
    )
    mid_block_type: str | None = "UNetMidBlock2DCrossAttn"
    up_block_types: tuple[str, ...] = (
        "UpBlock2D",
        "CrossAttnUpBlock2D",
        "CrossAttnUpBlock2D",
        "CrossAttnUpBlock2D",
    )
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int | tuple[int, ...] = 2
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    cross_attention_dim: int | tuple[int, ...] = 1280
    transformer_layers_per_block: int | tuple[Any, ...] = 1
    reverse_transformer_layers_per_block: tuple[Any, ...] | None = None
    attention_head_dim: int | tuple[int, ...] = 8
    use_linear_projection: bool = False
    addition_embed_type: str | None = None
    addition_embed_type_num_heads: int = 64
    addition_time_embed_dim: int | None = None
    upcast_attention: bool | None = False
    time_embedding_dim: int | None = None
    time_cond_proj_dim: int | None = None
    projection_class_embeddings_input_dim: int | None = None

    INERT: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "center_input_sample": (False,),
        "mid_block_type": MID_BLOCKS,
        "only_cross_attention": (False,),
        "downsample_padding": (1,),
        "mid_block_scale_factor": (1,),
        "dropout": (0.0,),
        "act_fn": ("silu", "swish"),
        "encoder_hid_dim": (None,),
        "encoder_hid_dim_type": (None,),
        "num_attention_heads": (None,),
        "dual_cross_attention": (False,),
        "class_embed_type": (None,),
        "addition_embed_type": (None, "text", "text_time"),
        "num_class_embeds": (None,),
        "resnet_time_scale_shift": ("default",),
        "resnet_skip_time_act": (False,),
        "resnet_out_scale_factor": (1.0,),
        "time_embedding_type": ("positional",),
        "time_embedding_act_fn": (None,),
        "timestep_post_act": (None,),
        "conv_in_kernel": (3,),
        "conv_out_kernel": (3,),
        "attention_type": ("default",),
        "class_embeddings_concat": (False,),
        "mid_block_only_cross_attention": (None, False),
        "cross_attention_norm": (None,),
    }

    def __post_init__(self) -> None:
        for name, supported in (("down_block_types", DOWN_BLOCKS), ("up_block_types", UP_BLOCKS)):
            for value in getattr(self, name):
                if value not in supported:
                    raise UnsupportedConfig(
                        f"{name}={value!r} is not implemented (supported: {supported})"
                    )
        levels = len(self.block_out_channels)
        for name in (
            "down_block_types",
            "up_block_types",
            "attention_head_dim",
            "layers_per_block",
            "cross_attention_dim",
            "transformer_layers_per_block",
        ):
            value = getattr(self, name)
            if isinstance(value, tuple) and len(value) != levels:
                raise UnsupportedConfig(
                    f"{name}={value!r} must have as many entries as block_out_channels, {levels}"
                )

    def per_level(self, name: str) -> list[Any]:
        """The value of a field for each level, whether the config holds one or a list of them."""
        value = getattr(self, name)
        return list(value) if isinstance(value, tuple) else [value] * len(self.block_out_channels)


@dataclass(frozen=True)
class Layout:
    """What all blocks of one UNet share."""

    temb_channels: int
    groups: int
    eps: float
    linear_projection: bool
    upcast: bool

    def resnet(self, in_channels: int, out_channels: int) -> ResnetBlock:
        return ResnetBlock(in_channels, out_channels, self.temb_channels, self.groups, self.eps)

    def attention(self, channels: int, heads: int, context_dim: int, layers: int) -> Transformer2D:
        return Transformer2D(
            channels, heads, context_dim, layers, self.groups, self.linear_projection, self.upcast
        )


class DownBlock(nn.Module):
    """Resnets, each followed by a transformer where the level has attention; then half the size."""

    def __init__(
        self,
        layout: Layout,
        in_channels: int,
        out_channels: int,
        attention: Sequence[tuple[int, int, int]] | None,
        layers: int,
        downsample: bool,
    ) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(
            layout.resnet(in_channels if i == 0 else out_channels, out_channels)
            for i in range(layers)
        )
        if attention is not None:
            self.attentions = nn.ModuleList(layout.attention(out_channels, *a) for a in attention)
        self.motion_modules: nn.ModuleList | None = None  # one per resnet (see motion.py)
        self.downsamplers = nn.ModuleList([Downsample(out_channels)]) if downsample else None

    def forward(
        self,
        x: Tensor,
        time: Time,
        text: Context,
        feature: Tensor | None = None,
        frames: int = 1,
    ) -> tuple[Tensor, list[Tensor]]:
        """`feature` is a T2I-Adapter's for this block."""
        skips = []
        has_attention = hasattr(self, "attentions")
        for index, (resnet, attention) in enumerate(
            zip(self.resnets, attentions_of(self), strict=True)
        ):
            x = resnet(x, time)
            x = x if attention is None else attention(x, text)
            x = moved(self, index, x, frames)
            skips.append(x)
        if feature is not None and has_attention:
            x = skips[-1] = x + feature
        if self.downsamplers is not None:
            x = self.downsamplers[0](x)
            skips.append(x)
        if feature is not None and not has_attention:  # there it comes after the downsampling
            x = skips[-1] = x + feature
        return x, skips


class MidBlock(nn.Module):
    """Resnet, transformer, resnet; or a single resnet (SSD-1B)."""

    def __init__(
        self, layout: Layout, channels: int, attention: tuple[int, int, int] | None
    ) -> None:
        super().__init__()
        count = 1 if attention is None else 2
        self.resnets = nn.ModuleList(layout.resnet(channels, channels) for _ in range(count))
        if attention is not None:
            self.attentions = nn.ModuleList([layout.attention(channels, *attention)])
        self.motion_modules: nn.ModuleList | None = None

    def forward(self, x: Tensor, time: Time, text: Context, frames: int = 1) -> Tensor:
        x = self.resnets[0](x, time)
        if len(self.resnets) == 2:
            x = moved(self, 0, self.attentions[0](x, text), frames)
            x = self.resnets[1](x, time)
        return x


class UpBlock(nn.Module):
    """Resnets over the hidden state and a skip each, with transformers; then twice the size."""

    def __init__(
        self,
        layout: Layout,
        in_channels: int,
        skip_channels: Sequence[int],
        out_channels: int,
        attention: Sequence[tuple[int, int, int]] | None,
        upsample: bool,
    ) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(
            layout.resnet((in_channels if i == 0 else out_channels) + skip, out_channels)
            for i, skip in enumerate(skip_channels)
        )
        if attention is not None:
            self.attentions = nn.ModuleList(layout.attention(out_channels, *a) for a in attention)
        self.motion_modules: nn.ModuleList | None = None
        self.upsamplers = nn.ModuleList([Upsample(out_channels)]) if upsample else None

    def forward(
        self,
        x: Tensor,
        skips: list[Tensor],
        time: Time,
        text: Context,
        freeu: FreeU | None,
        index: int,
        frames: int = 1,
    ) -> Tensor:
        """Takes its skips off the end of `skips`."""
        for layer, (resnet, attention) in enumerate(
            zip(self.resnets, attentions_of(self), strict=True)
        ):
            skip = skips.pop()
            if freeu is not None:
                x, skip = freeu.apply(index, x, skip)
            x = resnet(torch.cat([x, skip], dim=1), time)
            x = x if attention is None else attention(x, text)
            x = moved(self, layer, x, frames)
        if self.upsamplers is not None:
            # The next skip's size, not twice this: an odd size was rounded up on the way down.
            x = self.upsamplers[0](x, (skips[-1].shape[2], skips[-1].shape[3]))
        return x


def attentions_of(block: DownBlock | UpBlock) -> Iterable[nn.Module | None]:
    """The transformer that follows each resnet of a block, or None for each."""
    attentions = getattr(block, "attentions", None)
    return [None] * len(block.resnets) if attentions is None else attentions


def moved(block: DownBlock | MidBlock | UpBlock, layer: int, x: Tensor, frames: int) -> Tensor:
    """x (B F, C, H, W) behind the motion module of a layer, if the block has any."""
    return x if block.motion_modules is None else block.motion_modules[layer](x, frames)


def layers_of(value: int | Sequence[int], count: int) -> list[int]:
    """Transformer layers behind each of `count` resnets, from one number or a list of them."""
    layers = [value] * count if isinstance(value, int) else list(value)
    if len(layers) != count:
        raise UnsupportedConfig(
            f"transformer_layers_per_block entry {value!r} must hold {count} numbers"
        )
    return layers


@dataclass
class UNet2DConditionOutput(Output):
    """`sample` (B, C, H, W): the predicted noise, velocity or z_0."""

    sample: Tensor


class UNetEncoder(Model):
    """Everything down to the middle of the UNet, the part that a ControlNet has too."""

    def build_encoder(self, config: UNetConfig) -> Layout:
        """Make conv_in, the embeddings, the down blocks and the mid block; returns their layout."""
        channels = config.block_out_channels
        temb_channels = config.time_embedding_dim or 4 * channels[0]
        layout = Layout(
            temb_channels,
            config.norm_num_groups,
            config.norm_eps,
            config.use_linear_projection,
            bool(config.upcast_attention),
        )
        heads = config.per_level("attention_head_dim")
        context = config.per_level("cross_attention_dim")
        depth = config.per_level("transformer_layers_per_block")
        layers = config.per_level("layers_per_block")

        self.conv_in = Conv2d(config.in_channels, channels[0], 3, padding=1)
        self.time_embedding = TimestepEmbedding(
            channels[0], temb_channels, config.time_cond_proj_dim
        )
        if config.addition_embed_type == "text_time":
            if not (
                config.projection_class_embeddings_input_dim and config.addition_time_embed_dim
            ):
                raise UnsupportedConfig(
                    "addition_embed_type='text_time' needs projection_class_embeddings_input_dim "
                    "and addition_time_embed_dim"
                )
            self.add_embedding: nn.Module = TimestepEmbedding(
                config.projection_class_embeddings_input_dim, temb_channels
            )
        elif config.addition_embed_type == "text":
            self.add_embedding = TextTimeEmbedding(
                context[0], temb_channels, config.addition_embed_type_num_heads
            )
        self.down_blocks = nn.ModuleList(
            DownBlock(
                layout,
                channels[max(i - 1, 0)],
                channels[i],
                [(heads[i], context[i], d) for d in layers_of(depth[i], layers[i])]
                if kind == "CrossAttnDownBlock2D"
                else None,
                layers[i],
                downsample=i < len(channels) - 1,
            )
            for i, kind in enumerate(config.down_block_types)
        )
        self.mid_block: MidBlock | None = None
        if config.mid_block_type is not None:
            attention = None
            if config.mid_block_type == "UNetMidBlock2DCrossAttn":
                if not isinstance(depth[-1], int):
                    raise UnsupportedConfig(
                        "mid_block_type='UNetMidBlock2DCrossAttn' needs a plain number as the last "
                        f"entry of transformer_layers_per_block, got {depth[-1]!r}"
                    )
                attention = (heads[-1], context[-1], depth[-1])
            self.mid_block = MidBlock(layout, channels[-1], attention)
        return layout

    def time(
        self,
        t: Tensor,
        like: Tensor,
        text: Tensor,
        timestep_cond: Tensor | None = None,
        added: Mapping[str, Tensor] | None = None,
        memo: Memo | None = None,
    ) -> Time:
        """The time embedding of times `t` (B,), in the dtype of `like`.

        With a `memo` it is that of all times of the run, made at the first of them.
        """
        if memo is None:
            return Time(self.embed(t, like, text, timestep_cond, added))
        embedding = memo.embeddings.get(self)
        if embedding is None:
            times = memo.times.to(t.device)[:, None].expand(-1, len(t))  # (N, B)
            embedding = self.embed(times, like, text, timestep_cond, added)
            memo.embeddings[self] = embedding
        return Time(embedding, memo)

    def embed(
        self,
        t: Tensor,
        like: Tensor,
        text: Tensor,
        timestep_cond: Tensor | None,
        added: Mapping[str, Tensor] | None,
    ) -> Tensor:
        """SiLU of the time embedding (..., B, E) of times `t` (..., B), in the dtype of `like`.

        `text` (B, L, D) is added to it where the config says so (addition_embed_type="text").
        `timestep_cond` (B, time_cond_proj_dim) is the guidance embedding of an LCM; `added` holds
        SDXL's `text_embeds` (B, P) and `time_ids` (B, 6).
        """
        config = self.config
        if timestep_cond is not None and self.time_embedding.cond_proj is None:
            raise RequestError(
                "timestep_cond was given, but this UNet has no time_cond_proj_dim: "
                "it is not a guidance-distilled LCM; leave timestep_cond out"
            )
        sinusoid = self.waves(t, config.block_out_channels[0]).to(like.dtype)
        temb = self.time_embedding(sinusoid, timestep_cond)
        if config.addition_embed_type == "text":
            temb = temb + self.add_embedding(text)
        elif config.addition_embed_type == "text_time":
            temb = temb + self.add_embedding(self.sizes_and_text(added or {}, like.dtype))
        return F.silu(temb)

    def waves(self, values: Tensor, dim: int) -> Tensor:
        """Sinusoids (..., dim) float32 of values (...), as the config spells them."""
        flip, shift = self.config.flip_sin_to_cos, self.config.freq_shift
        return timestep_embedding(values.flatten(), dim, flip, shift).unflatten(0, values.shape)

    def sizes_and_text(self, added: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """SDXL's pooled text and the sinusoids of its sizes, (B, P + 6 D)."""
        if missing := [key for key in ("text_embeds", "time_ids") if key not in added]:
            raise RequestError(
                f"added_cond_kwargs must hold {missing}: this UNet is conditioned on the "
                "pooled text and on sizes (SDXL)"
            )
        sizes = self.waves(added["time_ids"], self.config.addition_time_embed_dim).flatten(1)
        return torch.cat([added["text_embeds"].to(dtype), sizes.to(dtype)], dim=1)

    def encode(
        self,
        x: Tensor,
        time: Time,
        text: Context,
        features: Sequence[Tensor] = (),
        frames: int = 1,
    ) -> tuple[Tensor, list[Tensor]]:
        """The hidden state in front of the mid block, and the skips from the input down.

        `x` has passed conv_in; `features` are a T2I-Adapter's, one per block.
        """
        skips = [x]
        for block, feature in zip_longest(self.down_blocks, features[: len(self.down_blocks)]):
            x, new = block(x, time, text, feature, frames)
            skips += new
        return x, skips


class UNet2DConditionModel(UNetEncoder):
    """The denoising UNet; keyword arguments are those of `config.json` (see `UNetConfig`)."""

    config_class = UNetConfig
    config: UNetConfig
    keeps_memo = True  # whether `forward` takes a memo

    def __init__(self, **config: Any) -> None:
        super().__init__()
        self.config = UNetConfig.from_dict(config)
        layout = self.build_encoder(self.config)
        self.build_decoder(self.config, layout)
        self.freeu: FreeU | None = None
        # A tuple, so that they are in no state dict; see ip_adapter.attach.
        self.ip_adapters: tuple[nn.Module, ...] = ()

    def _apply(self: UNetT, fn: Callable[..., Tensor], recurse: bool = True) -> UNetT:
        for adapter in self.ip_adapters:  # they follow to devices and dtypes
            adapter._apply(fn, recurse)
        return super()._apply(fn, recurse)

    def build_decoder(self, config: UNetConfig, layout: Layout) -> None:
        """Make the up blocks and the output layers."""
        channels = config.block_out_channels
        heads = config.per_level("attention_head_dim")
        context = config.per_level("cross_attention_dim")
        layers = config.per_level("layers_per_block")
        reverse = config.reverse_transformer_layers_per_block
        depth = config.per_level("transformer_layers_per_block")
        if reverse is not None:
            depth = list(reversed(reverse))
        elif any(not isinstance(d, int) for d in depth):
            raise UnsupportedConfig(
                "a nested transformer_layers_per_block needs reverse_transformer_layers_per_block"
            )
        blocks = []
        before = channels[-1]
        for index, kind in enumerate(config.up_block_types):
            level = len(channels) - 1 - index
            count = layers[level] + 1
            # The last skip of a level comes from the block above it (or from conv_in).
            skips = [channels[level]] * (count - 1) + [channels[max(level - 1, 0)]]
            attention = None
            if kind == "CrossAttnUpBlock2D":
                attention = [
                    (heads[level], context[level], d) for d in layers_of(depth[level], count)
                ]
            blocks.append(
                UpBlock(layout, before, skips, channels[level], attention, upsample=level > 0)
            )
            before = channels[level]
        self.up_blocks = nn.ModuleList(blocks)
        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, channels[0], config.norm_eps)
        self.conv_out = Conv2d(channels[0], config.out_channels, 3, padding=1)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        encoder_hidden_states: Tensor,
        timestep_cond: Tensor | None = None,
        added_cond_kwargs: Mapping[str, Tensor] | None = None,
        down_block_additional_residuals: Sequence[Tensor] | None = None,
        mid_block_additional_residual: Tensor | None = None,
        down_intrablock_additional_residuals: Sequence[Tensor] | None = None,
        return_dict: bool = True,
        frames: int = 1,
        pictures: Sequence[Tensor] = (),
        memo: Memo | None = None,
    ) -> UNet2DConditionOutput | tuple[Tensor]:
        """The network's output at (sample, timestep).

        Shapes: sample (B, C, H, W), any H and W; timestep a number or (B,); encoder_hidden_states
        (B, L, D); timestep_cond (B, time_cond_proj_dim). The residuals of ControlNets are added to
        the skips and to the mid block's output, those of T2I-Adapters within the down blocks.
        `frames`: so many rows in turn are one video, which concerns motion modules alone.
        `pictures` are the tokens (B, N, D) of picture prompts, for each of the IP-Adapters. `memo`
        keeps what is the same at every step of a run.
        """
        if pictures and len(pictures) != len(self.ip_adapters):
            raise RequestError(
                f"pictures holds tokens for {len(pictures)} IP-Adapters, but this UNet has "
                f"{len(self.ip_adapters)}"
            )
        context = Context(encoder_hidden_states, tuple(pictures), memo)
        t = torch.as_tensor(timestep, device=sample.device).reshape(-1).expand(len(sample))
        time = self.time(t, sample, encoder_hidden_states, timestep_cond, added_cond_kwargs, memo)
        features = tuple(down_intrablock_additional_residuals or ())
        x, skips = self.encode(self.conv_in(sample), time, context, features, frames)
        if self.mid_block is not None:
            x = self.mid_block(x, time, context, frames)
            behind = features[len(self.down_blocks) :]  # full_adapter_xl has one more
            if behind and behind[0].shape == x.shape:
                x = x + behind[0]
        if down_block_additional_residuals is not None:
            pairs = zip(skips, down_block_additional_residuals, strict=True)
            skips = [skip + residual for skip, residual in pairs]
        if mid_block_additional_residual is not None:
            x = x + mid_block_additional_residual
        for index, block in enumerate(self.up_blocks):
            x = block(x, skips, time, context, self.freeu, index, frames)
        x = self.conv_out(norm_silu(self.conv_norm_out, x))
        return UNet2DConditionOutput(x) if return_dict else (x,)

    def enable_freeu(self, s1: float, s2: float, b1: float, b2: float) -> None:
        """Scale skips by s and backbone features by b in the first two up blocks (FreeU)."""
        self.freeu = FreeU(s1, s2, b1, b2)

    def disable_freeu(self) -> None:
        """Undo `enable_freeu`."""
        self.freeu = None
