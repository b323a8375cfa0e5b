"""Replicas on a cluster of this machine: they serve as one worker does, and one may die."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
import types
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import httpx
import numpy as np
import PIL.Image
import pytest
from server.asked import error_of, listening, until

from fewstep import EMBEDDED
from fewstep.errors import CheckpointError, RequestError
from fewstep.server import ray_cluster
from fewstep.server.orders import (
    Drawn,
    Event,
    Failed,
    Limits,
    Order,
    Queued,
    QueueFull,
    ServerError,
    Started,
    Stepped,
)
from fewstep.server.wire import pack, unpack
from fewstep.server.worker import PipelineWorker

psutil: Any = pytest.importorskip("psutil", reason="finds the processes of Ray")

pytestmark = pytest.mark.filterwarnings("ignore")  # Ray's own, of many kinds
LIMITS = Limits(waiting=6, waiting_per_client=5, seconds=60)
FAR = 1  # how far a picture may be from a worker's own, of 255
LONG = Order("a long one", steps=50, width=256, height=256)
MACHINE = {"CPU": 8.0}
ORDERS = [
    Order("a red apple", seed=1, steps=2),
    Order("a green pear", seed=2, steps=4, guidance_scale=6.0, width=96, height=64),
    Order("a cat", seed=3, steps=4, image=PIL.Image.effect_noise((64, 64), 90).convert("RGB")),
    Order(
        "a dog",
        seed=4,
        image=PIL.Image.effect_noise((64, 64), 90).convert("RGB"),
        mask=PIL.Image.linear_gradient("L").resize((64, 64)).point(lambda p: 255 * (p > 99)),
    ),
]

# ── without a cluster ──


def same(a: Any, b: Any) -> bool:
    """Whether two values are equal, pictures by their pixels, errors by their words."""
    if isinstance(a, PIL.Image.Image):
        return isinstance(b, PIL.Image.Image) and a.mode == b.mode and a.tobytes() == b.tobytes()
    if isinstance(a, ServerError):
        return (a.code, str(a), a.param, a.hint) == (b.code, str(b), b.param, b.hint)
    return bool(a == b)


@pytest.mark.parametrize(
    "thing",
    [
        *ORDERS,
        replace(LONG, loras=(("ink", 0.5),), control=PIL.Image.new("L", (8, 8), 3)),
        Queued(3),
        Started(0.5),
        Stepped(1, 4, PIL.Image.new("RGB", (4, 6), "red")),
        Drawn(PIL.Image.new("RGB", (4, 6), "red"), {"image": "text", "seed": 1}, 0.1, 0.2, True),
        Failed(ServerError("invalid_request", "no", param="steps", hint="fewer")),
    ],
    ids=lambda thing: type(thing).__name__,
)
def test_what_passes_is_plain_and_comes_out_the_same(thing: Any) -> None:
    def check(value: Any) -> None:
        assert type(value) in (dict, tuple, list, str, bytes, int, float, bool, type(None))
        for each in value.values() if isinstance(value, dict) else ():
            check(each)
        for each in value if isinstance(value, (tuple, list)) else ():
            check(each)

    packed = pack(thing)
    check(packed)
    found = unpack(packed)
    assert type(found) is type(thing)
    assert all(same(value, getattr(found, name)) for name, value in vars(thing).items())


def test_missing_ray_is_named_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(RequestError, match=r"--ray needs Ray.*pip install 'fewstep\[ray\]'"):
        ray_cluster.imported()


def test_a_ray_whose_replicas_take_calls_without_a_token_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("ray", "ray.serve"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    old: Any = sys.modules["ray"]  # Ray itself reads how it may be reached when it is imported
    old.__version__, old.serve = "2.49.1", sys.modules["ray.serve"]
    with pytest.raises(RequestError, match=r"--ray needs Ray 2\.60, and this is 2\.49\.1"):
        ray_cluster.imported()


@pytest.mark.parametrize(
    ("machines", "device", "replicas", "count", "on", "threads"),
    [
        ([MACHINE], "auto", None, 1, "cpu", 8),
        ([MACHINE], "auto", 3, 3, "cpu", 2),
        ([MACHINE, {"CPU": 4.0}, {"CPU": 0.0}], "cpu", None, 2, "cpu", 4),
        ([MACHINE, {"CPU": 4.0}], "cpu", 3, 3, "cpu", 4),
        ([{"CPU": 16.0, "GPU": 4.0}], "auto", None, 4, "cuda:0", None),
        ([{"CPU": 16.0, "GPU": 4.0}], "cpu", 2, 2, "cpu", 8),
    ],
)
def test_each_replica_gets_a_gpu_or_an_even_part_of_the_cpus(
    machines: Any, device: str, replicas: int | None, count: int, on: str, threads: int | None
) -> None:
    found = ray_cluster.shares_of(machines, device, replicas, None)
    assert (found.replicas, found.device, found.threads) == (count, on, threads)
    assert found.options.get("num_gpus", 0) == (on != "cpu")


@pytest.mark.parametrize(
    ("device", "replicas", "says"),
    [("auto", 9, "--replicas 9: the cluster has 8 CPUs"), ("cuda", None, "has 0 GPUs")],
)
def test_more_replicas_than_devices_are_refused(
    device: str, replicas: int | None, says: str
) -> None:
    with pytest.raises(RequestError, match=says):
        ray_cluster.shares_of([MACHINE], device, replicas, None)


def test_what_a_replica_raised_is_told_without_rays_words_around_it() -> None:
    message = (
        "The deployment failed to start 2 times\n  File x\nfewstep.errors.{}: no such\nthing\n"
    )
    request = ray_cluster.failure_of(message.format("RequestError"))
    assert isinstance(request, RequestError) and str(request) == "no such\nthing"
    other = ray_cluster.failure_of(message.format("CheckpointError"))
    assert isinstance(other, CheckpointError) and str(other) == "no such\nthing"
    assert str(ray_cluster.failure_of("a\nRuntimeError: b")) == "b"


# ── on a cluster ──


def skip_without_ray() -> None:
    """Ray is looked for, and not imported: it reads then how it may be reached."""
    if importlib.util.find_spec("ray") is None:
        pytest.skip("needs fewstep[ray]")


@pytest.fixture(scope="module")
def worker() -> Iterator[Any]:
    skip_without_ray()
    from fewstep.server.ray_worker import RayWorker

    made = RayWorker(EMBEDDED.name, LIMITS, replicas=2, threads=1, max_batch=2, picture_bytes=0)
    with pytest.raises(ServerError, match="still loading"):
        made.submit(Order("too soon"))
    made.start()
    assert made.wait_until_ready(100)
    until(lambda: made._up == 2, 60)
    yield made
    made.drain(10)


@pytest.fixture(scope="module")
def address(worker: Any) -> Iterator[str]:
    with listening(worker) as found:
        yield found


def drawn(worker: Any, *orders: Order) -> list[Drawn]:
    """The pictures of orders that are sent at once."""

    async def draw() -> list[Drawn]:
        tickets = [worker.submit(order) for order in orders]
        return await asyncio.gather(*(ticket.result() for ticket in tickets))

    return asyncio.run(draw())


def test_pictures_are_the_workers_own(worker: Any) -> None:
    plain = PipelineWorker(EMBEDDED.name, LIMITS)
    plain.start()
    assert plain.wait_until_ready(60)
    for ours, own in zip(drawn(worker, *ORDERS), drawn(plain, *ORDERS), strict=True):
        off = np.asarray(ours.image, int) - np.asarray(own.image, int)
        assert abs(off).max() <= FAR
        assert ours.record == own.record and ours.seconds > 0
    assert worker.facts == plain.facts
    plain.drain(5)


def test_events_come_in_order_with_previews_and_what_was_observed(worker: Any) -> None:
    seen: list[str] = []
    worker.observe = lambda stage, seconds: seen.append(stage)

    async def follow() -> list[Event]:
        order = Order("a red apple", seed=7, steps=6, previews=True)
        return [event async for event in worker.submit(order).events()]

    events = asyncio.run(follow())
    kinds = [type(event) for event in events if not isinstance(event, (Queued, Stepped))]
    steps = [event for event in events if isinstance(event, Stepped)]
    assert kinds == [Started, Drawn] and isinstance(events[-1], Drawn)
    assert [step.step for step in steps] == sorted({step.step for step in steps})
    assert any(step.preview is not None and step.preview.size == (64, 64) for step in steps)
    assert {"queue", "prepare", "step", "decode"} <= set(seen)


def test_what_the_model_cannot_draw_is_refused_at_once(worker: Any) -> None:
    with pytest.raises(ServerError, match="the LoRA 'ink' is not loaded"):
        worker.submit(Order("a", loras=(("ink", 1.0),)))
    with pytest.raises(ServerError, match="no control loaded"):
        worker.submit(Order("a", control=PIL.Image.new("RGB", (64, 64))))


def test_both_replicas_draw_the_line_is_bounded_and_who_gives_up_makes_room(worker: Any) -> None:
    before = worker.load()

    async def fill() -> None:
        # By so many clients that each has a place in the line.
        held = [worker.submit(replace(LONG, client=str(i))) for i in range(6)]
        while worker.load().running < 6:
            await asyncio.sleep(0.01)
        held += [worker.submit(replace(LONG, client="one")) for _ in range(5)]
        with pytest.raises(QueueFull):
            worker.submit(replace(LONG, client="one"))
        held.append(worker.submit(replace(LONG, client="two")))
        with pytest.raises(QueueFull) as full:
            worker.submit(replace(LONG, client="three"))
        assert full.value.retry_after >= 1
        assert worker.load().waiting == 6
        late = asyncio.create_task(come_late())
        for ticket in held:
            ticket.cancel()
        ends = await asyncio.gather(*(t.result() for t in held), return_exceptions=True)
        assert {getattr(end, "code", end) for end in ends} == {"cancelled"}
        await late

    async def come_late() -> None:
        while worker.load().waiting == 6:
            await asyncio.sleep(0.001)
        given_up = time.monotonic()
        found = await worker.submit(Order("quick", steps=1, client="four")).result()
        assert found.waited < 5 and time.monotonic() - given_up < 10

    asyncio.run(fill())
    until(lambda: worker.load().running == 0)
    assert worker.load().cancelled == before.cancelled + 12
    assert worker.load().failed == before.failed
    drawn(worker, *ORDERS)
    assert len(worker._loads) == 2 and worker.load().rows > before.rows


def test_who_gives_up_at_once_is_told_so(worker: Any) -> None:
    async def give_up() -> set[str]:
        codes = set()
        for _ in range(20):  # some before their task began, some amid their way
            ticket = worker.submit(LONG)
            ticket.cancel()
            with pytest.raises(ServerError) as end:
                await asyncio.wait_for(ticket.result(), 10)
            codes.add(end.value.code)
        return codes

    assert asyncio.run(give_up()) == {"cancelled"}
    until(lambda: worker.load().running == 0)


def test_who_is_late_is_told_so(worker: Any) -> None:
    with pytest.raises(ServerError) as error:
        drawn(worker, replace(LONG, seconds=0.2))
    assert error.value.code == "timeout"
    until(lambda: worker.load().running == 0)


def test_the_interfaces_work_and_the_guards_stand(worker: Any, address: str) -> None:
    with httpx.Client(base_url=address, timeout=60) as client:
        assert client.get("/ready").json()["status"] == "ready"
        assert client.get("/v1/limits").json()["model"]["id"] == EMBEDDED.name
        denied = client.get("/v1/limits", headers={"Host": "evil.example"})
        assert error_of(denied, 403)["code"] == "forbidden_host"
        unknown = {"prompt": "a", "loras": [{"id": "ink"}]}
        assert error_of(client.post("/v1/generate", json=unknown), 422)["param"] == "loras"
        asked = {"prompt": "a red apple", "steps": 4, "previews": True}
        events = client.post("/v1/generate", json=asked).text
        assert "event: step" in events and "event: picture" in events
        held = [worker.submit(replace(LONG, client=str(i))) for i in range(6)]
        until(lambda: worker.load().running == 6)
        held += [worker.submit(replace(LONG, client="more")) for _ in range(4)]
        many = client.post("/v1/images/generations", json={"prompt": "a", "n": 5})
        assert error_of(many, 429)["code"] == "queue_full" and int(many.headers["retry-after"])
        for ticket in held:
            ticket.cancel()
        assert "fewstep_batches_total" in client.get("/metrics").text
        until(lambda: worker.load().running == 0)


def test_a_live_socket_draws_and_gives_up_what_is_stale(worker: Any, address: str) -> None:
    from websockets.sync.client import connect

    cancelled = worker.load().cancelled
    with connect(address.replace("http", "ws") + "/v1/live", max_size=None) as socket:
        assert json.loads(socket.recv(10))["type"] == "hello"
        slow = {"prompt": "old", "steps": 50, "width": 256, "height": 256}
        socket.send(json.dumps({"type": "draw", "n": 1, "order": slow}))
        until(lambda: worker.load().running > 0)
        socket.send(json.dumps({"type": "draw", "n": 2, "order": {"prompt": "new", "steps": 1}}))
        answer = json.loads(socket.recv(30))
    assert (answer["type"], answer["n"], answer["final"]) == ("picture", 2, True)
    assert worker.load().cancelled == cancelled + 1


def test_who_leaves_is_given_up(worker: Any, address: str) -> None:
    cancelled = worker.load().cancelled
    asked = {"prompt": "a", "steps": 50, "width": 256, "height": 256}
    with httpx.stream("POST", f"{address}/v1/generate", json=asked) as answer:
        assert answer.status_code == 200, answer.read()
        parts = answer.iter_text()
        next(parts)
        until(lambda: worker.load().running == 1)
    until(lambda: worker.load().running == 0)
    assert worker.load().cancelled == cancelled + 1


def replicas() -> list[Any]:
    """The processes of replicas that this one has started."""
    below = psutil.Process().children(recursive=True)
    names = ("ray::ServeReplica:fewstep", "ray::SERVE_REPLICA::fewstep")
    return [each for each in below if " ".join(each.cmdline()).startswith(names)]


def test_a_killed_replica_fails_its_own_pictures_and_is_replaced(worker: Any) -> None:
    async def lose_one() -> list[Any]:
        small = replace(LONG, width=128, height=128)
        tickets = [worker.submit(replace(small, client=str(i))) for i in range(4)]
        firsts = [await first_step(ticket) for ticket in tickets]
        found = replicas()
        assert len(found) == 2
        os.kill(found[0].pid, signal.SIGKILL)
        return await asyncio.gather(*(last(events) for events in firsts))

    async def first_step(ticket: Any) -> Any:
        events = ticket.events()
        async for event in events:
            if isinstance(event, Started):
                return events

    async def last(events: Any) -> Event:
        return [event async for event in events][-1]

    ends = asyncio.run(lose_one())
    lost = [end.error for end in ends if isinstance(end, Failed)]
    assert len(lost) == 2 and sum(isinstance(end, Drawn) for end in ends) == 2
    assert {error.code for error in lost} == {"not_ready"} and "ended" in str(lost[0])
    assert worker.is_ready  # the other goes on
    assert len(drawn(worker, *ORDERS)) == 4
    until(lambda: worker._up == 2 and len(replicas()) == 2, 60)
    worker._loads.clear()
    drawn(worker, *ORDERS)
    assert len(worker._loads) == 2


def test_a_drain_finishes_what_is_under_way_and_ends_every_process(worker: Any) -> None:
    below = psutil.Process().children(recursive=True)

    async def end() -> list[Any]:
        tickets = [worker.submit(Order("a cat", seed=i, steps=8)) for i in range(5)]
        drain = asyncio.create_task(asyncio.to_thread(worker.drain, 30))
        ends = await asyncio.gather(*(ticket.result() for ticket in tickets))
        await drain
        return list(ends)

    assert all(isinstance(end, Drawn) for end in asyncio.run(end()))
    assert not worker.is_ready
    with pytest.raises(ServerError, match="shutting down"):
        worker.submit(Order("too late"))
    assert psutil.wait_procs(below, timeout=10)[1] == []


# ── as a command ──


def ports_of(processes: list[Any]) -> set[tuple[str, int]]:
    """The addresses at which processes listen."""
    return {
        (at.laddr.ip.removeprefix("::ffff:"), at.laddr.port)
        for process in processes
        for at in process.net_connections("tcp")
        if at.status == "LISTEN"
    }


def is_refused(port: int) -> bool:
    """Whether a replica refuses a call that brings no token, before it reads it."""
    import grpc

    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        call = channel.unary_unary("/ray.serve.ASGIService/HandleRequest")
        try:
            call(b"", timeout=10)
        except grpc.RpcError as error:
            return error.code() == grpc.StatusCode.UNAUTHENTICATED
    return False


def test_the_command_keeps_to_this_machine_and_sigterm_ends_all_of_it() -> None:
    skip_without_ray()
    command = [sys.executable, "-m", "fewstep", "serve", "--port", "0", "--ray", "--replicas", "1"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as server:
        assert server.stdout is not None and server.stderr is not None
        try:
            told = server.stdout.readline()
            assert " draws at http://127.0.0.1:" in told
            address = told.split(" draws at ")[1].strip()
            below = psutil.Process(server.pid).children(recursive=True)
            open_to_all = {port for ip, port in ports_of(below) if ip not in ("127.0.0.1", "::1")}
            assert len(open_to_all) <= 1 and all(map(is_refused, open_to_all))
            body = {"prompt": "a cat", "steps": 16}
            with httpx.stream("POST", f"{address}/v1/generate", json=body, timeout=60) as answer:
                parts = answer.iter_text()
                next(parts)
                server.send_signal(signal.SIGTERM)
                assert "event: picture" in "".join(parts)  # what was under way was finished
            assert server.wait(30) == 0
            assert psutil.wait_procs(below, timeout=10)[1] == []
            assert "Traceback" not in server.stderr.read()
        finally:
            if server.poll() is None:
                server.kill()


def test_a_model_that_is_not_there_is_one_line() -> None:
    skip_without_ray()
    options = ("serve", "--port", "0", "--ray", "--replicas", "1", "--model", "no/such/folder")
    command = [sys.executable, "-m", "fewstep", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=90)
    assert done.returncode == 2
    assert done.stderr.startswith("error: --model no/such/folder:")
    assert done.stderr.count("\n") == 1
