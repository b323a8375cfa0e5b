"""The few functions of torchvision that the published script calls, for machines without it.

`torchvision` puts them in its place, in this process alone. Like torchvision they leave pictures
of PIL to PIL, so the speed hardly differs.
"""

from __future__ import annotations

import contextlib
import enum
import importlib.util
import sys
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np
import torch
from PIL import Image
from torch import Tensor


class InterpolationMode(enum.Enum):
    """Ways to resize, by PIL's names."""

    NEAREST = "nearest"
    NEAREST_EXACT = "nearest-exact"
    BILINEAR = "bilinear"
    BICUBIC = "bicubic"
    BOX = "box"
    HAMMING = "hamming"
    LANCZOS = "lanczos"


def resize(image: Image.Image, size: int, interpolation: InterpolationMode) -> Image.Image:
    """The picture with `size` pixels on its shorter side."""
    width, height = image.size
    short = min(width, height)
    way = Image.Resampling[interpolation.name.partition("_")[0]]
    return image.resize((size * width // short, size * height // short), way)


def crop(image: Image.Image, top: int, left: int, height: int, width: int) -> Image.Image:
    """A part of the picture."""
    return image.crop((left, top, left + width, top + height))


def to_tensor(image: Image.Image) -> Tensor:
    """Values (C, H, W) in [0, 1] of an RGB picture."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float() / 255


def normalize(image: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(image - mean) / std, by channels or one for all."""
    return (image - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]


class RandomCrop:
    """Where to cut."""

    @staticmethod
    def get_params(image: Image.Image, output_size: tuple[int, int]) -> tuple[int, int, int, int]:
        """(top, left, height, width) of a crop of this size, evenly drawn."""
        height, width = output_size
        top = int(torch.randint(0, image.height - height + 1, ()))
        left = int(torch.randint(0, image.width - width + 1, ()))
        return top, left, height, width


def modules() -> dict[str, ModuleType]:
    """The functions as torchvision's modules, by name."""
    names = ("torchvision", "torchvision.transforms", "torchvision.transforms.functional")
    made = {name: ModuleType(name) for name in names}
    package, transforms, functional = made.values()
    package.transforms = transforms  # type: ignore[attr-defined]
    transforms.functional = functional  # type: ignore[attr-defined]
    for kind in (RandomCrop, InterpolationMode):
        setattr(transforms, kind.__name__, kind)
    for function in (resize, crop, to_tensor, normalize):
        setattr(functional, function.__name__, function)
    return made


@contextlib.contextmanager
def torchvision() -> Iterator[bool]:
    """Within this context torchvision can be imported; whether by these functions in its place."""
    if importlib.util.find_spec("torchvision") is not None:
        yield False
        return
    # These look for torchvision when they are imported, and must go on without it.
    import diffusers.training_utils
    from diffusers import StableDiffusionPipeline  # noqa: F401
    from transformers import AutoTokenizer, CLIPTextModel  # noqa: F401

    made = modules()
    told: dict[str, Any] = {
        "is_torchvision_available": lambda: True,
        "transforms": made["torchvision.transforms"],
    }
    sys.modules.update(made)
    try:
        with mock.patch.multiple(diffusers.training_utils, create=True, **told):
            yield True
    finally:
        for name in made:
            del sys.modules[name]
