"""The options of `generate`: how they are called, explained and grouped."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .options import (
    BESIDE,
    DRAWING,
    MODEL,
    OUTPUT,
    QUANTIZATIONS,
    SCHEDULERS,
    START,
    VIDEO,
    dtype,
    guidance,
    quantization,
    scheduler,
    size,
    strength,
)

# ── the model ────────────────────────────────────────────────────────────────────────────────────

PromptsArgument = Annotated[
    list[str], typer.Argument(metavar="PROMPT", help="What to draw; each prompt is a picture.")
]
RevisionOption = Annotated[
    str | None,
    typer.Option(
        metavar="NAME", help="Branch, tag or commit of a hub repository.", rich_help_panel=MODEL
    ),
]
VariantOption = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Which weights of several, for example fp16.",
        rich_help_panel=MODEL,
    ),
]
VaeOption = Annotated[
    str | None,
    typer.Option(
        metavar="ID|FOLDER",
        help="Another autoencoder of the same latents, for example madebyollin/taesd, which "
        "decodes quickly and a little less sharp.",
        rich_help_panel=MODEL,
    ),
]
SchedulerOption = Annotated[
    Any,
    typer.Option(
        parser=scheduler,
        metavar="NAME",
        help=f"Sample with {', '.join(SCHEDULERS)}. Default: the model's own. LCM-LoRAs need lcm.",
        rich_help_panel=MODEL,
    ),
]
QuantizeOption = Annotated[
    Any,
    typer.Option(
        parser=quantization,
        metavar="NAME",
        help=f"The UNet in 8 bits, approximately: {', '.join(QUANTIZATIONS)}. int8 is quicker on "
        "CPUs with AVX-512 VNNI, int8-weights only smaller, fp8 for GPUs.",
        rich_help_panel=MODEL,
    ),
]
FastOption = Annotated[
    bool,
    typer.Option(
        "--fast",
        help="Turn on every approximation that gains here: 16 bits, int8, and the tiny "
        "autoencoder in the model's folder vae_tiny. Prints which, and why not the others.",
        rich_help_panel=MODEL,
    ),
]
DtypeOption = Annotated[
    str,
    typer.Option(
        parser=dtype,
        metavar="NAME",
        help="auto, float32, float16, bfloat16. auto: float32 on the CPU, else float16.",
        rich_help_panel=MODEL,
    ),
]
CompileOption = Annotated[
    bool,
    typer.Option(
        "--compile",
        help="Compile the model while the first pictures are drawn; for many pictures on a GPU.",
        rich_help_panel=MODEL,
    ),
]

# ── the drawing ──────────────────────────────────────────────────────────────────────────────────

StepsOption = Annotated[
    int | None,
    typer.Option(
        "--steps",
        "-s",
        min=1,
        metavar="N",
        help="Calls of the network. Default: 4 for an LCM, else 50.",
        rich_help_panel=DRAWING,
    ),
]
GuidanceOption = Annotated[
    float | None,
    typer.Option(
        "--guidance",
        "-g",
        parser=guidance,
        metavar="NUMBER",
        help="How closely to follow the prompt. Default: the model's own.",
        rich_help_panel=DRAWING,
    ),
]
NegativeOption = Annotated[
    str | None,
    typer.Option(
        metavar="TEXT",
        help="What to keep out; for models that are run with classifier-free guidance.",
        rich_help_panel=DRAWING,
    ),
]
SizeOption = Annotated[
    Any,
    typer.Option(
        parser=size,
        metavar="N|WxH",
        help="Pixels. Default: the model's own size, in the shape of --image if there is one; "
        "an --image of another shape is cropped to the size given.",
        rich_help_panel=DRAWING,
    ),
]
SeedOption = Annotated[
    int | None,
    typer.Option(
        min=0,
        metavar="N",
        help="Of the first picture; the next ones count up from it. Default: a random one, "
        "which the file's name and text tell.",
        rich_help_panel=DRAWING,
    ),
]
CountOption = Annotated[
    int,
    typer.Option(
        "--count",
        "-n",
        min=1,
        metavar="N",
        help="Pictures of each prompt.",
        rich_help_panel=DRAWING,
    ),
]
ImageOption = Annotated[
    str | None,
    typer.Option(
        "--image",
        "-i",
        metavar="FILE|URL",
        help="A picture to start from.",
        rich_help_panel=START,
    ),
]
MaskOption = Annotated[
    str | None,
    typer.Option(
        metavar="FILE|URL",
        help="Draw the white part of this picture anew and keep the rest of --image as it is.",
        rich_help_panel=START,
    ),
]
StrengthOption = Annotated[
    float | None,
    typer.Option(
        parser=strength,
        metavar="NUMBER",
        help="How far to leave --image behind: above 0, at most 1. Default: 0.8, with --mask "
        "the model's own.",
        rich_help_panel=START,
    ),
]

# ── what stands beside the model ─────────────────────────────────────────────────────────────────

LoraOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME[:WEIGHT]",
        help="A LoRA: a file, a folder, a hub repository, or OWNER/REPOSITORY/FILE. May be given "
        "several times.",
        rich_help_panel=BESIDE,
    ),
]
ControlNetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--controlnet",
        metavar="NAME[:WEIGHT]",
        help="A ControlNet that steers by --control-image. May be given several times.",
        rich_help_panel=BESIDE,
    ),
]
AdapterOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME[:WEIGHT]",
        help="A T2I-Adapter that steers by --control-image. May be given several times.",
        rich_help_panel=BESIDE,
    ),
]
ControlImageOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="FILE|URL",
        help="What --controlnet or --adapter is shown, for example edges of `fewstep canny`: one "
        "picture for all, or one for each.",
        rich_help_panel=BESIDE,
    ),
]
IpAdapterOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME[:WEIGHT]",
        help="An IP-Adapter, to which --ip-image is a prompt: a file, or OWNER/REPOSITORY/FILE. "
        "May be given several times.",
        rich_help_panel=BESIDE,
    ),
]
IpImageOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="FILE|URL",
        help="The picture that --ip-adapter reads as a prompt: one for all, or one for each.",
        rich_help_panel=BESIDE,
    ),
]
MotionAdapterOption = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Motion modules of AnimateDiff, which make the picture a video: a folder or a hub "
        "repository.",
        rich_help_panel=VIDEO,
    ),
]
FramesOption = Annotated[
    int | None,
    typer.Option(
        min=1, metavar="N", help="Frames of the video. Default: 16.", rich_help_panel=VIDEO
    ),
]

# ── what comes out ───────────────────────────────────────────────────────────────────────────────

GridOption = Annotated[
    bool,
    typer.Option("--grid", help="One sheet of all pictures, in one file.", rich_help_panel=OUTPUT),
]
PreviewsOption = Annotated[
    Path | None,
    typer.Option(
        metavar="FOLDER",
        help="Also write what each step predicts, as fewstep-SEED-step-1.png and so on; of a "
        "video its first frame.",
        rich_help_panel=OUTPUT,
    ),
]
PreviewVaeOption = Annotated[
    str | None,
    typer.Option(
        metavar="ID|FOLDER",
        help="What decodes --previews, for example madebyollin/taesd. Default: the model's own "
        "autoencoder, which is slower.",
        rich_help_panel=OUTPUT,
    ),
]
JsonOption = Annotated[
    bool,
    typer.Option(
        "--json",
        help="Print files, settings and times as one JSON object.",
        rich_help_panel=OUTPUT,
    ),
]
ShowOption = Annotated[
    bool | None,
    typer.Option(
        "--show/--no-show",
        help="Show the pictures in the terminal. Default: if it is one that can "
        "(kitty, iTerm2, WezTerm, or 24-bit colour).",
        rich_help_panel=OUTPUT,
    ),
]
