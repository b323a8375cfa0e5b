"""How busy a worker is, and how long things take it."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

RECENT = 0.9  # of a moving average, what stays


@dataclass
class Counts:
    """What `orders.Load` tells; counted by the threads of a worker, read by any."""

    drawn: int = 0
    failed: int = 0
    cancelled: int = 0
    batches: int = 0  # network calls
    rows: int = 0  # pictures in them, added up
    step_seconds: float | None = None  # of a call, a moving average
    picture_seconds: float | None = None  # between two pictures while there is work, the same
    busy_seconds: float = 0.0  # since the last picture
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def a_step_more(self, rows: int, seconds: float) -> None:
        """Counts a call of the network."""
        with self._lock:
            self.batches += 1
            self.rows += rows
            self.step_seconds = averaged(self.step_seconds, seconds)

    def a_picture_more(self, *, was_kept: bool = False) -> None:
        """Counts a picture, just drawn or out of the cache."""
        with self._lock:
            self.drawn += 1
            if not was_kept:
                self.picture_seconds = averaged(self.picture_seconds, self.busy_seconds)
                self.busy_seconds = 0.0

    def a_turn_more(self, seconds: float) -> None:
        """Counts time in which there was work."""
        with self._lock:
            self.busy_seconds += seconds

    def an_end_more(self, *, was_given_up: bool) -> None:
        """Counts an order without a picture."""
        with self._lock:
            self.cancelled += was_given_up
            self.failed += not was_given_up


def averaged(before: float | None, now: float) -> float:
    """A moving average."""
    return now if before is None else RECENT * before + (1 - RECENT) * now
