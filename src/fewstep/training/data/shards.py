"""WebDataset shards: tar files whose members of one name are a sample, read at random.

Each shard is read through once, to note where its pictures are and what their captions say.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ...errors import RequestError
from ..config import Pictures
from .sources import Files, captions_of, check_column, decoded, parse_json, remember, remembered

REMOTE = re.compile(r"^(pipe:|[a-z][a-z0-9+]*://)", re.IGNORECASE)
PICTURES = ("jpg", "jpeg", "png", "webp")  # for the default image_key
TEXT = "txt"  # for the default caption_key


class Place(NamedTuple):
    """A sample in a shard: its name, where its picture is, and its captions."""

    name: str
    offset: int
    size: int
    captions: list[str]


class Shards(Files):
    """The samples of all shards, in the order of the files."""

    def __init__(self, data: Pictures, memory: Path) -> None:
        self.paths = shard_paths(data.path)
        wanted = PICTURES if data.image_key == "image" else tuple(data.image_key.split(";"))
        self.stamps: list[str] = []
        self.places: list[tuple[int, Place]] = []
        seen: set[str] = set()
        for number, path in enumerate(self.paths):
            places, names = places_of(path, wanted, data.caption_key, memory)
            self.places += [(number, place) for place in places]
            self.stamps.append(stamp_of(path))
            seen |= names
        where = f"data.path={data.path!r}"
        if not any(place.captions for _, place in self.places):
            key = TEXT if data.caption_key == "text" else data.caption_key
            check_column(key, seen, "data.caption_key", where)
        if not self.places:
            raise RequestError(
                f"{where}: no pictures with the extensions {';'.join(wanted)} among {sorted(seen)};"
                " set data.image_key"
            )
        self.keys = [f"{self.paths[number].name}/{place.name}" for number, place in self.places]
        self.captions = [tuple(place.captions) for _, place in self.places]
        self.name = f"shards {[str(path.resolve()) for path in self.paths]}"

    def stamp(self, index: int) -> str:
        number, place = self.places[index]
        return f"{self.paths[number].name}|{self.stamps[number]}|{place.offset}"

    def read(self, index: int) -> bytes:
        number, place = self.places[index]
        with self.paths[number].open("rb") as file:
            file.seek(place.offset)
            return file.read(place.size)


def shard_paths(pattern: str) -> list[Path]:
    """The tar files of a folder or of a pattern with braces. Raises RequestError if one is not."""
    where = f"data.path={pattern!r}"
    if REMOTE.match(pattern):
        raise RequestError(
            f"{where} is not a local file; shards are read at random, so fetch them first (with "
            "`hf download`, `aws s3 cp` or `curl`) and give the folder that they are in"
        )
    folder = Path(pattern).expanduser()
    if folder.is_dir():
        paths = sorted(folder.glob("*.tar"))
    else:
        paths = [Path(name).expanduser() for name in expanded(pattern)]
    if not paths:
        raise RequestError(f"{where} holds no .tar files; give shards, or another data.source")
    if missing := [str(path) for path in paths if not path.is_file()]:
        raise RequestError(
            f"{where}: {len(missing)} of {len(paths)} shards are missing, the first is "
            f"{missing[0]}; give those that are there, as 'folder/{{0000..0099}}.tar'"
        )
    return paths


def expanded(pattern: str) -> list[str]:
    """The names that a pattern with braces stands for: {000..099} and {a,b}."""
    found = re.search(r"\{([^{}]*)\}", pattern)
    if found is None:
        return [pattern]
    ends = re.fullmatch(r"(\d+)\.\.(\d+)", found[1])
    if ends:
        first, last = int(ends[1]), int(ends[2])
        parts = [str(number).zfill(len(ends[1])) for number in range(first, last + 1)]
    else:
        parts = found[1].split(",")
    rest = expanded(pattern[found.end() :])
    return [pattern[: found.start()] + part + end for part in parts for end in rest]


def stamp_of(path: Path) -> str:
    """What changes when a shard does."""
    facts = path.stat()
    return f"{facts.st_size}|{facts.st_mtime_ns}"


def places_of(
    path: Path, wanted: tuple[str, ...], caption_key: str, memory: Path
) -> tuple[list[Place], set[str]]:
    """The samples of a shard that have a picture, and the names of all parts and JSON keys."""
    kept = remembered(memory, "tar", [str(path.resolve()), stamp_of(path), wanted, caption_key])
    if kept.is_file():
        content = parse_json(kept.read_bytes(), str(kept))
        return [Place(*place) for place in content["places"]], set(content["names"])
    samples: dict[str, dict[str, Any]] = {}
    names: set[str] = set()
    for member, contents in members(path, wanted, caption_key):
        folder, _, base = member.name.rpartition("/")
        stem, _, extension = base.partition(".")
        extension = extension.lower()
        names.add(extension)
        sample = samples.setdefault(f"{folder}/{stem}" if folder else stem, {})
        if contents is None:
            sample[extension] = (member.offset_data, member.size)
        elif extension == "json":
            sample["json"] = parse_json(contents, f"{path} member {member.name}")
            names |= set(sample["json"])
        else:
            sample["caption"] = decoded(contents, f"{path} member {member.name}")
    places = list(pictures_in(samples, wanted, caption_key, str(path)))
    remember(kept, {"places": places, "names": sorted(names)})
    return places, names


def members(
    path: Path, wanted: tuple[str, ...], caption_key: str
) -> Iterator[tuple[tarfile.TarInfo, bytes | None]]:
    """The files in a shard, with the contents of those that may hold captions."""
    texts = {caption_key, "json", *([TEXT] if caption_key == "text" else ())} - set(wanted)
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                if not member.isfile():
                    continue
                extension = member.name.rpartition("/")[2].partition(".")[2].lower()
                file = archive.extractfile(member) if extension in texts else None
                yield member, None if file is None else file.read()
            check_end(path, archive.offset)
    except (tarfile.TarError, EOFError, OSError) as error:
        raise RequestError(
            f"{path} is not a whole, uncompressed tar file ({error}); fetch it again, or leave it "
            "out of data.path"
        ) from error


def check_end(path: Path, offset: int) -> None:
    """Raises tarfile.ReadError unless the members end with the file or with a block of zeros.

    The library takes half a header, or nonsense in place of one, for the end.
    """
    with path.open("rb") as file:
        file.seek(offset)
        block = file.read(tarfile.BLOCKSIZE)
    if block and block != tarfile.NUL * tarfile.BLOCKSIZE:
        raise tarfile.ReadError("unexpected end of data")


def pictures_in(
    samples: dict[str, dict[str, Any]], wanted: tuple[str, ...], caption_key: str, where: str
) -> Iterator[Place]:
    """The samples that have a picture."""
    for name, sample in samples.items():
        places = (sample[e] for e in wanted if isinstance(sample.get(e), tuple))
        offset, size = next(places, (0, 0))
        if not size:
            continue
        caption = sample.get("caption", sample.get("json", {}).get(caption_key))
        yield Place(name, offset, size, list(captions_of(caption, f"{where} sample {name}")))
