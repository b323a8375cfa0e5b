"""The wheel carries what the package needs, and works away from the checkout."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import PIL.Image
import pytest

import fewstep

ROOT = Path(__file__).parent.parent
PACKAGE = Path(fewstep.__file__).parent


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this checkout, built without a network and unpacked."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, source)
    skipped = shutil.ignore_patterns("__pycache__", "*.egg-info")
    shutil.copytree(PACKAGE, source / "src" / "fewstep", ignore=skipped)
    target = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--wheel-dir", target, source], check=True, capture_output=True)
    (wheel,) = target.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target / "unpacked")
    return target / "unpacked"


def test_the_wheel_holds_every_file_of_the_package(unpacked: Path) -> None:
    def files(folder: Path) -> set[str]:
        found = (file for file in folder.rglob("*") if file.is_file())
        return {f.relative_to(folder).as_posix() for f in found if "__pycache__" not in f.parts}

    assert files(unpacked / "fewstep") == files(PACKAGE)


def test_the_wheel_holds_the_licences(unpacked: Path) -> None:
    (info,) = unpacked.glob("*.dist-info")
    assert (info / "licenses" / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()
    assert (info / "licenses" / "NOTICE").read_bytes() == (ROOT / "NOTICE").read_bytes()


def test_the_wheel_draws_a_picture_away_from_the_checkout(unpacked: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(unpacked), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "fewstep"]

    def call(*arguments: str) -> str:
        done = subprocess.run(
            [*command, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout

    told = json.loads(call("info", "--json"))
    assert Path(told["model"]["folder"]).is_relative_to(unpacked)
    assert told["model"]["megabytes"] <= 32
    assert call("generate", "a red apple", "--seed", "7") == "fewstep-7.png\n"
    with PIL.Image.open(tmp_path / "fewstep-7.png") as picture:
        assert picture.size[0] >= 64
    assert call("repro", "fewstep-7.png") == "identical: fewstep-7.png\n"
