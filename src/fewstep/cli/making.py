"""The commands that make models; data and package stand here."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import RequestError
from . import cache, convert, merge, recipes, train

making = typer.Typer(rich_markup_mode=None)
data = typer.Typer(help="Prepare the pictures that recipes train on.", rich_markup_mode=None)
making.add_typer(data, name="data")
making.command(epilog=train.EPILOG)(train.train)
making.command(epilog=recipes.EPILOG)(recipes.recipes)
making.command(epilog=cache.EPILOG)(cache.cache)
making.command(epilog=convert.EPILOG)(convert.convert)
making.command(epilog=merge.EPILOG)(merge.merge)


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
