"""Runs that are asked to end: by Ctrl-C, or by SIGTERM, with which clusters take a machine away."""

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
    """Within this context the first signal ends nothing; the value tells whether it has come.

    A second Ctrl-C interrupts at once. Python lets only the main thread listen; in any other
    (Ray's) the value stays False.
    """
    come = threading.Event()

    def note(number: int, frame: FrameType | None) -> None:
        if come.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        come.set()

    if threading.current_thread() is not threading.main_thread():
        yield come.is_set
        return
    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield come.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
