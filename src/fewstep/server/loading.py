"""What a worker loads: a model, its LoRAs, its control, as pipelines that share components."""

from __future__ import annotations

import inspect
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from .. import EMBEDDED
from ..checkpoints.locate import Source
from ..errors import FewstepError, RequestError
from ..models.controlnet import ControlNetModel
from ..models.t2i_adapter import T2IAdapter
from ..pipelines.advice import MOST_GUIDANCE, MOST_STEPS
from ..pipelines.approximations import approximations_of
from ..pipelines.catalog import (
    AutoPipelineForImage2Image,
    AutoPipelineForInpainting,
    AutoPipelineForText2Image,
)
from ..pipelines.embedded import TEACHER, embedded_teacher
from ..pipelines.record import KEY
from ..pipelines.speed import lay_out
from ..schedulers import LCMScheduler
from .caches import Cache, remembering
from .loaded import Loaded
from .orders import Limits, ModelFacts, Task

EMBEDDED_GUIDANCE = 4.0  # that the embedded model is best at
MULTIPLE = 8  # of which sides are, for all models
TASKS: dict[Task, Any] = {
    "text": AutoPipelineForText2Image,
    "image": AutoPipelineForImage2Image,
    "inpaint": AutoPipelineForInpainting,
}


def load(
    model: str | os.PathLike[str],
    limits: Limits,
    *,
    loras: Sequence[str | tuple[str, str]],
    control: str | None,
    dtype: torch.dtype,
    device: torch.device,
    scheduler: Any,
    texts: Cache[Any],
    latents: Cache[Any],
) -> Loaded:
    """The pipelines of a model, with its LoRAs and its control, on a device."""
    name = os.fspath(model)
    place, numbers = shipped(name), {"torch_dtype": dtype}
    if name == TEACHER.name:
        pipe: Any = embedded_teacher(dtype)
    else:
        pipe = AutoPipelineForText2Image.from_pretrained(place, **numbers)
    if scheduler is not None:
        pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    names = [lora if isinstance(lora, tuple) else (name_of(lora), lora) for lora in loras]
    for index, (adapter, source) in enumerate(names):
        if adapter in dict(names[:index]):
            raise RequestError(
                f"--lora {source}: the name {adapter!r} is taken; give another by NAME={source}"
            )
        with warnings.catch_warnings(), blaming(f"--lora {source}"):
            warnings.simplefilter("ignore")  # that the one before is not active any more
            pipe.load_lora_weights(shipped(source), adapter_name=adapter)
    if names:
        pipe.set_adapters([])
    pipe.to(device)
    if pipe.vae.dtype == torch.float16 and pipe.vae.config.force_upcast:
        pipe.vae.float()  # once: threads encode and decode beside each other
    with blaming(f"--control {control}"):
        added = {} if control is None else network_of(control, dtype, device)
    pipes, controlled = siblings(pipe, {}), siblings(pipe, added) if added else {}
    facts = facts_of(pipe, name, limits, pipes, controlled, names, control)
    loaded = Loaded(pipes, controlled, facts, {"loras": ()})
    for each in {*pipes.values(), *controlled.values()}:
        prepare(each, loaded, texts)
    pipe.vae.moments = remembering(pipe.vae.moments, latents, lambda: None)
    for network in (pipe.unet, pipe.vae):
        lay_out(network, device)
    return loaded


@contextmanager
def blaming(option: str) -> Iterator[None]:
    """Errors in the block name what was given to `fewstep serve`, or to a worker by that name."""
    try:
        yield
    except (FewstepError, OSError, ValueError) as error:
        raise RequestError(f"{option}: {error}") from error


def siblings(pipe: Any, added: dict[str, Any]) -> dict[Task, Any]:
    """The pipelines of all tasks that a family has, sharing the components of one."""
    found: dict[Task, Any] = {}
    for task, auto in TASKS.items():
        try:
            found[task] = auto.from_pipe(pipe, **added) if added or task != "text" else pipe
        except ValueError:  # a family may be without the task
            continue
    return found


def prepare(pipe: Any, loaded: Loaded, texts: Cache[Any]) -> None:
    """Let a pipeline keep the embeddings of texts, which are those of the LoRAs at hand."""
    pipe.set_progress_bar_config(disable=True)
    for name in ("embed", "texts"):  # Stable Diffusion's, SDXL's
        if (encode := getattr(pipe, name, None)) is not None:
            setattr(pipe, name, remembering(encode, texts, lambda: loaded.state["loras"]))


def network_of(control: str, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """The ControlNet or the T2I-Adapter of a folder or a repository, as a component."""
    kinds: dict[str, tuple[str, Any]] = {
        "ControlNetModel": ("controlnet", ControlNetModel),
        "T2IAdapter": ("adapter", T2IAdapter),
    }
    place = shipped(control)
    stored = str(Source(place).read_json("config.json").get("_class_name"))
    if stored not in kinds:
        raise RequestError(
            f"its config.json names the class {stored}; give the folder or the repository of one "
            f"of {', '.join(kinds)}"
        )
    name, kind = kinds[stored]
    return {name: kind.from_pretrained(place, torch_dtype=dtype).to(device)}


def facts_of(
    pipe: Any,
    name: str,
    limits: Limits,
    pipes: dict[Task, Any],
    controlled: dict[Task, Any],
    loras: Sequence[tuple[str, str]],
    control: str | None,
) -> ModelFacts:
    """What a client may know."""
    is_lcm = isinstance(pipe.scheduler, LCMScheduler)
    defaults = inspect.signature(type(pipe).__call__).parameters
    guidance = float(defaults["guidance_scale"].default)
    if name_of(name) == EMBEDDED.name:
        guidance = EMBEDDED_GUIDANCE
    elif noted := pipe.unet.config.get("_guidance"):  # by our own training
        guidance = float(noted.get("scale", guidance))
    elif is_lcm and not pipe.is_embedded:
        guidance = 1.0  # distilled with the guidance in it, as LCM-LoRAs are
    most = min(limits.steps, MOST_STEPS) if is_lcm else limits.steps
    usual = 4 if is_lcm else int(defaults["num_inference_steps"].default)
    highest = 20.0 if not is_lcm else 14.0 if pipe.is_embedded else MOST_GUIDANCE
    sample = pipe.unet.config.sample_size or 64
    height, width = (sample, sample) if isinstance(sample, int) else sample
    factor = int(pipe.vae_scale_factor)
    beside = [getattr(p, "adapter", None) for p in controlled.values()]
    return ModelFacts(
        id=name_of(name),
        family=type(pipe).__name__.removesuffix("Pipeline"),
        native_size=(width * factor, height * factor),
        multiple=max([MULTIPLE, factor, *(a.downscale_factor for a in beside if a is not None)]),
        steps=(1, most, min(usual, most)),
        guidance=(1.0, max(highest, guidance), guidance),
        tasks=tuple(pipes),
        loras=tuple((each, each) for each, _ in loras),
        controls=() if control is None else (name_of(control),),
        extra={
            "scheduler": type(pipe.scheduler).__name__,
            "dtype": str(pipe.unet.dtype).removeprefix("torch."),
            "device": pipe.unet.device.type,
            "reads_negative_prompts": not pipe.is_embedded,
            "controlled_tasks": list(controlled),
            "approximations": approximations_of(pipe),
            "record_key": KEY,
        },
    )


def shipped(name: str) -> str:
    """The folder of what comes with fewstep under this name; any other name as it is."""
    folder = EMBEDDED.parent / name
    return str(folder) if name == folder.name and folder.is_dir() else name


def name_of(place: str) -> str:
    """What a folder or a file is called, without where it lies; a repository's name as it is."""
    path = Path(place)
    return path.stem if path.is_file() else path.name if path.is_dir() else place
