"""What passes between the interfaces and the worker: orders go in, events come out.

An interface checks what a client sent, makes an `Order` of it and gives it to a worker, which
answers with a `Ticket`: a stream of events that ends with a picture or an error. Nothing here
knows HTTP, and nothing here knows tensors.
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from numbers import Integral, Real
from typing import Any, Literal, Protocol

import PIL.Image

from ..errors import FewstepError

Task = Literal["text", "image", "inpaint"]


class ServerError(FewstepError):
    """A refusal that a client is told: a code, the argument at fault, and what to do."""

    def __init__(
        self, code: str, message: str, *, param: str | None = None, hint: str | None = None
    ) -> None:
        super().__init__(message)
        self.code, self.param, self.hint = code, param, hint


class QueueFull(ServerError):
    """No place in the line; `retry_after` seconds is an estimate of when there is one."""

    def __init__(self, retry_after: float) -> None:
        super().__init__(
            "queue_full",
            "too many pictures are waiting",
            hint=f"try again in {math.ceil(retry_after)} s",
        )
        self.retry_after = retry_after


@dataclass(frozen=True)
class Limits:
    """What a server takes. Everything above is refused before any work."""

    body_bytes: int = 32 << 20
    decoded_pixels: int = 16_000_000
    smallest_side: int = 64
    largest_side: int = 2048
    pictures: int = 10  # of one request
    steps: int = 50
    prompt_characters: int = 8_000
    waiting: int = 64  # pictures in the line
    waiting_per_client: int = 16
    seconds: float = 300.0  # from admission to the end, unless the order has a deadline
    previews: int = 8  # of one picture
    frame_bytes: int = 8 << 20  # of one WebSocket message
    sockets: int = 64
    sockets_per_client: int = 8
    requests_per_minute: int = 600  # of one client


@dataclass(frozen=True, eq=False)
class Order:
    """One picture. None stands for the model's own default."""

    prompt: str
    negative_prompt: str | None = None
    seed: int = 0
    steps: int | None = None
    guidance_scale: float | None = None
    width: int | None = None
    height: int | None = None
    image: PIL.Image.Image | None = None
    mask: PIL.Image.Image | None = None  # white is drawn anew
    strength: float | None = None
    control: PIL.Image.Image | None = None  # for the control that the server has loaded
    control_scale: float = 1.0
    loras: tuple[tuple[str, float], ...] = ()  # (id, weight), of those that the server has loaded
    previews: bool = False  # whether steps come with a picture
    client: str = ""  # who is served fairly beside others
    seconds: float | None = None  # until it is given up

    @property
    def task(self) -> Task:
        """What is asked for."""
        if self.mask is not None:
            return "inpaint"
        return "text" if self.image is None else "image"

    def checked(self, limits: Limits) -> Order:
        """The order. Raises ServerError for what no model could draw, or what exceeds `limits`."""
        _text("prompt", self.prompt, limits)
        if self.negative_prompt is not None:
            _text("negative_prompt", self.negative_prompt, limits)
        _whole("seed", self.seed, 0, 2**64 - 1)
        if self.steps is not None:
            _whole("steps", self.steps, 1, limits.steps)
        for name in ("width", "height"):
            if (side := getattr(self, name)) is not None:
                _side(name, side, limits)
        if self.guidance_scale is not None:
            _number("guidance_scale", self.guidance_scale, 0.0, 30.0)
        if self.strength is not None:
            _number("strength", self.strength, 0.0, 1.0)
        _number("control_scale", self.control_scale, 0.0, 2.0)
        for _, weight in self.loras:
            _number("loras", weight, -2.0, 2.0)
        if self.mask is not None and self.image is None:
            raise ServerError(
                "invalid_request", "a mask needs an image", param="mask", hint="send the image too"
            )
        if self.strength is not None and self.image is None:
            raise ServerError(
                "invalid_request",
                "strength needs an image",
                param="strength",
                hint="leave it out, or send an image",
            )
        if self.seconds is not None:
            _number("seconds", self.seconds, 0.0, limits.seconds)
        return replace(self, seed=int(self.seed), seconds=self.seconds or limits.seconds)


# ── events of a ticket, in this order: Queued*, Started, Stepped*, then Drawn or Failed ──


@dataclass(frozen=True)
class Queued:
    """How many pictures stand before this one."""

    ahead: int


@dataclass(frozen=True)
class Started:
    """The first step is being taken."""

    waited: float  # seconds


@dataclass(frozen=True, eq=False)
class Stepped:
    """A step is done; `preview` is what its prediction of the end looks like, if it was asked."""

    step: int  # 1 to steps
    steps: int
    preview: PIL.Image.Image | None = None


@dataclass(frozen=True, eq=False)
class Drawn:
    """The picture, and the record that draws it again."""

    image: PIL.Image.Image
    record: dict[str, Any]
    waited: float  # seconds in the line
    seconds: float  # from the first step to the decoded picture
    cached: bool = False


@dataclass(frozen=True)
class Failed:
    """The end without a picture."""

    error: ServerError


Event = Queued | Started | Stepped | Drawn | Failed


class Ticket(Protocol):
    """One order under way."""

    id: str  # opaque

    def events(self) -> AsyncIterator[Event]:
        """What becomes of the order; ends behind Drawn or Failed. For one reader."""
        ...

    async def result(self) -> Drawn:
        """The picture. Raises the ServerError that it failed with."""
        ...

    def cancel(self) -> None:
        """Give it up: its place is free within a step. Does nothing at the end."""
        ...


@dataclass(frozen=True)
class ModelFacts:
    """What a client may know of the loaded model."""

    id: str
    family: str
    native_size: tuple[int, int]  # width, height
    multiple: int  # of which sides are
    steps: tuple[int, int, int]  # least, most, default
    guidance: tuple[float, float, float]
    tasks: tuple[Task, ...]
    loras: tuple[tuple[str, str], ...] = ()  # (id, name)
    controls: tuple[str, ...] = ()
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Load:
    """How busy a worker is."""

    waiting: int
    running: int
    drawn: int
    failed: int
    cancelled: int
    batches: int  # network calls so far
    rows: int  # pictures in them, added up
    seconds_per_step: float | None  # a moving average


class Worker(Protocol):
    """One model on one device."""

    facts: ModelFacts
    limits: Limits
    is_ready: bool

    def start(self) -> None:
        """Begin to load and to serve, in a thread of its own."""
        ...

    def submit(self, order: Order) -> Ticket:
        """Take an order. Raises ServerError (QueueFull) if it cannot be served."""
        ...

    def load(self) -> Load:
        """How busy it is."""
        ...

    def drain(self, seconds: float) -> None:
        """Refuse new orders, finish what is under way, for so long at most, then end."""
        ...


def _text(name: str, value: Any, limits: Limits) -> None:
    if not isinstance(value, str):
        raise ServerError("invalid_request", f"{name} must be a text, got {value!r}", param=name)
    if len(value) > limits.prompt_characters:
        raise ServerError(
            "invalid_request",
            f"{name} has {len(value)} characters; at most {limits.prompt_characters} are taken",
            param=name,
            hint="shorten it",
        )
    if any(0xD800 <= ord(character) <= 0xDFFF or character == "\0" for character in value):
        raise ServerError(
            "invalid_request",
            f"{name} holds a character that is none (a NUL or half a surrogate pair)",
            param=name,
            hint="send valid UTF-8",
        )


def _whole(name: str, value: Any, least: int, most: int) -> None:
    is_whole = isinstance(value, Integral) and not isinstance(value, bool)
    if not is_whole or not least <= value <= most:
        raise ServerError(
            "invalid_request",
            f"{name} must be a whole number from {least} to {most}, got {value!r}",
            param=name,
        )


def _number(name: str, value: Any, least: float, most: float) -> None:
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or not least <= value <= most:
        raise ServerError(
            "invalid_request",
            f"{name} must be a number from {least:g} to {most:g}, got {value!r}",
            param=name,
        )


def _side(name: str, value: Any, limits: Limits) -> None:
    _whole(name, value, limits.smallest_side, limits.largest_side)
    if value % 8:
        below = value // 8 * 8
        raise ServerError(
            "invalid_request",
            f"{name} must be a multiple of 8, got {value}",
            param=name,
            hint=f"the nearest are {below} and {below + 8}",
        )
