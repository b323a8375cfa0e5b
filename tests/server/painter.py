"""The fake worker, with pictures that show what they were made from, and a count of what runs."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace

import PIL.Image
from server.fake import FACTS, FakeTicket, FakeWorker

from fewstep.server.orders import Drawn, Event, Failed, Limits, Order


@dataclass(eq=False)
class Painting(FakeTicket):
    """One picture under way."""

    worker: Painter

    def picture(self) -> PIL.Image.Image:
        """The prompt's colour; half of it over a picture, all of it inside a mask."""
        drawn, order = super().picture(), self.order
        if order.image is None or order.mask is not None:
            return drawn
        return PIL.Image.blend(order.image.convert("RGB").resize(drawn.size), drawn, 0.5)

    async def events(self) -> AsyncIterator[Event]:
        painter = self.worker
        painter.under_way += 1
        painter.most_under_way = max(painter.most_under_way, painter.under_way)
        try:
            async for event in super().events():
                if isinstance(event, Drawn):
                    painter.drawn.append(self.order)
                elif isinstance(event, Failed):
                    painter.given_up.append(self.order)
                yield event
        finally:
            painter.under_way -= 1


class Painter(FakeWorker):
    """A worker that takes `delay` seconds a step, with a control and a LoRA of a hostile name."""

    def __init__(self, limits: Limits | None = None, delay: float = 0.002) -> None:
        super().__init__(limits)
        self.begin_anew()
        self.delay = delay

    def begin_anew(self) -> None:
        """As at the start."""
        loras = (("ink", "Ink <img src=x onerror=alert(1)>"), ("gold", "Gold leaf"))
        self.facts = replace(FACTS, id="painter", loras=loras, controls=("edges",))
        self.delay, self.is_ready = 0.002, True
        self.orders.clear()
        self.drawn: list[Order] = []
        self.given_up: list[Order] = []
        self.under_way = self.most_under_way = 0
        self.refuse: Callable[[], None] = lambda: None

    def submit(self, order: Order) -> Painting:
        self.refuse()
        self.orders.append(order)
        return Painting(self, order)
