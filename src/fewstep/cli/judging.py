"""What `fewstep evaluate` does: reads and checks everything, judges, writes the report."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..errors import FewstepError, RequestError
from ..evaluation.benchmark import PictureBenchmark, check_amounts
from ..evaluation.compare import compare, report, sheet
from ..evaluation.emoji import Amounts, EmojiBenchmark
from ..evaluation.features import FEATURE_NETS
from ..evaluation.judges import Judges
from ..evaluation.methods import Method, check_samplers, methods
from ..evaluation.plot import figures
from ..evaluation.ranks import Ranks
from ..evaluation.references import References
from ..evaluation.report import Report, Row
from ..evaluation.stored import compare_stored
from . import drawing
from .drawing import Loaded
from .files import check_writable
from .generate import size_of

EMOJI_TEACHER_GUIDANCE = 3.0

# How errors call what the command line calls otherwise; they open with it.
CALLED = {
    "reference": "--reference",
    "features": "--features",
    "prompts": "--prompts",
    "compare": "--compare",
    "kid_subset": "--kid-subset",
    "CLIP model": "--clip",
    "unknown feature network": "--extractors: unknown network",
}
DRAWS = ("reference", "sprites")
# Options that have a meaning only with some of --reference, --sprites and --features.
MEANS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("model", "teacher", "steps", "guidance", "compare", "teacher_steps"), DRAWS),
    **dict.fromkeys(("teacher_guidance", "prompts"), DRAWS),
    **dict.fromkeys(("batch", "seed", "size", "extractors", "clip"), ("reference",)),
    "kid_subset": ("reference", "features"),
    "selection": ("sprites",),
}


@dataclass(frozen=True)
class Plan:
    """What is judged, and by what; None is the default of the way of judging."""

    output: Path
    cache: Path
    model: str | None = None
    reference: Path | None = None
    sprites: Path | None = None
    features: Path | None = None
    steps: Sequence[int] | None = None
    guidance: Sequence[float] | None = None
    teacher: str | None = None
    compare: Sequence[str] | None = None
    teacher_steps: int | None = None
    teacher_guidance: float | None = None
    prompts: int | None = None
    batch: int | None = None
    seed: int | None = None
    size: tuple[int, int] | None = None
    extractors: Sequence[str] | None = None
    clip: str | None = None
    kid_subset: int | None = None
    selection: str | None = None
    device: str = "auto"

    @property
    def way(self) -> str:
        """By what is judged. RequestError unless it is one thing."""
        ways = [way for way in (*DRAWS, "features") if getattr(self, way) is not None]
        if len(ways) != 1:
            given = " and ".join(f"--{way}" for way in ways) or "none of them"
            raise RequestError(
                f"evaluate needs one of --reference, --sprites and --features, got {given}"
            )
        return ways[0]


def evaluate(plan: Plan) -> None:
    """Writes the report, plots and the sheet into `plan.output` and prints the table."""
    check(plan)
    judge = {"reference": by_reference, "sprites": by_sprites, "features": by_features}[plan.way]
    try:
        with called(CALLED):
            judge(plan)
    except KeyboardInterrupt:
        print("interrupted: the same command goes on from what is kept", file=sys.stderr)
        raise


def check(plan: Plan) -> None:
    """Refuses options that have no meaning together, before anything is read."""
    for name, ways in MEANS.items():
        if getattr(plan, name) is not None and plan.way not in ways:
            option = "MODEL" if name == "model" else f"--{name.replace('_', '-')}"
            others = " or ".join(f"--{way}" for way in ways)
            raise RequestError(f"{option}: has a meaning only with {others}; leave it out")
    for name in ("compare", "teacher_steps", "teacher_guidance"):
        if getattr(plan, name) is not None and plan.teacher is None:
            raise RequestError(f"--{name.replace('_', '-')}: needs a --teacher")
    if plan.way != "reference" and Ranks.planned() > 1:
        raise RequestError(f"--{plan.way}: is judged by one process; run it without torchrun")
    with called(CALLED):
        check_samplers(plan.compare or ())
    if plan.output.exists() and not plan.output.is_dir():
        raise RequestError(f"--output {plan.output}: exists and is no folder; give a folder")
    check_writable(plan.output, "--output")


@contextmanager
def called(names: dict[str, str]) -> Iterator[None]:
    """Errors of fewstep's that open with one of `names` call it as the command line does."""
    try:
        yield
    except FewstepError as error:
        opening = "|".join(map(re.escape, names))
        text = re.sub(rf"^({opening})\b", lambda found: names[found[0]], str(error))
        raise type(error)(text) from error


def by_reference(plan: Plan) -> None:
    """Any model against reference pictures; under torchrun the ranks share the work."""
    assert plan.reference is not None
    drawing.quiet_transformers()
    ranks = Ranks.of_environment()
    references = References.read(plan.reference)
    check_amounts(references, plan.prompts or len(references), plan.kid_subset)
    _ = references.hash  # decodes every picture
    device = device_of(plan.device, ranks)
    judges = Judges.load(plan.extractors or tuple(FEATURE_NETS), clip=plan.clip, device=device)
    model = load(plan.model, "MODEL", device)
    listed = listed_methods(plan, model, device)
    size = size_of(plan.size, model, None)
    bar = tqdm(unit="picture", desc="evaluate", mininterval=1, disable=not ranks.is_first)
    benchmark = PictureBenchmark(
        references,
        judges,
        plan.cache,
        size=size,
        prompts=plan.prompts,
        batch=plan.batch or 8,
        seed=plan.seed or 0,
        subset=plan.kid_subset,
        ranks=ranks,
        advance=bar.update,
    )
    bar.reset((len(references) + len(benchmark.prompts) * len(listed)) // ranks.count)
    with bar:
        rows = [benchmark.reference_row(), *(benchmark.row(method) for method in listed)]
    if ranks.is_first:
        found = benchmark.report(model.model.id, rows)
        tell(found, plan.output, {**figures(found), "sheet": benchmark.sheet()})
    ranks.close()


def by_sprites(plan: Plan) -> None:
    """An emoji model by the emoji benchmark."""
    assert plan.sprites is not None
    model = load(plan.model, "MODEL", plan.device)
    if not model.pipe.is_embedded:
        raise RequestError(f"MODEL {model.model.id}: is no guidance-distilled LCM; give one")
    listed = listed_methods(plan, model, plan.device)
    benchmark = EmojiBenchmark.prepare(
        plan.sprites,
        plan.cache,
        size=model.native_size[0],
        selection=plan.selection or "objects512",
    )
    amounts = amounts_of(plan.prompts)
    rows: list[Row] = []
    with tqdm(total=len(listed) + 1, unit="row", desc="evaluate") as bar:
        for row in compare(benchmark, listed, amounts):
            rows.append(row)
            bar.update()
    found = report(f"{model.model.id}, {benchmark.judges.size} px", benchmark, rows, amounts)
    tell(found, plan.output, {"sheet": sheet(benchmark, listed)})


def by_features(plan: Plan) -> None:
    """Features that were made elsewhere."""
    assert plan.features is not None
    tell(compare_stored(plan.features, subset=plan.kid_subset), plan.output, {})


def tell(found: Report, folder: Path, pictures: dict[str, Any]) -> None:
    """Writes all and prints the table and the files."""
    files = found.write(folder, pictures=pictures)
    print(found.markdown())
    print("\n".join(map(str, files)))


def device_of(name: str, ranks: Ranks) -> str:
    """The device of this rank: of several GPUs its own."""
    if name != "auto" or ranks.count == 1:
        return str(drawing.resolve_device(name))
    kind = drawing.resolve_device("auto").type
    return f"cuda:{ranks.local}" if kind == "cuda" else kind


def load(name: str | None, option: str, device: str) -> Loaded:
    """A model, whose errors name the option it was given by."""
    with called({"--model": option}):
        return drawing.load(name, device=device, dtype="auto")


def listed_methods(plan: Plan, model: Loaded, device: str) -> list[Method]:
    """The model and, if there is one, its teacher at the steps and guidance that are asked for."""
    teacher = None if plan.teacher is None else load(plan.teacher, "--teacher", device)
    teacher_guidance = plan.teacher_guidance
    if teacher_guidance is None:
        own = teacher is not None and plan.sprites is None
        teacher_guidance = teacher.defaults[1] if teacher and own else EMOJI_TEACHER_GUIDANCE
    return methods(
        model.pipe,
        teacher and teacher.pipe,
        guidance=plan.guidance or (model.defaults[1],),
        teacher_guidance=teacher_guidance,
        steps=plan.steps or (1, 2, 4, 8),
        teacher_steps=plan.teacher_steps or 50,
        compare=plan.compare or ("ddim",),
    )


def amounts_of(most: int | None) -> Amounts:
    """The benchmark's numbers of prompts, each at most `most`."""
    usual = Amounts()
    if most is None:
        return usual
    kinds = ("backgrounds", "recolours", "pairs", "counts")
    return Amounts(concepts=most, **{kind: min(most, getattr(usual, kind)) for kind in kinds})
