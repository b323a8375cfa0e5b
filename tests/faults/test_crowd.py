"""Cases 14 and 15: many at once are bounded, served in turn, and never get each other's picture."""

from __future__ import annotations

import asyncio
import base64
import socket
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import PIL.Image
import pytest
import torch
from faults.conftest import BLUEPRINT, EDGES
from faults.wires import MEBI, Answered, answer, posted, resident
from server.asked import Served, packed, serving, unpacked, until

from fewstep.server import drawing
from fewstep.server.orders import Limits
from fewstep.server.worker import PipelineWorker

QUEUE, CLIENTS = 64, 200
HEADERS = {"Accept": "image/png"}


class Gate:
    """Holds all steps until it is opened, and notes who takes one, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open, self.seen = threading.Event(), {}
        usual = drawing.answers

        def answers(unet: Any, runs: Sequence[Any]) -> list[torch.Tensor]:
            assert self.open.wait(60)
            for run in runs:
                self.seen.setdefault(run.job.generator.initial_seed(), len(self.seen))
            return usual(unet, runs)

        monkeypatch.setattr(drawing, "answers", answers)

    seen: dict[int, int]  # seed -> place


@pytest.fixture
def tiny(sd_folder: Path) -> Iterator[tuple[Served, PipelineWorker]]:
    """A server of a tiny model that draws one picture at a time."""
    limits = Limits(waiting=QUEUE, waiting_per_client=48, requests_per_minute=10_000)
    worker = PipelineWorker(str(sd_folder), limits, max_batch=1)
    worker.start()
    assert worker.wait_until_ready(60)
    with serving(worker) as served:
        yield served, worker


def asking(served: Served, seed: int, source: str = "127.0.0.1") -> socket.socket:
    """A connection from an address that has asked for a picture."""
    connection = socket.create_connection(served.place, 60, (source, 0))
    body = b'{"prompt": "a cat %d", "seed": %d, "steps": 2}' % (seed, seed)
    connection.sendall(posted("/v1/generate", body, Accept="image/png"))
    return connection


def read(connection: socket.socket) -> Answered:
    with connection:
        return answer(connection, "POST")


def test_of_200_at_once_as_many_wait_as_may_and_the_others_are_told_when_to_come(
    tiny: tuple[Served, PipelineWorker], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Case 14: exactly; those who wait get pictures, nothing is stuck, and memory is bounded."""
    served, worker = tiny
    gate = Gate(monkeypatch)
    first = asking(served, 0, "127.0.0.9")
    until(lambda: worker.load().running == 1)
    before = resident()
    with ThreadPoolExecutor(CLIENTS) as pool:
        sources = [f"127.0.0.{10 + seed % 10}" for seed in range(CLIENTS)]
        waiting = list(pool.map(lambda seed: asking(served, seed, sources[seed]), range(CLIENTS)))
        until(lambda: worker.load().waiting == QUEUE)
        answers = list(map(pool.submit, [read] * (CLIENTS + 1), [first, *waiting]))
        until(lambda: sum(each.done() for each in answers) == CLIENTS - QUEUE, 20)
        gate.open.set()
        found = [each.result(60) for each in answers]
    drawn = [each for each in found if each.status == 200]
    refused = [each for each in found if each.status == 429]
    assert (len(drawn), len(refused)) == (QUEUE + 1, CLIENTS - QUEUE)
    assert all(each.headers["content-type"] == "image/png" for each in drawn)
    assert {each.code for each in refused} == {"queue_full"}
    assert all(int(each.headers["retry-after"]) >= 1 for each in refused)
    assert resident() - before < 100 * MEBI
    assert worker.load().waiting == worker.load().running == 0
    assert read(asking(served, 999)).status == 200


def test_clients_take_turns_and_each_is_served_in_its_own_order(
    tiny: tuple[Served, PipelineWorker], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Case 14: who asks for forty pictures does not hold up who asks for four."""
    served, worker = tiny
    gate = Gate(monkeypatch)
    connections = [asking(served, 1, "127.0.0.9")]
    until(lambda: worker.load().running == 1)
    wanted = [(seed, "127.0.0.2") for seed in range(100, 140)]
    wanted += [(seed, "127.0.0.3") for seed in range(200, 204)]
    for count, (seed, source) in enumerate(wanted, 1):
        connections.append(asking(served, seed, source))
        until(lambda count=count: worker.load().waiting == count)
    gate.open.set()
    assert {read(connection).status for connection in connections} == {200}
    places = [gate.seen[seed] for seed, _ in wanted]
    greedy, modest = places[:40], places[40:]
    assert greedy == sorted(greedy) and modest == sorted(modest)
    assert max(modest) <= 10


# ── no cross-talk ──


def scene(seed: int) -> PIL.Image.Image:
    """A picture of soft colours."""
    numbers = np.random.default_rng(seed).integers(0, 255, (4, 4, 3), dtype=np.uint8)
    return PIL.Image.fromarray(numbers).resize((64, 64), PIL.Image.Resampling.BICUBIC)


def mixed(count: int) -> list[dict[str, Any]]:
    """Requests of which no two agree in prompt, seed, and what else is asked."""
    things = ("cat", "red car", "house", "tree", "fish", "apple", "dog", "star")
    found = []
    for i in range(count):
        fields: dict[str, Any] = {
            "prompt": f"a {things[i % 8]} {i}",
            "seed": 2000 + i,
            "steps": 1 + i % 3,
            "guidance_scale": 1.0 + i % 7,
        }
        if i % 4 == 1:
            fields["loras"] = [{"id": BLUEPRINT, "weight": 0.5 + 0.25 * (i % 3)}]
        if i % 4 == 2:
            fields |= {"image": packed(scene(i)), "strength": 0.4 + 0.1 * (i % 5)}
        if i % 8 == 6:
            mask = PIL.Image.new("L", (64, 64), 0)
            mask.paste(255, (0, 0, 32, 64))
            fields |= {"mask": packed(mask), "strength": 1.0}
        if i % 8 == 3:
            fields["control"] = packed(scene(i).convert("L").convert("RGB"))
        if i % 8 == 0:
            fields["width"] = 96
        found.append(fields)
    return found


def likeness(a: PIL.Image.Image, b: PIL.Image.Image) -> float:
    """PSNR in dB."""
    error = np.square(np.asarray(a, float) - np.asarray(b, float)).mean()
    return float("inf") if error == 0 else float(10 * np.log10(255**2 / error))


def picture(data: bytes) -> PIL.Image.Image:
    return unpacked(base64.b64encode(data).decode()).convert("RGB")


async def at_once(address: str, wanted: list[dict[str, Any]]) -> list[PIL.Image.Image]:
    """The pictures of requests that are sent at once, each over a connection of its own."""

    async def draw(client: httpx.AsyncClient, fields: dict[str, Any]) -> PIL.Image.Image:
        answer = await client.post("/v1/generate", json=fields, headers=HEADERS)
        assert answer.status_code == 200, answer.text
        return picture(answer.content)

    async with httpx.AsyncClient(base_url=address, timeout=60) as client:
        return list(await asyncio.gather(*(draw(client, fields) for fields in wanted)))


def test_each_of_32_clients_gets_the_picture_that_it_gets_alone(
    real: Served, worker: PipelineWorker
) -> None:
    """Case 15: of all tasks, with LoRAs and controls, at other steps, guidance and sizes."""
    assert EDGES in worker.facts.controls
    wanted = mixed(32)
    before = worker.load()
    together = asyncio.run(at_once(real.address, wanted))
    after = worker.load()
    assert (after.rows - before.rows) / (after.batches - before.batches) > 1.2  # calls were shared
    with httpx.Client(base_url=real.address, timeout=60) as client:
        for fields, found in zip(wanted, together, strict=True):
            alone = client.post("/v1/generate", json=fields, headers=HEADERS)
            assert likeness(found, picture(alone.content)) >= 50, fields["prompt"]
    assert likeness(together[7], together[15]) < 30  # the same thing by another number
