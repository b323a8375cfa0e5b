"""The loop on a toy: resuming, logging, diverging, stopping, averaging."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import many
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from fewstep.errors import CheckpointError
from fewstep.training import loop
from fewstep.training.config import Optimizer
from fewstep.training.draws import Draws
from fewstep.training.interruption import StoppedError


class Regression(loop.Phase):
    """Learns a fixed linear map; `stop_at` stands for a kill before that step."""

    def __init__(
        self, stop_at: int | None = None, nan_at: int | None = None, term_at: int | None = None
    ) -> None:
        torch.manual_seed(0)
        self.net = nn.Linear(5, 3)
        self.mean = nn.Linear(5, 3).requires_grad_(False)
        self.trained: dict[str, nn.Module] = {"net": self.net}
        self.kept: dict[str, nn.Module] = {"mean": self.mean}
        self.stop_at, self.nan_at, self.term_at = stop_at, nan_at, term_at
        self.finished: Tensor | None = None

    def loss(self, step: int, part: range) -> Tensor:
        if step == self.stop_at:
            raise KeyboardInterrupt
        if step == self.term_at:
            os.kill(os.getpid(), signal.SIGTERM)
        x = Draws(3, step, part).normal((self.net.in_features,))
        loss = (self.net(x) - x[:, :3]).square().mean()
        return loss * float("nan") if step == self.nan_at else loss

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        self.mean.weight.lerp_(self.net.weight, 0.1)

    def show(self) -> tuple[Image.Image, dict[str, float]]:
        return Image.new("RGB", (2, 2)), {"figure": 0.5}

    def finish(self, folder: Path, figures: Mapping[str, float]) -> None:
        self.finished = self.net.weight.detach().clone()
        self.figures = dict(figures)


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop.LossLog, "EVERY", 2)


def train(phase: Regression, folder: Path, **run: Any) -> Regression:
    folder.mkdir(exist_ok=True)
    made = many.recipe(**{"batch": 4, "checkpoint_minutes": 0.0} | run)
    loop.train_phase(phase, made, folder, torch.device("cpu"))
    return phase


@pytest.mark.parametrize("stop_at", [1, 5, 8, 11])
def test_a_killed_and_resumed_run_equals_an_uninterrupted_one_bit_for_bit(
    tmp_path: Path, stop_at: int
) -> None:
    whole = train(Regression(), tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(Regression(stop_at), tmp_path / "parts")
    parts = train(Regression(), tmp_path / "parts")
    assert whole.finished is not None and parts.finished is not None
    assert torch.equal(whole.finished, parts.finished)
    stored = [load_file(tmp_path / run / "checkpoint.safetensors") for run in ("whole", "parts")]
    assert stored[0].keys() == stored[1].keys()
    assert all(torch.equal(stored[0][key], stored[1][key]) for key in stored[0])


def test_training_learns_and_logs(tmp_path: Path) -> None:
    train(Regression(), tmp_path, steps=400)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert len(lines) == 200
    assert lines[-1]["loss"] < 0.2 * lines[0]["loss"]


def test_a_resumed_log_repeats_no_step(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(Regression(stop_at=7), tmp_path)
    train(Regression(), tmp_path)
    steps = [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert steps == [2, 4, 6, 8, 10, 12]


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_state(
    tmp_path: Path,
) -> None:
    with pytest.raises(loop.DivergedError, match="step 6"):
        train(Regression(nan_at=5), tmp_path)
    state = load_file(tmp_path / "checkpoint.safetensors")
    assert all(tensor.isfinite().all() for tensor in state.values())


def test_a_checkpoint_of_another_network_is_refused(tmp_path: Path) -> None:
    train(Regression(), tmp_path)
    other = Regression()
    other.trained = {"other": other.net}
    with pytest.raises(CheckpointError, match="other networks"):
        train(other, tmp_path)


def test_nothing_half_written_is_left(tmp_path: Path) -> None:
    train(Regression(), tmp_path, sheet_steps=6)
    names = ["checkpoint.safetensors", "log.jsonl", "sheet-000006.png", "sheet.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names


def test_the_figures_of_the_last_sheet_reach_the_result_and_the_log(tmp_path: Path) -> None:
    phase = train(Regression(), tmp_path, sheet_steps=6)
    assert phase.figures == {"figure": 0.5}
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "figure" in line] == [6, 12]


def test_sigterm_ends_the_run_after_its_step_with_a_checkpoint(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(StoppedError, match="after step 6 of 12"):
        train(Regression(term_at=5), tmp_path / "parts", checkpoint_minutes=60.0)
    assert signal.getsignal(signal.SIGTERM) is before
    parts, whole = train(Regression(), tmp_path / "parts"), train(Regression(), tmp_path / "whole")
    assert whole.finished is not None and parts.finished is not None
    assert torch.equal(whole.finished, parts.finished)


def test_a_constant_rate_stays_after_its_warm_up() -> None:
    settings = Optimizer(lr=1.0, warmup=2, schedule="constant")
    assert [loop.learning_rate(step, 9, settings) for step in range(9)] == [0.5] + [1.0] * 8


def test_the_learning_rate_warms_up_and_ends_low() -> None:
    settings = Optimizer(lr=1.0, warmup=10, final_lr=0.1)
    rates = [loop.learning_rate(step, 100, settings) for step in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == pytest.approx(1.0)
    assert rates[-1] == pytest.approx(0.1)
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_the_average_is_in_place_within_its_context_only() -> None:
    net = nn.Linear(2, 2)
    average = loop.Average(list(net.parameters()), 0.9)
    before = net.weight.detach().clone()
    with torch.no_grad():
        net.weight.add_(1)
    with average.in_place():
        assert torch.equal(net.weight, before)
    assert torch.equal(net.weight, before + 1)


def test_the_first_ctrl_c_asks_and_the_second_insists() -> None:
    from fewstep.training.interruption import stopping

    # A shell's background jobs, as some test machines run them, ignore Ctrl-C from the start.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with stopping() as stopped:
            os.kill(os.getpid(), signal.SIGINT)
            assert stopped()
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
