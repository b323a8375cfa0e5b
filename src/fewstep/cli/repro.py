"""`fewstep repro`: draw a picture again from what its file says, and compare the pixels."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageSequence
import torch

from ..errors import RequestError
from ..pipelines.approximations import quantization_in
from ..pipelines.embedded import TEACHER
from ..schedulers import scheduler_from_config
from . import drawing
from .additions import shipped
from .drawing import Given, Loaded
from .files import MOVING, STILL, plan_files, save, write_pictures
from .record import Addition, Model, Picture, Record, Source, read_record, told
from .terminal import Progress

# Why a server's picture may differ.
SERVED = "fewstep serve rounds otherwise while it draws others beside, unless --deterministic is on"
LOSSY = "fewstep serve loses some of a picture in this format; only its PNG files can be compared"


def repro(
    file: Path,
    *,
    out: Path | None = None,
    force: bool = False,
    model: str | None = None,
    image: str | None = None,
    device: str | None = None,
) -> int:
    """Draws `file` again and prints whether the pixels are the same; 0 if they are, else 1.

    `model`, `image` and `device` stand in for the recorded ones: a place that has moved, another
    machine. `out` is where the new picture goes.
    """
    record = read_record(file)
    if record.is_served:
        record = with_places(record, file, model, image)
    targets = (
        []
        if out is None
        else plan_files(out, [f"{file.stem}-repro"], force=force, suffixes=suffixes_of(record))
    )
    given = pictures_of(record.pictures[0], file, image)
    loaded = drawing.load(
        model or record.model.id,
        task=record.pictures[0].task,
        device=device or available(record.device),
        dtype=record.dtype,
        revision=record.model.revision if model is None else None,
        variant=record.model.variant if model is None else None,
        additions=record.model.additions,
        quantize=quantization_in(record.approximations),
    )
    check_weights(record, loaded, file)
    loaded.pipe.scheduler = scheduler_from_config(record.model.scheduler)
    with (
        threads(record.threads),
        Progress(sum(picture.steps for picture in record.pictures)) as progress,
    ):
        drawn = loaded.draw(record, given, progress.advance)
    if record.is_served:
        record = replace(record, model=replace(loaded.model, scheduler=record.model.scheduler))
    for target in targets:
        write_pictures(drawn, target, told(record, target.suffix))
    again = BytesIO()
    save(drawn, again, file.suffix.lower())
    verdict, code = compare(frames_of(file), frames_of(again))
    print(f"{verdict}: {file}" + (f"; drawn again as {targets[0]}" if targets else ""))
    if code and (changes := differences(record, loaded)):
        print(f"drawn with {changes}")
    if code and record.is_served:
        print(SERVED if file.suffix.lower() == ".png" else LOSSY)
    return code


def with_places(record: Record, file: Path, model: str | None, image: str | None) -> Record:
    """A server's record, which tells no places, with those where things are here.

    Folders and files are looked for in this folder and beside `file`. Raises RequestError for
    what is not there.
    """
    picture = record.pictures[0]
    if picture.image is not None:
        if image is None:
            raise RequestError(
                f"PICTURE {file}: was drawn from a picture that was sent to fewstep serve; "
                "give it with --image"
            )
        picture = replace(picture, image=replace(picture.image, path=image))
    additions = [
        replace(each, id=place_of(each.id, "LoRA", file, "put it beside the picture"))
        for each in record.model.additions
    ]
    id = model or place_of(record.model.id, "model", file, "give its folder with --model")
    found = replace(record.model, id=id, additions=tuple(additions))
    return replace(record, model=found, pictures=(picture,))


def place_of(name: str, kind: str, file: Path, remedy: str) -> str:
    """Where a name of a server's record leads: what is shipped, a repository, or what is here."""
    is_here = os.path.exists(name) or shipped(name) != name
    if is_here or "/" in name or name == TEACHER.name:
        return name
    if os.path.exists(beside := file.parent / name):
        return str(beside)
    raise RequestError(
        f"PICTURE {file}: was drawn with the {kind} {name!r}, of which the server's record tells "
        f"only the name; {remedy}"
    )


def suffixes_of(record: Record) -> Sequence[str]:
    """The kinds of files that the picture or the video of a record can go to."""
    return STILL if record.pictures[0].frames is None else MOVING


def check_weights(record: Record, loaded: Loaded, file: Path) -> None:
    """Refuses networks that hold other weights than those that drew `file`."""
    options = ["--model", *(f"--{addition.kind}" for addition in record.model.additions)]
    wanted: list[Model | Addition] = [record.model, *record.model.additions]
    found: list[Model | Addition] = [loaded.model, *loaded.model.additions]
    for option, then, now in zip(options, wanted, found, strict=True):
        if then.weights and now.weights != then.weights:  # a server does not tell them
            there = "give the original's folder with --model"
            remedy = there if now is loaded.model else "put the original there"
            raise RequestError(
                f"{option} {now.id}: holds other weights than those that drew {file} with "
                f"fewstep {record.versions.get('fewstep')} (sha256 {then.weights[:10]}..., "
                f"not {now.weights[:10]}...); {remedy}"
            )


def pictures_of(picture: Picture, file: Path, image: str | None) -> Given:
    """The pictures that a picture was drawn from; `image` stands in for the one it started from."""
    if image is not None and picture.image is None:
        raise RequestError(f"--image {image}: {file} was not drawn from a picture; leave it out")

    def found(option: str, source: Source | None, given: str | None = None) -> Any:
        return None if source is None else read_again(option, source, file, given)

    return Given(
        image=found("--image", picture.image, image),
        mask=found("--mask", picture.mask),
        controls=[found("--control-image", source) for source in picture.controls],
        prompts=[found("--ip-image", source) for source in picture.prompts],
    )


def read_again(option: str, wanted: Source, file: Path, given: str | None) -> PIL.Image.Image:
    """A source picture: the one given, or that at the recorded path, or the one beside `file`."""
    path = given or wanted.path
    beside = file.parent / Path(wanted.path).name
    if given is None and drawing.missing(path) and beside.is_file():
        path = str(beside)
    picture, found = drawing.read_source(path, option)
    if found.sha256 != wanted.sha256:
        raise RequestError(
            f"{option} {path}: is not the picture that {file} was drawn from (its pixels differ); "
            "give that one"
        )
    return picture


def frames_of(file: Path | BytesIO) -> list[PIL.Image.Image]:
    """The picture of a file, or the frames of its video, in RGB."""
    with PIL.Image.open(file) as picture:
        return [frame.convert("RGB") for frame in PIL.ImageSequence.Iterator(picture)]


def available(device: str) -> str:
    """The recorded device if this machine has it, else the best one."""
    try:
        return str(drawing.resolve_device(device))
    except RequestError:
        return "auto"


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Torch with `count` threads: another number may round sums in another order."""
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, min(count, 256)))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def compare(
    original: Sequence[PIL.Image.Image], drawn: Sequence[PIL.Image.Image]
) -> tuple[str, int]:
    """What to say of two lists of RGB pictures, and the exit code."""
    if original[0].size != drawn[0].size:
        return f"differs in size ({original[0].size} and {drawn[0].size})", 1
    if len(original) != len(drawn):
        return f"differs in the number of frames ({len(original)} and {len(drawn)})", 1
    a, b = (np.stack([np.asarray(p, dtype=np.int16) for p in each]) for each in (original, drawn))
    off = np.abs(a - b)
    if not off.any():
        return "identical", 0
    pixels = off.any(axis=-1).mean()
    return f"differs by at most {off.max()} of 255, in {pixels:.2%} of the pixels", 1


def differences(record: Record, loaded: Loaded) -> str:
    """What has changed since the picture was drawn, that may change pixels."""
    now = {**drawing.versions(), "device": loaded.device}
    then = {**record.versions, "device": record.device}
    return ", ".join(
        f"{name} {then[name]} (here {now[name]})"
        for name in now
        if then.get(name, now[name]) != now[name]
    )
