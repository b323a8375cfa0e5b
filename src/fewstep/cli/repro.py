"""`fewstep repro`: draw a picture again from what its file says, and compare the pixels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import PIL.Image
import torch

from ..errors import RequestError
from ..schedulers import scheduler_from_config
from . import drawing
from .drawing import Loaded
from .files import plan_files, write_png
from .record import Record, png_text, read_record
from .terminal import Progress


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
    targets = [] if out is None else plan_files(out, [f"{file.stem}-repro"], force=force)
    source = source_of(record, file, image)
    loaded = drawing.load(
        model or record.model.id,
        image=source is not None,
        device=device or available(record.device),
        dtype=record.dtype,
        revision=record.model.revision if model is None else None,
        variant=record.model.variant if model is None else None,
    )
    if loaded.model.weights != record.model.weights:
        raise RequestError(
            f"--model {loaded.model.id}: holds other weights than those that drew {file} with "
            f"fewstep {record.versions.get('fewstep')} (sha256 {record.model.weights[:10]}..., "
            f"not {loaded.model.weights[:10]}...); give the folder of the original with --model"
        )
    loaded.pipe.scheduler = scheduler_from_config(record.model.scheduler)
    with (
        threads(record.threads),
        Progress(sum(picture.steps for picture in record.pictures)) as progress,
    ):
        drawn = loaded.draw(record, source, progress.advance)
    for target in targets:
        write_png(drawn, target, png_text(record))
    with PIL.Image.open(file) as original:
        verdict, code = compare(original.convert("RGB"), drawn)
    print(f"{verdict}: {file}" + (f"; drawn again as {targets[0]}" if targets else ""))
    if code and (changes := differences(record, loaded)):
        print(f"drawn with {changes}")
    return code


def source_of(record: Record, file: Path, given: str | None) -> PIL.Image.Image | None:
    """The source picture of a record: the one given, or the recorded path, also beside `file`."""
    wanted = record.pictures[0].image
    if wanted is None:
        if given is not None:
            raise RequestError(
                f"--image {given}: {file} was not drawn from a picture; leave it out"
            )
        return None
    path = given or wanted.path
    beside = file.parent / Path(wanted.path).name
    if given is None and drawing.missing(path) and beside.is_file():
        path = str(beside)
    picture, found = drawing.read_source(path)
    if found.sha256 != wanted.sha256:
        raise RequestError(
            f"--image {path}: is not the picture that {file} was drawn from (its pixels differ); "
            "give that one"
        )
    return picture


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


def compare(original: PIL.Image.Image, drawn: PIL.Image.Image) -> tuple[str, int]:
    """What to say of two RGB pictures, and the exit code."""
    if original.size != drawn.size:
        return f"differs in size ({original.size} and {drawn.size})", 1
    a, b = (np.asarray(picture, dtype=np.int16) for picture in (original, drawn))
    off = np.abs(a - b)
    if not off.any():
        return "identical", 0
    pixels = off.any(axis=2).mean()
    return f"differs by at most {off.max()} of 255, in {pixels:.2%} of the pixels", 1


def differences(record: Record, loaded: Loaded) -> str:
    """What has changed since the picture was drawn, that may change pixels."""
    now = {**drawing.versions(), "device": loaded.device}
    then = {**record.versions, "device": record.device}
    return ", ".join(
        f"{name} {then.get(name)} (here {now[name]})" for name in now if then.get(name) != now[name]
    )
