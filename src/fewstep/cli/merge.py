"""`merge`: several LoRAs into one file, or into a model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import RequestError
from .convert import Format, check_output, refuse
from .options import SCHEDULERS, scheduler

if TYPE_CHECKING:
    from ..training.merge import Merged

EPILOG = (
    "\b\nExamples:\n"
    "  fewstep merge style.safetensors:0.8 lcm.safetensors:1.0 --output both.safetensors\n"
    "  fewstep merge style.safetensors:0.8 latent-consistency/lcm-lora-sdxl \\\n"
    "      --output both.safetensors --rank 64\n"
    "  fewstep merge latent-consistency/lcm-lora-sdv1-5 --scheduler lcm --half \\\n"
    "      --model stable-diffusion-v1-5/stable-diffusion-v1-5 --output my-lcm"
)


def merge(
    loras: Annotated[
        list[str],
        typer.Argument(
            metavar="NAME[:WEIGHT]",
            help="LoRAs of one kind of model: files, folders, hub repositories, or "
            "OWNER/REPOSITORY/FILE. Weights are 1 if not given.",
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE.safetensors|FOLDER",
            help="A file for one LoRA; a new folder for a model.",
        ),
    ],
    model: Annotated[
        str | None,
        typer.Option(
            metavar="ID|FOLDER",
            help="The model to merge into. For a LoRA's file: the one that it is for, where it is "
            "not Stable Diffusion 1, 2, SDXL or SSD-1B.",
        ),
    ] = None,
    rank: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Approximate by this rank, and say how well. Default: exactly, with the sum of "
            "the ranks.",
        ),
    ] = None,
    form: Annotated[
        Format, typer.Option("--format", help="Of a LoRA's file: diffusers, or kohya.")
    ] = Format.diffusers,
    scheduler: Annotated[
        Any,
        typer.Option(
            parser=scheduler,
            metavar="NAME",
            help="The scheduler that a model's folder names; after an LCM-LoRA give lcm.",
        ),
    ] = None,
    half: Annotated[
        bool, typer.Option("--half", help="A LoRA in float16; a model in float16 too.")
    ] = False,
) -> None:
    """Add up LoRAs, each times its weight: into one file, or into the weights of a model.

    The sum is exact. LoHa, LoKr and DoRA can be merged into a model, not into a file.
    """
    from ..training.merge import Term, merge_into_model, merge_loras
    from .additions import named, parts_of

    terms = []
    for addition in (named("lora", text) for text in loras):
        place, file = parts_of(addition.id)
        terms.append(Term(place, addition.weight, file))
    if output.suffix == ".safetensors":
        refuse(f"--scheduler {scheduler}: has a meaning for a model only; leave it out", scheduler)
        check_output(str(output))
        merged = merge_loras(terms, output, form=form.value, rank=rank, model=model, half=half)
        print(merged.path)
        print(figures(merged))
        return
    if model is None:
        raise RequestError(
            f"--output {output}: is no .safetensors file; give one, or --model to merge into"
        )
    refuse(f"--rank {rank}: has a meaning for a LoRA's file only; leave it out", rank)
    kind = None if scheduler is None else SCHEDULERS[scheduler]
    print(merge_into_model(terms, model, output, half=half, scheduler=kind))


def figures(merged: Merged) -> str:
    """The ranks of a file, and what cutting them has cost."""
    low, high = merged.ranks
    ranks = f"rank {low}" if low == high else f"ranks {low} to {high}"
    return f"{ranks}; relative error {merged.error:.1e}, in the worst layer {merged.worst:.1e}"
