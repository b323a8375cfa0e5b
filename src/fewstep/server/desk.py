"""The desk: takes orders of all interfaces, follows them, and gives them up for who leaves."""

from __future__ import annotations

import asyncio
import itertools
import time
import weakref
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import PIL.Image
from fastapi import Request

from . import pictures
from .fetching import fetch
from .files import Files
from .metrics import Metrics
from .orders import Drawn, Event, Failed, Limits, ModelFacts, Order, ServerError, Stepped, Worker
from .pictures import Format
from .problems import Refused, invalid
from .settings import Settings

Result = TypeVar("Result")
OWNER = "x-client-id"  # tells apart those who share an address
GRACE = 10.0  # seconds behind an order's own time, until its worker is not waited for any more


class Held:
    """The decoded pictures that are in memory, as long as anyone has them."""

    def __init__(self, most: int) -> None:
        self.most, self.numbers = most, itertools.count()
        self.kept: weakref.WeakValueDictionary[int, PIL.Image.Image] = weakref.WeakValueDictionary()

    def size(self) -> int:
        """Their bytes."""
        there = [p for found in self.kept.valuerefs() if (p := found()) is not None]
        return sum(p.width * p.height * len(p.getbands()) for p in there)

    def keep(self, picture: PIL.Image.Image) -> None:
        """Count a picture in. Raises ServerError if that is too much."""
        self.kept[next(self.numbers)] = picture
        if self.size() > self.most:
            message = "the pictures of those who wait take too much memory"
            raise Refused("queue_full", message, hint="try again, or send less", retry_after=2)


async def within(events: AsyncIterator[Event], seconds: float) -> AsyncGenerator[Event, None]:
    """Events; if the worker hangs, a failure when the time is over."""
    ends = time.monotonic() + seconds
    while True:
        try:
            event = await asyncio.wait_for(anext(events), ends - time.monotonic())
        except StopAsyncIteration:
            return
        except asyncio.TimeoutError:
            yield Failed(ServerError("timeout", "the picture was not done in time"))
            return
        yield event


@dataclass(eq=False)
class Job:
    """An order under way, and how far it is."""

    ticket: Any
    order: Order
    owner: str
    kind: str  # of the interface
    step: int = 0
    steps: int = 0
    preview: PIL.Image.Image | None = None
    number: int = field(default=0)  # of a request's pictures

    @property
    def id(self) -> str:
        """The name by which its client can give it up."""
        return str(self.ticket.id)


def client_of(request: Request) -> str:
    """Who is served fairly beside others."""
    return str(request.scope["state"]["client"])


def owner_of(request: Request) -> str:
    """Whose jobs may be interrupted together."""
    return f"{client_of(request)} {request.headers.get(OWNER, '')[:64]}"


class Desk:
    """What all interfaces share."""

    def __init__(self, worker: Worker, settings: Settings) -> None:
        self.worker, self.settings = worker, settings
        self.limits: Limits = worker.limits
        self.metrics = Metrics(worker)
        self.files = Files(settings.file_bytes, settings.file_seconds)
        self.held = Held(settings.picture_bytes)
        self.jobs: dict[str, Job] = {}
        self.pool = ThreadPoolExecutor(settings.threads, thread_name_prefix="pictures")
        self.fetchers = ThreadPoolExecutor(4, thread_name_prefix="addresses")  # they wait

    @property
    def facts(self) -> ModelFacts:
        """The model's. Raises ServerError while it is loaded."""
        self.check_ready()
        return self.worker.facts

    @property
    def headers(self) -> dict[str, str]:
        """What answers with pictures say of all of them."""
        names = self.worker.facts.extra.get("approximations", ())
        return {"X-Approximations": ", ".join(names) or "none"}

    def check_ready(self) -> None:
        """Raises ServerError while no pictures are drawn."""
        if not self.worker.is_ready:
            raise Refused(
                "not_ready",
                "the model is being loaded, or the server is ending",
                hint="ask /ready",
                retry_after=2,
            )

    # ── pictures, beside the event loop ──

    async def aside(self, function: Callable[..., Result], *arguments: Any) -> Result:
        """The result of a function that takes time."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self.pool, function, *arguments)

    def decoded(self, file: str | bytes, name: str) -> PIL.Image.Image:
        """The picture of a file, of base64 or of a data URL: RGB, a mask in L. Takes time."""
        data = pictures.unpack(file, name) if isinstance(file, str) else file
        picture = pictures.decode_rgb(data, name, self.limits)
        if name == "mask":
            picture = picture.convert("L")
        self.held.keep(picture)
        return picture

    async def bytes_of(self, text: str, name: str) -> bytes:
        """The file that a text is, or leads to if addresses are allowed."""
        if "://" not in text[:256].partition(",")[0]:
            return await self.aside(pictures.unpack, text, name)
        if not self.settings.allow_urls:
            raise ServerError(
                "url_not_allowed",
                f"{name} is an address, and this server fetches none",
                param=name,
                hint="send the picture itself in base64",
            )
        loop, most = asyncio.get_running_loop(), self.limits.body_bytes
        return await loop.run_in_executor(self.fetchers, fetch, text, name, most)

    async def picture(self, text: str | None, name: str) -> PIL.Image.Image | None:
        """The picture that a field holds or leads to, if it does."""
        if text is None:
            return None
        data = await self.bytes_of(text, name)
        return await self.aside(self.decoded, data, name)

    async def file(self, drawn: Drawn, format: Format, quality: int) -> bytes:
        """A drawn picture as a file that holds its record."""
        return await self.aside(pictures.encode, drawn.image, format, drawn.record, quality)

    async def preview(self, image: PIL.Image.Image, format: Format = "jpeg") -> str:
        """A picture of a step as base64."""
        return pictures.packed(await self.aside(pictures.encode, image, format, None, 80))

    # ── orders ──

    def take(self, order: Order, owner: str, kind: str, number: int = 0) -> Job:
        """Give an order to the worker. Raises ServerError if it cannot be served."""
        self.check_ready()
        checked = order.checked(self.limits)
        job = Job(self.worker.submit(checked), checked, owner, kind, number=number)
        self.jobs[job.id] = job
        return job

    def take_all(self, orders: list[Order], owner: str, kind: str) -> list[Job]:
        """Give orders to the worker, all or none."""
        limits = self.limits
        most = min(limits.pictures, limits.waiting, limits.waiting_per_client)
        if len(orders) > most:
            raise invalid(f"at most {most} pictures of one request", "n")
        jobs: list[Job] = []
        try:
            for number, order in enumerate(orders):
                jobs.append(self.take(order, owner, kind, number))
        except ServerError:
            self.release(jobs)
            raise
        return jobs

    async def follow(self, job: Job) -> AsyncGenerator[Event, None]:
        """What becomes of a job; who stops listening gives it up."""
        try:
            async with aclosing(job.ticket.events()) as events:
                seconds = (job.order.seconds or self.limits.seconds) + GRACE
                async for event in within(events, seconds):
                    self.metrics.event(event)
                    if isinstance(event, Stepped):
                        job.step, job.steps = event.step, event.steps
                        job.preview = event.preview or job.preview
                    yield event
        finally:
            self.release([job])

    async def finish(self, job: Job) -> Drawn:
        """The picture of a job. Raises the ServerError that it failed with."""
        async with aclosing(self.follow(job)) as events:
            async for event in events:
                if isinstance(event, Failed):
                    raise event.error
                if isinstance(event, Drawn):
                    return event
        raise ServerError("internal", "the picture was lost")

    def release(self, jobs: list[Job]) -> None:
        """Give jobs up, those that are not done; and forget them."""
        for job in jobs:
            job.ticket.cancel()
            self.jobs.pop(job.id, None)

    def cancel(self, owner: str, kind: str) -> int:
        """Give up the jobs that one owner has by one interface; how many they were."""
        found = [job for job in self.jobs.values() if (job.owner, job.kind) == (owner, kind)]
        for job in found:
            job.ticket.cancel()
        return len(found)

    @asynccontextmanager
    async def watched(self, request: Request, jobs: list[Job]) -> AsyncIterator[None]:
        """A block at whose end, or when the client leaves, jobs are given up."""
        leaving = asyncio.create_task(self._release_when_left(request, jobs))
        try:
            yield
        finally:
            leaving.cancel()
            self.release(jobs)

    async def _release_when_left(self, request: Request, jobs: list[Job]) -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        self.release(jobs)

    def close(self) -> None:
        """Let go of the threads."""
        for pool in (self.pool, self.fetchers):
            pool.shutdown(wait=False, cancel_futures=True)
