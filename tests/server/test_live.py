"""The live WebSocket: the newest input wins, nothing stale, nothing crossed, nothing unbounded."""

from __future__ import annotations

import asyncio
import base64
import json
import socket
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, cast

import PIL.Image
import pytest
from server.asked import listening, packed, square, unpacked
from server.fake import FakeWorker, colour
from server.painter import Painter
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect

from fewstep.server import live
from fewstep.server.desk import Desk
from fewstep.server.listening import Bounded, configured
from fewstep.server.live import LiveSettings, Places, Session
from fewstep.server.orders import Limits, QueueFull, ServerError
from fewstep.server.settings import Settings

Opened = Callable[..., ClientConnection]


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[Painter, str]]:
    """A worker, and the address of its sockets."""
    worker = Painter()
    with listening(worker) as address:
        yield worker, live_of(address)


@pytest.fixture
def painter(served: tuple[Painter, str]) -> Painter:
    """The module's worker, as it was at the start."""
    served[0].begin_anew()
    return served[0]


@pytest.fixture
def opened(served: tuple[Painter, str], painter: Painter) -> Iterator[Opened]:
    """Opens sockets that have said hello."""
    with ExitStack() as stack:

        def call() -> ClientConnection:
            one = stack.enter_context(connect(served[1], max_size=None))
            assert answer(one)["type"] == "hello"
            return one

        yield call


def live_of(address: str) -> str:
    return f"ws{address.removeprefix('http')}/v1/live"


@contextmanager
def socket_of(worker: Painter, **options: Any) -> Iterator[ClientConnection]:
    """A socket of a server of its own."""
    with listening(worker) as address, connect(live_of(address), **options) as one:
        yield one


def draw(socket: ClientConnection, n: int, prompt: str = "a", **order: Any) -> None:
    about = {"format": order.pop("format")} if "format" in order else {}
    frame = {"type": "draw", "n": n, "order": {"prompt": prompt, "steps": 1, **order}, **about}
    socket.send(json.dumps(frame))


def answer(socket: ClientConnection, seconds: float = 5) -> dict[str, Any]:
    found = json.loads(socket.recv(seconds))
    assert isinstance(found, dict)
    return found


def until(socket: ClientConnection, n: int) -> dict[str, Any]:
    """The final answer to frame `n`."""
    while True:
        found = answer(socket)
        if found.get("n") == n and found.get("final", True):
            return found


def picture_of(message: dict[str, Any]) -> PIL.Image.Image:
    return unpacked(message.get("png") or message["jpeg"]).convert("RGB")


def is_near(one: Any, other: tuple[int, int, int], most: int = 12) -> bool:
    return all(abs(a - b) <= most for a, b in zip(one, other, strict=True))


# ── what is drawn ──


def test_hello_tells_limits_and_model(served: tuple[Painter, str]) -> None:
    offered: Any = ["fewstep.live", "fewstep.key.YQ"]
    with connect(served[1], subprotocols=offered) as one:
        found = answer(one)
        assert one.subprotocol == "fewstep.live"  # and never the key
    assert found["limits"]["frame_bytes"] == 8 << 20
    assert found["model"]["steps"] == {"min": 1, "max": 8, "default": 4}
    assert found["model"]["loras"] == [
        {"id": "ink", "name": "Ink <img src=x onerror=alert(1)>"},
        {"id": "gold", "name": "Gold leaf"},
    ]


def test_a_frame_is_answered_by_its_picture_and_how_long_it_took(opened: Opened) -> None:
    one = opened()
    draw(one, 17, "a fox", format="png")
    found = answer(one)
    assert (found["type"], found["n"], found["final"]) == ("picture", 17, True)
    assert picture_of(found).getpixel((0, 0)) == colour("a fox")
    assert 0 < found["latency_ms"] < 5000
    assert found["queue_ms"] >= 0
    assert found["record"]["prompt"] == "a fox"


def test_a_png_holds_its_record(opened: Opened) -> None:
    one = opened()
    draw(one, 1, "a fox", seed=2**64 - 1, format="png")
    file = unpacked(answer(one)["png"])
    assert json.loads(file.text["fewstep"])["seed"] == 2**64 - 1  # type: ignore[attr-defined]
    assert file.text["parameters"].startswith("a fox\nSteps: 1")  # type: ignore[attr-defined]


def test_previews_come_before_the_picture(opened: Opened) -> None:
    one = opened()
    draw(one, 1, steps=8, previews=True)
    found = [answer(one)]
    while not found[-1]["final"]:
        found.append(answer(one))
    assert len(found) > 1
    assert "record" not in found[0] and "jpeg" in found[0]


def test_a_picture_that_is_left_out_is_the_last_one_and_null_is_none(opened: Opened) -> None:
    one, red = opened(), square("red")
    draw(one, 1, "a", image=packed(red), strength=0.5)
    first = picture_of(until(one, 1)).getpixel((0, 0))
    draw(one, 2, "a", strength=0.7)
    assert picture_of(until(one, 2)).getpixel((0, 0)) == first
    draw(one, 3, "a", image=None)
    assert is_near(picture_of(until(one, 3)).getpixel((0, 0)), colour("a"))


def test_a_broken_picture_takes_no_newer_one_with_it() -> None:
    session = Session(
        cast(Any, None),
        "a client",
        Desk(FakeWorker(), Settings()),
        Places(Limits(), 1),
        LiveSettings(),
    )
    session.kept["image"] = "of a frame that came meanwhile"
    with pytest.raises(ServerError):
        session.picture("image", "broken")
    assert session.kept
    with pytest.raises(ServerError):
        session.picture("image", session.kept["image"])
    assert not session.kept


def test_a_picture_of_a_frame_that_was_replaced_is_not_lost(
    opened: Opened, painter: Painter
) -> None:
    one = opened()
    painter.delay = 0.1
    draw(one, 1)
    time.sleep(0.03)
    draw(one, 2, image=packed(square("blue")), strength=0.5)
    draw(one, 3, strength=0.5)  # replaces 2, whose picture it uses
    until(one, 3)
    assert painter.drawn[-1].image is not None
    assert painter.drawn[-1].image.getpixel((0, 0)) == (0, 0, 255)


# ── the newest wins ──


def test_of_frames_that_come_while_one_is_drawn_the_newest_is_drawn_alone(
    opened: Opened, painter: Painter
) -> None:
    one = opened()
    painter.delay = 0.05
    draw(one, 0, "first")
    time.sleep(0.02)
    for n in range(1, 50):
        draw(one, n, f"prompt {n}")
    until(one, 49)
    assert len(painter.orders) <= 4
    assert painter.most_under_way == 1


def test_a_newer_frame_cancels_the_later_steps_of_the_one_under_way(
    opened: Opened, painter: Painter
) -> None:
    one = opened()
    painter.delay = 0.05
    draw(one, 1, "slow", steps=50)
    time.sleep(0.1)
    began = time.monotonic()
    draw(one, 2, "quick")
    assert is_near(picture_of(until(one, 2)).getpixel((0, 0)), colour("quick"))
    assert time.monotonic() - began < 1
    assert [order.prompt for order in painter.given_up] == ["slow"]


def test_a_client_that_never_pauses_sees_pictures(opened: Opened, painter: Painter) -> None:
    one = opened()
    painter.delay = 0.03  # times 4: longer than between frames
    for n in range(40):
        draw(one, n, f"{n}", steps=4)
        time.sleep(0.02)
    until(one, 39)
    assert len(painter.drawn) >= 4


def test_ten_thousand_frames_in_a_moment_leave_no_line_of_stale_ones(
    opened: Opened, painter: Painter
) -> None:
    one = opened()
    for n in range(10_000):
        draw(one, n, f"{n}")
    sent = time.monotonic()
    found = until(one, 9_999)
    assert found["record"]["prompt"] == "9999"
    assert time.monotonic() - sent < 5
    assert painter.most_under_way == 1
    assert len(painter.orders) < 5_000


# ── clients that are slow, broken or hostile ──


def test_who_does_not_read_gets_the_newest_picture_alone_once_it_does(opened: Opened) -> None:
    one = opened()
    draw(one, 0)
    until(one, 0)
    one.send(json.dumps({"type": "seen", "n": 0}))
    for n in range(1, 30):
        draw(one, n, f"{n}")
        time.sleep(0.02)  # each is drawn; none is acknowledged
    numbers = [answer(one)["n"], answer(one)["n"]]
    with pytest.raises(TimeoutError):
        one.recv(0.2)
    one.send(json.dumps({"type": "seen", "n": numbers[0]}))
    assert answer(one)["n"] == 29
    assert max(numbers) < 29


def test_a_client_that_stops_reading_is_left_and_its_place_is_free(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(live, "LiveSettings", lambda: LiveSettings(patience=0.3))
    with listening(Painter(Limits(sockets_per_client=1), 0)) as address:
        raw = handshaken(address)
        big = {"prompt": "x", "steps": 1, "width": 1024, "height": 1024}
        big["image"] = packed(PIL.Image.effect_noise((1024, 1024), 90))
        try:
            for n in range(60):
                raw.sendall(frame_of({"type": "draw", "n": n, "format": "png", "order": big}))
                big.pop("image", None)
                big["seed"] = n
                time.sleep(0.05)
        except OSError:
            pass  # it was left
        assert eventually(lambda: is_let_in(address))
        raw.close()


def handshaken(address: str) -> socket.socket:
    """A raw WebSocket that has a small window and never reads."""
    host, _, port = address.removeprefix("http://").partition(":")
    raw = socket.socket()
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    raw.connect((host, int(port)))
    raw.settimeout(3)
    key = base64.b64encode(bytes(16)).decode()
    raw.sendall(
        f"GET /v1/live HTTP/1.1\r\nHost: {host}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        f"Sec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n".encode()
    )
    assert raw.recv(12) == b"HTTP/1.1 101"
    return raw


def frame_of(message: dict[str, Any]) -> bytes:
    """A text frame of a client, masked by zeros."""
    body = json.dumps(message).encode()
    return b"\x81" + bytes([0x80 | 127]) + struct.pack(">Q", len(body)) + bytes(4) + body


def is_let_in(address: str) -> bool:
    with connect(live_of(address)) as one:
        return bool(answer(one)["type"] == "hello")


def eventually(holds: Callable[[], bool], seconds: float = 8) -> bool:
    end = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True


@pytest.mark.parametrize(
    ("text", "param"),
    [
        ("no JSON", None),
        ("[1]", None),
        ('{"type": "draw"}', "n"),
        ('{"type": "paint", "n": 1}', "type"),
        ('{"type": "draw", "n": true, "order": {"prompt": "a"}}', "n"),
        ('{"type": "draw", "n": 1, "order": []}', "order"),
        ('{"type": "draw", "n": 1, "order": {}}', "prompt"),
        ('{"type": "draw", "n": 1, "order": {"prompt": "a", "promt": 1}}', "promt"),
        ('{"type": "draw", "n": 1, "order": {"prompt": "a", "steps": NaN}}', None),
        ('{"type": "draw", "n": 1, "order": {"prompt": "a", "steps": 10000}}', "steps"),
        ('{"type": "draw", "n": 1, "order": {"prompt": "a", "image": "!!"}}', "image"),
        ('{"type": "draw", "n": 1, "order": {"prompt": "a", "image": "AAAA"}}', "image"),
        ('{"type": "draw", "n": 1, "format": "gif", "order": {"prompt": "a"}}', "format"),
        ('{"a":' * 10_000 + "1" + "}" * 10_000, None),
    ],
)
def test_garbage_is_an_error_that_names_the_field_and_the_socket_goes_on(
    opened: Opened, text: str, param: str | None
) -> None:
    one = opened()
    one.send(text)
    found = answer(one)
    assert found["type"] == "error"
    assert found["error"]["code"] in ("invalid_request", "unsupported_media")
    assert found["error"]["param"] == param
    draw(one, 2)
    assert until(one, 2)["type"] == "picture"


def test_endless_garbage_ends_the_socket(opened: Opened) -> None:
    one = opened()
    with pytest.raises(ConnectionClosed) as closed:
        for _ in range(1000):
            one.send("garbage")
        while True:
            one.recv(5)
    assert closed.value.rcvd is not None and closed.value.rcvd.code == 1008


def test_who_sends_garbage_and_never_reads_is_cut_off_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Bounded, "seconds", 0.3)
    with listening(Painter(Limits(sockets_per_client=1))) as address:
        raw, began = handshaken(address), time.monotonic()
        with pytest.raises(OSError, match=r"reset|Broken"):
            while time.monotonic() - began < 5:
                raw.sendall(frame_of({"type": "garbage"}))
        raw.close()
        assert eventually(lambda: is_let_in(address), 2)


def test_a_task_that_loses_its_cancellation_is_ended_all_the_same() -> None:
    async def run() -> list[BaseException | None]:
        async def deaf() -> None:
            with suppress(asyncio.CancelledError):
                await asyncio.sleep(60)
            await asyncio.sleep(60)

        task = asyncio.create_task(deaf())
        await asyncio.sleep(0)
        return await live.ended([task])

    assert isinstance(asyncio.run(run())[0], asyncio.CancelledError)


def test_who_answers_no_ping_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    def hasty(*arguments: Any) -> Any:
        config = configured(*arguments)
        config.ws_ping_interval = config.ws_ping_timeout = 0.1
        return config

    monkeypatch.setattr("server.asked.configured", hasty)
    with listening(Painter(Limits(sockets_per_client=1))) as address:
        raw = handshaken(address)
        assert eventually(lambda: is_let_in(address), 3)
        raw.close()


def test_binary_frames_end_the_socket(opened: Opened) -> None:
    one = opened()
    one.send(b"\x00\xff")
    with pytest.raises(ConnectionClosed) as closed:
        one.recv(5)
    assert closed.value.rcvd is not None and closed.value.rcvd.code == 1003


def test_a_frame_that_is_too_large_ends_the_socket() -> None:
    with socket_of(Painter(Limits(frame_bytes=10_000))) as one:
        answer(one)
        one.send("x" * 10_001)
        with pytest.raises(ConnectionClosed) as closed:
            one.recv(5)
    assert closed.value.rcvd is not None and closed.value.rcvd.code == 1009


def test_an_idle_socket_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "LiveSettings", lambda: LiveSettings(idle=0.1))
    with socket_of(Painter()) as one:
        answer(one)
        with pytest.raises(ConnectionClosed) as closed:
            one.recv(5)
    assert closed.value.rcvd is not None and closed.value.rcvd.code == 1001


def test_pictures_that_sockets_keep_are_bounded_together() -> None:
    picture = packed(square(side=64))
    with (
        listening(Painter(), held_bytes=len(picture) + 10) as address,
        connect(live_of(address)) as first,
        connect(live_of(address)) as second,
    ):
        for one in (first, second):
            assert answer(one)["type"] == "hello"
        draw(first, 1, image=picture)
        assert answer(first)["type"] == "picture"
        draw(second, 1, image=picture)
        assert answer(second)["error"]["code"] == "queue_full"
        draw(second, 2)
        assert answer(second)["n"] == 2
        first.close()
        time.sleep(0.2)
        draw(second, 3, image=picture)
        assert answer(second)["type"] == "picture"


def test_sockets_are_bounded_in_all_and_of_each_client() -> None:
    with listening(Painter(Limits(sockets_per_client=2))) as address:
        with connect(live_of(address)), connect(live_of(address)):
            with connect(live_of(address)) as third:
                assert answer(third)["error"]["code"] == "queue_full"
                with pytest.raises(ConnectionClosed) as closed:
                    third.recv(5)
            assert closed.value.rcvd is not None and closed.value.rcvd.code == 1013
        assert eventually(lambda: is_let_in(address))


def test_without_the_key_there_is_no_socket_and_with_it_there_is() -> None:
    with listening(Painter(), api_key="the-secret") as address:
        with pytest.raises(InvalidStatus) as refused, connect(live_of(address)):
            pass
        assert refused.value.response.status_code == 401
        key = base64.urlsafe_b64encode(b"the-secret").decode().rstrip("=")
        offered: Any = ["fewstep.live", f"fewstep.key.{key}"]
        with connect(live_of(address), subprotocols=offered) as one:
            assert answer(one)["type"] == "hello"
            assert one.subprotocol == "fewstep.live"


def test_another_web_site_gets_no_socket(served: tuple[Painter, str]) -> None:
    evil: Any = "http://evil.example"
    with pytest.raises(InvalidStatus) as refused, connect(served[1], origin=evil):
        pass
    assert refused.value.response.status_code == 403


# ── many ──


def test_two_sockets_never_get_each_others_pictures(opened: Opened, painter: Painter) -> None:
    pair = [opened(), opened()]
    for n in range(60):
        for name, each in zip("ab", pair, strict=True):
            draw(each, n, f"{name} {n}")
        if n % 7 == 0:
            time.sleep(0.01)
    for name, each in zip("ab", pair, strict=True):
        found = until(each, 59)
        assert found["record"]["prompt"] == f"{name} 59"
        assert is_near(picture_of(found).getpixel((0, 0)), colour(f"{name} 59"))


def test_who_leaves_gives_up_the_order(opened: Opened, painter: Painter) -> None:
    painter.delay = 0.05
    for n in range(5):
        one = opened()
        draw(one, n, steps=50)
        time.sleep(0.1)
        one.close()
    assert eventually(lambda: painter.under_way == 0, 2)
    assert not painter.drawn


# ── the worker ──


def test_a_full_line_is_told_and_the_socket_goes_on(opened: Opened, painter: Painter) -> None:
    one = opened()

    def refuse() -> None:
        raise QueueFull(3)

    painter.refuse = refuse
    draw(one, 1)
    error = answer(one)["error"]
    assert (error["code"], error["hint"]) == ("queue_full", "try again in 3 s")
    painter.refuse = lambda: None
    draw(one, 2)
    assert until(one, 2)["type"] == "picture"


def test_a_worker_that_breaks_is_no_secret_and_tells_none(opened: Opened, painter: Painter) -> None:
    one = opened()

    def refuse() -> None:
        raise KeyError("/home/someone/secret.safetensors")

    painter.refuse = refuse
    draw(one, 1)
    found = answer(one)
    assert (found["n"], found["error"]["code"]) == (1, "internal")
    assert "secret" not in json.dumps(found)


def test_while_the_model_is_loaded_the_socket_says_so(
    served: tuple[Painter, str], painter: Painter
) -> None:
    painter.is_ready = False
    with connect(served[1]) as one:
        assert answer(one)["error"]["code"] == "not_ready"


def test_a_mask_needs_an_image(opened: Opened) -> None:
    one = opened()
    draw(one, 1, mask=packed(square("white", mode="L")))
    assert answer(one)["error"]["param"] == "mask"
