"""What must hold before a run begins: settings first, then what the networks need of the device."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch

from ..errors import RequestError
from .bases import Base, base_of, check_family
from .capacity import check_memory
from .config import ConsistencyPhase, Optimizer, Recipe
from .estimates import Estimate, estimate, size_of, unet_of
from .export import require_token
from .parallel import check_shard
from .ranks import Ranks
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
    ]
    if isinstance(settings, ConsistencyPhase):
        from .phases.consistency import check_settings

        checks.append(lambda: check_settings(settings))
        if settings.output.push_to:
            checks.append(lambda: require_token(settings.output.push_to))
    return checks


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


def foresee(recipe: Recipe, device: torch.device, devices: int) -> tuple[Base, Estimate] | None:
    """The base and the estimate of a run of the consistency phase.

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
    return base, made
