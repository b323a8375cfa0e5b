"""The model of a worker: its pipelines, what an order becomes, and what is said of a picture."""

from __future__ import annotations

import inspect
import json
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import PIL.Image
import PIL.ImageOps
import torch

from ..pipelines.catalog import (
    LatentConsistencyModelImg2ImgPipeline,
)
from ..pipelines.controlled import WithAdapter
from ..pipelines.denoise import Job
from ..pipelines.families import Assignment
from ..pipelines.record import record
from .again import again, sources_of
from .caches import digest
from .orders import ModelFacts, Order, ServerError, Task

STRENGTH = 0.8  # of a picture, where none is asked for

Loras = tuple[tuple[str, float], ...]  # (id, weight), sorted by id
_warnings = threading.Lock()  # what is warned of is the process's


@dataclass(frozen=True, eq=False)
class Beginning:
    """An order as a job at its start, and what it takes to make a picture of its end."""

    pipe: Any
    assignment: Assignment
    job: Job
    warned: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Loaded:
    """Pipelines that share their components, by task; those with a control apart."""

    pipes: dict[Task, Any]
    controlled: dict[Task, Any]
    facts: ModelFacts
    state: dict[str, Loras] = field(default_factory=dict)  # "loras": those that are merged now

    @property
    def pipe(self) -> Any:
        """The pipeline of texts."""
        return self.pipes["text"]

    def merge(self, loras: Loras) -> bool:
        """Make exactly these LoRAs active; whether others were."""
        if loras == self.state.get("loras"):
            return False
        self.state.pop("loras", None)  # unknown until all of it is done
        self.pipe.set_adapters([name for name, _ in loras], [weight for _, weight in loras])
        self.state["loras"] = loras
        return True

    # ── orders ──

    def settled(self, order: Order) -> Order:
        """The order with the model's own values where none is asked for.

        Raises ServerError for what this model cannot draw.
        """
        facts, m = self.facts, self.facts.multiple
        self.check(order)
        width, height = self.size(order)
        for name, side in (("width", width), ("height", height)):
            if side % m:
                raise refusal(name, f"{name} must be a multiple of {m}, got {side}")
        order = replace(
            order,
            steps=order.steps or facts.steps[2],
            guidance_scale=(
                facts.guidance[2] if order.guidance_scale is None else float(order.guidance_scale)
            ),
            width=width,
            height=height,
            loras=tuple(sorted((name, float(w)) for name, w in order.loras if w)),
        )
        if order.image is None:
            return order
        usual = 1.0 if order.mask is not None else STRENGTH
        return replace(order, strength=usual if order.strength is None else float(order.strength))

    def check(self, order: Order) -> None:
        """Raises ServerError for a task, a control or a LoRA that there is not."""
        names = [name for name, _ in order.loras]
        known = [name for name, _ in self.facts.loras]
        for name in names:
            if name not in known or names.count(name) > 1:
                why = "is given twice" if name in known else "is not loaded"
                hint = (
                    f"loaded are: {', '.join(known)}" if known else "start the server with --lora"
                )
                raise refusal("loras", f"the LoRA {name[:100]!r} {why}", hint)
        for name in ("image", "mask", "control"):
            if (picture := getattr(order, name)) is not None:
                try:
                    picture.load()  # by the caller, who may close its file, not by several threads
                except Exception:
                    raise refusal(name, f"the {name} cannot be read") from None
        pipes = self.pipes if order.control is None else self.controlled
        if order.control is not None and not pipes:
            raise refusal("control", "this server has no control loaded", "leave it out")
        if order.task not in pipes:
            part = {"text": "prompt", "image": "image", "inpaint": "mask"}[order.task]
            param, with_it = ("control", " with a control") if order.control else (part, "")
            why = f"this model has no task {order.task!r}{with_it}"
            raise refusal(param, why, f"it has{with_it}: {', '.join(pipes)}")
        if order.mask and order.image and order.mask.size != order.image.size:
            sizes = "{}x{}, and the image {}x{}".format(*order.mask.size, *order.image.size)
            raise refusal("mask", f"the mask is {sizes}", "send a mask of the image's size")

    def size(self, order: Order) -> tuple[int, int]:
        """Width and height: as asked; else of about the model's area, in the picture's shape."""
        width, height = self.facts.native_size
        source = order.image if order.image is not None else order.control
        if order.width is not None or order.height is not None:
            return order.width or width, order.height or height
        if source is None:
            return width, height
        m, ratio = self.facts.multiple, source.width / source.height
        ratio = min(max(ratio, 0.25), 4.0)
        area = width * height
        return tuple(max(m, round((area * r) ** 0.5 / m) * m) for r in (ratio, 1 / ratio))

    def begin(self, order: Order) -> Beginning:
        """A settled order as a job at its start: text and pictures to tensors."""
        pipe = (self.pipes if order.control is None else self.controlled)[order.task]
        with warned() as notices:
            call: Any = type(pipe).__call__
            assignment = call.assigned(pipe, **self.arguments(order, pipe))
            job = pipe.begun(assignment)
        return Beginning(pipe, assignment, job, tuple(notices))

    def arguments(self, order: Order, pipe: Any) -> dict[str, Any]:
        """The arguments of the pipeline's call."""
        takes = inspect.signature(type(pipe).__call__).parameters
        assert order.width is not None and order.height is not None
        size = (order.width, order.height)
        given: dict[str, Any] = {
            "prompt": order.prompt,
            "num_inference_steps": order.steps,
            "guidance_scale": order.guidance_scale,
            "generator": torch.Generator("cpu").manual_seed(order.seed),
        }
        if order.negative_prompt is not None and self.reads_negative(order):
            given["negative_prompt"] = order.negative_prompt
        if "width" in takes:
            given |= {"width": order.width, "height": order.height}
        if order.image is not None:
            given |= {"image": fitted(order.image, size)} | strength_of(order, pipe)
        if order.mask is not None:
            given |= {"mask_image": fitted(order.mask, size), "paste_back": True}
        if order.control is not None:
            kind = "adapter" if isinstance(pipe, WithAdapter) else "controlnet"
            name = "image" if order.image is None else "control_image"
            given[name] = fitted(order.control, size)
            given[f"{kind}_conditioning_scale"] = float(order.control_scale)
        return given

    def reads_negative(self, order: Order) -> bool:
        """Whether a negative prompt has an effect."""
        return not self.pipe.is_embedded and (order.guidance_scale or 0) > 1

    # ── pictures ──

    def record(self, order: Order, began: Beginning, size: tuple[int, int]) -> dict[str, Any]:
        """What a picture was made from: the pipelines' record, without paths, as asked here."""
        pipe, request = began.pipe, began.assignment.request
        made = record(0, size, pipe, request, began.job)
        sources = sources_of(pipe) if order.loras else {}
        made |= {
            "model": self.facts.id,
            "task": order.task,
            "seed": order.seed,
            "steps": order.steps,
            "strength": order.strength,
            "negative_prompt": order.negative_prompt,
            "loras": [
                {"name": name, "weight": weight, "source": sources[name]}
                for name, weight in order.loras
            ],
            "warnings": list(began.warned),
        }
        made |= again(pipe, request, made)
        if order.negative_prompt and not self.reads_negative(order):
            made["warnings"].append("negative_prompt has no effect at this guidance")
        for name in ("image", "mask", "control"):
            if (picture := getattr(order, name)) is not None:
                made[name] = {"sha256": digest(picture)}
        if order.control is not None:
            made["control"] |= {"name": self.facts.controls[0], "scale": order.control_scale}
        found: dict[str, Any] = json.loads(json.dumps(made, default=float))
        return found


def refusal(param: str, message: str, hint: str | None = None) -> ServerError:
    """An order that is the client's mistake."""
    return ServerError("invalid_request", message, param=param, hint=hint)


def fitted(picture: PIL.Image.Image, size: tuple[int, int]) -> PIL.Image.Image:
    """A picture cropped to the shape of `size` and scaled to it."""
    mode = picture.mode if picture.mode == "L" else "RGB"
    return PIL.ImageOps.fit(picture.convert(mode), size, PIL.Image.Resampling.LANCZOS)


def strength_of(order: Order, pipe: Any) -> dict[str, Any]:
    """Strength, and steps where they change with it, so that one step at least is taken.

    Pipelines of LCMs take all steps within the lower `strength` of their grid, and of a short one
    fewer; all others take the last `strength` of the steps.
    """
    assert order.steps is not None and order.strength is not None
    if isinstance(pipe, LatentConsistencyModelImg2ImgPipeline):
        grid = int(pipe.scheduler.config.original_inference_steps)
        strength = max(order.strength, (1 + 1e-6) / grid)
        return {"strength": strength, "num_inference_steps": min(order.steps, int(grid * strength))}
    return {"strength": min(1.0, max(order.strength, (1 + 1e-6) / order.steps))}


@contextmanager
def warned() -> Iterator[list[str]]:
    """Collects what is warned of in the block, for the client's record in place of the log."""
    found: list[str] = []
    with _warnings, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            yield found
        finally:
            found += dict.fromkeys(str(w.message) for w in caught)
