"""`fewstep generate`: prompts to picture files."""

from __future__ import annotations

import json
import math
import secrets
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import PIL.Image
import torch

from ..errors import RequestError
from . import drawing
from .drawing import Loaded
from .files import plan_files, write_png
from .record import Picture, Record, Source, png_text
from .terminal import Progress, show

LAST_SEED = 2**63 - 1
STRENGTH = 0.8  # as in the pipelines


@dataclass(frozen=True)
class Request:
    """What was asked for; None is the model's own choice."""

    prompts: Sequence[str]
    model: str | None = None
    revision: str | None = None
    variant: str | None = None
    image: str | None = None
    strength: float | None = None
    negative: str | None = None
    steps: int | None = None
    guidance: float | None = None
    seed: int | None = None
    size: tuple[int, int] | None = None  # width, height
    count: int = 1  # pictures of each prompt
    grid: bool = False
    out: Path | None = None
    force: bool = False
    device: str = "auto"
    dtype: str = "auto"
    as_json: bool = False
    show: bool | None = None


def generate(request: Request) -> None:
    """Draws what `request` asks for and prints where it went.

    What can be checked without the model is checked before it is loaded, the rest before the first
    step.
    """
    if request.strength is not None and request.image is None:
        raise RequestError(f"--strength {request.strength:g}: has a meaning only with --image")
    seeds = seeds_of(request)
    files = plan_files(request.out, file_names(seeds, request.grid), force=request.force)
    image, source = (None, None) if request.image is None else drawing.read_source(request.image)

    started = time.perf_counter()
    loaded = drawing.load(
        request.model,
        image=image is not None,
        device=request.device,
        dtype=request.dtype,
        revision=request.revision,
        variant=request.variant,
    )
    pictures = complete(request, seeds, loaded, image, source)
    records = records_of(loaded, pictures, request.grid)
    ready = time.perf_counter()
    steps = pictures[0].steps
    done = 0
    with Progress(len(pictures) * steps) as progress:
        for file, record in zip(files, records, strict=True):
            pixels = loaded.draw(record, image, progress.advance)
            write_png(pixels, file, png_text(record))
            progress.reach((done := done + len(record.pictures)) * steps)
            progress.make_way()
            if not request.as_json:
                print(file, flush=True)
                show(file, request.show, sys.stdout)
    if request.as_json:
        finished = time.perf_counter()
        seconds = {"load": round(ready - started, 3), "draw": round(finished - ready, 3)}
        results = [{"path": str(f), **r.to_dict()} for f, r in zip(files, records, strict=True)]
        print(json.dumps({"files": results, "seconds": seconds}, ensure_ascii=False))


def seeds_of(request: Request) -> list[int]:
    """A seed for each picture, one after another from --seed or from a random one."""
    count = len(request.prompts) * request.count
    first = secrets.randbelow(2**32) if request.seed is None else request.seed
    if first + count - 1 > LAST_SEED:
        raise RequestError(f"--seed {first}: is too large; give at most {LAST_SEED - count + 1}")
    return list(range(first, first + count))


def file_names(seeds: Sequence[int], grid: bool) -> list[str]:
    """The names of the files, without .png."""
    if grid:
        return [f"fewstep-{seeds[0]}-grid"]
    return [f"fewstep-{seed}" for seed in seeds]


def complete(
    request: Request,
    seeds: Sequence[int],
    loaded: Loaded,
    image: PIL.Image.Image | None,
    source: Source | None,
) -> list[Picture]:
    """The pictures to draw, with the model's own choices where nothing was asked for."""
    width, height = size_of(request.size, loaded, image)
    steps, guidance = loaded.defaults
    first = Picture(
        prompt="",
        seed=0,
        steps=steps if request.steps is None else request.steps,
        guidance_scale=guidance if request.guidance is None else request.guidance,
        width=width,
        height=height,
        negative_prompt=request.negative,
        strength=None if image is None else request.strength or STRENGTH,
        image=source,
    )
    if request.negative is not None:
        if loaded.pipe.is_embedded:
            raise RequestError(
                "--negative: has no effect on this model, whose guidance is an input of the "
                "network; leave it out"
            )
        if first.guidance_scale <= 1:
            raise RequestError(
                f"--negative: has no effect with --guidance {first.guidance_scale:g}; "
                "use more than 1"
            )
    prompts = [prompt for prompt in request.prompts for _ in range(request.count)]
    return [
        replace(first, prompt=prompt, seed=seed)
        for prompt, seed in zip(prompts, seeds, strict=True)
    ]


def size_of(
    size: tuple[int, int] | None, loaded: Loaded, image: PIL.Image.Image | None
) -> tuple[int, int]:
    """Width and height to draw at.

    Without `size` the model's own; with a source picture its shape, at about as many pixels as the
    model's own size has.
    """
    m = loaded.multiple
    if size is not None:
        if size[0] % m or size[1] % m:
            near = "x".join(str(max(m, round(side / m) * m)) for side in size)
            raise RequestError(
                f"--size {size[0]}x{size[1]}: this model needs multiples of {m}; take {near}"
            )
        return size
    width, height = loaded.native_size
    if image is None:
        return width, height
    scale = math.sqrt(width * height / (image.width * image.height))
    return max(m, round(image.width * scale / m) * m), max(m, round(image.height * scale / m) * m)


def records_of(loaded: Loaded, pictures: Sequence[Picture], grid: bool) -> list[Record]:
    """One record for each file: all pictures on one sheet, or each alone."""
    groups = [tuple(pictures)] if grid else [(picture,) for picture in pictures]
    return [
        Record(
            model=loaded.model,
            pictures=group,
            device=loaded.device,
            dtype=loaded.dtype,
            threads=torch.get_num_threads(),
            versions=drawing.versions(),
            columns=math.ceil(math.sqrt(len(group))),
        )
        for group in groups
    ]
