"""`fewstep serve` as a process: what it refuses at once, what it prints, how it ends."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import httpx
import openai
import pytest
from server.asked import error_of, listening, serving, unpacked, until
from server.fake import FakeWorker
from starlette.responses import Response

from fewstep.server.settings import Settings

Run = Callable[..., tuple[int, str, str]]


@contextmanager
def connected(address: str) -> Iterator[socket.socket]:
    """A connection of no client library."""
    host, _, port = address.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), 10) as found:
        yield found


def read_all(connection: socket.socket) -> tuple[bytes, bytes]:
    """The head and the body of the answer that ends a connection."""
    data = b""
    while part := connection.recv(4096):
        data += part
    head, _, body = data.partition(b"\r\n\r\n")
    return head, body


@contextmanager
def process(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`fewstep serve` on a free port, and its address."""
    command = [sys.executable, "-m", "fewstep", "serve", "--port", "0", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("FEWSTEP_API_KEY", None)
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as started:
        assert started.stdout is not None
        told = started.stdout.readline()
        assert " draws at http://127.0.0.1:" in told, told + (started.stderr or "").read()  # type: ignore[union-attr]
        try:
            yield started, told.split(" draws at ")[1].strip()
        finally:
            if started.poll() is None:
                started.kill()


def test_a_port_in_use_is_one_line(run: Run) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, out, err = run("serve", "--port", port)
    assert (code, out) == (2, "")
    assert err.strip() == f"error: --port {port}: is in use; give another, or end what uses it"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--host", "0.0.0.0"), "give --api-key, or --insecure"),
        (("--host", "no.such.host.invalid", "--insecure"), "is no address of this machine"),
        (("--api-key", "short"), "fewer than 8"),
        (("--api-key", ""), "fewer than 8"),
        (("--replicas", "2"), "needs --ray"),
        (("--ray-address", "auto"), "needs --ray"),
        (("--port", "99999"), "--port"),
        (("--dtype", "int3"), "unknown"),
        (("--port", "0", "--device", "cuda:99"), "--device cuda:99"),
    ],
)
def test_options_that_cannot_be_are_one_line(run: Run, arguments: tuple[str], says: str) -> None:
    code, _, err = run("serve", *arguments)
    assert code == 2 and says in err and err.count("\n") == 1


@pytest.mark.parametrize("name", ["uvicorn", "python_multipart", "prometheus_client"])
def test_a_missing_extra_is_named(run: Run, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in [m for m in sys.modules if m.startswith(("fewstep.server", name))]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, name, None)
    code, _, err = run("serve", "--port", 0)
    assert code == 2 and f"needs {name}" in err and "pip install 'fewstep[serve]'" in err


def test_a_model_that_is_not_there_is_one_line(run: Run) -> None:
    code, _, err = run("serve", "--port", 0, "--model", "no/such/folder")
    assert code == 2 and err.startswith("error: --model no/such/folder:") and err.count("\n") == 1


def test_a_socket_that_never_sends_a_head_is_closed_and_harms_nobody() -> None:
    with listening(FakeWorker(), head_seconds=0.3, body_seconds=0.3) as address:
        host, _, port = address.removeprefix("http://").partition(":")
        with socket.create_connection((host, int(port))) as idle:
            for part in (b"GET /he", b"alth HTT", b"P/1.1\r\n"):  # drop by drop
                idle.sendall(part)
                time.sleep(0.05)
            assert httpx.get(f"{address}/health").status_code == 200
            idle.settimeout(5)
            assert idle.recv(100) == b""


def test_what_is_not_http_is_answered_as_json_with_an_id() -> None:
    with listening(FakeWorker()) as address, connected(address) as other:
        other.sendall(b"\x16\x03\x01 hello\r\n\r\n")
        head, body = read_all(other)
    assert head.startswith(b"HTTP/1.1 400 Bad Request")
    told = json.loads(body)["error"]
    assert told["code"] == "invalid_request"
    assert told["request_id"].encode() in head


def test_one_address_cannot_take_all_connections() -> None:
    with listening(FakeWorker(), connections=4) as address, ExitStack() as stack:
        for _ in range(2):
            stack.enter_context(connected(address))
        with connected(address) as third:
            head, body = read_all(third)
        assert b"503" in head and json.loads(body)["error"]["message"] == "too many connections"
        stack.close()
        until(lambda: httpx.get(f"{address}/health").status_code == 200)


@pytest.mark.parametrize("is_slow", [True, False])
def test_who_takes_no_answer_is_disconnected_and_who_is_slow_is_not(is_slow: bool) -> None:
    with serving(FakeWorker(), write_seconds=0.3) as served:
        answer = Response(b"a" * (48 << 20))
        served.app.add_api_route("/large", lambda: answer, response_model=None)
        with connected(served.address) as other:
            other.sendall(b"GET /large HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            connections = served.server.server_state.connections
            if not is_slow:
                until(lambda: bool(connections))
                until(lambda: not connections)
                return
            ends, taken = time.monotonic() + 1, 0
            while time.monotonic() < ends:
                taken += len(other.recv(1 << 18))
                time.sleep(0.02)
            while part := other.recv(1 << 20):
                taken += len(part)
    assert taken > 48 << 20


def test_a_server_that_ends_says_so_until_its_pictures_are_drawn() -> None:
    worker = FakeWorker(delay=0.02)
    with serving(worker) as served:
        found: list[httpx.Response] = []

        def draw() -> None:
            asked, accept = {"prompt": "a", "steps": 50}, {"Accept": "image/png"}
            url = f"{served.address}/v1/generate"
            found.append(httpx.post(url, json=asked, headers=accept, timeout=30))

        thread = threading.Thread(target=draw)
        thread.start()
        until(lambda: bool(worker.tickets))
        worker.finish = lambda: thread.join(10)
        served.server.handle_exit(signal.SIGTERM, None)
        until(lambda: not worker.is_ready)
        assert error_of(httpx.get(f"{served.address}/ready"), 503)["code"] == "not_ready"
        late = httpx.post(f"{served.address}/v1/generate", json={"prompt": "b"})
        assert error_of(late, 503)["code"] == "not_ready"
        thread.join(10)
        assert found[0].status_code == 200
        until(lambda: served.server.draining.is_alive() is False)


def test_a_body_that_never_ends_is_refused() -> None:
    with listening(FakeWorker(), body_seconds=0.3) as address:
        host, _, port = address.removeprefix("http://").partition(":")
        with socket.create_connection((host, int(port))) as slow:
            slow.sendall(
                f"POST /v1/generate HTTP/1.1\r\nHost: {host}\r\nContent-Length: 100\r\n"
                "Content-Type: application/json\r\n\r\n{".encode()
            )
            slow.settimeout(5)
            answer = slow.recv(4096)
    assert answer.startswith(b"HTTP/1.1 408") and b'"timeout"' in answer


def test_addresses_are_those_that_a_browser_finds() -> None:
    assert Settings(host="0.0.0.0").address(80) == "http://127.0.0.1:80"
    assert Settings(host="::").address(80) == "http://[::1]:80"
    assert Settings(host="[::1]").address(80) == "http://[::1]:80"


def test_the_embedded_model_draws_for_the_official_client_and_sigterm_ends_with_zero() -> None:
    with process("--max-batch", "2") as (server, address):
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="any", max_retries=0)
        model = client.models.list().data[0].id
        first = client.images.generate(prompt="a red apple", model=model, extra_body={"seed": 1})
        assert unpacked(first.data[0].b64_json).size == (64, 64)
        asked = {"prompt": "a red apple", "seed": 1, "steps": 2}
        info = httpx.post(f"{address}/sdapi/v1/txt2img", json=asked, timeout=30).json()["info"]
        assert '"steps": 2' in info
        wrong = httpx.post(f"{address}/v1/generate", json={"prompt": "a", "loras": [{"id": "x"}]})
        assert error_of(wrong, 422)["param"] == "loras"
        answers: list[httpx.Response] = []

        def draw() -> None:
            accept = {"Accept": "image/png"}
            asked = {"prompt": "a cat", "steps": 50}
            url = f"{address}/v1/generate"
            answers.append(httpx.post(url, json=asked, headers=accept, timeout=30))

        thread = threading.Thread(target=draw)
        thread.start()
        while httpx.get(f"{address}/ready").json()["running"] == 0 and not answers:
            time.sleep(0.01)
        server.send_signal(signal.SIGTERM)
        thread.join(30)
        assert server.wait(30) == 0
        assert answers[0].status_code == 200  # what was under way was finished
        assert server.stderr is not None and "Traceback" not in server.stderr.read()


def test_a_second_signal_ends_at_once() -> None:
    with process() as (server, address):
        host, _, port = address.removeprefix("http://").partition(":")
        body = b'{"prompt": "a", "steps": 50, "width": 512, "height": 512}'
        with socket.create_connection((host, int(port))) as waits:
            waits.sendall(
                f"POST /v1/generate HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(body)}\r\n"
                "Content-Type: application/json\r\n\r\n".encode()
                + body
            )
            assert waits.recv(10)
            server.send_signal(signal.SIGTERM)
            time.sleep(0.2)
            assert server.poll() is None
            server.send_signal(signal.SIGTERM)
            assert server.wait(5) == 128 + signal.SIGTERM
