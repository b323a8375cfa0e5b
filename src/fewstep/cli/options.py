"""What is typed, how help is laid out, and the options that several commands have.

Imports nothing that takes time, so that --help and mistyped options answer at once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from ..errors import RequestError

# Under which titles the help of `generate` lists them.
MODEL, START, DRAWING = "Model", "From a picture", "Drawing"
BESIDE, VIDEO, OUTPUT = "Beside the model", "Videos", "Output"

LARGEST = 8192  # pixels a side; far more is a slip of the keyboard, and would use up the memory
# The schedulers that sample -> their classes.
SCHEDULERS = {
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "dpm": "DPMSolverMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler-a": "EulerAncestralDiscreteScheduler",
    "lcm": "LCMScheduler",
    "pndm": "PNDMScheduler",
    "tcd": "TCDScheduler",
}

# How a UNet can be kept in 8 bits, as in engine/quantize.py.
QUANTIZATIONS = ("int8", "int8-weights", "fp8")

# ── what is typed ────────────────────────────────────────────────────────────────────────────────


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


def quantization(text: str) -> str:
    """The name of a kind of quantisation."""
    if text.lower() not in QUANTIZATIONS:
        raise typer.BadParameter(f"{text!r} is unknown; give one of {', '.join(QUANTIZATIONS)}")
    return text.lower()


def scheduler(text: str) -> str:
    """The name of a scheduler that samples."""
    if text.lower() not in SCHEDULERS:
        raise typer.BadParameter(f"{text!r} is unknown; give one of {', '.join(SCHEDULERS)}")
    return text.lower()


# ── help in groups ───────────────────────────────────────────────────────────────────────────────


class Grouped(TyperCommand):
    """A command whose help lists its options under their `rich_help_panel`, in plain text."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        groups: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            is_argument = parameter.param_type_name == "argument"
            title = "Arguments" if is_argument else "Other options"
            title = getattr(parameter, "rich_help_panel", None) or title
            if (line := parameter.get_help_record(ctx)) is not None:
                groups.setdefault(title, []).append(line)
        for title, lines in groups.items():
            with formatter.section(title):
                formatter.write_dl(lines)


# ── of several commands ──────────────────────────────────────────────────────────────────────────

RecipeArgument = Annotated[
    str,
    typer.Argument(metavar="RECIPE", help="A name that `fewstep recipes` lists, or a file."),
]
OverridesArgument = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Entries of the recipe to replace."),
]
ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        metavar="ID|FOLDER",
        help="A hub repository or a folder in diffusers' layout, safetensors only. "
        "Default: the model inside fewstep, which needs no network.",
        rich_help_panel=MODEL,
    ),
]
OutOption = Annotated[
    Path | None,
    typer.Option(
        "--out",
        "-o",
        metavar="FILE.png|FOLDER",
        help="Where to write; a video may go to a .gif or .webp file too. A folder is made if need "
        "be, and its files are kept: a new picture takes a free name. Default: fewstep-SEED.png "
        "in this folder.",
        rich_help_panel=OUTPUT,
    ),
]
ForceOption = Annotated[
    bool,
    typer.Option("--force", help="Replace the file of --out if it exists.", rich_help_panel=OUTPUT),
]
DeviceOption = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="auto, cpu, cuda, cuda:1, mps. auto: the fastest that is there.",
        rich_help_panel=MODEL,
    ),
]
