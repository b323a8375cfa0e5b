import json
from pathlib import Path

import pytest
from PIL import Image

from fewstep.errors import RequestError
from fewstep.evaluation.references import References


def paint(folder: Path, **colours: str) -> Path:
    folder.mkdir(exist_ok=True)
    for name, colour in colours.items():
        Image.new("RGB", (20, 10), colour).save(folder / f"{name}.png")
    return folder


def table(folder: Path, *lines: object) -> Path:
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


def test_three_ways_of_writing_captions_are_one_set(tmp_path: Path) -> None:
    folders = [paint(tmp_path / name, a="red", b="blue") for name in ("json", "csv", "texts")]
    table(
        folders[0],
        {"file_name": "b.png", "caption": "a blue  box"},
        {"file_name": "a.png", "text": "a red box, small"},
    )
    (folders[1] / "metadata.csv").write_text(
        'file_name,text\na.png,"a red box, small"\nb.png,a blue box\n'
    )
    (folders[2] / "a.txt").write_text("a red box, small\n")
    (folders[2] / "b.txt").write_text("a blue box")
    sets = [References.read(folder) for folder in folders]
    assert {found.captions for found in sets} == {("a red box, small", "a blue box")}
    assert len({found.hash for found in sets}) == 1
    pictures = sets[0].pictures([1, 0], (6, 4))
    assert pictures.shape == (2, 4, 6, 3)
    assert pictures[:, 0, 0].tolist() == [[0, 0, 255], [255, 0, 0]]


def test_the_hash_tells_pixels_and_captions(tmp_path: Path) -> None:
    folder = table(paint(tmp_path, a="red"), {"file_name": "a.png", "text": "box"})
    hashes = {References.read(folder).hash}
    paint(folder, a="green")
    hashes.add(References.read(folder).hash)
    table(folder, {"file_name": "a.png", "text": "boxes"})
    hashes.add(References.read(folder).hash)
    assert len(hashes) == 3


def test_a_transparent_picture_lies_on_white_and_a_turned_one_is_upright(tmp_path: Path) -> None:
    Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("nothing")
    turned = Image.new("RGB", (4, 2), "black")
    turned.paste("white", (0, 0, 2, 2))
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    turned.save(tmp_path / "b.png", exif=exif)
    (tmp_path / "b.txt").write_text("black and white")
    clear, upright = References.read(tmp_path).pictures([0, 1], (4, 2))
    assert (clear == 255).all()
    assert upright[0, :, 0].tolist() == [0, 0, 255, 255]


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ([{"file_name": "a.png"}], "line 1: has no caption"),
        ([{"file_name": "a.png", "text": " "}], "line 1: has no caption"),
        ([{"file_name": "c.png", "text": "x"}], r"file_name 'c.png' is no file"),
        ([{"text": "x"}], "file_name None is no file"),
        ([3], "line 1 holds a int, not an object; correct it"),
        ([], r"holds no pictures \(\.avif"),
    ],
)
def test_a_table_that_cannot_be_used_is_refused(
    lines: list[object], words: str, tmp_path: Path
) -> None:
    with pytest.raises(RequestError, match=words):
        References.read(table(paint(tmp_path / "set", a="red"), *lines))


def test_a_missing_caption_and_a_corrupt_picture_are_named(tmp_path: Path) -> None:
    paint(tmp_path, a="red", b="red")
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(RequestError, match=r"b\.png: has no caption; write b\.txt"):
        References.read(tmp_path)
    (tmp_path / "b.txt").write_text("b")
    data = (tmp_path / "b.png").read_bytes()
    (tmp_path / "b.png").write_bytes(data[: len(data) // 2])
    with pytest.raises(RequestError, match=r"b\.png: cannot be read as a picture"):
        _ = References.read(tmp_path).hash
    (tmp_path / "metadata.jsonl").write_text("{")
    with pytest.raises(RequestError, match=r"reference .* line 1 is not valid JSON"):
        References.read(tmp_path)
    (tmp_path / "metadata.jsonl").unlink()
    (tmp_path / "b.txt").write_bytes(b"caf\xe9")
    with pytest.raises(RequestError, match=r"reference .*b\.txt is not UTF-8"):
        References.read(tmp_path)
    with pytest.raises(RequestError, match="is no folder"):
        References.read(tmp_path / "none")
