"""Case 21: a web page of somebody else gets nothing done by a browser that reaches this server."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from faults.wires import answer, head, opened
from server.asked import Served, serving
from server.fake import FakeWorker
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

EVIL = [
    "https://evil.example",
    "http://evil.example",
    "null",
    "http://localhost:1",
    "http://127.0.0.1.evil.example",
    "http://localhost.evil.example",
    "http://evil.example/http://localhost",
    "file://",
    "chrome-extension://abc",
    "",
]
FORMS = {
    "application/x-www-form-urlencoded": b"prompt=a",
    "text/plain": b'{"prompt": "a", "x": "="}',
    "multipart/form-data; boundary=b": (
        b'--b\r\nContent-Disposition: form-data; name="prompt"\r\n\r\na\r\n--b--\r\n'
    ),
    "application/json": b'{"prompt": "a"}',
}
ROUTES = ["/v1/generate", "/v1/images/generations", "/v1/images/edits", "/sdapi/v1/txt2img"]
ROUTES += ["/sdapi/v1/interrupt", "/sdapi/v1/options"]


@pytest.fixture(scope="module")
def worker() -> FakeWorker:
    return FakeWorker()


@pytest.fixture(scope="module")
def served(worker: FakeWorker) -> Iterator[Served]:
    with serving(worker) as found:
        yield found


def status(served: Served, method: str, path: str, body: bytes = b"", **fields: str) -> int:
    """Of an answer, which lets no other site read it."""
    host = f"localhost:{served.place[1]}"
    about = {"Host": host, "Content_Length": str(len(body)), **fields}
    with opened(served, head(method, path, **about) + body) as connection:
        found = answer(connection, method)
    assert not [name for name in found.headers if name.lower().startswith("access-control")]
    assert found.headers["cross-origin-resource-policy"] == "same-origin"
    return found.status


@pytest.mark.parametrize("origin", EVIL)
def test_other_origins_are_refused_everywhere(
    served: Served, worker: FakeWorker, origin: str
) -> None:
    """Case 21: forms of every type that needs no leave, and reading."""
    for path in ROUTES:
        for kind, body in FORMS.items():
            about = {"Origin": origin, "Content_Type": kind}
            assert status(served, "POST", path, body, **about) == 403, (path, kind)
    for path in ("/v1/limits", "/v1/models", "/metrics", "/openapi.json", "/"):
        assert status(served, "GET", path, Origin=origin) == 403
    assert not worker.orders


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
def test_what_a_browser_says_comes_from_elsewhere_is_refused_without_an_origin(
    served: Served, worker: FakeWorker, site: str
) -> None:
    """Case 21: pictures, scripts and forms of other pages; a link to the studio may be followed."""
    for path in ROUTES:
        assert status(served, "POST", path, b"a=b", Sec_Fetch_Site=site) == 403
        about = {"Sec_Fetch_Site": site, "Sec_Fetch_Mode": "navigate"}
        assert status(served, "POST", path, b"a=b", **about) == 403
    assert status(served, "GET", "/v1/limits", Sec_Fetch_Site=site) == 403
    assert status(served, "GET", "/", Sec_Fetch_Site=site, Sec_Fetch_Mode="navigate") == 200
    assert not worker.orders


@pytest.mark.parametrize("host", ["evil.example", "localhost.evil.example", "0.0.0.0", "8.8.8.8"])
def test_a_name_that_was_bound_to_this_machine_is_refused(served: Served, host: str) -> None:
    """Case 21: DNS rebinding, where origin and host agree."""
    port = served.place[1]
    for path in ("/", "/health", "/v1/limits"):
        about = {"Host": f"{host}:{port}", "Origin": f"http://{host}:{port}"}
        assert status(served, "GET", path, **about) == 403


def test_a_form_is_no_json_even_from_here(served: Served, worker: FakeWorker) -> None:
    """Case 21: old browsers send neither an origin nor where they come from."""
    for path in ROUTES[:2] + ROUTES[3:4]:
        for kind, body in FORMS.items():
            if kind != "application/json":
                assert status(served, "POST", path, body, Content_Type=kind) == 415
    assert not worker.orders


def test_a_question_of_another_site_gets_no_leave(served: Served) -> None:
    """Case 21: what browsers ask before they send JSON elsewhere."""
    about = {
        "Origin": "https://evil.example",
        "Access_Control_Request_Method": "POST",
        "Access_Control_Request_Headers": "content-type",
        "Access_Control_Request_Private_Network": "true",
    }
    assert status(served, "OPTIONS", "/v1/generate", **about) == 403


def test_another_site_gets_no_socket(served: Served) -> None:
    """Case 21."""
    url = f"ws://localhost:{served.place[1]}/v1/live"
    for origin in EVIL:
        about = {"Origin": origin}
        with pytest.raises(InvalidStatus) as refused, connect(url, additional_headers=about):
            pass
        assert refused.value.response.status_code == 403, origin
    with connect(url, additional_headers={"Origin": f"http://localhost:{served.place[1]}"}) as own:
        assert json.loads(own.recv(5))["type"] == "hello"
