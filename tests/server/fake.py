"""A worker without a model: squares in a colour of the prompt's, drawn with a delay."""

from __future__ import annotations

import asyncio
import hashlib
import secrets
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import PIL.Image

from fewstep.server.orders import (
    Drawn,
    Event,
    Failed,
    Limits,
    Load,
    ModelFacts,
    Order,
    Queued,
    QueueFull,
    ServerError,
    Started,
    Stepped,
)

FACTS = ModelFacts(
    id="fake/squares",
    family="squares",
    native_size=(64, 64),
    multiple=8,
    steps=(1, 8, 4),
    guidance=(1.0, 20.0, 4.0),
    tasks=("text", "image", "inpaint"),
    loras=(("ink", "Ink drawing"), ("gold", "Gold leaf")),
)


def colour(text: str) -> tuple[int, int, int]:
    """The colour of a prompt."""
    red, green, blue = hashlib.sha256(text.encode()).digest()[:3]
    return (red, green, blue)


@dataclass(eq=False)
class FakeTicket:
    """One square under way."""

    worker: FakeWorker
    order: Order
    id: str = field(default_factory=lambda: secrets.token_urlsafe(12))
    is_cancelled: bool = False
    is_done: bool = False

    def cancel(self) -> None:
        if not self.is_done and not self.is_cancelled:
            self.is_cancelled = True
            self.worker.cancelled += 1

    async def events(self) -> AsyncIterator[Event]:
        yield Queued(0)
        yield Started(0.001)
        steps = self.order.steps or FACTS.steps[2]
        for step in range(1, steps + 1):
            await asyncio.sleep(self.worker.delay)
            self.worker.steps += 1
            if self.is_cancelled:
                yield Failed(ServerError("cancelled", "the picture was given up"))
                return
            preview = PIL.Image.new("RGB", (16, 16), colour(self.order.prompt))
            yield Stepped(step, steps, preview if self.order.previews else None)
        self.is_done = True
        if isinstance(self.worker.failure_of, Exception):
            raise self.worker.failure_of
        yield Drawn(self.picture(), self.record(steps), 0.001, steps * self.worker.delay)

    async def result(self) -> Drawn:
        async for event in self.events():
            if isinstance(event, Drawn):
                return event
            if isinstance(event, Failed):
                raise event.error
        raise AssertionError

    def picture(self) -> PIL.Image.Image:
        size = (self.order.width or 64, self.order.height or 64)
        drawn = PIL.Image.new("RGB", size, colour(self.order.prompt))
        if self.order.mask is None or self.order.image is None:
            return drawn
        image, mask = self.order.image.resize(size), self.order.mask.resize(size)
        return PIL.Image.composite(drawn, image, mask)

    def record(self, steps: int) -> dict[str, Any]:
        order = self.order
        return {
            "prompt": order.prompt,
            "negative_prompt": order.negative_prompt,
            "seed": order.seed,
            "steps": steps,
            "guidance_scale": order.guidance_scale or 4.0,
            "width": order.width or 64,
            "height": order.height or 64,
            "strength": order.strength,
            "model": FACTS.id,
            "scheduler": "LCMScheduler",
            "versions": {"fewstep": "0"},
        }


class FakeWorker:
    """A worker that takes `delay` seconds a step."""

    def __init__(self, limits: Limits | None = None, delay: float = 0.0) -> None:
        self.limits, self.delay, self.facts = limits or Limits(), delay, FACTS
        self.is_ready = True
        self.orders: list[Order] = []
        self.tickets: list[FakeTicket] = []
        self.steps = self.cancelled = 0
        self.is_full = False
        self.failure_of: Exception | None = None
        self.drained = False
        self.finish: Callable[[], None] = lambda: None  # what a drain waits for
        self.observe = lambda name, value: None

    def start(self) -> None:
        self.observe("step_seconds", 0.01)

    def submit(self, order: Order) -> FakeTicket:
        if self.is_full:
            raise QueueFull(2.5)
        self.orders.append(order)
        self.tickets.append(FakeTicket(self, order))
        return self.tickets[-1]

    def load(self) -> Load:
        return Load(0, 1, len(self.orders), 0, self.cancelled, self.steps, self.steps, 0.01)

    def drain(self, seconds: float) -> None:
        self.is_ready = False
        self.finish()
        self.drained = True
