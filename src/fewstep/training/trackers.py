"""Programs that show a run's figures elsewhere; named in run.trackers, installed by who wants them.

tensorboard   event files in the run's folder: tensorboard --logdir FOLDER
wandb         Weights & Biases; WANDB_MODE=offline keeps everything on this machine
"""

from __future__ import annotations

import difflib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol
from uuid import uuid4

import numpy as np
from PIL import Image

from ..errors import RequestError
from .config import Recipe


class Tracker(Protocol):
    """Where figures and sheets go."""

    def figures(self, step: int, figures: Mapping[str, float]) -> None:
        """Take the figures after `step` steps."""

    def sheet(self, step: int, sheet: Image.Image) -> None:
        """Take the pictures after `step` steps."""

    def close(self) -> None:
        """Nothing more comes."""


class TensorBoard:
    """Event files in `folder`/tensorboard; a resumed run replaces what it repeats."""

    def __init__(self, recipe: Recipe, folder: Path, start: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(
            str(folder / "tensorboard"), purge_step=start + 1 if start else None
        )

    def figures(self, step: int, figures: Mapping[str, float]) -> None:
        for name, value in figures.items():
            self.writer.add_scalar(name, value, step)

    def sheet(self, step: int, sheet: Image.Image) -> None:
        self.writer.add_image("sheet", np.asarray(sheet), step, dataformats="HWC")

    def close(self) -> None:
        self.writer.close()


class WeightsAndBiases:
    """A run of Weights & Biases, whose id is kept in the folder, so that a resumed run goes on."""

    def __init__(self, recipe: Recipe, folder: Path, start: int) -> None:
        import wandb

        kept = folder / "wandb-id.txt"
        if not (start and kept.exists()):
            kept.write_text(uuid4().hex)
        try:
            self.run: Any = wandb.init(
                project="fewstep",
                name=recipe.name or recipe.output.name,
                dir=str(folder),
                config=asdict(recipe),
                id=kept.read_text(),
                resume="allow",
            )
        except Exception as error:  # it raises errors of its own and of the network's libraries
            raise RequestError(
                f"run.trackers: wandb did not start ({error}); run `wandb login`, set "
                "WANDB_MODE=offline, or leave wandb out of run.trackers"
            ) from error
        self.picture: Callable[[Image.Image], Any] = wandb.Image

    def figures(self, step: int, figures: Mapping[str, float]) -> None:
        self.run.log(dict(figures), step=step)

    def sheet(self, step: int, sheet: Image.Image) -> None:
        self.run.log({"sheet": self.picture(sheet)}, step=step)

    def close(self) -> None:
        self.run.finish()


# Name -> (what makes it, the library that it needs).
TRACKERS: dict[str, tuple[Callable[[Recipe, Path, int], Tracker], str]] = {
    "tensorboard": (TensorBoard, "tensorboard"),
    "wandb": (WeightsAndBiases, "wandb"),
}


def check_trackers(names: Sequence[str]) -> None:
    """Raises RequestError for a tracker that is unknown, or whose library is not installed."""
    for name in names:
        if name not in TRACKERS:
            near = difflib.get_close_matches(name, TRACKERS, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {list(TRACKERS)}"
            raise RequestError(f"run.trackers names {name!r}, which is not known; {hint}")
        library = TRACKERS[name][1]
        if importlib.util.find_spec(library) is None:
            raise RequestError(
                f"run.trackers names {name!r}, but {library} is not installed; "
                f"pip install {library}, or leave it out: log.jsonl holds all figures"
            )


def open_trackers(recipe: Recipe, folder: Path, start: int) -> list[Tracker]:
    """The trackers of a run that goes on after `start` steps."""
    check_trackers(recipe.run.trackers)
    return [TRACKERS[name][0](recipe, folder, start) for name in recipe.run.trackers]
