"""`fewstep evaluate`: an emoji model, and its teacher if given, judged on the emoji benchmark."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from ..errors import RequestError
from ..evaluation.compare import compare, methods, report, sheet, write
from ..evaluation.emoji import Amounts, EmojiBenchmark
from ..evaluation.report import Row
from . import drawing


@dataclass(frozen=True)
class Plan:
    """What is judged, and on what."""

    sprites: Path
    output: Path
    cache: Path
    model: str | None = None
    teacher: str | None = None
    steps: Sequence[int] = (1, 2, 4, 8)
    teacher_steps: int = 50
    guidance: float | None = None
    teacher_guidance: float = 3.0
    selection: str = "objects512"
    prompts: int | None = None  # of each kind at most; None: the benchmark's own numbers
    device: str = "auto"


def evaluate(plan: Plan) -> None:
    """Writes the report and the sheet into `plan.output` and prints the table."""
    if plan.output.exists() and not plan.output.is_dir():
        raise RequestError(f"--output {plan.output}: exists and is no folder; give a folder")
    model = drawing.load(plan.model, device=plan.device, dtype="auto")
    if not model.pipe.is_embedded:
        raise RequestError(f"--model {model.model.id}: is no guidance-distilled LCM; give one")
    teacher = None
    if plan.teacher is not None:
        teacher = drawing.load(plan.teacher, device=plan.device, dtype="auto").pipe
    benchmark = EmojiBenchmark.prepare(
        plan.sprites, plan.cache, size=model.native_size[0], selection=plan.selection
    )
    listed = methods(
        model.pipe,
        teacher,
        guidance=model.defaults[1] if plan.guidance is None else plan.guidance,
        teacher_guidance=plan.teacher_guidance,
        steps=plan.steps,
        teacher_steps=plan.teacher_steps,
    )
    amounts = amounts_of(plan.prompts)
    rows: list[Row] = []
    with tqdm(total=len(listed) + 1, unit="row", desc="evaluate") as bar:
        for row in compare(benchmark, listed, amounts):
            rows.append(row)
            bar.update()
    found = report(f"{model.model.id}, {benchmark.judges.size} px", benchmark, rows, amounts)
    files = write(plan.output, found, sheet(benchmark, listed))
    print(found.markdown())
    print("\n".join(map(str, files)))


def amounts_of(most: int | None) -> Amounts:
    """The benchmark's numbers of prompts, each at most `most`."""
    usual = Amounts()
    if most is None:
        return usual
    kinds = ("backgrounds", "recolours", "pairs", "counts")
    return Amounts(concepts=most, **{kind: min(most, getattr(usual, kind)) for kind in kinds})
