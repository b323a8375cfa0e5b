"""The public pipelines. Each is one family with one task as its `__call__`:

            family: components, encode, decode  x  task: arguments, start  ->  public class

A class adds nothing else, so a new family or a new task is one line per class here.
"""

from __future__ import annotations

import os
from typing import Any, ClassVar

from ..checkpoints.locate import Source
from ..errors import UnsupportedConfig
from .base import DiffusionPipeline
from .families import StableDiffusion
from .loading import read_index
from .tasks import image_to_image, lcm_image_to_image, lcm_text_to_image, text_to_image


class StableDiffusionPipeline(StableDiffusion):
    """Text to picture with Stable Diffusion, or with an LCM on it."""

    __call__ = text_to_image


class StableDiffusionImg2ImgPipeline(StableDiffusion):
    """Picture to picture with Stable Diffusion, or with an LCM on it."""

    __call__ = image_to_image


class LatentConsistencyModelPipeline(StableDiffusion):
    """Text to picture with a guidance-distilled latent consistency model."""

    __call__ = lcm_text_to_image


class LatentConsistencyModelImg2ImgPipeline(StableDiffusion):
    """Picture to picture with a guidance-distilled latent consistency model."""

    __call__ = lcm_image_to_image


# Family -> task -> class.
CATALOG: dict[str, dict[str, type[DiffusionPipeline]]] = {
    "StableDiffusion": {
        "text-to-image": StableDiffusionPipeline,
        "image-to-image": StableDiffusionImg2ImgPipeline,
    },
    "LatentConsistencyModel": {
        "text-to-image": LatentConsistencyModelPipeline,
        "image-to-image": LatentConsistencyModelImg2ImgPipeline,
    },
}


def pipeline_class(name: str) -> type[DiffusionPipeline]:
    """The public pipeline that a model_index.json names."""
    classes = {c.__name__: c for tasks in CATALOG.values() for c in tasks.values()}
    if name not in classes:
        raise UnsupportedConfig(
            f"the pipeline {name} is not implemented (supported: {', '.join(classes)})"
        )
    return classes[name]


def sibling(pipeline: type[DiffusionPipeline], task: str) -> type[DiffusionPipeline]:
    """The class for `task` in the family of `pipeline`."""
    for tasks in CATALOG.values():
        if issubclass(pipeline, tuple(tasks.values())):
            return tasks[task]
    raise UnsupportedConfig(
        f"{pipeline.__name__} belongs to no family (known: {', '.join(CATALOG)})"
    )


class AutoPipeline:
    """Chooses the class of a task by the family of a checkpoint; not built itself."""

    task: ClassVar[str]

    def __init__(self) -> None:
        raise OSError(
            f"{type(self).__name__} is not built itself: use {type(self).__name__}.from_pretrained"
        )

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], **arguments: Any
    ) -> Any:
        """The checkpoint's pipeline for this task; arguments as in DiffusionPipeline's."""
        reach = ("revision", "cache_dir", "force_download", "local_files_only", "token")
        root = Source(
            os.fspath(pretrained_model_name_or_path),
            **{name: arguments[name] for name in reach if name in arguments},
        )
        pipeline = sibling(pipeline_class(read_index(root)[0]), cls.task)
        return pipeline.from_pretrained(pretrained_model_name_or_path, **arguments)

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **components: Any) -> Any:
        """The pipeline for this task that shares the components of `pipeline`."""
        return sibling(type(pipeline), cls.task).from_pipe(pipeline, **components)


class AutoPipelineForText2Image(AutoPipeline):
    """The text-to-image pipeline of any supported checkpoint."""

    task = "text-to-image"


class AutoPipelineForImage2Image(AutoPipeline):
    """The image-to-image pipeline of any supported checkpoint."""

    task = "image-to-image"
