from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from PIL.PngImagePlugin import PngInfo
from records import png_text

from fewstep.cli.record import read_record

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    noise = np.random.default_rng(0).integers(0, 256, (30, 60, 3), dtype=np.uint8)
    file = tmp_path / "photo.png"
    PIL.Image.fromarray(noise).save(file)
    return file


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--size", "16x24", "--steps", "2", "--guidance", "3"],
        ["-n", "3", "--grid"],
        ["--dtype", "bfloat16"],
        ["--image", "PHOTO", "--strength", "0.4"],
    ],
    ids=" ".join,
)
def test_a_picture_is_drawn_again_to_the_pixel(
    options: list[str], run: Run, lcm_folder: Path, photo: Path
) -> None:
    given = [str(photo) if option == "PHOTO" else option for option in options]
    assert run("generate", "a cat", "-m", lcm_folder, "--out", "a.png", *given)[0] == 0
    assert run("repro", "a.png") == (0, "identical: a.png\n", "")


def test_a_picture_with_negatives_is_drawn_again(run: Run, sd_folder: Path) -> None:
    run("generate", "a cat", "-m", sd_folder, "--negative", "x", "-s", 3, "--out", "a.png")
    assert run("repro", "a.png")[0] == 0


def test_the_picture_drawn_again_can_be_kept(run: Run, lcm_folder: Path) -> None:
    run("generate", "a cat", "-m", lcm_folder, "--out", "a.png")
    assert run("repro", "a.png", "--out", "b.png")[1] == "identical: a.png; drawn again as b.png\n"
    assert read_record(Path("a.png")) == read_record(Path("b.png"))
    assert run("repro", "b.png", "-o", "folder")[0] == 0
    assert Path("folder/b-repro.png").is_file()
    code, _, error = run("repro", "a.png", "--out", "b.png")
    assert code == 2
    assert error.startswith("error: --out b.png: exists")


def test_a_difference_is_measured(run: Run, lcm_folder: Path) -> None:
    run("generate", "a cat", "-m", lcm_folder, "--out", "a.png")
    record = read_record(Path("a.png"))
    with PIL.Image.open("a.png") as picture:
        array = np.asarray(picture).copy()
    array[0, 0, 0] += np.uint8(3) if array[0, 0, 0] < 200 else np.uint8(253)
    PIL.Image.fromarray(array).save("a.png", pnginfo=png_text(record))
    code, out, error = run("repro", "a.png")
    assert (code, error) == (1, "")
    assert out == "differs by at most 3 of 255, in 0.10% of the pixels: a.png\n"


def test_a_difference_names_what_has_changed(run: Run, lcm_folder: Path) -> None:
    run("generate", "a cat", "-m", lcm_folder, "--out", "a.png")
    record = read_record(Path("a.png"))
    changed = {**record.to_dict(), "versions": {**record.versions, "torch": "1.0"}}
    blank = PIL.Image.new("RGB", (32, 32))
    blank.save("a.png", pnginfo=png_text(type(record).from_dict(changed)))
    code, out, _ = run("repro", "a.png")
    assert code == 1
    assert "drawn with torch 1.0 (here " in out


def test_other_weights_are_refused(run: Run, lcm_folder: Path, sd_folder: Path) -> None:
    run("generate", "a cat", "-m", lcm_folder, "--out", "a.png")
    code, _, error = run("repro", "a.png", "--model", sd_folder)
    assert code == 2
    assert f"--model {sd_folder}: holds other weights" in error
    assert error.count("\n") == 1


def test_a_model_that_has_moved_is_found_by_option(
    run: Run, lcm_folder: Path, tmp_path: Path
) -> None:
    moved = shutil.copytree(lcm_folder, tmp_path / "moved")
    run("generate", "a cat", "-m", moved, "--out", "a.png")
    moved.rename(tmp_path / "elsewhere")
    code, _, error = run("repro", "a.png")
    assert code == 2
    assert f"--model {moved}: " in error
    assert run("repro", "a.png", "--model", tmp_path / "elsewhere")[0] == 0


def test_the_source_picture_must_be_the_same(run: Run, lcm_folder: Path, photo: Path) -> None:
    run("generate", "a cat", "-m", lcm_folder, "-i", photo, "--out", "a.png")
    moved = photo.rename(photo.with_name("moved.png"))
    code, _, error = run("repro", "a.png")
    assert code == 2
    assert f"--image {photo}: no such file" in error
    assert run("repro", "a.png", "--image", moved)[0] == 0
    shutil.copy(moved, Path(photo.name))  # beside the picture
    assert run("repro", "a.png")[0] == 0
    PIL.Image.new("RGB", (60, 30)).save(moved)
    code, _, error = run("repro", "a.png", "--image", moved)
    assert code == 2
    assert "its pixels differ" in error


def test_an_image_for_a_picture_from_noise_is_refused(
    run: Run, lcm_folder: Path, photo: Path
) -> None:
    run("generate", "a cat", "-m", lcm_folder, "--out", "a.png")
    code, _, error = run("repro", "a.png", "--image", photo)
    assert code == 2
    assert "was not drawn from a picture; leave it out" in error


@pytest.mark.parametrize("content", [None, b"no picture", "plain"], ids=str)
def test_a_file_that_cannot_be_drawn_again_ends_in_one_line(
    content: bytes | str | None, run: Run
) -> None:
    if content == "plain":
        PIL.Image.new("RGB", (4, 4)).save("a.png")
    elif isinstance(content, bytes):
        Path("a.png").write_bytes(content)
    code, out, error = run("repro", "a.png")
    assert (code, out) == (2, "")
    assert error.startswith("error: PICTURE a.png: ")
    assert error.count("\n") == 1


def test_an_unknown_scheduler_or_dtype_in_a_file_ends_in_one_line(
    run: Run, lcm_folder: Path
) -> None:
    run("generate", "a cat", "-m", lcm_folder, "--out", "a.png")
    stored = read_record(Path("a.png")).to_dict()
    scheduler = {**stored["model"], "scheduler": {"_class_name": "os"}}
    for change in ({"dtype": "float8"}, {"model": scheduler}):
        record = type(read_record(Path("a.png"))).from_dict({**stored, **change})
        info: PngInfo = png_text(record)
        PIL.Image.new("RGB", (32, 32)).save("b.png", pnginfo=info)
        code, _, error = run("repro", "b.png")
        assert code == 2, error
        assert error.count("\n") == 1
