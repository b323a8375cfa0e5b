"""Where pictures go: free names, checks before drawing, and writes that are whole or not at all."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any, BinaryIO

import PIL.Image

from ..checkpoints.config import replacing
from ..errors import RequestError

OUT = "--out"
STILL = (".png",)
DURATION = 100  # milliseconds that a frame stands
MOVING = (".png", ".webp", ".gif")
NOTHING: Mapping[str, Any] = {}
# PNG's lowest level takes a quarter of the usual one's time, which is longer than a GPU draws.
ENCODING: Mapping[str, Mapping[str, Any]] = {
    ".webp": {"lossless": True},
    ".png": {"compress_level": 1},
}


def plan_files(
    out: Path | None,
    names: Sequence[str],
    *,
    force: bool = False,
    folder: Path = Path(),
    suffixes: Sequence[str] = STILL,
) -> list[Path]:
    """The files that pictures called `names` (without .png) go to.

    `out` is a file with one of `suffixes`, for one picture only, or a folder, which need not exist;
    None means `folder`. A picture in a folder takes a free name; a file that exists is kept unless
    `force`. Raises RequestError if nothing can be written there.
    """
    if out is not None and out.suffix and not out.is_dir():
        check_file(out, len(names), force, suffixes)
        return [out]
    if force:
        raise RequestError("--force: has a meaning only with --out FILE.png; leave it out")
    folder = folder if out is None else out
    if folder.exists() and not folder.is_dir():
        raise RequestError(f"--out {out}: exists and is no folder; give a .png file or a folder")
    check_writable(folder)
    return list(free_names(folder, names))


def check_file(file: Path, pictures: int, force: bool, suffixes: Sequence[str] = STILL) -> None:
    """Raises RequestError unless `file` can take the one picture."""
    if file.suffix.lower() not in suffixes:
        why = "a picture goes into a PNG file" if suffixes == STILL else "cannot hold a video"
        raise RequestError(
            f"--out {file}: {why}; give a name in {' or '.join(suffixes)}, or a folder"
        )
    if pictures > 1:
        raise RequestError(
            f"--out {file}: is one file for {pictures} pictures; give a folder, or add --grid"
        )
    if file.exists() and not force:
        raise RequestError(f"--out {file}: exists; give another name, or --force to replace it")
    check_writable(file.parent)


def free_names(folder: Path, names: Sequence[str]) -> Iterator[Path]:
    """For each name the first of `name.png`, `name-2.png`, ... that is free."""
    given: set[Path] = set()
    for name in names:
        tries = (folder / f"{name}{'' if i == 1 else f'-{i}'}.png" for i in count(1))
        file = next(file for file in tries if file not in given and not os.path.lexists(file))
        given.add(file)
        yield file


def check_writable(folder: Path, option: str = OUT) -> None:
    """Raises RequestError unless files can be made in `folder`, or in what it will be made in."""
    existing = next(path for path in [folder, *folder.absolute().parents] if path.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise unwritable(folder, error, option) from error


def write_pictures(
    frames: Sequence[PIL.Image.Image],
    file: Path,
    told: Mapping[str, Any],
    option: str = OUT,
) -> None:
    """Writes a picture, or the frames of a video: the whole file, or on failure nothing.

    Without loss, but for GIF's 256 colours. `told` is what the file says of itself, by
    `record.told`.
    """
    try:
        with replacing(file) as beside, beside.open("wb") as stream:
            save(frames, stream, file.suffix.lower(), told)
            stream.flush()
            os.fsync(stream.fileno())  # a full disk may show only now
    except OSError as error:
        raise unwritable(file, error, option) from error


def save(
    frames: Sequence[PIL.Image.Image],
    stream: BinaryIO,
    suffix: str,
    told: Mapping[str, Any] = NOTHING,
) -> None:
    """Writes frames to a stream in the format of a suffix; several play over and over."""
    first, *rest = frames
    how: dict[str, Any] = {**told, **ENCODING.get(suffix, {})}
    if rest:
        how |= {"save_all": True, "append_images": rest, "duration": DURATION, "loop": 0}
    first.save(stream, format=suffix.removeprefix(".").upper(), **how)


def unwritable(place: Path, error: OSError, option: str) -> RequestError:
    """What to say when `place` cannot be written."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    remedy = "free some space, or give another folder" if full else "give another folder"
    return RequestError(
        f"{option} {place}: cannot be written ({error.strerror or error}); {remedy}"
    )
