"""Case 22: WebSockets that are too fast, too large, broken, many, half open or deaf."""

from __future__ import annotations

import base64
import json
import os
import re
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

import PIL.Image
import pytest
from faults.wires import MEBI, head, resident
from server.asked import Served, packed, serving, until
from server.painter import Painter
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

from fewstep.server import live
from fewstep.server.live import LiveSettings
from fewstep.server.orders import Limits
from fewstep.server.worker import PipelineWorker

MANY = Limits(requests_per_minute=1_000_000)
SHAKE = {
    "Host": "localhost",
    "Upgrade": "websocket",
    "Connection": "Upgrade",
    "Sec_WebSocket_Key": base64.b64encode(bytes(16)).decode(),
    "Sec_WebSocket_Version": "13",
}


@pytest.fixture(scope="module")
def painted() -> Iterator[Served]:
    with serving(Painter(MANY)) as served:
        yield served


def url(served: Served) -> str:
    return f"ws{served.address.removeprefix('http')}/v1/live"


def raw(served: Served) -> socket.socket:
    """A socket behind its handshake, which reads nothing by itself."""
    found = socket.create_connection(served.place, 10)
    found.sendall(head("GET", "/v1/live", **SHAKE))
    assert found.recv(12) == b"HTTP/1.1 101"
    return found


def frame(size: int, kind: int = 0x81) -> bytes:
    """The head of a masked frame of a size."""
    return bytes([kind, 0x80 | 127]) + struct.pack(">Q", size) + bytes(4)


def order(n: int, **fields: object) -> str:
    fields = {"prompt": f"a cat {n}", "seed": n, "steps": 1, **fields}
    return json.dumps({"type": "draw", "n": n, "order": fields})


def code_of(found: socket.socket) -> int | None:
    """The code that a server closes a socket with; None if it only hangs up."""
    data = b""
    with suppress(OSError):
        while part := found.recv(65536):
            data += part
            closing = re.search(rb"\x88[\x02-\x7d](..)[^\x80-\xff]*$", data, re.DOTALL)
            if closing is not None:
                return int.from_bytes(closing[1], "big")
    return None


def first_of(found: socket.socket) -> str:
    """What a socket is told first."""
    data = b""
    with suppress(OSError):
        while not any(word in data for word in (b'"hello"', b"queue_full", b" 503 ")):
            if not (part := found.recv(4096)):
                return "nothing"
            data += part
    return next(word for word in ("hello", "queue_full", "503") if word.encode() in data)


def is_well(served: Served) -> bool:
    """Whether somebody else is let in and gets a picture."""
    with connect(url(served)) as one:
        if json.loads(one.recv(5))["type"] != "hello":
            return False
        one.send(order(1))
        return bool(json.loads(one.recv(5))["type"] == "picture")


def test_ten_thousand_frames_of_a_second_leave_the_newest_picture_of_a_real_model(
    real: Served, worker: PipelineWorker
) -> None:
    """Case 22: one waits, one is drawn; what comes at the end is what was asked last."""
    before, drawn = resident(), worker.load().drawn
    most = 0
    with connect(url(real), max_queue=None) as one:
        one.recv(5)
        for n in range(10_000):
            one.send(order(n))
            if n % 500 == 0:
                load = worker.load()
                most = max(most, load.waiting + load.running)
        while (found := json.loads(one.recv(20)))["n"] != 9_999:
            assert found["type"] == "picture"
    assert found["record"]["prompt"] == "a cat 9999"
    assert most <= 3  # one that is given up may not have left yet
    assert worker.load().drawn - drawn < 5_000
    assert resident() - before < 64 * MEBI


def test_a_frame_of_100_megabytes_is_refused_by_its_head(painted: Served) -> None:
    """Case 22: by the code 1009; nothing of it is kept."""
    before = resident()
    with raw(painted) as one:
        with suppress(OSError):  # it is left in the middle
            one.sendall(frame(100 * MEBI))
            for _ in range(100):
                one.sendall(bytes(MEBI))
        assert code_of(one) in (1009, None)
    with raw(painted) as one:
        one.sendall(frame(100 * MEBI))
        assert code_of(one) == 1009
    assert resident() - before < 64 * MEBI
    assert is_well(painted)


def test_a_message_in_endless_parts_is_refused(painted: Served) -> None:
    """Case 22: parts count together."""
    before = resident()
    with raw(painted) as one:
        one.sendall(frame(MEBI, 0x01) + bytes(MEBI))
        with suppress(OSError):
            for _ in range(40):
                one.sendall(frame(MEBI, 0x00) + bytes(MEBI))
        assert code_of(one) in (1009, None)
    assert resident() - before < 64 * MEBI
    assert is_well(painted)


@pytest.mark.parametrize(
    ("data", "codes"),
    [
        (os.urandom(4096), (1002, 1003, 1007, 1009, None)),
        (b"\xff" * 4096, (1002,)),
        (b"GET / HTTP/1.1\r\n\r\n", (1002,)),
        (frame(4, 0x82) + b"\x00\xff\x00\xff", (1003,)),
        (frame(2, 0x81) + b"\xff\xfe", (1007,)),
        (b"\x81\x02{}", (1002,)),  # not masked
        (frame(200, 0x89) + bytes(200), (1002,)),  # a ping that is too long
    ],
    ids=["noise", "ones", "HTTP", "binary", "no text", "unmasked", "ping"],
)
def test_binary_garbage_ends_its_socket_and_no_other(
    painted: Served, data: bytes, codes: tuple[int | None, ...]
) -> None:
    """Case 22."""
    with connect(url(painted)) as other:
        other.recv(5)
        with raw(painted) as one:
            one.sendall(data)
            if None in codes:  # it may be the beginning of something
                one.shutdown(socket.SHUT_WR)
            assert code_of(one) in codes
        other.send(order(1))
        assert json.loads(other.recv(5))["type"] == "picture"


def test_of_a_thousand_sockets_few_are_served_and_the_others_are_told(painted: Served) -> None:
    """Case 22: by the code 1013; memory is bounded, and who left makes room."""
    before, threads = resident(), threading.active_count()
    sockets: list[socket.socket] = []
    with ExitStack() as stack:
        for _ in range(1000):
            each = stack.enter_context(socket.create_connection(painted.place, 10))
            each.sendall(head("GET", "/v1/live", **SHAKE))
            sockets.append(each)
        firsts = Counter(first_of(each) for each in sockets)
        assert firsts["hello"] <= MANY.sockets_per_client
        assert set(firsts) <= {"hello", "queue_full", "503", "nothing"}
        assert sum(firsts.values()) == 1000
        assert resident() - before < 100 * MEBI
        assert threading.active_count() <= threads + 4
    until(lambda: is_well(painted))


@contextmanager
def strict(monkeypatch: pytest.MonkeyPatch, **settings: float) -> Iterator[Served]:
    """A server that is not patient."""
    monkeypatch.setattr(live, "LiveSettings", lambda: LiveSettings(**settings))  # type: ignore[arg-type]
    with serving(Painter(Limits(sockets_per_client=2, requests_per_minute=10_000), 0)) as served:
        yield served


def test_half_open_sockets_and_handshakes_end_by_themselves(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Case 22: who is gone without a word takes a place for a while only."""
    with strict(monkeypatch, idle=0.3) as served:
        silent = [raw(served), raw(served)]
        unfinished = socket.create_connection(served.place)
        unfinished.sendall(head("GET", "/v1/live", **SHAKE)[:-4])
        assert not is_well(served)  # both places are taken
        until(lambda: is_well(served))
        assert [code_of(each) for each in silent] == [1001, 1001]
        for each in (*silent, unfinished):
            each.close()


def test_for_who_stops_reading_nothing_piles_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Case 22: one picture waits for it; that it is left is a test of tests/server/test_live.py."""
    noise = packed(PIL.Image.effect_noise((512, 512), 90).convert("RGB"))
    with strict(monkeypatch, patience=60) as served, socket.socket() as deaf:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.connect(served.place)
        deaf.sendall(head("GET", "/v1/live", **SHAKE))
        assert deaf.recv(12) == b"HTTP/1.1 101"  # frames may not come before it
        before = 0
        for n in range(150):
            about = {"image": noise} if n == 0 else {}
            text = order(n, width=512, height=512, strength=0.5, **about)
            whole = json.dumps({**json.loads(text), "format": "png"}).encode()
            deaf.sendall(frame(len(whole)) + whole)
            time.sleep(0.01)
            before = resident() if n == 50 else before
        assert resident() - before < 32 * MEBI
        assert is_well(served)


def test_a_client_that_says_what_it_saw_is_two_frames_behind_at_most(painted: Served) -> None:
    """Case 22: while it is slower than the pictures."""
    with connect(url(painted)) as one:
        one.recv(5)
        one.send('{"type": "seen", "n": 0}')
        lags = []
        for n in range(60):
            one.send(order(n))
            time.sleep(0.01)
            if n % 6 == 5:
                lags.append(n - newest(one))
        assert max(lags[2:]) <= 6 + 2  # it reads every sixth frame


def newest(one: ClientConnection) -> int:
    """The number of the newest picture that is there to be read; each is acknowledged."""
    found = -1
    with suppress(TimeoutError, ConnectionClosed):
        while True:
            message = json.loads(one.recv(0.03))
            if message["type"] == "picture":
                found = max(found, message["n"])
                one.send(json.dumps({"type": "seen", "n": message["n"]}))
    return found
