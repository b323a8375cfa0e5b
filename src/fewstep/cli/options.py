"""The options that commands share or have many of: how they are called, read and explained.

Imports nothing that takes time, so that --help and mistyped options answer at once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import RequestError

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


def scheduler(text: str) -> str:
    """The name of a scheduler that samples."""
    if text.lower() not in SCHEDULERS:
        raise typer.BadParameter(f"{text!r} is unknown; give one of {', '.join(SCHEDULERS)}")
    return text.lower()


# ── of several commands ──────────────────────────────────────────────────────────────────────────

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

# ── what stands beside the model ─────────────────────────────────────────────────────────────────

MaskOption = Annotated[
    str | None,
    typer.Option(
        metavar="FILE|URL",
        help="Draw the white part of this picture anew and keep the rest of --image as it is.",
    ),
]
SchedulerOption = Annotated[
    Any,
    typer.Option(
        parser=scheduler,
        metavar="NAME",
        help=f"Sample with {', '.join(SCHEDULERS)}. Default: the model's own. LCM-LoRAs need lcm.",
    ),
]
LoraOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME[:WEIGHT]",
        help="A LoRA: a file, a folder, a hub repository, or OWNER/REPOSITORY/FILE. May be given "
        "several times.",
    ),
]
ControlNetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--controlnet",
        metavar="NAME[:WEIGHT]",
        help="A ControlNet that steers by --control-image. May be given several times.",
    ),
]
AdapterOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME[:WEIGHT]",
        help="A T2I-Adapter that steers by --control-image. May be given several times.",
    ),
]
ControlImageOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="FILE|URL",
        help="What --controlnet or --adapter is shown, for example edges of `fewstep canny`: one "
        "picture for all, or one for each.",
    ),
]
IpAdapterOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME[:WEIGHT]",
        help="An IP-Adapter, to which --ip-image is a prompt: a file, or OWNER/REPOSITORY/FILE.",
    ),
]
IpImageOption = Annotated[
    list[str] | None,
    typer.Option(metavar="FILE|URL", help="The picture that --ip-adapter reads as a prompt."),
]
MotionAdapterOption = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Motion modules of AnimateDiff: draws a video, into a .png (which keeps the "
        "settings), .webp or .gif file.",
    ),
]
FramesOption = Annotated[int | None, typer.Option(min=1, help="Frames of the video. Default: 16.")]
