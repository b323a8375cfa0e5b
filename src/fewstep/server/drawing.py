"""The pictures under way on a device: prepared, and a step of many at a time."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from ..pipelines.denoise import Step
from .batching import answers
from .caches import Cache, digest
from .counts import Counts
from .decoding import Item, Observe
from .delivery import Delivery
from .loaded import Loaded, Loras
from .orders import Drawn, Order, Started
from .previews import shown_steps
from .slots import Slot, Slots
from .tickets import Place
from .troubles import cleared, fail, is_out_of_memory, told

log = logging.getLogger(__name__)


@dataclass(eq=False)
class Drawing:
    """The work on the slots. For the worker's thread."""

    loaded: Loaded
    delivery: Delivery
    slots: Slots
    pictures: Cache[Drawn]
    counts: Counts
    observe: Observe
    previews: int = 8  # of one picture
    _is_short: bool = False  # of memory

    def take(self, place: Place) -> None:
        """Lets an order out of the line join, or hands over the picture that an equal one got."""
        waited = time.monotonic() - place.submitted
        self.observe("queue", waited)
        try:
            key = key_of(place.order)
            known = self.pictures.get(key)
            drawn = known and replace(known, image=known.image.copy(), waited=waited, cached=True)
        except Exception as error:  # a picture that cannot be read, or no memory for one
            self.fail(Slot(place, None), error)
            return
        if drawn is None:
            self.slots.add(Slot(place, key, waited))
            return
        self.counts.a_picture_more(was_kept=True)
        place.mail.put(Started(waited))
        place.mail.put(drawn)

    def turn(self) -> None:
        """Prepare, a step. A mistake of ours ends those under way, and no more."""
        begin = time.perf_counter()
        if self._is_short:
            cleared()
            self._is_short = False
        try:
            self._turn()
        except Exception as error:
            log.exception("a turn failed")
            for slot in self.slots.all():
                self.fail(slot, error)
        self.counts.a_turn_more(time.perf_counter() - begin)

    def _turn(self) -> None:
        loras = self.slots.next_loras()
        if loras is not None:
            if not self._merge(loras):
                return
            self._prepare_some(loras)
            begin = time.perf_counter()
            if group := self.slots.next_group(loras):
                self._step(group)
            self.slots.spent += time.perf_counter() - begin

    def _merge(self, loras: Loras) -> bool:
        """Make a set of LoRAs the active one; if that fails, so do those who want it."""
        begin = time.perf_counter()
        try:
            was_other = self.loaded.merge(loras)
        except Exception as error:
            for slot in self.slots.all():
                if slot.loras == loras:
                    self.fail(slot, error)
            return False
        if was_other:
            self.slots.merging = time.perf_counter() - begin
            self.observe("merge", self.slots.merging)
        return True

    # ── text and pictures to tensors ──

    def _prepare_some(self, loras: Loras) -> None:
        """Prepares those who joined, for about the time of a step while others run."""
        begin, others_wait = time.perf_counter(), bool(self.slots.runs(loras))
        for slot in self.slots.unprepared(loras):
            try:
                self.prepare(slot)
            except Exception as error:
                self.fail(slot, error)
            spent = time.perf_counter() - begin
            if others_wait and spent > (self.counts.step_seconds or 0.0):
                break

    def prepare(self, slot: Slot) -> None:
        """Text and pictures to tensors."""
        begin = time.perf_counter()
        slot.start(self.loaded.begin(slot.place.order))
        self.observe("prepare", time.perf_counter() - begin)

    # ── steps ──

    def _step(self, group: list[Slot]) -> None:
        """A step of some pictures, by one call of the network."""
        for slot in group:
            if slot.begun is None:
                slot.begun = time.monotonic()
                slot.place.mail.put(Started(slot.waited))
        begin = time.perf_counter()
        outputs = self._outputs(group)
        steps: list[tuple[Slot, Step]] = []
        for slot, output in zip(group, outputs, strict=True):
            try:
                if isinstance(output, Exception):
                    raise output
                assert slot.run is not None
                steps.append((slot, slot.run.advance(output)))
            except Exception as error:
                self.fail(slot, error)
        seconds = time.perf_counter() - begin
        self.counts.a_step_more(len(group), seconds)
        self.observe("step", seconds)
        self._tell(steps)

    def _outputs(self, group: list[Slot]) -> list[Tensor] | list[Tensor | Exception]:
        """The network's answers. If they cannot be had at once, each alone: only some may fail."""
        unet = self.loaded.pipe.unet
        try:
            return answers(unet, [slot.running for slot in group])
        except Exception as error:
            log.warning("a batch of %d failed: %s", len(group), told(error).code)
        cleared()  # not in the block above, where the error still holds its tensors
        found: list[Tensor | Exception] = []
        for slot in group:
            try:
                found += answers(unet, [slot.running])
            except Exception as error:
                found.append(error.with_traceback(None))
                cleared()
        return found

    def _tell(self, steps: Sequence[tuple[Slot, Step]]) -> None:
        """Says that steps are done; what is to be seen of them goes to be decoded."""
        items: list[Item] = []
        for slot, step in steps:
            if slot.is_shown:
                is_seen = step.index + 1 in shown_steps(slot.steps, self.previews)
                items.append(Item(slot, step.z0, step, is_decoded=not is_seen))
            else:
                slot.tell(step)
            if slot.running.is_done:
                self.slots.remove(slot)
                items.append(Item(slot, slot.running.z))
        if items:
            self.delivery.put(items)

    def fail(self, slot: Slot, error: Exception) -> None:
        """Ends one order by an error."""
        self._is_short |= is_out_of_memory(error)
        self.slots.remove(slot)
        fail(slot.place, error, self.counts)


def key_of(order: Order) -> tuple[Any, ...]:
    """All that decides a settled order's picture."""
    pictures = tuple(map(digest, (order.image, order.mask, order.control)))
    control = None if order.control is None else order.control_scale
    return (
        *(order.prompt, order.negative_prompt, order.seed, order.steps, order.guidance_scale),
        *(order.width, order.height, order.strength, control, order.loras, *pictures),
    )
