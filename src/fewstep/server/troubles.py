"""Orders that end without a picture: what a client is told, and how memory is given back."""

from __future__ import annotations

import gc
import logging

import torch

from ..errors import RequestError, UnsupportedConfig
from .counts import Counts
from .orders import Failed, ServerError
from .tickets import Place

log = logging.getLogger(__name__)
NO_MEMORY = ("out of memory", "not enough memory", "can't allocate memory", "alloc_failed")


def fail(place: Place, error: BaseException, counts: Counts) -> None:
    """Ends an order by an error that its client may see; ours goes to the log."""
    said = told(error)
    if said.code == "internal":
        log.error("a picture could not be drawn", exc_info=error)
    if place.mail.put(Failed(said)):
        counts.an_end_more(was_given_up=False)


def let_go(place: Place, counts: Counts) -> bool:
    """Ends an order that nobody waits for any more, or not for longer; whether it was one."""
    if place.is_given_up:
        if place.mail.put(Failed(ServerError("cancelled", "the picture was given up"))):
            counts.an_end_more(was_given_up=True)
    elif place.is_late:
        fail(place, late(place), counts)
    else:
        return False
    return True


def late(place: Place) -> ServerError:
    """The order's time is over."""
    return ServerError(
        "timeout",
        f"the picture was not done within {place.order.seconds:g} s",
        hint="ask for fewer steps or a smaller size, or try again when less is going on",
    )


def not_ready(message: str) -> ServerError:
    """Not now, but perhaps soon."""
    return ServerError("not_ready", message, hint="try again in a few seconds")


def told(error: BaseException) -> ServerError:
    """An error as a client may see it: its own mistakes in words, ours without a detail."""
    if isinstance(error, ServerError):
        return error
    if is_out_of_memory(error):
        return ServerError(
            "insufficient_memory",
            "there is not enough memory for this picture",
            hint="ask for a smaller size",
        )
    if isinstance(error, (RequestError, UnsupportedConfig)):
        return ServerError("invalid_request", str(error))
    return ServerError("internal", "the picture could not be drawn")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on a device or here."""
    text = str(error).lower()
    is_torchs = isinstance(error, RuntimeError) and any(words in text for words in NO_MEMORY)
    return is_torchs or isinstance(error, MemoryError)


def cleared() -> None:
    """Gives back the memory that nothing holds any more. Call it outside the `except` block."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
