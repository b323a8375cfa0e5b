"""Where pictures come from: captions found, offsets right, and one clear error for each mistake."""

from __future__ import annotations

import io
import json
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fewstep.errors import RequestError
from fewstep.training.config import Recipe
from fewstep.training.data.encoded import open_source
from fewstep.training.data.shards import expanded
from fewstep.training.data.sources import Source

Make = Callable[..., Recipe]


@pytest.fixture
def opened(recipe: Make, tmp_path: Path) -> Callable[..., Any]:
    return lambda path, **data: open_source(recipe(path, **data), tmp_path / "memory")


def said(source: Source) -> dict[str, tuple[str, ...]]:
    return dict(zip(source.keys, source.captions, strict=True))


def draw(path: Path, grey: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (20, 10), (grey, grey, grey)).save(path)
    return path


# ── folders ──


def test_captions_come_from_jsonl_csv_and_text_files(tmp_path: Path, opened: Any) -> None:
    root = tmp_path / "p"
    for name in ("a.png", "b.jpg", "sub/c.webp", "sub/d.PNG", "e.png"):
        draw(root / name)
    lines = [
        {"file_name": "a.png", "text": " one "},
        {"file_name": "b.jpg", "text": ["x", "y\u2028z", ""]},  # a line's end to Unicode, not here
    ]
    lines.append({"file_name": "gone.png", "text": "gone"})
    told = [json.dumps(line, ensure_ascii=False) for line in lines]
    (root / "metadata.jsonl").write_text("\n\n".join(told), "utf-8")
    (root / "sub" / "metadata.csv").write_text('text,file_name\n"cat, red",c.webp\n', "utf-8")
    (root / "sub" / "d.txt").write_bytes("\ufeffa cat\non grass\n".encode())
    source = opened(root)
    assert said(source) == {
        "a.png": ("one",),
        "b.jpg": ("x", "y\u2028z"),
        "e.png": (),
        "sub/c.webp": ("cat, red",),
        "sub/d.PNG": ("a cat on grass",),
    }
    assert source.absent == ["gone.png"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("metadata.jsonl", '{"file_name": "a.png", "text": "x"}\n{"file_', "line 2 is not valid"),
        ("metadata.jsonl", '{"file_name": "a.png", "caption": "x"}', "no 'text', but .*'caption'"),
        ("metadata.jsonl", '{"file_name": "a.png", "texts": "x"}', "caption_key='texts'"),
        ("metadata.jsonl", '["a.png"]', "line 1 holds a list, not an object"),
        ("metadata.jsonl", '{"text": "x"}', "line 1: no 'file_name'"),
        ("metadata.jsonl", '{"file_name": "a.png", "text": 5}', "line 1: a caption is a int, 5"),
        ("metadata.csv", "filename,text\na.png,x\n", "a column file_name='filename'"),
        ("metadata.csv", "file_name,txt\na.png,x\n", "did you mean data.caption_key='txt'"),
        ("a.txt", b"\xff\xfe\x00", "a.txt is not UTF-8"),
    ],
)
def test_captions_that_do_not_parse_are_one_clear_error(
    name: str, text: str | bytes, message: str, tmp_path: Path, opened: Any
) -> None:
    draw(tmp_path / "p" / "a.png")
    content = text if isinstance(text, bytes) else text.encode()
    (tmp_path / "p" / name).write_bytes(content)
    with pytest.raises(RequestError, match=message):
        opened(tmp_path / "p")


def test_a_folder_that_is_not_there_is_named(opened: Any) -> None:
    with pytest.raises(RequestError, match=r"data.path='nowhere' is not a folder"):
        opened("nowhere")


# ── shards ──


def write_shard(path: Path, samples: list[dict[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for number, sample in enumerate(samples):
            for extension, content in sample.items():
                entry = tarfile.TarInfo(f"some/{number:04d}.{extension}")
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))
    return path


def png(grey: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (20, 10), (grey, grey, grey)).save(file, "png")
    return file.getvalue()


def test_samples_of_shards_are_read_at_random(tmp_path: Path, opened: Any) -> None:
    for shard in range(2):
        write_shard(
            tmp_path / "s" / f"{shard:02d}.tar",
            [{"png": png(100 * shard + i), "txt": f"grey {i}".encode()} for i in range(3)]
            + [{"txt": b"no picture"}, {"jpg": png(9)}],
        )
    source = opened(tmp_path / "s" / "{00..01}.tar", source="webdataset")
    assert source.keys[4] == "01.tar/some/0000"
    assert source.captions == [("grey 0",), ("grey 1",), ("grey 2",), ()] * 2
    assert [source.load(i).getpixel((0, 0))[0] for i in (6, 0, 5, 2)] == [102, 0, 101, 2]
    assert said(opened(tmp_path / "s", source="webdataset")) == said(source)


def test_captions_of_shards_may_be_in_json(tmp_path: Path, opened: Any) -> None:
    path = write_shard(
        tmp_path / "a.tar", [{"webp": png(1), "json": b'{"caption": ["a cat", "a pet"], "w": 3}'}]
    )
    source = opened(path, source="webdataset", caption_key="caption")
    assert source.captions == [("a cat", "a pet")]
    with pytest.raises(RequestError, match=r"has no 'txt', but .*'caption'"):
        opened(path, source="webdataset")
    with pytest.raises(RequestError, match="no pictures with the extensions png among"):
        opened(path, source="webdataset", caption_key="caption", image_key="png")


def test_the_index_of_a_shard_is_made_once_and_again_when_it_changes(
    tmp_path: Path, opened: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_shard(tmp_path / "a.tar", [{"png": png(1), "txt": b"one"}])
    opened(path, source="webdataset")
    opens: list[object] = []
    real = tarfile.open
    monkeypatch.setattr(tarfile, "open", lambda *a, **k: opens.append(a) or real(*a, **k))
    assert opened(path, source="webdataset").captions == [("one",)]
    assert not opens
    write_shard(path, [{"png": png(1), "txt": b"another"}] * 2)
    opens.clear()
    assert opened(path, source="webdataset").captions == [("another",)] * 2
    assert opens


@pytest.mark.parametrize(
    "path", ["pipe:curl http://x/{0..9}.tar", "https://x/0.tar", "s3://bucket/{00..01}.tar"]
)
def test_shards_that_are_not_here_are_refused(path: str, opened: Any) -> None:
    with pytest.raises(RequestError, match=r"is not a local file; .* fetch them first"):
        opened(path, source="webdataset")


def test_shards_that_are_missing_or_cut_short_are_named(tmp_path: Path, opened: Any) -> None:
    whole = write_shard(tmp_path / "0.tar", [{"png": png(i), "txt": b"x"} for i in range(9)])
    with pytest.raises(RequestError, match=r"1 of 2 shards are missing, the first is .*1\.tar"):
        opened(tmp_path / "{0..1}.tar", source="webdataset")
    (tmp_path / "cut.tar").write_bytes(whole.read_bytes()[:1300])
    with pytest.raises(RequestError, match=r"cut\.tar is not a whole, uncompressed tar file"):
        opened(tmp_path / "cut.tar", source="webdataset")


def test_braces_stand_for_ranges_and_lists() -> None:
    assert expanded("a{08..11}.tar") == ["a08.tar", "a09.tar", "a10.tar", "a11.tar"]
    assert expanded("{a,b}{0..1}") == ["a0", "a1", "b0", "b1"]
    assert expanded("plain.tar") == ["plain.tar"]


# ── the hub ──


def test_a_data_set_that_was_withdrawn_names_another_at_once(opened: Any) -> None:
    with pytest.raises(RequestError, match=r"withdrawn .*data.path=lambdalabs/naruto-blip-"):
        opened("lambdalabs/pokemon-blip-captions", source="huggingface")


def test_without_the_library_the_command_that_installs_it_is_said(
    opened: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(RequestError, match=r"pip install 'fewstep\[train\]'"):
        opened("someone/something", source="huggingface")


@pytest.fixture
def parquet(tmp_path: Path) -> Path:
    datasets = pytest.importorskip("datasets")
    rows = {"image": [draw(tmp_path / f"{i}.png", i).as_posix() for i in range(3)]}
    rows["text"] = ["one", "two", ""]
    rows["several"] = [["a", "b"], ["c"], []]
    table = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    table.to_parquet(tmp_path / "set" / "train.parquet")
    table.save_to_disk(str(tmp_path / "saved"))
    return tmp_path


@pytest.mark.parametrize("path", ["set", "saved", "set/train.parquet"])
def test_data_sets_are_opened_from_folders_and_parquet(
    path: str, parquet: Path, opened: Any
) -> None:
    source = opened(parquet / path, source="huggingface")
    assert source.captions == [("one",), ("two",), ()]
    assert source.load(2).getpixel((0, 0)) == (2, 2, 2)
    assert source.look(1).height == 10
    assert opened(parquet / path, source="huggingface").stamp(1) == source.stamp(1)


def test_columns_and_splits_that_a_data_set_lacks_are_named(parquet: Path, opened: Any) -> None:
    source = opened(parquet / "saved", source="huggingface", caption_key="several")
    assert source.captions[0] == ("a", "b")
    for place, change, message in (
        ("saved", {"caption_key": "texts"}, "data.caption_key='text'"),
        ("saved", {"image_key": "text"}, "column 'text' holds no pictures"),
        ("set", {"split": "test"}, "data.split='test' cannot be opened"),
    ):
        with pytest.raises(RequestError, match=message):
            opened(parquet / place, source="huggingface", **change)


# ── emoji ──


def test_scenes_are_known_by_their_settings_and_number(
    recipe: Make, opened: Any, tmp_path: Path
) -> None:
    source = opened("", source="emoji", scenes=4)
    again = opened("", source="emoji", scenes=6)  # the captions of the first are remembered
    other = opened("", source="emoji", scenes=4, mix={"jitter": 0.0})
    looks = [[s.look(i) for i in range(4)] for s in (source, again, other)]
    assert looks[0] == looks[1]
    assert not {f.digest for f in looks[0]} & {f.digest for f in looks[2]}
    scene = source.sampler.scene(2)
    assert again.captions[2] == (scene.caption,)
    assert np.asarray(source.load(2)).shape == (32, 32, 3)
