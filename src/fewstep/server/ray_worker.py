"""Many devices or machines behind one server, by Ray Serve (`fewstep serve --ray`).

The HTTP front stays in this process, with all of its guards; no proxy of Ray's listens anywhere.
Behind it `RayWorker` is a worker as any other (`orders.Worker`): it keeps the line, so that order,
fairness, limits and refusals are those of all replicas together, and gives replicas just as much as
keeps them busy. Ray Serve chooses the replica with the least to do, streams its events, carries a
cancellation to it and starts another in the place of one that died.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from .counts import Counts
from .line import Line
from .loaded import Loaded
from .loading import shipped
from .orders import Drawn, Failed, Limits, Load, ModelFacts, Order, ServerError, Started
from .ray_cluster import Cluster, check_device
from .replica import Replica
from .tickets import Place, PlacedTicket
from .troubles import fail, let_go, not_ready
from .wire import pack, unpack

log = logging.getLogger(__name__)

LOOK = 0.5  # seconds between two looks at the replicas and at those whose time is over
LATE = 2.0  # seconds that a replica may take to say so itself
GRACE = 20.0  # seconds to end the replicas, behind the time that a drain is given


@dataclass(eq=False)
class FarPlace(Place):
    """An order that somebody has to be told of when it is given up."""

    told: Callable[[FarPlace], None] = lambda place: None

    def give_up(self) -> None:
        super().give_up()
        self.told(self)


class RayWorker:
    """A worker (`orders.Worker`) of several replicas of a model, each a `PipelineWorker`.

    `replicas` None: as many as the cluster has GPUs, else one on each machine. `address` None: a
    cluster of this machine alone. `device` is auto, cuda or cpu; `threads` are of each replica, and
    `dtype` is a name. `choices` are those of a PipelineWorker, of each replica. Connects at once;
    models are loaded behind `start`.

    A picture is not drawn again when its replica dies: an order that kills a process would go on to
    kill the next. Its client is told, and may send it again.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        limits: Limits | None = None,
        *,
        replicas: int | None = None,
        address: str | None = None,
        device: str = "auto",
        dtype: str | None = None,
        threads: int | None = None,
        max_batch: int = 8,
        loras: Sequence[str | tuple[str, str]] = (),
        control: str | None = None,
        **choices: Any,
    ) -> None:
        self.limits = limits or Limits()
        self.observe: Callable[[str, float], None] = lambda stage, seconds: None
        self.failure: BaseException | None = None
        # Half as many more are on their way or being decoded, so that no step waits for them.
        self.under_way = max_batch + -(-max_batch // 2)
        check_device(device)
        self._cluster = Cluster(address)
        try:
            self._shares = self._cluster.shares(device, replicas, threads)
        except BaseException:
            self._cluster.close()
            raise
        choices |= {"max_batch": max_batch, "dtype": dtype, "device": self._shares.device}
        choices |= {"control": control and found(control), "loras": list(map(found_lora, loras))}
        inner = replace(  # what is asked is bounded here
            self.limits, waiting=4 * self.under_way, waiting_per_client=4 * self.under_way
        )
        self._arguments = (found(model), asdict(inner), self._shares.threads, choices)
        self._line: Line[FarPlace] = Line(self.limits.waiting, self.limits.waiting_per_client)
        self._lock = threading.Lock()  # of the line
        self._counts = Counts()
        self._loads: dict[str, Load] = {}  # what each replica last said
        self._facts: ModelFacts | None = None
        self._up = 0  # replicas that can draw
        self._drawing: Any = None  # the handle
        self._tasks: dict[FarPlace, asyncio.Task[None]] = {}  # what replicas have or are given
        self._giving: FarPlace | None = None  # who is on the way to a replica
        self._is_draining, self._ends = False, 0.0
        self._started, self._settled = threading.Event(), threading.Event()
        self._changed = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop  # since the start
        self._thread = threading.Thread(target=self._run, name="fewstep-ray", daemon=True)

    # ── what interfaces call, from any thread ──

    def start(self) -> None:
        """Begin to load and to serve."""
        if not self._started.is_set():
            self._started.set()
            self._loop = asyncio.new_event_loop()
            self._thread.start()

    @property
    def is_ready(self) -> bool:
        """Whether orders are taken: a replica at least can draw, and it is not draining."""
        is_there = self._facts is not None and self._up > 0
        return is_there and self.failure is None and not self._is_draining

    def wait_until_ready(self, seconds: float | None = None) -> bool:
        """Waits until orders are taken; whether they are. Raises what loading failed with."""
        self._settled.wait(seconds)
        if self.failure is not None:
            raise self.failure
        return self.is_ready

    @property
    def facts(self) -> ModelFacts:
        """What a client may know of the model. Raises ServerError while it loads."""
        if self._facts is None:
            raise not_ready("the model is still loading" if self.failure is None else "no model")
        return self._facts

    def submit(self, order: Order) -> PlacedTicket:
        """Take an order. Raises ServerError (QueueFull) if it cannot be served."""
        if self._is_draining:
            raise not_ready("the server is shutting down")
        if not self.is_ready:
            raise not_ready("no replica is ready" if self._facts else "the model is still loading")
        facts = self.facts
        controlled = dict.fromkeys(facts.extra["controlled_tasks"])
        # The model's own checks and defaults need no more than its facts.
        model = Loaded(dict.fromkeys(facts.tasks), controlled, facts)
        place = FarPlace(model.settled(order.checked(self.limits)), told=self._tell_given_up)
        ticket = PlacedTicket(place)
        with self._lock:
            if self._is_draining:
                raise not_ready("the server is shutting down")
            self._line.put(order.client, place, self._counts.picture_seconds or 1.0)
            self._tell_ahead()
        self._loop.call_soon_threadsafe(self._dispatch)
        return ticket

    def load(self) -> Load:
        """How busy all replicas are; their calls of the network as they last told."""
        with self._lock:
            waiting, running = len(self._line), len(self._tasks)
        loads = list(self._loads.values())
        seconds = [each.seconds_per_step for each in loads if each.seconds_per_step is not None]
        return Load(
            waiting=waiting,
            running=running,
            drawn=self._counts.drawn,
            failed=self._counts.failed,
            cancelled=self._counts.cancelled,
            batches=sum(each.batches for each in loads),
            rows=sum(each.rows for each in loads),
            seconds_per_step=sum(seconds) / len(seconds) if seconds else None,
        )

    def drain(self, seconds: float) -> None:
        """Refuse new orders, finish what is under way, for so long at most, then end all replicas.

        Blocks until then. What is not finished fails with `not_ready`.
        """
        with self._lock:
            self._is_draining, self._ends = True, time.monotonic() + seconds
        if self._thread.is_alive():
            with suppress(RuntimeError):  # the loop has ended by itself
                self._loop.call_soon_threadsafe(self._changed.set)
            self._thread.join(seconds + GRACE)
        self._cluster.close()

    # ── the thread of the event loop ──

    def _run(self) -> None:
        try:
            self._loop.run_until_complete(self._main())
        except BaseException as error:
            self.failure = error
            log.error("the replicas could not be started", exc_info=error)
        finally:
            self._settled.set()
            self._cluster.close()
            self._loop.close()

    async def _main(self) -> None:
        calls = 2 * self.under_way  # a call that was given up may take a moment to end
        handle = self._cluster.deploy(Replica, self._arguments, self._shares, calls)
        self._drawing = handle.options(stream=True).draw
        await self._wait_for_one(handle)
        self._settled.set()
        while not self._is_over():
            await self._look()
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._changed.wait(), LOOK)
            self._changed.clear()
        await self._end_all()

    async def _wait_for_one(self, handle: Any) -> None:
        """Waits until a replica is ready. Raises what none could be started for."""

        async def ask() -> ModelFacts:
            found: ModelFacts = unpack(await handle.facts.remote())
            return found

        asked = self._loop.create_task(ask())
        while not asked.done() and not self._is_draining:
            await asyncio.to_thread(self._cluster.ready)
            await asyncio.wait([asked], timeout=LOOK)
        if asked.done():
            self._facts, self._up = await asked, 1
        asked.cancel()

    async def _look(self) -> None:
        """Sees how many replicas there are, and whose time is over."""
        before = self._up
        try:
            self._up = await asyncio.to_thread(self._cluster.ready)
        except Exception as error:
            self._up = 0
            if before:
                log.error("the cluster does not answer", exc_info=error)
        if self._up < before:
            log.warning("%d of %d replicas are left", self._up, self._shares.replicas)
        with self._lock:
            for place in list(self._line):
                if let_go(place, self._counts):
                    self._line.remove(place)
        for place, task in list(self._tasks.items()):
            if place.is_late and time.monotonic() > place.submitted + LATE + seconds_of(place):
                task.cancel()
        self._dispatch()

    def _is_over(self) -> bool:
        """Whether nothing is to be done any more, or no time is left for it."""
        if not self._is_draining:
            return False
        with self._lock:
            left = len(self._line) + len(self._tasks)
        return not left or time.monotonic() > self._ends

    async def _end_all(self) -> None:
        """Fails all that is left."""
        with self._lock:
            while (place := self._line.pop()) is not None:
                fail(place, not_ready("the server is shutting down"), self._counts)
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # ── one order ──

    def _dispatch(self) -> None:
        """Gives replicas as much as they can have under way, out of the line.

        One after the other: Ray compares what replicas have been given, not what is on its way.
        """
        moved = False
        while self._giving is None and len(self._tasks) < self._up * self.under_way:
            with self._lock:
                place = self._line.pop()
            if place is None:
                break
            moved = True
            if not let_go(place, self._counts):
                self._giving = place
                self._tasks[place] = task = self._loop.create_task(self._draw(place))
                task.add_done_callback(partial(self._ended, place))
        if moved:
            with self._lock:
                self._tell_ahead()

    def _given(self, place: FarPlace) -> None:
        """An order has come to a replica, or to its end: the next one may go."""
        if self._giving is place:
            self._giving = None
        self._dispatch()

    def _ended(self, place: FarPlace, task: asyncio.Task[None]) -> None:
        """An order has come to its end; one whose task was cancelled may not even have begun."""
        del self._tasks[place]
        if place.mail.end is None and not let_go(place, self._counts):
            fail(place, not_ready("the server is shutting down"), self._counts)
        self._given(place)
        if self._is_draining:
            self._changed.set()

    def _tell_given_up(self, place: FarPlace) -> None:
        """From any thread, and from the garbage collector too: takes no lock."""
        with suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(self._leave, place)

    def _leave(self, place: FarPlace) -> None:
        """Drops an order that was given up, wherever it stands, unless it has ended."""
        if (task := self._tasks.get(place)) is not None:
            task.cancel()
            return
        with self._lock:
            if self._line.remove(place):
                let_go(place, self._counts)
                self._tell_ahead()

    def _tell_ahead(self) -> None:
        """Tells those in the line how many stand before them. Under the lock."""
        for ahead, waiting in enumerate(self._line):
            waiting.tell_ahead(ahead)

    async def _draw(self, place: FarPlace) -> None:
        """Lets a replica draw, and hands its events over."""
        waited = time.monotonic() - place.submitted
        response: Any = None
        try:
            self.observe("queue", waited)
            left = max(0.1, seconds_of(place) - waited)
            response = self._drawing.remote(pack(replace(place.order, seconds=left)))
            async for news in response:
                if news["event"] is None:
                    self._given(place)
                else:
                    self._hear(place, news, waited)
            response = None
            if place.mail.end is None:
                fail(place, lost(), self._counts)
        except asyncio.CancelledError:
            pass  # `_ended` tells it
        except Exception as error:
            fail(place, lost() if self._cluster.is_lost(error) else error, self._counts)
        if response is not None:
            response.cancel()

    def _hear(self, place: FarPlace, news: dict[str, Any], waited: float) -> None:
        """Hands over what a replica tells of an order that had waited here before."""
        for stage, seconds in news["observed"]:
            if stage != "queue":
                self.observe(stage, seconds)
        for text in news["logged"]:
            log.error("a replica: %s", text)
        if "load" in news:
            self._loads[news["replica"]] = unpack(news["load"])
        event = unpack(news["event"])
        if isinstance(event, (Started, Drawn)):
            event = replace(event, waited=event.waited + waited)
        if not place.mail.put(event):
            return
        if isinstance(event, Drawn):
            self._counts.a_turn_more(event.seconds / len(self._tasks))
            self._counts.a_picture_more(was_kept=event.cached)
        elif isinstance(event, Failed):
            self._counts.an_end_more(was_given_up=event.error.code == "cancelled")


def lost() -> ServerError:
    """The replica ended before the picture did."""
    return ServerError(
        "not_ready",
        "the process that drew this picture ended",
        hint="send it again; another takes its place",
    )


def seconds_of(place: Place) -> float:
    """How long an order may take."""
    return place.order.seconds or Limits.seconds


def found(name: str | os.PathLike[str]) -> str:
    """What replicas find a folder or a file by, whatever folder they work in; a name as it is."""
    place = Path(name)
    is_name = shipped(str(name)) != str(name) or not place.exists()
    return str(name) if is_name else str(place.absolute())


def found_lora(entry: str | tuple[str, str]) -> str | tuple[str, str]:
    """The same of a LoRA."""
    return found(entry) if isinstance(entry, str) else (entry[0], found(entry[1]))
