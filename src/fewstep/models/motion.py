"""Motion modules (AnimateDiff, Guo et al. 2023): the frames of a video see each other in a UNet.

Attribute names equal the checkpoints' keys, so a strict `load_state_dict` is the whole mapping.

Shapes: B videos, F frames, C channels, H and W latent height and width. Rows of B F are the frames
of each video in turn.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from ..checkpoints.config import Config
from ..checkpoints.locate import Source
from ..checkpoints.weights import read_tensors
from ..errors import UnsupportedConfig
from ..ops.layers import Linear
from .base import WEIGHTS_STEM, Model
from .layers import Attention, FeedForward

KnowsLengthT = TypeVar("KnowsLengthT", bound="KnowsLength")

# What says where the files of `from_pretrained` are.
REACH = (
    "subfolder",
    "variant",
    "revision",
    "cache_dir",
    "force_download",
    "local_files_only",
    "token",
)
MAX_ROWS = 1 << 15  # of one attention; CUDA's grids end at 65,535


@dataclass(frozen=True)
class MotionAdapterConfig(Config):
    """`config.json` of a MotionAdapter. Lists hold an entry per level of the UNet."""

    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    motion_layers_per_block: int | tuple[int, ...] = 2
    motion_transformer_layers_per_block: int | tuple[int, ...] = 1
    motion_transformer_layers_per_mid_block: int | tuple[int, ...] = 1
    motion_num_attention_heads: int | tuple[int, ...] = 8
    motion_norm_num_groups: int = 32
    motion_max_seq_length: int = 32
    use_motion_mid_block: bool = True

    INERT: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "motion_mid_block_layers_per_block": (1,),
        "conv_in_channels": (None,),
    }

    def __post_init__(self) -> None:
        _ = self.structure  # refuses lists of a wrong length

    @property
    def levels(self) -> tuple[tuple[int, int, int, int], ...]:
        """(channels, attention heads, transformer layers, modules) of each level going down."""
        names = (
            "motion_num_attention_heads",
            "motion_transformer_layers_per_block",
            "motion_layers_per_block",
        )
        count = len(self.block_out_channels)
        columns = [spread(name, getattr(self, name), count) for name in names]
        return tuple(zip(self.block_out_channels, *columns, strict=True))

    @property
    def mid_layers(self) -> int:
        """Transformer layers of the module in the middle."""
        name = "motion_transformer_layers_per_mid_block"
        return spread(name, getattr(self, name), 1)[0]

    @property
    def structure(self) -> dict[str, Any]:
        """What must be equal for weights to fit, in one spelling."""
        mid = self.mid_layers if self.use_motion_mid_block else None
        return {
            "levels (channels, heads, layers, modules)": self.levels,
            "layers in the middle": mid,
            "motion_norm_num_groups": self.motion_norm_num_groups,
            "motion_max_seq_length": self.motion_max_seq_length,
        }


def spread(name: str, value: Any, count: int) -> list[int]:
    """`count` numbers from one or from a list of them, as a config's entry `name` holds."""
    numbers = list(value) if isinstance(value, tuple) else [value] * count
    if len(numbers) != count or not all(isinstance(number, int) for number in numbers):
        raise UnsupportedConfig(f"{name}={value!r} must be a number or a list of {count} numbers")
    return numbers


class Positions(nn.Module):
    """Adds a sinusoidal place in time to x (N, F, C)."""

    def __init__(self, channels: int, length: int) -> None:
        super().__init__()
        frequencies = torch.exp(torch.arange(0, channels, 2) * (-math.log(10000.0) / channels))
        angles = torch.arange(length)[:, None] * frequencies
        waves = torch.stack([angles.sin(), angles.cos()], dim=2).flatten(1)  # in turn
        self.register_buffer("pe", waves[None, :, :channels])

    pe: Tensor  # (1, frames it knows, C)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.pe[:, : x.shape[1]]


class MotionBlock(nn.Module):
    """Two self-attentions over the frames, each told their places, and feed-forward."""

    def __init__(self, channels: int, heads: int, length: int) -> None:
        super().__init__()
        self.pos_embed = Positions(channels, length)
        self.norm1 = nn.LayerNorm(channels)
        self.attn1 = Attention(channels, heads)
        self.norm2 = nn.LayerNorm(channels)
        self.attn2 = Attention(channels, heads)
        self.norm3 = nn.LayerNorm(channels)
        self.ff = FeedForward(channels)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn1(self.pos_embed(self.norm1(x)))
        x = x + self.attn2(self.pos_embed(self.norm2(x)))
        return x + self.ff(self.norm3(x))


class MotionModule(nn.Module):
    """A transformer over the frames of each pixel of x (B F, C, H, W), normed over all frames."""

    def __init__(self, channels: int, heads: int, layers: int, groups: int, length: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.proj_in = Linear(channels, channels)
        self.transformer_blocks = nn.ModuleList(
            MotionBlock(channels, heads, length) for _ in range(layers)
        )
        self.proj_out = Linear(channels, channels)

    def forward(self, x: Tensor, frames: int) -> Tensor:
        video = x.unflatten(0, (-1, frames)).transpose(1, 2)  # (B, C, F, H, W)
        pixels = self.norm(video).permute(0, 3, 4, 2, 1)  # (B, H, W, F, C)
        parts = [self.attend(part) for part in pixels.flatten(0, 2).split(MAX_ROWS)]
        h = parts[0] if len(parts) == 1 else torch.cat(parts)
        return x + h.view(pixels.shape).permute(0, 3, 4, 1, 2).flatten(0, 1)

    def attend(self, h: Tensor) -> Tensor:
        """Frames (N, F, C) of N pixels, each having seen the others."""
        h = self.proj_in(h)
        for block in self.transformer_blocks:
            h = block(h)
        return self.proj_out(h)


class KnowsLength(Model):
    """A network that reads from the files how many frames it knows: configs have been wrong."""

    @classmethod
    def from_pretrained(
        cls: type[KnowsLengthT],
        pretrained_model_name_or_path: str | os.PathLike[str],
        **arguments: Any,
    ) -> KnowsLengthT:
        if "motion_max_seq_length" not in arguments:
            reach = {name: arguments[name] for name in REACH if name in arguments}
            source = Source(os.fspath(pretrained_model_name_or_path), **reach)
            for name, value in read_tensors(source.weights(WEIGHTS_STEM)):
                if name.endswith("pos_embed.pe"):
                    arguments["motion_max_seq_length"] = value.shape[1]
                    break
        return super().from_pretrained(pretrained_model_name_or_path, **arguments)


# The arguments that are passed on, for `help` and for the search after misspelt ones.
functools.update_wrapper(
    KnowsLength.from_pretrained.__func__,  # type: ignore[attr-defined]
    Model.from_pretrained.__func__,  # type: ignore[attr-defined]
)


class MotionModules(nn.Module):
    """The motion modules of one block of a UNet."""

    def __init__(self, modules: Sequence[MotionModule]) -> None:
        super().__init__()
        self.motion_modules = nn.ModuleList(modules)


class MotionAdapter(KnowsLength):
    """All motion modules of a UNet, as they come in files; `UNetMotionModel` puts them to use."""

    config_class = MotionAdapterConfig
    config: MotionAdapterConfig

    def __init__(self, **config: Any) -> None:
        super().__init__()
        self.config = known = MotionAdapterConfig.from_dict(config)
        rest = known.motion_norm_num_groups, known.motion_max_seq_length

        def block(channels: int, heads: int, layers: int, count: int) -> MotionModules:
            return MotionModules(
                [MotionModule(channels, heads, layers, *rest) for _ in range(count)]
            )

        self.down_blocks = nn.ModuleList(block(*level) for level in known.levels)
        self.up_blocks = nn.ModuleList(
            block(channels, heads, layers, count + 1)
            for channels, heads, layers, count in reversed(known.levels)
        )
        channels, heads, _, _ = known.levels[-1]
        self.mid_block = (
            block(channels, heads, known.mid_layers, 1) if known.use_motion_mid_block else None
        )
