"""What is measured: the work, and what a side's process is told of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ..errors import RequestError

# Models of full size, which are made of random numbers; any other name is a folder.
RANDOM = ("sd15", "sdxl", "ssd1b")
EMBEDDED = "embedded"
TASKS = ("text-to-image", "image-to-image", "controlnet", "lora")
PARTS = ("picture", "unet", "vae")
DTYPES = ("float32", "bfloat16", "float16")
DEVICES = ("cpu", "cuda", "mps")
MOST_STEPS = 50  # what a consistency model was distilled from
STRENGTH = 0.6  # of picture to picture
SUBJECT = "a red apple"


@dataclass(frozen=True)
class Work:
    """One thing that every side does.

    A `picture` is the whole call, from the prompt to PIL; `unet` one call of the network with fixed
    inputs, and `vae` one decoding. `size` is (width, height) in pixels, None the model's own.
    """

    model: str = EMBEDDED
    task: str = "text-to-image"
    part: str = "picture"
    size: tuple[int, int] | None = None
    steps: int = 4
    batch: int = 1
    dtype: str = "float32"
    device: str = "cpu"
    prompt: str = SUBJECT

    def __post_init__(self) -> None:
        for name, known in (("task", TASKS), ("part", PARTS), ("dtype", DTYPES)):
            if getattr(self, name) not in known:
                raise RequestError(
                    f"{name} {getattr(self, name)!r} is unknown; give one of {', '.join(known)}"
                )
        if self.device.partition(":")[0] not in DEVICES:
            raise RequestError(f"device {self.device!r} is unknown; give cpu, cuda, cuda:1 or mps")
        for name, most in (("steps", MOST_STEPS), ("batch", 256)):
            if not 1 <= getattr(self, name) <= most:
                raise RequestError(f"{name} {getattr(self, name)}: must be from 1 to {most}")
        if self.part != "picture" and self.task not in ("text-to-image", "lora"):
            raise RequestError(
                f"part {self.part!r} goes with the tasks text-to-image and lora, got "
                f"{self.task!r}; leave the part out to measure whole pictures"
            )

    @property
    def title(self) -> str:
        """What is done, in words."""
        size = "" if self.size is None else f"{self.size[0]}x{self.size[1]}, "
        what = {
            "picture": f"{self.task}, {size}{self.steps} step{'s' * (self.steps != 1)}",
            "unet": f"one UNet call{', LoRA merged' * (self.task == 'lora')}, {size[:-2]}",
            "vae": f"VAE decoding, {size[:-2]}",
        }[self.part].rstrip(", ")
        return f"{self.model}, {what}, batch {self.batch}, {self.dtype}, {self.device}"

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> Work:
        """The work of `asdict`, also from JSON."""
        size = stored["size"]
        return cls(**{**stored, "size": None if size is None else tuple(size)})


@dataclass(frozen=True)
class Setting:
    """What a side's process is told: the work, where its files are, and in what it computes."""

    work: Work
    folder: str  # the checkpoint
    beside: str | None  # the ControlNet's folder or the LoRA's file
    dtype: str  # of the computation; the files are in the work's
    cache: str  # where models in other formats are kept

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> Setting:
        return cls(**{**stored, "work": Work.from_dict(stored["work"])})
