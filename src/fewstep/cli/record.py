"""What a picture was drawn from: frozen dataclasses, and their text in a file.

The record is JSON, which is all that is needed to draw the picture again; `metadata.py` says where
in a file it is. Imports neither torch nor the networks, so records are read in milliseconds.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import PIL.Image

from .. import metadata
from ..errors import RequestError

# Of the JSON; a newer one is refused. 2 added what stands beside the first model, 3 approximations.
FORMAT = 3


@dataclass(frozen=True)
class Source:
    """A picture that a drawing was made from."""

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
    mask: Source | None = None
    controls: tuple[Source, ...] = ()  # one per ControlNet or T2I-Adapter, or one for all
    prompts: tuple[Source, ...] = ()  # one per IP-Adapter, or one for all
    frames: int | None = None  # None: a still picture

    @property
    def task(self) -> str:
        """What was done, by the pipelines' names."""
        if self.frames is not None:
            return "text-to-video"
        if self.mask is not None:
            return "inpainting"
        return "text-to-image" if self.image is None else "image-to-image"

    def __post_init__(self) -> None:
        numbers = (self.seed, self.steps, self.width, self.height)  # a file may hold anything
        if not isinstance(self.prompt, str) or not all(isinstance(n, int) for n in numbers):
            raise ValueError("a prompt, or a number, is of another type")


@dataclass(frozen=True)
class Addition:
    """A network, or a change of one, that was loaded beside the model."""

    kind: str  # the option's name: "lora", "controlnet", ...
    id: str  # as it was given
    weight: float = 1.0
    weights: str = ""  # sha256 of its files


@dataclass(frozen=True)
class Model:
    """Which networks drew."""

    id: str  # as it was given: a hub repository, a folder or the embedded model's name
    pipeline: str  # class name
    weights: str  # sha256 of the UNet's files
    scheduler: Mapping[str, Any]  # its config, with _class_name
    revision: str | None = None
    variant: str | None = None
    additions: tuple[Addition, ...] = ()

    def additions_of(self, *kinds: str) -> list[Addition]:
        """Those of some kinds, in their order."""
        return [addition for addition in self.additions if addition.kind in kinds]


@dataclass(frozen=True)
class Record:
    """All that a file tells about itself. Several pictures lie on one sheet, row by row."""

    model: Model
    pictures: tuple[Picture, ...]
    device: str
    dtype: str
    threads: int
    versions: Mapping[str, str]
    columns: int = 1
    approximations: tuple[str, ...] = ()  # by their names; what is recorded here is drawn with them
    format: int = field(default=FORMAT)
    is_served: bool = False  # read from a server's own record, which tells no places

    def to_dict(self) -> dict[str, Any]:
        """The record as plain values, without what a picture or the model has not."""
        plain = asdict(self)
        del plain["is_served"]
        plain["pictures"] = [
            {key: value for key, value in picture.items() if value not in (None, ())}
            for picture in plain["pictures"]
        ]
        if not plain["model"]["additions"]:
            del plain["model"]["additions"]
        if not plain["approximations"]:
            del plain["approximations"]
        return plain

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> Record:
        """The record of `to_dict`. Raises KeyError, TypeError or ValueError if it is not one."""
        pictures = tuple(map(picture_of, stored["pictures"]))
        if not pictures:
            raise ValueError("no pictures")
        model = dict(stored["model"])
        model["additions"] = tuple(Addition(**entry) for entry in model.get("additions", ()))
        found = {"model": Model(**model), "pictures": pictures, "format": FORMAT}
        found["approximations"] = tuple(stored.get("approximations", ()))
        return cls(**{**stored, **found})


def picture_of(stored: Mapping[str, Any]) -> Picture:
    """The picture of plain values."""
    found = dict(stored)
    for name in ("image", "mask"):
        if found.get(name) is not None:
            found[name] = Source(**found[name])
    for name in ("controls", "prompts"):
        found[name] = tuple(Source(**entry) for entry in found.get(name, ()))
    return Picture(**found)


def of_server(stored: Mapping[str, Any], file: Path) -> Record:
    """The record of a picture of `fewstep serve`, which tells names and no places.

    Raises RequestError for what only the server has, and as `from_dict` for what is no record.
    """
    if "passed" not in stored:
        raise RequestError(
            f"PICTURE {file}: was drawn by fewstep serve or by a program, and does not say all; "
            "drop it into the studio, or give its settings to fewstep generate"
        )
    for name in ("mask", "control"):
        if name in stored:
            raise RequestError(
                f"PICTURE {file}: was drawn with a {name} that was sent to fewstep serve, of which "
                "its record holds the sha256 alone; send it to the server again"
            )
    image = {"image": {"path": "", **stored["image"]}} if "image" in stored else {}
    asked = {**stored, **stored["passed"], **image}
    names = ("prompt", "seed", "steps", "guidance_scale", "width", "height", "negative_prompt")
    picture = picture_of({name: asked.get(name) for name in (*names, "strength", "image")})
    loras = [Addition("lora", one["source"], float(one["weight"])) for one in stored["loras"]]
    scheduler, name = dict(stored["scheduler_config"]), str(stored["model"])
    model = Model(name, str(stored["pipeline"]), "", scheduler, additions=tuple(loras))
    return Record(
        model,
        (picture,),
        str(stored["device"]),
        str(stored["dtype"]),
        int(stored["threads"]),
        dict(stored["versions"]),
        approximations=tuple(stored["approximations"]),
        is_served=True,
    )


def told(record: Record, suffix: str) -> dict[str, Any]:
    """What a file of that suffix says of itself, as keywords for PIL's `save`."""
    return metadata.kept(record.to_dict(), parameters(record), suffix)


def read_record(file: Path) -> Record:
    """The record in a file. Raises RequestError, naming the file, if there is none."""
    try:
        with PIL.Image.open(file) as picture:
            text = metadata.stored_json(picture)
    except FileNotFoundError:
        raise RequestError(f"PICTURE {file}: no such file; give one that fewstep drew") from None
    except (OSError, ValueError, SyntaxError, PIL.Image.DecompressionBombError) as error:
        raise RequestError(f"PICTURE {file}: cannot be read as a picture ({error})") from error
    if text is None:
        raise RequestError(
            f"PICTURE {file}: does not say what it was drawn from; "
            "give a file that fewstep drew, unchanged by other programs"
        )
    try:
        stored = json.loads(text)
        if "pictures" not in stored and "pipeline" in stored:
            return of_server(stored, file)
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
        "Model hash": model.weights[:10] or None,
        "Model": Path(model.id).name,
        "Denoising strength": first.strength,
        "Version": f"fewstep {record.versions['fewstep']}",
    }
    return metadata.parameters(first.prompt, first.negative_prompt, settings)
