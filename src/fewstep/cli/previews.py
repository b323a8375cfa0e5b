"""`--previews`: a picture file for every step, of what the model predicts there."""

from __future__ import annotations

import glob
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import PIL.Image
import torch

from ..errors import RequestError
from ..pipelines.previews import PreviewCallback, check_vae
from .additions import blamed, load_autoencoder
from .drawing import Loaded
from .files import check_writable, write_pictures
from .record import Addition, Picture

OPTION = "--previews"


@dataclass(frozen=True, eq=False)
class Previews:
    """Where previews go, and what decodes them: `vae`, or the model's own if it is None."""

    folder: Path
    vae: Any = None
    written: list[Path] = field(default_factory=list)

    def watcher(self, picture: Picture) -> PreviewCallback:
        """Writes the previews of one picture, as fewstep-SEED-step-1.png and so on."""
        name = free_name(self.folder, f"fewstep-{picture.seed}")
        digits = len(str(picture.steps))

        def write(index: int, pictures: list[PIL.Image.Image]) -> None:
            file = self.folder / f"{name}-step-{index + 1:0{digits}d}.png"
            write_pictures(pictures, file, {}, OPTION)
            self.written.append(file)

        return PreviewCallback(write, vae=self.vae)


def check_folder(folder: Path) -> None:
    """Raises RequestError unless previews can be written into `folder`."""
    if folder.exists() and not folder.is_dir():
        raise RequestError(f"{OPTION} {folder}: exists and is no folder; give a folder")
    check_writable(folder, OPTION)


def previews_of(folder: Path, vae: str | None, loaded: Loaded) -> Previews:
    """The previews of a loaded model, by the autoencoder called `vae` if there is one."""
    if vae is None:
        return Previews(folder)
    with blamed(Addition("preview-vae", vae)):
        found = load_autoencoder(vae, torch_dtype=getattr(torch, loaded.dtype))
        check_vae(found, loaded.pipe.unet)
    return Previews(folder, found.to(loaded.device))


def free_name(folder: Path, name: str) -> str:
    """The first of `name`, `name-2`, ... that has no previews in `folder`."""
    names = (f"{name}{'' if i == 1 else f'-{i}'}" for i in count(1))
    return next(n for n in names if not any(folder.glob(f"{glob.escape(n)}-step-*.png")))
