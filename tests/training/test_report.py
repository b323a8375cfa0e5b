"""What a run tells: log, trackers, first and last words; and that a step waits for no device."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import many
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from fewstep.cli import main
from fewstep.errors import RequestError
from fewstep.training import trackers, train
from fewstep.training.batch import Batch, Condition
from fewstep.training.config import Recipe, parse_recipe
from fewstep.training.draws import Draws
from fewstep.training.loop import Average
from fewstep.training.phases import consistency
from fewstep.training.phases.consistency import Consistency
from fewstep.training.report import LossLog, Report
from fewstep.training.summary import closing

CPU = torch.device("cpu")


class Remembering:
    """A tracker that keeps what it is told."""

    opened: list[Remembering] = []  # noqa: RUF012 - of the test that runs

    def __init__(self, recipe: Recipe, folder: Path, start: int) -> None:
        self.start, self.closed = start, False
        self.told: list[tuple[int, set[str]]] = []
        self.sheets: list[int] = []
        self.opened.append(self)

    def figures(self, step: int, figures: Mapping[str, float]) -> None:
        self.told.append((step, set(figures)))

    def sheet(self, step: int, sheet: Image.Image) -> None:
        self.sheets.append(step)

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def remembering(monkeypatch: pytest.MonkeyPatch) -> list[Remembering]:
    monkeypatch.setattr(Remembering, "opened", [])
    monkeypatch.setattr(LossLog, "EVERY", 2)
    monkeypatch.setitem(trackers.TRACKERS, "tensorboard", (Remembering, "json"))
    return Remembering.opened


def report(folder: Path, start: int = 0, **run: Any) -> Report:
    return Report(many.recipe(**run), folder, start, CPU)


def feed(told: Report, steps: range) -> None:
    for done in steps:
        told.add(torch.tensor(float(done)), torch.tensor(1.0))
        if told.due(done):
            told.write(done, 1e-3)


def test_a_line_holds_means_rate_and_memory(tmp_path: Path) -> None:
    told = report(tmp_path)
    feed(told, range(1, 21))
    told.close()
    (line,) = map(json.loads, (tmp_path / "log.jsonl").read_text().splitlines())
    assert line["step"] == 20
    assert line["loss"] == pytest.approx(10.5)
    assert line.keys() == {
        "step", "loss", "grad_norm", "lr", "samples_per_second", "memory_gib"
    }  # fmt: skip
    assert line["samples_per_second"] > 0 and line["memory_gib"] > 0


def test_a_step_that_the_scaling_passes_over_leaves_the_line_valid_json(tmp_path: Path) -> None:
    told = report(tmp_path)
    for norm in (float("inf"), 1.0, 3.0):
        told.add(torch.tensor(1.0), torch.tensor(norm))
    assert told.write(3, 1e-3)["grad_norm"] == 2.0
    told.close()
    assert "Infinity" not in (tmp_path / "log.jsonl").read_text()


def test_a_resumed_report_repeats_no_step_and_passes_over_a_line_that_a_kill_cut_off(
    tmp_path: Path, remembering: list[Remembering]
) -> None:
    first = report(tmp_path, trackers=("tensorboard",))
    feed(first, range(1, 7))
    first.close()
    log = tmp_path / "log.jsonl"
    log.write_text(log.read_text() + '{"step": 8, "lo')
    second = report(tmp_path, 4, trackers=("tensorboard",))  # the last checkpoint was of step 4
    feed(second, range(5, 9))
    second.close()
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == [2, 4, 6, 8]
    assert [step for step, _ in remembering[1].told] == [6, 8]
    assert remembering[1].start == 4 and remembering[1].closed


def test_a_sheet_is_a_file_and_goes_to_the_trackers(
    tmp_path: Path, remembering: list[Remembering]
) -> None:
    told = report(tmp_path, trackers=("tensorboard",))
    told.sheet(3, Image.new("RGB", (4, 4)), "sheet.png", {"held_out_loss": 0.5})
    told.close()
    assert [path.name for path in tmp_path.glob("*.png")] == ["sheet.png"]
    assert remembering[0].sheets == [3]
    assert remembering[0].told == [(3, {"held_out_loss"})]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tensorbord", "run.trackers names 'tensorbord'.*did you mean 'tensorboard'"),
        ("mlflow", r"there are \['tensorboard', 'wandb'\]"),
        ("wandb", "pip install nowhere_to_be_found"),
    ],
)
def test_a_tracker_that_cannot_be_is_refused_before_any_work(
    name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(trackers.TRACKERS, "wandb", (Remembering, "nowhere_to_be_found"))
    made = recipe(tmp_path / "no-such-base", tmp_path, {"trackers": [name]})
    with pytest.raises(RequestError, match=message):
        train(made)
    assert list(tmp_path.iterdir()) == []


def test_tensorboard_gets_scalars_pictures_and_the_step_to_go_on_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[Any, ...]] = []

    class SummaryWriter:
        def __init__(self, folder: str, purge_step: int | None) -> None:
            calls.append(("open", folder, purge_step))

        def add_scalar(self, name: str, value: float, step: int) -> None:
            calls.append((name, value, step))

        def add_image(self, name: str, pixels: np.ndarray, step: int, dataformats: str) -> None:
            calls.append((name, pixels.shape, step, dataformats))

        def close(self) -> None:
            calls.append(("close",))

    fake: Any = ModuleType("torch.utils.tensorboard")
    fake.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake)
    board = trackers.TensorBoard(many.recipe(), tmp_path, 40)
    board.figures(60, {"loss": 0.5})
    board.sheet(60, Image.new("RGB", (5, 3)))
    board.close()
    assert calls == [
        ("open", str(tmp_path / "tensorboard"), 41),
        ("loss", 0.5, 60),
        ("sheet", (3, 5, 3), 60, "HWC"),
        ("close",),
    ]


def test_wandb_goes_on_with_the_run_that_it_began(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[dict[str, Any]] = []

    def init(**options: Any) -> Any:
        begun.append(options)
        return ModuleType("run")

    fake: Any = ModuleType("wandb")
    fake.init, fake.Image = init, lambda picture: picture
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for start in (0, 40, 0):
        trackers.WeightsAndBiases(many.recipe(), tmp_path, start)
    first, second, afresh = (options["id"] for options in begun)
    assert first == second != afresh
    assert begun[0]["config"]["run"]["batch"] == 8

    def refuse(**options: Any) -> Any:
        raise OSError("no key")

    fake.init = refuse
    with pytest.raises(RequestError, match=r"did not start \(no key\).*WANDB_MODE=offline"):
        trackers.WeightsAndBiases(many.recipe(), tmp_path, 0)


# ── with a model ──


class Synthetic:
    """Twelve random latents and texts on the device that is asked for."""

    held_out = np.array([10, 11])

    def __init__(self, recipe: Recipe, pipe: Any) -> None:
        self.channels, self.width = pipe.unet.config.in_channels, 32
        self.empty = Condition(torch.zeros(1, 16, self.width))
        self.counts = type("Counts", (), {"numbers": {"kept": 12}})()

    def __len__(self) -> int:
        return 12

    def rows(self, step: int, batch: int) -> np.ndarray:
        return np.arange(batch) % 10

    def batch(self, rows: np.ndarray, draws: Draws) -> Batch:
        z = draws.normal((self.channels, 8, 8))
        return Batch(z, Condition(draws.normal((16, self.width))))


@pytest.fixture
def synthetic(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(consistency, "open_set", Synthetic)


def recipe(
    base: Path, folder: Path, /, run: dict[str, Any] | None = None, **settings: Any
) -> Recipe:
    if "lora" in settings:
        settings |= {"guidance_dim": 0, "target": "stopgrad"}
    sheet = {"prompts": ["a cat"], "steps": [1], "teacher_steps": 1, "guidance_scale": 1.0}
    return parse_recipe(
        {
            "phase": "consistency",
            "folder": str(folder),
            "seed": 3,
            "data": {"source": "folder", "path": "my pictures", "resolution": 64},
            "optimizer": {"lr": 1e-3, "warmup": 1},
            "run": {"steps": 2, "batch": 4, "precision": "fp32", "device": "cpu", "sheet_steps": 0}
            | (run or {}),
            "consistency": {"base": str(base), "guidance_dim": 16, "sheet": sheet} | settings,
        },
        "test",
    )


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"lora": {"rank": 2}, "endpoint": "phases"},
        {"endpoint": "sampled", "solver": "dpm_solver_pp_2s"},
    ],
)
def test_a_step_reads_nothing_back_from_the_device(
    settings: dict[str, Any],
    sd_folder: Path,
    tmp_path: Path,
    synthetic: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The meta device has no numbers to read: whatever would wait for a GPU raises there."""
    phase = Consistency(recipe(sd_folder, tmp_path, **settings), CPU)
    meta = torch.device("meta")
    for network in (phase.base, phase.student, phase.target):
        network.to(meta)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # it has none there
    phase.device = meta
    table = phase.schedule.alphas_cumprod.to(meta)
    object.__setattr__(phase.schedule, "alphas_cumprod", table)  # unchecked: that reads it
    phase.data.empty = Condition(phase.data.empty.text.to(meta))
    parameters = [p for p in phase.student.parameters() if p.requires_grad]
    average = Average(parameters, 0.9)
    loss = phase.loss(1, range(4))
    loss.backward()
    norm = nn.utils.clip_grad_norm_(parameters, 1.0)
    average.update(1)
    phase.after_step(1)
    assert norm.is_meta
    with pytest.raises(RuntimeError, match="meta"):
        loss.item()


def test_the_first_words_say_what_is_trained_on_what_by_which_method_for_how_long(
    sd_folder: Path, tmp_path: Path, synthetic: None, capsys: pytest.CaptureFixture[str]
) -> None:
    train(recipe(sd_folder, tmp_path, {"steps": 5}, lora={"rank": 2}))
    out, err = capsys.readouterr()
    (first,) = [line for line in err.splitlines() if line.startswith("training ")]
    for part in (
        f"a LoRA of rank 2 for {sd_folder}",
        "latent consistency distillation",
        "on 10 samples of my pictures: 5 steps of 4 samples, each 2.0 times",
        str(tmp_path / "consistency"),
    ):
        assert part in first
    assert out == ""


@pytest.mark.parametrize("settings", [{}, {"lora": {"rank": 2}}, {"endpoint": "sampled"}])
def test_the_last_words_hold_a_command_that_draws(
    settings: dict[str, Any],
    sd_folder: Path,
    tmp_path: Path,
    synthetic: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    train(recipe(sd_folder, tmp_path / "run", **settings))
    command = capsys.readouterr().err.splitlines()[-1].partition("draw with it: ")[2]
    words = shlex.split(command)
    assert words[:2] == ["fewstep", "generate"]
    assert main([*words[1:], "--size", "64", "--out", str(tmp_path / "made.png")]) == 0
    with Image.open(tmp_path / "made.png") as picture:
        assert picture.size == (64, 64)


def test_what_a_command_cannot_draw_the_card_tells_how_to(tmp_path: Path) -> None:
    made = recipe(tmp_path, tmp_path, lora={"rank": 2}, endpoint="phases")
    assert list(closing(made))[-1].endswith("lora/README.md has a script")
    made = replace(made, phase="teacher", settings=many.recipe().settings)
    assert len(list(closing(made))) == 1
