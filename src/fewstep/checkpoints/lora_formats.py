"""LoRA files of all dialects -> one form: for each network, what changes in which of its modules.

Dialects differ in how they name modules and parts, not in what they mean:

    diffusers, PEFT       unet.down_blocks.1.attentions.0.proj_in.lora_A.weight
    diffusers, older      unet.down_blocks.1.attentions.0.proj_in.lora.down.weight
    diffusers, oldest     ...transformer_blocks.0.attn1.processor.to_q_lora.down.weight
    Kohya (A1111)         lora_unet_down_blocks_1_attentions_0_proj_in.lora_down.weight
    Kohya for SDXL        lora_unet_input_blocks_4_1_proj_in.lora_down.weight

So a name is looked up, dots as underscores, among all the names that the network's own modules may
go by; nothing is guessed from its spelling.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from ..errors import CheckpointError
from .known.names import unet_names
from .locate import HOW_TO_CONVERT, PICKLED, Source
from .weights import opened

WEIGHTS_NAME = "pytorch_lora_weights.safetensors"
# Files of a training run that are no LoRA.
NO_LORA = ("scheduler", "optimizer", "checkpoint")
PEFT_CONFIG_NAME = "adapter_config.json"  # PEFT's, beside its weights
PEFT_PREFIX = "base_model.model."  # of its names
# The entry of a safetensors file's metadata that holds PEFT's config as JSON.
CONFIG_KEY = "lora_adapter_metadata"

# Part of a change -> how names of it end.
ENDINGS = {
    "down": r"\.lora_A(?:\.[^.]+)?\.weight|(?:[._]lora|\.lora_linear_layer)\.down\.weight"
    r"|\.lora_down\.weight",
    "up": r"\.lora_B(?:\.[^.]+)?\.weight|(?:[._]lora|\.lora_linear_layer)\.up\.weight"
    r"|\.lora_up\.weight",
    "mid": r"\.lora_mid\.weight",
    "alpha": r"(?:[._]lora|\.lora_linear_layer)?\.(?:network_)?alpha",
    "dora_scale": r"\.dora_scale|\.lora_magnitude_vector(?:\.[^.]+)??(?:\.weight)?",
    "diff": r"\.diff|\.w_norm",
    "diff_b": r"\.diff_b|\.b_norm",
} | {
    name: rf"\.{name}"
    for name in (
        *(f"hada_{factor}" for factor in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")),
        *(f"lokr_{factor}" for factor in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")),
    )
}
KEY = re.compile(rf"(.+?)(?:{'|'.join(f'(?P<{part}>{end})' for part, end in ENDINGS.items())})")
PREFIXES = {
    "lora_unet_": "unet",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "lycoris_": "unet",
    "unet.": "unet",
    "text_encoder.": "text_encoder",
    "text_encoder_2.": "text_encoder_2",
    "diffusion_model.": "unet",
}
# The sets of parts that make a change of a weight; of hada and lokr the two factors will do.
KINDS = ({"down", "up"}, {"hada_w1", "hada_w2"}, {"lokr_w1", "lokr_w2"}, {"diff"})
# Text channels that a UNet reads -> the models that have so many.
FAMILIES = {768: "SD 1.x", 1024: "SD 2.x", 1280: "the SDXL refiner", 2048: "SDXL"}
# Names that only other networks' files hold -> what those are for.
FOREIGN = (
    (re.compile(r"double_blocks|single_blocks|single_transformer_blocks"), "FLUX"),
    (re.compile(r"joint_blocks|joint_transformer_blocks"), "SD 3"),
    (re.compile(r"^lora_controlnet$"), "control (a control-LoRA)"),
    (re.compile(r"^(transformer\.|lora_transformer_)"), "a diffusion transformer"),
    (re.compile(r"^lora_prior_"), "Stable Cascade"),
)


@dataclass(frozen=True, eq=False)
class Change:
    """What a file says about one module: tensors by part, as in the file, and alpha.

    `rooted`: the product is scaled by alpha / sqrt(rank) in place of alpha / rank (rsLoRA). `rank`
    is given where the parts do not show it and it counts all the same (PEFT's LoKr of whole parts).
    """

    parts: Mapping[str, Tensor]
    alpha: float | None = None
    rooted: bool = False
    rank: int | None = None


Changes = dict[str, Change]  # by the module's name in its network


class Key(NamedTuple):
    """What a name in a file says. `network` is None where it does not say."""

    network: str | None
    module: str  # with underscores for dots
    part: str


def find_lora(place: Source, weight_name: str | None) -> Path:
    """The local path of a LoRA file. Raises CheckpointError if it is not clear which is meant."""
    path = Path(place.path)
    wanted = place.path if weight_name is None else weight_name
    if wanted.lower().endswith(PICKLED):
        raise CheckpointError(f"{wanted} is not a safetensors file: {HOW_TO_CONVERT}")
    if os.path.isfile(path) or (weight_name is None and path.suffix == ".safetensors"):
        if weight_name not in (None, path.name):
            raise CheckpointError(f"{path} is a file; leave weight_name={weight_name!r} out")
        if not os.path.isfile(path):
            raise CheckpointError(f"there is no file {path}")
        return path
    names = place.names()
    if weight_name is not None or WEIGHTS_NAME in names:
        return fetched(place, weight_name or WEIGHTS_NAME)
    here = [name for name in names if "/" not in name and not any(n in name for n in NO_LORA)]
    candidates = [name for name in here if name.endswith(".safetensors")]
    if len(candidates) == 1:
        return fetched(place, candidates[0])
    if candidates:
        raise CheckpointError(
            f"{place.path!r} holds several files, any of which may be meant: "
            f"{', '.join(candidates)}; pass weight_name="
        )
    pickled = any(name.endswith(PICKLED) for name in here)
    remedy = HOW_TO_CONVERT if pickled else "pass subfolder= if it lies in one"
    raise CheckpointError(
        f"{place.path!r} holds no safetensors file; there is: "
        f"{', '.join(names[:10]) or 'nothing'}; {remedy}"
    )


def fetched(place: Source, name: str) -> Path:
    """The local path of a file, with PEFT's config beside it if there is one."""
    if PEFT_CONFIG_NAME in place.names():
        place.fetch(PEFT_CONFIG_NAME)
    return place.fetch(name)


def read_lora(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a safetensors file by name, mapped, and the PEFT config that lies with them.

    PEFT itself puts its config beside the file, diffusers into it with a network's name in front.
    """
    with opened(path) as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        stored = (file.metadata() or {}).get(CONFIG_KEY)
    beside = path.with_name(PEFT_CONFIG_NAME)
    if any(key.startswith(PEFT_PREFIX) for key in tensors) and beside.is_file():
        stored = beside.read_text(encoding="utf-8")
    try:
        config = json.loads(stored) if stored else {}
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"the LoRA config of {path} is not valid JSON: {error}") from error
    return tensors, config if isinstance(config, dict) else {}


def split_key(key: str) -> Key | None:
    """What a name in a file says, or None if it ends like no part of a LoRA."""
    match = KEY.fullmatch(key.removeprefix(PEFT_PREFIX))
    if match is None or match.lastgroup is None:
        return None
    module, network = match[1], None
    for prefix, named in PREFIXES.items():
        if module.startswith(prefix):
            module, network = module.removeprefix(prefix), named
            break
    module = module.replace(".processor.", ".").replace(".temporal_transformer.", ".")
    module = module.replace(".attention_blocks.0.", ".attn1.")  # AnimateDiff's own names
    module = module.replace(".attention_blocks.1.", ".attn2.").replace(".", "_")
    return Key(network, module.removeprefix("text_model_"), match.lastgroup)


def names_of_modules(
    modules: Iterable[str], unet_config: Mapping[str, Any] | None = None
) -> dict[str, str]:
    """Every name, dots as underscores, that files may call the modules of a network by -> module.

    `unet_config` is that of a UNet, whose modules have names in the original code too.
    """
    original = None if unet_config is None else unet_names(unet_config)
    own: dict[str, str] = {}
    names: dict[str, str] = {}
    for module in modules:
        plain = module.removeprefix("text_model.")
        own[plain.replace(".", "_")] = module
        also = [plain.removesuffix(".0")] if plain.endswith(".to_out.0") else []
        if match := re.fullmatch(r"(.+\.self_attn\.)(q|k|v|out)_proj", plain):
            also.append(f"{match[1]}to_{match[2]}")
        if original is not None and "motion_modules" not in module:
            also.append(original(f"{module}.weight").key.removesuffix(".weight"))
        names |= {name.replace(".", "_"): module for name in also}
    return names | own


def parse_lora(
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    names: Mapping[str, Mapping[str, str]],
) -> tuple[dict[str, Changes], list[str]]:
    """(the changes by network and module, the keys that fit no module or are no whole change).

    `names` are those of `names_of_modules` by network, `config` is PEFT's.
    """
    found: dict[tuple[str, str], dict[str, str]] = {}  # (network, module) -> part -> key
    surplus = []
    for key in tensors:
        place = _place(split_key(key), names)
        if place is None or (part := place[2]) in found.setdefault(place[:2], {}):
            surplus.append(key)
        else:
            found[place[:2]][part] = key
    changes: dict[str, Changes] = {}
    for (network, module), keys in found.items():
        if not is_whole(keys):
            surplus += keys.values()
            continue
        parts = {part: _tensor(key, tensors[key]) for part, key in keys.items()}
        changes.setdefault(network, {})[module] = _change(parts, config, network, module)
    return changes, surplus


def is_whole(parts: Iterable[str]) -> bool:
    """Whether parts of these names make a change: one kind of it, nothing missing."""
    have = set(parts) - {"alpha"}
    for stem in ("hada_w1", "hada_w2", "lokr_w1", "lokr_w2"):
        if {f"{stem}_a", f"{stem}_b"} <= have:
            have.add(stem)
    kinds = [kind for kind in KINDS if kind <= have]
    return len(kinds) == 1 or have == {"diff_b"}


def refuse_other_family(
    tensors: Mapping[str, Tensor],
    modules: Mapping[str, Iterable[str]],
    unet_config: Mapping[str, Any] | None,
) -> None:
    """Raises CheckpointError, naming the two, if a file was made for another kind of model.

    `modules` are the names of the modules by network.
    """
    given = None if unet_config is None else unet_config.get("cross_attention_dim")
    ours = given[0] if isinstance(given, (tuple, list)) else given
    said = {key: split for key in tensors if (split := split_key(key))}
    theirs = text_channels(tensors)
    family = next((f for p, f in FOREIGN if any(p.search(key) for key in tensors)), None)
    if family is None and ours is not None and theirs and ours not in theirs:
        family = _family(min(theirs))
    if family is None and "text_encoder_2" not in modules:
        is_second = (name.network == "text_encoder_2" for name in said.values())
        family = "SDXL (it has a second text encoder)" if any(is_second) else None
    if family is not None:
        raise CheckpointError(f"this LoRA is for {family}; the model is {_family(ours)}")
    moves = any("motion_modules" in name.module for name in said.values())
    if moves and not any("motion_modules" in name for name in modules.get("unet", ())):
        raise CheckpointError(
            "this LoRA is for AnimateDiff's motion modules; the model has none, so load it into an "
            "AnimateDiffPipeline"
        )


def text_channels(tensors: Mapping[str, Tensor]) -> set[int]:
    """The channels of the text that the UNet of a file's LoRA attends to; empty if it is silent."""
    said = {key: split for key in tensors if (split := split_key(key))}
    return {
        channels
        for key, name in said.items()
        if name.module.endswith("attn2_to_k") and "motion_modules" not in name.module
        if (channels := _inputs(name.part, tensors[key])) is not None
    }


def _family(channels: int | None) -> str:
    if channels is None:
        return "without a UNet"
    return f"{FAMILIES.get(channels, 'another')} ({channels} text channels)"


def _inputs(part: str, value: Tensor) -> int | None:
    """The input channels of a module by one part of its change, or None if it does not say."""
    return value.shape[1] if part in ("down", "diff", "hada_w1_b") and value.ndim > 1 else None


def _place(said: Key | None, names: Mapping[str, Mapping[str, str]]) -> tuple[str, str, str] | None:
    """(network, module, part) of a key, or None if no network has such a module."""
    if said is None:
        return None
    for network in names if said.network is None else [said.network]:
        if module := names.get(network, {}).get(said.module):
            return network, module, said.part
    return None


def _tensor(key: str, value: Tensor) -> Tensor:
    # PEFT keeps one magnitude per output, in a shape that does not say so where it is a row.
    return value.reshape(-1, 1) if "lora_magnitude_vector" in key else value


def _change(
    parts: dict[str, Tensor], config: Mapping[str, Any], network: str, module: str
) -> Change:
    """The change of one module. An alpha among the tensors goes before PEFT's."""

    def setting(name: str) -> Any:
        return config.get(f"{network}.{name}", config.get(name))

    given = parts.pop("alpha", None)
    if given is not None and given.numel() != 1:
        raise CheckpointError(f"alpha of {module} must be one number, got {tuple(given.shape)}")
    alpha = float(given) if given is not None else setting("lora_alpha") or setting("alpha")
    if given is None:
        plain = module.removeprefix("text_model.")
        for name, value in (setting("alpha_pattern") or {}).items():
            if f".{plain}".endswith(f".{name.removeprefix('text_model.')}"):
                alpha = value
    rank = setting("r") if setting("peft_type") == "LOKR" else None
    return Change(parts, alpha, rooted=bool(setting("use_rslora")), rank=rank)
