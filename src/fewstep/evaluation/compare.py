"""An LCM next to its teacher: the same prompts at few steps and at many, judged alike."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from fewstep.evaluation.emoji import Amounts, Draw, EmojiBenchmark, columns
from fewstep.evaluation.report import Report, Row
from fewstep.evaluation.sheet import contact_sheet
from fewstep.pipelines.catalog import LatentConsistencyModelPipeline, StableDiffusionPipeline
from fewstep.schedulers import DDIMScheduler

Pipeline = LatentConsistencyModelPipeline | StableDiffusionPipeline


@dataclass(frozen=True, eq=False)
class Method:
    """A pipeline at a number of steps and a guidance scale."""

    name: str
    pipe: Pipeline
    steps: int
    guidance: float

    def draw(self, prompts: list[str], seed: int) -> np.ndarray:
        """Pictures uint8 (B, H, W, 3); row i of a seed has its own generator."""
        generators = [torch.Generator().manual_seed(1000 * seed + i) for i in range(len(prompts))]
        pictures, _ = self.pipe(
            prompts,
            num_inference_steps=self.steps,
            guidance_scale=self.guidance,
            generator=generators,
            output_type="np",
            return_dict=False,
        )
        return (np.asarray(pictures) * 255).round().astype(np.uint8)


def methods(
    lcm: LatentConsistencyModelPipeline,
    teacher: StableDiffusionPipeline | None,
    *,
    guidance: float,
    teacher_guidance: float,
    steps: Sequence[int] = (1, 2, 4, 8),
    teacher_steps: int = 50,
) -> list[Method]:
    """The LCM at `steps`; its teacher by DDIM at `teacher_steps` and at the same few steps."""
    listed = [Method("LCM", lcm, n, guidance) for n in steps]
    if teacher is not None:
        ddim = StableDiffusionPipeline.from_pipe(
            teacher, scheduler=DDIMScheduler.from_config(teacher.scheduler.config)
        )
        listed += [
            Method("teacher, DDIM", ddim, n, teacher_guidance) for n in (teacher_steps, *steps)
        ]
    for method in listed:
        method.pipe.set_progress_bar_config(disable=True)
    return listed


def compare(
    benchmark: EmojiBenchmark, listed: Sequence[Method], amounts: Amounts | None = None
) -> Iterator[Row]:
    """A row of scores for the real pictures and then for each method, as they are done."""
    yield benchmark.ceiling_row(amounts)
    for method in listed:
        draw: Draw = method.draw
        name = f"{method.name}, guidance {method.guidance:g}"
        yield benchmark.row(name, method.steps, draw, amounts)


def report(
    title: str, benchmark: EmojiBenchmark, rows: Sequence[Row], amounts: Amounts | None = None
) -> Report:
    """The rows with the metrics they all have, and the settings they were made with."""
    scored = {key for row in rows for key in row.scores}
    kept = tuple(column for column in columns() if column.key in scored)
    return Report(title, kept, tuple(rows), benchmark.settings(amounts))


def sheet(
    benchmark: EmojiBenchmark, listed: Sequence[Method], count: int = 12, seed: int = 0
) -> Image.Image:
    """`count` prompts down, the methods across, the real picture first."""
    amounts = replace(Amounts(0, 0, 0, 0, 0), concepts=count, seed=seed)
    scenes = benchmark.tasks(amounts)["concept"]
    prompts = [scene.caption for scene in scenes]
    drawn = [benchmark.real(scenes), *(method.draw(prompts, seed) for method in listed)]
    labels = ["real", *(f"{m.name} {m.steps}" for m in listed)]
    return contact_sheet(np.stack(drawn, axis=1), prompts, labels)


def write(folder: str | Path, found: Report, pictures: Image.Image) -> list[Path]:
    """Write the report's JSON and table and the sheet into a folder; their paths."""
    files = [*found.write(folder), Path(folder) / "sheet.png"]
    pictures.save(files[-1])
    return files
