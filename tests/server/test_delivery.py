"""Promises of decoding: no step waits for it, and a checker of pictures harms no other order."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from server.asked import until

from fewstep.server import delivery
from fewstep.server.orders import Drawn, Limits, Order, ServerError, Stepped
from fewstep.server.slots import Slot
from fewstep.server.worker import PipelineWorker

SAFE: Callable[..., Any] = lambda inputs: [False] * len(inputs)  # noqa: E731


@pytest.fixture(params=[False, True], ids=["decodes between steps", "decodes beside them"])
def worker(sd_folder: Path, request: pytest.FixtureRequest) -> Iterator[PipelineWorker]:
    """One as it is on a CPU, and one as it is on a GPU."""
    found = PipelineWorker(str(sd_folder), Limits(seconds=60), max_batch=4, picture_bytes=0)
    found.start()
    assert found.wait_until_ready(60)
    assert found._work is not None
    assert not found._work.delivery.is_aside  # here is a CPU
    found._work.delivery.is_aside = request.param
    yield found
    found.drain(5)


def pipe_of(worker: PipelineWorker) -> Any:
    assert worker._work is not None
    return worker._work.loaded.pipe


def check_by(worker: PipelineWorker, checker: Callable[..., Any]) -> None:
    """Let a function flag the pictures of a worker."""
    pipe = pipe_of(worker)
    pipe.safety_checker = checker
    pipe.feature_extractor = lambda seen, return_tensors: SimpleNamespace(
        pixel_values=torch.tensor(np.stack([np.asarray(picture) for picture in seen]))
    )


def results(worker: PipelineWorker, *orders: Order) -> list[Any]:
    async def main() -> list[Any]:
        tickets = [worker.submit(order) for order in orders]
        found = (ticket.result() for ticket in tickets)
        return await asyncio.gather(*found, return_exceptions=True)

    return asyncio.run(asyncio.wait_for(main(), 60))


def code_of(result: Any) -> str:
    assert isinstance(result, ServerError)
    return result.code


def test_steps_go_on_while_a_picture_is_decoded(
    worker: PipelineWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert worker._work is not None
    if not worker._work.delivery.is_aside:
        pytest.skip("on a CPU the two would share cores")
    pipe, may_end = pipe_of(worker), threading.Event()
    decode = pipe.decode

    def slow(z: torch.Tensor) -> Any:
        assert may_end.wait(20)
        return decode(z)

    monkeypatch.setattr(pipe, "decode", slow)
    assert steps_taken_meanwhile(worker, may_end) == 3


def test_steps_go_on_while_a_picture_is_checked(worker: PipelineWorker) -> None:
    may_end = threading.Event()
    check_by(worker, lambda inputs: SAFE(inputs) if may_end.wait(20) else None)
    assert steps_taken_meanwhile(worker, may_end) == 3


def steps_taken_meanwhile(worker: PipelineWorker, may_end: threading.Event) -> int:
    """How many steps a picture takes while the one before it cannot be handed over."""

    async def main() -> int:
        first = worker.submit(Order("a cat", steps=1))
        second = worker.submit(Order("a dog", steps=3))
        told = 0
        async for event in second.events():
            told += isinstance(event, Stepped)
            if told == 3:
                break
        assert worker.load().drawn == 0
        may_end.set()
        await first.result()
        return told

    return asyncio.run(asyncio.wait_for(main(), 30))


def test_who_is_decoded_slowly_keeps_others_from_piling_up(
    worker: PipelineWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe, seen = pipe_of(worker), []
    decode = pipe.decode

    def slow(z: torch.Tensor) -> Any:
        assert worker._work is not None
        seen.append(len(worker._work.delivery))
        time.sleep(0.02)
        return decode(z)

    monkeypatch.setattr(pipe, "decode", slow)
    found = results(worker, *(Order("a cat", steps=1, seed=i, client=str(i)) for i in range(30)))
    assert all(isinstance(drawn, Drawn) for drawn in found)
    assert max(seen) <= 2 * 4  # those whose step ended together, and as many before


def test_a_flagged_picture_is_black_and_its_record_says_why(worker: PipelineWorker) -> None:
    check_by(worker, lambda inputs: [True] * len(inputs))
    (drawn,) = results(worker, Order("a cat", steps=1))
    assert np.asarray(drawn.image).max() == 0
    assert "safety checker" in drawn.record["warnings"][0]


@pytest.mark.parametrize("answer", [None, [], [False, False], ["no"], "no", {0: False}, 7], ids=str)
def test_a_checker_that_answers_nonsense_shows_no_picture(
    worker: PipelineWorker, answer: Any
) -> None:
    check_by(worker, lambda inputs: answer)
    (bad,) = results(worker, Order("a cat", steps=1))
    assert code_of(bad) == "internal"
    check_by(worker, SAFE)
    (good,) = results(worker, Order("a cat", steps=1))
    assert isinstance(good, Drawn)


def test_a_checker_that_raises_costs_that_picture_alone(worker: PipelineWorker) -> None:
    asked = iter((False, True, False))

    def checker(inputs: Any) -> list[bool]:
        if next(asked):
            raise RuntimeError("at /a/path")
        return SAFE(inputs)

    check_by(worker, checker)
    found = results(worker, *(Order("a cat", steps=1, seed=i) for i in range(3)))
    assert sum(isinstance(each, Drawn) for each in found) == 2
    (failed,) = (each for each in found if not isinstance(each, Drawn))
    assert code_of(failed) == "internal"
    assert "path" not in str(failed)


def test_a_checker_that_hangs_costs_its_order_its_time_and_no_other(
    worker: PipelineWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delivery, "STUCK", 0.0)
    never, hangs = threading.Event(), iter((True,))

    def checker(inputs: Any) -> list[bool]:
        if next(hangs, False):
            never.wait(30)
        return SAFE(inputs)

    check_by(worker, checker)
    try:
        (late,) = results(worker, Order("a cat", steps=1, seconds=0.5))
        assert code_of(late) == "timeout"
        (good,) = results(worker, Order("a dog", steps=2))
        assert isinstance(good, Drawn)
        load = worker.load()
        assert (load.drawn, load.failed, load.running) == (1, 1, 0)
    finally:
        never.set()


def test_a_hanging_checker_of_previews_does_not_stop_the_steps_of_others(
    worker: PipelineWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    never = threading.Event()
    check_by(worker, lambda inputs: SAFE(inputs) if never.wait(30) else None)

    async def main() -> int:
        seen = worker.submit(Order("a cat", steps=3, previews=True))
        plain = worker.submit(Order("a dog", steps=3))
        told = 0
        async for event in plain.events():
            told += isinstance(event, Stepped)
            if told == 3:
                break
        seen.cancel()
        never.set()
        return told

    assert asyncio.run(asyncio.wait_for(main(), 20)) == 3


def test_steps_are_told_in_order_though_only_some_of_them_are_seen(
    worker: PipelineWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert worker._work is not None
    delivery, told = worker._work.delivery, []
    previewer = delivery.decoder.previewer
    worker._work.previews = 2  # the first and the last but one
    see, tell = previewer.pictures, Slot.tell

    def late(z: torch.Tensor) -> Any:
        until(lambda: not (delivery.is_aside and len(worker._slots)))
        return see(z)

    def noted(self: Slot, step: Any, preview: Any = None) -> None:
        told.append(step.index)
        tell(self, step, preview)

    monkeypatch.setattr(previewer, "pictures", late)
    monkeypatch.setattr(Slot, "tell", noted)
    (drawn,) = results(worker, Order("a cat", steps=6, previews=True))
    assert isinstance(drawn, Drawn)
    assert told == list(range(6))


def test_previews_come_in_order_and_before_the_picture(worker: PipelineWorker) -> None:
    async def main() -> list[Any]:
        order = Order("a cat", steps=4, previews=True)
        return [event async for event in worker.submit(order).events()]

    told = asyncio.run(main())
    steps = [event.step for event in told if isinstance(event, Stepped)]
    assert steps == sorted(steps)
    assert isinstance(told[-1], Drawn)
