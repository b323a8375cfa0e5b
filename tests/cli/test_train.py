"""`fewstep train --dry-run`: what it prints, and that a fault is one line and a status."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fewstep.training import dry_run as dry_running
from fewstep.training.dry_run import Findings

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the dry run is asked for; it finds one thing, and one wrong thing if steps are 13."""
    calls: list[Any] = []

    def found(recipe: Any, devices: int) -> Findings:
        calls.append((recipe, devices))
        return Findings(["it will take a while"], ["unlucky"] * (recipe.run.steps == 13))

    monkeypatch.setattr(dry_running, "dry_run", found)
    return calls


def test_a_dry_run_prints_what_it_found_and_trains_nothing(run: Run, asked: list[Any]) -> None:
    code, out, err = run("train", "lcm_lora_sd15", "run.steps=7", "--output", "x", "--dry-run")
    assert (code, out, err) == (0, "it will take a while\n", "")
    ((recipe, devices),) = asked
    assert (recipe.run.steps, recipe.folder, devices) == (7, "x", 1)
    assert list(Path().iterdir()) == []


def test_what_is_wrong_is_one_line_and_a_status(run: Run, asked: list[Any]) -> None:
    code, out, err = run("train", "lcm_lora_sd15", "run.steps=13", "--dry-run")
    assert (code, out, err) == (2, "it will take a while\n", "error: unlucky\n")


def test_a_dry_run_counts_the_devices_that_the_environment_asks_for(
    run: Run, asked: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NPROC_PER_NODE", "4")
    monkeypatch.setenv("NNODES", "2")
    monkeypatch.setenv("PORT", "29500")
    assert run("train", "lcm_lora_sd15", "--dry-run")[0] == 0
    assert run("train", "lcm_lora_sd15", "--dry-run", "--ray", "3")[0] == 0
    assert [devices for _, devices in asked] == [8, 3]
