"""From a recipe to a trained phase."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from .config import Recipe, load_recipe
from .loop import Phase, train_phase


def train(
    recipe: str | Recipe, overrides: Iterable[str] = (), output: str | Path | None = None
) -> Path:
    """Run a recipe (its name, file or value) to its end, resuming if it was begun; its folder.

    `output` replaces the recipe's `folder`, which holds all phases of one model. Raises
    RequestError for a recipe or overrides that are wrong, before anything is written.
    """
    if isinstance(recipe, str):
        recipe = load_recipe(recipe, overrides)
    if output is not None:
        recipe = replace(recipe, folder=str(output))
    device = device_of(recipe.run.device)
    if recipe.run.threads:
        torch.set_num_threads(recipe.run.threads)
    folder = Path(recipe.folder) / recipe.phase
    # On a CPU the fused attention's backward is slower than plain products at these sizes.
    backends = [SDPBackend.MATH] if device.type == "cpu" else list(DEVICE_ATTENTION)
    with sdpa_kernel(backends):
        phase = make_phase(recipe, device)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "recipe.json").write_text(json.dumps(asdict(recipe), indent=2, default=dict))
        train_phase(phase, recipe, folder, device)
    return folder


PHASES = {  # imported one by one: each needs only its own libraries
    "autoencoder": ("autoencoder", "Autoencoder"),
    "text": ("text", "TextAlignment"),
    "teacher": ("teacher", "Teacher"),
    "lcm": ("lcm", "Consistency"),
}
DEVICE_ATTENTION = (
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
)


def device_of(name: str) -> torch.device:
    """The device of a recipe; "auto" is the GPU where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(name)


def make_phase(recipe: Recipe, device: torch.device) -> Phase:
    """The phase that a recipe names, with its networks on `device`."""
    module, name = PHASES[recipe.phase]
    phase = getattr(importlib.import_module(f".phases.{module}", __package__), name)
    return phase(recipe, device)
