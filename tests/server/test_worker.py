"""Promises of the worker: who shares a step gets the picture that he gets alone, nobody waits for a
batch, whoever leaves frees his place, and one bad order harms no other."""

from __future__ import annotations

import asyncio
import gc
import io
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch

from fewstep import (
    EMBEDDED,
    CheckpointError,
    LatentConsistencyModelImg2ImgPipeline,
    LatentConsistencyModelPipeline,
    RequestError,
    StableDiffusionAdapterPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    T2IAdapter,
)
from fewstep.server import drawing
from fewstep.server.loaded import Loaded
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
from fewstep.server.tickets import Mail, Place, PlacedTicket
from fewstep.server.worker import PipelineWorker

LIMITS = Limits(waiting=64, waiting_per_client=64, seconds=120, previews=2)
BLUEPRINT, EDGES = "fewstep-emoji-blueprint", "fewstep-emoji-edges"
# How far a picture may be from the one that is drawn alone, of 255, when rows share a call.
FAR = 1

# ── workers, and pictures drawn without one ──


def started(model: Any = EMBEDDED, limits: Limits = LIMITS, **how: Any) -> PipelineWorker:
    worker = PipelineWorker(model, limits, **how)
    worker.start()
    assert worker.wait_until_ready(60)
    return worker


@pytest.fixture(scope="module")
def worker() -> Iterator[PipelineWorker]:
    found = started(loras=[BLUEPRINT], control=EDGES, picture_bytes=0)
    yield found
    found.drain(10)
    assert not found._thread.is_alive()


@pytest.fixture
def tiny(sd_folder: Path) -> Iterator[PipelineWorker]:
    """A random model with guidance by two rows, and with a cache of pictures."""
    found = started(str(sd_folder), replace(LIMITS, waiting=4, waiting_per_client=3), max_batch=2)
    yield found
    found.drain(10)


@pytest.fixture(scope="module")
def pipe() -> Any:
    return LatentConsistencyModelPipeline.from_pretrained(EMBEDDED)


@pytest.fixture(scope="module")
def alone(pipe: Any) -> Callable[[Order], np.ndarray]:
    """The picture of an order by the public pipelines, one at a time."""
    image = LatentConsistencyModelImg2ImgPipeline.from_pipe(pipe)
    inpaint = StableDiffusionInpaintPipeline.from_pipe(pipe)
    adapter = T2IAdapter.from_pretrained(EMBEDDED.parent / EDGES)
    steered = StableDiffusionAdapterPipeline.from_pipe(pipe, adapter=adapter)
    for each in (pipe, image, inpaint, steered):
        each.set_progress_bar_config(disable=True)

    def draw(order: Order) -> np.ndarray:
        arguments: dict[str, Any] = {
            "prompt": order.prompt,
            "num_inference_steps": order.steps,
            "guidance_scale": order.guidance_scale,
            "generator": torch.Generator().manual_seed(order.seed),
        }
        if order.mask is not None:
            more = {"image": order.image, "mask_image": order.mask, "paste_back": True}
            made = inpaint(**arguments, **more, strength=order.strength)
        elif order.image is not None:
            made = image(**arguments, image=order.image, strength=order.strength)
        elif order.control is not None:
            made = steered(**arguments, image=order.control)
        else:
            made = pipe(**arguments, width=order.width or 64, height=order.height or 64)
        return np.asarray(made.images[0])

    return draw


def scene(seed: int) -> PIL.Image.Image:
    """A picture of soft colours."""
    numbers = np.random.default_rng(seed).integers(0, 255, (4, 4, 3), dtype=np.uint8)
    return PIL.Image.fromarray(numbers).resize((64, 64), PIL.Image.Resampling.BICUBIC)


def half(seed: int) -> PIL.Image.Image:
    """A mask, white on one side."""
    mask = PIL.Image.new("L", (64, 64), 0)
    mask.paste(255, (0, 0, 32, 64) if seed % 2 else (0, 0, 64, 32))
    return mask


def mixed(count: int) -> list[Order]:
    """Orders of as many clients; no two ask for the same."""
    things = ("cat", "red car", "house", "tree", "fish", "apple", "dog", "star")
    orders = []
    for i in range(count):
        order = Order(
            f"a {things[i % 8]} {i}",
            seed=1000 + i,
            steps=1 + i % 4,
            guidance_scale=1.0 + (i % 7),
            client=f"client {i}",
        )
        if i % 4 == 2:
            order = replace(order, image=scene(i), strength=0.5 + 0.1 * (i % 5))
        if i % 4 == 3:
            order = replace(order, image=scene(i), mask=half(i), steps=3, strength=1.0)
        if i % 8 == 5:
            order = replace(order, width=96)  # shares no call with the others
        orders.append(order)
    return orders


def drawn(worker: PipelineWorker, orders: Sequence[Order]) -> list[Drawn]:
    """The pictures of orders that are sent at once."""

    async def main() -> list[Drawn]:
        tickets = [worker.submit(order) for order in orders]
        return await asyncio.gather(*(ticket.result() for ticket in tickets))

    return asyncio.run(asyncio.wait_for(main(), 100))


def events(worker: PipelineWorker, order: Order) -> list[Event]:
    async def main() -> list[Event]:
        return [event async for event in worker.submit(order).events()]

    return asyncio.run(asyncio.wait_for(main(), 100))


def error_of(worker: PipelineWorker, order: Order) -> ServerError:
    with pytest.raises(ServerError) as caught:
        drawn(worker, [order])
    return caught.value


def settles(worker: PipelineWorker) -> None:
    """Waits until nothing is under way."""
    until = time.monotonic() + 10
    while (load := worker.load()).waiting or load.running:
        assert time.monotonic() < until, load
        time.sleep(0.005)


def difference(a: Any, b: Any) -> int:
    """The largest of all pixels, of 255."""
    return int(np.abs(np.asarray(a).astype(int) - np.asarray(b).astype(int)).max())


# ── nothing is crossed ──


def test_each_of_32_clients_gets_the_picture_that_it_gets_alone(
    worker: PipelineWorker, alone: Callable[[Order], np.ndarray]
) -> None:
    orders = mixed(32)
    before = worker.load()
    pictures = drawn(worker, orders)
    after = worker.load()
    assert after.drawn - before.drawn == 32
    # Rows did share calls.
    assert (after.rows - before.rows) / (after.batches - before.batches) > 2
    for order, picture in zip(orders, pictures, strict=True):
        expected = alone(order)
        assert difference(picture.image, expected) <= FAR, order.prompt
        assert (picture.record["prompt"], picture.record["seed"]) == (order.prompt, order.seed)
    assert difference(pictures[0].image, pictures[8].image) > 50  # the same thing, another seed


def test_in_deterministic_mode_every_picture_is_the_one_that_is_drawn_alone_to_the_bit(
    alone: Callable[[Order], np.ndarray],
) -> None:
    orders = mixed(16)
    worker = started(deterministic=True)
    try:
        for order, picture in zip(orders, drawn(worker, orders), strict=True):
            assert np.array_equal(np.asarray(picture.image), alone(order)), order.prompt
        load = worker.load()
        assert load.rows == load.batches
    finally:
        worker.drain(10)


def test_guided_and_unguided_pictures_share_steps(tiny: PipelineWorker, sd_folder: Path) -> None:
    pipe = StableDiffusionPipeline.from_pretrained(sd_folder)
    pipe.set_progress_bar_config(disable=True)
    orders = [
        Order("a cat", negative_prompt="red", seed=1, steps=4, guidance_scale=6.0),
        Order("a dog", seed=2, steps=6, guidance_scale=1.0),
    ]
    pictures = drawn(tiny, orders)
    load = tiny.load()
    assert load.batches < load.rows == 10
    for order, picture in zip(orders, pictures, strict=True):
        how = {"negative_prompt": order.negative_prompt} if order.negative_prompt else {}
        expected = pipe(
            order.prompt,
            num_inference_steps=order.steps,
            guidance_scale=order.guidance_scale,
            generator=torch.Generator().manual_seed(order.seed),
            **how,
        ).images[0]
        assert difference(picture.image, expected) <= FAR
    unguided = pictures[1].record
    assert unguided["warnings"] == []
    told = drawn(tiny, [replace(orders[1], negative_prompt="red")])[0].record
    assert told["warnings"] == ["negative_prompt has no effect at this guidance"]


def test_pictures_with_a_lora_and_without_take_turns_and_are_those_drawn_alone(
    worker: PipelineWorker, pipe: Any, alone: Callable[[Order], np.ndarray]
) -> None:
    plain = [Order("a house", seed=i, steps=4, guidance_scale=4.0) for i in range(3)]
    blue = [
        replace(order, loras=((BLUEPRINT, 0.5 + 0.5 * (i % 2)),)) for i, order in enumerate(plain)
    ]
    pictures = drawn(worker, [*plain, *blue, *plain])
    for order, first, again in zip(plain, pictures[:3], pictures[6:], strict=True):
        assert difference(first.image, alone(order)) <= FAR
        assert difference(again.image, alone(order)) <= FAR
    try:
        pipe.load_lora_weights(EMBEDDED.parent / BLUEPRINT, adapter_name="blue")
        for order, picture in zip(blue, pictures[3:6], strict=True):
            pipe.set_adapters("blue", order.loras[0][1])
            expected = alone(order)
            assert difference(picture.image, expected) <= FAR
            named = {"name": BLUEPRINT, "source": BLUEPRINT}
            assert picture.record["loras"] == [{**named, "weight": order.loras[0][1]}]
    finally:
        pipe.unload_lora_weights()
    assert difference(pictures[3].image, pictures[0].image) > 50


def test_controls_steer_their_own_pictures_only(
    worker: PipelineWorker, alone: Callable[[Order], np.ndarray]
) -> None:
    box = PIL.Image.new("RGB", (64, 64))
    box.paste((255, 255, 255), (10, 10, 50, 12))
    orders = [
        Order("a red car", seed=3, steps=4, guidance_scale=4.0),
        Order("a red car", seed=3, steps=4, guidance_scale=4.0, control=box),
        Order("a house", seed=4, steps=2, guidance_scale=3.0, control=box.rotate(90)),
    ]
    for order, picture in zip(orders, drawn(worker, orders), strict=True):
        assert difference(picture.image, alone(order)) <= FAR


# ── events ──


def test_events_come_in_order_and_steps_bring_as_many_previews_as_are_allowed(
    worker: PipelineWorker,
) -> None:
    order = Order("a cat", seed=5, steps=6, previews=True)
    seen = events(worker, order)
    kinds = [type(event) for event in seen]
    # Kinds come in this order, one behind the other; the first may be over before it is read.
    turns = [
        kind for kind, before in zip(kinds, [None, *kinds], strict=False) if kind is not before
    ]
    assert turns in ([Queued, Started, Stepped, Drawn], [Started, Stepped, Drawn])
    steps = [event for event in seen if isinstance(event, Stepped)]
    assert [event.step for event in steps] == sorted({event.step for event in steps})
    assert {event.steps for event in steps} == {6}
    previews = [event.preview for event in steps if event.preview is not None]
    assert 1 <= len(previews) <= LIMITS.previews
    assert {preview.size for preview in previews} == {(64, 64)}
    final = seen[-1]
    assert isinstance(final, Drawn)
    # What is predicted late is nearly the picture.
    assert np.abs(np.asarray(previews[-1], float) - np.asarray(final.image, float)).mean() < 30
    assert final.seconds > 0 <= final.waited
    unasked = [e for e in events(worker, replace(order, previews=False)) if isinstance(e, Stepped)]
    assert all(event.preview is None for event in unasked)


def test_a_reader_who_comes_late_finds_the_newest_step_and_the_end(worker: PipelineWorker) -> None:
    async def main() -> list[Event]:
        ticket = worker.submit(Order("a cat", seed=6, steps=8))
        while worker.load().running or worker.load().waiting:
            await asyncio.sleep(0.005)
        return [event async for event in ticket.events()]

    seen = asyncio.run(main())
    assert [type(event) for event in seen] == [Started, Stepped, Drawn]
    assert isinstance(seen[1], Stepped)
    assert (seen[1].step, seen[1].steps) == (8, 8)


def test_the_record_draws_the_picture_again_and_names_no_folder(
    worker: PipelineWorker, alone: Callable[[Order], np.ndarray]
) -> None:
    asked = Order("a tree", seed=2**64 - 1, negative_prompt="red", image=scene(1))
    picture = drawn(worker, [asked])[0]
    record = picture.record
    assert record["model"] == "fewstep-emoji"
    assert record["task"] == "image"
    assert str(EMBEDDED.parent) not in str(record)
    assert str(EMBEDDED.parent) not in str(picture.image.info)
    again = Order(
        record["prompt"],
        seed=record["seed"],
        steps=record["steps"],
        guidance_scale=record["guidance_scale"],
        image=asked.image,
        strength=record["strength"],
    )
    assert difference(alone(again), picture.image) <= FAR


# ── the line ──


def test_an_order_joins_at_the_next_step_and_may_end_before_one_that_came_earlier(
    worker: PipelineWorker,
) -> None:
    async def main() -> list[str]:
        ended: list[str] = []

        async def wait(name: str, order: Order) -> None:
            await worker.submit(order).result()
            ended.append(name)

        long = asyncio.create_task(wait("long", Order("a cat", seed=7, steps=40)))
        while not worker.load().running:
            await asyncio.sleep(0.002)
        await wait("short", Order("a dog", seed=8, steps=1))
        await long
        return ended

    assert asyncio.run(main()) == ["short", "long"]


def test_clients_are_served_in_turn_and_those_behind_know_how_many_are_before_them(
    tiny: PipelineWorker,
) -> None:
    ended: list[str] = []

    async def main() -> list[Event]:
        async def wait(ticket: Any, name: str) -> list[Event]:
            seen = [event async for event in ticket.events()]
            ended.append(name)
            return seen

        greedy = [tiny.submit(Order("a cat", seed=i, steps=30, client="greedy")) for i in range(2)]
        while tiny.load().waiting:
            await asyncio.sleep(0.002)
        greedy += [tiny.submit(Order("a", seed=i, steps=30, client="greedy")) for i in (3, 4, 5)]
        modest = tiny.submit(Order("a dog", steps=30, client="modest"))
        found = await asyncio.gather(
            *(wait(ticket, "greedy") for ticket in greedy), wait(modest, "modest")
        )
        return found[-1]

    seen = asyncio.run(main())
    assert seen[0] == Queued(1)
    assert ended.index("modest") <= 3
    assert ended.count("greedy") == 5


def test_a_full_line_refuses_and_says_when_to_come_again(tiny: PipelineWorker) -> None:
    async def main() -> None:
        tickets = [tiny.submit(Order("a cat", seed=i, steps=50, client="a")) for i in range(2)]
        while tiny.load().waiting:
            await asyncio.sleep(0.002)
        tickets += [tiny.submit(Order("a", seed=i, steps=50, client="a")) for i in range(3)]
        with pytest.raises(QueueFull, match="too many") as own:
            tiny.submit(Order("a", client="a"))
        assert own.value.retry_after >= 1
        tickets.append(tiny.submit(Order("b", client="b")))
        with pytest.raises(QueueFull):
            tiny.submit(Order("c", client="c"))
        assert tiny.load().waiting == 4
        for ticket in tickets:
            ticket.cancel()

    asyncio.run(main())
    settles(tiny)
    assert drawn(tiny, [Order("c", client="c")])


def test_an_equal_order_gets_the_picture_that_is_kept_and_any_other_a_new_one(
    tiny: PipelineWorker,
) -> None:
    order = Order("a cat", seed=1, steps=2, client="a")
    (first,) = drawn(tiny, [order])
    batches = tiny.load().batches
    again, other = drawn(tiny, [replace(order, client="b"), replace(order, seed=2)])
    assert again.cached
    assert not first.cached
    assert not other.cached
    assert difference(first.image, again.image) == 0
    assert again.record == first.record
    assert tiny.load().batches == batches + 2
    again.image.paste("red", (0, 0, 9, 9))  # it is the client's own
    assert difference(drawn(tiny, [order])[0].image, first.image) == 0


def test_a_text_and_a_picture_are_encoded_once(worker: PipelineWorker) -> None:
    order = Order("something that nobody asked for yet", steps=1, image=scene(77))
    drawn(worker, [order])
    texts, latents = worker._texts.hits, worker._latents.hits
    missed = worker._texts.misses, worker._latents.misses
    drawn(worker, [replace(order, seed=9), replace(order, seed=10, guidance_scale=2.0)])
    assert (worker._texts.hits - texts, worker._latents.hits - latents) == (2, 2)
    assert (worker._texts.misses, worker._latents.misses) == missed
    blue = replace(order, loras=((BLUEPRINT, 1.0),))
    drawn(worker, [blue])
    assert worker._texts.misses == missed[0] + 1  # a LoRA may change what a text is


# ── giving up ──


def test_fifty_orders_given_up_at_any_time_leave_nothing_behind(worker: PipelineWorker) -> None:
    before = worker.load()

    async def main() -> None:
        async def leave(i: int) -> None:
            ticket = worker.submit(Order("a cat", seed=i, steps=50, client=str(i % 5)))
            await asyncio.sleep(0.004 * i)
            if i % 3 == 0:
                ticket.cancel()
                with pytest.raises(ServerError) as error:
                    await ticket.result()
                assert error.value.code == "cancelled"
            elif i % 3 == 1:
                async for _ in ticket.events():
                    break  # the reader leaves
            else:
                reading = asyncio.create_task(ticket.result())
                await asyncio.sleep(0.01)
                reading.cancel()  # as when a connection is lost

        await asyncio.gather(*(leave(i) for i in range(50)))

    asyncio.run(main())
    settles(worker)
    after = worker.load()
    assert after.cancelled - before.cancelled == 50
    assert after.drawn == before.drawn
    assert drawn(worker, [Order("a dog", seed=1, steps=1)])


def test_a_place_is_free_within_a_step_of_giving_up(worker: PipelineWorker) -> None:
    async def main() -> int:
        ticket = worker.submit(Order("a cat", seed=11, steps=50))
        reader = ticket.events()
        async for event in reader:
            if isinstance(event, Stepped):
                break
        batches = worker.load().batches
        ticket.cancel()
        while worker.load().running:
            await asyncio.sleep(0.001)
        return worker.load().batches - batches

    # The step that was under way, and one that may have begun before the count was read.
    assert asyncio.run(main()) <= 2


def test_an_order_whose_ticket_is_let_go_of_is_given_up(worker: PipelineWorker) -> None:
    before = worker.load().cancelled
    worker.submit(Order("a cat", seed=12, steps=50))
    gc.collect()
    settles(worker)
    assert worker.load().cancelled == before + 1


def test_what_takes_longer_than_its_time_fails_and_the_next_is_drawn(
    worker: PipelineWorker,
) -> None:
    error = error_of(worker, Order("a cat", steps=50, seconds=0.05))
    assert error.code == "timeout"
    assert "0.05 s" in str(error)
    assert drawn(worker, [Order("a cat", steps=1)])


# ── one bad order ──

Outputs = Callable[..., list[torch.Tensor]]


def failing(
    monkeypatch: pytest.MonkeyPatch, fails: Callable[[list[int]], bool], error: Any
) -> None:
    """Let calls of the network fail, by the seeds of their rows."""
    answers: Outputs = drawing.answers

    def called(unet: Any, runs: Sequence[Any]) -> list[torch.Tensor]:
        if fails([run.job.generator.initial_seed() for run in runs]):
            raise error
        return answers(unet, runs)

    monkeypatch.setattr(drawing, "answers", called)


@pytest.mark.parametrize("error", [RuntimeError("CUDA out of memory. Tried"), MemoryError()])
def test_without_memory_for_a_batch_its_rows_go_alone(
    worker: PipelineWorker,
    alone: Callable[[Order], np.ndarray],
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
) -> None:
    failing(monkeypatch, lambda seeds: len(seeds) > 1, error)
    orders = [Order("a fish", seed=i, steps=2, guidance_scale=4.0) for i in range(4)]
    for order, picture in zip(orders, drawn(worker, orders), strict=True):
        assert difference(picture.image, alone(order)) <= FAR


def test_only_the_picture_that_lacks_memory_alone_fails(
    worker: PipelineWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(
        monkeypatch,
        lambda seeds: 666 in seeds,
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes"),
    )

    async def main() -> list[Any]:
        orders = [Order("a fish", seed=seed, steps=2) for seed in (1, 666, 3)]
        tickets = [worker.submit(order) for order in orders]
        results = (ticket.result() for ticket in tickets)
        return await asyncio.gather(*results, return_exceptions=True)

    first, bad, third = asyncio.run(main())
    assert isinstance(first, Drawn)
    assert isinstance(third, Drawn)
    assert isinstance(bad, ServerError)
    assert bad.code == "insufficient_memory"
    assert "99" not in str(bad)


@pytest.mark.parametrize("stage", ["begin", "record"])
def test_what_breaks_in_one_order_is_told_without_a_detail_and_harms_no_other(
    worker: PipelineWorker, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    assert worker._work is not None
    loaded = worker._work.loaded
    usual = getattr(type(loaded), stage)

    def broken(self: Any, order: Order, *args: Any) -> Any:
        if order.seed == 666:
            raise KeyError("/secret/place")
        return usual(self, order, *args)

    monkeypatch.setattr(type(loaded), stage, broken)

    async def main() -> list[Any]:
        tickets = [worker.submit(Order("a fish", seed=seed, steps=2)) for seed in (1, 666, 3)]
        results = (ticket.result() for ticket in tickets)
        return await asyncio.gather(*results, return_exceptions=True)

    first, bad, third = asyncio.run(main())
    assert isinstance(first, Drawn)
    assert isinstance(third, Drawn)
    assert isinstance(bad, ServerError)
    assert bad.code == "internal"
    assert "secret" not in str(bad)
    settles(worker)


def test_loras_whose_merge_broke_off_leave_nothing_in_the_pictures_of_others(
    worker: PipelineWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert worker._work is not None
    kind, plain = type(worker._work.loaded.pipe), Order("a house", seed=5, steps=1)
    merge, is_bad = kind.set_adapters, iter((True,))

    def breaks_off(self: Any, *args: Any) -> None:
        merge(self, *args)
        if next(is_bad, False):
            raise RuntimeError("out of memory")

    before = drawn(worker, [plain])[0]
    monkeypatch.setattr(kind, "set_adapters", breaks_off)
    bad = error_of(worker, replace(plain, loras=((BLUEPRINT, 1.0),)))
    assert bad.code == "insufficient_memory"
    assert difference(drawn(worker, [plain])[0].image, before.image) <= FAR


def test_loras_that_cannot_be_merged_end_their_own_orders_alone(
    worker: PipelineWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert worker._work is not None

    def breaks(loras: Any) -> bool:
        if loras:
            raise MemoryError
        return False

    monkeypatch.setattr(Loaded, "merge", lambda self, loras: breaks(loras))
    with_lora = replace(Order("a house", steps=8), loras=((BLUEPRINT, 0.4),))

    async def main() -> list[Any]:
        tickets = [worker.submit(order) for order in (Order("a cat", steps=8), with_lora)]
        found = (ticket.result() for ticket in tickets)
        return await asyncio.gather(*found, return_exceptions=True)

    plain, bad = asyncio.run(asyncio.wait_for(main(), 60))
    assert isinstance(plain, Drawn)
    assert isinstance(bad, ServerError) and bad.code == "insufficient_memory"


def test_more_time_than_there_is_is_refused(worker: PipelineWorker) -> None:
    with pytest.raises(ServerError, match="from 0 to 120") as error:
        worker.submit(Order("a cat", seconds=121.0))
    assert error.value.param == "seconds"


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ({"loras": ["no.safetensors"]}, "--lora no.safetensors: "),
        ({"loras": [("a", BLUEPRINT), ("a", "b.safetensors")]}, "--lora b.*'a' is taken.*NAME="),
        ({"control": "nothing"}, "--control nothing: "),
        ({"control": BLUEPRINT}, f"--control {BLUEPRINT}: "),
    ],
)
def test_what_cannot_be_added_is_named(how: dict[str, Any], says: str) -> None:
    worker = PipelineWorker(EMBEDDED, LIMITS, **how)
    worker.start()
    with pytest.raises(RequestError, match=says):
        worker.wait_until_ready(60)


@pytest.mark.parametrize("stage", ["queue", "prepare", "step", "preview", "decode", "picture"])
def test_an_observer_that_raises_costs_no_picture(tiny: PipelineWorker, stage: str) -> None:
    def observe(seen: str, seconds: float) -> None:
        if seen == stage:
            raise RuntimeError("no room for a figure")

    tiny.observe = observe
    assert drawn(tiny, [Order("a cat", steps=3, previews=True)])
    assert tiny.failure is None


def test_without_memory_for_a_kept_picture_its_order_fails_and_the_next_is_drawn(
    tiny: PipelineWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Heavy(PIL.Image.Image):
        def copy(self) -> Any:
            raise MemoryError

    kept = {0: Drawn(Heavy(), {}, 0.0, 0.0)}
    monkeypatch.setattr(tiny._pictures, "get", lambda key: kept.pop(0, None))
    assert error_of(tiny, Order("a cat", steps=1)).code == "insufficient_memory"
    assert drawn(tiny, [Order("a cat", steps=1)])
    assert (tiny.load().drawn, tiny.load().failed) == (1, 1)


def test_an_end_that_comes_between_two_looks_is_read() -> None:
    class Meanwhile(Mail):
        """Another thread hands over just behind the first look."""

        def take(self) -> Event | None:
            found = super().take()
            self.put(Drawn(scene(1), {}, 0.0, 0.0))
            return found

    async def read() -> list[Event]:
        return [event async for event in PlacedTicket(Place(Order("a"), Meanwhile())).events()]

    assert [type(event) for event in asyncio.run(read())] == [Drawn]


def test_a_reader_whose_loop_is_closed_harms_nobody(worker: PipelineWorker) -> None:
    async def leave() -> Any:
        ticket = worker.submit(Order("a cat", seed=13, steps=30))
        waiting = asyncio.ensure_future(anext(ticket.events()))
        await asyncio.sleep(0)
        return ticket, waiting

    loop = asyncio.new_event_loop()
    ticket, waiting = loop.run_until_complete(leave())
    waiting.cancel()
    loop.run_until_complete(asyncio.gather(waiting, return_exceptions=True))
    loop.close()
    assert drawn(worker, [Order("a dog", steps=1, seed=3)])
    del ticket


def test_a_picture_is_read_before_its_file_may_be_closed(
    worker: PipelineWorker, tmp_path: Path
) -> None:
    scene(1).save(tmp_path / "scene.png")

    async def send() -> Drawn:
        with PIL.Image.open(tmp_path / "scene.png") as picture:
            ticket = worker.submit(Order("a cat", image=picture, steps=1))
        return await ticket.result()

    assert isinstance(asyncio.run(send()), Drawn)
    data = (tmp_path / "scene.png").read_bytes()
    broken = PIL.Image.open(io.BytesIO(data[: len(data) // 2]))
    with pytest.raises(ServerError, match="image cannot be read") as error:
        worker.submit(Order("a cat", image=broken))
    assert error.value.param == "image"


@pytest.mark.parametrize(
    ("order", "param"),
    [
        (Order("a", loras=(("nobody", 1.0),)), "loras"),
        (Order("a", loras=((BLUEPRINT, 1.0), (BLUEPRINT, 0.5))), "loras"),
        (Order("a", image=scene(1), mask=half(1).resize((32, 32))), "mask"),
        (Order("a", image=scene(1), control=scene(2)), "control"),
        (Order("a", steps=51), "steps"),
        (Order("a", width=4096), "width"),
    ],
    ids=["unknown", "twice", "mask", "task", "steps", "size"],
)
def test_what_the_model_cannot_draw_is_refused_before_it_waits(
    worker: PipelineWorker, order: Order, param: str
) -> None:
    with pytest.raises(ServerError) as refused:
        worker.submit(order)
    assert (refused.value.code, refused.value.param) == ("invalid_request", param)


def test_a_strength_that_leaves_no_step_takes_one(tiny: PipelineWorker, worker: Any) -> None:
    for each in (tiny, worker):
        order = Order("a cat", image=scene(1), steps=3, strength=0.0)
        picture = drawn(each, [order])[0]
        assert len(picture.record["timesteps"]) == 1


def test_a_text_that_is_cut_off_is_drawn_and_the_record_says_so(worker: PipelineWorker) -> None:
    for seed in (1, 2):  # its embedding is kept, and so is what is said of it
        (warning,) = drawn(worker, [Order("word " * 500, seed=seed, steps=1)])[0].record["warnings"]
        assert "cut off" in warning


# ── beginning and end ──


def test_facts_are_those_of_the_model(worker: PipelineWorker, tiny: PipelineWorker) -> None:
    facts = worker.facts
    assert (facts.id, facts.family) == ("fewstep-emoji", "LatentConsistencyModel")
    assert (facts.native_size, facts.steps, facts.guidance[2]) == ((64, 64), (1, 16, 4), 4.0)
    assert facts.tasks == ("text", "image", "inpaint")
    assert (facts.loras, facts.controls) == (((BLUEPRINT, BLUEPRINT),), (EDGES,))
    assert (tiny.facts.id, tiny.facts.family) == ("stable-diffusion", "StableDiffusion")


def test_before_it_is_loaded_a_worker_takes_nothing_and_says_so() -> None:
    worker = PipelineWorker(EMBEDDED, LIMITS)
    assert not worker.is_ready
    for ask in (lambda: worker.submit(Order("a")), lambda: worker.facts):
        with pytest.raises(ServerError, match="still loading") as error:
            ask()
        assert error.value.code == "not_ready"


def test_a_model_that_cannot_be_loaded_is_told_to_who_waits_for_it(tmp_path: Path) -> None:
    worker = PipelineWorker(str(tmp_path / "nothing"), LIMITS)
    worker.start()
    with pytest.raises(CheckpointError, match="nothing"):
        worker.wait_until_ready(20)
    assert not worker.is_ready
    worker.drain(5)


def test_a_worker_whose_thread_breaks_says_so_and_holds_up_nobody(sd_folder: Path) -> None:
    worker = started(str(sd_folder))

    def breaks() -> None:
        raise SystemExit

    assert worker._work is not None
    worker._work.turn = breaks  # type: ignore[method-assign]
    assert error_of(worker, Order("a cat")).code == "not_ready"
    worker._thread.join(10)
    assert not worker.is_ready
    assert isinstance(worker.failure, SystemExit)


def test_draining_refuses_finishes_and_ends(sd_folder: Path) -> None:
    worker = started(str(sd_folder))

    async def main() -> list[Any]:
        tickets = [worker.submit(Order("a cat", seed=i, steps=8)) for i in range(12)]
        draining = threading.Thread(target=worker.drain, args=(30,))
        draining.start()
        while worker.is_ready:
            await asyncio.sleep(0.001)
        with pytest.raises(ServerError, match="shutting down"):
            worker.submit(Order("late"))
        found = await asyncio.gather(*(ticket.result() for ticket in tickets))
        draining.join()
        return found

    assert len(asyncio.run(main())) == 12
    assert not worker._thread.is_alive()


def test_draining_ends_in_its_time_and_tells_those_who_are_left(sd_folder: Path) -> None:
    worker = started(str(sd_folder), max_batch=2)

    async def main() -> list[Any]:
        tickets = [worker.submit(Order("a cat", seed=i, steps=50)) for i in range(12)]
        await asyncio.to_thread(worker.drain, 0.05)
        results = (ticket.result() for ticket in tickets)
        return await asyncio.gather(*results, return_exceptions=True)

    found = asyncio.run(main())
    assert {type(each) for each in found} <= {Drawn, ServerError}
    left = [each for each in found if isinstance(each, ServerError)]
    assert left
    assert {each.code for each in left} == {"not_ready"}
    assert not worker._thread.is_alive()


def test_200_pictures_later_no_more_memory_is_held(sd_folder: Path) -> None:
    worker = started(str(sd_folder), picture_bytes=1 << 16, text_bytes=1 << 16)

    def draw(start: int, count: int) -> None:
        orders = [Order(f"a cat {i}", seed=i, steps=1) for i in range(start, start + count)]
        drawn(worker, orders[: count // 2])
        drawn(worker, orders[count // 2 :])

    try:
        draw(0, 60)
        before = resident()
        for part in range(2):
            draw(100 * (part + 1), 100)
        assert resident() - before < 8 << 20
        assert worker._pictures.size <= 1 << 16
        assert worker._texts.size <= 1 << 16
    finally:
        worker.drain(5)


def resident() -> int:
    """Bytes of this process in memory."""
    gc.collect()
    with open("/proc/self/statm", encoding="ascii") as stream:
        return int(stream.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_failed_orders_end_with_an_event(worker: PipelineWorker) -> None:
    last = events(worker, Order("a cat", steps=50, seconds=0.03))[-1]
    assert isinstance(last, Failed)
    assert last.error.code == "timeout"
