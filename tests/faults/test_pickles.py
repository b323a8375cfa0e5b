"""Case 1: pickled weights run no code, whatever their file is called."""

from __future__ import annotations

import io
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from bad_files import WEIGHTS, copied, pickled, zipped
from PIL import Image

import fewstep
from fewstep import CheckpointError, DiffusionPipeline, StableDiffusionPipeline
from fewstep.training.config import Pictures
from fewstep.training.data.encoded import open_source

Run = Callable[..., tuple[int, str, str]]
FORMS = {"a pickle": pickled, "PyTorch's zip": zipped}


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    return tmp_path / "canary"


@pytest.fixture(scope="module")
def pipe(sd_folder: Path) -> Any:
    return DiffusionPipeline.from_pretrained(sd_folder)


def test_the_pickles_of_these_tests_do_run_code_when_they_are_read(canary: Path) -> None:
    """Case 1, the negative control."""
    pickle.loads(pickled(canary))
    assert canary.is_dir()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("component", WEIGHTS)
def test_a_component_that_is_a_pickle_by_content_is_refused_and_not_run(
    form: str, component: str, sd_folder: Path, tmp_path: Path, canary: Path
) -> None:
    """Case 1: a `.safetensors` name whose content is a pickle or a zip."""
    folder = copied(sd_folder, tmp_path / "model", **{component: FORMS[form](canary)})
    with pytest.raises(CheckpointError, match=r"\.safetensors is not .* a zip file or a pickle"):
        DiffusionPipeline.from_pretrained(folder)
    assert not canary.exists()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("suffix", ["safetensors", "ckpt", "bin", "pt", "pth"])
def test_no_door_for_a_single_file_opens_a_pickle(
    form: str, suffix: str, pipe: Any, tmp_path: Path, canary: Path
) -> None:
    """Case 1: `.ckpt`, `.bin` and their like, and the same content under a good name."""
    file = tmp_path / f"style.{suffix}"
    file.write_bytes(FORMS[form](canary))
    doors: list[Callable[[Any], Any]] = [
        StableDiffusionPipeline.from_single_file,
        fewstep.UNet2DConditionModel.from_single_file,
        pipe.load_lora_weights,
        pipe.load_textual_inversion,
    ]
    for door in doors:
        with pytest.raises(fewstep.FewstepError, match="convert"):
            door(str(file))
    assert not canary.exists()
    assert pipe.get_list_adapters() == {}


def test_the_command_line_refuses_them_with_exit_code_2(
    run: Run, sd_folder: Path, tmp_path: Path, canary: Path
) -> None:
    """Case 1: exit 2, one line, and how to convert."""
    lora = tmp_path / "style.safetensors"
    lora.write_bytes(zipped(canary))
    model = copied(sd_folder, tmp_path / "model", text_encoder=pickled(canary))
    for options in (("--lora", lora), ("--model", model)):
        code, out, error = run("generate", "a", "-m", sd_folder, *options)
        assert (code, out, error.count("\n")) == (2, "", 1)
        assert "convert them to safetensors" in error
    assert not canary.exists()


def test_a_pickle_among_training_pictures_is_not_read(tmp_path: Path, canary: Path) -> None:
    """Case 1: a training `shard_0.pkl`, in a folder and in a tar."""
    picture = io.BytesIO()
    Image.new("RGB", (8, 8)).save(picture, "PNG")
    members = {"0.png": picture.getvalue(), "0.txt": b"a cat", "0.pkl": pickled(canary)}
    with tarfile.open(tmp_path / "0.tar", "w") as shard:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            shard.addfile(entry, io.BytesIO(content))
            (tmp_path / name).write_bytes(content)
    for kind in ("folder", "webdataset"):
        recipe: Any = SimpleNamespace(data=Pictures(source=kind, path=str(tmp_path), resolution=8))
        source = open_source(recipe, tmp_path / "memory")
        assert [source.load(index).size for index in range(len(source))] == [(8, 8)]
        assert source.captions[0] == ("a cat",)
    assert not canary.exists()
