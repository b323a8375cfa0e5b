"""Case 13: fifty clients that leave in the middle leave nothing behind, however they asked."""

from __future__ import annotations

import asyncio
import gc
import json
import threading
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from faults.wires import MEBI, opened, posted, resident
from server.asked import Served, until
from websockets.sync.client import connect

from fewstep.server.worker import PipelineWorker

TIMES = 50
Leaves = Callable[[Served, int], None]


def order_of(seed: int) -> dict[str, Any]:
    """A picture that takes long."""
    return {"prompt": "a cat", "seed": seed, "steps": 50, "width": 96, "height": 64}


def body_of(seed: int) -> bytes:
    return json.dumps(order_of(seed)).encode()


def http(served: Served, seed: int) -> None:
    """Leaves without having read a byte."""
    with opened(served, posted("/v1/generate", body_of(seed), Accept="image/png")):
        time.sleep(0.002 * (seed % 20))


def events(served: Served, seed: int) -> None:
    """Leaves in the middle of the events."""
    with opened(served, posted("/v1/generate", body_of(seed))) as connection:
        for _ in range(1 + seed % 4):
            connection.recv(200)


def live(served: Served, seed: int) -> None:
    """Leaves a socket in the middle of a picture."""
    with connect(f"ws{served.address.removeprefix('http')}/v1/live") as one:
        one.recv(5)
        one.send(
            json.dumps({"type": "draw", "n": 1, "order": {**order_of(seed), "previews": True}})
        )
        if seed % 2:
            one.recv(5)


def tasks_of(served: Served) -> int:
    """How many coroutines the server runs."""
    return len(asyncio.all_tasks(served.server.servers[0].get_loop()))


def is_empty(served: Served, worker: PipelineWorker) -> bool:
    """Whether nobody draws or waits, nor is remembered as if."""
    load = worker.load()
    return not (load.waiting or load.running or served.app.state.desk.jobs)


@pytest.mark.parametrize("leave", [http, events, live])
def test_who_leaves_is_forgotten_within_a_step(
    real: Served, worker: PipelineWorker, leave: Leaves
) -> None:
    """Case 13: places, coroutines, threads and memory are as before."""
    for seed in range(3):
        leave(real, seed)  # what is loaded once
    until(lambda: is_empty(real, worker))
    time.sleep(0.1)
    gc.collect()
    before, tasks, threads = resident(), tasks_of(real), threading.active_count()
    load = worker.load()
    for seed in range(100, 100 + TIMES):
        leave(real, seed)
    rows = worker.load().rows
    until(lambda: is_empty(real, worker))
    after = worker.load()
    assert after.drawn == load.drawn
    assert after.failed == load.failed
    assert after.cancelled - load.cancelled <= TIMES
    # Of the last, which had up to 50 steps to go, and of a few before it.
    assert after.rows - rows < 100
    until(lambda: tasks_of(real) <= tasks)
    until(lambda: threading.active_count() <= threads + 4)  # pools begin theirs when they will
    gc.collect()
    assert resident() - before < 48 * MEBI
    answer = httpx.get(f"{real.address}/ready").json()
    assert (answer["waiting"], answer["running"]) == (0, 0)
