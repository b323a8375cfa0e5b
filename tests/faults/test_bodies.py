"""Case 9: bodies that are large, endless, broken or slow harm nobody but who sends them."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress

import httpx
import pytest
from faults.wires import MEBI, answer, asked, head, opened, posted, resident
from server.asked import Served

JSON, FORM = "application/json", "multipart/form-data; boundary=b"
HUGE = 500 * MEBI
FIELD = b'--b\r\nContent-Disposition: form-data; name="prompt"\r\n\r\n'
NATIVE, EDITS = "/v1/generate", "/v1/images/edits"


def begun(path: str, kind: str, **about: str) -> bytes:
    """The head of a request with a body."""
    return head("POST", path, Host="localhost", Content_Type=kind, **about)


def endless(first: bytes, is_chunked: bool) -> Iterator[bytes]:
    """500 MB of a body, in parts."""
    part = b"a" * 65536
    for data in (first, *[part] * (HUGE // len(part))):
        yield b"%x\r\n%s\r\n" % (len(data), data) if is_chunked else data


@pytest.mark.parametrize("is_chunked", [False, True], ids=["told", "in chunks"])
@pytest.mark.parametrize(
    ("path", "kind", "first"),
    [(NATIVE, JSON, b'{"prompt": "'), (EDITS, FORM, FIELD)],
    ids=["JSON", "a field of a form"],
)
def test_half_a_gigabyte_is_refused_before_it_is_taken(
    pretending: Served, path: str, kind: str, first: bytes, is_chunked: bool
) -> None:
    """Case 9: the answer comes although the client goes on sending."""
    about = {"Transfer_Encoding": "chunked"} if is_chunked else {"Content_Length": str(HUGE)}
    before, begin = resident(), time.perf_counter()
    found = asked(pretending, begun(path, kind, **about), endless(first, is_chunked))
    # A field of a form has a bound of its own, below that of the body.
    assert (found.status, found.code) in ((413, "too_large"), (400, "invalid_request"))
    assert time.perf_counter() - begin < 5
    assert resident() - before < 64 * MEBI


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b'{"prompt": "\xff\xfe"}', b"not JSON"),
        (b"\x80abc", b"not JSON"),
        (b'{"prompt": "a", "prompt": "b"}', b"twice"),
        (b'{"prompt": ' + b"[" * 10_000 + b"]" * 10_000 + b"}", b"JSON"),
        (b'{"a":' * 10_000 + b"1" + b"}" * 10_000, b"JSON"),
        (b'{"prompt": [' + b"[]," * MEBI + b"[]]}", b"many"),
        (b'{"prompt": {' + b",".join(b'"%d":1' % n for n in range(300_000)) + b"}}", b"many"),
        (b'{"prompt": "a"', b"not JSON"),
        (b"", b"not JSON"),
        (b"null", b"object"),
    ],
    ids=["UTF-8", "bytes", "twice", "lists", "objects", "many", "names", "cut", "empty", "null"],
)
def test_json_that_is_broken_deep_or_vast_is_refused_at_once(
    pretending: Served, body: bytes, says: bytes
) -> None:
    """Case 9: memory stays, and time is that of reading it."""
    before, begin = resident(), time.perf_counter()
    for path in (NATIVE, "/v1/images/generations", "/sdapi/v1/txt2img"):
        found = asked(pretending, posted(path, body))
        assert found.status == 400, found
        assert says in found.body
    assert time.perf_counter() - begin < 1.5
    assert resident() - before < 64 * MEBI


def test_a_length_that_is_none_is_refused(pretending: Served) -> None:
    """Case 9."""
    for length in ("-1", "1e3", "9" * 40, "0x10", "1, 2"):
        found = asked(pretending, begun(NATIVE, JSON, Content_Length=length))
        assert found.status in (400, 413), length


# ── slow ones ──


def seconds_of(served: Served, count: int = 60) -> float:
    """What 95 of 100 requests of a client take at most."""
    taken = []
    with httpx.Client(base_url=served.address) as client:
        for _ in range(count):
            begin = time.perf_counter()
            answered = client.post(NATIVE, json={"prompt": "a"}, headers={"Accept": "image/png"})
            taken.append(time.perf_counter() - begin)
            assert answered.status_code == 200
    return sorted(taken)[int(0.95 * count)]


def is_closed(connection: socket.socket) -> bool:
    """Whether the server has ended a connection, once all is read."""
    connection.settimeout(5)
    with suppress(OSError):
        while connection.recv(4096):
            pass
        return True
    return True


def test_a_hundred_who_send_a_byte_at_a_time_do_not_slow_another(pretending: Served) -> None:
    """Case 9: heads and bodies; each is ended in its time."""
    alone = seconds_of(pretending)
    with ExitStack() as stack:
        slow = [opened(pretending, b"GET /health HT") for _ in range(50)]
        first = begun(NATIVE, JSON, Content_Length="100000") + b"{"
        slow += [opened(pretending, first) for _ in range(50)]
        for connection in slow:
            stack.enter_context(connection)
        began = time.monotonic()
        beside = 0.0
        for turn in range(3):
            for connection in slow:
                with suppress(OSError):  # it was ended
                    connection.sendall(b" ")
            beside = max(beside, seconds_of(pretending, 40 + turn))
        assert beside < 5 * alone + 0.05
        for connection in slow[50:]:
            with suppress(OSError):
                assert answer(connection).status == 408
        assert all(is_closed(connection) for connection in slow)
        assert time.monotonic() - began < 10
