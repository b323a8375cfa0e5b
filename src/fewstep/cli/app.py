"""The commands and their options, and the one place that turns errors into a line and a code.

The modules that do the work are imported by the command that needs them, so that --help and
mistyped options answer at once, without torch.
"""

from __future__ import annotations

import errno
import itertools
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import FewstepError, RequestError

DONE, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130
DEBUG = "--debug"
LARGEST = 8192  # pixels a side; far more is a slip of the keyboard, and would use up the memory

app = typer.Typer(
    name="fewstep",
    help="Latent consistency models: pictures in one to eight steps.",
    epilog="\b\nExamples:\n"
    '  fewstep generate "a red apple"\n'
    "  fewstep repro fewstep-7.png\n"
    "  fewstep COMMAND --help",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line, by default the process's own; returns the exit code.

    0: done; 1: a picture came out different, or a fault of fewstep's; 2: bad input;
    130: interrupted.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = DEBUG in arguments
    if debug:  # may stand anywhere
        arguments = [DEBUG, *(argument for argument in arguments if argument != DEBUG)]
    try:
        with plain_warnings():
            result = app(arguments or ["--help"], prog_name="fewstep", standalone_mode=False)
        return result if isinstance(result, int) else DONE
    except (KeyboardInterrupt, typer.Abort):
        return INTERRUPTED
    except Exception as error:
        message, code = explained(error)
        if debug:
            traceback.print_exc()
        # One line, whatever the error holds.
        print("error:", " ".join(message.split()), file=sys.stderr)
        return code


def explained(error: Exception) -> tuple[str, int]:
    """What to print of an error, and the exit code."""
    if isinstance(error, FewstepError):
        return str(error), BAD_INPUT
    if hasattr(error, "format_message"):  # a usage error of the command line's own
        command = getattr(getattr(error, "ctx", None), "command_path", "fewstep")
        return f"{error.format_message().rstrip('.')} (see {command} --help)", BAD_INPUT
    if isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and "memory" in str(error).lower()
    ):
        return "not enough memory; give a smaller --size, or --dtype float16", BAD_INPUT
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return f"no space left ({error}); free some space", BAD_INPUT
    return f"{type(error).__name__}: {error} (run again with {DEBUG} to see where)", FAILED


@contextmanager
def plain_warnings() -> Iterator[None]:
    """fewstep's own warnings as one line each on stderr; those of its libraries not at all."""

    def line(message: Warning | str, *_: Any, **__: Any) -> None:
        print("warning:", " ".join(str(message).split()), file=sys.stderr)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("always", category=UserWarning, module=r"fewstep(\.|$)")
        warnings.showwarning = line
        yield


# ── options ──────────────────────────────────────────────────────────────────────────────────────


def size(text: str | tuple[int, int]) -> tuple[int, int]:
    """ "512" or "512x768" as (width, height)."""
    if isinstance(text, tuple):
        return text
    sides = text.lower().replace("×", "x").split("x")  # noqa: RUF001 - people paste it
    if len(sides) > 2 or not all(s.isdecimal() and 0 < int(s) <= LARGEST for s in sides):
        raise typer.BadParameter(
            f"{text!r} is no size; give N or WIDTHxHEIGHT up to {LARGEST}, for example 512x768"
        )
    return int(sides[0]), int(sides[-1])


def strength(text: str | float) -> float:
    """A number above 0, up to 1."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value <= 1:
        raise typer.BadParameter(f"{text} is not above 0 and at most 1; give for example 0.6")
    return value


def guidance(text: str | float) -> float:
    """A number from 0 to 100."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 100:
        raise typer.BadParameter(f"{text} is not from 0 to 100; give for example 4 or 7.5")
    return value


def step_numbers(text: str) -> tuple[int, ...]:
    """ "1,2,4" as numbers."""
    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise RequestError(f"--steps {text}: must be numbers with commas between, such as 1,2,4,8")
    return tuple(map(int, parts))


def dtype(text: str) -> str:
    """The name of a dtype, in full."""
    short = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
    name = short.get(text, text)
    if name not in ("auto", *short.values()):
        raise typer.BadParameter(f"{text!r} is unknown; give auto, float32, float16 or bfloat16")
    return name


ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        metavar="ID|FOLDER",
        help="A hub repository or a folder in diffusers' layout, safetensors only. "
        "Default: the model inside fewstep, which needs no network.",
    ),
]
OutOption = Annotated[
    Path | None,
    typer.Option(
        "--out",
        "-o",
        metavar="FILE.png|FOLDER",
        help="Where to write. A folder is made if need be, and its files are kept: a new picture "
        "takes a free name. Default: fewstep-SEED.png in this folder.",
    ),
]
ForceOption = Annotated[
    bool, typer.Option("--force", help="Replace the file of --out if it exists.")
]
DeviceOption = Annotated[
    str,
    typer.Option(
        metavar="NAME", help="auto, cpu, cuda, cuda:1, mps. auto: the fastest that is there."
    ),
]


# ── commands ─────────────────────────────────────────────────────────────────────────────────────


def print_version(wanted: bool) -> None:
    """The version, and no command."""
    if wanted:
        from .. import __version__

        print(f"fewstep {__version__}")
        raise typer.Exit


@app.callback()
def root(
    debug: Annotated[
        bool, typer.Option(DEBUG, help="Show tracebacks and log messages; may stand anywhere.")
    ] = False,
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=print_version, is_eager=True, help="Print the version and leave."
        ),
    ] = False,
) -> None:
    if debug:
        logging.basicConfig(level=logging.INFO)


@app.command(
    epilog="\b\nExamples:\n"
    '  fewstep generate "a red apple"\n'
    '  fewstep generate "a red apple" "a green pear" -n 3 --grid --seed 7\n'
    '  fewstep generate "a cat" --image photo.jpg --strength 0.6 --out cat.png\n'
    '  fewstep generate "a lighthouse" --model SimianLuo/LCM_Dreamshaper_v7 --size 768 --json',
)
def generate(
    prompts: Annotated[
        list[str], typer.Argument(metavar="PROMPT", help="What to draw; each prompt is a picture.")
    ],
    model: ModelOption = None,
    revision: Annotated[
        str | None, typer.Option(metavar="NAME", help="Branch, tag or commit of a hub repository.")
    ] = None,
    variant: Annotated[
        str | None, typer.Option(metavar="NAME", help="Which weights of several, for example fp16.")
    ] = None,
    image: Annotated[
        str | None,
        typer.Option("--image", "-i", metavar="FILE|URL", help="A picture to start from."),
    ] = None,
    strength: Annotated[
        float | None,
        typer.Option(
            parser=strength,
            metavar="NUMBER",
            help="How far to leave --image behind: above 0, at most 1. Default: 0.8.",
        ),
    ] = None,
    negative: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT",
            help="What to keep out; for models that are run with classifier-free guidance.",
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            "--steps", "-s", min=1, help="Calls of the network. Default: 4 for an LCM, else 50."
        ),
    ] = None,
    guidance: Annotated[
        float | None,
        typer.Option(
            "--guidance",
            "-g",
            parser=guidance,
            metavar="NUMBER",
            help="How closely to follow the prompt. Default: the model's own.",
        ),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Of the first picture; the next ones count up from it. Default: a random one, "
            "which the file's name and text tell.",
        ),
    ] = None,
    size: Annotated[
        Any,
        typer.Option(
            parser=size,
            metavar="N|WxH",
            help="Pixels. Default: the model's own size, in the shape of --image if there is one; "
            "an --image of another shape is cropped to the size given.",
        ),
    ] = None,
    count: Annotated[
        int, typer.Option("--count", "-n", min=1, help="Pictures of each prompt.")
    ] = 1,
    grid: Annotated[
        bool, typer.Option("--grid", help="One sheet of all pictures, in one file.")
    ] = False,
    out: OutOption = None,
    force: ForceOption = False,
    device: DeviceOption = "auto",
    dtype: Annotated[
        str,
        typer.Option(
            parser=dtype,
            metavar="NAME",
            help="auto, float32, float16, bfloat16. auto: float32 on the CPU, else float16.",
        ),
    ] = "auto",
    as_json: Annotated[
        bool, typer.Option("--json", help="Print files, settings and times as one JSON object.")
    ] = False,
    show: Annotated[
        bool | None,
        typer.Option(
            "--show/--no-show",
            help="Show the pictures in the terminal. Default: if it is one that can "
            "(kitty, iTerm2, WezTerm, or 24-bit colour).",
        ),
    ] = None,
) -> None:
    """Draw pictures of prompts and print where they went.

    A PNG file holds all that is needed to draw it again, which `fewstep repro` does.
    """
    from .generate import Request
    from .generate import generate as run

    run(
        Request(
            prompts=prompts,
            model=model,
            revision=revision,
            variant=variant,
            image=image,
            strength=strength,
            negative=negative,
            steps=steps,
            guidance=guidance,
            seed=seed,
            size=size,
            count=count,
            grid=grid,
            out=out,
            force=force,
            device=device,
            dtype=dtype,
            as_json=as_json,
            show=show,
        )
    )


@app.command(
    epilog="\b\nExamples:\n"
    "  fewstep repro fewstep-7.png\n"
    "  fewstep repro cat.png --image photos/cat.jpg --out again.png",
)
def repro(
    picture: Annotated[
        Path, typer.Argument(metavar="PICTURE", help="A PNG file that fewstep drew.")
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            metavar="FILE.png|FOLDER",
            help="Where to write the new picture. Default: it is only compared.",
        ),
    ] = None,
    force: ForceOption = False,
    model: Annotated[
        str | None,
        typer.Option(metavar="ID|FOLDER", help="Where the model is now. Default: as recorded."),
    ] = None,
    image: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|URL",
            help="Where the picture it started from is now. Default: as recorded, or beside "
            "PICTURE.",
        ),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="As for generate. Default: as recorded if it is there."),
    ] = None,
) -> int:
    """Draw a picture again from what its file says, and compare.

    Prints whether the pixels are identical, with exit code 0, or by how much they differ, with 1.
    """
    from .repro import repro as run

    return run(picture, out=out, force=force, model=model, image=image, device=device)


data = typer.Typer(help="Prepare the pictures that recipes train on.", rich_markup_mode=None)
app.add_typer(data, name="data")


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


@app.command(
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


@app.command(epilog="\b\nExamples:\n  fewstep recipes\n  fewstep recipes emoji64_4_lcm")
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


@app.command(epilog="\b\nExamples:\n  fewstep package runs/emoji64 my-model")
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


@app.command(
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


@app.command(epilog="\b\nExamples:\n  fewstep info\n  fewstep info --json")
def info(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Tell versions, devices and the embedded model's figures."""
    from .info import info as run

    run(as_json)
