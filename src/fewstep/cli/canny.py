"""`fewstep canny`: a picture's edges, to steer by."""

from __future__ import annotations

from pathlib import Path

from ..annotate import canny as edges_of
from .drawing import read_source
from .files import plan_files, write_pictures


def canny(path: str, *, low: float, high: float, out: Path | None, force: bool) -> None:
    """Writes the edges and prints where they went."""
    picture, _ = read_source(path, "FILE")
    stem = Path(path).stem or "picture"
    (file,) = plan_files(out, [f"{stem}-edges"], force=force)
    write_pictures([edges_of(picture, low, high)], file, {})
    print(file)
