"""The commands that make and measure models: data, train, recipes, package, evaluate."""

from __future__ import annotations

import itertools
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from ..errors import RequestError
from .options import DeviceOption, ModelOption, guidance, step_numbers

making = typer.Typer(rich_markup_mode=None)
data = typer.Typer(help="Prepare the pictures that recipes train on.", rich_markup_mode=None)
making.add_typer(data, name="data")


@data.command(
    epilog="\b\nExamples:\n"
    "  fewstep data emoji --output runs/emoji\n"
    "  fewstep data emoji --output runs/emoji --styles 3d,flat --selection objects512",
)
def emoji(
    output: Annotated[Path, typer.Option(metavar="FOLDER", help="Where the prepared pictures go.")],
    packages: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Where the npm packages lie or are fetched to. "
            "Default: ~/.cache/fewstep/packages.",
        ),
    ] = None,
    styles: Annotated[
        str | None,
        typer.Option(metavar="A,B", help="Styles of drawing, for example 3d,flat. Default: all."),
    ] = None,
    selection: Annotated[
        str, typer.Option(metavar="NAME", help="Which concepts, for example objects512.")
    ] = "all",
) -> None:
    """Fetch the emoji packages with npm, check their hashes, and draw them as sprites.

    A style that is there already is kept, so an interrupted run goes on.
    """
    from ..training.emoji import STYLES, prepare_emoji

    chosen = STYLES if styles is None else tuple(styles.split(","))
    prepare_emoji(output, packages, styles=chosen, selection=selection)
    print(output)


@making.command(
    epilog="\b\nExamples:\n"
    "  fewstep train emoji64_1_autoencoder\n"
    "  fewstep train emoji64_4_lcm run.steps=2400 optimizer.lr=1e-4 --output runs/longer\n"
    "  fewstep train my-recipe.toml",
)
def train(
    recipe: Annotated[
        str,
        typer.Argument(metavar="RECIPE", help="A name that `fewstep recipes` lists, or a file."),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Entries of the recipe to replace."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Where all phases go. Default: the recipe's own."),
    ] = None,
) -> None:
    """Run a training recipe to its end and print its folder; one that was begun goes on."""
    from ..training import train as run

    try:
        print(run(recipe, overrides or (), output))
    except KeyboardInterrupt:
        print("interrupted: the same command goes on from the last checkpoint", file=sys.stderr)
        raise


@making.command(epilog="\b\nExamples:\n  fewstep recipes\n  fewstep recipes emoji64_4_lcm")
def recipes(
    name: Annotated[
        str | None, typer.Argument(metavar="RECIPE", help="Print this recipe in full.")
    ] = None,
) -> None:
    """List the training recipes that ship with fewstep."""
    from ..training.config import recipe_names, recipe_path

    if name is not None:
        print(recipe_path(name).read_text(encoding="utf-8"), end="")
        return
    names = recipe_names()
    for each in names:
        print(f"{each:<{max(map(len, names))}}  {about(recipe_path(each))}")


def about(recipe: Path) -> str:
    """The first sentence of the comment that a recipe opens with."""
    lines = recipe.read_text(encoding="utf-8").splitlines()
    comment = itertools.takewhile(lambda line: line.startswith("#"), lines)
    return " ".join(line.lstrip("# ") for line in comment).partition(". ")[0].rstrip(".")


@making.command(epilog="\b\nExamples:\n  fewstep package runs/emoji64 my-model")
def package(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="The folder of a model's four phases.")
    ],
    output: Annotated[Path, typer.Argument(metavar="FOLDER", help="A new folder for the model.")],
    figures: Annotated[
        Path | None,
        typer.Option(metavar="FILE.md", help="Tables for its card, as `fewstep evaluate` writes."),
    ] = None,
) -> None:
    """Make a finished training run a model folder: half precision, card, notices."""
    from ..training.package import package_model

    try:
        text = "" if figures is None else figures.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"--figures {figures}: cannot be read ({error})") from error
    print(package_model(run, output, figures=text))


@making.command(
    epilog="\b\nExamples:\n"
    "  fewstep evaluate --sprites runs/emoji --output runs/evaluation\n"
    "  fewstep evaluate --sprites runs/emoji --output docs/evaluation \\\n"
    "      --model runs/emoji64/lcm/pipeline --teacher runs/emoji64/teacher/pipeline",
)
def evaluate(
    sprites: Annotated[
        Path, typer.Option(metavar="FOLDER", help="Pictures that `fewstep data emoji` prepared.")
    ],
    output: Annotated[
        Path, typer.Option(metavar="FOLDER", help="Where the table, the JSON and the sheet go.")
    ],
    model: ModelOption = None,
    teacher: Annotated[
        str | None,
        typer.Option(metavar="ID|FOLDER", help="The teacher, to be judged beside the model."),
    ] = None,
    steps: Annotated[
        str, typer.Option(metavar="A,B", help="Numbers of steps to judge at.")
    ] = "1,2,4,8",
    teacher_steps: Annotated[int, typer.Option(min=1, help="DDIM steps of the teacher.")] = 50,
    guidance: Annotated[
        float | None,
        typer.Option(parser=guidance, metavar="NUMBER", help="Default: the model's own."),
    ] = None,
    teacher_guidance: Annotated[
        float, typer.Option(parser=guidance, metavar="NUMBER", help="Of the teacher.")
    ] = 3.0,
    selection: Annotated[
        str, typer.Option(metavar="NAME", help="The concepts that the model was trained on.")
    ] = "objects512",
    prompts: Annotated[
        int | None,
        typer.Option(min=1, help="At most so many prompts of each kind, for a quick look."),
    ] = None,
    cache: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Where probes and features are kept. Default: ~/.cache/fewstep/evaluation.",
        ),
    ] = None,
    device: DeviceOption = "auto",
) -> None:
    """Measure an emoji model: concept recall, KID, retrieval, colours, numbers.

    The first run makes the judges, in minutes. It needs the packages of `fewstep[evaluate]` and
    their weights as tools/export_feature_nets.py writes them.
    """
    from .evaluate import Plan
    from .evaluate import evaluate as run

    home = Path(os.environ.get("FEWSTEP_CACHE") or "~/.cache/fewstep").expanduser()
    run(
        Plan(
            sprites=sprites,
            output=output,
            cache=home / "evaluation" if cache is None else cache,
            model=model,
            teacher=teacher,
            steps=step_numbers(steps),
            teacher_steps=teacher_steps,
            guidance=guidance,
            teacher_guidance=teacher_guidance,
            selection=selection,
            prompts=prompts,
            device=device,
        )
    )
