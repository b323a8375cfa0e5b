"""Uvicorn as this server needs it: bound before it loads, patient to a point, ended by signals."""

from __future__ import annotations

import asyncio
import errno
import os
import secrets
import socket
import threading
import time
from http import HTTPStatus
from types import FrameType
from typing import Any

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

from ..errors import RequestError
from .orders import Limits, ServerError, Worker
from .problems import Refused, answer
from .settings import Settings

ECHO = 0.1  # seconds in which a signal comes twice that a wrapper hands on to its group too
LAST = 5  # seconds for answers to be taken when all pictures are drawn
PACE = 64 << 10  # bytes that a client takes in `Settings.write_seconds` at least


def bound(settings: Settings) -> socket.socket:
    """A socket at the address of `settings`. Raises RequestError if it cannot be had."""
    host = settings.host.strip("[]")
    try:
        kind, *_, address = socket.getaddrinfo(host, settings.port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise RequestError(f"--host {host}: is no address of this machine ({error})") from None
    found = socket.socket(kind, socket.SOCK_STREAM)
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
        found.listen(128)
    except OSError as error:
        found.close()
        if error.errno == errno.EADDRINUSE:
            remedy = "give another, or end what uses it"
            raise RequestError(f"--port {settings.port}: is in use; {remedy}") from None
        why = f"{host} port {settings.port}: cannot listen there ({error.strerror})"
        raise RequestError(f"--host {why}; give another") from None
    return found


class Patient(H11Protocol):
    """HTTP whose connections end if a head does not arrive in time, or an answer is not taken."""

    settings = Settings()
    waiting: asyncio.TimerHandle | None = None  # for a head
    writing: asyncio.TimerHandle | None = None  # for the client to take what was written

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=0)  # so that `pause_writing` tells of any byte left
        most, client = self.settings.connections, self.client and self.client[0]
        own = sum(
            (getattr(each, "client", None) or ("",))[0] == client for each in self.connections
        )
        if len(self.connections) > most or own > max(1, most // 2):
            error = Refused("not_ready", "too many connections", hint="try again", retry_after=1)
            self.refuse(error)
        self.wait()

    def send_400_response(self, msg: str) -> None:
        self.refuse(Refused("invalid_request", "the request is not HTTP", status=400))

    def refuse(self, error: ServerError) -> None:
        """Answer an error where there is no request, and end the connection."""
        request_id = secrets.token_urlsafe(12)
        told = answer(error, request_id, "")
        headers = [*told.raw_headers, (b"x-request-id", request_id.encode())]
        head = h11.Response(
            status_code=told.status_code,
            headers=[*headers, (b"connection", b"close")],
            reason=HTTPStatus(told.status_code).phrase,
        )
        try:
            for event in (head, h11.Data(data=bytes(told.body)), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        except h11.LocalProtocolError:  # an answer has begun
            pass
        self.transport.close()

    def pause_writing(self) -> None:
        super().pause_writing()
        self.watch_writing(None)

    def watch_writing(self, before: int | None) -> None:
        """End the connection if nothing to speak of was taken since there were `before` bytes."""
        left = self.transport.get_write_buffer_size()
        if before is not None and left > before - PACE:
            self.transport.abort()
            return
        self.stop_watching()
        later = self.settings.write_seconds
        self.writing = self.loop.call_later(later, self.watch_writing, left)

    def resume_writing(self) -> None:
        self.stop_watching()
        super().resume_writing()

    def stop_watching(self) -> None:
        """Everything was taken, or nobody is there."""
        if self.writing is not None:
            self.writing.cancel()
            self.writing = None

    def wait(self) -> None:
        """Begin to wait for a head."""
        self.stop_waiting()
        self.waiting = self.loop.call_later(self.settings.head_seconds, self.give_up)

    def stop_waiting(self) -> None:
        """A head is there, or nobody is."""
        if self.waiting is not None:
            self.waiting.cancel()
            self.waiting = None

    def give_up(self) -> None:
        """End the connection."""
        if not self.transport.is_closing():
            self.transport.close()

    def handle_events(self) -> None:
        super().handle_events()
        if self.cycle is not None and not self.cycle.response_complete:
            self.stop_waiting()

    def handle_websocket_upgrade(self, event: Any) -> None:
        self.stop_waiting()
        self.stop_watching()
        self.transport.set_write_buffer_limits()  # as they are otherwise
        super().handle_websocket_upgrade(event)

    def on_response_complete(self) -> None:
        self.wait()
        super().on_response_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        self.stop_waiting()
        self.stop_watching()
        super().connection_lost(exc)


class Bounded(WebSocketsSansIOProtocol):
    """WebSockets that end also if the client takes nothing: what waits for it is thrown away."""

    seconds = 5.0  # for the client to take what was sent, and the close

    async def run_asgi(self) -> None:
        await super().run_asgi()
        self.loop.call_later(self.seconds, self.transport.abort)

    def keepalive_timeout(self) -> None:
        super().keepalive_timeout()
        self.transport.abort()


class Server(uvicorn.Server):
    """A server that a signal ends with code 0 when its work is done, and a second one at once.

    Until then it listens: who asks is told by 503 that it is ending.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        worker: Worker,
        told: str,
        drain_seconds: float = Settings.drain_seconds,
    ) -> None:
        super().__init__(config)
        self.worker, self.told = worker, told
        self.failure: BaseException | None = None
        self.draining = threading.Thread(target=worker.drain, args=[drain_seconds], daemon=True)
        self.asked: float | None = None  # when it was asked to end

    async def on_tick(self, counter: int) -> bool:
        """Whether to end; ten times a second."""
        self.failure = getattr(self.worker, "failure", None)
        if self.told and self.worker.is_ready:
            print(self.told, flush=True)
            self.told = ""
        is_drained = self.asked is not None and not self.draining.is_alive()
        return self.failure is not None or is_drained or await super().on_tick(counter)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.asked is None:
            self.asked = now
            self.draining.start()
        elif now > self.asked + ECHO:
            os._exit(128 + sig)


def configured(app: FastAPI, settings: Settings, limits: Limits) -> uvicorn.Config:
    """Uvicorn's settings."""
    patient = type("Patient", (Patient,), {"settings": settings})
    return uvicorn.Config(
        app,
        http=patient,
        ws=Bounded,
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,  # anyone could say to be someone else
        h11_max_incomplete_event_size=32 << 10,  # of a head
        timeout_keep_alive=5,
        timeout_graceful_shutdown=LAST,
        ws_max_size=limits.frame_bytes,
        ws_max_queue=2,
        ws_per_message_deflate=False,  # small frames that grow large
    )


def serve(app: FastAPI, worker: Worker, settings: Settings, at: socket.socket, told: str) -> None:
    """Serve until a signal; `told` is printed once pictures are drawn.

    Raises what the model could not be loaded for.
    """
    server = Server(configured(app, settings, worker.limits), worker, told, settings.drain_seconds)
    server.run(sockets=[at])
    if server.failure is not None:
        raise server.failure
    if getattr(worker, "is_loading", False):
        os._exit(0)  # no picture was asked for, and a thread cannot be stopped amid its loading
