"""A run's checkpoint -> files that this library and diffusers load; LoRA files -> the other form.

Needs neither the data set nor the network: what a checkpoint is part of stands beside it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ..checkpoints.config import read_json
from ..checkpoints.locate import PICKLED
from ..checkpoints.lora_writing import Form, write_lora_file
from ..checkpoints.weights import read_tensors
from ..errors import CheckpointError, FewstepError, RequestError
from ..models.base import CONFIG_NAME
from ..models.unet import UNet2DConditionModel
from .card import run_name, settings_of
from .config import (
    EMBEDDED_TEACHER,
    ConsistencyPhase,
    Recipe,
    load_recipe,
    parse_recipe,
    place_of,
)
from .export import add_half, lora_metadata, note_guidance, write_lora
from .lora_names import architecture, read_changes, read_named, unet_config
from .state import FOLDERS, NAME, newest, read_weights

Weights = Literal["average", "online"]
KINDS: Mapping[str, str] = {"average": "average", "online": "parameter"}  # in a checkpoint
RECIPE_NAME, UNET_CONFIG_NAME = "recipe.json", "unet_config.json"
ENDS = (".lora_down.weight", ".lora_up.weight")


@dataclass(frozen=True, eq=False)
class Trained:
    """What a run trained: its checkpoint, and its recipe if that is known."""

    path: Path
    recipe: Recipe | None

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return self.path.parent

    def weights(self, network: str, kind: Weights) -> dict[str, Tensor]:
        """The tensors of a network by name: the averaged ones, or the last."""
        stored, start = read_weights(self.path, KINDS[kind]), f"{network}."
        found = {k.removeprefix(start): t for k, t in stored.items() if k.startswith(start)}
        if not found:
            names = {key.partition(".")[0] for key in stored}
            raise RequestError(
                f"--save-keys {network}: this run trained {', '.join(sorted(names)) or 'nothing'} "
                "alone; take the other parts from the base"
            )
        return found

    def config(self) -> dict[str, Any]:
        """The config of its UNet: the run's, or the base's with the recipe's guidance input."""
        for path in (UNET_CONFIG_NAME, f"pipeline/unet/{CONFIG_NAME}"):
            if (self.folder / path).is_file():
                return read_json(self.folder / path)
        if self.recipe is None or not isinstance(self.recipe.settings, ConsistencyPhase):
            raise CheckpointError(
                f"{self.folder} has no {UNET_CONFIG_NAME}, which tells what its network is; give "
                "the run's folder as it was written"
            )
        settings = self.recipe.settings
        base = settings.unet or settings.base
        try:
            config = unet_config(place_of(base, self.recipe.folder))
        except FewstepError as error:
            raise CheckpointError(
                f"{self.folder} has no {UNET_CONFIG_NAME}, and the base's cannot be read: {error}"
            ) from error
        if base == EMBEDDED_TEACHER:  # the embedded model, without its guidance input
            config["time_cond_proj_dim"] = None
        if settings.lora is None and config.get("time_cond_proj_dim") is None:
            config["time_cond_proj_dim"] = settings.guidance_dim or None
        return config


# ── a run ──


def open_run(place: str | Path, config: str | None = None) -> Trained:
    """The run of a folder or of a checkpoint file.

    The recipe is the one that the run wrote; `config`, a recipe's name or file, stands in for it
    where there is none. Raises CheckpointError or RequestError if there is no run.
    """
    path = Path(place)
    if path.name.lower().endswith(PICKLED):
        raise CheckpointError(
            f"{path} is not a safetensors file, and pickled checkpoints run code when they are "
            "read; convert it with the library that wrote it (diffengine: `diffengine convert`), "
            "whose folder fewstep loads"
        )
    if path.is_dir() and not path.match(FOLDERS):
        path = newest(path)[0] or path / NAME
    if not path.exists():
        inner = sorted(p.parent.name for p in path.parent.glob(f"*/{NAME}"))
        hint = f"; there are runs in it: {', '.join(inner)}" if inner else ""
        raise CheckpointError(f"there is no run at {str(place)!r}: it has no {NAME}{hint}")
    stored = path.with_name(RECIPE_NAME)
    given = None if config is None else load_recipe(config)
    return Trained(path, stored_recipe(stored) if stored.is_file() else given)


def stored_recipe(path: Path) -> Recipe:
    """The recipe that a run wrote beside its checkpoint."""
    table = read_json(path)
    settings = {k: v for k, v in table.pop("settings").items() if v is not None}
    return parse_recipe(table | {table["phase"]: settings}, str(path))


def convert_run(
    place: str | Path,
    output: str | Path,
    *,
    config: str | None = None,
    networks: Sequence[str] = ("unet",),
    weights: Weights = "average",
    half: bool = False,
    forms: Sequence[Form] = ("diffusers", "kohya"),
) -> list[Path]:
    """What was written into the folder `output`: a run's networks, or the files of its LoRA.

    `weights` chooses the averaged weights, or the last. With `half` float16 variants are written
    too. `forms` are those of a LoRA.
    """
    run = open_run(place, config)
    tensors = {network: run.weights(network, weights) for network in networks}
    if surplus := [network for network in networks if network != "unet"]:
        raise RequestError(f"--save-keys {surplus[0]}: only the unet of a run can be converted")
    output = Path(output)
    if any(name.endswith(ENDS) for name in tensors["unet"]):
        return write_run_lora(run, tensors["unet"], output, half, forms)
    return [write_run_unet(run, tensors["unet"], output / "unet", half)]


def write_run_unet(run: Trained, state: Mapping[str, Tensor], folder: Path, half: bool) -> Path:
    """A folder with the UNet in diffusers' layout; the folder."""
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(run.config())
    wanted = {name: tuple(value.shape) for name, value in unet.state_dict().items()}
    have = {name: tuple(value.shape) for name, value in state.items()}
    if differing := sorted(n for n in wanted | have if wanted.get(n) != have.get(n)):
        raise CheckpointError(
            f"{run.path} does not fit its config: {len(differing)} tensors differ, the first "
            f"{differing[0]}; does the recipe belong to it?"
        )
    unet.load_state_dict(dict(state), assign=True)
    unet.save_pretrained(folder)
    if run.recipe is not None and isinstance(run.recipe.settings, ConsistencyPhase):
        note_guidance(folder, run.recipe.settings, unet.config.time_cond_proj_dim is not None)
    if half:
        add_half(folder)
    return folder


def write_run_lora(
    run: Trained, state: Mapping[str, Tensor], output: Path, half: bool, forms: Sequence[Form]
) -> list[Path]:
    """The files of a run's LoRA."""
    if run.recipe is None or settings_of(run.recipe).lora is None:
        raise RequestError(
            f"{run.path} holds a LoRA, whose rank and alpha stand in {RECIPE_NAME} beside it; give "
            "the run's folder, or its recipe (fewstep convert RECIPE RUN OUTPUT)"
        )
    settings = settings_of(run.recipe)
    assert settings.lora is not None
    down, up = ENDS
    changes = {
        name.removesuffix(down): (value, state[name.removesuffix(down) + up])
        for name, value in state.items()
        if name.endswith(down)
    }
    return write_lora(
        changes,
        settings.lora.alpha,
        output,
        unet_config=run.config(),
        name=run_name(run.recipe),
        forms=forms,
        half=half,
        metadata=lora_metadata(run.recipe),
    )


# ── a LoRA's file ──


def is_run(place: str) -> bool:
    """Whether a place is a run's: a folder, a pickled file, or a checkpoint, not a LoRA."""
    path = Path(place)
    if path.is_dir():
        return newest(path)[0] is not None or not any(path.glob("*.safetensors"))
    if place.lower().endswith(PICKLED):
        return True
    return path.is_file() and any(name.startswith("parameter/") for name, _ in read_tensors([path]))


def convert_lora(
    place: str, output: str | Path, form: Form, *, file: str | None = None, model: str | None = None
) -> Path:
    """The file `output`: the LoRA of a file, a folder or a hub repository, in `form`.

    `model` tells what the modules are called, where that is not one of the known models.
    """
    known = architecture(read_named(place, file)[0], model)
    changes = read_changes(place, file, known)
    return write_lora_file(Path(output), changes, form, known.unet_config)
