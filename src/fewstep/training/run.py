"""From a recipe to a trained phase."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..checkpoints.config import replacing
from ..errors import RequestError
from .capacity import memory_explained
from .checks import checks_of, foresee
from .config import Recipe, load_recipe
from .loop import Phase, train_phase
from .ranks import Ranks, joined
from .summary import announce, closing, say


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
    with joined(device_of(recipe.run.device)) as (ranks, device):
        for check in checks_of(recipe, device, ranks.count):
            check()
        if recipe.run.threads:
            torch.set_num_threads(recipe.run.threads)
        with sdpa_kernel(attention(recipe, device)), memory_explained(recipe, device):
            made = foresee(recipe, device, ranks.count) if ranks.is_first else None
            phase = make_phase(recipe, device, ranks)
            if ranks.is_first:
                announce(recipe, phase, made, device, ranks.count)
                with replacing(recipe.output / "recipe.json") as path:
                    path.write_text(json.dumps(asdict(recipe), indent=2, default=dict))
            ranks.wait()
            train_phase(phase, recipe, recipe.output, device, ranks)
        if ranks.is_first:
            for line in closing(recipe):
                say(line)
    return recipe.output


PHASES = {  # imported one by one: each needs only its own libraries
    "autoencoder": ("autoencoder", "Autoencoder"),
    "text": ("text", "TextAlignment"),
    "teacher": ("teacher", "Teacher"),
    "consistency": ("consistency", "Consistency"),
    "adapter": ("adapter", "Adapter"),
}


def attention(recipe: Recipe, device: torch.device) -> list[SDPBackend]:
    """How attention may be computed.

    For small pictures on a CPU the backward pass of the fused one is slower than plain products,
    whose memory grows with the square of the pixels.
    """
    if device.type == "cpu" and recipe.size <= 128:
        return [SDPBackend.MATH]
    return [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def device_of(name: str) -> torch.device:
    """The device of a recipe; "auto" is the GPU where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.device(name)
    except RuntimeError:
        raise RequestError(
            f"run.device={name!r} is no device; use auto, cpu, cuda or cuda:NUMBER"
        ) from None


def make_phase(recipe: Recipe, device: torch.device, ranks: Ranks | None = None) -> Phase:
    """The phase that a recipe names, with its networks on `device`."""
    ranks = ranks or Ranks()
    module, name = PHASES[recipe.phase]
    phase = getattr(importlib.import_module(f".phases.{module}", __package__), name)
    # The others share the encoding of their data, and wait for each other by themselves.
    alone = ranks.first_alone() if recipe.phase in ("text", "teacher") else nullcontext()
    with alone:
        return phase(recipe, device)
