"""What the tests of faults share: raw connections, requests by every interface, and memory."""

from __future__ import annotations

import base64
import http.client
import json
import os
import socket
from collections.abc import Iterable
from typing import Any, NamedTuple

import httpx
from server.asked import Served
from websockets.sync.client import connect

MEBI = 1 << 20
PATHS = {
    "native": "/v1/generate",
    "openai": "/v1/images/generations",
    "web ui": "/sdapi/v1/txt2img",
}
INTERFACES = (*PATHS, "live")


class Answered(NamedTuple):
    """An answer as it came over a socket."""

    status: int
    headers: Any
    body: bytes

    @property
    def code(self) -> str:
        """What went wrong."""
        return str(json.loads(self.body)["error"]["code"])


def head(method: str, path: str, **fields: str) -> bytes:
    """The head of a request; a field's underscores are dashes."""
    lines = [f"{name.replace('_', '-')}: {value}" for name, value in fields.items()]
    return "\r\n".join([f"{method} {path} HTTP/1.1", *lines, "", ""]).encode("latin-1")


def posted(path: str, body: bytes, **fields: str) -> bytes:
    """A request with a body, JSON unless another type is told."""
    about = {"Host": "127.0.0.1", "Content_Type": "application/json", **fields}
    return head("POST", path, **about, Content_Length=str(len(body))) + body


def opened(served: Served, sent: bytes = b"") -> socket.socket:
    """A connection that has sent something."""
    connection = socket.create_connection(served.place, 10)
    connection.sendall(sent)
    return connection


def answer(connection: socket.socket, method: str = "GET") -> Answered:
    """What comes on a connection."""
    response = http.client.HTTPResponse(connection, method=method)
    response.begin()
    return Answered(response.status, response.headers, response.read())


def asked(served: Served, sent: bytes, parts: Iterable[bytes] = ()) -> Answered:
    """The answer to a request whose body is sent in parts, as long as it is taken."""
    with opened(served, sent) as connection:
        try:
            for part in parts:
                connection.sendall(part)
        except OSError:  # it was answered before the end
            pass
        return answer(connection, sent.partition(b" ")[0].decode())


def refusal(served: Served, interface: str, fields: str, statuses: Iterable[int]) -> dict[str, Any]:
    """What one interface says of a JSON object that it does not take."""
    if interface == "live":
        with connect(f"ws{served.address.removeprefix('http')}/v1/live") as live:
            assert json.loads(live.recv(5))["type"] == "hello"
            live.send(f'{{"type": "draw", "n": 1, "order": {fields}}}')
            told = json.loads(live.recv(5))
        assert told["type"] == "error", told
        return dict(told["error"])
    found = asked(served, posted(PATHS[interface], fields.encode()))
    assert found.status in tuple(statuses), (interface, fields, found)
    error = dict(json.loads(found.body)["error"])
    assert {"code", "message", "param", "hint"} < set(error)
    assert error["request_id"] == found.headers["x-request-id"]
    return error


def drawn(served: Served, **fields: Any) -> tuple[bytes, dict[str, Any]]:
    """A picture's file by the native interface, and its record."""
    url = f"{served.address}/v1/generate"
    with httpx.stream("POST", url, json=fields, timeout=60) as stream:
        text = "".join(stream.iter_text())
        assert stream.status_code == 200, text
    kind, _, data = text.strip().rpartition("\n\n")[2].partition("\n")
    told = json.loads(data.removeprefix("data: "))
    assert kind == "event: picture", told
    return base64.b64decode(told["image"]), told["record"]


def figures(served: Served) -> dict[str, float]:
    """The server's metrics."""
    lines = httpx.get(f"{served.address}/metrics").text.splitlines()
    return {
        name: float(value)
        for name, value in (line.rsplit(" ", 1) for line in lines if line[:1] not in ("#", ""))
    }


def resident() -> int:
    """Bytes of this process in memory."""
    with open("/proc/self/statm", encoding="ascii") as stream:
        return int(stream.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
