"""What is kept and what is dropped, by which rule; and which rows are held out."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fewstep.errors import RequestError
from fewstep.training.config import Recipe
from fewstep.training.data.encoded import open_source
from fewstep.training.data.sources import Facts, Files
from fewstep.training.data.survey import Survey, held_out, survey

Make = Callable[..., Recipe]


@pytest.fixture
def surveyed(recipe: Make, tmp_path: Path) -> Callable[..., Survey]:
    def make(path: Path, rank: int = 0, ranks: int = 1, **data: Any) -> Survey:
        wanted, memory = recipe(path, **data), tmp_path / "memory"
        return survey(open_source(wanted, memory), wanted.data, memory, rank, ranks)

    return make


def test_every_drop_is_counted_under_its_rule_and_named(pictures: Path, surveyed: Any) -> None:
    (pictures / "1.png").write_bytes(b"no picture")
    whole = (pictures / "2.png").read_bytes()
    (pictures / "2.png").write_bytes(whole[: len(whole) // 2])
    (pictures / "3.png").unlink()
    (pictures / "new.png").write_bytes(whole)
    found = surveyed(pictures, min_side=52, limit=1)
    assert str(found.counts) == (
        "kept 1 of 9 pictures; dropped: 1 no such file (3.png), 1 no caption (new.png), "
        "2 unreadable (1.png, 2.png), 2 too small (0.png, 4.png), 2 over the limit (6.png, 7.png)"
    )
    assert found.counts.kept == len(found.indices) == 1


def test_beyond_a_limit_nothing_is_read(
    pictures: Path, surveyed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[int] = []
    real = Files.look
    monkeypatch.setattr(Files, "look", lambda self, i: looked.append(i) or real(self, i))
    assert surveyed(pictures, limit=3).counts.dropped["over the limit"].number == 5
    assert looked == [0, 1, 2]
    looked.clear()
    assert surveyed(pictures).counts.kept == 8
    assert looked == [3, 4, 5, 6, 7]  # what is known is not read again


def test_a_picture_that_changed_is_looked_at_again(pictures: Path, surveyed: Any) -> None:
    before = surveyed(pictures)
    (pictures / "4.png").write_bytes((pictures / "5.png").read_bytes())
    after = surveyed(pictures)
    assert after.facts[4] == before.facts[5] != before.facts[4]


def test_if_most_pictures_are_unreadable_that_is_an_error(pictures: Path, surveyed: Any) -> None:
    for i in range(5):
        (pictures / f"{i}.png").write_bytes(b"")
    with pytest.raises(
        RequestError, match=r"more than half .*5 unreadable \(0.png, 1.png, 2.png, "
    ):
        surveyed(pictures)


def test_if_nothing_is_kept_the_counts_say_why(pictures: Path, surveyed: Any) -> None:
    with pytest.raises(RequestError, match=r"nothing to train on: kept 0 of 8 .*8 too small"):
        surveyed(pictures, min_side=1000)


def test_workers_find_the_same(pictures: Path, surveyed: Any, tmp_path: Path) -> None:
    with_workers = surveyed(pictures, workers=1)
    for path in (tmp_path / "memory").rglob("*.jsonl"):
        path.unlink()
    assert surveyed(pictures).facts == with_workers.facts


def test_the_shares_of_several_ranks_are_the_whole(pictures: Path, surveyed: Any) -> None:
    shares = [surveyed(pictures, rank=rank, ranks=3).indices for rank in range(3)]
    assert sorted(index for share in shares for index in share) == surveyed(pictures).indices


def test_held_out_rows_stay_so_when_pictures_are_added() -> None:
    def facts(numbers: range) -> list[Facts]:
        return [Facts(hashlib.sha256(f"{n}".encode()).hexdigest(), 9, 9) for n in numbers]

    old, more = facts(range(100)), facts(range(110))
    before, after = set(held_out(old, 20).tolist()), set(held_out(more, 20).tolist())
    assert len(before) == len(after) == 20
    assert len(before & after) > 14
    assert held_out(old, 0).tolist() == []
    with pytest.raises(RequestError, match=r"data.held_out=100 must lie in \[0, 99\]"):
        held_out(old, 100)
