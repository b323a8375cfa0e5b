"""Shards: what goes in comes out, mapped; damage is found, named and undone; disks are full."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from fewstep.errors import RequestError
from fewstep.training.data import store as module
from fewstep.training.data.store import Store, id_of, shards_in, verify


def filled(folder: Path, start: int, stop: int, size: int = 2) -> Store:
    store = Store(folder)
    ids = [id_of(f"{i}") for i in range(start, stop)]
    rows = torch.arange(start, stop).half()[:, None].expand(-1, size)
    with store.filling():
        store.add(ids, {"mean": rows.contiguous(), "std": -rows.contiguous()})
    return store


def read(store: Store, numbers: list[int], name: str = "mean") -> list[float]:
    return store.read(store.find([id_of(f"{i}") for i in numbers]), name)[:, 0].tolist()


def test_rows_are_read_by_their_ids_from_all_shards(tmp_path: Path) -> None:
    filled(tmp_path, 0, 5)
    written = filled(tmp_path, 5, 9, size=3)
    for store in (written, Store(tmp_path)):
        assert read(store, [3, 0, 4]) == [3, 0, 4]
        assert read(store, [8, 5], "std") == [-8, -5]
    assert id_of("9") not in store
    assert len(shards_in(tmp_path)) == 2


def test_rows_of_two_shapes_go_to_two_shards(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with store.filling():
        store.add([id_of("a")], {"mean": torch.ones(1, 2)})
        store.add([id_of("b")], {"mean": torch.ones(1, 3)})
    assert len(shards_in(tmp_path)) == 2
    assert store.shape(int(store.find([id_of("b")])[0]), "mean") == (3,)


def test_an_interruption_keeps_what_was_added(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with pytest.raises(KeyboardInterrupt), store.filling():
        store.add([id_of("0")], {"mean": torch.ones(1, 2)})
        raise KeyboardInterrupt
    assert id_of("0") in Store(tmp_path)


def test_shards_are_written_as_they_fill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SHARD_BYTES", 8)
    store = Store(tmp_path)
    with store.filling():
        for i in range(4):
            store.add([id_of(f"{i}")], {"mean": torch.full((1, 2), float(i)).half()})
            assert len(shards_in(tmp_path)) == (i + 1) // 2


@pytest.mark.parametrize("damage", ["flip", "cut", "empty"])
def test_a_damaged_shard_is_named_and_removed(
    damage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    filled(tmp_path, 0, 5)
    filled(tmp_path, 5, 9)
    first = shards_in(tmp_path)[0]
    content = bytearray(first.read_bytes())
    content[-1] ^= 1
    first.write_bytes({"flip": content, "cut": content[:-3], "empty": b""}[damage])
    store = Store(tmp_path)
    assert f"{first} is damaged" in capsys.readouterr().err
    assert len(shards_in(tmp_path)) == 1
    assert len(store.places) in (4, 5)
    Store(tmp_path)
    assert not capsys.readouterr().err


def test_damage_that_leaves_size_and_time_is_found_by_the_check(tmp_path: Path) -> None:
    filled(tmp_path / "a", 0, 5)
    filled(tmp_path / "b", 0, 4)
    assert verify(tmp_path) == (2, [])
    (path,) = shards_in(tmp_path / "b")
    facts = path.stat()
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    assert verify(tmp_path) == (2, [path])
    assert not Store(tmp_path / "b").places  # the check made the store look again


def test_a_copied_cache_is_whole_though_its_times_differ(tmp_path: Path) -> None:
    filled(tmp_path, 0, 5)
    for path in shards_in(tmp_path):
        os.utime(path, (1, 1))
    assert read(Store(tmp_path), [2]) == [2]


def test_a_full_disk_is_one_line_and_loses_nothing_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    filled(tmp_path, 0, 5)

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module.os, "fsync", full)
    with pytest.raises(RequestError, match=r"No space left.*free some space, or set data\.cache"):
        filled(tmp_path, 5, 9)
    assert read(Store(tmp_path), [0, 4]) == [0, 4]
    assert len(list(tmp_path.iterdir())) == 2  # the shard and what is known of it: no rest


def test_rows_stay_in_the_file_until_they_are_read(tmp_path: Path) -> None:
    rows = torch.from_numpy(np.random.default_rng(0).standard_normal((1, 2**23), np.float32))
    store = Store(tmp_path)
    with store.filling():
        store.add([id_of("a")], {"mean": rows})
    before = resident()
    opened = Store(tmp_path)
    assert resident() - before < 8 * 2**20
    assert torch.equal(opened.read(opened.find([id_of("a")]), "mean"), rows)


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
