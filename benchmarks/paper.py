"""The LCM paper's tables in small: on the embedded model's world, with a budget that you choose.

    python benchmarks/paper.py --sprites runs/emoji --runs runs/paper --output docs/paper

Distils the embedded model's teacher many times, always with the same small budget, and judges
what comes out by the emoji benchmark. Four questions, of Luo et al. (2023) and of those after them:

    table 1    LCM, DDIM and DPM-Solver++ at 1, 2, 4 and 8 steps
    figure 3   the skipping step k = 1, 5, 20, 50, and the order of the solver
    figure 4   the guidance scale, at 1, 2, 4 and 8 steps
    methods    LCD, LCM-LoRA, PCM, TCD and fine-tuning, side by side

What was interrupted goes on: trainings from their checkpoints, rows from `rows.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from fewstep import EMBEDDED, DiffusionPipeline, schedulers
from fewstep.evaluation.emoji import Amounts, EmojiBenchmark
from fewstep.evaluation.methods import Method, sampled_by
from fewstep.evaluation.plot import Series, figure
from fewstep.evaluation.sheet import contact_sheet
from fewstep.pipelines.embedded import embedded_teacher
from fewstep.training import load_recipe, train
from fewstep.training.card import sampler
from fewstep.training.config import ConsistencyPhase

STEPS = (1, 2, 4, 8)
SAME_STYLE = 'data.mix.styles=[["3d", 1.0]]'  # fine-tuning that has nothing new to learn
GUIDANCE = 4.0
TEACHER_GUIDANCE = 3.0
# The paper's k, as steps of the grid 1000 / k; with DDIM, and where the order of a solver may tell.
SKIPS = (
    ("ddim", 1),
    ("ddim", 5),
    ("ddim", 20),
    ("ddim", 50),
    ("dpm_solver_pp_2s", 20),
    ("dpm_solver_pp_2s", 50),
)
RECALL, KID = "recall@1/trained/efficientnet-lite0", "kid/efficientnet-lite0"
PROMPTS = [
    "a red apple",
    "a dog",
    "a house",
    "a rocket",
    "a fish",
    "a mushroom",
    "a penguin",
    "a car",
]

Row = dict[str, Any]


class Experiments:
    """Trained models and judged rows, both kept from run to run."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.given = given
        self.benchmark = EmojiBenchmark.prepare(given.sprites, given.cache)
        self.amounts = Amounts(given.prompts, 0, 0, 0, 0)
        self.file = given.output / "rows.json"
        self.rows: dict[str, Row] = {}
        if self.file.exists():
            self.rows = json.loads(self.file.read_text())

    def trained(self, recipe: str, name: str, *changes: str) -> Any:
        """The pipeline of a recipe trained with this budget, in a folder of its own."""
        overrides = [
            f"data.sprites={json.dumps(str(self.given.sprites))}",
            f"run.steps={self.given.steps}",
            "run.sheet_steps=0",
            f"run.threads={self.given.threads}",
            f"name={name}",
            *changes,
        ]
        made = load_recipe(recipe, overrides)
        folder = self.given.runs / name
        result = folder / ("pipeline" if made.settings.lora is None else "lora")
        began = time.monotonic()
        if not result.is_dir():
            train(made, output=self.given.runs)
            (folder / "minutes").write_text(f"{(time.monotonic() - began) / 60:.1f}")
        return self.load(result, made.settings)

    def load(self, result: Path, settings: ConsistencyPhase) -> Any:
        """The pipeline of a finished run."""
        if settings.lora is None:
            pipe: Any = DiffusionPipeline.from_pretrained(result)
        else:
            embedded = settings.base == "embedded"
            pipe = DiffusionPipeline.from_pretrained(EMBEDDED) if embedded else embedded_teacher()
            name, own = sampler(settings)
            pipe.scheduler = getattr(schedulers, name).from_config(pipe.scheduler.config, **own)
            pipe.load_lora_weights(result)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def row(self, name: str, pipe: Callable[[], Any], steps: int, guidance: float) -> Row:
        """The scores of a pipeline, judged now unless they are known."""
        key = f"{name}, {steps} steps, guidance {guidance:g}"
        if key not in self.rows:
            method = Method(name, pipe(), steps, guidance)
            began = time.monotonic()
            scores = self.benchmark.score(method.draw, self.amounts)
            found = {"recall": 100 * scores[RECALL], "kid": 1000 * scores[KID]}
            seconds = time.monotonic() - began
            self.rows[key] = {"name": name, "steps": steps, "guidance": guidance} | found
            print(f"{key}: recall {found['recall']:.1f}, KID {found['kid']:.0f} ({seconds:.0f} s)")
            part = self.file.with_suffix(".part")
            part.write_text(json.dumps(self.rows, indent=1) + "\n")
            os.replace(part, self.file)
        return self.rows[key]


def once(make: Callable[[], Any]) -> Callable[[], Any]:
    """`make`, called when its value is first needed."""
    made: list[Any] = []

    def value() -> Any:
        if not made:
            made.append(make())
        return made[0]

    return value


def table(rows: Iterable[Row], label: Callable[[Row], str]) -> str:
    """Markdown: a line for each label, recall and KID at each number of steps."""
    lines: dict[str, dict[int, Row]] = {}
    for row in rows:
        lines.setdefault(label(row), {})[row["steps"]] = row
    steps = sorted({n for line in lines.values() for n in line})
    heads = [f"{figure} {n}" for figure in ("recall", "KID") for n in steps]
    text = f"| | {' | '.join(heads)} |\n|---|{'---|' * len(heads)}\n"
    for name, line in lines.items():
        cells = [f"{line[n]['recall']:.0f}" if n in line else "-" for n in steps]
        cells += [f"{line[n]['kid']:.0f}" if n in line else "-" for n in steps]
        text += f"| {name} | {' | '.join(cells)} |\n"
    return text


def panels(rows: list[Row], x: str, label: Callable[[Row], str]) -> Image.Image:
    """Recall and KID over `x`, a line for each label."""
    drawn: dict[str, list[Series]] = {}
    for title, metric in (
        ("recall@1 (higher is better)", "recall"),
        ("KID (lower is better)", "kid"),
    ):
        lines: dict[str, list[tuple[float, float]]] = {}
        for row in rows:
            lines.setdefault(label(row), []).append((row[x], row[metric]))
        drawn[title] = [Series(name, tuple(sorted(points))) for name, points in lines.items()]
    return figure(drawn, {"guidance": "guidance scale", "k": "skipping step k"}.get(x, x))


def sheet(made: Mapping[str, Callable[[], Any]], asked: Mapping[str, tuple[int, float]]) -> Any:
    """The same prompts by several pipelines, from the same noise."""
    drawn = [Method(n, make(), *asked[n]).draw(PROMPTS, 0) for n, make in made.items()]
    labels = [f"{name} {asked[name][0]}" for name in made]
    return contact_sheet(np.stack(drawn, axis=1), PROMPTS, labels)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sprites", type=Path, required=True, help="of `fewstep data emoji`")
    parser.add_argument("--runs", type=Path, default=Path("runs/paper"))
    parser.add_argument("--output", type=Path, default=Path("docs/paper"))
    parser.add_argument("--cache", type=Path, default=Path("~/.cache/fewstep/evaluation"))
    parser.add_argument("--steps", type=int, default=150, help="of each training, 32 samples each")
    parser.add_argument("--prompts", type=int, default=96)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    given = parser.parse_args()
    given.cache = given.cache.expanduser()
    given.output.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(given.threads)
    run = Experiments(given)

    teacher = once(embedded_teacher)
    samplers = {name: once(lambda n=name: sampled_by(teacher(), n)) for name in ("ddim", "dpm++")}
    lcd = once(lambda: run.trained("emoji64_lcd", "lcd"))
    first = [run.row("LCM", lcd, n, GUIDANCE) for n in STEPS]
    for name, pipe in samplers.items():
        label = name.upper()
        first += [run.row(f"teacher, {label}", pipe, n, TEACHER_GUIDANCE) for n in STEPS]
    first.append(run.row("teacher, DDIM", samplers["ddim"], 50, TEACHER_GUIDANCE))

    guided = [run.row("LCM", lcd, n, w) for w in (2.0, 4.0, 8.0) for n in STEPS]

    skips = []
    for solver, k in SKIPS:
        changes = [f"consistency.grid_steps={1000 // k}", f"consistency.solver={solver}"]
        name = "lcd" if (solver, k) == ("ddim", 20) else f"k{k}-{solver}"
        pipe = once(lambda n=name, c=changes: run.trained("emoji64_lcd", n, *c))
        label = "LCM" if name == "lcd" else f"k={k}, {solver}"
        skips.append(run.row(label, pipe, 4, GUIDANCE) | {"k": k, "solver": solver})

    methods = {
        "LCD": (lcd, GUIDANCE),
        "LCM-LoRA": (once(lambda: run.trained("emoji64_lcm_lora", "lcm_lora")), 1.0),
        "PCM-LoRA": (once(lambda: run.trained("emoji64_pcm_lora", "pcm_lora")), TEACHER_GUIDANCE),
        "TCD-LoRA": (once(lambda: run.trained("emoji64_tcd_lora", "tcd_lora")), 1.0),
        "LCF": (
            once(lambda: run.trained("emoji64_lcf_flat", "lcf_same", SAME_STYLE)),
            GUIDANCE,
        ),
    }
    side = [
        run.row("LCM" if name == "LCD" else name, pipe, n, w)
        for name, (pipe, w) in methods.items()
        for n in STEPS
    ]

    panels(first, "steps", lambda row: row["name"]).save(given.output / "table1.png")
    panels(skips, "k", lambda row: row["solver"]).save(given.output / "figure3.png")
    panels(guided, "guidance", lambda row: f"{row['steps']} steps").save(
        given.output / "figure4.png"
    )
    drawn = {name: pipe for name, (pipe, _) in methods.items()}
    asked = {name: (4, w) for name, (_, w) in methods.items()}
    sheet(drawn, asked).save(given.output / "methods.png")
    text = "\n".join(
        [
            f"Every training: {given.steps} steps of 32 samples. {given.prompts} prompts of the "
            "512 trained concepts. Recall@1 in per cent (EffLite0 probe), KID-EffLite0 x1000.\n",
            "### Table 1: few steps\n",
            table(first, lambda row: row["name"]),
            "### Figure 3: the skipping step, judged at 4 steps\n",
            table(skips, lambda row: f"k = {row['k']}, {row['solver']}"),
            "### Figure 4: the guidance scale\n",
            table(guided, lambda row: f"guidance {row['guidance']:g}"),
            "### Methods side by side\n",
            table(side, lambda row: "LCD" if row["name"] == "LCM" else row["name"]),
        ]
    )
    (given.output / "figures.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
