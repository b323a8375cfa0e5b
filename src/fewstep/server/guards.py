"""What stands before every route: host, origin, rate, key, and how large and how slow a body is.

All of it decides by the raw ASGI scope, whose path is the one that the router takes. What is not
listed as public needs the key, whether there is a route or not.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hmac
import re
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable
from ipaddress import IPv6Address, ip_address

from fastapi import WebSocket
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .orders import Limits, ServerError
from .problems import Refused, answer, known
from .settings import Settings

HOST = re.compile(r"(\[[0-9a-f:.]{2,45}\]|[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?)(:\d{1,5})?")
KEY_PROTOCOL = "fewstep.key."  # a WebSocket's subprotocol, behind it the key in base64url
PAGE_POLICY = "default-src 'none'; frame-ancestors 'none'"
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
    "Content-Security-Policy": PAGE_POLICY,
}
Observe = Callable[[Scope, int, str | None, float], None]  # status, error code, seconds


def check_host(headers: Headers, settings: Settings) -> None:
    """Raises ServerError unless the request is to a name of this server."""
    given = headers.getlist("host")
    found = HOST.fullmatch(given[0].lower()) if len(given) == 1 else None
    if found is None or not settings.answers_to(found[1]):
        raise ServerError(
            "forbidden_host",
            "this server does not answer to that host name",
            hint="start it with --allow-host NAME",
        )


def check_origin(scope: Scope, headers: Headers, settings: Settings) -> None:
    """Raises ServerError for what another web site sent."""
    for origin in headers.getlist("origin"):
        own = {f"{scheme}://{headers['host'].lower()}" for scheme in ("http", "https")}
        if origin.lower() not in own | set(settings.origins):
            raise _other_site()
    is_visit = scope.get("method") == "GET" and headers.get("sec-fetch-mode") == "navigate"
    if headers.get("sec-fetch-site") in ("cross-site", "same-site") and not is_visit:
        raise _other_site()


def _other_site() -> ServerError:
    return ServerError(
        "forbidden_origin",
        "other web sites may not use this server",
        hint="start it with --allow-origin if it stands behind a proxy",
    )


def has_key(scope: Scope, headers: Headers, settings: Settings) -> bool:
    """Whether a request has the key, if one is needed."""
    if settings.api_key is None:
        return True
    given = given_key(scope, headers)
    return given is not None and hmac.compare_digest(settings.api_key.encode(), given)


def given_key(scope: Scope, headers: Headers) -> bytes | None:
    """The key of a request: a bearer, the password of any user, or a WebSocket's subprotocol."""
    scheme, _, value = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return value.strip().encode("latin-1")
    if scheme.lower() == "basic":
        return _decoded(value.strip()).partition(b":")[2]
    if scope["type"] == "websocket":
        for protocol in scope.get("subprotocols", ()):
            if protocol.startswith(KEY_PROTOCOL):
                return _decoded(protocol.removeprefix(KEY_PROTOCOL))
    return None


def _decoded(text: str) -> bytes:
    """The bytes of base64 or base64url, padded or not; empty if it is neither."""
    plain = text.rstrip("=").replace("-", "+").replace("_", "/")
    try:
        return base64.b64decode(plain + "=" * (-len(plain) % 4), validate=True)
    except (binascii.Error, ValueError):
        return b""


def client_of(scope: Scope) -> str:
    """Who asks: an address, or a network that is handed out as a whole."""
    host = (scope.get("client") or ("unknown", 0))[0]
    try:
        address = ip_address(host)
    except ValueError:
        return str(host)
    if isinstance(address, IPv6Address):
        return str(address.ipv4_mapped or f"{address.exploded[:19]}::/64")
    return str(address)


def check_socket(websocket: WebSocket) -> None:
    """Raises ServerError unless the guard let this WebSocket in."""
    if "client" not in websocket.scope.get("state", {}):
        raise ServerError("unauthorized", "the guard has not seen this socket")


class Rate:
    """A bucket of tokens for each client; the least recent clients are forgotten."""

    def __init__(self, per_minute: int, clients: int = 4096) -> None:
        self.per_minute, self.clients = per_minute, clients
        self.buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()  # tokens, when

    def take(self, client: str) -> None:
        """Raises ServerError if the client has had its share."""
        now, per_second = time.monotonic(), self.per_minute / 60
        tokens, before = self.buckets.pop(client, (float(self.per_minute), now))
        tokens = min(float(self.per_minute), tokens + (now - before) * per_second)
        self.buckets[client] = (max(tokens - 1, 0) if tokens >= 1 else tokens, now)
        if len(self.buckets) > self.clients:
            self.buckets.popitem(last=False)
        if tokens < 1:
            raise Refused(
                "rate_limited",
                f"more than {self.per_minute} requests a minute",
                hint="slow down",
                retry_after=(1 - tokens) / per_second,
            )


class Held:
    """How much of all bodies is in memory."""

    def __init__(self, most: int) -> None:
        self.most, self.size = most, 0

    def take(self, size: int) -> None:
        """Raises ServerError if there is no room for more."""
        self.size += size
        if self.size > self.most:
            message = "too much is being sent to this server at once"
            raise Refused("queue_full", message, hint="try again", retry_after=1)


class Body:
    """The receiving end of a request whose body is bounded in bytes and in time."""

    def __init__(self, receive: Receive, most: int, seconds: float, held: Held) -> None:
        self.inner, self.most, self.held = receive, most, held
        self.deadline, self.size, self.is_complete = time.monotonic() + seconds, 0, False

    async def receive(self) -> Message:
        """The next message. Raises ServerError beyond the bounds."""
        if self.is_complete:
            return await self.inner()
        try:
            left = max(self.deadline - time.monotonic(), 0)
            message = await asyncio.wait_for(self.inner(), left)
        except asyncio.TimeoutError:
            raise Refused("timeout", "the body took too long to arrive", status=408) from None
        size = len(message.get("body", b""))
        self.size += size
        self.held.take(size)
        if self.size > self.most:
            raise too_large(self.most)
        self.is_complete = not message.get("more_body", False)
        return message

    def close(self) -> None:
        """Let go of the body."""
        self.held.size -= self.size


def too_large(most: int) -> ServerError:
    """The refusal of a body."""
    return ServerError("too_large", f"a body has {most} bytes at most", hint="send less")


def check_length(headers: Headers, most: int) -> None:
    """Raises ServerError for a body that says that it is too large."""
    length = headers.get("content-length", "0")
    if not length.isdecimal() or len(length) > 15 or int(length) > most:
        raise too_large(most)


class Answer:
    """The sending end of a request: adds headers, and knows what was sent."""

    def __init__(self, send: Send, request_id: str) -> None:
        self.inner, self.request_id = send, request_id
        self.status, self.is_complete = 0, False
        self.code: str | None = None

    async def send(self, message: Message) -> None:
        """Send a message."""
        if message["type"] in ("http.response.start", "websocket.http.response.start"):
            self.status = message["status"]
            headers = MutableHeaders(scope=message)
            self.code = headers.get("x-error-code")
            headers["X-Request-Id"] = self.request_id
            for name, value in HEADERS.items():
                headers.setdefault(name, value)
        if message["type"] == "http.response.body":
            self.is_complete = not message.get("more_body", False)
        await self.inner(message)


class Guard:
    """ASGI middleware around the whole app."""

    def __init__(
        self,
        app: ASGIApp,
        settings: Settings,
        limits: Limits,
        public: frozenset[str],
        observe: Observe,
    ) -> None:
        self.app, self.settings, self.limits = app, settings, limits
        self.public, self.observe = public, observe
        self.rate, self.held = Rate(limits.requests_per_minute), Held(settings.held_bytes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        request_id, began = secrets.token_urlsafe(12), time.perf_counter()
        scope.setdefault("state", {})["request_id"] = request_id
        sent = Answer(send, request_id)
        try:
            await self.serve(scope, receive, sent)
        finally:
            self.observe(scope, sent.status, sent.code, time.perf_counter() - began)

    async def serve(self, scope: Scope, receive: Receive, sent: Answer) -> None:
        """Let a request through, or answer why not."""
        try:
            self.check(scope)
            if scope["type"] == "http":
                await self.serve_http(scope, receive, sent.send)
            else:
                await self.app(scope, receive, sent.send)
        except Exception as error:
            if sent.status and sent.is_complete:  # it was answered, and logged
                return
            if sent.status or (scope["type"] == "websocket" and "client" in scope["state"]):
                raise
            await self.refuse(scope, receive, sent, known(error, sent.request_id))

    async def serve_http(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, whose body is bounded."""
        seconds = self.settings.body_seconds
        body = Body(receive, self.limits.body_bytes, seconds, self.held)
        try:
            await self.app(scope, body.receive, send)
        finally:
            body.close()

    def check(self, scope: Scope) -> None:
        """Raises ServerError for a request that must not reach a route."""
        headers = Headers(scope=scope)
        check_host(headers, self.settings)
        check_origin(scope, headers, self.settings)
        client, is_known = client_of(scope), has_key(scope, headers, self.settings)
        if scope["path"] != "/health":  # strangers do not use up what others have behind an address
            self.rate.take(client if is_known else f"{client} without a key")
        if not is_known and scope["path"] not in self.public:
            raise ServerError(
                "unauthorized",
                "the API key is missing or wrong",
                hint="send it as Authorization: Bearer KEY",
            )
        check_length(headers, self.limits.body_bytes)
        scope["state"]["client"] = client

    async def refuse(
        self, scope: Scope, receive: Receive, sent: Answer, error: ServerError
    ) -> None:
        """Answer an error; a WebSocket's handshake too."""
        if scope["type"] == "websocket" and "websocket.http.response" not in scope.get(
            "extensions", {}
        ):
            await sent.send({"type": "websocket.close", "code": 1008})
            return
        response = answer(error, sent.request_id, scope["path"])
        if scope["type"] == "http":
            await response(scope, receive, sent.send)
            return
        await sent.send(
            {
                "type": "websocket.http.response.start",
                "status": response.status_code,
                "headers": response.raw_headers,
            }
        )
        await sent.send({"type": "websocket.http.response.body", "body": response.body})
