"""Promises of the line: bounded, fair between clients, in order within each."""

from __future__ import annotations

import pytest

from fewstep.server.line import Line
from fewstep.server.orders import QueueFull


def filled(*items: str) -> Line[str]:
    """A line of items whose first letter is their client."""
    line: Line[str] = Line(100, 50)
    for item in items:
        line.put(item[0], item)
    return line


def left(line: Line[str]) -> list[str]:
    found = []
    while (item := line.pop()) is not None:
        found.append(item)
    return found


def test_clients_take_turns_and_what_one_sent_comes_in_its_order() -> None:
    line = filled("a1", "a2", "a3", "b1", "c1", "c2")
    expected = ["a1", "b1", "c1", "a2", "c2", "a3"]
    assert list(line) == expected
    assert len(line) == 6
    assert left(line) == expected
    assert len(line) == 0


def test_a_client_that_was_served_stands_behind_one_that_comes() -> None:
    line = filled("a1", "a2", "a3")
    assert line.pop() == "a1"
    line.put("b", "b1")
    assert left(line) == ["a2", "b1", "a3"]


def test_whoever_leaves_the_line_is_gone_and_the_others_keep_their_places() -> None:
    line = filled("a1", "a2", "b1")
    assert line.remove("a1")
    assert not line.remove("a1")
    assert line.remove("b1")
    assert left(line) == ["a2"]


def test_a_full_line_refuses_with_the_seconds_until_a_place_is_free() -> None:
    line: Line[int] = Line(3, 2)
    line.put("a", 1)
    line.put("a", 2)
    with pytest.raises(QueueFull) as full:  # of the client's own
        line.put("a", 3, 7.0)
    assert full.value.retry_after == 7.0
    line.put("b", 4)
    with pytest.raises(QueueFull) as full:
        line.put("c", 5, 2.5)
    assert full.value.retry_after == 2.5
    with pytest.raises(QueueFull) as full:
        line.put("c", 5, 0.01)
    assert full.value.retry_after == 1.0
    line.pop()
    line.put("c", 5)
    assert len(line) == 3
