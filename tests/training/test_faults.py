"""What goes wrong in training ends in one clear line, and nothing already made is lost."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import many
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from fewstep import UNet2DConditionModel
from fewstep.training import run as running
from fewstep.training import state
from fewstep.training.phases.consistency import Consistency
from fewstep.training.report import LossLog

Run = Callable[..., tuple[int, str, str]]
CHECKPOINT = "checkpoint.safetensors"
RECIPE = """
phase = "consistency"
folder = "run"
seed = 1
[data]
source = "folder"
path = "pictures"
resolution = 64
cache = "cache"
[optimizer]
lr = 1e-3
[run]
steps = 6
batch = 2
precision = "fp32"
device = "cpu"
sheet_steps = 0
checkpoint_minutes = 0.0
[consistency]
base = "BASE"
guidance_dim = 0
target = "stopgrad"
[consistency.lora]
rank = 2
[consistency.sheet]
prompts = ["a cat"]
"""


@pytest.fixture
def training(run: Run, sd_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """`fewstep train` of a recipe in this folder, with overrides."""
    monkeypatch.setattr(LossLog, "EVERY", 2)
    Path("recipe.toml").write_text(RECIPE.replace("BASE", str(sd_folder)))
    Path("pictures").mkdir()
    for index in range(4):
        pixels = np.random.default_rng(index).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(f"pictures/{index}.png")
        Path(f"pictures/{index}.txt").write_text(f"thing {index}")
    return lambda *overrides: run("train", "recipe.toml", *overrides)


def last(err: str) -> str:
    """The line of the error, of which there is one."""
    (line,) = [line for line in err.splitlines() if line.startswith("error:")]
    return line


def weights() -> dict[str, Tensor]:
    return load_file(Path("run/consistency") / CHECKPOINT)


def fails_at(monkeypatch: pytest.MonkeyPatch, step: int, fault: Callable[[Tensor], Tensor]) -> None:
    """Let the loss of one step meet a fault."""
    loss = Consistency.loss

    def faulty(self: Consistency, at: int, part: range) -> Tensor:
        found = loss(self, at, part)
        return fault(found) if at == step else found

    monkeypatch.setattr(Consistency, "loss", faulty)


def test_a_loss_that_is_no_number_keeps_the_last_good_checkpoint(
    training: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    fails_at(monkeypatch, 4, lambda loss: loss * float("nan"))
    code, _, err = training()
    assert code == 2
    assert "the loss is nan at step 6" in last(err) and "lower optimizer.lr" in last(err)
    assert all(tensor.isfinite().all() for tensor in weights().values())


def test_a_lack_of_memory_names_the_settings_that_save_some_and_the_run_goes_on_afterwards(
    training: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def out_of_memory(loss: Tensor) -> Tensor:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        fails_at(patch, 4, out_of_memory)
        code, _, err = training()
    assert code == 2
    assert "run.gradient_checkpointing=true" in last(err) and "goes on from it" in last(err)
    assert training()[0] == 0
    lines = Path("run/consistency/log.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step"] for line in lines]
    assert steps == [2, 4, 6]


def test_a_full_disk_keeps_the_checkpoint_before(
    training: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[Any] = []
    save_file = state.save_file

    def fill_up(tensors: Any, path: Path, metadata: Any) -> None:
        written.append(path)
        if len(written) > 1:
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        save_file(tensors, path, metadata=metadata)

    monkeypatch.setattr(state, "save_file", fill_up)
    code, _, err = training()
    assert code == 2
    assert "checkpoint of step 4" in last(err) and "No space left" in last(err)
    assert weights() and not list(Path("run/consistency").glob("*part*"))


def test_a_corrupt_checkpoint_is_named_and_left_as_it_is(training: Run) -> None:
    assert training()[0] == 0
    path = Path("run/consistency") / CHECKPOINT
    path.write_bytes(path.read_bytes()[:1000])
    code, _, err = training("run.steps=8")
    assert code == 2
    assert str(path) in last(err)
    assert path.stat().st_size == 1000


def test_an_unknown_key_is_refused_with_the_nearest(training: Run) -> None:
    code, _, err = training("run.stepz=3")
    assert code == 2
    assert "did you mean 'steps'" in last(err)
    assert not Path("run").exists()


def test_a_unet_of_another_family_is_refused_before_anything_is_written(
    training: Run, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    UNet2DConditionModel(
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=2,
        attention_head_dim=2,
        cross_attention_dim=64,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=80,
    ).save_pretrained(tmp_path / "xl")
    code, _, err = training(f"consistency.unet={tmp_path / 'xl'}")
    assert code == 2
    assert "text of 64 channels" in last(err) and "one family" in last(err)
    assert not Path("run").exists()


def test_an_interrupted_download_is_one_line_with_the_name_of_the_base(
    training: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    def listed(*_: Any, **__: Any) -> Any:
        file = type("File", (), {"rfilename": "model_index.json"})()
        return type("Listed", (), {"siblings": [file]})()

    def broken(*_: Any, **__: Any) -> Any:
        raise ConnectionError("the connection was reset\nin the middle")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", listed)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", broken)
    monkeypatch.setattr(running, "foresee", lambda *_: None)  # seconds, of a guessed base's shapes
    code, _, err = training("consistency.base=someone/something")
    assert code == 2
    assert "'someone/something' could not be fetched: the connection was reset" in last(err)
    assert not Path("run").exists()


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
import many
from fewstep.training import report, state

report.LossLog.EVERY = 2
save_file, saved = state.save_file, []

def half(tensors, path, metadata):
    save_file(tensors, path, metadata=metadata)
    saved.append(path)
    if len(saved) == 2:
        os.truncate(path, os.path.getsize(path) // 2)
        os.kill(os.getpid(), signal.SIGKILL)

state.save_file = half
many.train_toy(Path(sys.argv[1]))
"""


def test_a_run_killed_while_it_writes_a_checkpoint_goes_on_from_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LossLog, "EVERY", 2)
    place = str(Path(many.__file__).parent)
    done = subprocess.run([sys.executable, "-c", KILLED, tmp_path / "parts", place])
    assert done.returncode == -9
    assert list((tmp_path / "parts").glob("*.part"))  # the half that was written
    many.train_toy(tmp_path / "parts")
    many.train_toy(tmp_path / "whole")
    assert not list((tmp_path / "parts").glob("*.part"))
    parts, whole = (load_file(tmp_path / name / CHECKPOINT) for name in ("parts", "whole"))
    assert parts.keys() == whole.keys()
    assert all(torch.equal(parts[key], whole[key]) for key in whole)
