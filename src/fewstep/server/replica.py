"""What Ray Serve starts once for each device: a worker, and how it is spoken to in plain values."""

from __future__ import annotations

import logging
import secrets
from collections import deque
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import torch

from .orders import Drawn, Event, Failed, Limits, Queued, ServerError
from .wire import pack, unpack
from .worker import PipelineWorker

OBSERVED = 256  # figures of stages that wait to be told
LOGGED = 16  # texts that do


class Kept(logging.Handler):
    """Keeps what is logged, for the front's log."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: deque[str] = deque(maxlen=LOGGED)

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(self.format(record))


class Replica:
    """A `PipelineWorker` in a process of its own. It exists once its model has drawn a picture."""

    def __init__(
        self, model: str, limits: dict[str, Any], threads: int | None, choices: dict[str, Any]
    ) -> None:
        if threads is not None:
            torch.set_num_threads(threads)
        dtype = choices["dtype"]
        given = {**choices, "dtype": None if dtype is None else getattr(torch, dtype)}
        self.name = secrets.token_hex(4)
        self.observed: deque[tuple[str, float]] = deque(maxlen=OBSERVED)
        self.worker = PipelineWorker(model, Limits(**limits), **given)
        self.kept = Kept()
        logging.getLogger("fewstep").addHandler(self.kept)
        self.worker.observe = lambda stage, seconds: self.observed.append((stage, seconds))
        self.worker.start()
        self.worker.wait_until_ready()

    def check_health(self) -> None:
        """Asked by Ray, which starts another in the place of one that raises."""
        if not self.worker.is_ready:
            raise RuntimeError("the worker ended")

    async def facts(self) -> dict[str, Any]:
        """What a client may know of the model."""
        return pack(self.worker.facts)

    async def draw(self, order: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        """That it has come, and what becomes of an order; who stops listening gives it up."""
        yield {"event": None}
        try:
            ticket = self.worker.submit(unpack(order))
        except ServerError as error:
            yield self.told(Failed(error))
            return
        async with aclosing(ticket.events()) as events:  # type: ignore[type-var]
            async for event in events:
                if not isinstance(event, Queued):  # the line is the front's
                    yield self.told(event)

    def told(self, event: Event) -> dict[str, Any]:
        """An event, and with it what was observed and logged since the last one."""
        news = {"event": pack(event), "observed": taken(self.observed)}
        news["logged"] = taken(self.kept.texts)
        if isinstance(event, (Drawn, Failed)):
            news |= {"replica": self.name, "load": pack(self.worker.load())}
        return news


def taken(waiting: deque[Any]) -> list[Any]:
    """All that waits, which then waits no more; another thread may add to it meanwhile."""
    return [waiting.popleft() for _ in range(len(waiting))]
