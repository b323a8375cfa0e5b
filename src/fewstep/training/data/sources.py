"""Where captioned pictures come from, behind one interface; one file each for the kinds."""

from __future__ import annotations

import difflib
import hashlib
import io
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from ...checkpoints.config import replacing
from ...errors import RequestError
from .pictures import upright, upright_size


@dataclass(frozen=True)
class Facts:
    """What the survey knows of a picture: the sha256 of its contents and its size, upright."""

    digest: str
    height: int
    width: int


class Source(ABC):
    """Captioned pictures by number; can be sent to other processes."""

    name: str  # the same for the same data, for files that remember it
    keys: Sequence[str]  # what messages call the pictures
    captions: Sequence[tuple[str, ...]]  # one is drawn at each use; empty: the picture has none
    absent: Sequence[str] = ()  # pictures that have a caption but no file

    def __len__(self) -> int:
        return len(self.keys)

    @abstractmethod
    def stamp(self, index: int) -> str:
        """What changes when the picture's contents do, without reading them; "" if unneeded."""

    @abstractmethod
    def look(self, index: int) -> Facts | None:
        """The facts of a picture; None if it cannot be read."""

    @abstractmethod
    def load(self, index: int) -> Image.Image:
        """The picture as RGB, upright."""


class Files(Source):
    """A source whose pictures are encoded files somewhere."""

    @abstractmethod
    def read(self, index: int) -> bytes:
        """The picture's file."""

    def look(self, index: int) -> Facts | None:
        # Decoders raise what they like at broken files: OSError, SyntaxError, struct.error, ...
        try:
            contents = self.read(index)
            with Image.open(io.BytesIO(contents)) as picture:
                width, height = upright_size(picture)
                picture.draft("RGB", (width // 8, height // 8))  # all of a JPEG, in less time
                upright(picture)
        except Exception:
            return None
        return Facts(hashlib.sha256(contents).hexdigest(), height, width)

    def load(self, index: int) -> Image.Image:
        with Image.open(io.BytesIO(self.read(index))) as picture:
            return upright(picture)


def captions_of(value: Any, where: str) -> tuple[str, ...]:
    """A caption, or a list of them, without the blank ones."""
    values = value if isinstance(value, (list, tuple)) else [value]
    for each in values:
        if each is not None and not isinstance(each, str):
            raise RequestError(
                f"{where}: a caption is a {type(each).__name__}, {each!r}; it must be a string or "
                "a list of strings; set data.caption_key to where the captions are"
            )
    return tuple(stripped for each in values if each and (stripped := each.strip()))


def check_column(key: str, names: Iterable[str], setting: str, where: str) -> None:
    """Raises RequestError, with the nearest name, unless `key` is one of `names`."""
    names = list(names)
    if key not in names:
        near = difflib.get_close_matches(key, names, 1, cutoff=0.3)
        remedy = f"did you mean {setting}={near[0]!r}?" if near else f"set {setting}"
        raise RequestError(f"{where} has no {key!r}, but {sorted(names)}; {remedy}")


def parse_json(text: str | bytes, where: str) -> dict[str, Any]:
    """A JSON object. Raises RequestError if it is none."""
    try:
        value = json.loads(text)
    except ValueError as error:
        raise RequestError(f"{where} is not valid JSON ({error}); correct it") from None
    if not isinstance(value, dict):
        raise RequestError(f"{where} holds a {type(value).__name__}, not an object; correct it")
    return value


def decoded(contents: bytes, where: str) -> str:
    """Text in UTF-8. Raises RequestError if it is in another encoding."""
    try:
        return contents.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RequestError(f"{where} is not UTF-8 ({error.reason}); convert it") from None


def remembered(folder: Path, kind: str, key: Sequence[Any]) -> Path:
    """The JSON file in `folder` that keeps what was found out about `key`."""
    return folder / f"{kind}-{digest_of(key)[:16]}.json"


def remember(path: Path, value: Any) -> None:
    """Write a JSON file; that the folder cannot be written costs only time later."""
    try:
        with replacing(path) as beside:
            beside.write_text(json.dumps(value), encoding="utf-8")
    except OSError:
        pass


def digest_of(value: Any) -> str:
    """sha256 of a value of plain types."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
