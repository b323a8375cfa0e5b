"""One model on one device, in a thread that takes a step of many pictures at a time.

Between two calls of the network pictures join and leave: nobody waits for a batch to fill, and
nobody for one to end.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .batching import answers
from .caches import Cache
from .counts import Counts
from .decoding import PIXELS, Decoder
from .delivery import Delivery
from .drawing import Drawing
from .line import Line
from .loading import load
from .orders import Drawn, Limits, Load, ModelFacts, Order, ServerError
from .previews import Previewer
from .slots import Slot, Slots
from .tickets import Place, PlacedTicket
from .troubles import fail, let_go, not_ready

log = logging.getLogger(__name__)

CACHED = 64 << 20  # bytes of each cache
GRACE = 10.0  # seconds for the last step, behind the time that a drain is given
WATCHED = 0.5  # seconds between two looks at what is handed over, while nothing else is to be done


class PipelineWorker:
    """A worker (`orders.Worker`) of any text-to-image checkpoint.

    `loras` are folders, files or repositories, or (id, place); an id is otherwise the name. They
    are merged when pictures that want them have their turn. `control` is a ControlNet or a
    T2I-Adapter. At most `max_batch` pictures are under way at a time.

    `deterministic`: each call of the network and of the VAE is of one picture, which is then what
    the pipeline draws alone, to the bit; requests still take turns. Otherwise rounding differs.

    `text_bytes`, `latent_bytes` and `picture_bytes` bound the caches of embedded texts, of encoded
    pictures and of answers; 0 turns one off. An equal order gets the picture that is kept.

    `observe`, which may be replaced, is told how many seconds a stage took: queue, merge, prepare,
    step, preview, decode, picture. It is called from two threads.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        limits: Limits | None = None,
        *,
        deterministic: bool = False,
        loras: Sequence[str | tuple[str, str]] = (),
        control: str | None = None,
        max_batch: int = 8,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        scheduler: Any = None,
        text_bytes: int = CACHED,
        latent_bytes: int = CACHED,
        picture_bytes: int = CACHED,
    ) -> None:
        if max_batch < 1:
            raise ValueError(f"max_batch must be at least 1, got {max_batch}")
        self.limits = limits or Limits()
        self.deterministic = deterministic
        self.observe: Callable[[str, float], None] = lambda stage, seconds: None
        self.failure: BaseException | None = None
        self._texts: Cache[Any] = Cache(text_bytes)
        self._latents: Cache[Any] = Cache(latent_bytes)
        self._pictures: Cache[Drawn] = Cache(picture_bytes)
        self._load = lambda: load(
            model,
            self.limits,
            loras=loras,
            control=control,
            dtype=dtype or usual_dtype(usual_device(device)),
            device=usual_device(device),
            scheduler=scheduler,
            texts=self._texts,
            latents=self._latents,
        )
        self._work: Drawing | None = None  # once the model is loaded
        self._line: Line[Place] = Line(self.limits.waiting, self.limits.waiting_per_client)
        self._slots = Slots(max_batch, together=not deterministic)
        self._lock = threading.Condition()  # of the line and of the two flags
        self._is_draining = self._is_stopping = False
        self._started, self._settled = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._main, name="fewstep-worker", daemon=True)
        self._joining = 0  # who is neither in the line nor in a slot
        self._counts = Counts()

    # ── what interfaces call, from any thread ──

    def start(self) -> None:
        """Begin to load and to serve, in a thread of its own."""
        if not self._started.is_set():
            self._started.set()
            self._thread.start()

    @property
    def is_ready(self) -> bool:
        """Whether orders are taken: the first picture was drawn, and it is not draining."""
        return self._settled.is_set() and self.failure is None and not self._is_draining

    @property
    def is_loading(self) -> bool:
        """Whether the model is not there yet."""
        return self._started.is_set() and not self._settled.is_set()

    def wait_until_ready(self, seconds: float | None = None) -> bool:
        """Waits until orders are taken; whether they are. Raises what loading failed with."""
        self._settled.wait(seconds)
        if self.failure is not None:
            raise self.failure
        return self.is_ready

    @property
    def facts(self) -> ModelFacts:
        """What a client may know of the model. Raises ServerError while it loads."""
        if self._work is None:
            raise not_ready("the model is still loading" if self.failure is None else "no model")
        return self._work.loaded.facts

    def submit(self, order: Order) -> PlacedTicket:
        """Take an order. Raises ServerError (QueueFull) if it cannot be served."""
        if self._is_draining:
            raise not_ready("the server is shutting down")
        if not self.is_ready or self._work is None:
            raise not_ready("the model is still loading")
        place = Place(self._work.loaded.settled(order.checked(self.limits)))
        ticket = PlacedTicket(place)
        with self._lock:
            if self._is_draining or self.failure is not None:
                raise not_ready("the server is shutting down")
            self._line.put(order.client, place, self._counts.picture_seconds or 1.0)
            for ahead, waiting in enumerate(self._line):
                waiting.tell_ahead(ahead)
            self._lock.notify()
        return ticket

    def load(self) -> Load:
        """How busy it is."""
        with self._lock:
            waiting, running = len(self._line), len(self._slots) + self._joining
        if self._work is not None:
            running += len(self._work.delivery)
        counts = self._counts
        return Load(
            waiting=waiting,
            running=running,
            drawn=counts.drawn,
            failed=counts.failed,
            cancelled=counts.cancelled,
            batches=counts.batches,
            rows=counts.rows,
            seconds_per_step=counts.step_seconds,
        )

    def drain(self, seconds: float) -> None:
        """Refuse new orders, finish what is under way, for so long at most, then end.

        Blocks until then. What is not finished fails with `not_ready`. Loading is not waited for.
        """
        with self._lock:
            self._is_draining, self._is_stopping = True, not self._settled.is_set()
            self._lock.notify()
        if self._is_stopping:
            return
        if self._thread.is_alive():
            self._thread.join(seconds)
        self._is_stopping = True
        if self._thread.is_alive():
            self._thread.join(GRACE)

    # ── the thread ──

    def _main(self) -> None:
        with torch.no_grad():
            try:
                self._work = self._made_ready()
            except BaseException as error:
                self.failure = error
                log.exception("the model could not be loaded")
                return
            finally:
                self._settled.set()
            try:
                self._serve(self._work)
            except BaseException as error:  # a mistake of ours: nothing would be drawn any more
                self.failure = error
                log.exception("the worker has ended")
            self._end_all(self._work, not_ready("the server is shutting down"))

    def _serve(self, work: Drawing) -> None:
        """Turn after turn, until there is no more to do."""
        while self._waited_for_work(work.delivery):
            self._leave(work.delivery)
            self._join(work)
            work.turn()

    def _made_ready(self) -> Drawing:
        """The model, loaded, behind a first picture: the next finds everything in its place."""
        loaded = self._load()
        previewer = Previewer(loaded.pipe)
        decoder = Decoder(loaded, previewer, self._tell, 1 if self.deterministic else PIXELS)
        is_aside = loaded.pipe.unet.device.type != "cpu"
        delivery = Delivery(decoder, self._pictures, self._counts, self._wake, is_aside)
        work = Drawing(
            loaded,
            delivery,
            self._slots,
            self._pictures,
            self._counts,
            self._tell,
            self.limits.previews,
        )
        slot = Slot(Place(loaded.settled(Order("a cat", steps=2))), "warm-up")
        work.prepare(slot)
        while not slot.running.is_done:
            slot.running.advance(answers(loaded.pipe.unet, [slot.running])[0])
        previewer.fit(slot.running.z, decoder.pictures([slot.running.z])[0])
        return work

    def _tell(self, stage: str, seconds: float) -> None:
        """Tells who observes now, whose mistakes are no order's."""
        try:
            self.observe(stage, seconds)
        except Exception:
            log.exception("the observer of %r failed", stage)

    def _wake(self) -> None:
        """Let the thread look again whether there is something to do."""
        with self._lock:
            self._lock.notify()

    def _waited_for_work(self, delivery: Delivery) -> bool:
        """Waits until there may be something to do; whether there will be any."""
        with self._lock:
            # One look at how many: whom delivery drops, it wakes nobody for.
            while not self._is_stopping and not self._can_go_on(ended := len(delivery)):
                if self._is_draining and not ended and not len(self._line):
                    return False
                if not self._lock.wait(WATCHED if ended else None):
                    break
        return not self._is_stopping

    def _can_go_on(self, ended: int) -> bool:
        """Whether there is a step to take, or somebody who can join."""
        return bool(len(self._slots) or (len(self._line) and self._has_room(ended)))

    def _has_room(self, ended: int) -> bool:
        """Whether one more can join: what steps are quicker than is decoded must not pile up."""
        return not self._slots.are_full and ended < self._slots.most

    # ── who is there ──

    def _leave(self, delivery: Delivery) -> None:
        """Those who gave up or whose time is over are dropped, wherever they stand."""
        with self._lock:
            for place in list(self._line):
                if let_go(place, self._counts):
                    self._line.remove(place)
            for slot in self._slots.all():
                if let_go(slot.place, self._counts):
                    self._slots.remove(slot)
        delivery.leave()

    def _join(self, work: Drawing) -> None:
        """Takes as many out of the line as there are free slots; known pictures need none."""
        moved = False
        while self._has_room(len(work.delivery)):
            with self._lock:
                place = self._line.pop()
                self._joining = int(place is not None)
            if place is None:
                break
            moved = True
            work.take(place)
            self._joining = 0
        if moved:
            with self._lock:
                for ahead, waiting in enumerate(self._line):
                    waiting.tell_ahead(ahead)

    def _end_all(self, work: Drawing, error: ServerError) -> None:
        """Fails all that is left."""
        with self._lock:
            while (place := self._line.pop()) is not None:
                fail(place, error, self._counts)
        for slot in self._slots.all():
            work.fail(slot, error)
        work.delivery.end(error)


def usual_device(asked: torch.device | str | None) -> torch.device:
    """The device that is asked for, or the first of cuda, mps and cpu that is there."""
    if asked is not None and asked != "auto":
        return torch.device(asked)
    if torch.cuda.is_available():
        return torch.device("cuda", 0)
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def usual_dtype(device: torch.device) -> torch.dtype:
    """float32 on a CPU, which is slow at less, else float16."""
    return torch.float32 if device.type == "cpu" else torch.float16
