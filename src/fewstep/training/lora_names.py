"""Which modules a LoRA file means: the networks of its model, built without memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import EMBEDDED
from ..checkpoints.known import FAMILIES
from ..checkpoints.locate import Source
from ..checkpoints.lora_formats import (
    Changes,
    find_lora,
    names_of_modules,
    parse_lora,
    read_lora,
    refuse_other_family,
    text_channels,
)
from ..checkpoints.single_file import SingleFile, find_file
from ..errors import CheckpointError, RequestError
from ..models.base import CONFIG_NAME
from ..models.lora import misfit, targets
from ..models.single_file import known_config, recognised
from ..models.unet import UNet2DConditionModel
from ..pipelines.embedded import TEACHER
from .config import OWN_BASES

# Text channels of a UNet -> the name of a family whose modules are called as its own.
KNOWN = {768: "sd1", 1024: "sd2-base", 1280: "sdxl-refiner", 2048: "sdxl"}
EMBEDDED_CHANNELS = 192  # of the embedded model and its teacher
OWN = (EMBEDDED.name, TEACHER.name, *OWN_BASES)  # names of theirs, in commands and in recipes
TEXT_LAYER = (
    *(f"self_attn.{part}_proj" for part in ("q", "k", "v", "out")),
    "mlp.fc1",
    "mlp.fc2",
)
TEXT_ENCODERS = ("text_encoder", "text_encoder_2")


@dataclass(frozen=True, eq=False)
class Architecture:
    """A model as its LoRAs see it."""

    unet_config: Mapping[str, Any]
    unet: Mapping[str, nn.Module]  # on the meta device, by name
    text_layers: Mapping[str, int]  # of each text encoder

    @property
    def modules(self) -> dict[str, list[str]]:
        """The names of the modules by network."""
        found = {"unet": list(self.unet)}
        for network, layers in self.text_layers.items():
            last = ["text_projection"] if network == "text_encoder_2" else []
            found[network] = last + [
                f"text_model.encoder.layers.{layer}.{part}"
                for layer in range(layers)
                for part in TEXT_LAYER
            ]
        return found

    def changes(
        self, tensors: Mapping[str, Tensor], config: Mapping[str, Any]
    ) -> dict[str, Changes]:
        """The changes by network of a file's tensors. Raises CheckpointError for a surplus."""
        refuse_other_family(tensors, self.modules, self.unet_config)
        names = {
            network: names_of_modules(modules, self.unet_config if network == "unet" else None)
            for network, modules in self.modules.items()
        }
        changes, surplus = parse_lora(tensors, config, names)
        surplus = [f"{key} fits no module" for key in surplus]
        for module, change in changes.get("unet", {}).items():
            if reason := misfit(change, self.unet[module]):
                surplus.append(f"{module}: {reason}")
        if surplus or not changes:
            shown = "; ".join(surplus[:5]) or "it holds no LoRA"
            raise CheckpointError(f"it does not fit the model in {len(surplus)} places: {shown}")
        return changes


def architecture(tensors: Mapping[str, Tensor], model: str | None = None) -> Architecture:
    """The architecture of `model` (a folder, a hub repository, a single file), else of the file's.

    Without a model the LoRA must say by its text channels which of the known ones it is for.
    """
    if model is not None:
        return of_model(model)
    channels = text_channels(tensors)
    known = KNOWN.get(min(channels)) if channels else None
    if channels and min(channels) == EMBEDDED_CHANNELS:
        return of_model(EMBEDDED.name)
    if known is None:
        told = f"reads texts of {min(channels)} channels" if channels else "changes no layer of it"
        raise RequestError(
            f"the LoRA does not say which model it is for (it {told}); give --model ID|FOLDER"
        )
    return of_configs(FAMILIES[known].configs)


def of_configs(configs: Mapping[str, Mapping[str, Any]]) -> Architecture:
    """The architecture that the configs of a model's components describe."""
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(configs["unet"])
    layers = {n: configs[n]["num_hidden_layers"] for n in TEXT_ENCODERS if n in configs}
    return Architecture(unet.config, targets(unet), layers)


def of_model(model: str) -> Architecture:
    """The architecture of a model; none of its weights is read."""
    model = str(EMBEDDED) if model in OWN else model
    if model.endswith(".safetensors"):
        return of_configs(FAMILIES[recognised(SingleFile.open(find_file(model)))].configs)
    places = [n for n in ("unet", *TEXT_ENCODERS) if f"{n}/{CONFIG_NAME}" in Source(model).names()]
    return of_configs({name: Source(model, name).read_json(CONFIG_NAME) for name in places})


def unet_config(place: str) -> dict[str, Any]:
    """The UNet's config of a model's folder, repository or single file, or of a UNet's own."""
    if place.endswith(".safetensors"):
        return dict(known_config(SingleFile.open(find_file(place)), "unet", None))
    source = Source(place)
    inner = source if CONFIG_NAME in source.names() else Source(place, "unet")
    return inner.read_json(CONFIG_NAME)


def read_named(place: str, file: str | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, PEFT's config) of a LoRA: a file, or a folder or hub repository and its file."""
    return read_lora(find_lora(Source(place), file))


def read_changes(place: str, file: str | None, model: Architecture) -> dict[str, Changes]:
    """The changes of a LoRA by network. Raises CheckpointError, naming it, if it does not fit."""
    try:
        return model.changes(*read_named(place, file))
    except CheckpointError as error:
        raise CheckpointError(f"{Path(place) / (file or '')}: {error}") from error
