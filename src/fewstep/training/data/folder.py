"""A folder of pictures; their captions are in metadata.jsonl, metadata.csv, or .txt files."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

from ...errors import RequestError
from ..config import Pictures
from .sources import Files, captions_of, check_column, decoded, parse_json

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif"}
METADATA = ("metadata.jsonl", "metadata.csv")


class Folder(Files):
    """All pictures below a folder, in the order of their names."""

    def __init__(self, data: Pictures) -> None:
        self.root = Path(data.path).expanduser()
        if not self.root.is_dir():
            raise RequestError(f"data.path={data.path!r} is not a folder; give one that is there")
        self.name = f"folder {self.root.resolve()}"
        listed = captions_by_file(self.root, data.caption_key)
        files = {path for path in self.root.rglob("*") if path.suffix.lower() in SUFFIXES}
        unseen = [path for path in listed if path not in files]
        self.paths = sorted(files | {path for path in unseen if path.is_file()})
        self.keys = [path.relative_to(self.root).as_posix() for path in self.paths]
        self.captions = [listed.get(path) or beside(path) for path in self.paths]
        self.absent = sorted(path.name for path in unseen if not path.is_file())

    def stamp(self, index: int) -> str:
        facts = self.paths[index].stat()
        return f"{self.keys[index]}|{facts.st_size}|{facts.st_mtime_ns}"

    def read(self, index: int) -> bytes:
        return self.paths[index].read_bytes()


def captions_by_file(root: Path, caption_key: str) -> dict[Path, tuple[str, ...]]:
    """The captions that the metadata files below `root` give to files beside and below them."""
    found: dict[Path, tuple[str, ...]] = {}
    for name in METADATA:
        for path in sorted(root.rglob(name)):
            for where, row in metadata_rows(path, caption_key):
                if not isinstance(row.get("file_name"), str):
                    raise RequestError(f"{where}: no 'file_name'; it must say which picture")
                file = path.parent / row["file_name"]
                found[file] = captions_of(row.get(caption_key), where)
    return found


def metadata_rows(path: Path, caption_key: str) -> list[tuple[str, dict[str, Any]]]:
    """The entries of a metadata file. Raises RequestError if it lacks a column that is needed."""
    rows = entries(path)
    columns = list(dict.fromkeys(key for _, row in rows for key in row))
    if rows and path.suffix == ".csv":
        check_column("file_name", columns, "a column file_name", str(path))
    if rows:
        check_column(caption_key, columns, "data.caption_key", str(path))
    return rows


def entries(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """How to call the place of each entry of a metadata file, and the entry by columns."""
    text = decoded(path.read_bytes(), str(path))
    if path.suffix == ".csv":
        reader = csv.DictReader(io.StringIO(text))
        return [(f"{path} line {reader.line_num}", dict(row)) for row in reader]
    lines = enumerate(text.split("\n"), 1)  # captions may hold what else Unicode calls line ends
    places = ((f"{path} line {number}", line) for number, line in lines if line.strip())
    return [(where, parse_json(line, where)) for where, line in places]


def beside(path: Path) -> tuple[str, ...]:
    """The caption in the .txt file of a picture's name, on one line."""
    text = path.with_suffix(".txt")
    if not text.is_file():
        return ()
    return captions_of(" ".join(decoded(text.read_bytes(), str(text)).split()), str(text))
