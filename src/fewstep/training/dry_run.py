"""`fewstep train --dry-run`: whatever of a run can be found out before it begins."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import torch

from ..errors import FewstepError, RequestError
from .bases import Base, base_of, check_family
from .capacity import check_memory, network_rate
from .checks import checks_of
from .config import ConsistencyPhase, Recipe, load_recipe
from .data.encoded import cache_folder, open_source
from .data.survey import Counts, survey
from .estimates import Estimate, estimate
from .ranks import check_device
from .rehearsal import rehearse
from .run import device_of
from .summary import foretold, opening, parts

T = TypeVar("T")


@dataclass
class Findings:
    """What a dry run found: lines for people, figures, and what would make the run fail."""

    told: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    counts: Counts | None = None
    estimate: Estimate | None = None

    def attempt(self, make: Callable[[], T]) -> T | None:
        """The value of `make`; what it raises for a user to mend is a problem."""
        try:
            return make()
        except FewstepError as error:
            if str(error) not in self.problems:
                self.problems.append(str(error))
            return None

    def check(self) -> None:
        """Raises RequestError if anything is wrong."""
        if self.problems:
            several = f"{len(self.problems)} things are wrong: " if len(self.problems) > 1 else ""
            raise RequestError(several + "; ".join(self.problems))


def dry_run(
    recipe: str | Recipe,
    overrides: Iterable[str] = (),
    output: str | Path | None = None,
    devices: int = 1,
) -> Findings:
    """What a run of a recipe will do and need, and what is wrong with it.

    Settings are checked, the data counted, memory and time estimated, and two steps run on a tiny
    model. Nothing is written to the run's folder, and no model is fetched; a data set of the hub
    is, to count it. Raises RequestError for a recipe that cannot be read, or a missing GPU.
    """
    if isinstance(recipe, str):
        recipe = load_recipe(recipe, overrides)
    if output is not None:
        recipe = replace(recipe, folder=str(output))
    device = device_of(recipe.run.device)
    check_device(device)
    findings = Findings()
    for check in checks_of(recipe, device, devices):
        findings.attempt(check)
    findings.counts = findings.attempt(lambda: count(recipe))
    if findings.counts is not None:
        findings.told.append(f"data: {findings.counts}")
    if not isinstance(recipe.settings, ConsistencyPhase):
        findings.told.append(f"phase {recipe.phase!r}: no estimate, and no run on a tiny model")
        return findings
    settings = recipe.settings
    base = findings.attempt(lambda: base_of(settings, recipe.folder))
    if base is not None:
        add_estimate(recipe, base, device, devices, findings)
        if not findings.problems:
            findings.attempt(lambda: rehearse(recipe, base, device))
    if not findings.problems:
        findings.told.append("two steps, a sheet and the result's files on a tiny model: they work")
    return findings


def count(recipe: Recipe) -> Counts:
    """What of the data is kept and dropped; pictures are looked at, nothing is encoded."""
    memory = cache_folder(recipe.data) / "sources"
    counts = survey(open_source(recipe, memory), recipe.data, memory).counts
    if recipe.data.held_out >= counts.kept:
        raise RequestError(
            f"data.held_out={recipe.data.held_out} leaves nothing of {counts.kept} pictures; "
            "set data.held_out=0"
        )
    return counts


def add_estimate(
    recipe: Recipe, base: Base, device: torch.device, devices: int, findings: Findings
) -> None:
    """Add memory and time to the findings."""
    findings.attempt(lambda: check_family(base))
    made = findings.attempt(lambda: estimate(recipe, base, device.type, devices))
    if made is None:
        return
    findings.estimate = made
    if base.note:
        findings.told.append(f"base: {base.note}")
    kept = None if findings.counts is None else findings.counts.kept - recipe.data.held_out
    findings.told.append(opening(recipe, made.trained, made.parameters, kept))
    rate = network_rate(device, recipe.run)
    findings.told.append(foretold(recipe, made, rate, device.type, devices))
    findings.told.append(f"memory: {parts(made)}")
    findings.told.append(
        f"time: {made.operations / recipe.run.batch / 1e12:.3g} TFLOP a sample; the blocks of a "
        f"UNet run here at {rate / 1e12:.3g} TFLOP a second, in {recipe.run.precision}"
    )
    findings.attempt(lambda: check_memory(recipe, made, device))
