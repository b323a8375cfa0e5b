"""Several processes that work together, and a toy phase for them.

They come from a server that has imported torch already, so each starts in milliseconds.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from fewstep.training.config import Optimizer, Recipe, Run, Scenes, TeacherPhase, parse_recipe
from fewstep.training.draws import Draws
from fewstep.training.loop import Phase, train_phase
from fewstep.training.ranks import joined

CPU = torch.device("cpu")
PRELOADED = [  # with what torch imports when it is first needed
    "many",
    "torch._dynamo",
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "transformers.models.clip.modeling_clip",
    "transformers.models.clip.tokenization_clip",
    "fewstep.training.phases.consistency",
]


def recipe(**run: Any) -> Recipe:
    """A recipe for `Toy`: twelve steps of a batch of eight."""
    run = {"steps": 12, "batch": 8, "precision": "fp32", "sheet_steps": 0, "device": "cpu"} | run
    return Recipe(
        phase="teacher",
        folder="",
        seed=3,
        data=Scenes(sprites=""),
        optimizer=Optimizer(lr=1e-2, warmup=4),
        run=Run(**run),
        settings=TeacherPhase(model={}, scheduler={}),
    )


class Toy(Phase):
    """Two networks that learn a fixed map together, and a moving average of one of them."""

    def __init__(self, made: Recipe, folder: Path, before: Callable[[int], None] | None) -> None:
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(5, 7), nn.Linear(7, 3)
        self.first.bias.requires_grad_(False)
        self.target = nn.Linear(5, 7).requires_grad_(False)
        self.trained = {"first": self.first, "second": self.second}
        self.kept: Mapping[str, nn.Module] = {"target": self.target}
        self.made, self.before = made, before
        self.finished: dict[str, Tensor] = {}

    def loss(self, step: int, part: range) -> Tensor:
        if self.before is not None:
            self.before(step)
        x = Draws(self.made.seed, step, part).normal((5,))
        with torch.no_grad():
            wanted = self.second(self.target(x)) * 0.1 + x[:, :3]
        return (self.second(self.first(x)) - wanted).square().mean()

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        self.target.weight.lerp_(self.first.weight, 0.1)

    def show(self) -> tuple[Image.Image, dict[str, float]]:
        return Image.new("RGB", (2, 2)), {}

    def finish(self, folder: Path, figures: Mapping[str, float]) -> None:
        (folder / "finished").write_text("")


def train_toy(folder: Path, before: Callable[[int], None] | None = None, **run: Any) -> None:
    """Train the toy as this process's part of a run."""
    made = recipe(checkpoint_minutes=0.0, **run)
    with joined(CPU) as (ranks, device):
        folder.mkdir(exist_ok=True)
        train_phase(Toy(made, folder, before), made, folder, device, ranks)


def die(at: int, step: int) -> None:
    """End the last process before step `at`, without a word."""
    if step == at and int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1:
        os._exit(9)


def pictures(folder: Path) -> Path:
    """Twelve tiny pictures with captions."""
    folder.mkdir()
    for index in range(12):
        color = (20 * index, 255 - 20 * index, 90)
        Image.new("RGB", (70, 64 + index), color).save(folder / f"{index:02}.png")
        (folder / f"{index:02}.txt").write_text(f"a red dog {index}")
    return folder


def student(base: Path, data: Path, folder: Path, settings: Any, **run: Any) -> Recipe:
    """A recipe for a consistency model of `base`; `settings` are those of its phase."""
    sheet = {"prompts": ["a cat", "a red dog"], "steps": [1], "teacher_steps": 2}
    run = {"steps": 3, "batch": 4, "precision": "fp32", "device": "cpu", "sheet_steps": 0} | run
    source = {"source": "folder", "path": str(data), "resolution": 64, "held_out": 2}
    table = {
        "phase": "consistency",
        "folder": str(folder),
        "seed": 3,
        "data": source | {"cache": str(data / "cache")},
        "optimizer": {"lr": 1e-3, "warmup": 1},
        "run": run,
        "consistency": {"base": str(base), "sheet": sheet} | settings,
    }
    return parse_recipe(table, "test")


def together(count: int, work: Callable[..., None], *arguments: Any) -> list[int]:
    """The exit codes of `count` connected processes that each do work(*arguments)."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    several = [
        context.Process(target=_work, args=(rank, count, port, work, arguments))
        for rank in range(count)
    ]
    for process in several:
        process.start()
    ended_by = time.monotonic() + 60
    for process in several:
        process.join(max(0.0, ended_by - time.monotonic()))
        if process.is_alive():
            process.kill()
            process.join()
    return [process.exitcode or 0 for process in several]


def _work(rank: int, count: int, port: int, work: Callable[..., None], arguments: Any) -> None:
    place = {"RANK": rank, "WORLD_SIZE": count, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": count}
    os.environ.update({name: str(value) for name, value in place.items()})
    os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})
    torch.set_num_threads(1)
    work(*arguments)
