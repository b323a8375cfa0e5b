"""Reference pictures: a folder of pictures with a caption each, and one hash that names the set.

Captions stand in `metadata.jsonl` or `metadata.csv` (a line a picture: `file_name` and `text`, the
layout of the hub's image folders), or in `NAME.txt` beside `NAME.png`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from fewstep.errors import RequestError
from fewstep.evaluation.fingerprints import DIGITS
from fewstep.training.data.folder import METADATA, SUFFIXES, entries
from fewstep.training.data.pictures import upright
from fewstep.training.data.sources import decoded

CAPTION_COLUMNS = ("text", "caption", "prompt")
RESIZE = "PIL LANCZOS after a centre crop to the shape"


@dataclass(frozen=True)
class References:
    """Pictures below `folder` by name, in the order of their names, with a caption each."""

    folder: Path
    names: tuple[str, ...]
    captions: tuple[str, ...]

    @classmethod
    def read(cls, folder: str | Path) -> References:
        """The pictures that `folder` lists. RequestError for a missing picture or caption."""
        folder = Path(folder)
        if not folder.is_dir():
            raise RequestError(f"reference {folder}: is no folder; give one of captioned pictures")
        table = next((folder / name for name in METADATA if (folder / name).is_file()), None)
        try:
            found = _beside(folder) if table is None else _listed(folder, table)
        except RequestError as error:
            raise RequestError(f"reference {error}") from error
        if not found:
            raise RequestError(
                f"reference {folder}: holds no pictures ({', '.join(sorted(SUFFIXES))})"
            )
        names = tuple(sorted(found))
        return cls(folder, names, tuple(found[name] for name in names))

    def __len__(self) -> int:
        return len(self.names)

    @cached_property
    def hash(self) -> str:
        """12 digits of the sha256 of all names, captions and files.

        RequestError for a file that is no whole picture: each is read and decoded once.
        """
        digest = hashlib.sha256()
        for name, caption in zip(self.names, self.captions, strict=True):
            self._opened(name)
            content = hashlib.sha256((self.folder / name).read_bytes()).hexdigest()
            digest.update(json.dumps([name, caption, content]).encode())
        return digest.hexdigest()[:DIGITS]

    def pictures(self, rows: Sequence[int], size: tuple[int, int]) -> np.ndarray:
        """Pictures uint8 [n, H, W, 3] of `size` (width, height), made so as RESIZE says."""
        opened = (self._opened(self.names[row]) for row in rows)
        fitted = (ImageOps.fit(picture, size, Image.Resampling.LANCZOS) for picture in opened)
        return np.stack([np.asarray(picture) for picture in fitted])

    def _opened(self, name: str) -> Image.Image:
        """Upright, in RGB, on white where it is transparent."""
        try:
            with Image.open(self.folder / name) as picture:
                return upright(picture)
        except Exception as error:  # decoders raise what they like at broken files
            raise RequestError(
                f"reference {self.folder / name}: cannot be read as a picture ({error}); "
                "mend it, or remove it with its caption"
            ) from error


def _beside(folder: Path) -> dict[str, str]:
    """name -> caption of the pictures below `folder`, from the text files beside them."""
    found = {}
    for file in sorted(folder.rglob("*")):
        if file.suffix.lower() not in SUFFIXES:
            continue
        text = file.with_suffix(".txt")
        if not text.is_file():
            raise RequestError(
                f"{file}: has no caption; write {text.name} beside it, or metadata.jsonl "
                'with a line {"file_name": ..., "text": ...} for each picture'
            )
        caption = decoded(text.read_bytes(), str(text))
        found[file.relative_to(folder).as_posix()] = _caption(text, caption)
    return found


def _listed(folder: Path, table: Path) -> dict[str, str]:
    """name -> caption of the pictures that a table lists; pictures that it leaves out are not."""
    found = {}
    for where, entry in entries(table):
        name = entry.get("file_name")
        if not isinstance(name, str) or not (folder / name).is_file():
            raise RequestError(f"{where}: file_name {name!r} is no file in {folder}; correct it")
        caption = next((entry[key] for key in CAPTION_COLUMNS if entry.get(key)), None)
        found[name] = _caption(where, caption)
    return found


def _caption(where: object, text: object) -> str:
    if not isinstance(text, str) or not text.strip():
        raise RequestError(f"{where}: has no caption; give one ({', '.join(CAPTION_COLUMNS)})")
    return " ".join(text.split())
