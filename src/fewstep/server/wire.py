"""Orders, events and the rest of `orders.py` as plain values, and back.

They pass between processes of one user, which pickle what they send each other. Whatever a client
sent is text, numbers and pixels here, so nothing of a client's is ever unpickled as an object.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import PIL.Image

from .orders import Drawn, Failed, Load, ModelFacts, Order, Queued, ServerError, Started, Stepped

KINDS: dict[str, Any] = {
    kind.__name__: kind
    for kind in (Order, Queued, Started, Stepped, Drawn, Failed, ModelFacts, Load)
}
PICTURES = {"image", "mask", "control", "preview"}
MODES = ("RGB", "L")  # of pictures; a pipeline makes RGB of any other


def pack(thing: Any) -> dict[str, Any]:
    """One of `KINDS` as a dictionary of plain values."""
    values = {field.name: plain(getattr(thing, field.name)) for field in fields(thing)}
    return {"kind": type(thing).__name__, **values}


def plain(value: Any) -> Any:
    """A picture as mode, size and pixels; an error as its words; anything else as it is."""
    if isinstance(value, PIL.Image.Image):
        picture = value if value.mode in MODES else value.convert("RGB")
        return (picture.mode, picture.size, picture.tobytes())
    if isinstance(value, ServerError):
        return (value.code, str(value), value.param, value.hint)
    return value


def unpack(values: dict[str, Any]) -> Any:
    """What `pack` made a dictionary of."""
    found = {name: whole(name, value) for name, value in values.items() if name != "kind"}
    return KINDS[values["kind"]](**found)


def whole(name: str, value: Any) -> Any:
    """The value of a field as it was."""
    if value is not None and name in PICTURES:
        return PIL.Image.frombytes(*value)
    if name == "error":
        code, message, param, hint = value
        return ServerError(code, message, param=param, hint=hint)
    return value
