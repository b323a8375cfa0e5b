"""Pictures that are handed out by an address: opaque names, in memory, for a while."""

from __future__ import annotations

import secrets
import time
from collections import OrderedDict
from dataclasses import dataclass


@dataclass(frozen=True)
class File:
    """A picture's bytes."""

    data: bytes
    media: str
    ends: float  # of the monotonic clock


class Files:
    """The newest pictures, as many as `most` bytes hold, each for `seconds`."""

    def __init__(self, most: int, seconds: float) -> None:
        self.most, self.seconds, self.size = most, seconds, 0
        self.kept: OrderedDict[str, File] = OrderedDict()

    def put(self, data: bytes, media: str) -> str:
        """The name under which `get` finds the picture."""
        name = secrets.token_urlsafe(24)
        self.kept[name] = File(data, media, time.monotonic() + self.seconds)
        self.size += len(data)
        while self.kept and (self.size > self.most or self.is_oldest_over()):
            self.size -= len(self.kept.popitem(last=False)[1].data)
        return name

    def is_oldest_over(self) -> bool:
        """Whether the time of the oldest is over."""
        return next(iter(self.kept.values())).ends < time.monotonic()

    def get(self, name: str) -> File | None:
        """The picture, if it is still there."""
        found = self.kept.get(name)
        return None if found is None or found.ends < time.monotonic() else found
