"""A model loaded for the command line, and one picture drawn from one record."""

from __future__ import annotations

import hashlib
import inspect
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import PIL.Image
import PIL.ImageOps
import torch

from .. import EMBEDDED, __version__
from ..checkpoints.locate import Source as Checkpoint
from ..errors import CheckpointError, FewstepError, RequestError, UnsupportedConfig
from ..models.base import WEIGHTS_STEM
from ..pipelines.catalog import AutoPipelineForImage2Image, AutoPipelineForText2Image
from ..schedulers import LCMScheduler
from ..utils import load_image, make_image_grid
from .record import Model, Picture, Record, Source

# The guidance that the embedded model is best at; other models have their pipeline's default.
EMBEDDED_GUIDANCE = 4.0

DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}

# How the pipelines' arguments are called here.
OPTIONS = {
    "num_inference_steps": "--steps",
    "guidance_scale": "--guidance",
    "negative_prompt": "--negative",
    "height": "--size",
    "width": "--size",
    "strength": "--strength",
    "image": "--image",
    "prompt": "PROMPT",
}


@dataclass(frozen=True, eq=False)
class Loaded:
    """A pipeline on its device, and what a record says of it."""

    pipe: Any
    model: Model
    device: str
    dtype: str

    @property
    def defaults(self) -> tuple[int, float]:
        """The number of steps and the guidance scale where nothing is asked for."""
        own = inspect.signature(type(self.pipe).__call__).parameters
        steps = own["num_inference_steps"].default
        guidance = own["guidance_scale"].default
        is_lcm = isinstance(self.pipe.scheduler, LCMScheduler)
        is_embedded = self.model.id == EMBEDDED.name
        return 4 if is_lcm else steps, EMBEDDED_GUIDANCE if is_embedded else guidance

    @property
    def native_size(self) -> tuple[int, int]:
        """Width and height of the pictures that the model was trained on."""
        sample = self.pipe.unet.config.sample_size or 64
        height, width = (sample, sample) if isinstance(sample, int) else sample
        return width * self.multiple, height * self.multiple

    @property
    def multiple(self) -> int:
        """What widths and heights must be a multiple of."""
        return int(self.pipe.vae_scale_factor)

    def draw(
        self, record: Record, image: PIL.Image.Image | None, on_step: Callable[[], Any]
    ) -> PIL.Image.Image:
        """The picture, or the sheet of pictures, of a record; `image` is their source picture."""
        drawn = [self.draw_one(picture, image, on_step) for picture in record.pictures]
        return drawn[0] if len(drawn) == 1 else sheet(drawn, record.columns)

    def draw_one(
        self, picture: Picture, image: PIL.Image.Image | None, on_step: Callable[[], Any]
    ) -> PIL.Image.Image:
        """One picture, drawn alone from a generator of its own on the CPU.

        So neither the device's noise nor the other pictures of a run change its pixels.
        """

        def step_end(pipe: Any, index: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            on_step()
            return tensors

        request: dict[str, Any] = {
            "prompt": picture.prompt,
            "num_inference_steps": picture.steps,
            "guidance_scale": picture.guidance_scale,
            "generator": torch.Generator("cpu").manual_seed(picture.seed),
            "callback_on_step_end": step_end,
        }
        if picture.negative_prompt is not None:
            request["negative_prompt"] = picture.negative_prompt
        if image is None:
            request |= {"width": picture.width, "height": picture.height}
        else:
            size = (picture.width, picture.height)
            fitted = PIL.ImageOps.fit(image, size, PIL.Image.Resampling.LANCZOS)
            request |= {"image": fitted, "strength": picture.strength}
        with option_names():
            return self.pipe(**request).images[0]


def sheet(pictures: Sequence[PIL.Image.Image], columns: int) -> PIL.Image.Image:
    """Pictures of one size in rows of `columns`; the last row is filled up with white."""
    rows = -(-len(pictures) // columns)
    blank = PIL.Image.new("RGB", pictures[0].size, "white")
    return make_image_grid([*pictures, *[blank] * (rows * columns - len(pictures))], rows, columns)


def load(
    name: str | None,
    *,
    image: bool,
    device: str,
    dtype: str,
    revision: str | None = None,
    variant: str | None = None,
) -> Loaded:
    """The model `name`, a hub repository or a folder; None is the embedded one.

    `image`: for drawing from pictures. Raises RequestError, naming the option, if it cannot be had.
    """
    quiet_transformers()
    name = EMBEDDED.name if name is None else name
    place = os.fspath(EMBEDDED) if name == EMBEDDED.name else name
    chosen = resolve_device(device)
    numbers = resolve_dtype(dtype, chosen)
    task = AutoPipelineForImage2Image if image else AutoPipelineForText2Image
    files = Checkpoint(place, subfolder="unet", revision=revision, variant=variant)
    try:
        pipe = task.from_pretrained(place, torch_dtype=numbers, revision=revision, variant=variant)
        weights = fingerprint(files.weights(WEIGHTS_STEM))
    except UnsupportedConfig as error:
        raise UnsupportedConfig(f"--model {name}: {error}") from error
    except (FewstepError, OSError) as error:
        remedy = "" if Path(place).is_dir() else "; give a folder or a hub repository that is there"
        raise CheckpointError(f"--model {name}: {error}{remedy}") from error
    pipe.set_progress_bar_config(disable=True)
    config = {key: value for key, value in pipe.scheduler.config.items() if not key.startswith("_")}
    scheduler = {"_class_name": type(pipe.scheduler).__name__, **config}
    model = Model(name, type(pipe).__name__, weights, scheduler, revision, variant)
    return Loaded(pipe.to(chosen), model, str(chosen), str(numbers).removeprefix("torch."))


def fingerprint(files: list[Path]) -> str:
    """sha256 of the files' bytes, one after another.

    A file in the hub's cache is a link to a blob that is named by its sha256: that name is
    believed, as reading gigabytes takes seconds.
    """
    targets = [file.resolve() for file in files]
    if (
        len(targets) == 1
        and files[0].is_symlink()
        and re.fullmatch("[0-9a-f]{64}", targets[0].name)
    ):
        return targets[0].name
    digest = hashlib.sha256()
    for target in targets:
        with target.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def read_source(path: str) -> tuple[PIL.Image.Image, Source]:
    """The picture of --image, upright and in RGB, and its record."""
    try:
        picture = load_image(path)
    except (OSError, ValueError, SyntaxError, PIL.Image.DecompressionBombError) as error:
        what = "no such file" if missing(path) else f"cannot be read as a picture ({error})"
        raise RequestError(f"--image {path}: {what}; give a PNG, JPEG or WebP file") from error
    digest = hashlib.sha256(f"{picture.width}x{picture.height}".encode() + picture.tobytes())
    return picture, Source(path, digest.hexdigest())


def missing(path: str) -> bool:
    """Whether `path` names a file that is not there."""
    return not path.startswith(("http://", "https://")) and not Path(path).is_file()


def resolve_device(name: str) -> torch.device:
    """The device of --device; "auto" is the first of cuda, mps and cpu that is there."""
    counts = {
        "cuda": torch.cuda.device_count() if torch.cuda.is_available() else 0,
        "mps": int(torch.backends.mps.is_available()),
        "cpu": 1,
    }
    if name == "auto":
        return torch.device(next(kind for kind, count in counts.items() if count))
    kind, _, index = name.partition(":")
    if not (index or "0").isdecimal() or int(index or 0) >= counts.get(kind, 0):
        have = ", ".join(kind for kind, count in counts.items() if count)
        raise RequestError(f"--device {name}: is not on this machine (have: {have})")
    return torch.device(name)


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of --dtype; "auto" is float32 on the CPU, which is slow at less, else float16."""
    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.float16
    if name not in DTYPES:
        raise RequestError(f"--dtype {name}: is not known (have: auto, {', '.join(DTYPES)})")
    return DTYPES[name]


def versions() -> dict[str, str]:
    """The versions that may change a picture's pixels."""
    from importlib.metadata import version

    return {
        "fewstep": __version__,
        "torch": torch.__version__,
        "transformers": version("transformers"),
    }


def quiet_transformers() -> None:
    """No bars and notices: a command prints its result, and its own errors say what is wrong."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


@contextmanager
def option_names() -> Iterator[None]:
    """Errors about a pipeline's arguments call them as the command line does."""
    try:
        yield
    except RequestError as error:
        names = "|".join(OPTIONS)
        text = re.sub(rf"\b({names})\b(?=[ =])", lambda found: OPTIONS[found[0]], str(error))
        raise RequestError(text) from error
