"""The commands and their options, and the one place that turns errors into a line and a code.

The modules that do the work are imported by the command that needs them, so that --help and
mistyped options answer at once, without torch.
"""

from __future__ import annotations

import errno
import logging
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import FewstepError
from ..imports import first_import
from .bench import benching
from .evaluate import evaluating
from .generate_options import (
    AdapterOption,
    CompileOption,
    ControlImageOption,
    ControlNetOption,
    CountOption,
    DtypeOption,
    FastOption,
    FramesOption,
    GridOption,
    GuidanceOption,
    ImageOption,
    IpAdapterOption,
    IpImageOption,
    JsonOption,
    LoraOption,
    MaskOption,
    MotionAdapterOption,
    NegativeOption,
    PreviewsOption,
    PreviewVaeOption,
    PromptsArgument,
    QuantizeOption,
    RevisionOption,
    SchedulerOption,
    SeedOption,
    ShowOption,
    SizeOption,
    StepsOption,
    StrengthOption,
    VaeOption,
    VariantOption,
)
from .making import making
from .options import DeviceOption, ForceOption, Grouped, ModelOption, OutOption
from .serve import serving

DONE, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130
DEBUG = "--debug"
# What the system says of a place that was given.
NOT_THE_PROGRAMS = (errno.ENAMETOOLONG, errno.EACCES, errno.EPERM, errno.EROFS, errno.ELOOP)

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
    arguments, rest = split(arguments)
    debug = DEBUG in arguments
    if debug:  # may stand anywhere
        arguments = [DEBUG, *(argument for argument in arguments if argument != DEBUG)]
    arguments += rest
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


def split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """The arguments that are ours, and those behind `run SCRIPT`, which are the script's."""
    words = [i for i, argument in enumerate(arguments) if argument != DEBUG]
    end = words[1] + 1 if len(words) > 1 and arguments[words[0]] == "run" else len(arguments)
    return list(arguments[:end]), list(arguments[end:])


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
    if isinstance(error, OSError) and error.errno in NOT_THE_PROGRAMS:
        return f"{str(error.filename)[:200]}: {error.strerror}; give another place", BAD_INPUT
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
    cls=Grouped,
    epilog="\b\nExamples:\n"
    '  fewstep generate "a red apple"\n'
    '  fewstep generate "a red apple" "a green pear" -n 3 --grid --seed 7\n'
    '  fewstep generate "a cat" --image photo.jpg --strength 0.6 --out cat.png\n'
    '  fewstep generate "a lighthouse" --model SimianLuo/LCM_Dreamshaper_v7 --size 768 --json\n'
    '  fewstep generate "a fox" -m Lykon/dreamshaper-7 --scheduler lcm \\\n'
    "      --lora latent-consistency/lcm-lora-sdv1-5 --lora style.safetensors:0.8\n"
    '  fewstep generate "a bird" -m SimianLuo/LCM_Dreamshaper_v7 --control-image edges.png \\\n'
    "      --controlnet lllyasviel/sd-controlnet-canny\n"
    '  fewstep generate "a cat" -m SimianLuo/LCM_Dreamshaper_v7 --previews steps \\\n'
    "      --preview-vae madebyollin/taesd",
)
def generate(
    prompts: PromptsArgument,
    steps: StepsOption = None,
    guidance: GuidanceOption = None,
    negative: NegativeOption = None,
    size: SizeOption = None,
    seed: SeedOption = None,
    count: CountOption = 1,
    image: ImageOption = None,
    mask: MaskOption = None,
    strength: StrengthOption = None,
    model: ModelOption = None,
    revision: RevisionOption = None,
    variant: VariantOption = None,
    scheduler: SchedulerOption = None,
    vae: VaeOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    quantize: QuantizeOption = None,
    fast: FastOption = False,
    compile: CompileOption = False,
    lora: LoraOption = None,
    controlnet: ControlNetOption = None,
    adapter: AdapterOption = None,
    control_image: ControlImageOption = None,
    ip_adapter: IpAdapterOption = None,
    ip_image: IpImageOption = None,
    motion_adapter: MotionAdapterOption = None,
    frames: FramesOption = None,
    out: OutOption = None,
    force: ForceOption = False,
    grid: GridOption = False,
    previews: PreviewsOption = None,
    preview_vae: PreviewVaeOption = None,
    as_json: JsonOption = False,
    show: ShowOption = None,
) -> None:
    """Draw pictures of prompts and print where they went.

    A file holds all that is needed to draw it again, which `fewstep repro` does.
    """
    with first_import("torch"):
        from .generate import Request
        from .generate import generate as run

    run(
        Request(
            prompts=prompts,
            model=model,
            revision=revision,
            variant=variant,
            image=image,
            mask=mask,
            strength=strength,
            negative=negative,
            steps=steps,
            guidance=guidance,
            scheduler=scheduler,
            vae=vae,
            lora=lora or (),
            controlnet=controlnet or (),
            adapter=adapter or (),
            control_image=control_image or (),
            ip_adapter=ip_adapter or (),
            ip_image=ip_image or (),
            motion_adapter=motion_adapter,
            frames=frames,
            seed=seed,
            size=size,
            count=count,
            grid=grid,
            out=out,
            force=force,
            previews=previews,
            preview_vae=preview_vae,
            device=device,
            dtype=dtype,
            quantize=quantize,
            fast=fast,
            compile=compile,
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
    picture: Annotated[Path, typer.Argument(metavar="PICTURE", help="A file that fewstep drew.")],
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
    with first_import("torch"):
        from .repro import repro as run

    return run(picture, out=out, force=force, model=model, image=image, device=device)


@app.command(
    context_settings={"allow_interspersed_args": False, "ignore_unknown_options": True},
    epilog="\b\nExamples:\n  fewstep run sample.py\n  fewstep run sample.py --its-own option",
)
def run(
    script: Annotated[
        Path, typer.Argument(metavar="SCRIPT", help="A Python script written for diffusers.")
    ],
    arguments: Annotated[
        list[str] | None, typer.Argument(metavar="ARGUMENTS", help="The script's own.")
    ] = None,
) -> int:
    """Run a script that was written for diffusers, unchanged, with fewstep in its place.

    What it imports from diffusers and its parts comes from fewstep, in this process alone; a name
    that fewstep lacks is an ImportError. The exit code is the script's.
    """
    from .run import run_script

    return run_script(script, arguments or ())


@app.command(
    epilog="\b\nExamples:\n"
    "  fewstep canny photo.jpg\n"
    "  fewstep canny photo.jpg --low 50 --high 120 --out edges.png",
)
def canny(
    picture: Annotated[str, typer.Argument(metavar="FILE|URL", help="The picture.")],
    low: Annotated[
        float, typer.Option(min=0, help="Weaker edges are kept where they lead to stronger ones.")
    ] = 100,
    high: Annotated[float, typer.Option(min=0, help="Stronger edges are kept.")] = 200,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            metavar="FILE.png|FOLDER",
            help="Where to write. Default: NAME-edges.png in this folder.",
        ),
    ] = None,
    force: ForceOption = False,
) -> None:
    """Draw the edges of a picture, white on black, for --control-image."""
    from .canny import canny as run

    run(picture, low=low, high=high, out=out, force=force)


@app.command(epilog="\b\nExamples:\n  fewstep models\n  fewstep models --json")
def models(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """List the models and what goes beside them in the hub's cache, and the embedded model.

    Nothing is fetched. HF_HOME and HF_HUB_CACHE say where the cache is.
    """
    from .models import models as run

    run(as_json)


@app.command(epilog="\b\nExamples:\n  fewstep info\n  fewstep info --json")
def info(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Tell versions, devices and the embedded model's figures."""
    from .info import info as run

    run(as_json)


app.add_typer(making)
app.add_typer(evaluating)
app.add_typer(benching)
app.add_typer(serving)
