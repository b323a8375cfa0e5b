"""From latents to pictures: of steps that are to be seen, and of the ends of runs."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import PIL.Image
import torch
from torch import Tensor

from ..pipelines.denoise import Step
from .loaded import Loaded
from .previews import Previewer
from .slots import Slot
from .troubles import cleared, told

log = logging.getLogger(__name__)

PIXELS = 1 << 20  # that are decoded in one call

Observe = Callable[[str, float], None]


@dataclass(eq=False)
class Item:
    """A step that is done, or the end of a run, whose latents (1, C, h, w) are to be decoded."""

    slot: Slot
    z: Tensor  # what the step predicts, or the end
    step: Step | None = None  # None: the end
    is_decoded: bool = False
    picture: PIL.Image.Image | Exception | None = None  # None: a step that is told without one

    @property
    def kind(self) -> tuple[bool, bool, torch.Size]:
        """What items that are decoded together agree in."""
        return self.step is None, self.is_decoded, self.z.shape


@dataclass(frozen=True, eq=False)
class Decoder:
    """The VAE, or what stands for it in previews; at most `pixels` in a call, or one picture."""

    loaded: Loaded
    previewer: Previewer
    observe: Observe
    pixels: int = PIXELS

    def group(self, items: Iterable[Item]) -> list[Item]:
        """The first of some items, and as many of its kind as are decoded with it."""
        first, *others = items
        pixels = first.z.shape[2] * first.z.shape[3] * self.loaded.pipe.vae_scale_factor**2
        like = [first, *(item for item in others if item.kind == first.kind)]
        return like[: max(1, self.pixels // pixels)]

    def decode_all(self, items: Sequence[Item]) -> None:
        """Give all items their pictures."""
        while left := [item for item in items if not item.is_decoded]:
            self.decode(self.group(left))

    def decode(self, items: Sequence[Item]) -> None:
        """Give items of one kind their pictures, or the errors that came of them."""
        begin = time.perf_counter()
        is_end = items[0].step is None
        pictures = self.ends(items) if is_end else self.previews(items)
        for item, picture in zip(items, pictures, strict=True):
            item.picture, item.is_decoded = picture, True
        self.observe("decode" if is_end else "preview", time.perf_counter() - begin)

    def previews(self, items: Sequence[Item]) -> Sequence[PIL.Image.Image | None]:
        """Pictures of what steps predict; a preview that fails is none."""
        try:
            pictures = self.previewer.pictures(torch.cat([item.z for item in items]))
        except Exception:
            log.exception("previews failed")
            pictures = []
        return pictures or [None] * len(items)

    def ends(self, items: Sequence[Item]) -> Sequence[PIL.Image.Image | Exception]:
        """A picture of each, by one call if that succeeds; else each alone: only some may fail."""
        try:
            return self.pictures([item.z for item in items])
        except Exception as error:
            log.warning("decoding %d pictures failed: %s", len(items), told(error).code)
        found: list[PIL.Image.Image | Exception] = []
        for item in items:
            try:
                cleared()  # not in an `except` block, where the error still holds its tensors
                found += self.pictures([item.z])
            except Exception as error:
                found.append(error.with_traceback(None))
        return found

    def pictures(self, latents: Sequence[Tensor]) -> list[PIL.Image.Image]:
        """The pictures of latents (1, C, h, w) of one shape."""
        pictures: list[PIL.Image.Image] = self.loaded.pipe.decode(torch.cat(list(latents)))
        return pictures
