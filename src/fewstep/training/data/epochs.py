"""Which rows make up the batch of a step: each once an epoch, in a new order, of one shape."""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np


class Epochs:
    """Batches over groups of rows; a pure function of (groups, seed, step, batch).

    A group's rows form an endless stream, epoch after epoch, which batches cut evenly: what is left
    of it at the end of an epoch begins its first batch of the next. An epoch's batches are those
    that end in it, over all groups, in random order.
    """

    def __init__(self, groups: Sequence[np.ndarray], seed: int) -> None:
        self.groups = [group for group in groups if len(group)]
        self.seed = seed
        self.recent: OrderedDict[Any, np.ndarray] = OrderedDict()  # orders that are used again

    def rows(self, step: int, batch: int) -> np.ndarray:
        """The rows (batch,) of a step."""
        epoch = self.epoch(step, batch)
        labels = self.kept(("groups", epoch, batch), lambda: self.labels(epoch, batch))
        place = step - self.batches_before(epoch, batch)
        group = int(labels[place])
        number = self.before(group, epoch, batch) + int((labels[:place] == group).sum())
        return self.stream(group, number * batch, (number + 1) * batch)

    def epoch(self, step: int, batch: int) -> int:
        """The epoch of a step: the last before whose start no more than `step` batches end."""
        samples = sum(map(len, self.groups))
        latest = (step + 1 + len(self.groups)) * batch // samples + 1
        epochs = range(latest + 1)
        return bisect_right(epochs, step, key=lambda e: self.batches_before(e, batch)) - 1

    def batches_before(self, epoch: int, batch: int) -> int:
        """The number of batches of all epochs before this one."""
        return sum(self.before(group, epoch, batch) for group in range(len(self.groups)))

    def before(self, group: int, epoch: int, batch: int) -> int:
        """The number of a group's batches that end before an epoch."""
        return epoch * len(self.groups[group]) // batch

    def labels(self, epoch: int, batch: int) -> np.ndarray:
        """The group of each batch of an epoch, in order."""
        counts = [
            self.before(group, epoch + 1, batch) - self.before(group, epoch, batch)
            for group in range(len(self.groups))
        ]
        order = np.random.default_rng([self.seed, epoch, 2**32 - 1])
        return order.permutation(np.repeat(np.arange(len(counts)), counts))

    def stream(self, group: int, start: int, stop: int) -> np.ndarray:
        """Rows number `start` to `stop` - 1 of a group's stream."""
        count = len(self.groups[group])
        places = np.arange(start, stop)
        rows = np.empty(len(places), np.int64)
        for epoch in range(start // count, (stop - 1) // count + 1):
            order = self.kept((group, epoch), lambda e=epoch: self.order(group, e))  # type: ignore
            inside = places // count == epoch
            rows[inside] = order[places[inside] % count]
        return rows

    def order(self, group: int, epoch: int) -> np.ndarray:
        """A group's rows in the order of an epoch."""
        return np.random.default_rng([self.seed, epoch, group]).permutation(self.groups[group])

    def kept(self, key: Any, make: Callable[[], np.ndarray]) -> np.ndarray:
        """What `make` gives, kept for the steps that follow."""
        if key not in self.recent:
            self.recent[key] = make()
            while len(self.recent) > 2 + 2 * len(self.groups):
                self.recent.popitem(last=False)
        self.recent.move_to_end(key)
        return self.recent[key]
