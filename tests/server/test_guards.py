"""Who is let in, from where, how often, and how much they may send."""

from __future__ import annotations

import base64
import json
import time
from typing import Any

import pytest
from server.asked import HOST, asking, error_of
from server.fake import FakeWorker
from starlette.testclient import TestClient
from starlette.websockets import WebSocketDisconnect

from fewstep.errors import RequestError
from fewstep.server.asking import strict_json
from fewstep.server.guards import Held, Rate
from fewstep.server.orders import Limits, ServerError
from fewstep.server.settings import Settings

KEY = "correct-horse"
ROUTES = [
    ("GET", "/ready"),
    ("GET", "/metrics"),
    ("GET", "/v1/limits"),
    ("GET", "/openapi.json"),
    ("POST", "/v1/generate"),
    ("DELETE", "/v1/jobs/x"),
    ("POST", "/v1/images/generations"),
    ("POST", "/v1/images/edits"),
    ("GET", "/v1/images/files/x"),
    ("GET", "/v1/models"),
    ("POST", "/sdapi/v1/txt2img"),
    ("GET", "/sdapi/v1/progress"),
    ("GET", "/no/such/route"),
    ("GET", "//v1/limits"),
    ("GET", "/health/../v1/limits"),
    ("GET", "/studio/../v1/limits"),
    ("GET", "/studio/nothing.js"),
    ("OPTIONS", "/v1/generate"),
    ("HEAD", "/v1/limits"),
]


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_with_a_key_every_route_but_the_public_ones_needs_it(method: str, path: str) -> None:
    with asking(api_key=KEY) as client:
        assert client.request(method, path).status_code == 401
        wrong = client.request(method, path, headers={"Authorization": "Bearer wrong-wrong"})
        assert wrong.status_code == 401
        right = client.request(method, path, headers={"Authorization": f"bearer {KEY}"})
        assert right.status_code != 401


def test_health_and_the_studio_need_no_key() -> None:
    with asking(api_key=KEY) as client:
        assert client.get("/health").json() == {"status": "ok"}
        assert client.get("/").headers["content-type"].startswith("text/html")


@pytest.mark.parametrize(
    "header", ["", "Bearer", "Bearer ", f"Basic {KEY}", f"Token {KEY}", f"Bearer {KEY}x", "Basic !"]
)
def test_a_key_that_is_not_the_key_is_refused(header: str) -> None:
    with asking(api_key=KEY) as client:
        told = error_of(client.get("/v1/limits", headers={"Authorization": header}), 401)
        assert told["code"] == "unauthorized"
        assert KEY not in told["message"]


def test_a_key_in_the_query_is_no_key() -> None:
    with asking(api_key=KEY) as client:
        assert client.get("/v1/limits", params={"api_key": KEY}).status_code == 401


def test_the_key_may_come_as_a_password() -> None:
    with asking(api_key=KEY) as client:
        assert client.get("/v1/limits", auth=("anyone", KEY)).status_code == 200
        assert client.get("/v1/limits", auth=("anyone", "wrong-wrong")).status_code == 401


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "127.0.0.1.evil.example",
        "a/?x=",
        "localhost.",
        "",
        "8.8.8.8",
        "[::2]",
    ],
)
def test_other_host_names_are_refused_on_loopback_too(host: str) -> None:
    with asking() as client:
        told = error_of(client.get("/health", headers={"Host": host}), 403)
        assert told["code"] == "forbidden_host"


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:1", "127.0.0.1:99", "[::1]:7860"])
def test_names_of_this_machine_are_answered(host: str) -> None:
    with asking() as client:
        assert client.get("/health", headers={"Host": host}).status_code == 200


def test_a_host_that_was_allowed_is_answered_and_others_are_not() -> None:
    with asking(hosts=("draw.example",)) as client:
        assert client.get("/health", headers={"Host": "draw.example"}).status_code == 200
        assert client.get("/health", headers={"Host": "x.draw.example"}).status_code == 403


def test_beyond_loopback_addresses_are_answered_and_foreign_names_are_not() -> None:
    with asking(host="0.0.0.0", insecure=True) as client:
        assert client.get("/health", headers={"Host": "192.168.1.9:7860"}).status_code == 200
        assert client.get("/health", headers={"Host": "evil.example"}).status_code == 403


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://127.0.0.1:3000"},
        {"Origin": f"http://{HOST}.evil.example"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
    ],
)
def test_other_web_sites_are_refused(headers: dict[str, str]) -> None:
    with asking() as client:
        for method, path in (("POST", "/v1/generate"), ("GET", "/v1/limits")):
            told = error_of(client.request(method, path, headers=headers), 403)
            assert told["code"] == "forbidden_origin"


def test_the_own_page_is_let_in_and_no_cors_header_is_ever_sent() -> None:
    with asking() as client:
        own = {"Origin": f"http://{HOST}", "Sec-Fetch-Site": "same-origin"}
        for headers in (own, {}, {"Origin": "https://evil.example"}):
            answer = client.get("/v1/limits", headers=headers)
            assert not [name for name in answer.headers if name.startswith("access-control")]
        assert client.get("/v1/limits", headers=own).status_code == 200


def test_an_origin_that_was_allowed_is_let_in() -> None:
    with asking(origins=("https://draw.example",)) as client:
        headers = {"Origin": "https://draw.example"}
        assert client.get("/v1/limits", headers=headers).status_code == 200


def test_a_form_of_another_site_is_refused_by_its_type_too() -> None:
    with asking() as client:
        data = '{"prompt": "a"}'
        answer = client.post("/v1/generate", content=data, headers={"Content-Type": "text/plain"})
        assert error_of(answer, 415)["code"] == "unsupported_media"


def connect(client: TestClient, **options: Any) -> None:
    with client.websocket_connect(f"ws://{HOST}/v1/live", **options) as socket:
        assert socket.receive_json()["type"] == "hello"


def test_web_sockets_need_the_key_in_a_header_or_beside_the_protocol() -> None:
    encoded = base64.urlsafe_b64encode(KEY.encode()).decode().rstrip("=")
    with asking(api_key=KEY) as client:
        connect(client, headers={"Authorization": f"Bearer {KEY}"})
        connect(client, subprotocols=["fewstep.live", f"fewstep.key.{encoded}"])
        for wrong in ({}, {"subprotocols": ["fewstep.live", "fewstep.key.d3Jvbmc"]}):
            with pytest.raises(Exception) as refused:
                connect(client, **wrong)
            assert getattr(refused.value, "status_code", 401) == 401


def test_web_sockets_of_other_sites_are_refused() -> None:
    with asking() as client:
        for headers in ({"Origin": "https://evil.example"}, {"Host": "evil.example"}):
            with pytest.raises((WebSocketDisconnect, Exception)) as refused:
                connect(client, headers=headers)
            assert getattr(refused.value, "status_code", 403) == 403
        connect(client, headers={"Origin": f"http://{HOST}"})


def test_a_body_that_says_it_is_large_is_refused_before_it_is_read() -> None:
    with asking(FakeWorker(Limits(body_bytes=100))) as client:
        answer = client.post("/v1/generate", json={"prompt": "a" * 200})
        assert error_of(answer, 413)["code"] == "too_large"
        assert answer.headers["connection"] == "close"


def test_a_body_in_chunks_is_counted() -> None:
    sent = []

    def chunks() -> Any:
        for _ in range(1000):
            sent.append(1)
            yield b" " * 10

    with asking(FakeWorker(Limits(body_bytes=100))) as client:
        headers = {"Content-Type": "application/json"}
        told = error_of(client.post("/v1/generate", content=chunks(), headers=headers), 413)
        assert told["code"] == "too_large"


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"{", "not JSON"),
        (b"\xff\xfe{}", "not JSON"),
        (b"[1]", "must be a JSON object"),
        (b'{"prompt": "a", "prompt": "b"}', "'prompt' twice"),
        (b'{"prompt": NaN}', "not JSON"),
        (b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "too many values"),
        (b'{"prompt": ' + b"[" * 30_000 + b"]" * 30_000 + b"}", "not JSON"),
        (b'{"loras": [' + b"{}," * 40_000 + b"0]}", "too many values"),
        ('{"prompt": "a"}'.encode("utf-16"), "not JSON"),
        (b'{"prompt": ' + b"[" * 20 + b"]" * 20 + b"}", "deeper"),
        (b'{"prompt": "\\ud800"}', "surrogate"),
        (b'{"seed": ' + b"9" * 5000 + b', "prompt": ""}', "not JSON"),
    ],
)
def test_json_that_is_broken_or_means_two_things_is_refused(body: bytes, says: str) -> None:
    with asking() as client:
        headers = {"Content-Type": "application/json"}
        told = error_of(client.post("/v1/generate", content=body, headers=headers), 400)
        assert says in told["message"]


def test_a_name_that_is_there_twice_among_thousands_is_found_at_once() -> None:
    body = "{" + ",".join(f'"{n:x}":1' for n in range(30_000)) + ',"752f":2}'
    before = time.process_time()
    with pytest.raises(ServerError, match="'752f' twice"):
        strict_json(body)
    assert time.process_time() - before < 1


def test_a_form_in_another_charset_is_refused() -> None:
    with asking() as client:  # punycode takes quadratic time, raw_unicode_escape makes half pairs
        for charset in ("punycode", "raw_unicode_escape", "latin-1"):
            kind = {"Content-Type": f"multipart/form-data; boundary=b; charset={charset}"}
            answer = client.post("/v1/images/edits", content=b"--b--", headers=kind)
            assert error_of(answer, 415)["code"] == "unsupported_media"


def test_a_wrong_method_is_told_the_right_ones() -> None:
    with asking() as client:
        answer = client.put("/v1/limits")
        assert error_of(answer, 405)["code"] == "method_not_allowed"
        assert answer.headers["allow"] == "GET"
        assert client.put("/sdapi/v1/options").headers["allow"] == "GET, POST"
        assert client.put("/").headers["allow"]


def test_too_many_requests_of_one_client_are_told_when_to_come_again() -> None:
    with asking(FakeWorker(Limits(requests_per_minute=5))) as client:
        assert [client.get("/v1/limits").status_code for _ in range(5)] == [200] * 5
        answer = client.get("/v1/limits")
        assert error_of(answer, 429)["code"] == "rate_limited"
        assert int(answer.headers["retry-after"]) >= 1
        assert client.get("/health").status_code == 200


def test_strangers_behind_an_address_do_not_use_up_the_requests_of_who_has_the_key() -> None:
    with asking(FakeWorker(Limits(requests_per_minute=3)), api_key=KEY) as client:
        answers = [client.get(path) for path in ("/v1/limits", "/", "/", "/", "/v1/limits")]
        assert [answer.status_code for answer in answers] == [401, 200, 200, 429, 429]
        known = client.get("/v1/limits", headers={"Authorization": f"Bearer {KEY}"})
        assert known.status_code == 200


def test_bodies_of_all_clients_together_are_bounded() -> None:
    held = Held(100)
    held.take(90)
    with pytest.raises(ServerError, match="too much"):
        held.take(20)


def test_a_client_that_asks_too_often_does_not_slow_another_and_few_are_remembered() -> None:
    rate = Rate(2, clients=10)
    for _ in range(2):
        rate.take("a")
    with pytest.raises(ServerError):
        rate.take("a")
    for number in range(100):
        rate.take(f"b{number}")
    assert len(rate.buckets) == 10


def test_every_answer_has_an_id_and_keeps_browsers_careful() -> None:
    with asking() as client:
        answers = [client.get(path) for path in ("/health", "/nothing", "/v1/limits")]
        assert len({answer.headers["x-request-id"] for answer in answers}) == 3
        for answer in answers:
            assert answer.headers["x-content-type-options"] == "nosniff"
            assert "default-src 'none'" in answer.headers["content-security-policy"]
            assert answer.headers["cache-control"] == "no-store"


def test_an_unexpected_error_tells_an_id_and_nothing_else(caplog: pytest.LogCaptureFixture) -> None:
    worker = FakeWorker()
    worker.failure_of = RuntimeError("secret at /home/me/model 0x7f00")
    with asking(worker) as client:
        headers = {"Accept": "image/png"}
        answer = client.post("/v1/generate", json={"prompt": "a"}, headers=headers)
        told = error_of(answer, 500)
        assert told["code"] == "internal" and "secret" not in answer.text
        assert told["request_id"] in caplog.text and "secret" in caplog.text


def test_a_host_for_everyone_wants_a_key_or_a_word() -> None:
    with pytest.raises(RequestError, match="--api-key, or --insecure"):
        Settings(host="0.0.0.0").checked()
    Settings(host="0.0.0.0", insecure=True).checked()
    Settings(host="0.0.0.0", api_key=KEY).checked()
    for host in ("localhost", "127.0.0.2", "::1", "[::1]"):
        Settings(host=host).checked()
    for key in ("", "short", "with a blank", "trailing-blank ", "schlüssel-wort"):
        with pytest.raises(RequestError, match="fewer than 8"):
            Settings(api_key=key).checked()


def test_open_api_tells_of_errors_and_bodies() -> None:
    with asking() as client:
        told = client.get("/openapi.json").json()
        for path, methods in told["paths"].items():
            for method, route in methods.items():
                assert "403" in route["responses"], path
                if method == "post" and path != "/sdapi/v1/interrupt":
                    assert route["requestBody"]["content"], path
        text = json.dumps(told)
        assert "HTTPValidationError" not in text
        for name in ("Generate", "Generations", "Txt2Img", "Img2Img", "Problem"):
            assert name in told["components"]["schemas"], name
            assert f"#/components/schemas/{name}" in text
        known = {f"#/components/schemas/{name}" for name in told["components"]["schemas"]}
        assert {part.split('"')[0] for part in text.split('"$ref": "')[1:]} <= known
