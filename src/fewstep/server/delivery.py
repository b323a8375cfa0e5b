"""What comes behind a step: pictures checked, recorded and handed over, beside the next steps."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import PIL.Image
import torch

from ..pipelines.safety import blackened, flagged
from .caches import Cache
from .counts import Counts
from .decoding import Decoder, Item
from .loaded import warned
from .orders import Drawn, ServerError
from .slots import Slot
from .troubles import fail, let_go

log = logging.getLogger(__name__)

LOOKING = 30.0  # seconds for the checker to look at a picture
STUCK = 10.0  # the same where the order's time is over
LAST = 2.0  # seconds that it is waited for at the end
BLACK = "the safety checker flagged the picture, which is black now; try another prompt or seed"


@dataclass(eq=False)
class Delivery:
    """A thread that hands over what was asked to be seen, in the order in which steps were done.

    `is_aside`: it decodes, too, while the next step is taken. That is for a GPU: on a CPU the two
    would share cores, and their threads wait for each other.

    A checker of pictures that hangs costs the one that it looks at, and no other: once its time is
    over another thread takes the place of the stuck one.
    """

    decoder: Decoder
    pictures: Cache[Drawn]
    counts: Counts
    changed: Callable[[], None]  # called whenever something was handed over
    is_aside: bool
    _waiting: list[Item] = field(default_factory=list)
    _current: list[Item] = field(default_factory=list)
    _since: float = math.inf  # when the first of the current ones was begun to be handed over
    _thread: threading.Thread | None = None
    _lock: threading.Condition = field(default_factory=threading.Condition)

    def __len__(self) -> int:
        """How many runs that have ended are not handed over."""
        with self._lock:
            return sum(item.step is None for item in self._waiting + self._current)

    def put(self, items: Sequence[Item]) -> None:
        """Hand these over behind all others."""
        if not self.is_aside:
            self.decoder.decode_all(items)
        with self._lock:
            self._waiting += items
            if self._thread is None:
                self._begin()
            self._lock.notify_all()

    def leave(self) -> None:
        """Drop those who gave up or are late; another thread takes the place of a stuck one."""
        with self._lock:
            self._waiting = [item for item in self._waiting if not self._is_gone(item)]
            are_late = all(item.slot.place.is_late for item in self._current)
            seconds = time.monotonic() - self._since
            if self._current and seconds > (STUCK if are_late else LOOKING):
                log.error("the check of a picture hangs; it is given up")
                stuck, *others = self._current
                if stuck.step is not None:
                    stuck.slot.tell(stuck.step)
                elif not self._is_gone(stuck):
                    error = ServerError("internal", "the picture could not be checked")
                    fail(stuck.slot.place, error, self.counts)
                self._waiting = others + self._waiting
                self._begin()

    def end(self, error: Exception) -> None:
        """Fail all that is left, and let the thread end."""
        with self._lock:
            for place in {item.slot.place for item in self._waiting + self._current}:
                fail(place, error, self.counts)
            thread, self._thread = self._thread, None
            self._waiting, self._current = [], []
            self._lock.notify_all()
        if thread is not None:
            thread.join(LAST)  # unless it is stuck: a program should not end amid its work

    # ── the thread ──

    def _begin(self) -> None:
        self._current, self._since = [], math.inf
        self._thread = threading.Thread(target=self._main, name="fewstep-delivery", daemon=True)
        self._thread.start()

    @torch.no_grad()
    def _main(self) -> None:
        while items := self._next():
            self.decoder.decode_all(items)
            for item in items:
                self._mark()
                try:
                    self._hand_over(item)
                except Exception as error:
                    if self._claim(item):
                        fail(item.slot.place, error, self.counts)
            self.changed()

    def _next(self) -> list[Item]:
        """What is handed over next; nothing when another thread has the place, or none has."""
        with self._lock:
            while self._thread is threading.current_thread():
                self._waiting = [item for item in self._waiting if not self._is_gone(item)]
                if self._waiting:
                    self._current, self._since = self._taken(), math.inf
                    return list(self._current)
                self._lock.wait()
        return []

    def _taken(self) -> list[Item]:
        """The first of those who wait, with its like; of a run nothing overtakes another."""
        firsts: dict[Slot, Item] = {}
        for item in self._waiting:
            firsts.setdefault(item.slot, item)
        taken = self.decoder.group(firsts.values())
        self._waiting = [item for item in self._waiting if item not in taken]
        return taken

    def _is_gone(self, item: Item) -> bool:
        """Whether nobody waits for it; at a run's end that is told."""
        if item.step is not None:
            return item.slot.place.is_given_up or item.slot.place.is_late
        return let_go(item.slot.place, self.counts)

    def _mark(self) -> None:
        """Says that the next of those at hand is handed over from now."""
        with self._lock:
            if self._thread is threading.current_thread():
                self._since = time.monotonic()

    def _claim(self, item: Item) -> bool:
        """Takes an item out of those at hand; False if another thread has taken the place."""
        with self._lock:
            if self._thread is not threading.current_thread() or item not in self._current:
                return False
            self._current.remove(item)
            self._since = math.inf  # the next is not begun yet
            return True

    # ── what is handed over ──

    def _hand_over(self, item: Item) -> None:
        """Gives an order its picture with its record, or tells of a step."""
        if item.step is not None:
            preview = self._preview(item)
            if self._claim(item):
                item.slot.tell(item.step, preview)
            return
        if isinstance(item.picture, Exception):
            raise item.picture
        assert item.picture is not None
        drawn = self._drawn(item.slot, item.picture)
        kept = replace(drawn, image=drawn.image.copy(), waited=0.0, seconds=0.0)
        if self._claim(item):
            self.pictures.put(item.slot.key, kept, kept.image.width * kept.image.height * 3)
            self.decoder.observe("picture", drawn.seconds)
            self.counts.a_picture_more()
            item.slot.place.mail.put(drawn)

    def _preview(self, item: Item) -> PIL.Image.Image | None:
        """The picture of a step; none where that fails."""
        if not isinstance(item.picture, PIL.Image.Image):
            return None
        try:
            seen, _ = self._checked(item.picture)
            return item.slot.finished(seen)
        except Exception:
            log.exception("a preview failed")
            return None

    def _drawn(self, slot: Slot, picture: PIL.Image.Image) -> Drawn:
        """A decoded picture, finished."""
        seen, notices = self._checked(picture)
        with warned() as others:
            final = slot.finished(seen)
        assert slot.began is not None
        began = replace(slot.began, warned=(*slot.began.warned, *notices, *others))
        record = self.decoder.loaded.record(slot.place.order, began, final.size)
        seconds = time.monotonic() - (slot.begun or slot.place.submitted)
        return Drawn(final, record, slot.waited, seconds)

    def _checked(self, picture: PIL.Image.Image) -> tuple[PIL.Image.Image, list[str]]:
        """The picture, or a black one if the checker of the model says so, and what to say."""
        flags = flagged(self.decoder.loaded.pipe, [picture])
        if flags is None or not any(flags):
            return picture, []
        return blackened([picture], flags)[0], [BLACK]
