"""What a run says of itself before it begins, and at its end."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterable, Sized
from pathlib import Path
from typing import Any

import torch

from ..pipelines.embedded import TEACHER
from .bases import Base
from .capacity import duration, gib, network_rate, short
from .card import METHODS
from .config import EMBEDDED_TEACHER, ConsistencyPhase, Recipe, Scenes
from .estimates import Estimate
from .loop import Phase

PROMPT = "a lighthouse at dusk"


def opening(recipe: Recipe, trained: int, parameters: int, samples: int | None) -> str:
    """One paragraph: what is trained, by which method, on how much data, for how long.

    `trained` of the network's `parameters` change; `samples` rows of data are trained on.
    """
    run = recipe.run
    times = f", each {short(run.steps * run.batch / samples)} times" if samples else ""
    known = f"{samples:,} samples of " if samples else ""
    return (
        f"training {what(recipe)} ({count(trained)} of {count(parameters)} parameters) "
        f"{method(recipe)}, on {known}{place(recipe)}: {run.steps:,} steps of {run.batch} "
        f"samples{times}; in {recipe.output}"
    )


def what(recipe: Recipe) -> str:
    """The thing that is made."""
    settings = recipe.settings
    if not isinstance(settings, ConsistencyPhase):
        return f"the phase {recipe.phase!r}"
    start = settings.unet or settings.base
    if settings.lora is None:
        return f"a consistency model of {start}"
    return f"a LoRA of rank {settings.lora.rank} for {start}"


def method(recipe: Recipe) -> str:
    """How it is trained."""
    settings = recipe.settings
    if isinstance(settings, ConsistencyPhase):
        return f"by {METHODS[settings.method, settings.endpoint]}"
    return f"with learning rate {recipe.optimizer.lr:g}"


def place(recipe: Recipe) -> str:
    """Where the data come from."""
    data = recipe.data
    return "emoji scenes" if isinstance(data, Scenes) else data.path


def count(number: float) -> str:
    """A number of parameters: "67.3 M"."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.0f}"


def parts(estimate: Estimate) -> str:
    """The memory of an estimate, part by part."""
    return ", ".join(f"{name} {gib(size)}" for name, size in estimate.memory.items())


def closing(recipe: Recipe) -> Iterable[str]:
    """Where the results of a finished run are, and how to draw with them."""
    folder, settings = recipe.output, recipe.settings
    yield f"done: the last sheet, log.jsonl and the results are in {folder}"
    command = drawing(folder, settings)
    if command:
        yield f"draw with it: {shlex.join(command)}"
    elif isinstance(settings, ConsistencyPhase):
        yield f"draw with it: {result(folder, settings) / 'README.md'} has a script"


def result(folder: Path, settings: ConsistencyPhase) -> Path:
    """The folder of what was made."""
    return folder / ("pipeline" if settings.lora is None else "lora")


def drawing(folder: Path, settings: Any) -> list[str]:
    """A command that draws with a run's result; empty where only a script can."""
    if not isinstance(settings, ConsistencyPhase):
        pipeline = folder / "pipeline"
        return ["fewstep", "generate", PROMPT, "--model", str(pipeline)] * pipeline.is_dir()
    steps = settings.phases if settings.endpoint == "phases" else 4
    if settings.method == "denoising":
        steps = settings.sheet.steps[-1]
    prompt = settings.sheet.prompts[0] if settings.sheet.prompts else PROMPT
    command = ["fewstep", "generate", prompt, "--steps", str(steps)]
    command += ["--guidance", f"{settings.sheet.guidance_scale:g}"]
    made = str(result(folder, settings))
    if settings.lora is None:
        return [*command, "--model", made]
    # A command cannot give another UNet, or times at the ends of phases.
    if settings.unet or settings.endpoint == "phases" or settings.base.endswith(".safetensors"):
        return []
    command += ["--lora", made]
    if settings.base == "embedded":
        return command
    base = settings.base.replace("{folder}", str(folder.parent))
    if settings.base == EMBEDDED_TEACHER:
        base = TEACHER.name
    scheduler = "tcd" if settings.endpoint == "sampled" else "lcm"
    if settings.method == "denoising":
        scheduler = "ddim"
    return [*command, "--model", base, "--scheduler", scheduler]


def foretold(estimate: Estimate, taken: str, device: str, devices: int) -> str:
    """What a run will need, in a line."""
    many = f" on each of {devices} devices" if devices > 1 else f" on {device}"
    return f"it will need about {gib(estimate.total)}{many}, and about {taken}"


def announce(
    recipe: Recipe,
    phase: Phase,
    seen: tuple[Base, Estimate] | None,
    device: torch.device,
    devices: int,
) -> None:
    """Print what is about to be trained, and what it will take."""
    networks = [p for network in phase.trained.values() for p in network.parameters()]
    trained = sum(p.numel() for p in networks if p.requires_grad)
    data = getattr(phase, "data", None)
    held_out = getattr(data, "held_out", ())
    samples = len(data) - len(held_out) if isinstance(data, Sized) else None
    say(opening(recipe, trained, sum(p.numel() for p in networks), samples))
    if seen is not None:
        _, made = seen
        rate = network_rate(device, recipe.run)
        taken = duration(made.operations * recipe.run.steps, rate, devices)
        say(foretold(made, taken, device.type, devices))


def say(line: str) -> None:
    """Print a line for people, apart from what a command gives to other programs."""
    print(line, file=sys.stderr, flush=True)
