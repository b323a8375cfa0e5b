"""Encoded samples in files: shards of rows that are written once, checked, and read by mapping.

A shard is a safetensors file that is named by its own sha256. It holds `ids` (n, 16), digests of
what the rows were made of, and tensors (n, ...) of one shape. Beside it a .json file keeps size and
time of the file that was checked, so that a shard is read through only once and when it changed.
"""

from __future__ import annotations

import errno
import hashlib
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from ...checkpoints.config import read_json, replacing, write_json
from ...checkpoints.locate import checksum
from ...checkpoints.weights import read_tensors
from ...errors import CheckpointError, RequestError

SHARD_BYTES = 128 * 2**20  # after so much a shard is written
SHARD_SECONDS = 120.0  # or after so long, so that an interruption loses little
STALE_SECONDS = 86_400.0  # of files that a killed process left half-written
ID_BYTES = 16


def id_of(text: str) -> bytes:
    """The id of a sample that `text` describes in full."""
    return hashlib.sha256(text.encode()).digest()[:ID_BYTES]


class Store:
    """The rows in the shards of one folder, by id. Damaged shards are named, removed, forgotten."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.shards: list[dict[str, Tensor]] = []
        self.places: dict[bytes, int] = {}  # shard << 32 | row
        self.waiting: dict[object, list[tuple[list[bytes], dict[str, Tensor]]]] = {}
        self.bytes, self.since = 0, time.monotonic()
        sweep(folder)
        for path in shards_in(folder):
            self.open(path)

    def open(self, path: Path) -> None:
        """Take up a shard, or remove it if it is damaged."""
        try:
            if not is_whole(path):
                raise CheckpointError("its checksum is another")
            tensors = dict(read_tensors([path]))
            raw = tensors.pop("ids").numpy().tobytes()
        except FileNotFoundError:  # another process found it damaged
            return
        except (CheckpointError, KeyError) as error:
            print(f"{path} is damaged ({error}); its samples are encoded again", file=sys.stderr)
            remove(path)
            return
        shard = len(self.shards) << 32
        for row in range(len(raw) // ID_BYTES):
            self.places[raw[row * ID_BYTES : (row + 1) * ID_BYTES]] = shard | row
        self.shards.append(tensors)

    # ── reading ──

    def __contains__(self, row_id: bytes) -> bool:
        return row_id in self.places

    def find(self, ids: Sequence[bytes]) -> np.ndarray:
        """Where rows are (n,) int64, for `read`."""
        return np.fromiter((self.places[each] for each in ids), np.int64, len(ids))

    def has(self, name: str) -> bool:
        """Whether the rows have a tensor of this name."""
        return any(name in shard for shard in self.shards)

    def read(self, places: np.ndarray, name: str) -> Tensor:
        """One tensor of rows (B, ...), all of one shape."""
        rows = [self.shards[place >> 32][name][place & 0xFFFFFFFF] for place in places.tolist()]
        with torch.autocast("cpu", enabled=False):  # which cannot stack float16
            return torch.stack(rows)

    def shape(self, place: int, name: str) -> tuple[int, ...]:
        """The shape of a tensor of one row."""
        return tuple(self.shards[place >> 32][name].shape[1:])

    # ── writing ──

    @contextmanager
    def filling(self) -> Iterator[None]:
        """Within this context rows may be added; at its end, however it ends, they are written."""
        self.since = time.monotonic()
        try:
            yield
        finally:
            self.flush()

    def add(self, ids: Sequence[bytes], rows: dict[str, Tensor]) -> None:
        """Add rows: tensors (n, ...) on the CPU, by name."""
        shape = tuple((name, tuple(tensor.shape[1:])) for name, tensor in sorted(rows.items()))
        self.waiting.setdefault(shape, []).append((list(ids), rows))
        self.bytes += sum(tensor.nbytes for tensor in rows.values())
        if self.bytes >= SHARD_BYTES or time.monotonic() - self.since >= SHARD_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write all waiting rows, a shard for each shape."""
        waiting, self.waiting = self.waiting, {}
        self.bytes, self.since = 0, time.monotonic()
        for pieces in waiting.values():
            ids = b"".join(row_id for some, _ in pieces for row_id in some)
            tensors = {name: torch.cat([rows[name] for _, rows in pieces]) for name in pieces[0][1]}
            tensors["ids"] = torch.frombuffer(bytearray(ids), dtype=torch.uint8).view(-1, ID_BYTES)
            self.open(self.write(save(tensors)))

    def write(self, contents: bytes) -> Path:
        """The file of a new shard: all of it, or nothing."""
        path = self.folder / f"{hashlib.sha256(contents).hexdigest()}.safetensors"
        try:
            with replacing(path) as beside, beside.open("wb") as file:
                file.write(contents)
                file.flush()
                os.fsync(file.fileno())  # a full disk may show only now
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
            raise RequestError(
                f"{self.folder} cannot be written ({error.strerror or error}); "
                f"{'free some space, or ' * full}set data.cache to another folder; what was "
                "encoded before is kept, and the same command goes on from there"
            ) from error
        note(path)
        return path


def shards_in(folder: Path) -> list[Path]:
    """The shards of a folder, in the order of their names."""
    return sorted(folder.glob("*.safetensors"))


def is_whole(path: Path) -> bool:
    """Whether a shard is as it was written, by its size and time, or else by its checksum."""
    beside = path.with_suffix(".json")
    facts = path.stat()
    try:
        if read_json(beside) == {"size": facts.st_size, "mtime_ns": facts.st_mtime_ns}:
            return True
    except (OSError, CheckpointError):
        pass
    if checksum(path) != path.stem:
        return False
    note(path)
    return True


def note(path: Path) -> None:
    """Keep size and time of a shard that is whole; where that fails, it is read through again."""
    facts = path.stat()
    known = {"size": facts.st_size, "mtime_ns": facts.st_mtime_ns}
    with suppress(OSError):
        write_json(known, path.with_suffix(".json"))


def remove(path: Path) -> None:
    """Remove a shard and what is beside it."""
    for each in (path, path.with_suffix(".json")):
        each.unlink(missing_ok=True)


def sweep(folder: Path) -> None:
    """Remove the half-written files of processes that were killed a day ago or before."""
    for path in folder.glob(".*.partial"):
        try:
            if time.time() - path.stat().st_mtime > STALE_SECONDS:
                path.unlink()
        except OSError:
            pass  # another process was quicker


def verify(folder: Path) -> tuple[int, list[Path]]:
    """The number of shards below a folder and those that are damaged, by reading all of them.

    The next store that opens a damaged shard removes it.
    """
    paths = sorted(folder.rglob("*.safetensors"))
    damaged = [path for path in paths if checksum(path) != path.stem]
    for path in damaged:
        path.with_suffix(".json").unlink(missing_ok=True)
    return len(paths), damaged
