"""The pictures under way, and whose step is next."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import PIL.Image

from ..pipelines.denoise import Run, Step
from .batching import kind_of
from .loaded import Beginning, Loras
from .orders import Stepped
from .tickets import Place

STAY = 4.0  # times as long as merging LoRAs took, their pictures are drawn before others' turn


@dataclass(eq=False)
class Slot:
    """A picture under way: not prepared, running, or at its end."""

    place: Place
    key: Hashable  # in the cache of pictures
    waited: float = 0.0  # seconds in the line
    began: Beginning | None = None
    run: Run | None = None
    begun: float | None = None  # when its first step was
    served: int = 0  # a number that grows with every call of the network

    @property
    def loras(self) -> Loras:
        """Those that its picture is drawn with."""
        return self.place.order.loras

    @property
    def running(self) -> Run:
        """Its run, once it is prepared."""
        assert self.run is not None
        return self.run

    @property
    def steps(self) -> int:
        """How many it takes."""
        return len(self.running.times)

    @property
    def is_shown(self) -> bool:
        """Whether its steps come with a picture."""
        return self.place.order.previews

    def tell(self, step: Step, preview: PIL.Image.Image | None = None) -> None:
        """Says that a step is done."""
        self.place.mail.put(Stepped(step.index + 1, self.steps, preview))

    def start(self, began: Beginning) -> None:
        """Now it can take steps."""
        self.began, self.run = began, Run.of(began.job)

    def finished(self, picture: PIL.Image.Image) -> PIL.Image.Image:
        """A decoded picture as the task finishes it."""
        assert self.began is not None
        finish = self.began.assignment.finish
        if finish is None:
            return picture
        (made,) = finish([picture])
        return made


@dataclass(eq=False)
class Slots:
    """As many pictures as may be under way at a time.

    Those of one kind step together; of several kinds the one that has waited longest is next, and
    so of several sets of LoRAs, which stay for a while, since merging costs time.
    """

    most: int
    together: bool = True
    merging: float = 0.0  # seconds that the last merge took
    spent: float = 0.0  # seconds of the set of LoRAs at hand
    loras: Loras = ()
    _slots: list[Slot] = field(default_factory=list)
    _calls: Any = field(default_factory=lambda: count(1))

    def __len__(self) -> int:
        return len(self._slots)

    @property
    def are_full(self) -> bool:
        """Whether nobody can join."""
        return len(self._slots) >= self.most

    def all(self) -> list[Slot]:
        """Everybody."""
        return list(self._slots)

    def add(self, slot: Slot) -> None:
        """Somebody joins, behind those who are there."""
        slot.served = next(self._calls)
        self._slots.append(slot)

    def remove(self, slot: Slot) -> None:
        """Somebody leaves, if he is still there."""
        if slot in self._slots:
            self._slots.remove(slot)

    def unprepared(self, loras: Loras) -> list[Slot]:
        """Those of a set of LoRAs who are to be prepared."""
        return [slot for slot in self._slots if slot.run is None and slot.loras == loras]

    def runs(self, loras: Loras) -> list[Slot]:
        """Those of a set of LoRAs who are prepared."""
        return [slot for slot in self._slots if slot.run is not None and slot.loras == loras]

    def next_loras(self) -> Loras | None:
        """Whose LoRAs are to be merged now, None if nobody is there."""
        if not self._slots:
            return None
        others = [slot for slot in self._slots if slot.loras != self.loras]
        stays = len(others) < len(self._slots) and (not others or self.spent <= STAY * self.merging)
        if not stays:
            self.loras, self.spent = min(others, key=lambda slot: slot.served).loras, 0.0
        return self.loras

    def next_group(self, loras: Loras) -> list[Slot]:
        """Those who take the next step together: the one that waited longest and its like."""
        waiting = sorted(self.runs(loras), key=lambda slot: slot.served)
        if not waiting:
            return []
        first = waiting[0]
        kind = kind_of(first.running)
        group = [s for s in waiting if kind_of(s.running) == kind] if self.together else [first]
        now = next(self._calls)
        for slot in group:
            slot.served = now
        return group
