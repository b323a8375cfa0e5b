"""What of a recipe means nothing, refused as it is read: numbers, and entries nobody reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from math import inf
from typing import TYPE_CHECKING

from ..errors import RequestError

if TYPE_CHECKING:
    from .config import Recipe

SHARE = (0.0, 1.0)
TINY = 1e-9
# Section -> entry -> (least, most), of whichever kind of data has the entry.
LIMITS: Mapping[str, Mapping[str, tuple[float, float]]] = {
    "data": {
        "empty_captions": SHARE,
        "flip": SHARE,
        "held_out": (0, inf),
        "workers": (0, inf),
        "variants": (1, inf),
        "limit": (0, inf),
        "min_side": (0, inf),
        "scenes": (1, inf),
    },
    "optimizer": {
        "lr": (0, inf),
        "weight_decay": (0, inf),
        "warmup": (0, inf),
        "final_lr": SHARE,
        "clip": (TINY, inf),  # 0 would not mean "never", but stop the training; inf is "never"
    },
    "run": {
        "steps": (1, inf),
        "ema": SHARE,
        "threads": (0, inf),
        "checkpoint_minutes": (0, inf),
        "sheet_steps": (0, inf),
    },
}
# What sources of data, phases that encode nothing, and phases of small networks do not read.
OF_OTHER_SOURCES = {"folder": ("data.split", "data.image_key"), "webdataset": ("data.split",)}
OF_ENCODED = ("data.duotone", "data.empty_captions", "data.held_out", "data.cache")
OF_LARGE = ("run.gradient_checkpointing", "run.compile")


def check_numbers(recipe: Recipe) -> None:
    """Raises RequestError for the first number that lies outside its limits."""
    for section, limits in LIMITS.items():
        values = vars(getattr(recipe, section))
        for name, (least, most) in limits.items():
            value = values.get(name, least)
            if least <= value <= most:
                continue
            wrong = f"{section}.{name}={value}"
            if most == 1:
                raise RequestError(f"{wrong} is a share; it must lie in [0, 1]")
            above = "above 0 (inf: no limit)" if least == TINY else f"at least {least:g}"
            raise RequestError(f"{wrong} must be {above}")


def refuse_unread(recipe: Recipe, encoded: Sequence[str], source: str) -> None:
    """Raises RequestError for entries that the phase, or the source of the data, does not read.

    `encoded` are the phases that work on encoded data.
    """
    phase, kind = f"the phase {recipe.phase!r}, but by", recipe.data.source
    unread = dict.fromkeys(OF_OTHER_SOURCES.get(kind, ()), f"the source {kind!r}")
    if recipe.phase not in encoded:
        unread |= dict.fromkeys(OF_ENCODED, f"{phase} {' and '.join(encoded)}")
    if recipe.phase != "consistency":
        unread |= dict.fromkeys(OF_LARGE, f"{phase} consistency")
    for section in ("data", "run"):
        values = getattr(recipe, section)
        for entry in fields(values):
            name = f"{section}.{entry.name}"
            if name in unread and getattr(values, entry.name) != entry.default:
                raise RequestError(f"{source}: {name} is not read by {unread[name]}; leave it out")
