"""What a recipe's base is made of, from its configs alone: no weights are read, nothing fetched."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoints.known import FAMILIES, Family
from ..checkpoints.locate import Source
from ..checkpoints.single_file import SingleFile
from ..errors import CheckpointError, RequestError
from ..models.single_file import known_config, recognised
from .config import EMBEDDED_TEACHER, ConsistencyPhase, place_of

Configs = Mapping[str, Mapping[str, Any]]

# Bases whose configs need not be fetched -> their family, and what differs from it.
KNOWN: dict[str, tuple[str, dict[str, Any]]] = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": ("sd1", {}),
    "runwayml/stable-diffusion-v1-5": ("sd1", {}),
    "CompVis/stable-diffusion-v1-4": ("sd1", {}),
    "Lykon/dreamshaper-7": ("sd1", {}),
    "SimianLuo/LCM_Dreamshaper_v7": ("sd1", {"time_cond_proj_dim": 256}),
    "stabilityai/stable-diffusion-2-1": ("sd2", {}),
    "stabilityai/stable-diffusion-2-1-base": ("sd2-base", {}),
    "stabilityai/stable-diffusion-xl-base-1.0": ("sdxl", {}),
    "latent-consistency/lcm-sdxl": ("sdxl", {"time_cond_proj_dim": 256}),
    "segmind/SSD-1B": ("ssd-1b", {}),
    "latent-consistency/lcm-ssd-1b": ("ssd-1b", {"time_cond_proj_dim": 256}),
}
ENCODERS = ("text_encoder", "text_encoder_2")
PARTS = ("vae", *ENCODERS, "scheduler")


@dataclass(frozen=True)
class Base:
    """Configs by component, and what is to be said of where they come from."""

    configs: Configs
    note: str = ""

    @property
    def is_xl(self) -> bool:
        """Whether the network reads a pooled text and sizes."""
        return self.configs["unet"].get("addition_embed_type") == "text_time"

    @property
    def levels(self) -> int:
        """The resolutions of the autoencoder."""
        return len(self.configs.get("vae", {}).get("block_out_channels", (1,) * 4))

    @property
    def factor(self) -> int:
        """Pixels a side of a latent."""
        return 2 ** (self.levels - 1)


def base_of(settings: ConsistencyPhase, folder: str) -> Base:
    """The base of a recipe: what is on this machine, or the known configs of a name on the hub.

    Raises RequestError for a folder or file that is not there, or a repository of unknown shape.
    """
    base = place_of(settings.base, folder)
    if base.endswith(".safetensors") and Path(base).is_file():
        found = Base(single_file_configs(Path(base)))
    elif on_this_machine(base, settings):
        found = Base(stored_configs(base, settings))
    else:
        found = known_base("consistency.base", base)
    if settings.base == EMBEDDED_TEACHER:
        guided = {**found.configs["unet"], "time_cond_proj_dim": None}
        found = Base({**found.configs, "unet": guided})
    if not settings.unet:
        return found
    unet = place_of(settings.unet, folder)
    config: Mapping[str, Any]
    try:
        config = Source(unet, local_files_only=True).read_json("config.json")
    except CheckpointError:
        other = known_base("consistency.unet", unet)
        config = other.configs["unet"] if unet in KNOWN else found.configs["unet"]
        return Base({**found.configs, "unet": config}, joined(found, other))
    return Base({**found.configs, "unet": config}, found.note)


def joined(*bases: Base) -> str:
    """Their notes, once each."""
    return "; ".join(dict.fromkeys(base.note for base in bases if base.note))


def on_this_machine(base: str, settings: ConsistencyPhase) -> bool:
    """Whether the base is a folder or in the hub's cache."""
    try:
        names = local_source(base, settings).names()
    except CheckpointError:
        return False
    return "unet/config.json" in names or Path(base).is_dir()


def local_source(base: str, settings: ConsistencyPhase, subfolder: str | None = None) -> Source:
    """The base's files, without asking the hub."""
    revision = settings.revision or None
    return Source(base, subfolder=subfolder, revision=revision, local_files_only=True)


def stored_configs(base: str, settings: ConsistencyPhase) -> Configs:
    """The configs in a folder or in the hub's cache; of the text encoders those that it has."""
    names = local_source(base, settings).names()
    configs = {"unet": local_source(base, settings, "unet").read_json("config.json")}
    for part in PARTS:
        file = "scheduler_config.json" if part == "scheduler" else "config.json"
        if f"{part}/{file}" in names:
            configs[part] = local_source(base, settings, part).read_json(file)
    return configs


def single_file_configs(path: Path) -> Configs:
    """The configs of the family that a single file is recognised as."""
    file = SingleFile.open(path)
    name = recognised(file)
    parts = FAMILIES[name].configs
    return {**parts, "unet": known_config(file, "unet", name)}


def known_base(setting: str, name: str) -> Base:
    """The configs of a repository that is not here, from its name."""
    if name in KNOWN:
        family, changes = KNOWN[name]
        return Base(
            replaced(FAMILIES[family], changes),
            f"{name} is not on this machine and will be fetched; its known configs stand in",
        )
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
        raise RequestError(
            f"{setting}={name!r} is not there; give a folder in diffusers' layout, a single "
            ".safetensors file, or a hub repository OWNER/NAME"
        )
    family = guessed(name)
    return Base(
        replaced(FAMILIES[family], {}),
        f"{name} is not on this machine and will be fetched; its shape is guessed: {family}",
    )


def guessed(name: str) -> str:
    """The family that a repository's name speaks of; Stable Diffusion 1 where it says nothing."""
    words = name.lower()
    for mark, family in (("ssd-1b", "ssd-1b"), ("xl", "sdxl"), ("diffusion-2", "sd2")):
        if mark in words:
            return family
    return "sd1"


def replaced(family: Family, unet: Mapping[str, Any]) -> Configs:
    """A family's configs with entries of the UNet's replaced."""
    return family.replaced(unet=dict(unet)).configs


def check_family(base: Base) -> None:
    """Raises RequestError for a UNet and text encoders that are of different models."""
    width = sum(int(base.configs[part]["hidden_size"]) for part in ENCODERS if part in base.configs)
    wanted = base.configs["unet"].get("cross_attention_dim", 1280)
    if width and wanted != width:
        raise RequestError(
            f"the UNet reads text of {wanted} channels, but the base's text encoders give {width}; "
            "consistency.base and consistency.unet must be of one family"
        )
    if base.is_xl and "text_encoder_2" not in base.configs:
        raise RequestError(
            "the UNet reads a pooled text (SDXL), but the base has no text_encoder_2; "
            "set consistency.base to an SDXL model"
        )
