"""A model loaded for the command line, and one picture drawn from one record."""

from __future__ import annotations

import hashlib
import inspect
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import PIL.Image
import PIL.ImageOps
import torch

from .. import EMBEDDED, __version__, schedulers
from ..checkpoints.locate import Source as Checkpoint
from ..errors import CheckpointError, FewstepError, RequestError, UnsupportedConfig
from ..imports import first_import
from ..models.base import WEIGHTS_STEM
from ..pipelines.approximations import tiny_beside
from ..pipelines.catalog import (
    AnimateDiffPipeline,
    AutoPipelineForImage2Image,
    AutoPipelineForInpainting,
    AutoPipelineForText2Image,
)
from ..pipelines.embedded import TEACHER, embedded_teacher
from ..pipelines.previews import PreviewCallback
from ..schedulers import LCMScheduler
from ..utils import load_image, make_image_grid
from .additions import attach, call_arguments, fingerprint, load_networks, with_fingerprints
from .options import SCHEDULERS
from .record import Addition, Model, Picture, Record, Source

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

TASKS: Mapping[str, Any] = {
    "text-to-image": AutoPipelineForText2Image,
    "image-to-image": AutoPipelineForImage2Image,
    "inpainting": AutoPipelineForInpainting,
    "text-to-video": AnimateDiffPipeline,
}

Watcher = Callable[[Picture], PreviewCallback] | None

# How the pipelines' arguments are called here.
OPTIONS = {
    "num_inference_steps": "--steps",
    "guidance_scale": "--guidance",
    "negative_prompt": "--negative",
    "height": "--size",
    "width": "--size",
    "strength": "--strength",
    "image": "--image",
    "mask_image": "--mask",
    "control_image": "--control-image",
    "ip_adapter_image": "--ip-image",
    "num_frames": "--frames",
    "prompt": "PROMPT",
}


@dataclass(frozen=True, eq=False)
class Given:
    """The pictures that a drawing is made from."""

    image: PIL.Image.Image | None = None
    mask: PIL.Image.Image | None = None
    controls: Sequence[PIL.Image.Image] = ()
    prompts: Sequence[PIL.Image.Image] = ()


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
        steps, guidance = self.default("num_inference_steps"), self.default("guidance_scale")
        is_lcm = isinstance(self.pipe.scheduler, LCMScheduler)
        if self.model.id == EMBEDDED.name:
            guidance = EMBEDDED_GUIDANCE
        elif noted := self.pipe.unet.config.get("_guidance"):  # by our own training
            guidance = noted.get("scale", guidance)
        elif is_lcm and not self.pipe.is_embedded:
            guidance = 1.0  # distilled with the guidance in it, as LCM-LoRAs are
        return 4 if is_lcm else steps, guidance

    def default(self, argument: str) -> Any:
        """The default of an argument of the pipeline."""
        return inspect.signature(type(self.pipe).__call__).parameters[argument].default

    @property
    def native_size(self) -> tuple[int, int]:
        """Width and height of the pictures that the model was trained on."""
        sample = self.pipe.unet.config.sample_size or 64
        height, width = (sample, sample) if isinstance(sample, int) else sample
        return width * self.multiple, height * self.multiple

    @property
    def multiple(self) -> int:
        """What widths and heights must be a multiple of."""
        adapter = getattr(self.pipe, "adapter", None)
        return max(int(self.pipe.vae_scale_factor), getattr(adapter, "downscale_factor", 1))

    def draw(
        self, record: Record, given: Given, on_step: Callable[[], Any], watcher: Watcher = None
    ) -> list[PIL.Image.Image]:
        """The picture, or the sheet of pictures, or the frames of the video, of a record.

        `on_step` is called after each step; `watcher` makes what sees the steps of a picture.
        """
        drawn = [self.draw_one(picture, given, on_step, watcher) for picture in record.pictures]
        return drawn[0] if len(drawn) == 1 else [sheet([d[0] for d in drawn], record.columns)]

    def draw_one(
        self, picture: Picture, given: Given, on_step: Callable[[], Any], watcher: Watcher
    ) -> list[PIL.Image.Image]:
        """One picture, or a video's frames, drawn alone from a generator of its own on the CPU.

        So neither the device's noise nor the other pictures of a run change its pixels.
        """

        watch = None if watcher is None else watcher(picture)

        def step_end(pipe: Any, index: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            on_step()
            return {} if watch is None else watch(pipe, index, t, tensors)

        request: dict[str, Any] = {
            "prompt": picture.prompt,
            "num_inference_steps": picture.steps,
            "guidance_scale": picture.guidance_scale,
            "generator": torch.Generator("cpu").manual_seed(picture.seed),
        }
        if watch is not None or not self.device.startswith("cuda"):  # there steps are one graph
            request["callback_on_step_end"] = step_end
            request["callback_on_step_end_tensor_inputs"] = PreviewCallback.tensor_inputs
        if picture.negative_prompt is not None:
            request["negative_prompt"] = picture.negative_prompt
        request |= self.arguments(picture, given)
        steers_by_image = bool(given.controls) and given.image is None
        with option_names({"image": "--control-image"} if steers_by_image else {}):
            output = self.pipe(**request)
        return list(output.images if picture.frames is None else output.frames[0])

    def arguments(self, picture: Picture, given: Given) -> dict[str, Any]:
        """The arguments of a task, and of what stands beside the model."""
        size = (picture.width, picture.height)
        found: dict[str, Any] = call_arguments(self.model.additions)
        if picture.task != "image-to-image" or given.controls:
            found |= {"width": picture.width, "height": picture.height}
        if picture.frames is not None:
            found["num_frames"] = picture.frames
        if given.image is not None:
            found |= {"image": fitted(given.image, size), "strength": picture.strength}
        if given.mask is not None:
            found |= {"mask_image": fitted(given.mask, size), "paste_back": True}
        if given.controls:
            count = len(self.model.additions_of("controlnet", "adapter"))
            controls = [fitted(control, size) for control in repeated(given.controls, count)]
            name = "image" if given.image is None else "control_image"
            found[name] = controls if count > 1 else controls[0]
        if given.prompts:
            count = len(self.model.additions_of("ip-adapter"))
            found["ip_adapter_image"] = list(repeated(given.prompts, count))
        return found


def fitted(picture: PIL.Image.Image, size: tuple[int, int]) -> PIL.Image.Image:
    """A picture cropped to the shape of `size` and scaled to it."""
    return PIL.ImageOps.fit(picture, size, PIL.Image.Resampling.LANCZOS)


def repeated(pictures: Sequence[PIL.Image.Image], count: int) -> Sequence[PIL.Image.Image]:
    """One picture for each of `count` networks; one serves all."""
    return list(pictures) * count if len(pictures) == 1 else pictures


def sheet(pictures: Sequence[PIL.Image.Image], columns: int) -> PIL.Image.Image:
    """Pictures of one size in rows of `columns`; the last row is filled up with white."""
    rows = -(-len(pictures) // columns)
    blank = PIL.Image.new("RGB", pictures[0].size, "white")
    return make_image_grid([*pictures, *[blank] * (rows * columns - len(pictures))], rows, columns)


def load(
    name: str | None,
    *,
    task: str = "text-to-image",
    device: str,
    dtype: str,
    revision: str | None = None,
    variant: str | None = None,
    scheduler: str | None = None,
    quantize: str | None = None,
    fast: bool = False,
    additions: Sequence[Addition] = (),
) -> Loaded:
    """The model `name`, a hub repository or a folder, for a task; None is the embedded one.

    `quantize` is a kind of that; `fast` turns on all approximations that gain here.

    Raises an error that names the option if something cannot be had.
    """
    quiet_transformers()
    name = EMBEDDED.name if name is None else name
    place = os.fspath(EMBEDDED) if name in (EMBEDDED.name, TEACHER.name) else name
    chosen = resolve_device(device)
    beside = tiny_beside(place) if fast and all(a.kind != "vae" for a in additions) else None
    if beside is not None:
        additions = [*additions, Addition("vae", str(beside))]
    numbers = resolve_dtype(dtype, chosen)
    files = Checkpoint(place, subfolder="unet", revision=revision, variant=variant)
    networks = load_networks(additions, numbers)
    try:
        with fingerprinted(files) as weights_of:
            if name == TEACHER.name:
                pipe = TASKS[task].from_pipe(embedded_teacher(numbers), **networks)
            else:
                pipe = TASKS[task].from_pretrained(
                    place, torch_dtype=numbers, revision=revision, variant=variant, **networks
                )
            weights = weights_of()
    except UnsupportedConfig as error:
        raise UnsupportedConfig(f"--model {name}: {error}") from error
    except RequestError as error:  # a component that this task needs is neither there nor given
        said = str(error).replace(
            "pass motion_adapter= to from_pretrained", "give --motion-adapter"
        )
        raise RequestError(f"--model {name}: {said}") from error
    except (FewstepError, OSError) as error:
        remedy = "" if os.path.isdir(place) else "; give a folder or a hub repository that is there"
        raise CheckpointError(f"--model {name}: {error}{remedy}") from error
    pipe.set_progress_bar_config(disable=True)
    if scheduler is not None:
        sampler = getattr(schedulers, SCHEDULERS[scheduler])
        pipe.scheduler = sampler.from_config(pipe.scheduler.config)
    config = {key: value for key, value in pipe.scheduler.config.items() if not key.startswith("_")}
    stored = {"_class_name": type(pipe.scheduler).__name__, **config}
    attach(pipe, additions)
    found = with_fingerprints(additions)
    model = Model(name, type(pipe).__name__, weights, stored, revision, variant, found)
    approximate(pipe.to(chosen), quantize, fast)
    return Loaded(pipe, model, str(chosen), str(pipe.unet.dtype).removeprefix("torch."))


def approximate(pipe: Any, quantize: str | None, fast: bool) -> None:
    """Turn on what was asked for, and print which approximations are on."""
    if quantize is not None:
        try:
            pipe.quantize(quantize)
        except RequestError as error:
            raise RequestError(f"--quantize {error}") from error
        print("approximations:", ", ".join(pipe.approximations), file=sys.stderr)
    if fast:
        pipe.enable_fast()


@contextmanager
def fingerprinted(files: Checkpoint) -> Iterator[Callable[[], str]]:
    """What gives the fingerprint of a checkpoint's weights.

    A folder's files are read while the block loads them; a repository's are here only then.
    """

    def found() -> str:
        return fingerprint(files.weights(WEIGHTS_STEM))

    if not os.path.isdir(files.path):
        yield found
        return
    with ThreadPoolExecutor(1) as beside:
        yield beside.submit(found).result


def read_source(path: str, option: str = "--image") -> tuple[PIL.Image.Image, Source]:
    """The picture that an option names, upright and in RGB, and its record."""
    try:
        picture = load_image(path)
    except (OSError, ValueError, SyntaxError, PIL.Image.DecompressionBombError) as error:
        what = "no such file" if missing(path) else f"cannot be read as a picture ({error})"
        raise RequestError(f"{option} {path}: {what}; give a PNG, JPEG or WebP file") from error
    digest = hashlib.sha256(f"{picture.width}x{picture.height}".encode() + picture.tobytes())
    return picture, Source(path, digest.hexdigest())


def missing(path: str) -> bool:
    """Whether `path` names a file that is not there."""
    return not path.startswith(("http://", "https://")) and not os.path.isfile(path)


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
    with first_import("transformers"):
        from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


@contextmanager
def option_names(changes: Mapping[str, str]) -> Iterator[None]:
    """Errors about a pipeline's arguments call them as the command line does."""
    options = {**OPTIONS, **changes}
    try:
        yield
    except RequestError as error:
        names = "|".join(options)
        text = re.sub(rf"\b({names})\b(?=[ =])", lambda found: options[found[0]], str(error))
        raise RequestError(text) from error
