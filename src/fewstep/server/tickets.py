"""What a thread has to say to a coroutine about one order, and how the order is given up."""

from __future__ import annotations

import asyncio
import secrets
import threading
import time
import weakref
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass, field

from .orders import Drawn, Event, Failed, Order, Queued, Started

NEAR = 8  # in a line, of which every move is told
FEW = 8  # moves for the length of a line that are told further back


class Mail:
    """Events on their way from the worker's thread to a reader in any event loop.

    Bounded: of places in the line and of steps only the newest waits to be read.
    """

    def __init__(self) -> None:
        self.end: Drawn | Failed | None = None
        self._unread: dict[type, Event] = {}  # the newest of each kind
        self._waiting: list[asyncio.Future[None]] = []
        self._lock = threading.Lock()

    def put(self, event: Event) -> bool:
        """Hands an event over; whether it was taken: nothing follows the end."""
        with self._lock:
            if self.end is not None:
                return False
            if isinstance(event, (Drawn, Failed)):
                self.end = event
            self._unread.pop(type(event), None)
            self._unread[type(event)] = event
            if isinstance(event, Started):  # a place in the line is of no interest any more
                self._unread.pop(Queued, None)
            waiting, self._waiting = self._waiting, []
        for future in waiting:
            with suppress(RuntimeError):  # the loop is closed, so nobody waits
                future.get_loop().call_soon_threadsafe(resolve, future)
        return True

    def take(self) -> Event | None:
        """The next unread event."""
        with self._lock:
            first = next(iter(self._unread), None)
            return None if first is None else self._unread.pop(first)

    async def changed(self) -> None:
        """Returns when there is something unread, or the end has come."""
        with self._lock:
            if self._unread or self.end is not None:
                return
            future = asyncio.get_running_loop().create_future()
            self._waiting.append(future)
        await future


def resolve(future: asyncio.Future[None]) -> None:
    """Wakes who waits for it, if somebody still does."""
    if not future.done():
        future.set_result(None)


@dataclass(eq=False)
class Place:
    """What the worker knows of an order; the reader's side sets `is_given_up` alone."""

    order: Order
    mail: Mail = field(default_factory=Mail)
    submitted: float = field(default_factory=time.monotonic)
    is_given_up: bool = False
    ahead: int = -1  # as it was told last

    @property
    def is_late(self) -> bool:
        """Whether its time is over."""
        seconds = self.order.seconds
        return seconds is not None and time.monotonic() > self.submitted + seconds

    def give_up(self) -> None:
        """Let the worker drop it before its next step. Takes no lock: garbage collection calls."""
        self.is_given_up = True

    def tell_ahead(self, ahead: int) -> None:
        """Say how many stand before it, if that has changed; far back, if it has by an eighth.

        Telling all of a long line of every move would cost more than some pictures do.
        """
        moved = abs(ahead - self.ahead)
        if moved and (ahead <= NEAR or FEW * moved >= self.ahead):
            self.ahead = ahead
            self.mail.put(Queued(ahead))


class PlacedTicket:
    """An order under way, as an interface holds it (`orders.Ticket`).

    An order is given up when nobody can read its picture any more: by `cancel`, by leaving
    `events()` or `result()` before the end, or when ticket and iterator are let go of.
    """

    def __init__(self, place: Place) -> None:
        self.id = secrets.token_urlsafe(16)
        self._place = place
        weakref.finalize(self, place.give_up).atexit = False

    def events(self) -> AsyncIterator[Event]:
        """What becomes of the order; ends behind Drawn or Failed. For one reader."""
        return Events(self, self._place)

    async def result(self) -> Drawn:
        """The picture. Raises the ServerError that it failed with."""
        mail = self._place.mail
        async for _ in self.events():
            pass
        if isinstance(mail.end, Failed):
            raise mail.end.error
        assert mail.end is not None
        return mail.end

    def cancel(self) -> None:
        """Give it up: its place is free within a step. Does nothing at the end."""
        self._place.give_up()


class Events:
    """The iterator of a ticket's events."""

    def __init__(self, ticket: PlacedTicket, place: Place) -> None:
        self._ticket: PlacedTicket | None = ticket  # it lives while its events are read
        self._place = place

    def __aiter__(self) -> Events:
        return self

    async def __anext__(self) -> Event:
        mail = self._place.mail
        try:
            while True:
                is_over = self._ticket is None or mail.end is not None  # before `take` looks
                if (event := mail.take()) is not None:
                    return event
                if is_over:
                    raise StopAsyncIteration
                await mail.changed()
        except asyncio.CancelledError:
            self._leave()
            raise

    async def aclose(self) -> None:
        """Leave: the order is given up, unless it has ended."""
        self._leave()

    def __del__(self) -> None:
        self._place.give_up()

    def _leave(self) -> None:
        self._place.give_up()
        self._ticket = None
