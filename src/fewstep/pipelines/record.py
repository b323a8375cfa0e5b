"""How a picture was made, kept with the picture: `image.info["fewstep"]` is a JSON object."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import PIL.Image
import torch

from .. import __version__
from .approximations import approximations_of
from .denoise import Job
from .request import Request

KEY = "fewstep"


def write_records(images: Sequence[PIL.Image.Image], pipe: Any, request: Request, job: Job) -> None:
    """Put the record of each picture into its `info`."""
    for index, image in enumerate(images):
        made = record(index, image.size, pipe, request, job)
        image.info[KEY] = json.dumps(made, default=float)  # numpy's numbers


def record(
    index: int, size: tuple[int, int], pipe: Any, request: Request, job: Job
) -> dict[str, Any]:
    """What picture number `index` of a request was made from; None where it cannot be said."""
    per_prompt = request.num_images_per_prompt
    return {
        "pipeline": type(pipe).__name__,
        "model": pipe.name_or_path or None,
        "prompt": chosen(request.prompt, index // per_prompt),
        "negative_prompt": chosen(request.negative_prompt, index // per_prompt),
        "steps": len(job.plan.timesteps),
        "timesteps": job.plan.timesteps.tolist(),
        "guidance_scale": request.guidance_scale,
        "guidance_rescale": request.guidance_rescale,
        "strength": request.strength,
        "clip_skip": request.clip_skip,
        "weighted_prompt": request.weighted_prompt,
        "eta": request.eta,
        "seed": seed(request.generator, index),
        "index": index,
        "batch": request.batch,
        "width": size[0],
        "height": size[1],
        "loras": pipe.active_lora_record(),
        "approximations": approximations_of(pipe),
        "scheduler": type(pipe.scheduler).__name__,
        "dtype": str(pipe.unet.dtype).removeprefix("torch."),
        "device": pipe.unet.device.type,
        "versions": {"fewstep": __version__, "torch": torch.__version__},
    }


def chosen(texts: str | Sequence[str] | None, index: int) -> str | None:
    """The text of prompt number `index`; one text serves all."""
    return texts if texts is None or isinstance(texts, str) else texts[index]


def seed(generator: Any, index: int) -> int | None:
    """The seed that picture number `index` was drawn from; a shared generator needs `index` too."""
    if isinstance(generator, (list, tuple)):
        generator = generator[index]
    return None if generator is None else generator.initial_seed()
