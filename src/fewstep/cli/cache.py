"""`cache`: encodes the pictures and captions of a recipe before it is trained; checks them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import CheckpointError, RequestError
from .options import OverridesArgument, RecipeArgument

if TYPE_CHECKING:
    from ..training.config import Recipe

EPILOG = (
    "\b\nExamples:\n"
    "  fewstep cache lcm_lora_sd15 data.path=pictures\n"
    "  torchrun --nproc-per-node 8 -m fewstep cache my-recipe.toml\n"
    "  fewstep cache my-recipe.toml --check"
)


def cache(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    output: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Where all phases are. Default: the recipe's own."),
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Encode nothing; read every file and compare its sum.")
    ] = False,
) -> None:
    """Encode a recipe's pictures and captions once, and print what was kept and where.

    Training does the same when it starts; what is encoded already is not encoded again.
    """
    from ..training.config import load_recipe

    wanted = load_recipe(recipe, overrides or ())
    if check:
        if output is not None:
            raise RequestError(f"--output {output}: has no meaning with --check; leave it out")
        verified(wanted)
    else:
        encode(wanted if output is None else replace(wanted, folder=str(output)))


def encode(recipe: Recipe) -> None:
    """Encode all; the first process prints the counts and the folder."""
    from ..training.config import AdapterPhase, ConsistencyPhase

    settings = recipe.settings
    if not isinstance(settings, ConsistencyPhase | AdapterPhase):
        raise RequestError(
            f"RECIPE: its phase {recipe.phase!r} encodes nothing beforehand; give a recipe with "
            "phase = 'consistency' or 'adapter'"
        )
    from ..training.data import prepare
    from ..training.networks import load_base
    from ..training.ranks import joined
    from ..training.run import device_of

    with joined(device_of(recipe.run.device)) as (ranks, device):
        encoding = prepare(recipe, load_base(settings, recipe.folder).to(device))
        if ranks.is_first:
            print(f"{encoding.counts}\n{encoding.folder}")


def verified(recipe: Recipe) -> None:
    """Read all files of the cache. Raises CheckpointError that names the damaged ones."""
    from ..training.data import cache_folder
    from ..training.data.store import verify

    folder = cache_folder(recipe.data)
    count, damaged = verify(folder)
    if damaged:
        raise CheckpointError(
            f"{len(damaged)} of {count} files are damaged: {', '.join(map(str, damaged))}; run the "
            "same command without --check: it encodes what was in them again"
        )
    print(f"all {count} files are whole\n{folder}")
