"""`convert`: a run's checkpoint as files that can be drawn with; a LoRA in the other form."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated, get_args

import typer

from ..errors import RequestError

EPILOG = (
    "\b\nExamples:\n"
    "  fewstep convert runs/lcm_sd15/consistency my-model --half\n"
    "  fewstep convert lcm_xl_pokemon_blip runs/pokemon/consistency my-model --save-keys unet\n"
    "  fewstep convert style.safetensors style_kohya.safetensors --format kohya"
)


class Weights(str, Enum):
    """Which weights of a run."""

    average = "average"
    online = "online"


class Format(str, Enum):
    """Which names a LoRA's file has."""

    diffusers = "diffusers"
    kohya = "kohya"


FormatOption = Annotated[
    Format | None,
    typer.Option(
        "--format",
        help="Of a LoRA's file: diffusers, or kohya (A1111, ComfyUI). Default: a run's LoRA is "
        "written as both.",
    ),
]
ArchitectureOption = Annotated[
    str | None,
    typer.Option(
        metavar="ID|FOLDER",
        help="The model that a LoRA is for, where it is not Stable Diffusion 1, 2, SDXL or SSD-1B; "
        "only its configs are read.",
    ),
]


def convert(
    places: Annotated[
        list[str],
        typer.Argument(
            metavar="[RECIPE] INPUT OUTPUT",
            help="INPUT: a run's folder, its checkpoint.safetensors, or a LoRA. OUTPUT: a folder, "
            "or for a LoRA a .safetensors file. RECIPE: of a checkpoint that lost its recipe.json.",
        ),
    ],
    save_keys: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Which networks of a run. Default: unet."),
    ] = None,
    weights: Annotated[
        Weights, typer.Option(help="Those averaged over the steps, or the last.")
    ] = Weights.average,
    half: Annotated[bool, typer.Option("--half", help="Write float16 variants too.")] = False,
    form: FormatOption = None,
    model: ArchitectureOption = None,
    push: Annotated[
        str | None,
        typer.Option(metavar="OWNER/NAME", help="Upload OUTPUT to this hub repository."),
    ] = None,
) -> None:
    """Convert what training wrote into files that are drawn with, or a LoRA into another form.

    A run gives OUTPUT/unet in diffusers' layout, or the files of its LoRA. Needs no data and no
    network. A LoRA's file keeps its numbers and changes its names.
    """
    from ..checkpoints.lora_writing import Form
    from ..training.convert import convert_run, is_run
    from ..training.export import push as upload
    from ..training.export import require_token

    # As `--save-keys unet text_encoder` is typed, the second name arrives among the places.
    keys = [*(save_keys or ["unet"]), *(places[3:] if save_keys else [])]
    places = places[:3] if save_keys else places
    if len(places) not in (2, 3):
        raise RequestError(
            f"got {len(places)} places; give INPUT OUTPUT, or RECIPE INPUT OUTPUT "
            "(see fewstep convert --help)"
        )
    config = places[0] if len(places) == 3 else None
    source, output = places[-2:]
    if push is not None:
        require_token(push)
    if config is not None or is_run(source):
        refuse(f"--model {model}: has a meaning for LoRA files only; leave it out", model)
        forms: tuple[Form, ...] = get_args(Form) if form is None else (form.value,)
        written = convert_run(
            source,
            output,
            config=config,
            networks=keys,
            weights=weights.value,
            half=half,
            forms=forms,
        )
        print("\n".join(map(str, written)))
    else:
        refuse("--half: has a meaning for runs only; leave it out", half)
        refuse(f"--save-keys {keys[0]}: has a meaning for runs only; leave it out", save_keys)
        refuse(f"--push {push}: has a meaning for runs only; leave it out", push)
        print(convert_file(source, output, form, model))
    if push is not None:
        print(upload(Path(output), push))


def refuse(message: str, given: object) -> None:
    """Raises RequestError if an option that would be ignored was given."""
    if given:
        raise RequestError(message)


def convert_file(source: str, output: str, form: Format | None, model: str | None) -> Path:
    """The file of a LoRA in another form."""
    from ..training.convert import convert_lora
    from .additions import parts_of

    if form is None and not Path(source).exists():
        raise RequestError(
            f"{source} is not there; give a run's folder, its checkpoint.safetensors or a LoRA, "
            "and for a LoRA on the hub --format kohya or --format diffusers"
        )
    if form is None:
        raise RequestError(f"{source} is a LoRA; give --format kohya or --format diffusers")
    check_output(output)
    place, file = parts_of(source)
    return convert_lora(place, output, form.value, file=file, model=model)


def check_output(output: str) -> None:
    """Raises RequestError unless `output` can be the new file of a LoRA."""
    if not output.endswith(".safetensors"):
        raise RequestError(f"{output}: a LoRA is one file; give a name in .safetensors")
    if Path(output).exists():
        raise RequestError(f"{output}: exists; give another name, or delete it")
