"""Case 20: nothing but what is public is had without the key, however the request is written."""

from __future__ import annotations

import base64
import hmac
import json
from collections.abc import Iterator
from typing import Any

import pytest
from faults.wires import Answered, answer, head, opened
from server.asked import Served, serving
from server.fake import FakeWorker
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from fewstep.server import guards, pages
from fewstep.server.orders import Limits

KEY = "correct-horse"
PUBLIC = {"/health", *pages.PUBLIC}


@pytest.fixture(scope="module")
def locked() -> Iterator[Served]:
    """A server with a key."""
    with serving(FakeWorker(Limits(requests_per_minute=100_000)), api_key=KEY) as served:
        yield served


def asked(served: Served, method: str, path: str, **fields: str) -> Answered:
    """The answer to a request as it is written, without a body."""
    with opened(served, head(method, path, **{"Host": "localhost", **fields})) as connection:
        return answer(connection, method)


def routes(served: Served) -> list[tuple[str, str]]:
    """Methods and paths of all that there is, its parameters filled in."""
    paths: dict[str, Any] = served.app.openapi()["paths"]
    found = [(m.upper(), path.replace("{id}", "x")) for path, route in paths.items() for m in route]
    assert len(found) > 15
    return [*found, ("GET", "/openapi.json"), ("GET", "/no/such/route")]


WRONG = ["", "Bearer", "Bearer ", "Bearer wrong-wrong", f"Bearer {KEY}x", f"Bearer {KEY[:-1]}"]
WRONG += [f"Bearer {KEY.upper()}", KEY, f"Token {KEY}", f"Basic {KEY}", "Bearer \xff\xfe"]
WRONG += [f"Bearer {KEY},{KEY}", f'Bearer "{KEY}"']


def test_every_route_but_the_public_ones_wants_the_key(locked: Served) -> None:
    """Case 20: by each method, with no key and with wrong ones; those that are added later too."""
    for method, path in routes(locked):
        for verb in {method, "GET", "HEAD", "OPTIONS", "POST", "PUT", "TRACE", "FOO"}:
            if path not in PUBLIC:
                found = asked(locked, verb, path)
                assert found.status == 401, (verb, path)
                assert found.headers["www-authenticate"] == "Bearer"
    for wrong in WRONG:
        found = asked(locked, "GET", "/v1/limits", Authorization=wrong)
        assert (found.status, found.code) == (401, "unauthorized"), wrong
        assert KEY.encode() not in found.body


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER", "bEaReR"])
def test_the_key_opens_and_its_scheme_may_be_in_any_case(locked: Served, scheme: str) -> None:
    """Case 20."""
    assert asked(locked, "GET", "/v1/limits", Authorization=f"{scheme} {KEY}").status == 200


PATHS = [
    f"/v1/limits?api_key={KEY}",
    f"/v1/limits?key={KEY}&token={KEY}&access_token={KEY}",
    f"/v1/limits?Authorization=Bearer%20{KEY}",
    "//v1/limits",
    "///v1/limits",
    "/v1/../v1/limits",
    "/health/../v1/limits",
    "/health/%2e%2e/v1/limits",
    "/health%2f..%2fv1/limits",
    "/studio/../v1/limits",
    "/studio/studio.js/../../v1/limits",
    "/health/",
    "/health//v1/limits",
    "/health%00/v1/limits",
    "/health?/v1/limits/../",
    "/./v1/limits",
    "/V1/LIMITS",
    "/v1/limits/",
    "/v1/limits;/health",
    "/v1/limits#/health",
    "http://localhost/v1/limits",
    "http://localhost/health",
    "*",
]


@pytest.mark.parametrize("path", PATHS)
def test_no_way_of_writing_a_path_leads_round_the_key(locked: Served, path: str) -> None:
    """Case 20: nor does a key in the query open."""
    found = asked(locked, "GET", path)
    if path.partition("?")[0] in PUBLIC:
        assert json.loads(found.body) == {"status": "ok"}  # it is the public one, and no other
    else:
        assert found.status in (400, 401), found
        assert b"prompt_characters" not in found.body


HOSTS = ["a/?x=", "localhost/?x=", "localhost/health?", "localhost@evil.example", "/", "?", "#"]
HOSTS += ["evil.example", "localhost:7860/health", "localhost\\", "[", "[::1]evil.example", "\xff"]


@pytest.mark.parametrize("host", HOSTS)
def test_a_host_cannot_make_a_path_look_public(locked: Served, host: str) -> None:
    """Case 20: keys are checked by the path that the router takes."""
    for path in ("/v1/limits", "/health"):
        found = asked(locked, "GET", path, Host=host)
        assert found.status in (400, 401, 403), (path, found)
        assert b"prompt_characters" not in found.body


def test_two_hosts_or_none_are_refused(locked: Served) -> None:
    """Case 20."""
    for lines in (b"", b"Host: localhost\r\nHost: evil.example\r\n"):
        about = f"Authorization: Bearer {KEY}\r\n\r\n".encode()
        sent = b"GET /v1/limits HTTP/1.1\r\n" + lines + about
        with opened(locked, sent) as connection:
            assert answer(connection).status in (400, 403)


@pytest.mark.parametrize("path", ["/v1/live", "//v1/live", "/health/../v1/live", "/v1/live/"])
def test_no_socket_opens_without_the_key(locked: Served, path: str) -> None:
    """Case 20: in the handshake, before anything is accepted."""
    url = f"ws{locked.address.removeprefix('http')}{path}"
    wrong = base64.urlsafe_b64encode(b"wrong-wrong").decode().rstrip("=")
    for offered in (None, ["fewstep.live"], ["fewstep.live", f"fewstep.key.{wrong}"]):
        protocols: Any = offered
        with pytest.raises(InvalidStatus) as refused, connect(url, subprotocols=protocols):
            pass
        assert refused.value.response.status_code == 401
    with pytest.raises(InvalidStatus), connect(f"{url}?api_key={KEY}"):
        pass


def test_keys_are_compared_in_a_time_that_tells_nothing(
    locked: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Case 20: all of both, whatever they agree in."""
    compared = []

    def compare(wanted: bytes, given: bytes) -> bool:
        compared.append((wanted, given))
        return hmac.compare_digest(wanted, given)

    monkeypatch.setattr(guards, "hmac", type("M", (), {"compare_digest": staticmethod(compare)}))
    assert asked(locked, "GET", "/v1/limits", Authorization="Bearer corrupted").status == 401
    assert compared == [(KEY.encode(), b"corrupted")]
