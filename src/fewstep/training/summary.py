"""What a run says of itself before it begins, and at its end."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterable, Sized
from pathlib import Path

import torch

from ..pipelines.embedded import TEACHER
from .capacity import duration, gib, network_rate, short
from .card import METHODS, PROMPT, start, steps_of
from .config import EMBEDDED_TEACHER, ConsistencyPhase, Recipe, Scenes, placed
from .estimates import Estimate
from .loop import Phase


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
    if settings.lora is None:
        return f"a consistency model of {start(recipe)}"
    return f"a LoRA of rank {settings.lora.rank} for {start(recipe)}"


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
    yield f"done: the last sheet, log.jsonl and the results are in {recipe.output}"
    command = drawing(recipe)
    if command:
        yield f"draw with it: {shlex.join(command)}"
    elif isinstance(recipe.settings, ConsistencyPhase):
        yield f"draw with it: {result(recipe) / 'README.md'} has a script"


def result(recipe: Recipe) -> Path:
    """The folder of what was made: a pipeline, or a LoRA."""
    is_lora = isinstance(recipe.settings, ConsistencyPhase) and recipe.settings.lora
    return recipe.output / ("lora" if is_lora else "pipeline")


def drawing(recipe: Recipe) -> list[str]:
    """A command that draws with a run's result; empty where only a script can."""
    settings, made = recipe.settings, str(result(recipe))
    if not isinstance(settings, ConsistencyPhase):
        return ["fewstep", "generate", PROMPT, "--model", made] * result(recipe).is_dir()
    prompt = settings.sheet.prompts[0] if settings.sheet.prompts else PROMPT
    command = ["fewstep", "generate", prompt, "--steps", str(steps_of(settings))]
    command += ["--guidance", f"{settings.sheet.guidance_scale:g}"]
    if settings.lora is None:
        return [*command, "--model", made]
    # A command cannot give another UNet, or times at the ends of phases.
    if settings.unet or settings.endpoint == "phases" or settings.base.endswith(".safetensors"):
        return []
    command += ["--lora", made]
    if settings.base == "embedded":
        return command
    is_teacher = settings.base == EMBEDDED_TEACHER
    base = TEACHER.name if is_teacher else placed(settings.base, recipe.folder)
    scheduler = "tcd" if settings.endpoint == "sampled" else "lcm"
    if settings.method == "denoising":
        scheduler = "ddim"
    return [*command, "--model", base, "--scheduler", scheduler]


def foretold(recipe: Recipe, made: Estimate, rate: float, device: str, devices: int) -> str:
    """What a run will need, in a line; `rate` is that of `network_rate`."""
    many = f" on each of {devices} devices" if devices > 1 else f" on {device}"
    taken = duration(made.operations * recipe.run.steps, rate, devices)
    return f"it will need about {gib(made.total)}{many}, and about {taken}"


def announce(
    recipe: Recipe,
    phase: Phase,
    made: Estimate | None,
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
    if made is not None:
        say(foretold(recipe, made, network_rate(device, recipe.run), device.type, devices))


def say(line: str) -> None:
    """Print a line for people, apart from what a command gives to other programs."""
    print(line, file=sys.stderr, flush=True)
