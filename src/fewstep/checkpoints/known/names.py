"""diffusers' names -> the original code's: where in a single file a module finds its tensors.

a module's name                           the file's, behind its prefix
down_blocks.1.resnets.0.conv1.weight      input_blocks.4.0.in_layers.2.weight
encoder.mid_block.attentions.0.to_q.bias  encoder.mid.attn_1.q.bias
encoder.layers.0.self_attn.k_proj.weight  transformer.resblocks.0.attn.in_proj_weight, 2nd third
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor


class Piece(NamedTuple):
    """Where a tensor lies: its name in the file, which third of it, whether it is transposed."""

    key: str
    third: int | None = None
    transposed: bool = False

    def of(self, value: Tensor) -> Tensor:
        """The tensor that is meant, from the one in the file."""
        if self.third is not None:
            return value.chunk(3)[self.third]
        return value.T.contiguous() if self.transposed else value


Names = Callable[[str], Piece]  # a module's name -> where it lies, without the file's prefix


UNET_HEADS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "time_embedding.cond_proj": "time_embed.cond_proj",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "controlnet_mid_block": "middle_block_out.0",
    "controlnet_cond_embedding.conv_in": "input_hint_block.0",
}
UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
BLOCK = re.compile(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.+)")
MID = re.compile(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)")
CONTROL = re.compile(r"controlnet_(down_blocks|cond_embedding\.blocks)\.(\d+)\.(.+)")


def unet_names(config: Mapping[str, Any]) -> Names:
    """The names of a UNet or a ControlNet with this config."""
    levels = len(config["block_out_channels"])
    layers = config["layers_per_block"]
    counts = list(layers) if isinstance(layers, (list, tuple)) else [layers] * levels
    attend = [kind.startswith("CrossAttn") for kind in config.get("up_block_types", ())]

    def place(way: str, level: int, what: str, index: int, rest: str) -> str:
        sampler = what in ("downsamplers", "upsamplers")
        if way == "down":
            row = 1 + sum(n + 1 for n in counts[:level]) + (counts[level] if sampler else index)
            column = int(what == "attentions")
            rest = rest.replace("conv.", "op.", 1) if sampler else rest
            return f"input_blocks.{row}.{column}.{rest}"
        rows = [n + 1 for n in reversed(counts)]
        row = sum(rows[:level]) + (rows[level] - 1 if sampler else index)
        column = 1 + attend[level] if sampler else int(what == "attentions")
        return f"output_blocks.{row}.{column}.{rest}"

    def hint(index: int) -> str:  # the hint's convolutions have an activation behind each
        return f"input_hint_block.{2 * index}"

    def name(key: str) -> Piece:
        head, _, last = key.rpartition(".")
        if head in UNET_HEADS:
            return Piece(f"{UNET_HEADS[head]}.{last}")
        if head == "controlnet_cond_embedding.conv_out":
            return Piece(
                f"{hint(2 * len(config['conditioning_embedding_out_channels']) - 1)}.{last}"
            )
        if match := CONTROL.fullmatch(key):
            index = int(match[2])
            row = f"zero_convs.{index}.0" if match[1] == "down_blocks" else hint(index + 1)
            return Piece(f"{row}.{match[3]}")
        if match := MID.fullmatch(key):
            middle = 2 * int(match[2]) if match[1] == "resnets" else 1
            return Piece(f"middle_block.{middle}.{inner(match[1], match[3], UNET_RESNET)}")
        if match := BLOCK.fullmatch(key):
            rest = inner(match[3], match[5], UNET_RESNET)
            return Piece(place(match[1], int(match[2]), match[3], int(match[4]), rest))
        return Piece(key)

    return name


def inner(what: str, rest: str, names: Mapping[str, str]) -> str:
    """`rest`, a name within a resnet or another part of a block, in the original's words."""
    layer, _, last = rest.partition(".")
    return f"{names.get(layer, layer)}.{last}" if what == "resnets" else rest


VAE_RESNET = {"conv_shortcut": "nin_shortcut"}
VAE_ATTENTION = {
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}
VAE_KEY = re.compile(r"(encoder|decoder)\.(.+)")
SAMPLERS = {"downsamplers": "downsample", "upsamplers": "upsample"}


def vae_names(config: Mapping[str, Any]) -> Names:
    """The names of an AutoencoderKL with this config."""
    last_level = len(config["block_out_channels"]) - 1

    def within(key: str) -> str:
        if match := MID.fullmatch(key):
            if match[1] == "resnets":
                rest = inner("resnets", match[3], VAE_RESNET)
                return f"mid.block_{int(match[2]) + 1}.{rest}"
            layer, _, last = match[3].rpartition(".")
            return f"mid.attn_1.{VAE_ATTENTION[layer]}.{last}"
        if match := BLOCK.fullmatch(key):
            way, what = match[1], match[3]
            level = int(match[2]) if way == "down" else last_level - int(match[2])
            row = SAMPLERS.get(what, f"block.{match[4]}")
            return f"{way}.{level}.{row}.{inner(what, match[5], VAE_RESNET)}"
        return key.replace("conv_norm_out.", "norm_out.")

    def name(key: str) -> Piece:
        match = VAE_KEY.fullmatch(key)
        return Piece(f"{match[1]}.{within(match[2])}" if match else key)

    return name


def clip_name(key: str) -> Piece:
    """The name in a CLIP text encoder that was written by transformers."""
    return Piece(f"text_model.{key.removeprefix('text_model.')}")


OPEN_CLIP = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
}
OPEN_CLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
THIRDS = {"self_attn.q_proj": 0, "self_attn.k_proj": 1, "self_attn.v_proj": 2}
LAYER = re.compile(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)")


def open_clip_name(key: str) -> Piece:
    """The name in a text encoder of OpenCLIP, which keeps queries, keys and values in one."""
    key = key.removeprefix("text_model.")
    if key == "text_projection.weight":
        return Piece("text_projection", transposed=True)
    if match := LAYER.fullmatch(key):
        row, layer, last = f"transformer.resblocks.{match[1]}", match[2], match[3]
        if layer in THIRDS:
            return Piece(f"{row}.attn.in_proj_{last}", third=THIRDS[layer])
        return Piece(f"{row}.{OPEN_CLIP_LAYER[layer]}.{last}")
    return Piece(OPEN_CLIP[key])
