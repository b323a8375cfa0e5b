"""The line of those who wait: bounded, fair between clients, in order within each."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator
from itertools import count
from typing import Generic, TypeVar

from .orders import QueueFull

T = TypeVar("T")


class Line(Generic[T]):
    """Clients take turns; what one client sent comes in its order. For use under a lock."""

    def __init__(self, most: int, most_per_client: int) -> None:
        self.most, self.most_per_client = most, most_per_client
        self._clients: OrderedDict[str, deque[T]] = OrderedDict()  # whose turn is next comes first

    def __len__(self) -> int:
        return sum(map(len, self._clients.values()))

    def __iter__(self) -> Iterator[T]:
        """Those who wait, in the order in which they would leave."""
        for turn in count():
            found = [items[turn] for items in self._clients.values() if len(items) > turn]
            if not found:
                return
            yield from found

    def put(self, client: str, item: T, seconds_each: float = 1.0) -> None:
        """To the end of the client's. `seconds_each` is how often somebody leaves the line.

        Raises QueueFull, with when to try again: then the line will have moved on by a place, or
        by as many as it takes for one of the client's own to leave.
        """
        if len(self) >= self.most:
            raise QueueFull(max(1.0, seconds_each))
        if len(self._clients.get(client, ())) >= self.most_per_client:
            raise QueueFull(max(1.0, seconds_each * len(self._clients)))
        self._clients.setdefault(client, deque()).append(item)

    def pop(self) -> T | None:
        """The next one, None if nobody waits. Its client is behind all others then."""
        if not self._clients:
            return None
        client, items = self._clients.popitem(last=False)
        item = items.popleft()
        if items:
            self._clients[client] = items
        return item

    def remove(self, item: T) -> bool:
        """Takes one out; whether it was there."""
        for client, items in self._clients.items():
            if item in items:
                items.remove(item)
                if not items:
                    del self._clients[client]
                return True
        return False
