"""The emoji benchmark of several methods: the same prompts at few steps and at many."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
from PIL import Image

from fewstep.evaluation.emoji import Amounts, Draw, EmojiBenchmark, columns
from fewstep.evaluation.methods import Method
from fewstep.evaluation.report import Report, Row
from fewstep.evaluation.sheet import contact_sheet


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
