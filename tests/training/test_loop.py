import json

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from fewstep.errors import CheckpointError
from fewstep.training import loop
from fewstep.training.config import Data, Optimizer, Recipe, Run, TeacherPhase


def recipe(**run):
    return Recipe(
        phase="teacher",
        folder="",
        seed=3,
        data=Data(sprites=""),
        optimizer=Optimizer(lr=1e-2, warmup=4),
        run=Run(**{"steps": 12, "batch": 4, "precision": "fp32", "sheet_steps": 0} | run),
        settings=TeacherPhase(model={}, scheduler={}),
    )


class Regression:
    """Learns a fixed linear map; `stop_at` stands for a kill before that step."""

    def __init__(self, stop_at=None, nan_at=None, width=5):
        torch.manual_seed(0)
        self.net = nn.Linear(width, 3)
        self.mean = nn.Linear(width, 3).requires_grad_(False)
        self.trained, self.kept = {"net": self.net}, {"mean": self.mean}
        self.stop_at, self.nan_at = stop_at, nan_at
        self.finished = None

    def loss(self, step):
        if step == self.stop_at:
            raise KeyboardInterrupt
        draws = loop.Draws(3, step, torch.device("cpu"))
        x = draws.normal((4, self.net.in_features))
        loss = (self.net(x) - x[:, :3]).square().mean()
        return loss * float("nan") if step == self.nan_at else loss

    @torch.no_grad()
    def after_step(self):
        self.mean.weight.lerp_(self.net.weight, 0.1)

    def sheet(self):
        return Image.new("RGB", (2, 2))

    def finish(self, folder):
        self.finished = self.net.weight.detach().clone()


@pytest.fixture(autouse=True)
def often(monkeypatch):
    monkeypatch.setattr(loop.LossLog, "EVERY", 2)


def train(phase, folder, **run):
    folder.mkdir(exist_ok=True)
    loop.train_phase(phase, recipe(checkpoint_minutes=0.0, **run), folder, torch.device("cpu"))
    return phase


@pytest.mark.parametrize("stop_at", [1, 5, 8, 11])
def test_a_killed_and_resumed_run_equals_an_uninterrupted_one_bit_for_bit(tmp_path, stop_at):
    whole = train(Regression(), tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(Regression(stop_at), tmp_path / "parts")
    parts = train(Regression(), tmp_path / "parts")
    assert torch.equal(whole.finished, parts.finished)
    stored = [load_file(tmp_path / run / "checkpoint.safetensors") for run in ("whole", "parts")]
    assert stored[0].keys() == stored[1].keys()
    assert all(torch.equal(stored[0][key], stored[1][key]) for key in stored[0])


def test_training_learns_and_logs(tmp_path):
    train(Regression(), tmp_path, steps=400)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert len(lines) == 200
    assert lines[-1]["loss"] < 0.2 * lines[0]["loss"]


def test_a_resumed_log_repeats_no_step(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train(Regression(stop_at=7), tmp_path)
    train(Regression(), tmp_path)
    steps = [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert steps == [2, 4, 6, 8, 10, 12]


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_state(tmp_path):
    with pytest.raises(loop.DivergedError, match="step 6"):
        train(Regression(nan_at=5), tmp_path)
    state = load_file(tmp_path / "checkpoint.safetensors")
    assert all(tensor.isfinite().all() for tensor in state.values())


def test_a_checkpoint_of_another_network_is_refused(tmp_path):
    train(Regression(), tmp_path)
    other = Regression()
    other.trained = {"other": other.net}
    with pytest.raises(CheckpointError, match="other networks"):
        train(other, tmp_path)


def test_nothing_half_written_is_left(tmp_path):
    train(Regression(), tmp_path)
    assert not list(tmp_path.glob("*.part"))


def test_the_learning_rate_warms_up_and_ends_low():
    settings = Optimizer(lr=1.0, warmup=10, final_lr=0.1)
    rates = [loop.learning_rate(step, 100, settings) for step in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == pytest.approx(1.0)
    assert rates[-1] == pytest.approx(0.1)
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_the_average_is_in_place_within_its_context_only():
    net = nn.Linear(2, 2)
    average = loop.Average(list(net.parameters()), 0.9)
    before = net.weight.detach().clone()
    with torch.no_grad():
        net.weight.add_(1)
    with average.in_place():
        assert torch.equal(net.weight, before)
    assert torch.equal(net.weight, before + 1)
