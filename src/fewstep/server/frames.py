"""The frames of a live WebSocket: what JSON asks for, and what is told in JSON."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from .asking import OrderFields, validated
from .orders import Limits, ModelFacts, ServerError
from .pictures import MEDIA, Format
from .problems import LONGEST, invalid

PICTURES = ("image", "mask", "control")


@dataclass(frozen=True)
class Draw:
    """A frame that asks for a picture."""

    n: int
    fields: OrderFields
    format: Format
    came: float  # seconds, of the performance counter


def number_of(message: Mapping[str, Any]) -> int | None:
    """The number that a client gave its frame, if it is one."""
    n = message.get("n")
    return n if isinstance(n, int) and not isinstance(n, bool) and 0 <= n < 2**53 else None


def draw_of(message: Mapping[str, Any], kept: dict[str, str]) -> Draw:
    """What a frame asks for. `kept` are the last pictures of the socket, and brought up to date.

    Raises ServerError if it asks for nothing that is known.
    """
    came = time.perf_counter()
    if message.get("type") != "draw":
        raise invalid('a frame has the type "draw" or "seen"', "type")
    n, order, kind = number_of(message), message.get("order"), message.get("format", "jpeg")
    if n is None:
        raise invalid("n must be a whole number from 0 up", "n")
    if kind not in tuple(MEDIA):
        raise invalid(f"format must be one of {', '.join(MEDIA)}", "format")
    if not isinstance(order, dict):
        raise invalid("order must be an object", "order")
    given = {name: order[name] for name in PICTURES if name in order}
    fields = validated(OrderFields, {**kept, **order})
    for name, text in given.items():
        kept.pop(name, None)
        kept.update({} if text is None else {name: text})
    return Draw(n, fields, kind, came)


def failed(n: int | None, error: ServerError) -> dict[str, Any]:
    """The frame that tells an error."""
    told = {
        "code": error.code,
        "message": str(error)[:LONGEST],
        "param": error.param and error.param[:128],
        "hint": error.hint and error.hint[:LONGEST],
    }
    return {"type": "error", "n": n, "error": told}


def hello(limits: Limits, facts: ModelFacts) -> dict[str, Any]:
    """The first frame: what can be asked for."""
    return {"type": "hello", "limits": asdict(limits), "model": model_of(facts)}


def model_of(facts: ModelFacts) -> dict[str, Any]:
    """A model's facts as clients read them."""
    ends = ("min", "max", "default")
    return {
        "id": facts.id,
        "family": facts.family,
        "native_size": list(facts.native_size),
        "multiple": facts.multiple,
        "steps": dict(zip(ends, facts.steps, strict=True)),
        "guidance": dict(zip(ends, facts.guidance, strict=True)),
        "tasks": list(facts.tasks),
        "loras": [{"id": name, "name": shown} for name, shown in facts.loras],
        "controls": list(facts.controls),
        "approximations": list(facts.extra.get("approximations", ())),
    }
