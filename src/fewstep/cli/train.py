"""`train`: runs a recipe, on one device or on many."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .options import OverridesArgument, RecipeArgument

if TYPE_CHECKING:
    from ..training.config import Recipe

EPILOG = (
    "\b\nExamples:\n"
    "  fewstep train emoji64_1_autoencoder\n"
    "  fewstep train emoji64_4_lcm run.steps=2400 optimizer.lr=1e-4 --output runs/longer\n"
    "  fewstep train my-recipe.toml\n"
    "  fewstep train lcm_lora_sd15 data.path=photos --dry-run\n"
    "  NPROC_PER_NODE=8 fewstep train my-recipe.toml run.batch=64\n"
    "  fewstep train my-recipe.toml --ray 16"
)


def train(
    context: typer.Context,
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    output: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Where all phases go. Default: the recipe's own."),
    ] = None,
    ray: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Train on N workers of a Ray cluster (RAY_ADDRESS)."),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Train nothing: check the recipe, count the data, estimate memory and time, and "
            "try two steps on a tiny model.",
        ),
    ] = False,
) -> int:
    """Run a training recipe to its end and print its folder; one that was begun goes on.

    NPROC_PER_NODE, NNODES, NODE_RANK, ADDR and PORT start several processes, as torchrun would.
    """
    from ..training import launch, load_recipe
    from ..training import train as run
    from ..training.environment import number
    from ..training.interruption import StoppedError

    wanted = load_recipe(recipe, overrides or ())
    if output is not None:
        wanted = replace(wanted, folder=str(output))
    if dry_run:
        return foretell(wanted, ray)
    several = launch.wanted()
    if several is not None or ray is not None:  # what is wrong is told once, not by each process
        check(wanted, ray or (several.count if several else 1))
    if ray is not None:
        from ..training.ray_cluster import train_on_ray

        print(train_on_ray(wanted, ray))
        return 0
    if several is not None:
        debug = ["--debug"] * bool(context.find_root().params.get("debug"))
        words = ["train", recipe, *(overrides or ())]
        words += [] if output is None else ["--output", str(output)]
        return launch.start(several, ["-m", "fewstep", *debug, *words])
    first = number("RANK", 0) == 0
    try:
        folder = run(wanted)
    except StoppedError as stopped:
        if first:
            print(f"{stopped}; the same command goes on from there", file=sys.stderr)
        return launch.TERMINATED
    except KeyboardInterrupt:
        if first:
            print("interrupted: the same command goes on from the last checkpoint", file=sys.stderr)
        raise
    if first:
        print(folder)
    return 0


def check(recipe: Recipe, devices: int) -> None:
    """Raises RequestError for settings that so many devices cannot run."""
    from ..training.checks import checks_of
    from ..training.run import device_of

    for each in checks_of(recipe, device_of(recipe.run.device), devices):
        each()


def foretell(recipe: Recipe, workers: int | None) -> int:
    """Print what a run would do and need. Raises RequestError if it would fail."""
    from ..training import launch
    from ..training.dry_run import dry_run
    from ..training.environment import number

    several = launch.wanted()
    started = number("WORLD_SIZE", 1) if several is None else several.count
    findings = dry_run(recipe, devices=workers or started)
    for line in findings.told:
        print(line)
    findings.check()
    return 0
