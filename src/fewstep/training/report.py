"""What a run tells: a line on the terminal, figures in log.jsonl, sheets, and its trackers."""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ..checkpoints.config import replacing
from .config import Recipe
from .trackers import Tracker, open_trackers

LOG = "log.jsonl"
UNITS = {"linux": 2**20, "darwin": 2**30}  # of ru_maxrss in a GiB


class LossLog:
    """Means of loss and gradient norm over some steps, one JSON line each, read without a sync."""

    EVERY = 20

    def __init__(self, path: Path, start: int, device: torch.device, batch: int = 1) -> None:
        self.path, self.device, self.batch = path, device, batch
        self.last, self.told_at = start, time.monotonic()
        self.losses: list[Tensor] = []
        self.norms: list[Tensor] = []
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        kept = [line for line in lines if step_of(line) <= start]
        with replacing(path) as beside:
            beside.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")

    def add(self, loss: Tensor, norm: Tensor) -> None:
        """Keep a step's figures, on their device."""
        self.losses.append(loss)
        self.norms.append(norm)

    def due(self, done: int) -> bool:
        """Whether a line is to be written after `done` steps."""
        return done % self.EVERY == 0

    def write(self, done: int, rate: float) -> dict[str, float]:
        """Write the means since the last line. Waits for the device, which nothing else does."""
        loss = torch.stack(self.losses).mean().item()
        norms = torch.stack(self.norms)  # of steps that float16's scaling passes over infinite
        norm = norms[norms.isfinite()].sum().item() / max(1, int(norms.isfinite().sum()))
        now = time.monotonic()
        figures = {
            "step": done,
            "loss": loss,
            "grad_norm": norm,
            "lr": rate,
            "samples_per_second": self.batch * (done - self.last) / max(now - self.told_at, 1e-9),
            "memory_gib": memory(self.device),
        }
        self.losses, self.norms = [], []
        self.last, self.told_at = done, now
        self.note(figures)
        return figures

    def note(self, figures: Mapping[str, float]) -> None:
        """Append a line."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(figures) + "\n")


def step_of(line: str) -> float:
    """The step of a line; infinite for one that a kill cut off."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")


class Report:
    """All that one run tells while it goes on, from the process that writes the files."""

    def __init__(self, recipe: Recipe, folder: Path, start: int, device: torch.device) -> None:
        self.log = LossLog(folder / LOG, start, device, recipe.run.batch)
        self.trackers: list[Tracker] = open_trackers(recipe, folder, start)
        self.folder = folder
        self.bar = tqdm(
            initial=start,
            total=recipe.run.steps,
            desc=recipe.name or recipe.phase,
            unit="step",
        )

    def add(self, loss: Tensor, norm: Tensor) -> None:
        """A step is done; its figures stay on their device."""
        self.log.add(loss, norm)
        self.bar.update()

    def due(self, done: int) -> bool:
        """Whether figures are to be read after `done` steps."""
        return self.log.due(done)

    def write(self, done: int, rate: float) -> dict[str, float]:
        """Read, write and show the means since the last time."""
        figures = self.log.write(done, rate)
        self.bar.set_postfix_str(
            f"loss {figures['loss']:.4g}, {figures['samples_per_second']:.3g} samples/s, "
            f"{figures['memory_gib']:.1f} GiB"
        )
        self.track(figures)
        return figures

    def sheet(self, done: int, sheet: Image.Image, name: str, figures: Mapping[str, float]) -> None:
        """A sheet of pictures as a file of that name, and figures that belong to it."""
        path = self.folder / name
        with replacing(path) as beside:
            sheet.save(beside, format="PNG")
        for tracker in self.trackers:
            tracker.sheet(done, sheet)
        if figures:
            told = {"step": done, **figures}
            self.log.note(told)
            self.track(told)

    def track(self, figures: Mapping[str, float]) -> None:
        """Hand figures, their step among them, to the trackers."""
        rest = {name: value for name, value in figures.items() if name != "step"}
        for tracker in self.trackers:
            tracker.figures(int(figures["step"]), rest)

    def close(self) -> None:
        """Nothing more comes."""
        self.bar.close()
        for tracker in self.trackers:
            tracker.close()


@contextmanager
def reporting(
    recipe: Recipe, folder: Path, start: int, device: torch.device, is_first: bool
) -> Iterator[Report | None]:
    """Within this context the first process has a report, and the others have none."""
    report = Report(recipe, folder, start, device) if is_first else None
    try:
        yield report
    finally:
        if report is not None:
            report.close()


def memory(device: torch.device) -> float:
    """The most memory used so far, in GiB: of the GPU, or of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / UNITS.get(sys.platform, 2**20)
