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
from typing import Any

import PIL.Image
import torch

from ..errors import RequestError
from ..pipelines.approximations import approximations_of
from . import drawing
from .additions import named
from .drawing import Given, Loaded
from .files import MOVING, STILL, plan_files, write_pictures
from .previews import check_folder, previews_of
from .record import Addition, Picture, Record, told
from .terminal import Progress, show

LAST_SEED = 2**63 - 1
STRENGTH = 0.8  # of image to image, as in the pipelines
FRAMES = 16


@dataclass(frozen=True)
class Request:
    """What was asked for; None is the model's own choice."""

    prompts: Sequence[str]
    model: str | None = None
    revision: str | None = None
    variant: str | None = None
    image: str | None = None
    mask: str | None = None
    strength: float | None = None
    negative: str | None = None
    steps: int | None = None
    guidance: float | None = None
    scheduler: str | None = None
    vae: str | None = None
    lora: Sequence[str] = ()  # NAME or NAME:WEIGHT, as all that follow
    controlnet: Sequence[str] = ()
    adapter: Sequence[str] = ()
    control_image: Sequence[str] = ()
    ip_adapter: Sequence[str] = ()
    ip_image: Sequence[str] = ()
    motion_adapter: str | None = None
    frames: int | None = None
    seed: int | None = None
    size: tuple[int, int] | None = None  # width, height
    count: int = 1  # pictures of each prompt
    grid: bool = False
    out: Path | None = None
    force: bool = False
    previews: Path | None = None  # a folder
    preview_vae: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    quantize: str | None = None
    fast: bool = False
    compile: bool = False
    as_json: bool = False
    show: bool | None = None

    @property
    def is_video(self) -> bool:
        """Whether frames are asked for."""
        return self.frames is not None or self.motion_adapter is not None

    @property
    def additions(self) -> list[Addition]:
        """What is to stand beside the model."""
        return [
            named(kind, name)
            for kind, names in (
                ("vae", [self.vae]),
                ("lora", self.lora),
                ("controlnet", self.controlnet),
                ("adapter", self.adapter),
                ("ip-adapter", self.ip_adapter),
                ("motion-adapter", [self.motion_adapter]),
            )
            for name in names
            if name is not None
        ]


def generate(request: Request) -> None:
    """Draws what `request` asks for and prints where it went.

    What can be checked without the model is checked before it is loaded, the rest before the first
    step.
    """
    check(request)
    seeds = seeds_of(request)
    files = plan_files(
        request.out,
        file_names(seeds, request.grid),
        force=request.force,
        suffixes=MOVING if request.is_video else STILL,
    )
    if request.previews is not None:
        check_folder(request.previews)
    given, first = read_pictures(request)

    started = time.perf_counter()
    loaded = drawing.load(
        request.model,
        task=first.task,
        device=request.device,
        dtype=request.dtype,
        revision=request.revision,
        variant=request.variant,
        quantize=request.quantize,
        fast=request.fast,
        scheduler=request.scheduler,
        additions=request.additions,
    )
    if request.compile:
        with drawing.option_names({"compile": "--compile"}):
            loaded.pipe.compile()
    pictures = complete(request, seeds, loaded, given, first)
    records = records_of(loaded, pictures, request.grid)
    previews = None
    if request.previews is not None:
        previews = previews_of(request.previews, request.preview_vae, loaded)
    ready = time.perf_counter()
    steps = pictures[0].steps
    done = 0
    with Progress(len(pictures) * steps) as progress:
        for file, record in zip(files, records, strict=True):
            watcher = None if previews is None else previews.watcher
            frames = loaded.draw(record, given, progress.advance, watcher)
            write_pictures(frames, file, told(record, file.suffix))
            progress.reach((done := done + len(record.pictures)) * steps)
            progress.make_way()
            if not request.as_json:
                print(file, flush=True)
                if file.suffix == ".png":
                    show(file, request.show, sys.stdout)
    if request.as_json:
        finished = time.perf_counter()
        seconds = {"load": round(ready - started, 3), "draw": round(finished - ready, 3)}
        results = [{"path": str(f), **r.to_dict()} for f, r in zip(files, records, strict=True)]
        seen = {} if previews is None else {"previews": [str(file) for file in previews.written]}
        print(json.dumps({"files": results, **seen, "seconds": seconds}, ensure_ascii=False))


def check(request: Request) -> None:
    """Refuses options that have no meaning together, before anything is read."""
    r = request
    steering = "--controlnet" if r.controlnet else "--adapter"
    networks = len(r.controlnet) or len(r.adapter)
    refusals = [
        (r.strength is not None and r.image is None, f"--strength {r.strength}", "--image"),
        (r.mask is not None and r.image is None, f"--mask {r.mask}", "--image"),
        (r.control_image and not networks, "--control-image", "--controlnet or --adapter"),
        (networks and not r.control_image, steering, "--control-image FILE"),
        (r.ip_image and not r.ip_adapter, "--ip-image", "--ip-adapter"),
        (r.ip_adapter and not r.ip_image, "--ip-adapter", "--ip-image FILE"),
        (r.preview_vae and r.previews is None, f"--preview-vae {r.preview_vae}", "--previews"),
    ]
    for refused, option, other in refusals:
        if refused:
            raise RequestError(f"{option}: has a meaning only with {other}")
    exclusive = [
        ("--controlnet", r.controlnet, "--adapter", r.adapter),
        ("--adapter", r.adapter, "--image", r.image),
        ("--frames", r.is_video, "--image", r.image),
        ("--frames", r.is_video, "--controlnet", r.controlnet),
        ("--frames", r.is_video, "--adapter", r.adapter),
        ("--frames", r.is_video, "--grid", r.grid),
    ]
    for option, has, other, has_other in exclusive:
        if has and has_other:
            raise RequestError(f"{option}: cannot be used with {other}; leave one of them out")
    for option, pictures, count in (
        ("--control-image", r.control_image, networks),
        ("--ip-image", r.ip_image, len(r.ip_adapter)),
    ):
        if len(pictures) not in (0, 1, count):
            raise RequestError(
                f"{option}: was given {len(pictures)} times for {count} networks; give one picture "
                "for all, or one for each in their order"
            )


def read_pictures(request: Request) -> tuple[Given, Picture]:
    """The pictures that a request names, and a picture's record with nothing else in it."""

    def read(option: str, paths: Sequence[str | None]) -> Any:
        found = [drawing.read_source(path, option) for path in paths if path is not None]
        return [p for p, _ in found], tuple(source for _, source in found)

    image, image_source = read("--image", [request.image])
    mask, mask_source = read("--mask", [request.mask])
    controls, control_sources = read("--control-image", request.control_image)
    prompts, prompt_sources = read("--ip-image", request.ip_image)
    if mask and mask[0].size != image[0].size:
        sizes = [f"{picture.width}x{picture.height}" for picture in (mask[0], image[0])]
        raise RequestError(
            f"--mask {request.mask}: is {sizes[0]}, and --image {sizes[1]}; give one of that size"
        )
    given = Given(next(iter(image), None), next(iter(mask), None), controls, prompts)
    return given, Picture(
        prompt="",
        seed=0,
        steps=0,
        guidance_scale=0.0,
        width=0,
        height=0,
        image=next(iter(image_source), None),
        mask=next(iter(mask_source), None),
        controls=control_sources,
        prompts=prompt_sources,
        frames=(request.frames or FRAMES) if request.is_video else None,
    )


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
    request: Request, seeds: Sequence[int], loaded: Loaded, given: Given, first: Picture
) -> list[Picture]:
    """The pictures to draw, with the model's own choices where nothing was asked for."""
    width, height = size_of(request.size, loaded, shape_of(given))
    steps, guidance = loaded.defaults
    first = replace(
        first,
        steps=steps if request.steps is None else request.steps,
        guidance_scale=guidance if request.guidance is None else request.guidance,
        width=width,
        height=height,
        negative_prompt=request.negative,
        strength=strength_of(request, loaded, first.task),
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


def strength_of(request: Request, loaded: Loaded, task: str) -> float | None:
    """How far to leave the picture behind: of a mask's white part nothing is kept by default."""
    if request.image is None or request.strength is not None:
        return request.strength
    return loaded.default("strength") if task == "inpainting" else STRENGTH


def shape_of(given: Given) -> PIL.Image.Image | None:
    """The picture whose shape the drawing takes."""
    return given.image or next(iter(given.controls), None)


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
            approximations=tuple(approximations_of(loaded.pipe)),
            columns=math.ceil(math.sqrt(len(group))),
        )
        for group in groups
    ]
