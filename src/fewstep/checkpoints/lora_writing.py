"""Changes of a network's modules -> LoRA files, in the two forms that everybody reads.

    diffusers   unet.<module>.lora_A.weight, lora_B.weight; PEFT's config, with every rank and
                alpha, in the file's header
    kohya       lora_unet_<module>.lora_down.weight, lora_up.weight and alpha; of SDXL the modules
                have the original code's names

What is written in one form and read by `lora_formats` is the same in the other.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ..errors import RequestError
from .known.names import unet_names
from .lora_formats import CONFIG_KEY, Change, Changes
from .weights import save_tensors

Form = Literal["diffusers", "kohya"]
LOW_RANK = {"down", "up"}
# Parts of a change -> their names in Kohya's files; all others are called the same there.
KOHYA_PARTS = {
    "down": "lora_down.weight",
    "up": "lora_up.weight",
    "mid": "lora_mid.weight",
}
# Text channels that a UNet reads -> how Kohya's scripts call the model in a file's header.
KOHYA_MODELS = {768: "sd_v1", 1024: "sd_v2", 2048: "sdxl_base_v1-0"}


def write_lora_file(
    path: Path,
    changes: Mapping[str, Changes],
    form: Form,
    unet_config: Mapping[str, Any],
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Write the changes by network as one safetensors file; its path.

    `metadata` goes into the header too. Raises RequestError for changes that the form cannot hold.
    """
    if form not in get_args(Form):
        raise RequestError(f"form={form!r} is unknown; give one of {', '.join(get_args(Form))}")
    header = {"format": "pt", **(metadata or {})}
    if form == "diffusers":
        tensors, config = diffusers_form(changes)
        header[CONFIG_KEY] = json.dumps(config, indent=2, sort_keys=True)
    else:
        tensors = kohya_form(changes, unet_config)
        header |= kohya_header(changes, unet_config)
    save_tensors(tensors, path, header)
    return path


# ── diffusers ──


def diffusers_form(changes: Mapping[str, Changes]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors by PEFT's names, PEFT's configs with the network's name before each key)."""
    tensors: dict[str, Tensor] = {}
    config: dict[str, Any] = {}
    for network, found in changes.items():
        for module, change in found.items():
            if set(change.parts) != LOW_RANK:
                raise RequestError(
                    f"{network}.{module} is no plain LoRA ({', '.join(sorted(change.parts))}), "
                    "which diffusers' form cannot hold; keep Kohya's, or merge it into a model"
                )
            tensors[f"{network}.{module}.lora_A.weight"] = change.parts["down"]
            tensors[f"{network}.{module}.lora_B.weight"] = change.parts["up"]
        config |= {f"{network}.{key}": value for key, value in peft_config(found).items()}
    return tensors, config


def peft_config(changes: Changes) -> dict[str, Any]:
    """PEFT's config of the plain LoRAs of one network: what most have, and the exceptions."""
    # Text encoders are nested differently in different releases; the end of a name fits them all.
    named = {module.removeprefix("text_model."): change for module, change in changes.items()}
    ranks = {module: rank_of(change) for module, change in named.items()}
    alphas = {module: alpha_of(change) for module, change in named.items()}
    (rank, _), *_ = Counter(ranks.values()).most_common(1)
    (alpha, _), *_ = Counter(alphas.values()).most_common(1)
    return {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {module: r for module, r in ranks.items() if r != rank},
        "alpha_pattern": {module: a for module, a in alphas.items() if a != alpha},
        "target_modules": sorted(named),
    }


def rank_of(change: Change) -> int:
    """The rank of a plain LoRA."""
    return int(change.parts["down"].shape[0])


def alpha_of(change: Change) -> float:
    """The alpha for which alpha / rank is the scale of a plain LoRA."""
    rank = rank_of(change)
    if change.alpha is None:
        return rank
    alpha = change.alpha * math.sqrt(rank) if change.rooted else change.alpha
    return int(alpha) if alpha == int(alpha) else alpha


# ── Kohya ──


def kohya_form(changes: Mapping[str, Changes], unet_config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Tensors by Kohya's names. All kinds of changes have names there but PEFT's own LoKr."""
    tensors: dict[str, Tensor] = {}
    for network, found in changes.items():
        for module, change in found.items():
            name = kohya_name(network, module, unet_config)
            if change.rank is not None:
                raise RequestError(
                    f"{network}.{module} is PEFT's LoKr, whose scale Kohya's form cannot hold; "
                    "merge it into a model"
                )
            for part, value in change.parts.items():
                tensors[f"{name}.{KOHYA_PARTS.get(part, part)}"] = value
            if "down" in change.parts:
                tensors[f"{name}.alpha"] = torch.tensor(float(alpha_of(change)))
            elif change.alpha is not None:
                tensors[f"{name}.alpha"] = torch.tensor(float(change.alpha))
    return tensors


def kohya_name(network: str, module: str, unet_config: Mapping[str, Any]) -> str:
    """What Kohya's files call a module."""
    xl = unet_config.get("addition_embed_type") == "text_time"
    if network != "unet":
        prefix = {"text_encoder": "lora_te1" if xl else "lora_te", "text_encoder_2": "lora_te2"}
        return f"{prefix[network]}_{module.replace('.', '_')}"
    if xl:
        module = unet_names(unet_config)(f"{module}.weight").key.removesuffix(".weight")
    return f"lora_unet_{module.replace('.', '_')}"


def kohya_header(changes: Mapping[str, Changes], unet_config: Mapping[str, Any]) -> dict[str, str]:
    """What user interfaces read in the header: rank, alpha and the kind of model."""
    plain = [c for found in changes.values() for c in found.values() if set(c.parts) == LOW_RANK]
    ranks, alphas = {rank_of(change) for change in plain}, {alpha_of(change) for change in plain}
    channels = unet_config.get("cross_attention_dim")
    header = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(ranks.pop()) if len(ranks) == 1 else "Dynamic",
        "ss_network_alpha": str(alphas.pop()) if len(alphas) == 1 else "Dynamic",
    }
    if isinstance(channels, int) and channels in KOHYA_MODELS:
        header["ss_base_model_version"] = KOHYA_MODELS[channels]
    return header
