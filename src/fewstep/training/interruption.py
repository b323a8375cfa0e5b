"""Runs that are asked to end: SIGTERM, by which clusters announce that they take a machine away."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from ..errors import FewstepError


class StoppedError(FewstepError):
    """The run was asked to end before its last step; its checkpoint is written."""


@contextmanager
def stopping() -> Iterator[Callable[[], bool]]:
    """Within this context SIGTERM ends nothing; the value tells whether it has come.

    Python lets only the main thread listen; in any other (Ray's) the value stays False.
    """
    come = threading.Event()

    def note(number: int, frame: FrameType | None) -> None:
        come.set()

    if threading.current_thread() is not threading.main_thread():
        yield come.is_set
        return
    before = signal.signal(signal.SIGTERM, note)
    try:
        yield come.is_set
    finally:
        signal.signal(signal.SIGTERM, before)
