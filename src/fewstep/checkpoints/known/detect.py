"""What a single file is, by the names and shapes of its tensors."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from ...errors import CheckpointError, UnsupportedConfig
from . import FAMILIES, LCM_SCHEDULER, Family

Shapes = Mapping[str, tuple[int, ...]]

UNET_PREFIX = "model.diffusion_model."
CONTROL_PREFIX = "control_model."


class Kind(NamedTuple):
    """A kind of file: which of its names tell, what it is called, and how it is used."""

    pattern: str
    title: str
    remedy: str


# In this order: a file is of the first kind that one of its names matches.
KINDS: Mapping[str, Kind] = {
    "lora": Kind(
        r"lora_(A|B|up|down)\b|^lora_(unet|te\d?)_|\.(hada|lokr)_|\.lora\.",
        "a LoRA",
        "load a pipeline and call pipe.load_lora_weights on it",
    ),
    "embedding": Kind(
        r"^(emb_params|string_to_param.*|clip_[lg])$",
        "a textual inversion",
        "load a pipeline and call pipe.load_textual_inversion on it",
    ),
    "ip-adapter": Kind(
        r"^(ip_adapter|image_proj)\.", "an IP-Adapter", "call pipe.load_ip_adapter on a pipeline"
    ),
    "motion": Kind(
        r"\bmotion_modules\.", "an AnimateDiff motion module", "give it to a MotionAdapter"
    ),
    "controlnet": Kind(
        r"(^|\.)(input_hint_block|zero_convs)\.",
        "a ControlNet",
        "load it with ControlNetModel.from_single_file and pass it as controlnet=",
    ),
    "diffusers": Kind(
        r"(^|\.)(down_blocks|up_blocks)\.\d+\.(resnets|attentions)\.|^controlnet_cond_embedding\.",
        "a component in diffusers' layout",
        "put it beside its config.json, as diffusion_pytorch_model.safetensors, and load that "
        "folder with the component's from_pretrained",
    ),
    "t2i-adapter": Kind(
        r"^(adapter\.)?body\.\d+\.", "a T2I-Adapter", "load its folder with T2IAdapter"
    ),
    "transformer": Kind(
        r"(^|\.)(joint_blocks|double_blocks|single_blocks)\.\d+\.",
        "a diffusion transformer (Stable Diffusion 3, Flux or their like)",
        "these models are not implemented",
    ),
    "playground": Kind(
        r"^edm_(mean|std)$", "a Playground 2.5 model", "its noise schedule is not implemented"
    ),
    "checkpoint": Kind(
        r"(^|\.)input_blocks\.0\.0\.weight$", "a checkpoint", "load it with a pipeline"
    ),
    "vae": Kind(
        r"^(first_stage_model\.)?decoder\.up\.\d+\.block\.",
        "a VAE",
        "load it with AutoencoderKL.from_single_file and pass it as vae=",
    ),
    "text encoder": Kind(
        r"(^|\.)(resblocks|text_model\.encoder\.layers)\.\d+\.",
        "a text encoder",
        "load its folder with transformers and pass it as text_encoder=",
    ),
}


def kind_of(names: Iterable[str]) -> str | None:
    """The key in KINDS of a file with tensors of these names; None if it is none of them."""
    listed = list(names)
    for name, kind in KINDS.items():
        pattern = re.compile(kind.pattern)
        if any(pattern.search(key) for key in listed):
            return name
    return None


def require_kind(shapes: Shapes, wanted: tuple[str, ...], path: str) -> None:
    """Raises CheckpointError, saying what it is, unless a file is of one of the `wanted` kinds."""
    found = kind_of(shapes)
    if found in wanted:
        return
    expected = " or ".join(KINDS[name].title for name in wanted)
    if found is None:
        shown = ", ".join(sorted(shapes)[:5]) or "nothing"
        raise CheckpointError(f"{path} is not {expected} of a known layout; it holds {shown}")
    raise CheckpointError(f"{path} is {KINDS[found].title}, not {expected}; {KINDS[found].remedy}")


def unet_prefix(shapes: Shapes) -> str:
    """What the names of the UNet's (or ControlNet's) tensors begin with in a file."""
    for prefix in (UNET_PREFIX, CONTROL_PREFIX):
        if f"{prefix}input_blocks.0.0.weight" in shapes:
            return prefix
    return ""


def family_of(shapes: Shapes, path: str, part: str = "unet") -> str:
    """The name of the first family that has a `part` like the file's: "unet" or "controlnet".

    Told by the channels of the text, of the input, and by whether the middle has attention.
    """
    prefix = unet_prefix(shapes)
    context = text_channels(shapes, prefix)
    inputs = shapes[f"{prefix}input_blocks.0.0.weight"][1]
    plain = f"{prefix}middle_block.1.norm.weight" not in shapes
    others = []
    for name, family in FAMILIES.items():
        config = family.configs.get(part)
        if config is None or config["cross_attention_dim"] != context:
            continue
        others.append(config.get("in_channels", 4))
        if others[-1] == inputs and plain == (config.get("mid_block_type") == "UNetMidBlock2D"):
            return name
    if others:
        raise UnsupportedConfig(
            f"{path} holds a {part} of {inputs} input channels with{'out' if plain else ''} "
            f"attention in the middle, which is not known among those of {context} text channels "
            f"(known: {sorted(set(others))} input channels); pass config= with its folder"
        )
    raise UnsupportedConfig(
        f"{path} holds a {part} of {context} text channels, which no known model has; "
        "pass config= with the folder of its configs"
    )


def text_channels(shapes: Shapes, prefix: str) -> int | None:
    """The channels of the text that a UNet attends to."""
    for key, shape in shapes.items():
        if key.startswith(prefix) and key.endswith("attn2.to_k.weight"):
            return shape[1]
    return None


def adjusted(family: Family, shapes: Shapes) -> Family:
    """`family` with what only the file tells: guidance as an input (LCM), velocity as output."""
    if guided := shapes.get(f"{unet_prefix(shapes)}time_embed.cond_proj.weight"):
        is_sd = family.pipeline == "StableDiffusionPipeline"
        family = family.replaced(
            "LatentConsistencyModelPipeline" if is_sd else None,
            unet={"time_cond_proj_dim": guided[1]} | ({"sample_size": 96} if is_sd else {}),
            scheduler=LCM_SCHEDULER,
        )
    if "v_pred" in shapes:
        changes = {"prediction_type": "v_prediction"}
        zero_terminal = {"rescale_betas_zero_snr": True} if "ztsnr" in shapes else {}
        family = family.replaced(scheduler={**changes, **zero_terminal})
    return family
