"""`fewstep cache`: encodes a recipe's data, says what was kept, and checks the files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from fewstep.training.data.store import Store

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def recipe(sd_folder: Path, tmp_path: Path) -> Path:
    """A recipe over three pictures, one of which has no caption."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(3):
        Image.new("RGB", (40, 32), (80 * i, 0, 0)).save(folder / f"{i}.png")
    (folder / "0.txt").write_text("a cat")
    (folder / "2.txt").write_text("a dog")
    file = tmp_path / "recipe.toml"
    file.write_text(
        f"""
phase = "consistency"
folder = "run"
seed = 0
[data]
source = "folder"
path = {json.dumps(str(folder))}
resolution = 32
cache = {json.dumps(str(tmp_path / "cache"))}
[optimizer]
lr = 1e-4
[run]
steps = 1
batch = 2
device = "cpu"
[consistency]
base = {json.dumps(str(sd_folder))}
[consistency.sheet]
prompts = ["a cat"]
"""
    )
    return file


def test_all_is_encoded_and_what_was_kept_is_said(
    recipe: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out, err = run("cache", recipe)
    assert code == 0, err
    said, folder = out.splitlines()
    assert said == "kept 2 of 3 pictures; dropped: 1 no caption (1.png)"
    assert folder == str(tmp_path / "cache")
    assert len(list((tmp_path / "cache").rglob("*.safetensors"))) == 2
    monkeypatch.setattr(Store, "add", None)  # the second time nothing is encoded
    assert run("cache", recipe)[0] == 0
    code, _, err = run("cache", recipe, "data.resolution=30")
    assert code == 2 and "data.resolution=30 must be a multiple of 8" in err


def test_the_check_names_damaged_files_which_are_then_encoded_again(
    recipe: Path, run: Run, tmp_path: Path
) -> None:
    run("cache", recipe)
    assert run("cache", recipe, "--check")[1].startswith("all 2 files are whole")
    (shard,) = (tmp_path / "cache" / "latents").rglob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:-1])
    code, _, err = run("cache", recipe, "--check")
    assert code == 2
    assert f"1 of 2 files are damaged: {shard}; run the same command without --check" in err
    run("cache", recipe)
    assert run("cache", recipe, "--check")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "recipe 'nothing' is neither a shipped recipe nor a file"),
        (["emoji64_3_teacher"], "its phase 'teacher' encodes nothing beforehand"),
        (["emoji64_3_teacher", "--check", "--output", "x"], "has no meaning with --check"),
        (["emoji64_3_teacher", "data.sizes=3"], "unknown key 'sizes'; did you mean 'size'?"),
    ],
)
def test_what_cannot_be_done_is_refused(arguments: list[str], message: str, run: Run) -> None:
    code, _, err = run("cache", *arguments)
    assert code == 2
    assert message in err


def test_help_has_examples(run: Run) -> None:
    code, out, _ = run("cache", "--help")
    assert code == 0
    assert "  fewstep cache" in out.partition("Examples:")[2]
