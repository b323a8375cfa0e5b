"""What the tests of the HTTP interfaces share: a client of an app in this process, and pictures."""

from __future__ import annotations

import base64
import io
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import PIL.Image
from server.fake import FakeWorker
from starlette.testclient import TestClient

from fewstep.server.app import create_app
from fewstep.server.listening import Server, bound, configured
from fewstep.server.settings import Settings

HOST = "127.0.0.1:7860"


@contextmanager
def asking(worker: FakeWorker | None = None, **settings: Any) -> Iterator[TestClient]:
    """A client of the app of a worker."""
    app = create_app(worker or FakeWorker(), Settings(**settings))
    with TestClient(app, base_url=f"http://{HOST}") as client:
        yield client


def file(picture: PIL.Image.Image, format: str = "PNG", **options: Any) -> bytes:
    """A picture as a file."""
    stream = io.BytesIO()
    picture.save(stream, format, **options)
    return stream.getvalue()


def packed(picture: PIL.Image.Image, format: str = "PNG", **options: Any) -> str:
    """A picture as base64."""
    return base64.b64encode(file(picture, format, **options)).decode()


def unpacked(text: str) -> PIL.Image.Image:
    """The picture of base64, read."""
    picture = PIL.Image.open(io.BytesIO(base64.b64decode(text)))
    picture.load()
    return picture


def square(colour: str = "red", side: int = 64, mode: str = "RGB") -> PIL.Image.Image:
    """A picture of one colour."""
    return PIL.Image.new(mode, (side, side), colour)


def error_of(response: Any, status: int) -> dict[str, Any]:
    """What an answer says went wrong; its shape is as promised."""
    assert response.status_code == status, response.text
    told = response.json()["error"]
    assert {"code", "message", "param", "hint", "request_id"} <= set(told)
    assert told["request_id"] == response.headers["x-request-id"]
    assert "Traceback" not in response.text and "/src/" not in response.text
    found: dict[str, Any] = told
    return found


@dataclass(frozen=True)
class Served:
    """A real server in this process."""

    address: str
    server: Server
    app: Any

    @property
    def place(self) -> tuple[str, int]:
        """Where sockets connect to."""
        host, _, port = self.address.removeprefix("http://").rpartition(":")
        return host, int(port)


@contextmanager
def serving(worker: Any, **settings: Any) -> Iterator[Served]:
    """A real server of a worker's app, as `fewstep serve` starts it."""
    chosen = Settings(port=0, **settings)
    at, app = bound(chosen), create_app(worker, chosen)
    server = Server(configured(app, chosen, worker.limits), worker, "", 10)
    thread = threading.Thread(target=server.run, args=([at],), daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.005)
    try:
        yield Served(chosen.address(at.getsockname()[1]), server, app)
    finally:
        server.should_exit = True
        thread.join(10)
        assert not thread.is_alive()


@contextmanager
def listening(worker: Any, **settings: Any) -> Iterator[str]:
    """The address of a real server of a worker's app."""
    with serving(worker, **settings) as served:
        yield served.address


def until(is_so: Callable[[], bool], seconds: float = 5.0) -> None:
    """Waits until something is so."""
    ends = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < ends, "it never came to be"
        time.sleep(0.005)
