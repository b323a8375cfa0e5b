"""Case 6: an address in the place of a picture reaches nothing that is not public."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import httpx
import pytest
from faults.wires import resident
from server.asked import asking, error_of
from server.fake import FakeWorker

from fewstep.server import desk, fetching
from fewstep.server.orders import Limits

PUBLIC = "93.184.216.34"
URLS = [
    "file:///etc/passwd",
    "http://127.0.0.1:{port}/",
    "http://127.0.0.1/",
    "http://169.254.169.254/latest/meta-data",
    "http://[::1]/",
    "http://0x7f.1/",
    "http://0x7f.1:{port}/",
    "http://good@127.0.0.1/",
    "http://good@127.0.0.1:{port}/",
    "http://good\\@127.0.0.1/",
    "http://good\\@127.0.0.1:{port}/",
    "http://localhost:{port}/",
    "gopher://127.0.0.1:{port}/_x",
    "ftp://127.0.0.1:{port}/a.png",
    "HTTP://127.0.0.1:{port}/",
]
FIELDS = ("image", "mask", "control")


class Canary:
    """A listener that nobody may find, and whom the process looks for."""

    def __init__(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.listener.settimeout(0.05)
        self.port = self.listener.getsockname()[1]

    def was_found(self) -> bool:
        """Whether somebody has connected."""
        try:
            self.listener.accept()[0].close()
        except TimeoutError:
            return False
        return True


@pytest.fixture
def canary() -> Iterator[Canary]:
    found = Canary()
    yield found
    found.listener.close()


@pytest.mark.parametrize("is_allowed", [False, True], ids=["off", "on"])
def test_no_address_that_is_not_public_is_asked_for_a_picture(
    canary: Canary, is_allowed: bool
) -> None:
    """Case 6: by every interface that takes pictures, whether fetching is on or off."""
    with asking(allow_urls=is_allowed) as client:
        for url in (url.format(port=canary.port) for url in URLS):
            for field in FIELDS:
                told = error_of(client.post("/v1/generate", json={"prompt": "a", field: url}), 400)
                assert (told["code"], told["param"]) == ("url_not_allowed", field), url
            asked = {"prompt": "a", "init_images": [url]}
            told = error_of(client.post("/sdapi/v1/img2img", json=asked), 400)
            assert told["code"] == "url_not_allowed"
            told = error_of(client.post("/sdapi/v1/png-info", json={"image": url}), 400)
            assert told["code"] == "url_not_allowed"
        with client.websocket_connect("ws://127.0.0.1:7860/v1/live") as live:
            live.receive_json()
            for n, url in enumerate(URLS):
                order = {"prompt": "a", "image": url.format(port=canary.port)}
                live.send_json({"type": "draw", "n": n, "order": order})
                assert live.receive_json()["error"]["param"] == "image"
    assert not canary.was_found()
    socket.create_connection(("127.0.0.1", canary.port)).close()
    assert canary.was_found()  # who does connect is seen


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Lets example.com be at a public address that answers as told; a list of who was asked for."""
    listener = socket.create_server(("127.0.0.1", 0))
    connected: list[tuple[str, int]] = []
    looked_up: list[str] = []

    def lookup(host: str, port: int, **_: Any) -> Any:
        looked_up.append(host)
        address = PUBLIC if len(looked_up) == 1 else "127.0.0.1"  # bound anew after the first
        return [(socket.AF_INET, socket.SOCK_STREAM, 0, "", (address, port))]

    def connection(address: tuple[str, int], timeout: float) -> socket.socket:
        connected.append(address)
        found = socket.socket()
        found.settimeout(timeout)
        found.connect(listener.getsockname())
        return found

    monkeypatch.setattr(fetching.socket, "getaddrinfo", lookup)
    monkeypatch.setattr(fetching.socket, "create_connection", connection)
    monkeypatch.setattr(desk, "fetch", partial(fetching.fetch, seconds=0.4))

    def start(first: bytes, then: bytes, pause: float) -> tuple[list[Any], list[str]]:
        def serve() -> None:
            with listener.accept()[0] as client:
                client.recv(4096)
                try:
                    client.sendall(first)
                    while then:
                        client.sendall(then)
                        time.sleep(pause)
                except OSError:
                    pass

        threading.Thread(target=serve, daemon=True).start()
        return connected, looked_up

    yield start
    listener.close()


@pytest.mark.parametrize(
    ("first", "then", "pause", "status"),
    [
        (b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:{port}/\r\n\r\n", b"", 0, 400),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 10737418240\r\n\r\n", b"a" * 65536, 0, 413),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n", b"a", 0.02, 400),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nno p", b"", 0, 415),
    ],
    ids=["redirect", "10 GB", "drop by drop", "bound anew"],
)
def test_what_a_public_address_answers_is_bounded_and_leads_no_further(
    canary: Canary, answers: Any, first: bytes, then: bytes, pause: float, status: int
) -> None:
    """Case 6: redirects, answers without end, and names that are bound anew between two looks."""
    first = first.replace(b"{port}", str(canary.port).encode())
    before, begin = resident(), time.perf_counter()
    with asking(FakeWorker(Limits(body_bytes=1 << 20)), allow_urls=True) as client:
        connected, looked_up = answers(first, then, pause)
        fields = {"prompt": "a", "image": "http://example.com/a.png"}
        told = error_of(client.post("/v1/generate", json=fields), status)
    assert told["param"] == "image"
    assert (connected, looked_up) == ([(PUBLIC, 80)], ["example.com"])
    assert time.perf_counter() - begin < 5
    assert resident() - before < 64 << 20
    assert not canary.was_found()


def test_fetching_is_off_unless_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Case 6: not even a name is looked up."""

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("looked up")

    with asking() as client:
        monkeypatch.setattr(fetching.socket, "getaddrinfo", never)
        fields = {"prompt": "a", "image": "https://example.com/a.png"}
        found: httpx.Response = client.post("/v1/generate", json=fields)
    assert error_of(found, 400)["code"] == "url_not_allowed"
