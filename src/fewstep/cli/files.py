"""Where pictures go: free names, checks before drawing, and writes that are whole or not at all."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path

import PIL.Image
from PIL.PngImagePlugin import PngInfo

from ..checkpoints.config import replacing
from ..errors import RequestError


def plan_files(
    out: Path | None, names: Sequence[str], *, force: bool = False, folder: Path = Path()
) -> list[Path]:
    """The files that pictures called `names` (without .png) go to.

    `out` is a .png file, for one picture only, or a folder, which need not exist; None means
    `folder`. A picture in a folder takes a free name; a file that exists is kept unless `force`.
    Raises RequestError if nothing can be written there.
    """
    if out is not None and out.suffix and not out.is_dir():
        check_file(out, len(names), force)
        return [out]
    if force:
        raise RequestError("--force: has a meaning only with --out FILE.png; leave it out")
    folder = folder if out is None else out
    if folder.exists() and not folder.is_dir():
        raise RequestError(f"--out {out}: exists and is no folder; give a .png file or a folder")
    check_writable(folder)
    return list(free_names(folder, names))


def check_file(file: Path, pictures: int, force: bool) -> None:
    """Raises RequestError unless `file` can take the one picture."""
    if file.suffix.lower() != ".png":
        raise RequestError(
            f"--out {file}: only PNG files keep the settings; give a name in .png, or a folder"
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


def check_writable(folder: Path) -> None:
    """Raises RequestError unless files can be made in `folder`, or in what it will be made in."""
    existing = next(path for path in [folder, *folder.absolute().parents] if path.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise unwritable(folder, error) from error


def write_png(picture: PIL.Image.Image, file: Path, text: PngInfo) -> None:
    """Writes `picture` with its text: the whole file, or on failure nothing."""
    try:
        with replacing(file) as beside, beside.open("wb") as stream:
            picture.save(stream, format="PNG", pnginfo=text)
            stream.flush()
            os.fsync(stream.fileno())  # a full disk may show only now
    except OSError as error:
        raise unwritable(file, error) from error


def unwritable(place: Path, error: OSError) -> RequestError:
    """What to say when `place` cannot be written."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    remedy = "free some space, or give another folder" if full else "give another folder"
    return RequestError(f"--out {place}: cannot be written ({error.strerror or error}); {remedy}")
