"""`fewstep evaluate`: its options; what it does is in judging.py."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import RequestError
from .options import DeviceOption, guidance, size, step_numbers

evaluating = typer.Typer(rich_markup_mode=None)


def guidance_numbers(text: str) -> tuple[float, ...]:
    """ "2,4,8" as numbers."""
    try:
        return tuple(map(guidance, text.split(",")))
    except typer.BadParameter as error:
        raise RequestError(f"--guidance {text}: {error}, or several with commas") from error


def names(text: str | None) -> tuple[str, ...] | None:
    """ "a,b" as names."""
    return None if text is None else tuple(part.strip() for part in text.split(","))


@evaluating.command(
    epilog="\b\nExamples:\n"
    "  fewstep evaluate SimianLuo/LCM_Dreamshaper_v7 --reference pictures --output runs/eval \\\n"
    "      --teacher Lykon/dreamshaper-7 --compare ddim,dpm++ --guidance 2,4,6,8 \\\n"
    "      --clip openai/clip-vit-large-patch14 --prompts 1000\n"
    "  torchrun --nproc-per-node 8 -m fewstep evaluate MODEL --reference pictures --output out\n"
    "  fewstep evaluate --sprites runs/emoji --output runs/evaluation\n"
    "  fewstep evaluate --features runs/inception --output runs/fid",
)
def evaluate(
    output: Annotated[
        Path, typer.Option(metavar="FOLDER", help="Where table, JSON, plots and sheet go.")
    ],
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help="A hub repository or a folder. Default: the model inside fewstep.",
        ),
    ] = None,
    reference: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Judge by these pictures and their captions: metadata.jsonl or metadata.csv with "
            "file_name and text, or NAME.txt beside NAME.png.",
        ),
    ] = None,
    sprites: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Judge an emoji model by the pictures that `fewstep data emoji` prepared.",
        ),
    ] = None,
    features: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Compare features that were extracted elsewhere: reference.safetensors and others "
            "with a tensor `features` each. Draws nothing.",
        ),
    ] = None,
    steps: Annotated[
        str | None,
        typer.Option(metavar="A,B", help="Numbers of steps to judge at. Default: 1,2,4,8."),
    ] = None,
    guidance_scales: Annotated[
        str | None,
        typer.Option(
            "--guidance",
            metavar="A,B",
            help="Guidance scales of the model; each at all --steps. Default: the model's own.",
        ),
    ] = None,
    teacher: Annotated[
        str | None,
        typer.Option(metavar="ID|FOLDER", help="The teacher, to be judged beside the model."),
    ] = None,
    compare: Annotated[
        str | None,
        typer.Option(
            metavar="A,B", help="Samplers of the --teacher: ddim, dpm, dpm++. Default: ddim."
        ),
    ] = None,
    teacher_steps: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Steps of the --teacher by its first sampler, beside --steps. Default: 50.",
        ),
    ] = None,
    teacher_guidance: Annotated[
        float | None,
        typer.Option(
            parser=guidance,
            metavar="NUMBER",
            help="Of the --teacher. Default: its own; 3 with --sprites.",
        ),
    ] = None,
    prompts: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Draw only so many captions of --reference; with --sprites at most so many of "
            "each kind.",
        ),
    ] = None,
    batch: Annotated[
        int | None, typer.Option(min=1, help="Pictures drawn at a time. Default: 8.")
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(min=0, help="Chooses the captions and draws the pictures. Default: 0."),
    ] = None,
    pixels: Annotated[
        Any,
        typer.Option(
            "--size", parser=size, metavar="N|WxH", help="Pixels. Default: the model's own."
        ),
    ] = None,
    extractors: Annotated[
        str | None,
        typer.Option(
            metavar="A,B",
            help="Networks for FID and KID: efficientnet-lite0, mobilenet-v2. Default: both.",
        ),
    ] = None,
    clip: Annotated[
        str | None,
        typer.Option(metavar="ID|FOLDER", help="A CLIPModel, for the CLIP score. Default: none."),
    ] = None,
    kid_subset: Annotated[
        int | None,
        typer.Option(
            min=2, help="Pictures in a subset of KID. Default: half of them, at most 500."
        ),
    ] = None,
    selection: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="The concepts that an emoji model was trained on. Default: objects512.",
        ),
    ] = None,
    cache: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Where what was judged is kept, so that a run goes on. "
            "Default: ~/.cache/fewstep/evaluation.",
        ),
    ] = None,
    device: DeviceOption = "auto",
) -> None:
    """Measure a model: FID, KID, CLIP score and seconds over steps and guidance; or emoji.

    One of --reference, --sprites and --features says by what. An interrupted run goes on where it
    was. The networks that judge need the packages of `fewstep[evaluate]` and their weights as
    tools/export_feature_nets.py writes them; their FID is not Inception's and is named after them.
    """
    from .judging import Plan
    from .judging import evaluate as run

    home = Path(os.environ.get("FEWSTEP_CACHE") or "~/.cache/fewstep").expanduser()
    run(
        Plan(
            output=output,
            cache=home / "evaluation" if cache is None else cache,
            model=model,
            reference=reference,
            sprites=sprites,
            features=features,
            steps=None if steps is None else step_numbers(steps),
            guidance=None if guidance_scales is None else guidance_numbers(guidance_scales),
            teacher=teacher,
            compare=names(compare),
            teacher_steps=teacher_steps,
            teacher_guidance=teacher_guidance,
            prompts=prompts,
            batch=batch,
            seed=seed,
            size=pixels,
            extractors=names(extractors),
            clip=clip,
            kid_subset=kid_subset,
            selection=selection,
            device=device,
        )
    )
