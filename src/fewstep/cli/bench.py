"""`fewstep bench`: its options; what is measured, and how, is in the package `bench`."""

from __future__ import annotations

import os
import shlex
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Any

import typer

from ..bench.work import EMBEDDED, RANDOM, SUBJECT, TASKS, Work
from ..errors import RequestError
from .evaluate import names
from .options import Grouped, dtype, size, step_numbers

WORK, HOW, RESULTS = "The work", "How it is measured", "Output"
DEFAULT_PEERS = "diffusers"
EPILOG = (
    "\b\nExamples:\n"
    "  fewstep bench\n"
    "  fewstep bench --steps 1,2,4,8 --json bench.json --plot bench.png\n"
    "  fewstep bench --model sd15 --part unet --size 512 --dtype bfloat16 --error \\\n"
    "      --peer diffusers,diffusers@float32,openvino --runs 5\n"
    "  fewstep bench --cold --runs 5"
)
benching = typer.Typer(rich_markup_mode=None)


@benching.command(cls=Grouped, epilog=EPILOG)
def bench(
    model: Annotated[
        str,
        typer.Option(
            "--model",
            "-m",
            metavar="NAME|FOLDER",
            help=f"{EMBEDDED}; {', '.join(RANDOM)}: random weights of full size; or a folder.",
            rich_help_panel=WORK,
        ),
    ] = EMBEDDED,
    task: Annotated[
        str,
        typer.Option(metavar="NAME", help=f"{', '.join(TASKS)} (merged).", rich_help_panel=WORK),
    ] = TASKS[0],
    part: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="picture: the whole call; unet: one network call; vae: one decoding.",
            rich_help_panel=WORK,
        ),
    ] = "picture",
    pixels: Annotated[
        Any,
        typer.Option(
            "--size",
            parser=size,
            metavar="N|WxH",
            help="Pixels. Default: the model's own.",
            rich_help_panel=WORK,
        ),
    ] = None,
    steps: Annotated[
        str,
        typer.Option(metavar="A,B", help="Numbers of steps, each measured.", rich_help_panel=WORK),
    ] = "4",
    batch: Annotated[int, typer.Option(help="Pictures a run.", rich_help_panel=WORK)] = 1,
    precision: Annotated[
        str,
        typer.Option(
            "--dtype",
            parser=dtype,
            metavar="NAME",
            help="float32, bfloat16, float16.",
            rich_help_panel=WORK,
        ),
    ] = "float32",
    device: Annotated[
        str, typer.Option(metavar="NAME", help="cpu, cuda, cuda:1, mps.", rich_help_panel=WORK)
    ] = "cpu",
    prompt: Annotated[str, typer.Option(help="What is drawn.", rich_help_panel=WORK)] = SUBJECT,
    peer: Annotated[
        str,
        typer.Option(
            metavar="A,B",
            help="diffusers, diffusers-compiled, openvino, onnxruntime; fewstep+int8, "
            "fewstep+int8-weights, fewstep+fp8, fewstep+tiny-vae: approximations; NAME@DTYPE "
            'computes in another dtype; "" is none.',
            rich_help_panel=HOW,
        ),
    ] = DEFAULT_PEERS,
    runs: Annotated[int, typer.Option(help="Counted runs of each side.", rich_help_panel=HOW)] = 10,
    warmup: Annotated[int, typer.Option(help="Runs before them.", rich_help_panel=HOW)] = 2,
    threads: Annotated[
        int, typer.Option(help="Of each side. Default: its own choice.", rich_help_panel=HOW)
    ] = 0,
    cold: Annotated[
        bool,
        typer.Option(
            "--cold",
            help="Measure new processes, from their start to the first picture.",
            rich_help_panel=HOW,
        ),
    ] = False,
    error: Annotated[
        bool,
        typer.Option(
            "--error",
            help="Compare unet or vae in 16 bits with float32 as well.",
            rich_help_panel=HOW,
        ),
    ] = False,
    cache: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Where models of full size are kept. Default: ~/.cache/fewstep/bench.",
            rich_help_panel=HOW,
        ),
    ] = None,
    json_file: Annotated[
        Path | None,
        typer.Option(
            "--json",
            metavar="FILE",
            help="Write all that was measured, and the machine.",
            rich_help_panel=RESULTS,
        ),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE.png", help="Write bars.", rich_help_panel=RESULTS),
    ] = None,
) -> int:
    """Measure fewstep beside its peers and beside what this machine can do.

    The same work, in turns, each side in a process of its own: seconds, ratios, memory, how far the
    pictures differ, and the fraction of the machine's limit. A peer that is not installed or fails
    is listed with the reason. Nothing else should run meanwhile. The exit code is 1 if fewstep
    failed.
    """
    from ..bench.sides import FEWSTEP, side_of
    from ..bench.turns import How

    works = [
        Work(model, task, part, pixels, count, batch, precision, device, prompt)
        for count in step_numbers(steps)
    ]
    if part != "picture" and len(works) > 1:
        raise RequestError(f"--steps {steps}: mean nothing to --part {part}; leave them out")
    check_files(json_file, plot)
    peers = [side_of(name) for name in (names(peer) or ()) if name]
    how = How(runs, warmup, threads, cold, error, home(cache), told)
    return run(works, [FEWSTEP, *peers], how, json_file, plot)


def run(works: list[Work], sides: list[Any], how: Any, file: Path | None, plot: Path | None) -> int:
    """Measures, prints and writes; the files are written again after each work."""
    from ..bench.machine import machine
    from ..bench.plot import bars
    from ..bench.report import report, text, write_report
    from ..bench.turns import measure
    from .files import write_pictures

    began = datetime.now(timezone.utc).isoformat(timespec="seconds")
    command, results = shlex.join(["fewstep", *sys.argv[1:]]), []
    for work in works:
        results.append(measure(work, sides, how))
        print(text(results[-1]), flush=True)
        if file is not None:
            write_report(report(results, machine(), command, began), file)
        if plot is not None and any(result.able for result in results):
            write_pictures([bars(results)], plot, {}, "--plot")
    return int(any(sides[0].name not in result.able for result in results))


def check_files(json_file: Path | None, plot: Path | None) -> None:
    """Raises RequestError unless both files can be written, before anything is measured."""
    from .files import check_writable

    if plot is not None and plot.suffix.lower() != ".png":
        raise RequestError(f"--plot {plot}: the plot is a PNG file; give a name in .png")
    for option, file in (("--json", json_file), ("--plot", plot)):
        if file is not None:
            if file.is_dir():
                raise RequestError(f"{option} {file}: is a folder; give a file")
            check_writable(file.parent, option)


def home(cache: Path | None) -> Path:
    """Where models are kept."""
    folder = Path(os.environ.get("FEWSTEP_CACHE") or "~/.cache/fewstep").expanduser() / "bench"
    return (folder if cache is None else cache).absolute()


def told(line: str) -> None:
    """Says on a terminal what is being done."""
    if sys.stderr.isatty():
        print(f"{line} ...", file=sys.stderr, flush=True)
