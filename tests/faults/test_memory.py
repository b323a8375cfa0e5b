"""Case 16: where memory runs out, one picture fails, and it is counted."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import httpx
import pytest
from faults.wires import drawn, figures
from server.asked import Served, error_of

from fewstep.server import drawing
from fewstep.server.loaded import Loaded
from fewstep.server.orders import Order
from fewstep.server.worker import PipelineWorker

BAD = 666
CPU = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes")
CUDA = RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB at 0x7f00")
COUNTED = 'fewstep_pictures_failed_total{code="insufficient_memory"}'
Breaks = Callable[[pytest.MonkeyPatch, PipelineWorker, Exception], None]


def seed_of(run: Any) -> int:
    return int(run.job.generator.initial_seed())


def in_a_step(monkeypatch: pytest.MonkeyPatch, worker: PipelineWorker, error: Exception) -> None:
    """The network's call fails with the bad one in it, from its second step."""
    usual = drawing.answers

    def answers(unet: Any, runs: Sequence[Any]) -> Any:
        if any(seed_of(run) == BAD and run.index > 0 for run in runs):
            raise error
        return usual(unet, runs)

    monkeypatch.setattr(drawing, "answers", answers)


def in_the_text(monkeypatch: pytest.MonkeyPatch, worker: PipelineWorker, error: Exception) -> None:
    """What is done before the first step."""
    usual = Loaded.begin

    def begin(self: Loaded, order: Order) -> Any:
        if order.seed == BAD:
            raise error
        return usual(self, order)

    monkeypatch.setattr(Loaded, "begin", begin)


def at_the_end(monkeypatch: pytest.MonkeyPatch, worker: PipelineWorker, error: Exception) -> None:
    """Decoding fails, first of all that are decoded together, and then of one of them."""
    assert worker._work is not None
    pipe = worker._work.loaded.pipe
    usual, left = pipe.decode, [error, error]

    def decode(z: Any) -> Any:
        if left:
            raise left.pop()
        return usual(z)

    monkeypatch.setattr(pipe, "decode", decode)


async def answers_of(address: str) -> list[httpx.Response]:
    """Of four who ask at once, one of whom asks for too much."""

    async def ask(client: httpx.AsyncClient, seed: int) -> httpx.Response:
        fields = {"prompt": "a fish", "seed": seed, "steps": 3}
        return await client.post("/v1/generate", json=fields, headers={"Accept": "image/png"})

    async with httpx.AsyncClient(base_url=address, timeout=60) as client:
        return list(await asyncio.gather(*(ask(client, seed) for seed in (1, BAD, 3, 4))))


@pytest.mark.parametrize("error", [CPU, CUDA, MemoryError()], ids=["CPU", "CUDA", "Python"])
@pytest.mark.parametrize("breaks", [in_a_step, in_the_text, at_the_end])
def test_one_picture_without_memory_fails_and_the_others_do_not(
    real: Served,
    worker: PipelineWorker,
    monkeypatch: pytest.MonkeyPatch,
    breaks: Breaks,
    error: Exception,
) -> None:
    """Case 16: at any stage; it is told without a detail, and the next picture is drawn."""
    before = figures(real).get(COUNTED, 0)
    with monkeypatch.context() as broken:
        breaks(broken, worker, error)
        found = asyncio.run(answers_of(real.address))
    failed = [answer for answer in found if answer.status_code != 200]
    assert len(failed) == 1
    assert breaks is at_the_end or failed == [found[1]]
    told = error_of(failed[0], 503)
    assert told["code"] == "insufficient_memory" and told["hint"]
    assert "99" not in told["message"] and "0x" not in told["message"]
    assert figures(real)[COUNTED] == before + 1
    data, _ = drawn(real, prompt="a fish", seed=BAD, steps=3)
    assert data
