"""Several processes give what one gives: losses, weights, averages, moments, checkpoints."""

from __future__ import annotations

import json
import os
import shutil
import signal
from functools import partial
from pathlib import Path
from typing import Any

import conftest
import many
import pytest
import torch
from safetensors.torch import load_file

from fewstep import DiffusionPipeline, UNet2DConditionModel
from fewstep.errors import CheckpointError, RequestError
from fewstep.training import run
from fewstep.training.convert import convert_run
from fewstep.training.interruption import StoppedError
from fewstep.training.parallel import check_shard
from fewstep.training.phases.consistency import Consistency
from fewstep.training.ranks import Ranks
from fewstep.training.report import LossLog
from fewstep.training.state import NAME, newest, read_weights

ADAPTERS = {"rank": 4, "alpha": 4.0, "targets": ["to_q", "ff.net.2", "conv1"]}
METHODS: dict[str, dict[str, Any]] = {
    "LoRA": {"lora": ADAPTERS, "guidance_dim": 0, "target": "stopgrad"},
    "full, EMA target": {"guidance_dim": 16, "target": "ema"},
}
FULL = METHODS["full, EMA target"]
OFTEN = {"checkpoint_minutes": 0.0}
SPREAD = OFTEN | {"shard": True, "gradient_checkpointing": True, "sheet_steps": 2}
WAYS: dict[str, tuple[int, dict[str, Any]]] = {
    "alone": (1, OFTEN),
    "two": (2, OFTEN | {"accumulate": 2}),
    "spread": (2, SPREAD),
}


def every_step(work: Any, *arguments: Any) -> None:
    """Figures and checkpoints after every step, and no estimate of the whole."""
    LossLog.EVERY = 1
    run.foresee = lambda *_: None  # type: ignore[assignment]
    work(*arguments)


def losses(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def assert_same(one: Path, other: Path, atol: float = 1e-6) -> None:
    """Losses of every step, Adam's moments, and so the gradients; and all but a few weights.

    Where a gradient is almost zero, Adam's quotient makes rounding visible.
    """
    a, b = load_file(one / NAME), load_file(other / NAME)
    assert a.keys() == b.keys()
    assert losses(one) == pytest.approx(losses(other), abs=atol)
    kinds = {key.partition("/")[0] for key in a}
    for kind in kinds:
        keys = [key for key in a if key.startswith(f"{kind}/")]
        off = torch.cat([(a[key] - b[key]).abs().flatten() for key in keys])
        assert (off > atol).float().mean() <= (0 if kind == "optimizer" or not atol else 2e-3), kind


def toy(folder: Path, **how: Any) -> Any:
    return partial(every_step, partial(many.train_toy, folder, **how))


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy, trained by one process."""
    folder = tmp_path_factory.mktemp("toy") / "alone"
    assert many.together(1, toy(folder)) == [0]
    return folder


@pytest.mark.parametrize("accumulate", [1, 2])
def test_two_processes_train_two_networks_as_one_does(
    alone: Path, tmp_path: Path, accumulate: int
) -> None:
    assert many.together(2, toy(tmp_path / "two", accumulate=accumulate)) == [0, 0]
    assert len(losses(alone)) == 12
    assert_same(alone, tmp_path / "two")


def test_a_batch_that_is_not_averaged_over_the_processes_differs(
    alone: Path, tmp_path: Path
) -> None:
    """The control: half the batch alone gives other weights."""
    assert many.together(1, toy(tmp_path / "half", batch=4)) == [0]
    with pytest.raises(AssertionError):
        assert_same(alone, tmp_path / "half")


# ── a real phase ──


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return many.pictures(tmp_path_factory.mktemp("data") / "pictures")


def train_student(base: Path, data: Path, folder: Path, settings: Any, how: Any) -> None:
    every_step(run.train, many.student(base, data, folder, settings, **how))


@pytest.fixture(scope="module")
def base(sd_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline whose UNet has one level: spreading costs time for each tensor."""
    torch.manual_seed(4)
    pipe = DiffusionPipeline.from_pretrained(sd_folder)
    level = {"down_block_types": ("CrossAttnDownBlock2D",), "block_out_channels": (8,)}
    config = conftest.UNET | level | {"up_block_types": ("CrossAttnUpBlock2D",)}
    pipe.register_modules(unet=UNet2DConditionModel(**config))
    folder = tmp_path_factory.mktemp("base") / "pipeline"
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def students(
    base: Path, data: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Path]]:
    """The folders of every method, trained in every way."""
    root = tmp_path_factory.mktemp("students")
    for method, settings in METHODS.items():
        for way, (count, how) in WAYS.items():
            job = (base, data, root / method / way, settings, how)
            assert many.together(count, train_student, *job) == [0] * count
    return {m: {w: root / m / w / "consistency" for w in WAYS} for m in METHODS}


@pytest.mark.parametrize("way", ["two", "spread"])
@pytest.mark.parametrize("method", METHODS)
def test_two_processes_distil_as_one_does(students: Any, method: str, way: str) -> None:
    assert_same(students[method]["alone"], students[method][way])


@pytest.mark.parametrize("way", WAYS)
def test_the_result_is_whole_however_it_was_trained(students: Any, way: str) -> None:
    folder = students["full, EMA target"][way]
    pipe = DiffusionPipeline.from_pretrained(folder / "pipeline")
    weight = read_weights(folder)["unet.conv_in.weight"]
    assert torch.equal(pipe.unet.conv_in.weight, weight)
    pipe.load_lora_weights(students["LoRA"][way] / "lora")
    assert (folder / "sheet-000002.png").exists() == (way == "spread")


def test_adapters_in_float32_are_spread_beside_a_network_in_bfloat16(
    base: Path, data: Path, tmp_path: Path
) -> None:
    half = {"precision": "bf16"}
    for way, (count, how) in {"alone": (1, half), "spread": (2, half | {"shard": True})}.items():
        job = (base, data, tmp_path / way, METHODS["LoRA"], how)
        assert many.together(count, train_student, *job) == [0] * count
    alone, spread = (tmp_path / way / "consistency" for way in ("alone", "spread"))
    assert losses(spread) == pytest.approx(losses(alone), rel=0.03)
    assert {tensor.dtype for tensor in read_weights(spread).values()} == {torch.float32}


def die_after_two(base: Path, data: Path, folder: Path, how: Any = SPREAD) -> None:
    """A distillation in which the last process is gone before the third step."""
    loss = Consistency.loss

    def dying(self: Consistency, step: int, part: range) -> torch.Tensor:
        many.die(2, step)
        return loss(self, step, part)

    Consistency.loss = dying  # type: ignore[method-assign]
    train_student(base, data, folder, FULL, how)


@pytest.fixture(scope="module")
def dead(base: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes with shares left when one of them died."""
    folder = tmp_path_factory.mktemp("dead") / "run"
    codes = many.together(2, die_after_two, base, data, folder)
    assert codes[1] == 9
    assert codes[0] not in (0, 9)
    return folder


def test_shares_are_kept_in_safetensors_files_alone(dead: Path) -> None:
    path, step = newest(dead / "consistency")
    assert path is not None
    assert (path.name, step) == ("checkpoint-000002", 2)
    assert {file.suffix for file in path.iterdir()} == {".safetensors"}


def test_shares_that_an_ended_run_left_can_be_converted(dead: Path, tmp_path: Path) -> None:
    run_folder = dead / "consistency"
    written = convert_run(run_folder, tmp_path / "out")
    unet = UNet2DConditionModel.from_pretrained(tmp_path / "out" / "unet").state_dict()
    assert written
    kept = read_weights(run_folder)["unet.conv_in.weight"]
    assert torch.equal(unet["conv_in.weight"], kept)


@pytest.mark.parametrize("count", [1, 2])
def test_shares_of_two_processes_go_on_on_any_number(
    count: int, dead: Path, students: Any, base: Path, data: Path, tmp_path: Path
) -> None:
    shutil.copytree(dead, tmp_path / "run")
    job = (base, data, tmp_path / "run", FULL, SPREAD)
    assert many.together(count, train_student, *job) == [0] * count
    folder = tmp_path / "run" / "consistency"
    exact = 0 if count == 2 else 1e-6
    assert_same(students["full, EMA target"]["spread"], folder, exact)
    assert [file.name for file in folder.glob("checkpoint*")] == [NAME]


def test_what_one_process_began_two_spread(
    students: Any, base: Path, data: Path, tmp_path: Path
) -> None:
    assert many.together(1, die_after_two, base, data, tmp_path, OFTEN) == [9]
    assert newest(tmp_path / "consistency") == (tmp_path / "consistency" / NAME, 2)
    assert many.together(2, train_student, base, data, tmp_path, FULL, SPREAD) == [0, 0]
    assert_same(students["full, EMA target"]["spread"], tmp_path / "consistency")


def test_shares_of_another_network_are_refused(
    dead: Path, base: Path, data: Path, tmp_path: Path
) -> None:
    shutil.copytree(dead, tmp_path / "run")
    next((tmp_path / "run").rglob("recipe.json")).unlink()  # it would tell before
    other = many.student(base, data, tmp_path / "run", FULL | {"guidance_dim": 8})
    with pytest.raises(CheckpointError, match="belongs to other networks"):
        run.train(other)


# ── ends ──


def stop_at(step: int, done: int) -> None:
    if done == step and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGTERM)


def stopped(folder: Path) -> None:
    with pytest.raises(StoppedError, match="stopped after step 6 of 12"):
        many.train_toy(folder, before=partial(stop_at, 5))


def test_sigterm_to_one_process_stops_all_after_the_same_step_with_a_checkpoint(
    alone: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "parts"
    assert many.together(2, stopped, folder) == [0, 0]
    assert newest(folder) == (folder / NAME, 6)
    assert many.together(1, toy(folder)) == [0]
    a, b = load_file(alone / NAME), load_file(folder / NAME)
    assert all(torch.allclose(a[key], b[key], atol=1e-6) for key in a)


def test_a_process_that_dies_ends_the_others_and_the_last_checkpoint_goes_on(
    alone: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "parts"
    dying = partial(every_step, many.train_toy, folder, partial(many.die, 7))
    codes = many.together(2, dying)
    assert codes[1] == 9 and codes[0] != 0
    assert newest(folder) == (folder / NAME, 7)
    assert many.together(2, toy(folder)) == [0, 0]
    assert_same(alone, folder)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (many.recipe(shard=True), "phase='teacher'"),
        (many.recipe(batch=9), "multiple of the 2 devices"),
        (many.recipe(batch=8, accumulate=8), "run.accumulate=8"),
    ],
)
def test_what_several_devices_cannot_do_is_refused(made: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        check_shard(made)
        Ranks(0, 2).check(made.run.batch, made.run.accumulate)
