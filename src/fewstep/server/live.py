"""Live drawing over a WebSocket, `/v1/live`: the newest input wins, nothing stale is drawn.

The client sends text frames, as often as it likes:

    {"type": "draw", "n": 17, "order": {...}, "format": "jpeg" | "png" | "webp"}
    {"type": "seen", "n": 17}

`order` has the fields of `POST /v1/generate`. A picture that is left out of it is the last that
this socket sent; null is none. The server answers `hello` at once, and then `picture` (`final` is
false for the preview of a step) or `error`, each with the `n` of the frame that it belongs to.

Of one socket one order is under way and one waits: a newer frame replaces the one that waits and
cancels the one under way, unless no picture came out since the last time, so that a client which
never pauses sees pictures too. Towards the client only the newest picture waits. A client that
sends `seen` for each picture never has more than two on the way to it, however slow its network.
"""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import aclosing, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import PIL.Image
from fastapi import FastAPI, WebSocket
from starlette.websockets import WebSocketDisconnect

from .asking import order_of, strict_json
from .desk import Desk, Job
from .frames import PICTURES, Draw, draw_of, failed, hello, number_of
from .guards import check_socket
from .orders import Drawn, Failed, Limits, Order, ServerError, Stepped
from .pictures import QUALITY, packed
from .problems import answer, known

log = logging.getLogger(__name__)

KIND = "live"
ON_THE_WAY = 2  # pictures that a client which says `seen` has not seen yet
PROTOCOL = "fewstep.live"  # browsers offer it beside the key, which is never echoed
# Codes of RFC 6455 and IANA's registry.
GOING_AWAY, NOT_TEXT, POLICY, TOO_BIG, TRY_LATER = 1001, 1003, 1008, 1009, 1013


@dataclass(frozen=True)
class LiveSettings:
    """When a socket ends by itself."""

    idle: float = 900.0  # seconds without a frame
    patience: float = 20.0  # seconds that a client may take to accept a message
    mistakes: int = 50  # frames in a row that are no orders


class Closing(Exception):
    """The socket ends, with a code that the client is told; None: nobody is there to be told."""

    def __init__(self, code: int | None, reason: str) -> None:
        super().__init__(reason)
        self.code, self.reason = code, reason


def mount(
    app: FastAPI,
    desk: Desk,
    check: Callable[[WebSocket], None] = check_socket,
    settings: LiveSettings | None = None,
) -> None:
    """Add the WebSocket `/v1/live` to `app`. `check` raises ServerError for who may not draw."""
    places = Places(desk.limits, desk.settings.held_bytes)

    @app.websocket("/v1/live")
    async def live(websocket: WebSocket) -> None:
        try:
            check(websocket)
        except ServerError as error:
            await websocket.send_denial_response(answer(error, "", "/v1/live"))
            return
        is_offered = PROTOCOL in websocket.scope.get("subprotocols", ())
        await websocket.accept(subprotocol=PROTOCOL if is_offered else None)
        client = websocket.scope.get("state", {}).get("client", "")
        session = Session(websocket, client, desk, places, settings or LiveSettings())
        try:
            with places.taken(client):
                await session.run()
        except ServerError as error:
            await session.leave(error)
        finally:
            places.kept.pop(session.owner, None)


class Places:
    """How many sockets are open, of all and of each client."""

    def __init__(self, limits: Limits, most_kept: int) -> None:
        self.limits, self.most_kept = limits, most_kept
        self.taken_by: Counter[str] = Counter()
        self.kept: dict[
            str, int
        ] = {}  # characters of the pictures that a socket sent, by its owner

    @contextmanager
    def taken(self, client: str) -> Iterator[None]:
        """A place while it lasts. Raises ServerError if there is none."""
        if sum(self.taken_by.values()) >= self.limits.sockets:
            raise ServerError("queue_full", "too many sockets are open", hint="try again later")
        if self.taken_by[client] >= self.limits.sockets_per_client:
            raise ServerError("queue_full", "you have too many sockets open", hint="close one")
        self.taken_by[client] += 1
        try:
            yield
        finally:
            self.taken_by[client] -= 1
            self.taken_by += Counter()  # forgets those who have none

    def keep(self, owner: str, pictures: dict[str, str]) -> None:
        """Counts what a socket keeps. Raises ServerError, and lets go of it, if it is too much."""
        self.kept[owner] = sum(map(len, pictures.values()))
        if sum(self.kept.values()) > self.most_kept:
            pictures.clear()
            self.kept.pop(owner)
            raise ServerError(
                "queue_full", "the sockets' pictures take too much memory", hint="send smaller ones"
            )


async def ended(tasks: list[asyncio.Task[None]]) -> list[BaseException | None]:
    """What tasks end with that are cancelled.

    They are cancelled again until they end: before Python 3.12 `wait_for` loses a cancellation
    that comes in the same moment as what it waits for.
    """
    alive = set(tasks)
    while alive:
        for task in alive:
            task.cancel()
        _, alive = await asyncio.wait(alive, timeout=0.2)
    return await asyncio.gather(*tasks, return_exceptions=True)


class Session:
    """One socket: a reader, a drawer and a sender, which hand each other the newest only."""

    def __init__(
        self,
        websocket: WebSocket,
        client: str,
        desk: Desk,
        places: Places,
        settings: LiveSettings,
    ) -> None:
        self.websocket, self.client = websocket, client
        self.desk, self.places, self.settings = desk, places, settings
        self.owner = f"{client} {secrets.token_urlsafe(8)}"  # of this socket's jobs alone
        self.kept: dict[str, str] = {}  # the last pictures that were sent
        self.decoded: dict[str, tuple[str, PIL.Image.Image]] = {}
        self.waiting: Draw | None = None
        self.came = asyncio.Event()
        self.job: Job | None = None
        self.may_cancel = True  # a picture came out since the last time
        self.outbox: dict[str, tuple[dict[str, Any], float | None]] = {}
        self.filled = asyncio.Event()
        self.says_seen = False
        self.unseen = 0

    async def run(self) -> None:
        """Serve until one of the three ends. Raises ServerError while the model is loaded."""
        self.put("hello", hello(self.desk.limits, self.desk.facts))
        parts = [asyncio.create_task(part()) for part in (self.read, self.draw, self.send)]
        try:
            await asyncio.wait(parts, return_when=asyncio.FIRST_COMPLETED)
        finally:
            ends = await ended(parts)
        for end in ends:
            if isinstance(end, Closing):
                await self.close(end.code, end.reason)
            elif isinstance(end, Exception) and not isinstance(end, (OSError, WebSocketDisconnect)):
                log.error("a socket failed", exc_info=end)

    async def leave(self, error: ServerError) -> None:
        """Tell an error, and close."""
        with suppress(Exception):
            await asyncio.wait_for(self.websocket.send_json(failed(None, error)), 5)
        await self.close(TRY_LATER, str(error))

    async def close(self, code: int | None, reason: str) -> None:
        """Close, if there is anyone to tell."""
        if code is not None:
            with suppress(Exception):
                await asyncio.wait_for(self.websocket.close(code, reason), 5)

    # ── from the client ──

    async def read(self) -> None:
        """Take frames for ever; of orders the newest waits."""
        mistakes = 0
        while True:
            text = await self.frame()
            message: dict[str, Any] = {}
            try:
                message = strict_json(text)
                self.take(message)
                mistakes = 0
            except ServerError as error:
                mistakes += 1
                self.put("error", failed(number_of(message), error))
            if mistakes > self.settings.mistakes:
                raise Closing(POLICY, "too many frames that are no orders")
            await asyncio.sleep(0)  # others get a turn, however fast frames come

    async def frame(self) -> str:
        """The next frame. Raises Closing for what is no text, too large or too long in coming."""
        try:
            message = await asyncio.wait_for(self.websocket.receive(), self.settings.idle)
        except asyncio.TimeoutError:
            raise Closing(GOING_AWAY, "no frame for a long time") from None
        if message["type"] == "websocket.disconnect":
            raise Closing(None, "the client left")
        text = message.get("text")
        if not isinstance(text, str):
            raise Closing(NOT_TEXT, "frames are JSON texts")
        most = self.desk.limits.frame_bytes
        if len(text) > most:
            raise Closing(TOO_BIG, f"a frame has {most} bytes at most")
        return text

    def take(self, message: dict[str, Any]) -> None:
        """Do what a frame says. Raises ServerError if it says nothing that is known."""
        if message.get("type") == "seen":
            self.says_seen, self.unseen = True, max(0, self.unseen - 1)
            self.filled.set()
            return
        waiting = draw_of(message, self.kept)
        self.places.keep(self.owner, self.kept)
        self.waiting = waiting
        self.came.set()
        self.hurry()

    def hurry(self) -> None:
        """Give up what is under way for what waits, if the client is not starved by that."""
        if self.job is not None and self.waiting is not None and self.may_cancel:
            self.may_cancel = False
            self.job.ticket.cancel()

    # ── drawing ──

    async def draw(self) -> None:
        """Draw what waits, one order at a time, for ever."""
        while True:
            await self.came.wait()
            self.came.clear()
            draw, self.waiting = self.waiting, None
            if draw is None:
                continue
            try:
                await self.serve(draw)
            except Exception as error:
                self.put("error", failed(draw.n, known(error, f"a socket's {draw.n}")))

    async def serve(self, draw: Draw) -> None:
        """Draw a picture and its previews. Raises ServerError if it cannot be drawn."""
        order = await self.desk.aside(self.order, draw)
        self.job = self.desk.take(order, self.owner, KIND)
        self.hurry()  # a frame may have come while the pictures were decoded
        try:
            async with aclosing(self.desk.follow(self.job)) as events:
                async for event in events:
                    if isinstance(event, Drawn):
                        await self.show(draw, event)
                    elif isinstance(event, Stepped) and event.preview is not None:
                        await self.preview(draw, event.preview)
                    elif isinstance(event, Failed) and self.waiting is None:
                        raise event.error
        finally:
            self.job = None

    def order(self, draw: Draw) -> Order:
        """The order of a frame, its pictures decoded."""
        pictures = {
            name: self.picture(name, text)
            for name in PICTURES
            if (text := getattr(draw.fields, name)) is not None
        }
        return order_of(draw.fields, self.client, **pictures)

    def picture(self, name: str, text: str) -> PIL.Image.Image:
        """The picture of a field; one that is as before is not decoded again."""
        before = self.decoded.get(name)
        if before is None or before[0] != text:
            self.decoded.pop(name, None)
            try:
                picture = self.desk.decoded(text, name)
            except ServerError:
                if self.kept.get(name) == text:  # so that the next frame does not fail by it too
                    self.kept.pop(name, None)
                raise
            before = (text, picture)
            self.decoded[name] = before
        return before[1]

    async def show(self, draw: Draw, drawn: Drawn) -> None:
        """Put a picture into the outbox."""
        data = await self.desk.file(drawn, draw.format, QUALITY)
        told = {"queue_ms": round(drawn.waited * 1000, 1), "cached": drawn.cached}
        self.put_picture(draw, True, {draw.format: packed(data), **told, "record": drawn.record})

    async def preview(self, draw: Draw, image: PIL.Image.Image) -> None:
        """Put the picture of a step into the outbox."""
        self.put_picture(draw, False, {"jpeg": await self.desk.preview(image)})

    def put_picture(self, draw: Draw, is_final: bool, told: dict[str, Any]) -> None:
        """Let a picture wait, in the place of an older one."""
        self.may_cancel = True
        self.put("picture", {"type": "picture", "n": draw.n, "final": is_final, **told}, draw.came)

    # ── to the client ──

    def put(self, kind: str, message: dict[str, Any], came: float | None = None) -> None:
        """Let a message wait; an older one of its kind is dropped."""
        self.outbox[kind] = (message, came)
        self.filled.set()

    async def send(self) -> None:
        """Send what waits, for ever. Raises Closing for a client that takes nothing."""
        while True:
            await self.filled.wait()
            self.filled.clear()
            while (kind := self.next_kind()) is not None:
                message, came = self.outbox.pop(kind)
                if came is not None:
                    message["latency_ms"] = round((time.perf_counter() - came) * 1000, 1)
                self.unseen += kind == "picture"
                sent = self.websocket.send_text(json.dumps(message, default=float))
                try:
                    await asyncio.wait_for(sent, self.settings.patience)
                except asyncio.TimeoutError:
                    raise Closing(None, "the client does not read") from None

    def next_kind(self) -> str | None:
        """The kind of message that may be sent now."""
        is_full = self.says_seen and self.unseen >= ON_THE_WAY
        return next((kind for kind in self.outbox if kind != "picture" or not is_full), None)
