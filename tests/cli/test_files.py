from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from fewstep.cli.files import plan_files, write_pictures
from fewstep.errors import RequestError


def test_a_picture_takes_a_free_name(tmp_path: Path) -> None:
    assert plan_files(tmp_path, ["a"]) == [tmp_path / "a.png"]
    (tmp_path / "a.png").touch()
    (tmp_path / "a-2.png").touch()
    assert plan_files(tmp_path, ["a", "b", "a"]) == [
        tmp_path / "a-3.png",
        tmp_path / "b.png",
        tmp_path / "a-4.png",
    ]


def test_a_dangling_link_is_no_free_name(tmp_path: Path) -> None:
    (tmp_path / "a.png").symlink_to(tmp_path / "nowhere")
    assert plan_files(tmp_path, ["a"]) == [tmp_path / "a-2.png"]


def test_a_folder_that_is_not_there_is_not_made_before_the_picture(tmp_path: Path) -> None:
    assert plan_files(tmp_path / "x" / "y", ["a"]) == [tmp_path / "x" / "y" / "a.png"]
    assert not (tmp_path / "x").exists()


def test_a_folder_may_have_a_dot_in_its_name(tmp_path: Path) -> None:
    folder = tmp_path / "v1.0"
    folder.mkdir()
    assert plan_files(folder, ["a"]) == [folder / "a.png"]


def test_without_out_pictures_go_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert plan_files(None, ["a"]) == [Path("a.png")]


def test_a_file_is_replaced_by_force_alone(tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    assert plan_files(file, ["x"]) == [file]
    file.touch()
    with pytest.raises(
        RequestError, match=r"--out .*a\.png: exists; give another name, or --force"
    ):
        plan_files(file, ["x"])
    assert plan_files(file, ["x"], force=True) == [file]


@pytest.mark.parametrize(
    ("out", "names", "words"),
    [
        ("a.jpg", ["x"], r"a picture goes into a PNG file; give a name in \.png"),
        ("a.png", ["x", "y"], r"one file for 2 pictures; give a folder, or add --grid"),
        ("file", ["x"], r"exists and is no folder"),
        ("file/a.png", ["x"], r"cannot be written \(Not a directory\); give another folder"),
        ("file/b", ["x"], r"cannot be written \(Not a directory\); give another folder"),
    ],
)
def test_a_place_that_cannot_be_is_refused(
    out: str, names: list[str], words: str, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RequestError, match=f"^--out .*{words}"):
        plan_files(tmp_path / out, names)


def test_force_without_a_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="--force: has a meaning only with --out FILE"):
        plan_files(tmp_path, ["x"], force=True)


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Writing more than `size` bytes to a file fails, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_no_space_leaves_nothing_behind(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    file = tmp_path / "new" / "a.png"
    with largest_file(1000), pytest.raises(RequestError, match=r"^--out .*a\.png.*free some space"):
        write_pictures([PIL.Image.fromarray(noise)], file, {})
    assert list(file.parent.iterdir()) == []


def test_no_space_keeps_the_file_that_was_there(tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    file.write_bytes(b"before")
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    with largest_file(1000), pytest.raises(RequestError):
        write_pictures([PIL.Image.fromarray(noise)], file, {})
    assert [f.read_bytes() for f in tmp_path.iterdir()] == [b"before"]
