"""The UNet of AnimateDiff: the 2-D UNet, with motion modules in its blocks.

Shapes: B videos, F frames, C channels, H and W latent height and width, L text tokens, D text
channels. The 2-D part sees B F rows, the frames of each video in turn.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from ..checkpoints.config import Config
from ..errors import RequestError, UnsupportedConfig
from .base import Model
from .lora import adapters_of
from .motion import KnowsLength, MotionAdapter, MotionAdapterConfig, MotionModules
from .unet import UNet2DConditionModel, UNet2DConditionOutput, UNetConfig

UNetMotionT = TypeVar("UNetMotionT", bound="UNetMotionModel")


@dataclass(frozen=True)
class UNetMotionConfig(Config):
    """`config.json` of a UNet with motion modules."""

    sample_size: int | tuple[int, int] | None = None
    in_channels: int = 4
    out_channels: int = 4
    down_block_types: tuple[str, ...] = (
        "CrossAttnDownBlockMotion",
        "CrossAttnDownBlockMotion",
        "CrossAttnDownBlockMotion",
        "DownBlockMotion",
    )
    up_block_types: tuple[str, ...] = (
        "UpBlockMotion",
        "CrossAttnUpBlockMotion",
        "CrossAttnUpBlockMotion",
        "CrossAttnUpBlockMotion",
    )
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int | tuple[int, ...] = 2
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    cross_attention_dim: int | tuple[int, ...] = 1280
    transformer_layers_per_block: int | tuple[Any, ...] = 1
    reverse_transformer_layers_per_block: tuple[Any, ...] | None = None
    transformer_layers_per_mid_block: int | None = None
    temporal_transformer_layers_per_block: int | tuple[int, ...] = 1
    temporal_transformer_layers_per_mid_block: int | tuple[int, ...] = 1
    use_linear_projection: bool = False
    num_attention_heads: int | tuple[int, ...] = 8
    motion_max_seq_length: int = 32
    motion_num_attention_heads: int | tuple[int, ...] = 8
    use_motion_mid_block: bool = True
    addition_embed_type: str | None = None
    addition_time_embed_dim: int | None = None
    projection_class_embeddings_input_dim: int | None = None
    time_cond_proj_dim: int | None = None
    # Facts of 2-D UNets that diffusers' layout has no key for.
    flip_sin_to_cos: bool = True
    freq_shift: int = 0
    mid_block_type: str | None = "UNetMidBlock2DCrossAttn"
    upcast_attention: bool | None = False
    time_embedding_dim: int | None = None
    addition_embed_type_num_heads: int = 64

    INERT: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "downsample_padding": (1,),
        "mid_block_scale_factor": (1,),
        "mid_block_layers": (1,),
        "act_fn": ("silu", "swish"),
        "reverse_temporal_transformer_layers_per_block": (None,),
        "reverse_motion_num_attention_heads": (None,),
        "encoder_hid_dim": (None,),
        "encoder_hid_dim_type": (None,),
    }
    OURS: ClassVar[tuple[str, ...]] = (
        "flip_sin_to_cos",
        "freq_shift",
        "mid_block_type",
        "upcast_attention",
        "time_embedding_dim",
        "addition_embed_type_num_heads",
    )

    def __post_init__(self) -> None:
        if self.use_motion_mid_block and self.mid_block_type != "UNetMidBlock2DCrossAttn":
            raise UnsupportedConfig(
                f"use_motion_mid_block=True needs a mid block with attention, not "
                f"{self.mid_block_type!r}; use a motion adapter without it"
            )
        mid, layers = self.transformer_layers_per_mid_block, self.transformer_layers_per_block
        last = layers[-1] if isinstance(layers, tuple) else layers
        if mid not in (None, last):
            raise UnsupportedConfig(
                f"transformer_layers_per_mid_block={mid!r} is not implemented (supported: None, "
                f"or {last!r} as at the last level)"
            )

    @classmethod
    def of(cls, unet: UNetConfig, motion: MotionAdapterConfig | None) -> UNetMotionConfig:
        """The config of a 2-D UNet that gets motion modules."""
        config: dict[str, Any] = {
            name: unet[name] for name in shared_names() if not name.endswith("block_types")
        }
        config["down_block_types"] = [k.replace("2D", "Motion") for k in unet.down_block_types]
        config["up_block_types"] = [k.replace("2D", "Motion") for k in unet.up_block_types]
        config["num_attention_heads"] = unet.attention_head_dim
        if motion is not None:
            config |= {
                "temporal_transformer_layers_per_block": motion.motion_transformer_layers_per_block,
                "temporal_transformer_layers_per_mid_block": motion.mid_layers,
                "motion_num_attention_heads": motion.motion_num_attention_heads,
                "motion_max_seq_length": motion.motion_max_seq_length,
                "use_motion_mid_block": motion.use_motion_mid_block,
            }
        return cls.from_dict(config)

    @property
    def flat(self) -> UNetConfig:
        """The config of the UNet without its motion modules."""
        config: dict[str, Any] = {name: getattr(self, name) for name in shared_names()}
        config["down_block_types"] = [k.replace("Motion", "2D") for k in self.down_block_types]
        config["up_block_types"] = [k.replace("Motion", "2D") for k in self.up_block_types]
        return UNetConfig.from_dict(config | {"attention_head_dim": self.num_attention_heads})

    @property
    def motion(self) -> MotionAdapterConfig:
        """The config of the motion modules alone."""
        return MotionAdapterConfig(
            block_out_channels=self.block_out_channels,
            motion_layers_per_block=self.layers_per_block,
            motion_transformer_layers_per_block=self.temporal_transformer_layers_per_block,
            motion_transformer_layers_per_mid_block=self.temporal_transformer_layers_per_mid_block,
            motion_num_attention_heads=self.motion_num_attention_heads,
            motion_norm_num_groups=self.norm_num_groups,
            motion_max_seq_length=self.motion_max_seq_length,
            use_motion_mid_block=self.use_motion_mid_block,
        )

    def per_level(self, name: str) -> list[Any]:
        """The value of a field for each level, whether the config holds one or a list of them."""
        return self.flat.per_level(name)

    def to_dict(self, class_name: str | None = None) -> dict[str, Any]:
        """As of any config; keys that diffusers has not are left out unless they matter."""
        idle = {f.name for f in fields(self) if f.name in self.OURS and self[f.name] == f.default}
        return {key: v for key, v in super().to_dict(class_name).items() if key not in idle}


def shared_names() -> list[str]:
    """The keys that a UNet's config has with and without motion modules."""
    own = {field.name for field in fields(UNetMotionConfig)}
    return [field.name for field in fields(UNetConfig) if field.name in own]


class UNetMotionModel(KnowsLength, UNet2DConditionModel):
    """The denoising UNet of videos; keyword arguments are those of `config.json`."""

    # Has all that the 2-D UNet reads of its own.
    config_class = UNetMotionConfig  # type: ignore[assignment]
    config: UNetMotionConfig  # type: ignore[assignment]
    keeps_memo = False  # windows of a video see other texts

    def __init__(self, **config: Any) -> None:
        known = UNetMotionConfig.from_dict(config)
        super().__init__(**known.flat)
        self.config = known
        for name, module in MotionAdapter(**known.motion).named_modules():
            if isinstance(module, MotionModules):
                self.get_submodule(name).motion_modules = module.motion_modules

    @classmethod
    def from_unet2d(
        cls: type[UNetMotionT],
        unet: UNet2DConditionModel,
        motion_adapter: MotionAdapter | None = None,
        load_weights: bool = True,
    ) -> UNetMotionT:
        """A UNet with motion modules, of the dtype and on the device of `unet`.

        On the CPU it shares the memory of their weights. Motion modules are new without a
        `motion_adapter`, and all weights without `load_weights`.
        """
        refuse_loras(unet)
        given = None if motion_adapter is None else motion_adapter.config
        config = UNetMotionConfig.of(unet.config, given)
        if given is not None:
            require_fit(given, config.motion)
        if not load_weights:
            return cls(**config)
        motion = MotionAdapter(**config.motion) if motion_adapter is None else motion_adapter
        with torch.device("meta"):
            model = cls(**config)
        state = tensors_like(unet, unet) | tensors_like(motion, unet)
        model.load_state_dict(state, strict=True, assign=True)
        return model.train(unet.training)

    def load_motion_modules(self, motion_adapter: MotionAdapter) -> None:
        """Put other motion modules of the same structure in place of the present ones."""
        require_fit(motion_adapter.config, self.config.motion)
        # Assigned, not copied: the present tensors may be those of another adapter.
        self.load_state_dict(tensors_like(motion_adapter, self), strict=False, assign=True)

    def save_motion_modules(self, save_directory: str | os.PathLike[str], **how: Any) -> None:
        """Writes the motion modules as a MotionAdapter; `how` as in `save_pretrained`."""
        with torch.device("meta"):
            adapter = MotionAdapter(**self.config.motion)
        state = self.state_dict()
        adapter.load_state_dict({key: state[key] for key in adapter.state_dict()}, assign=True)
        adapter.save_pretrained(save_directory, **how)

    def forward(  # type: ignore[override]  # a video says how many frames it has
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
    ) -> UNet2DConditionOutput | tuple[Tensor]:
        """The network's output (B, C, F, H, W) at (sample, timestep).

        Shapes: sample (B, C, F, H, W); timestep a number or (B,); encoder_hidden_states (B, L, D),
        or a text per frame, (B, F, L, D) or (B F, L, D); timestep_cond (B, time_cond_proj_dim);
        residuals (B F, C, H, W).
        """
        self.check_sample(sample)
        videos, frames = sample.shape[0], sample.shape[2]

        def per_frame(value: Tensor) -> Tensor:
            return value.repeat_interleave(frames, dim=0)

        t = torch.as_tensor(timestep, device=sample.device).reshape(-1).expand(videos)
        (x,) = super().forward(
            sample.transpose(1, 2).flatten(0, 1),
            per_frame(t),
            texts_of_frames(encoder_hidden_states, videos, frames),
            None if timestep_cond is None else per_frame(timestep_cond),
            {name: per_frame(value) for name, value in (added_cond_kwargs or {}).items()},
            down_block_additional_residuals,
            mid_block_additional_residual,
            down_intrablock_additional_residuals,
            return_dict=False,
            frames=frames,
        )
        x = x.unflatten(0, (videos, frames)).transpose(1, 2)
        return UNet2DConditionOutput(x) if return_dict else (x,)

    def check_sample(self, sample: Tensor) -> None:
        """Raises RequestError unless this is a video that the motion modules have places for."""
        if sample.ndim != 5:
            raise RequestError(
                "sample must be a video (videos, channels, frames, height, width), got shape "
                f"{tuple(sample.shape)}"
            )
        known = self.config.motion_max_seq_length
        if sample.shape[2] > known:
            raise RequestError(
                f"sample has {sample.shape[2]} frames, but these motion modules know {known}; "
                "AnimateDiffPipeline makes longer videos, by windows"
            )


def tensors_like(network: Model, other: Model) -> dict[str, Tensor]:
    """The tensors of `network` in the dtype and on the device of `other`; on the CPU no copies."""
    # On an accelerator LoRAs are merged in place, which the other network must not see.
    owns = other.device.type != "cpu"
    state = network.state_dict().items()
    return {k: v.to(other.device, other.dtype, copy=owns) for k, v in state}


def refuse_loras(unet: UNet2DConditionModel) -> None:
    """Raises RequestError if LoRAs are merged into a UNet that could not be taken out again."""
    adapters = adapters_of(unet)
    if active := sorted(adapters.effective.keys() - adapters.fused.keys()):
        raise RequestError(
            f"unet has the LoRAs {', '.join(active)}; call unload_lora_weights() on its pipeline, "
            "and load them into the one with motion modules"
        )


def texts_of_frames(text: Tensor, videos: int, frames: int) -> Tensor:
    """Text (B F, L, D) from a text per video (B, L, D) or per frame, (B, F, L, D) or as it is."""
    if text.ndim == 4:
        text = text.flatten(0, 1)
    if len(text) == videos * frames:
        return text
    if len(text) != videos:
        raise RequestError(
            f"encoder_hidden_states holds {len(text)} texts for {videos} videos of {frames} "
            "frames; give one per video, or one per frame"
        )
    return text.repeat_interleave(frames, dim=0)


def require_fit(given: MotionAdapterConfig, wanted: MotionAdapterConfig) -> None:
    """Raises RequestError unless motion modules of one config fit where another is wanted."""
    for name, value in given.structure.items():
        if value != wanted.structure[name]:
            raise RequestError(
                f"motion_adapter does not fit the UNet: its {name} is {value}, the UNet's "
                f"{wanted.structure[name]}; use an adapter made for this kind of UNet"
            )
