"""Data sets of Hugging Face's `datasets` library: from the hub, a folder, or parquet files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...errors import RequestError
from ..config import Pictures
from .sources import Files, captions_of, check_column

# Names that old configs and tutorials hold -> what became of them, and what to use.
GONE = {
    "lambdalabs/pokemon-blip-captions": "was withdrawn from the hub after a copyright claim; give "
    "another with data.path=..., for example data.path=lambdalabs/naruto-blip-captions, which has "
    "the same columns",
}


class HubSet(Files):
    """One split of a data set, read row by row."""

    def __init__(self, data: Pictures) -> None:
        if data.path.lower() in GONE:
            raise RequestError(f"data.path={data.path!r} {GONE[data.path.lower()]}")
        where = f"data.path={data.path!r}"
        table = open_split(data, where)
        check_column(data.image_key, table.column_names, "data.image_key", where)
        check_column(data.caption_key, table.column_names, "data.caption_key", where)
        captions = table.select_columns([data.caption_key])[:][data.caption_key]
        self.captions = [captions_of(c, f"{where} row {i}") for i, c in enumerate(captions)]
        self.keys = [f"row {index}" for index in range(len(table))]
        self.image_key = data.image_key
        self.table = undecoded(table, data.image_key, where)
        self.name = f"datasets {data.path} {data.split} {data.image_key}"
        self.version = str(table._fingerprint)

    def stamp(self, index: int) -> str:
        return f"{self.version}|{index}"

    def read(self, index: int) -> bytes:
        value = self.table[index][self.image_key]
        if isinstance(value, dict):
            contents = value.get("bytes")
            return Path(value["path"]).read_bytes() if contents is None else contents
        return value


def open_split(data: Pictures, where: str) -> Any:
    """The table of `data.split`. Raises RequestError with what to do if it cannot be had."""
    try:
        import datasets
    except ImportError:
        raise RequestError(
            "data.source='huggingface' needs the library datasets; "
            "run: pip install 'fewstep[train]'"
        ) from None
    path = Path(data.path).expanduser()
    try:
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            return split_of(datasets.load_from_disk(str(path)), data.split, where)
        if path.suffix == ".parquet":
            files = {data.split: str(path)}
            return datasets.load_dataset("parquet", data_files=files, split=data.split)
        return datasets.load_dataset(str(path) if path.is_dir() else data.path, split=data.split)
    except RequestError:
        raise
    except Exception as error:  # of the library, its formats and the network
        raise RequestError(
            f"{where}, data.split={data.split!r} cannot be opened: {error}; give a data set of the "
            "hub, a folder or a .parquet file, and one of its splits"
        ) from error


def split_of(saved: Any, split: str, where: str) -> Any:
    """The split of what `load_from_disk` gives, which is a table or a dict of them."""
    if not isinstance(saved, dict):
        return saved
    check_column(split, saved, "data.split", where)
    return saved[split]


def undecoded(table: Any, image_key: str, where: str) -> Any:
    """The table with its pictures as the bytes of their files."""
    import datasets

    feature = table.features[image_key]
    if isinstance(feature, datasets.Image):
        return table.cast_column(image_key, datasets.Image(decode=False))
    example = table[0][image_key] if len(table) else b""
    if isinstance(example, bytes) or (isinstance(example, dict) and "bytes" in example):
        return table
    raise RequestError(
        f"{where}: column {image_key!r} holds no pictures but {feature}; set data.image_key"
    )
