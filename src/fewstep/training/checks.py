"""What must hold before a run begins: settings first, then what the networks need of the device."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from .. import schedulers
from ..errors import FewstepError, RequestError
from .bases import base_of, check_family
from .capacity import check_memory
from .card import sampler
from .config import (
    EMBEDDED_TEACHER,
    AdapterPhase,
    ConsistencyPhase,
    FromBase,
    Optimizer,
    Recipe,
    Sheet,
)
from .estimates import Estimate, estimate, size_of, unet_of
from .export import require_token
from .parallel import check_shard
from .ranks import Ranks
from .state import newest
from .trackers import check_trackers

SMALL = 50_000_000  # parameters


def checks_of(recipe: Recipe, device: torch.device, devices: int) -> list[Callable[[], None]]:
    """What must hold of the settings alone; each raises RequestError if it does not."""
    run, settings = recipe.run, recipe.settings
    checks: list[Callable[[], None]] = [
        lambda: Ranks(count=devices).check(run.batch, run.accumulate),
        lambda: check_shard(recipe),
        lambda: check_trackers(run.trackers),
        lambda: check_optimizer(recipe.optimizer, device),
        lambda: check_writable(recipe.output),
        lambda: check_unchanged(recipe),
    ]
    if isinstance(settings, FromBase):
        checks.append(lambda: check_parts(settings))
        if run.sheet_steps:
            checks.append(lambda: check_sheet(recipe))
    if isinstance(settings, AdapterPhase):
        checks.append(lambda: check_adapter_sheet(settings))
    if isinstance(settings, ConsistencyPhase):
        checks.append(lambda: check_settings(settings))
        if settings.output.push_to:
            checks.append(lambda: require_token(settings.output.push_to))
    return checks


def check_writable(folder: Path) -> None:
    """Raises RequestError if a run's folder cannot be made or written."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise RequestError(
            f"folder={str(folder)!r} cannot be written: {there} is "
            f"{'write-protected' if there.is_dir() else 'a file'}; give another with --output"
        )


def check_parts(settings: FromBase) -> None:
    """Raises RequestError for parts or versions that a base does not have."""
    lacks: tuple[str, ...] = ()
    if settings.base == EMBEDDED_TEACHER:  # it comes as it is
        lacks = ("unet", "vae", "variant", "revision")
    elif settings.base.endswith(".safetensors"):
        lacks = ("variant",)
    for name in lacks:
        if value := getattr(settings, name):
            raise RequestError(
                f"{name}={value!r} cannot go with base={settings.base!r}; leave it out, or give "
                "another base"
            )


def check_adapter_sheet(settings: AdapterPhase) -> None:
    """Raises RequestError for what a sheet says of a student, which an adapter has not."""
    usual = Sheet(())
    for name in ("steps", "guidance_scale"):
        if (value := getattr(settings.sheet, name)) != getattr(usual, name):
            raise RequestError(
                f"adapter.sheet.{name}={value!r} is of a student, and an adapter's sheets are "
                f"drawn by its base; set teacher_{name} in its place"
            )


def check_sheet(recipe: Recipe) -> None:
    """Raises RequestError for a sheet that could not be drawn: it is due after many steps."""
    settings, where = recipe.settings, recipe.phase
    assert isinstance(settings, FromBase)
    if not settings.sheet.prompts:
        raise RequestError(f"{where}.sheet.prompts is empty; give some, or set run.sheet_steps=0")
    takes: list[tuple[str, int, str, dict[str, Any]]] = [
        ("teacher_steps", settings.sheet.teacher_steps, "DDIMScheduler", {})
    ]
    if isinstance(settings, ConsistencyPhase):
        takes += [("steps", steps, *sampler(settings)) for steps in settings.sheet.steps]
    elif not recipe.data.held_out:
        raise RequestError(
            "data.held_out=0, but the sheets show held-out pictures; set data.held_out=16, or "
            "run.sheet_steps=0"
        )
    for name, steps, scheduler, config in takes:
        try:
            getattr(schedulers, scheduler)(**config).plan(steps)
        except FewstepError as error:
            raise RequestError(f"{where}.sheet.{name}: {error}") from error


def check_optimizer(optimizer: Optimizer, device: torch.device) -> None:
    """Raises RequestError if 8 bits are asked for where there is no library for them."""
    if optimizer.kind == "adamw":
        return
    if device.type != "cuda":
        raise RequestError(
            f"optimizer.kind={optimizer.kind!r} works on CUDA, not on {device.type}; set "
            "optimizer.kind=adamw"
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise RequestError(
            f"optimizer.kind={optimizer.kind!r} needs bitsandbytes; pip install bitsandbytes, or "
            "set optimizer.kind=adamw"
        )


# What a run that goes on may have changed: where and how fast it runs, and what it tells.
FREE = (
    "folder",
    "name",
    "run.steps",
    "run.accumulate",
    "run.device",
    "run.threads",
    "run.gradient_checkpointing",
    "run.compile",
    "run.shard",
    "run.checkpoint_minutes",
    "run.sheet_steps",
    "run.trackers",
    "data.workers",
    "data.cache",
    "settings.sheet",
    "settings.output",
)


def check_unchanged(recipe: Recipe) -> None:
    """Raises RequestError if the folder holds a checkpoint of another recipe, or of more steps."""
    folder = recipe.output
    path, done = newest(folder)
    if path is None:
        return
    if recipe.run.steps < done:
        raise RequestError(
            f"run.steps={recipe.run.steps}, but the run in {folder} has done {done} steps; give "
            "another folder by --output, or delete it to start afresh"
        )
    stored = folder / "recipe.json"
    if not stored.is_file():
        return
    before = flat(json.loads(stored.read_text(encoding="utf-8")))
    now = flat(json.loads(json.dumps(asdict(recipe), default=dict)))
    changed = [
        f"{key.replace('settings.', f'{recipe.phase}.', 1)} was {before[key]!r}, is {value!r}"
        for key, value in now.items()
        if key in before and before[key] != value and not key.startswith(FREE)
    ]
    if changed:
        raise RequestError(
            f"{folder} holds a run of another recipe: {'; '.join(changed)}; give another folder by "
            "--output, or delete it to start afresh"
        )


def flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Entries of nested tables by their dotted paths."""
    entries: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, Mapping):
            entries |= flat(value, f"{prefix}{key}.")
        else:
            entries[f"{prefix}{key}"] = value
    return entries


def check_settings(settings: ConsistencyPhase) -> None:
    """Raises RequestError for settings that contradict each other."""
    coarsest = settings.first_grid_steps or settings.grid_steps
    lora = settings.lora
    wrong: list[tuple[bool, str]] = [
        (
            lora is not None and (lora.rank < 1 or not lora.targets),
            f"consistency.lora: rank={lora and lora.rank} must be at least 1, and targets must "
            "name a layer",
        ),
        (
            lora is not None and settings.target == "ema",
            "consistency.target='ema' would keep a second network beside the LoRA's one; "
            "set consistency.target=stopgrad",
        ),
        (
            lora is not None and settings.guidance_dim > 0,
            f"consistency.guidance_dim={settings.guidance_dim}: a LoRA adds no guidance input; "
            "set consistency.guidance_dim=0",
        ),
        (
            settings.w_min > settings.w_max,
            f"consistency.w_min={settings.w_min} must not be above w_max={settings.w_max}",
        ),
        (
            settings.method == "fine_tuning"
            and (not settings.solver_guidance or settings.solver != "ddim"),
            f"consistency.solver={settings.solver!r}, solver_guidance={settings.solver_guidance}: "
            "fine-tuning has no teacher and no solver; leave them out",
        ),
        (
            settings.method == "denoising"
            and (settings.endpoint, settings.target, settings.guidance_dim)
            != ("zero", "stopgrad", 0),
            "consistency.method='denoising' leads to no endpoint, has no target and no guidance "
            "input; set consistency.endpoint=zero, target=stopgrad, guidance_dim=0",
        ),
        (
            settings.method == "denoising"
            and (settings.solver, settings.solver_guidance, settings.distance)
            != ("ddim", True, "pseudo_huber"),
            f"consistency.solver={settings.solver!r}, "
            f"solver_guidance={settings.solver_guidance}, distance={settings.distance!r}: the "
            "denoising loss reads none of them; leave them out",
        ),
        (
            settings.endpoint == "phases" and not 1 <= settings.phases <= coarsest,
            f"consistency.phases={settings.phases} must lie in [1, {coarsest}], the steps of the "
            "coarsest grid",
        ),
        (
            settings.endpoint == "phases"
            and settings.phases > 0
            and (settings.grid_steps % settings.phases > 0 or coarsest % settings.phases > 0),
            f"consistency.phases={settings.phases} must divide grid_steps={settings.grid_steps} "
            "and first_grid_steps: the sampler steps from edge to edge; set grid_steps=40",
        ),
        (
            not 1 <= settings.grid_steps <= 1000,
            f"consistency.grid_steps={settings.grid_steps} must lie in [1, 1000]",
        ),
        (
            not 0 <= settings.first_grid_steps <= settings.grid_steps,
            f"consistency.first_grid_steps={settings.first_grid_steps} must lie in "
            f"[0, {settings.grid_steps}] (grid_steps): the grid becomes finer, not coarser",
        ),
        (
            not 0 <= settings.target_decay < 1,
            f"consistency.target_decay={settings.target_decay} must lie in [0, 1)",
        ),
        (
            settings.distance_c <= 0,
            f"consistency.distance_c={settings.distance_c} must be above 0",
        ),
    ]
    for is_wrong, message in wrong:
        if is_wrong:
            raise RequestError(message)


def foresee(recipe: Recipe, device: torch.device, devices: int) -> Estimate | None:
    """The estimate of a run of the consistency phase.

    None of any other phase, and of networks that are so small that an estimate, which takes some
    seconds, is not worth it. Raises RequestError if base, networks and device do not go together.
    """
    if not isinstance(recipe.settings, ConsistencyPhase):
        return None
    base = base_of(recipe.settings, recipe.folder)
    check_family(base)
    if size_of(unet_of(base).parameters()) < SMALL:
        return None
    made = estimate(recipe, base, device.type, devices)
    check_memory(recipe, made, device)
    return made
