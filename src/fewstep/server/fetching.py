"""Pictures by their address: public addresses alone, looked up once, no redirects, bounded.

One parser reads the address, and the connection goes to the very numbers that were checked.
"""

from __future__ import annotations

import http.client
import ipaddress
import re
import socket
import ssl
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from urllib.parse import SplitResult, urlsplit

from .orders import ServerError

SECONDS = 10.0
PLAIN = re.compile(r"https?://[!#-;=?-\[\]_a-z~]+", re.IGNORECASE)  # no blank, backslash, quote
NAME = re.compile(r"([a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?\.)+[a-z][a-z0-9-]{0,61}[a-z0-9]")
PORTS = {"http": 80, "https": 443}
# Ranges that carry an address of the older kind, which may be a private one; and old private ones.
NEVER = [
    ipaddress.ip_network(text)
    for text in ("::/96", "64:ff9b::/32", "2001::/32", "2002::/16", "fec0::/10")
]


def fetch(url: str, name: str, most: int, seconds: float = SECONDS) -> bytes:
    """The bytes at a public address. Raises ServerError that names the field `name`."""
    parts = parsed(url, name)
    host, port = str(parts.hostname), parts.port or PORTS[parts.scheme]
    ends = time.monotonic() + seconds
    try:
        address = public_address(host, port, name)
        with socket.create_connection((address, port), seconds) as plain:
            return download(plain, parts, name, most, ends)
    except (OSError, http.client.HTTPException, ValueError):
        raise refused(name, f"{name} cannot be fetched from there") from None


def refused(name: str, message: str) -> ServerError:
    """The refusal of an address."""
    return ServerError(
        "url_not_allowed", message, param=name, hint="send the picture itself in base64"
    )


def parsed(url: str, name: str) -> SplitResult:
    """The parts of an address that may be fetched."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
    except ValueError:
        raise refused(name, f"{name} is no address") from None
    is_plain = len(url) <= 2048 and PLAIN.fullmatch(url) and "@" not in parts.netloc
    if not is_plain or parts.scheme not in PORTS or not (NAME.fullmatch(host) or numbers(host)):
        raise refused(name, f"{name} is no address of a public host")
    if port not in (None, PORTS[parts.scheme]):
        raise refused(name, f"{name} names a port; only the usual ones are fetched from")
    return parts


def numbers(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """The address that a host is written as, if it is one in full."""
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def public_address(host: str, port: int, name: str) -> str:
    """The address of a host. Raises ServerError unless all of its addresses are public."""
    found = [str(entry[4][0]) for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
    if not found or not all_public(found):
        raise refused(name, f"{name} is at no public address")
    return found[0]


def all_public(addresses: Sequence[str]) -> bool:
    """Whether anyone on the internet would reach the same by these addresses."""
    for text in addresses:
        address = ipaddress.ip_address(text.partition("%")[0])
        address = getattr(address, "ipv4_mapped", None) or address
        is_never = any(address.version == net.version and address in net for net in NEVER)
        if not address.is_global or address.is_multicast or is_never:
            return False
    return True


def download(plain: socket.socket, parts: SplitResult, name: str, most: int, ends: float) -> bytes:
    """The body of the answer to one request on a connection that ends at a time."""
    host = str(parts.hostname)
    stream = plain
    if parts.scheme == "https":
        context = ssl.create_default_context()
        stream = context.wrap_socket(plain, server_hostname=host, do_handshake_on_connect=False)
    watch = threading.Timer(max(ends - time.monotonic(), 0), shut, [stream])
    watch.daemon = True
    watch.start()  # an answer may come drop by drop, each of them in time
    try:
        if isinstance(stream, ssl.SSLSocket):
            stream.do_handshake()
        connection = http.client.HTTPConnection(host)
        connection.sock = stream
        target = f"{parts.path or '/'}{f'?{parts.query}' if parts.query else ''}"
        connection.request("GET", target, headers={"Accept": "image/*", "Connection": "close"})
        with connection.getresponse() as response:
            if response.status != 200:  # a redirect too
                raise refused(name, f"{name} was answered by status {response.status}")
            return body(response, name, most, ends)
    finally:
        watch.cancel()
        stream.close()


def body(response: http.client.HTTPResponse, name: str, most: int, ends: float) -> bytes:
    """The bytes of an answer, bounded."""
    data = response.read(most + 1)
    if len(data) > most:
        raise ServerError("too_large", f"{name} has more than {most} bytes", param=name)
    if time.monotonic() >= ends:
        raise refused(name, f"{name} takes too long to fetch")
    return data


def shut(connection: socket.socket) -> None:
    """End a connection that another thread waits for."""
    with suppress(OSError):  # it has ended
        connection.shutdown(socket.SHUT_RDWR)
