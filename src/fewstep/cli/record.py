"""What a picture was drawn from: frozen dataclasses, and their text in a PNG file.

A PNG holds the record as JSON under `fewstep`, which is all that is needed to draw the picture
again, and the same in the words of AUTOMATIC1111's web UI under `parameters`, which many programs
show. Imports neither torch nor the networks, so records are read in milliseconds.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import PIL.Image
from PIL.PngImagePlugin import PngInfo

from ..errors import RequestError

FORMAT = 1  # of the JSON; a newer one is refused
KEY = "fewstep"


@dataclass(frozen=True)
class Source:
    """The picture that an image-to-image drawing starts from."""

    path: str  # as it was given
    sha256: str  # of its size and its RGB pixels, upright


@dataclass(frozen=True)
class Picture:
    """What one picture is drawn from, given a model."""

    prompt: str
    seed: int
    steps: int
    guidance_scale: float
    width: int  # pixels
    height: int
    negative_prompt: str | None = None
    strength: float | None = None  # None: drawn from noise alone
    image: Source | None = None

    def __post_init__(self) -> None:
        numbers = (self.seed, self.steps, self.width, self.height)  # a file may hold anything
        if not isinstance(self.prompt, str) or not all(isinstance(n, int) for n in numbers):
            raise ValueError("a prompt, or a number, is of another type")


@dataclass(frozen=True)
class Model:
    """Which networks drew."""

    id: str  # as it was given: a hub repository, a folder or the embedded model's name
    pipeline: str  # class name
    weights: str  # sha256 of the UNet's files
    scheduler: Mapping[str, Any]  # its config, with _class_name
    revision: str | None = None
    variant: str | None = None


@dataclass(frozen=True)
class Record:
    """All that a PNG file tells about itself. Several pictures lie on one sheet, row by row."""

    model: Model
    pictures: tuple[Picture, ...]
    device: str
    dtype: str
    threads: int
    versions: Mapping[str, str]
    columns: int = 1
    format: int = field(default=FORMAT)

    def to_dict(self) -> dict[str, Any]:
        """The record as plain values, without what is None."""
        plain = asdict(self)
        plain["pictures"] = [
            {key: value for key, value in picture.items() if value is not None}
            for picture in plain["pictures"]
        ]
        return plain

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> Record:
        """The record of `to_dict`. Raises KeyError, TypeError or ValueError if it is not one."""
        pictures = tuple(
            Picture(
                **{**picture, "image": Source(**image) if (image := picture.get("image")) else None}
            )
            for picture in stored["pictures"]
        )
        if not pictures:
            raise ValueError("no pictures")
        return cls(**{**stored, "model": Model(**stored["model"]), "pictures": pictures})


def png_text(record: Record) -> PngInfo:
    """The text chunks that a PNG file of `record` carries."""
    text = PngInfo()
    text.add_itxt(KEY, json.dumps(record.to_dict(), ensure_ascii=False))
    text.add_itxt("parameters", parameters(record))
    return text


def read_record(file: Path) -> Record:
    """The record in a PNG file. Raises RequestError, naming the file, if there is none."""
    try:
        with PIL.Image.open(file) as picture:
            picture.load()  # text chunks may come after the pixels
            text = getattr(picture, "text", {}).get(KEY)
    except FileNotFoundError:
        raise RequestError(
            f"PICTURE {file}: no such file; give a PNG file that fewstep drew"
        ) from None
    except (OSError, ValueError, SyntaxError, PIL.Image.DecompressionBombError) as error:
        raise RequestError(f"PICTURE {file}: cannot be read as a picture ({error})") from error
    if text is None:
        raise RequestError(
            f"PICTURE {file}: does not say what it was drawn from; "
            "give a PNG file that fewstep drew, unchanged by other programs"
        )
    try:
        stored = json.loads(text)
        if stored["format"] > FORMAT:
            raise RequestError(f"PICTURE {file}: was drawn by a newer fewstep; update fewstep")
        return Record.from_dict(stored)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, RequestError):
            raise
        raise RequestError(
            f"PICTURE {file}: its settings are damaged ({error!r}); use an unchanged copy"
        ) from error


def parameters(record: Record) -> str:
    """The settings as AUTOMATIC1111's web UI writes them; of a sheet, the first picture's."""
    first, model = record.pictures[0], record.model
    settings = {
        "Steps": first.steps,
        "Sampler": str(model.scheduler.get("_class_name", "")).removesuffix("Scheduler"),
        "CFG scale": f"{first.guidance_scale:g}",
        "Seed": first.seed,
        "Size": f"{first.width}x{first.height}",
        "Model hash": model.weights[:10],
        "Model": Path(model.id).name,
        "Denoising strength": first.strength,
        "Version": f"fewstep {record.versions['fewstep']}",
    }
    line = ", ".join(f"{key}: {value}" for key, value in settings.items() if value is not None)
    negative = (
        [] if first.negative_prompt is None else [f"Negative prompt: {first.negative_prompt}"]
    )
    return "\n".join([first.prompt, *negative, line])
